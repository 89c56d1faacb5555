"""params.yaml read and checked; each fault as a line with file, line, key, the value found and what is allowed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml.nodes import Node

from pipeline.config import messages
from pipeline.config.messages import message_of
from pipeline.config.params import Params
from pipeline.config.yaml12 import line_of, one_line, read_tree
from pipeline.errors import UserError, UserErrors


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check a parameter file.

    Raises UserError, one line per fault: file, line, key, the value found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        check_project()
        raise UserError(path, "no such file", "run `terraalign try FOLDER` or `terraalign profile use demo`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read as text: {error}") from None
    return parse_params(text, str(path))


def check_project() -> None:
    """Raises UserError when the current folder is no copy of the project; it names the one that this code lies in."""
    if Path("dvc.yaml").is_file():
        return
    own = Path(__file__).resolve().parents[2]
    where = f"`cd {shlex.quote(str(own))}`" if (own / "dvc.yaml").is_file() else "`cd` to your copy of the project"
    raise UserError(Path.cwd(), "no project folder, as it has no dvc.yaml", f"{where} first")


def parse_params(text: str, name: str) -> Params:
    """Check the text of a parameter file; `name` stands for the file in faults. Raises like load_params."""
    tree, values = read_tree(text, name)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        # What is missing comes last: it is often only a key that an unknown one misspells.
        found = sorted(error.errors(), key=lambda fault: fault["type"] == "missing")
        faults = [_fault(name, tree, values, dict(fault)) for fault in found]
        raise UserErrors(faults) from None


def _fault(name: str, tree: Node, values: Mapping[str, Any], fault: dict[str, Any]) -> UserError:
    """`params.yaml:12: pretrain.lr is -1: ...` for one pydantic fault."""
    loc = [part for part in fault["loc"] if part != "[key]"]
    found, message = fault["input"], message_of(fault, Params, values)
    if fault["type"] == "missing":
        message, found = "this key is missing; see profiles/demo.yaml for its use", {}
    elif fault["type"] == "elsewhere":
        loc, found = list(fault["ctx"]["where"]), fault["ctx"]["value"]
        found = {} if found is None else found
    key = ".".join(map(str, loc)).replace("\n", "\\n") or "the file"
    message = message.replace("{key}", key)
    value = "" if isinstance(found, dict) else f" is {one_line(found)}"
    return UserError(f"{name}:{line_of(tree, loc)}", f"{key}{value}: {message}")


def reads_text(key: Sequence[str], values: Mapping[str, Any]) -> bool | None:
    """Whether a key of params.yaml takes a text: None if it does and null too, False for all other keys.

    `values` are those of the file: which keys there are depends on the parts that it names.
    """
    return messages.reads_text(key, values, Params)


def keys_of(section: Sequence[str], values: Mapping[str, Any]) -> set[str]:
    """The keys that a section may have, by the part that it names; none where it names none that there is."""
    return messages.keys_of(section, values, Params)
