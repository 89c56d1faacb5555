"""What it costs to note one stage in dvc.lock: by DVC, which writes the file anew, and by stages/repro.py, in place.

    python benchmarks/lock.py [--times 1 12]

Takes the lock file of the current folder, its stages so many times under other names. Prints seconds of a core for
each, and for reading the file, which DVC does once for a stage: the floor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dvc.utils.serialize import dumps_yaml, parse_yaml, parse_yaml_for_update

from stages.repro import with_stage


def seconds(work: Callable[..., Any], *of: Any) -> tuple[float, Any]:
    began = time.process_time()
    found = work(*of)
    return time.process_time() - began, found


def by_dvc(text: str, name: str, locked: Any) -> str:
    """As `modify_yaml` does it, for `Lockfile.dump_stages`."""
    found = parse_yaml_for_update(text, "dvc.lock")
    found["stages"][name] = locked
    return str(dumps_yaml(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 12])
    stages = parse_yaml(Path("dvc.lock").read_text(encoding="utf-8"), "dvc.lock")["stages"]
    for times in parser.parse_args().times:
        many = {f"{name}-{number}": stages[name] for number in range(times) for name in stages}
        text = dumps_yaml(json.loads(json.dumps({"schema": "2.0", "stages": many})))  # JSON: nothing is shared
        name, locked = list(many.items())[len(many) // 2]
        locked = {**locked, "cmd": "terraalign other"}
        floor, _ = seconds(parse_yaml, text, "dvc.lock")
        whole, expected = seconds(by_dvc, text, name, locked)
        place, found = seconds(with_stage, text, name, locked)
        assert found == expected
        size = f"{len(many)} stages, {len(text) / 1e6:.1f} MB"
        print(f"{size}: DVC {whole:.2f} s, in place {place:.3f} s; reading {floor:.2f} s")


if __name__ == "__main__":
    main()
