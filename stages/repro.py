"""One stage by DVC, as `terraalign run` has it: `python stages/repro.py STAGE` is `dvc repro --single-item STAGE`.

But for dvc.lock. After every stage DVC reads all of it by a parser in Python that keeps comments, and writes it anew: a
second in the demo, 19 in a study of 84 trainings (docs/benchmarks.md). Here the stage's lines are set in place.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from dvc.cli import main
from dvc.dvcfile import Lockfile
from dvc.stage import serialize
from dvc.utils.serialize import dumps_yaml

dump_all = Lockfile.dump_stages
STAGE = r" {2}[\w@.-]+:\n {4}\S.*\n(?:(?: {4}.*)?\n)*"
ANCHOR = re.compile(r"[&*]id\d", re.ASCII)  # what is said once and meant in two stages


def with_stage(text: str, name: str, locked: Any) -> str | None:
    """The text of a lock file with a stage's lines as DVC writes them: in their place, or in the end.

    None where the file is not written as DVC does it, with plain names and the stages last, or has anchors.
    """
    head, *stages = re.split("^stages:\n", text, maxsplit=1, flags=re.MULTILINE)
    own = dumps_yaml({"stages": {name: _unshared(locked)}}).partition("\n")[2]
    if not stages or not re.fullmatch(f"(?:{STAGE})*", stages[0]) or not re.fullmatch(STAGE, own):
        return None
    if ANCHOR.search(text):
        return None
    first = own.partition("\n")[0]
    place = re.compile(rf"^{re.escape(first)}\n(?:(?: {{4}}.*)?\n)*", re.MULTILINE)
    kept, found = place.subn(lambda _: own, stages[0], count=1)
    return f"{head}stages:\n{kept if found else stages[0] + own}"


def _unshared(value: Any) -> Any:
    """The same without a part that stands in two places, which would become an anchor."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def dump_stages(lockfile: Lockfile, stages: list[Any], **kwargs: Any) -> None:
    """In the place of DVC's own method; what it can't do it leaves to that."""
    path = Path(lockfile.path).resolve()
    text = path.read_text(encoding="utf-8") if path.exists() else None
    for stage in stages:
        for name, locked in serialize.to_lockfile(stage, **kwargs).items():
            text = with_stage(text, name, locked) if text else None
    if text is None:
        dump_all(lockfile, stages, **kwargs)
        return
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        whole.write_text(text, encoding="utf-8")
        shutil.copymode(path, whole)
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
    lockfile.repo.scm_context.track_file(lockfile.relpath)


def dvc(*command: str) -> int:
    """DVC's command line, with the above; returns its exit status."""
    Lockfile.dump_stages = dump_stages
    return int(main(list(command)))


if __name__ == "__main__":
    sys.exit(dvc("repro", "--single-item", *sys.argv[1:]))
