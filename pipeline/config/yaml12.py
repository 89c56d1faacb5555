"""Parameter files as text: YAML 1.2, as DVC reads them, with the line of every value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.errors import UserError, UserErrors, reason


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """The values of a parameter file as DVC reads them too: by YAML 1.2, where 1e-3 is a number, and no is a text.

    Raises UserError, a line per fault, for what is no mapping of plain values: broken YAML, keys twice or that are no
    text, an alias of what it stands in, tags for other types, more than MOST values.
    """
    return read_tree(text, name)[1]


def read_tree(text: str, name: str) -> tuple[Node, dict[str, Any]]:
    """The same, with the tree that knows the lines."""
    reader = YAML(typ="safe", pure=True)
    try:
        tree = reader.compose(text)
        if not isinstance(tree, MappingNode):
            kind = {ScalarNode: "a single value", SequenceNode: "a list"}.get(type(tree), "nothing")
            raise UserError(name, f"expected a mapping of sections, found {kind}")
        build = SafeConstructor(loader=reader)
        faults = [UserError(f"{name}:{line}", fault) for line, fault in _structure(tree, build)]
        if faults:
            raise UserErrors(faults)
        values: dict[str, Any] = build.construct_document(tree)
    except RecursionError:
        raise UserError(name, "not valid YAML: nested too deeply") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        why = getattr(error, "problem", None) or reason(error)
        raise UserError(f"{name}:{at + 1}", f"not valid YAML: {why}") from None
    return tree, values


MOST = 10_000
"""Values in a parameter file, those of aliases each time they are used: a few lines can stand for billions."""
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")}


def _structure(tree: Node, build: SafeConstructor) -> Iterator[tuple[int, str]]:
    """Faults that no value of a mapping of plain values has, with their lines."""
    count = 0

    def walk(node: Node, where: str, above: tuple[Node, ...]) -> Iterator[tuple[int, str]]:
        nonlocal count
        count += 1
        line = node.start_mark.line + 1
        if any(node is other for other in above):
            yield line, f"{where}: an alias of what it stands in; write the value out"
        elif str(node.tag) not in PLAIN:
            yield line, f"{where}: a value of type {node.tag} has no place here; a text needs quotes"
        elif count > MOST:
            if count == MOST + 1:
                yield line, f"{where}: aliases make this more than {MOST:,} values; write out what is needed"
        elif isinstance(node, SequenceNode):
            for number, child in enumerate(node.value):
                yield from walk(child, f"{where}.{number}", (*above, node))
        elif isinstance(node, MappingNode):
            yield from _keys(node, where)
            for key, child in node.value:
                yield from walk(child, f"{where}.{key.value}" if where else str(key.value), (*above, node))
        elif isinstance(node, ScalarNode):
            yield from _scalar(node, where, build)

    return walk(tree, "", ())


def _keys(node: MappingNode, where: str) -> Iterator[tuple[int, str]]:
    """Keys that are no text, or here for the second time; YAML would keep the last one silently."""
    seen = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        name = f"{where}.{key.value}" if where else str(key.value)
        if not isinstance(key, ScalarNode) or str(key.tag).rpartition(":")[2] not in ("str", "merge"):
            yield line, f"{where or 'the file'}: a key that is no text; put it in quotes, or correct it"
        elif key.value in seen:
            yield line, f"{name} is here for the second time; keep one"
        seen.add(str(key.value))


def _scalar(node: ScalarNode, where: str, build: SafeConstructor) -> Iterator[tuple[int, str]]:
    """A date or number that is none, a text that UTF-8 cannot hold."""
    try:
        node.value.encode()
        build.construct_document(node)
    except UnicodeEncodeError:
        yield node.start_mark.line + 1, f"{where}: half a surrogate pair is no text; write the character itself"
    except ValueError as error:
        yield node.start_mark.line + 1, f"{where} is {node.value[:40]}: {error}; a text needs quotes"


def one_line(value: object) -> str:
    """A value on one line, as the file may have it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).split("\n")[0]


def line_of(node: Node, loc: list[Any]) -> int:
    """The 1-based line of the deepest part of `loc` that the file has."""
    line = node.start_mark.line
    for part in loc:
        child = None
        if isinstance(node, MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(part):
                    line, child = key_node.start_mark.line, value_node
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
            line = child.start_mark.line
        if child is None:
            break
        node = child
    return int(line) + 1
