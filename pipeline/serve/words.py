"""What the figures of metrics.json are called, for people: as their stages labelled them, and the report's tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pipeline.metrics.base import FIGURES

# Of pre-training and of principal components, whose stages write keys alone; as in pipeline/report/tables.py.
WORDS = {
    "val": "distance to the own picture",
    "shuffled": "distance to another picture",
    "const_token": "distance to the best constant token",
    "const_set": "distance to the best constant set",
    "image_gain": "image gain",
    "gain": "image gain",
    "gain_relative": "image gain, as a share",
    "held_out": "held-out pictures",
    "parameters": "parameters",
    "nearest_in_caption": "nearest words that its text has",
    "nearest_in_shuffled": "nearest words that another picture's text has",
    "k80": "components for 80\u00a0% of the variance",
    "val_loss": "validation loss",
    "scratch_val_loss": "validation loss from scratch",
}
STATES = {
    "epoch1": "after one epoch", "last": "after the last epoch", "finetuned": "after fine-tuning",
    "text": "of the text tokens alone",
}  # fmt: skip
ENDS = {"_low": ", lower end of its 95\u00a0% interval", "_high": ", upper end of its 95\u00a0% interval"}


def labels_of(profile: Path) -> dict[str, str]:
    """The labels that stages gave their figures, by the keys of metrics.json; what cannot be read has none."""
    found = {}
    for stage in ("evaluate", "name"):
        for path in sorted((profile / stage).glob(f"*/*/{FIGURES}")):
            data, (adapter, _, recipe) = path.parent.name, path.parents[1].name.partition("-")
            try:
                for one in json.loads(path.read_text(encoding="utf-8")):
                    of = [data, *([] if one["baseline"] else [adapter, *([recipe] if recipe else [])])]
                    found["/".join([*of, one["key"]])] = _said(one["label"], of)
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


def word_for(key: str) -> str | None:
    """What a key of the stages that write no labels is called; None for all others."""
    kind, *of = key.split("/")
    last = of.pop() if of else ""
    if kind == "seconds":
        return f"seconds of the stage {'/'.join([*of, last])}"
    if kind == "pca" and last in WORDS and len(of) == 2:
        return _said(f"{WORDS[last]} {STATES.get(of[1], of[1])}", of[:1])
    if key.endswith("/val_loss/namer"):
        return _said("validation loss of the namer", [kind, *of[:-1]])
    if last in ("val_loss", "scratch_val_loss"):
        return _said(WORDS[last], [kind, *of])
    what = _word(last)
    return _said(what, of) if what and len(of) == 1 else None


def _word(last: str) -> str | None:
    """Of a figure of pre-training."""
    plain = last.startswith("plain_")
    name = last.removeprefix("plain_")
    end = next((end for end in ENDS if name.endswith(end)), "")
    name = name.removesuffix(end)
    found = re.fullmatch(r"r(\d+)_(raw|debiased)", name)
    nearest = f" among the {found[1]} nearest" if found and found[1] != "1" else ""
    what = f"finds its text{nearest}, {found[2]}" if found else WORDS.get(name)
    return what and f"{what}{' in plain EMD' if plain else ''}{ENDS.get(end, '')}"


def _said(what: str, of: list[str]) -> str:
    """'accuracy: classes, mlp on classes'."""
    *before, last = of
    return f"{what}: {', '.join([*before, last])}"
