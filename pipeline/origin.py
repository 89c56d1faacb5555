"""What an adapter was made from, kept beside its weights, and held against what it is used with.

DVC runs again what a change of parameters touches; commands that are run by hand do not. Without this they would answer
with an adapter of another encoder or LLM, and nobody would see it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import LLM
from pipeline.errors import UserError
from pipeline.runs import EXTRACTED_BY, Kind, Run, remedy
from pipeline.store.shards import Manifest

FILE = "origin.json"
# Not its dtype, nor how pictures are decoded: an adapter trained on a GPU answers on a CPU, too. The last two are of a
# user's own encoder alone.
ENCODER = ("encoder", "model", "weights", "preprocess", "settings", "code")
LANGUAGE_MODEL = ("loader", "model", "revision", "quantization", "system_prompt")
SAMPLED = 8  # words, and numbers of each


@dataclass(frozen=True)
class Words:
    """A sample of an LLM's input embeddings: enough to tell it from another one, in any dtype."""

    ids: list[int]
    width: int
    values: list[list[float]]

    @classmethod
    def of(cls, ids: list[int], embed: Callable[[list[int]], Tensor]) -> Words:
        """Of some token ids, evenly spaced; `embed` gives their embeddings [n, D]."""
        chosen = ids[:: max(1, len(ids) // SAMPLED)][:SAMPLED]
        rows = embed(chosen)
        return cls(chosen, rows.shape[1], rows[:, :SAMPLED].float().tolist())

    @classmethod
    def of_module(cls, embedding: torch.nn.Embedding) -> Words:
        return cls.of(list(range(len(embedding.weight))), _embed(embedding))

    def are_of(self, embedding: torch.nn.Embedding) -> bool:
        """Whether an LLM has these embeddings, but for what rounding to bfloat16 can do to them."""
        if max(self.ids) >= len(embedding.weight):
            return False
        mine, values = _embed(embedding)(self.ids), torch.tensor(self.values)
        if mine.shape[1] != self.width:
            return False
        mine = mine[:, :SAMPLED].float()
        return torch.allclose(mine, values, rtol=0.02, atol=0.01 * float(values.abs().max()))


def _embed(embedding: torch.nn.Embedding) -> Callable[[list[int]], Tensor]:
    @torch.no_grad()
    def rows(ids: list[int]) -> Tensor:
        found: Tensor = embedding(torch.tensor(ids, device=embedding.weight.device))
        return found.cpu()

    return rows


@dataclass(frozen=True)
class Origin:
    """What decides an adapter besides its own parameters.

    `tokens` is the fingerprint of the image tokens; `llm`, of a fine-tuned one, the parameters of its LLM; `start` the
    SHA-256 of the pre-trained weights it began with.
    """

    tokens: str
    encoder: dict[str, str]
    words: Words
    llm: dict[str, Any] | None = None
    start: str | None = None

    @classmethod
    def of(cls, run: Run, data: str, words: Words, llm: LLM | None = None, start: Path | None = None) -> Origin:
        """Of an adapter that is being trained on the image tokens of a data set."""
        manifest = Manifest.read(run.features("images", data))
        encoder = {key: value for key, value in (manifest.encoder or {}).items() if key in ENCODER}
        named = None if llm is None else {key: getattr(llm, key) for key in LANGUAGE_MODEL}
        return cls(manifest.fingerprint, encoder, words, named, weights_of(start) if start else None)

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Origin:
        """Raises UserError when the adapter of a folder is not there, or says nothing of its origin."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(**values | {"words": Words(**values["words"])})
        except FileNotFoundError:
            why = "is of an earlier version" if folder.is_dir() else "is not there"
            raise UserError(folder, f"this adapter {why}", remedy(folder)) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(folder / FILE, f"cannot be read ({error})", remedy(folder)) from None


def weights_of(path: Path) -> str:
    """SHA-256 of a file of weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_start(folder: Path, pretrained: Path) -> None:
    """UserError where what lies in a folder was made from other weights of a pre-trained adapter than those of now."""
    if Origin.read(folder).start != weights_of(pretrained / "last.safetensors"):
        raise UserError(folder, f"this was made from other weights than {pretrained} has now", remedy(folder))


def check_tokens(folder: Path, run: Run, data: str) -> Origin:
    """The origin of an adapter that was trained on the image tokens that are there now; else UserError."""
    origin, now = Origin.read(folder), Manifest.read(run.features("images", data)).fingerprint
    if origin.tokens != now:
        raise UserError(
            folder,
            (
                f"this adapter was trained on other image tokens (fingerprint {origin.tokens}) than those of "
                f"{data} are now ({now})"
            ),
            remedy(folder),
        )
    return origin


def check_encoder(folder: Path, identity: Mapping[str, str]) -> Origin:
    """The origin of an adapter that was trained on tokens of an encoder with this identity; else UserError."""
    origin = Origin.read(folder)
    if not origin.encoder:
        raise UserError(
            folder,
            "its image tokens do not name their encoder, as those of earlier versions",
            "run `dvc repro --force extract_images` and `dvc repro`",
        )
    for key in ENCODER:
        was, now = origin.encoder.get(key, ""), identity.get(key, "")
        if was != now:
            short = {"weights": 12, "code": 12}.get(key, 200)
            raise UserError(
                folder,
                (
                    f"this adapter was trained on image tokens of another vision encoder ({key} "
                    f"{was[:short] or 'none'}) than params.yaml names now ({key} {now[:short] or 'none'})"
                ),
                remedy(folder),
            )
    return origin


def check_llm_named(folder: Path, llm: LLM) -> None:
    """UserError where a fine-tuned adapter was trained with another LLM than the parameters name."""
    named = Origin.read(folder).llm or {}
    for key, was in named.items():
        if was != getattr(llm, key):
            raise UserError(
                folder,
                f"this adapter was trained with llm.{key} {was!r}, params.yaml has {getattr(llm, key)!r}",
                remedy(folder),
            )


def check_llm(folder: Path, embedding: torch.nn.Embedding) -> None:
    """UserError where an adapter was aligned with another LLM than the one whose input embeddings these are."""
    if not Origin.read(folder).words.are_of(embedding):
        raise UserError(folder, "this adapter was trained for another LLM than params.yaml names now", remedy(folder))


def check_results(run: Run, adapter: str, llm: LLM, recipes: Mapping[str, Sequence[str]]) -> list[Path]:
    """The folders of an adapter, pre-trained and fine-tuned, that all are of the image tokens and the LLM of now.

    `recipes` are those of the fine-tunings, with their data sets. Raises UserError naming the first folder that is
    not, or that began with other pre-trained weights.
    """
    pretrained = run.pretrained(adapter)
    start = weights_of(pretrained / "last.safetensors") if Origin.read(pretrained) else ""
    folders = [pretrained]
    for recipe, sets in recipes.items():
        folder = run.finetuned(adapter, recipe)
        for data in sets:
            origin = check_tokens(folder, run, data)
            check_tokens(pretrained, run, data)
        check_llm_named(folder, llm)
        if origin.start != start:
            raise UserError(folder, f"this adapter was fine-tuned from other weights than {pretrained}", remedy(folder))
        folders.append(folder)
    return folders


def check_of_one_kind(run: Run, kind: Kind, sets: list[str]) -> None:
    """UserError where the features of some data sets are of different models."""
    prints = {Manifest.read(run.features(kind, data)).fingerprint for data in sets}
    if len(prints) > 1:
        stage, model = EXTRACTED_BY[kind], "encoders" if kind == "images" else "LLMs"
        raise UserError(
            run.base / kind,
            f"the features of {' and '.join(sets)} are of different {model}",
            f"run `dvc repro {stage}`",
        )
