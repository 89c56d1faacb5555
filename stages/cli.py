"""`terraalign`: one command per stage of the graph, and a few for people."""

from __future__ import annotations

import errno
import gc
import importlib
import inspect
import io
import os
import re
import sys
import warnings
from importlib.metadata import version
from keyword import iskeyword
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.errors import UserError
from pipeline.files import denied, refusal
from stages import profile, store

HELP = """Vision-language models on a budget: extract once, align without the LLM, fine-tune with QLoRA.

`dvc repro` runs the stages below in their order, and repeats only what a change touches; `terraalign run` runs two at a
time.

Parameters: params.yaml, written by `terraalign profile use NAME`.

Results: data/PROFILE/report/index.html, data/PROFILE/metrics.json; features of all profiles: data/store.

Commands work in the current folder: the one that holds params.yaml.
"""
START, LOOK, ASK, SHARE, MEND = "Start", "Look at results", "Ask", "Share", "Mend"
STAGES = "Stages (run by `dvc repro`)"
# The command's name, the module that holds its function of that name, the heading in --help, and an example.
COMMANDS = {
    "try": ("stages.first", START, "terraalign try ~/pictures"),
    "init": ("stages.first", START, "terraalign init ~/pictures --name birds"),
    "plan": ("stages.plan", START, "terraalign plan"),
    "run": ("stages.run", START, "terraalign run --jobs 2"),
    "show": ("stages.show", LOOK, "terraalign show"),
    "serve": ("stages.serve", LOOK, "terraalign serve --open"),
    "study": ("stages.study", LOOK, "terraalign study --only mlp --only 17"),
    "classify": ("stages.answer", ASK, "terraalign classify --top 3 fridge/"),
    "caption": ("stages.answer", ASK, "terraalign caption holiday/*.jpg --json"),
    "ask": ("stages.answer", ASK, 'terraalign ask fridge.jpg "What is on the lower shelf?"'),
    "export": ("stages.export", SHARE, "terraalign export data/demo out"),
    "push": ("stages.push", SHARE, "terraalign push me/my-model out"),
    "doctor": ("stages.doctor", MEND, "terraalign doctor"),
    "series": ("stages.series", MEND, "terraalign series classes"),
    "prepare": ("stages.prepare", STAGES, "terraalign prepare captions"),
    "extract-images": ("stages.extract_images", STAGES, "terraalign extract-images captions --workers 4"),
    "extract-captions": ("stages.extract_captions", STAGES, "terraalign extract-captions captions"),
    "inputs": ("stages.inputs", STAGES, "terraalign inputs"),
    "pretrain": ("stages.pretrain", STAGES, "terraalign pretrain mlp"),
    "name": ("stages.name", STAGES, "terraalign name mlp"),
    "finetune": ("stages.finetune", STAGES, "terraalign finetune mlp captions"),
    "finetune-scratch": ("stages.finetune", STAGES, "terraalign finetune-scratch mlp captions"),
    "evaluate": ("stages.evaluate", STAGES, "terraalign evaluate mlp captions"),
    "pca": ("stages.pca", STAGES, "terraalign pca mlp"),
    "report": ("stages.report", STAGES, "terraalign report"),
}
# Of the groups: their part of the help, and an example of each command.
GROUPS = {
    "profile": (profile.app, START, {
        "use": "terraalign profile use photos --set data.classes.root=/photos",
        "list": "terraalign profile list",
        "show": "terraalign profile show",
    }),
    "store": (store.app, SHARE, {
        "ls": "terraalign store ls",
        "stats": "terraalign store stats",
        "verify": "terraalign store verify --repair",
        "prune": "terraalign store prune --yes",
        "push": "terraalign store push file:///backup/features",
        "pull": "terraalign store pull file:///backup/features",
        "export": "terraalign store export captions tars",
    }),
}  # fmt: skip


class Commands(TyperGroup):
    """The root group: faults a user can mend are printed as `error: ...` lines, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; exit 2 on a UserError, a full disk or a file that may not be written, 130 on Ctrl-C.

        Other exceptions are bugs and pass.
        """
        try:
            return super().invoke(ctx)
        except UserError as fault:
            _fail(str(fault), code=2)
        except KeyboardInterrupt:
            _fail("interrupted; run the same command again to go on where it stopped", code=130)
        except Exception as fault:
            if denied(fault):
                _fail(str(refusal(fault)), code=2)
            if not _disk_full(fault):
                raise
            where = f" (writing {fault.filename})" if isinstance(fault, OSError) and fault.filename else ""
            _fail(f"the disk is full{where}; free some space and run the same command again to go on", code=2)


def _fail(text: str, code: int) -> None:
    for line in text.splitlines():
        typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


def _disk_full(fault: BaseException) -> bool:
    """Whether the cause is a full disk; safetensors and torch report it as text only."""
    if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(fault)


def _example(line: str) -> str:
    return f"Example: [bold cyan]{line}[/]"


def _flowing(text: str) -> str:
    """A docstring whose paragraphs a terminal breaks where it ends, not where the source does."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text))


app = typer.Typer(
    cls=Commands, help=_flowing(HELP), no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich"
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"terraalign {version('terraalign')}")
        raise typer.Exit


@app.callback()
def _root(
    print_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None: ...


for name, (module, panel, example) in COMMANDS.items():
    python_name = f"{name.replace('-', '_')}{'_' if iskeyword(name) else ''}"
    function = getattr(importlib.import_module(module), python_name)
    text = _flowing(function.__doc__ or "")
    app.command(name, help=text, rich_help_panel=panel, epilog=_example(example))(function)
for name, (group, panel, examples) in GROUPS.items():
    for registered in group.registered_commands:
        registered.epilog = _example(examples[registered.name or ""])
        registered.help = _flowing(inspect.getdoc(registered.callback) or "")
    app.add_typer(group, name=name, rich_help_panel=panel, epilog=_example(next(iter(examples.values()))))


def _in_utf8_mode() -> None:
    """Start anew in Python's UTF-8 mode where the locale has another encoding: a name is the same id everywhere."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Entry point of the console script."""
    _in_utf8_mode()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is shown as \xe9
            stream.reconfigure(errors="backslashreplace")
    # OpenMP's threads spin while they wait; beside any other busy process that slows a step many times over.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imports leave a million objects; looking for garbage among them is an eighth of the time they take.
    gc.set_threshold(10_000, 50, 1000)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries to one another; nothing a user can act on
    warnings.filterwarnings(
        "ignore", message="Passing `(repetition_penalty|no_repeat_ngram_size)`"
    )  # says what is meant here (VLM.generate)
    try:
        app()
    finally:
        gc.freeze()  # nothing is looked through any more: leaving took two seconds


if __name__ == "__main__":
    main()
