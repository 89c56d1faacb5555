"""`terraalign profile`: whole parameter files, chosen by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError
from pipeline.params import load_params, parse_params

PROFILES = Path("profiles")
PARAMS = Path("params.yaml")

app = typer.Typer(help="Choose the parameters: a profile is a whole params.yaml.", no_args_is_help=True)


@app.command("use")
def use(
    name: Annotated[str, typer.Argument(help="A profile's name (`terraalign profile list`) or a path to a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. --set pretrain.lr=0.0005. Repeatable."),
    ] = None,
) -> None:
    """Write params.yaml from a profile. The old file stays as it is when anything is wrong with the new one."""
    source = _find(name)
    text = _read(source)
    if settings:
        text = _changed(text, settings, source)
    parse_params(text, f"{source} with --set" if settings else str(source))
    temporary = PARAMS.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(PARAMS)
    typer.echo(f"params.yaml is now {source}{' with ' + ', '.join(settings) if settings else ''}; next: dvc repro")


@app.command("list")
def list_profiles() -> None:
    """Name every profile and say what it is for."""
    for path in _profiles():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{path.stem:<10}{first.removeprefix('#').strip()}")


@app.command("show")
def show() -> None:
    """Name the active profile and what params.yaml changes in it."""
    params = load_params(PARAMS)
    typer.echo(f"profile: {params.profile}")
    original = PROFILES / f"{params.profile}.yaml"
    if not original.is_file():
        typer.echo(f"{original} does not exist: nothing to compare params.yaml with")
        return
    before, after = (_flat(yaml.safe_load(_read(path))) for path in (original, PARAMS))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            typer.echo(f"{key}: {after.get(key, '(left out)')} (the profile has {before.get(key, 'nothing')})")
    if before == after:
        typer.echo(f"params.yaml says the same as {original}")


def _profiles() -> list[Path]:
    found = sorted(PROFILES.glob("*.yaml"))
    if not found:
        raise UserError("there is no profiles/*.yaml in the current folder; go to the project folder first")
    return found


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    profiles = {path.stem: path for path in _profiles()}
    if name not in profiles:
        raise UserError(f"there is no profile {name}; known: {', '.join(profiles)}, or a path to a .yaml file")
    return profiles[name]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None


def _changed(text: str, settings: list[str], source: Path) -> str:
    """`text` with every KEY=VALUE applied; comments and order stay."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 120
    editor.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    try:
        tree = editor.load(text)
    except YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{source}: expected a mapping of sections, found {type(tree).__name__}")
    for setting in settings:
        _set(tree, setting)
    stream = io.StringIO()
    editor.dump(tree, stream)
    return stream.getvalue()


def _set(tree: CommentedMap, setting: str) -> None:
    """Apply one KEY=VALUE. A key the section does not have yet is added: the check of the whole file judges it."""
    key, equals, value = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {setting}: expected KEY=VALUE, e.g. --set pretrain.lr=0.0005")
    section: Any = tree
    for part in parts[:-1]:
        section = section.setdefault(part, CommentedMap())
        if not isinstance(section, CommentedMap):
            raise UserError(f"--set {setting}: {part} is a value, not a section")
    try:
        section[parts[-1]] = YAML(typ="safe").load(value)
    except YAMLError as error:
        raise UserError(f"--set {setting}: the value is not valid YAML: {' '.join(str(error).split())}") from None


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested sections as {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat
