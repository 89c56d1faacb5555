"""`terraalign profile`: whole parameter files, chosen by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from pipeline.config import check_project, keys_of, load_params, parse_params, read_yaml, reads_text
from pipeline.errors import UserError
from pipeline.files import atomically

PROFILES = Path("profiles")
PARAMS = Path("params.yaml")

app = typer.Typer(help="Choose the parameters: a profile is a whole params.yaml.", no_args_is_help=True)


@app.command("use")
def use(
    name: Annotated[str, typer.Argument(help="A profile's name (`terraalign profile list`) or a path to a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value, e.g. --set pretrain.lr=0.0005; a text is taken letter for letter. Repeatable.",
        ),
    ] = None,
) -> None:
    """Write params.yaml from a profile. The old file stays as it is when anything is wrong with the new one."""
    source = _find(name)
    write_params(source, settings or [])
    typer.echo(f"params.yaml is now {source}{' with ' + ', '.join(settings) if settings else ''}")
    typer.echo("next: `terraalign run`, which does what is not done yet")


def write_params(source: Path, settings: list[str], to: Path = PARAMS) -> None:
    """Write a file of parameters as `use` has it; UserError when anything is wrong with the file or a setting."""
    text = _read(source)
    title = f"{source} with --set" if settings else str(source)
    wanted = read_yaml(text, str(source))
    if settings:
        text, wanted = changed(text, wanted, settings)
    with atomically(to) as file:
        file.write(text.encode())
        file.flush()
        written = _read(Path(file.name))
        if read_yaml(written, title) != wanted:
            raise UserError(title, "a value would read back as another", f"edit {to} instead")
        parse_params(written, title)


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
    before, after = (_flat(read_yaml(_read(path), str(path))) for path in (original, PARAMS))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            typer.echo(f"{key}: {after.get(key, '(left out)')} (the profile has {before.get(key, 'nothing')})")
    if before == after:
        typer.echo(f"params.yaml says the same as {original}")


def _profiles() -> list[Path]:
    found = sorted(PROFILES.glob("*.yaml"))
    if not found:
        check_project()
        raise UserError(PROFILES, "no profile in it", "restore the folder from the project")
    return found


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    profiles = {path.stem: path for path in _profiles()}
    if name not in profiles:
        raise UserError(f"there is no profile {name}; known", f"{', '.join(profiles)}, or a path to a .yaml file")
    return profiles[name]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"cannot be read as text: {error}") from None


class _Explicit(RoundTripRepresenter):
    """Writes null as a word. Of a class of its own: what is added to ruamel's is added for DVC, too."""


_Explicit.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


def changed(text: str, values: dict[str, Any], settings: list[str]) -> tuple[str, dict[str, Any]]:
    """A file's text and its values with every KEY=VALUE applied; comments and order of the text stay."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 1_000_000  # lines stay as they are
    editor.Representer = _Explicit
    tree = editor.load(text)
    before, values = _copied(values), _copied(values)
    wanted = _roughly(values, settings)
    for setting in settings:
        key, value = _key_and_value(setting, wanted)
        _put(tree, key, value, setting)
        _put(values, key, value, setting)
    given = {tuple(setting.partition("=")[0].strip().split(".")) for setting in settings}
    for place, name in _left_over(before, values):
        if (*place, name) in given:
            continue  # the check of the whole file refuses it
        del _at(tree, place)[name], _at(values, place)[name]
        typer.echo(f"{'.'.join([*place, name])} is left out: only what stood there before knows it")
    stream = io.StringIO()
    editor.dump(tree, stream)
    return stream.getvalue(), values


def _copied(values: Any) -> Any:
    """A copy in which what aliases share is apart."""
    if isinstance(values, dict):
        return {key: _copied(value) for key, value in values.items()}
    return [_copied(value) for value in values] if isinstance(values, list) else values


def _key_and_value(setting: str, values: dict[str, Any]) -> tuple[list[str], Any]:
    """KEY=VALUE: to a key that takes a text it is one, letter for letter; else it is read as the file would be."""
    name, equals, value = setting.partition("=")
    key = name.strip().split(".")
    if not equals or not all(key):
        raise UserError(f"--set {setting}", "expected KEY=VALUE, e.g. --set pretrain.lr=0.0005")
    try:
        setting.encode()
    except UnicodeEncodeError:
        raise UserError(f"--set {name}", "not valid UTF-8, as params.yaml has to be", "rename the file") from None
    text = reads_text(key, values)
    if text:
        return key, value
    if text is None:  # null, and in quotes the word
        return key, {"null": None, '"null"': "null", "'null'": "null"}.get(value, value)
    try:
        return key, read_yaml(f"value: {value}", f"--set {name}")["value"] if "\n" not in value else value
    except UserError:
        raise UserError(f"--set {setting[:200]}", "the value is not valid YAML") from None


def _roughly(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The values as they will be, but for their types: enough to see which parts they name, and so which keys."""
    values = _copied(values)
    for setting in settings:
        name, _, value = setting.partition("=")
        _put(values, name.strip().split("."), value, setting)
    return values


def _left_over(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[list[str], str]]:
    """Keys that a section keeps of a part (a source, an encoder) which it does not name any more."""
    found = []
    for section in [
        ["vision"],
        ["llm"],
        ["pretrain", "objective"],
        *(["data", name] for name in _at(after, ["data"])),
    ]:
        old, new = keys_of(section, before), keys_of(section, after)
        found += [(section, key) for key in _at(after, section) if old and new and key in old and key not in new]
    return found


def _at(tree: Any, section: list[str]) -> Any:
    for part in section:
        tree = tree.get(part, {}) if isinstance(tree, dict) else {}
    return tree if isinstance(tree, dict) else {}


def _put(tree: dict[str, Any], key: list[str], value: Any, setting: str) -> None:
    """Set a key. One that the section does not have yet is added: the check of the whole file judges it."""
    section: Any = tree
    for part in key[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UserError(f"--set {setting}", f"{part} is a value, not a section")
    section[key[-1]] = value


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested sections as {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat
