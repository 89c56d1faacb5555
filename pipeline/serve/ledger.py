"""What all runs of a project came to: figures, curves, and the command behind each."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.naming.rules import RULES
from pipeline.runs import MODELS, RAW, RESULTS, STORE
from pipeline.serve.words import labels_of, word_for

# Stage, column of x, columns of y.
CURVES = (
    ("pretrain", "epoch", ("val", "shuffled", "const_set")),
    ("finetune", "step", ("val_loss",)),
    ("finetune_scratch", "step", ("val_loss",)),
)
SHARED = {folder.name for folder in (STORE, RAW, MODELS)}
PATIENCE = 60  # seconds for `dvc exp show`


def ledger() -> dict[str, Any]:
    """The profiles with results below data/, with their pictures in words; figures by key, each with its name for
    people and its command; curves; and whether pictures differ, so that figures do not compare."""
    profiles = sorted(folder.name for folder in _runs())
    figures: dict[str, dict[str, Any]] = {}
    for profile in profiles:
        labels = labels_of(RESULTS / profile)
        for key, value in _figures(RESULTS / profile / "metrics.json").items():
            one = figures.setdefault(key, {"command": command_of(key), "label": word_for(key), "values": {}})
            one["values"][profile], one["label"] = value, labels.get(key) or one["label"]
    curves = [curve for profile in profiles for curve in _curves(profile)]
    pictures = {profile: _pictures(profile) for profile in profiles}
    return {
        "profiles": profiles, "figures": figures, "curves": curves,
        "pictures": {profile: ", ".join(found) for profile, found in pictures.items()},
        "differ": len({tuple(found.values()) for found in pictures.values()}) > 1,
    }  # fmt: skip


def _pictures(profile: str) -> dict[str, str]:
    """The data sets of a profile in words, each with a digest of its list of pictures; none where that is not here."""
    found = {}
    for path in sorted((RESULTS / profile / "prepare").glob("*.parquet")):
        try:
            rows = pq.read_table(path, columns=["id", "split", "quarantine"])
            content = path.read_bytes()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(path, f"cannot be read ({error})", f"run `dvc repro prepare@{path.stem}`") from None
        count = f"{rows['quarantine'].null_count:,}"
        found[f"{count} pictures of {path.stem}"] = hashlib.sha256(content).hexdigest()
    return found


def command_of(key: str) -> str:
    """What makes a figure of metrics.json; the keys are those of `pipeline.report.figures.flat_metrics`."""
    kind, *rest = key.split("/")
    last = rest[-1] if rest else ""
    if kind == "seconds":
        return f"dvc repro {rest[0]}"
    if kind == "pca":
        return f"dvc repro pca@{rest[0]}"
    if last in RULES:  # names without the LLM
        return f"dvc repro name@{rest[0]}" if len(rest) == 3 else "dvc repro name"
    if len(rest) >= 3:
        stage = {"val_loss": "finetune", "scratch_val_loss": "finetune_scratch"}.get(last, "evaluate")
        return f"dvc repro {stage}@{rest[0]}-{rest[1]}"
    return f"dvc repro pretrain@{rest[0]}" if len(rest) == 2 else "dvc repro evaluate"


def experiments() -> dict[str, Any]:
    """The experiments of `dvc exp`: names, figures and the commands that make them; and their curves.

    Raises UserError where DVC can't list them.
    """
    listing = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    try:
        done = subprocess.run(listing, capture_output=True, text=True, timeout=PATIENCE, check=False)
        shown = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        raise UserError("dvc exp show", f"no answer within {PATIENCE} seconds", "call it in a terminal") from None
    if shown is None:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError("dvc exp show", reason)
    found, curves, lost = [], list[dict[str, Any]](), []
    for commit in shown:
        for experiment in filter(_has_ended, commit.get("experiments") or []):
            for revision in experiment.get("revs", [])[:1]:
                name = revision.get("name") or str(revision.get("rev"))[:7]
                command = " ".join(_changes(_parameters(revision), _parameters(commit)))
                found.append({"name": name, "figures": _measured(revision), "command": command})
                try:
                    curves += list(_curves_at(revision["rev"], name))
                except (OSError, UserError):  # cleared from the cache, or no table
                    lost.append(name)
    return {"experiments": found, "curves": curves, "without_curves": lost}


def _parameters(revision: dict[str, Any]) -> dict[str, Any]:
    """Those of params.yaml by their keys, as a.b.c."""
    files = (revision.get("data") or {}).get("params") or {}
    table = pd.json_normalize((files.get("params.yaml") or {}).get("data") or {})
    return dict(zip(table, table.to_numpy()[0], strict=True)) if len(table) else {}


def _has_ended(experiment: dict[str, Any]) -> bool:
    """Whether it ran to its end: one that waits in the queue has the results of the commit that it began from."""
    return (experiment.get("executor") or {}).get("state") in (None, "success")


def _changes(own: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    """The words of the command that makes an experiment where its commit is checked out."""
    yield "dvc exp run"
    for key, value in own.items():
        if key not in before or before[key] != value:
            yield f"-S {shlex.quote(f'{key}={_override(value)}')}"
    yield from (f"-S {shlex.quote(f'~{key}')}" for key in before if key not in own)


def _override(value: Any) -> str:
    """A value in the grammar of Hydra's overrides (1.3, "Basic override syntax"), which `dvc exp run -S` reads."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_override(own)}' for key, own in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_override, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_][A-Za-z_0-9/.-]*", value) and value.lower() not in {
        "null",
        "true",
        "false",
        "nan",
        "inf",
    }:
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)  # a backslash counts only before a quote
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _measured(revision: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of an experiment, of all the files of metrics it has."""
    files = (revision.get("data") or {}).get("metrics") or {}
    found = {key: value for file in files.values() for key, value in _numbers(file.get("data")).items()}
    return {key: {"command": command_of(key), "label": word_for(key), "value": value} for key, value in found.items()}


def _runs() -> list[Path]:
    """The folders of profiles that have a figure or a curve."""
    kinds = ("metrics.json", *(f"{stage}/*/history.csv" for stage, _, _ in CURVES))
    folders = [folder for folder in sorted(RESULTS.glob("*")) if folder.is_dir() and folder.name not in SHARED]
    return [folder for folder in folders if any(next(folder.glob(kind), None) for kind in kinds)]


def _figures(path: Path) -> dict[str, float]:
    """Those of a report; none where it is not written yet. Raises UserError where the file is none of figures."""
    try:
        return _numbers(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(path, f"cannot be read ({error})", "run `dvc repro report`") from None


def _numbers(values: Any) -> dict[str, float]:
    """What of an object of JSON is finite numbers."""
    found = values.items() if isinstance(values, dict) else ()
    return {key: value for key, value in found if isinstance(value, int | float) and math.isfinite(value)}


def _curves(profile: str) -> Iterator[dict[str, Any]]:
    """The histories of a profile: stage, name, command, and by column the points [x, y]."""
    for stage, *_ in CURVES:
        for path in sorted((RESULTS / profile / stage).glob("*/history.csv")):
            with path.open("rb") as file:
                yield _curve(profile, stage, path, file)


def _curves_at(revision: str, name: str) -> Iterator[dict[str, Any]]:
    """Those of an experiment, likewise, from DVC's cache. Raises OSError where they are not there."""
    from dvc.api import DVCFileSystem

    files = DVCFileSystem(rev=revision)
    for stage, *_ in CURVES:
        for path in sorted(files.glob(f"{RESULTS}/*/{stage}/*/history.csv")):
            with files.open(path) as file:
                yield _curve(name, stage, Path(path), file)


def _curve(profile: str, stage: str, path: Path, file: IO[bytes]) -> dict[str, Any]:
    item, (x, columns) = path.parent.name, next((x, columns) for one, x, columns in CURVES if one == stage)
    command = f"dvc repro {stage}@{item}"
    try:
        table = pd.read_csv(file)
        lines = {y: table[[x, y]].dropna().astype(float).values.tolist() for y in columns if y in table}
    except (ValueError, KeyError) as error:
        raise UserError(path, f"cannot be read ({error})", f"run `{command}`") from None
    return {"profile": profile, "stage": stage, "of": item, "x": x, "command": command, "lines": lines}
