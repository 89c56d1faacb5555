"""`terraalign caption`, `classify` and `ask`: what a trained run says of any pictures."""

from __future__ import annotations

import errno
import gc
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.answers.best import NAMES_ALONE, check_trained, taught_names_alone
from pipeline.config import Params, load_params
from pipeline.errors import UserError, UserErrors, readable

if TYPE_CHECKING:
    from pipeline.answers.model import Answer, Ask, Model

Row = dict[str, Any]  # what is said of a picture
Photos = Annotated[
    list[str],
    typer.Argument(
        metavar="PHOTO",
        help="Pictures, folders of them, globs, or - for names on standard input.",
        show_default=False,
    ),
]
AsJSON = Annotated[
    bool,
    typer.Option(
        "--json",
        help="One JSON object a line: photo, answer, adapter, rule, and whether the photo itself was trained on "
        "(trained_on); of the fine-tuned language model also recipe, of classify probability and names; strangeness, "
        "and whether it is strange, where enough pictures are held out to tell.",
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Pictures at a time; default: evaluate.batch.")]
FORMATS = "give JPEG, PNG, WebP, GIF, BMP or TIFF files, or folders of them"
TOP = 5  # names in JSON
NAMED = 3  # pictures, of which something is to be known
KNOWN = "what it answers there says little of how good its answers about new pictures are"


def caption(photos: Photos, as_json: AsJSON = False, batch: Batch = None) -> None:
    """Caption any pictures with the best fine-tuned adapter of the active profile's run."""
    params = load_params()
    check_trained(params, "caption")
    answer(params, photos, lambda model: model.captions(), as_json, batch)


def classify(
    photos: Photos,
    as_json: AsJSON = False,
    llm: Annotated[bool, typer.Option("--llm", help="Ask the fine-tuned language model instead.")] = False,
    top: Annotated[int | None, typer.Option(min=1, help="How many names; default: 1, in JSON 5.")] = None,
    batch: Batch = None,
) -> None:
    """Name what is in any pictures, with probabilities, by the best pre-trained adapter of the active profile's run.

    That is by EMD to the names of all classes and discriminant analysis, weighed on validation pictures, without the
    language model; before stage `name` has run, by EMD alone. --llm asks the best fine-tuned adapter, whose names are
    ranked by their likelihood.
    """
    params = load_params()
    check_trained(params, "classify", llm=llm)
    answer(params, photos, lambda model: model.names(llm, top or TOP), as_json, batch, top or 1, by_llm=llm)


def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="PHOTO... QUESTION",
            help="Pictures, folders of them, globs, or - for names on standard input; then a question, in quotes.",
        ),
    ],
    as_json: AsJSON = False,
    batch: Batch = None,
) -> None:
    """Ask the best fine-tuned adapter of the active profile's run anything about any pictures.

    It was fine-tuned on the questions of its recipes alone: the further another one is from these, the less its answer
    is worth.
    """
    *photos, question = words
    if not photos or _is_there(Path(question)):
        found = "the question stands first" if photos and not _is_there(Path(photos[0])) else "no question"
        raise UserError("ask", found, 'put it last, in quotes: terraalign ask PHOTO... "What is this?"')
    if lost := next(
        (word for word in photos if not re.search(r"[./\\*?\[-]", word) and not _is_there(Path(word))), None
    ):
        raise UserError(
            "ask", f"{lost}: no such file", 'a question goes in quotes: terraalign ask PHOTO... "What is this?"'
        )
    params = load_params()
    check_trained(params, "caption", "classify")
    answer(params, photos, lambda model: model.question(question), as_json, batch, is_question=True)


def answer(
    params: Params, photos: list[str], how: Callable[[Model], Ask], as_json: bool, batch: int | None, top: int = 1,
    by_llm: bool = True, is_question: bool = False,
) -> None:  # fmt: skip
    """Print an answer per picture, in order; one that cannot be read is named on stderr and makes the exit code 1."""
    files, faults = pictures_named(photos)
    if not files:
        raise UserErrors(faults) if faults else UserError(photos[0], "no picture in it", FORMATS)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    gc.disable()  # what is imported and loaded stays: looking through it is a quarter of a second of the first answer
    try:
        from pipeline.answers.familiar import unlike
        from pipeline.answers.lean import transformers_for_answers
        from pipeline.answers.model import Model
        from pipeline.llms.base import Loader

        model = Model(params)
        _ = model.encoder  # before: one of timm or open_clip imports torchvision, and torch's compiler with it
        is_lean = by_llm and Loader.of(params.llm).is_text_alone()  # a tower for pictures needs all of transformers
        with transformers_for_answers() if is_lean else nullcontext():
            asked: Ask = how(model)
        gc.freeze()
    finally:
        gc.enable()
    failed, first = len(faults), True
    strange, known = list[Path](), list[Path]()
    for file, found in model.each(files, asked, batch):
        if isinstance(found, ValueError):
            failed += 1
            print(f"error: {readable(file)}: not a readable picture ({found})", file=sys.stderr)
            continue
        if first:
            print(f"by {_source(found)}", file=sys.stderr)
            if is_question and found.recipe and taught_names_alone(params, found.adapter, found.recipe):
                print(f"note: {found.adapter} {NAMES_ALONE}", file=sys.stderr)
            first = False
        trained_on = model.trained_on(file)
        say(row_of(file, found, trained_on), as_json, top)
        known += [file] if trained_on else []
        strange += [file] if found.is_strange else []
        if found.is_strange and len(strange) <= NAMED:
            print(f"warning: {readable(file)}: {unlike(found.adapter, found.strangeness)}", file=sys.stderr)
    _sum_up(files, strange, known, as_json)
    if failed:
        print(f"{failed} of {len(files) + len(faults)} without an answer", file=sys.stderr)
        raise typer.Exit(1)


def _sum_up(files: list[Path], strange: list[Path], known: list[Path], as_json: bool) -> None:
    """What is to be known of many answers: how many pictures are strange, or were trained on."""
    if more := strange[NAMED:]:
        which = "" if as_json else "; --json says which"
        print(f"warning: so are {len(more)} more of the {len(files)} pictures{which}", file=sys.stderr)
    if known:
        named = ", ".join(readable(file) for file in known[:NAMED]) + (", ..." if len(known) > NAMED else "")
        which = f"{len(known)} of these {len(files)} pictures ({named})" if len(files) > 1 else "this picture"
        print(f"note: the model was trained on {which}: {KNOWN}", file=sys.stderr)


def _source(found: Answer) -> str:
    if found.rule == "emd":
        return f"{found.adapter}: EMD to the names alone; stage `name` will make it better"
    if found.rule == "namer":
        return f"{found.adapter}: EMD to the names, discriminant analysis or both, as validation chose; no LLM"
    return f"{found.adapter}, fine-tuned on {found.recipe}"


def row_of(file: Path, found: Answer, known: bool | None) -> Row:
    """An answer as `--json` prints it; `known`: the picture was trained on, None: that cannot be told."""
    row: Row = {"photo": str(file), "answer": found.text, "adapter": found.adapter, "rule": found.rule}
    if known is not None:
        row["trained_on"] = known
    if found.recipe is not None:
        row["recipe"] = found.recipe
    if found.strangeness is not None:
        row |= {"strangeness": round(found.strangeness, 4), "strange": found.is_strange}
    if found.names:
        row |= {"probability": round(found.names.get(found.text, 0.0), 4)}
        row |= {"names": {name: round(share, 4) for name, share in found.names.items()}}
    return row


def say(row: Row, as_json: bool, top: int = 1) -> None:
    r"""Print an answer whatever the terminal's encoding: what it lacks as \u00e9 in JSON, which is the same there."""
    encoding = sys.stdout.encoding or "utf-8"
    text = json.dumps(row, ensure_ascii=False) if as_json else readable(f"{row['photo']}: {_told(row, top)}")
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = json.dumps(row) if as_json else text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)


def _told(row: Row, top: int) -> str:
    names: dict[str, float] = row.get("names", {})
    shares = [f"{name} ({100 * share:.1f} %)" for name, share in list(names.items())[:top]]
    said = str(row["answer"])
    if not shares or (top == 1 and said not in names):  # the language model may say what is no name
        return said
    if top == 1:
        return f"{said} ({100 * names[said]:.1f} %)"
    return ", ".join(shares) if "recipe" not in row else f"{said}; ranked: {', '.join(shares)}"


def pictures_named(photos: Iterable[str]) -> tuple[list[Path], list[UserError]]:
    """The pictures named and those below the folders named, and a fault for each name that leads nowhere."""
    from pipeline.sources.folders import pictures_below
    from pipeline.sources.texts import by_reason

    files: list[Path] = []
    names, faults = listed(photos)
    for name in names:
        photo = Path(name)
        if not _is_there(photo):
            is_url = re.match(r"[A-Za-z][\w+.-]+://", name)
            found = "nothing has such a name" if is_glob(name) else "no such file or folder"
            faults.append(UserError(name, found, "download it first" if is_url else ""))
        elif photo.is_dir():
            tree = pictures_below(photo, any_name=True)
            files += tree.files.values()
            if left_out := [(str(one), one.reason) for one in tree.left_out if not one.hidden]:
                print(f"warning: {len(left_out)} not used: {by_reason(left_out)}", file=sys.stderr)
        else:
            files.append(photo)
    return files, faults


def listed(photos: Iterable[str]) -> tuple[list[str], list[UserError]]:
    """Names as they were given, those of globs and of standard input in their place, and a fault for what holds none.

    A name with * or ? that is a file's is that file.
    """
    found: list[str] = []
    faults: list[UserError] = []
    for name in photos:
        if not name.strip():
            faults.append(UserError("", "an empty name of a picture", FORMATS))
        elif name == "-":
            try:
                found += _piped()
            except UserError as fault:
                faults.append(fault)
        elif is_glob(name) and not _is_there(Path(name)):
            found += sorted(glob.glob(name, recursive=True)) or [name]  # noqa: PTH207 - Path.glob: no absolute pattern
        else:
            found.append(name)
    return found, faults


def is_glob(name: str) -> bool:
    """Whether a name stands for all that fit it; in an address a ? is no such sign."""
    return any(sign in name for sign in "*?[") and "://" not in name


def _piped() -> list[str]:
    """The names on standard input, a line each. Raises UserError where it holds none."""
    from pipeline.sources.folders import begins_as_picture

    content = sys.stdin.buffer.read()
    if begins_as_picture(content[:32]):
        raise UserError("-", "standard input holds a picture, not names", "give the picture's name instead")
    if b"\0" in content:
        raise UserError("-", "standard input holds no text", "give names of pictures there, one a line")
    if not content.strip():
        raise UserError("-", "no names on standard input", "give names of pictures there, one a line")
    return [os.fsdecode(line) for line in content.splitlines() if line.strip()]


def _is_there(path: Path) -> bool:
    """Whether there is a file or folder of this name, which may be longer than any: a question, for one."""
    try:
        return path.exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False
