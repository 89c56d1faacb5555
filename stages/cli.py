"""`terraalign`: one command per stage of the graph, and a few for people."""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from pipeline.errors import UserError
from pipeline.files import denied, refusal
from stages import profile, store

HELP = """Vision-language models on a budget: extract once, align without the LLM, fine-tune with QLoRA.

`dvc repro` runs the stages below in this order, and repeats only what a change touches; `terraalign run` runs two at a
time:

prepare, extract-images, extract-captions (once), inputs, pretrain (EMD, no LLM), name (no LLM), finetune,
finetune-scratch (QLoRA), evaluate, pca, report.

Parameters: params.yaml, written by `terraalign profile use NAME`.

Results: data/PROFILE/report/index.html, data/PROFILE/metrics.json; features of all profiles: data/store.

Commands work in the current folder: the one that holds params.yaml.
"""
STAGES, PEOPLE = "Stages (run by `dvc repro`)", "For people"
# The command's name, the module that holds its function of that name, and the heading in --help.
COMMANDS = {
    "prepare": ("stages.prepare", STAGES),
    "extract-images": ("stages.extract_images", STAGES),
    "extract-captions": ("stages.extract_captions", STAGES),
    "inputs": ("stages.inputs", STAGES),
    "pretrain": ("stages.pretrain", STAGES),
    "name": ("stages.name", STAGES),
    "finetune": ("stages.finetune", STAGES),
    "finetune-scratch": ("stages.finetune", STAGES),
    "evaluate": ("stages.evaluate", STAGES),
    "pca": ("stages.pca", STAGES),
    "report": ("stages.report", STAGES),
    "run": ("stages.run", PEOPLE),
    "study": ("stages.study", PEOPLE),
    "show": ("stages.show", PEOPLE),
    "caption": ("stages.answer", PEOPLE),
    "classify": ("stages.answer", PEOPLE),
    "ask": ("stages.answer", PEOPLE),
    "serve": ("stages.serve", PEOPLE),
    "series": ("stages.series", PEOPLE),
    "doctor": ("stages.doctor", PEOPLE),
}


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


app = typer.Typer(cls=Commands, help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


for name, (module, panel) in COMMANDS.items():
    app.command(name, rich_help_panel=panel)(getattr(importlib.import_module(module), name.replace("-", "_")))
app.add_typer(profile.app, name="profile", rich_help_panel=PEOPLE)
app.add_typer(store.app, name="store", rich_help_panel=PEOPLE)


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
    warnings.filterwarnings("ignore", message="Passing `repetition_penalty`")  # says what is meant here (VLM.generate)
    app()


if __name__ == "__main__":
    main()
