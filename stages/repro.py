"""One stage by DVC, as `terraalign run` has it: `python stages/repro.py STAGE` is `dvc repro --single-item STAGE`.

But for dvc.lock. After every stage DVC reads all of it by a parser in Python that keeps comments, and writes it anew: a
second in the demo, 19 in a study of 84 trainings (docs/benchmarks.md). Here the stage's lines are set in place.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from dvc.cli import main
from dvc.dvcfile import Lockfile
from dvc.stage import serialize
from dvc.utils.serialize import dumps_yaml

dump_all = Lockfile.dump_stages


def with_stage(text: str, name: str, locked: Any) -> str | None:
    """The text of a lock file with a stage's lines as DVC writes them: in their place, or in the end.

    None where that can't be told by their indentation: of a file that DVC has not written so, or a very long name.
    """
    head, *stages = re.split("^stages:\n", text, maxsplit=1, flags=re.MULTILINE)
    if not stages or not re.fullmatch(r"(?:(?: {2}.*)?\n)*", stages[0]):
        return None
    own = dumps_yaml({"stages": {name: locked}}).partition("\n")[2]
    first = own.partition("\n")[0]
    if not first.endswith(":"):
        return None
    place = re.compile(rf"^{re.escape(first)}\n(?:(?: {{4}}.*)?\n)*", re.MULTILINE)
    kept, found = place.subn(lambda _: own, stages[0], count=1)
    return f"{head}stages:\n{kept if found else stages[0] + own}"


def dump_stages(lockfile: Lockfile, stages: list[Any], **kwargs: Any) -> None:
    """In the place of DVC's own method; what it can't do it leaves to that."""
    path = Path(lockfile.path)
    text = path.read_text(encoding="utf-8") if path.exists() else None
    for stage in stages:
        for name, locked in serialize.to_lockfile(stage, **kwargs).items():
            text = with_stage(text, name, locked) if text else None
    if text is None:
        dump_all(lockfile, stages, **kwargs)
    else:
        path.write_text(text, encoding="utf-8")
        lockfile.repo.scm_context.track_file(lockfile.relpath)


def dvc(*command: str) -> int:
    """DVC's command line, with the above; returns its exit status."""
    Lockfile.dump_stages = dump_stages
    return int(main(list(command)))


if __name__ == "__main__":
    sys.exit(dvc("repro", "--single-item", *sys.argv[1:]))
