"""A folder in the format of Hugging Face's transformers, or a repository of the hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import Damaged
from pipeline.llms.base import Loader
from pipeline.llms.files import ModelFiles, cached, read_json
from pipeline.needs import Fault

# Parameters, width and layers of the profiles' model, which may not be fetched yet.
SHAPES = {"mistralai/Mistral-7B-Instruct-v0.2": (7.25e9, 4096, 32)}
TOWERS = frozenset({"vision_config", "audio_config"})  # keys of a config.json


class HuggingFace(Loader):
    """Safetensors, a tokenizer with a chat template, and an architecture that transformers knows itself."""

    def source(self, *, tokenizer: bool = True) -> tuple[str, str | None]:
        from huggingface_hub import constants

        own = self.settings
        fault = self.fault(fetches=not constants.HF_HUB_OFFLINE, tokenizer=tokenizer)
        if fault:
            raise UserError(f"llm.model {own.model} cannot be loaded", fault.found, fault.remedy)
        return str(self.folder() or own.model), own.revision

    def fault(self, *, fetches: bool = False, tokenizer: bool = True) -> Fault | None:
        """As every loader's.

        `fetches`: the hub can still be asked for files that its local cache lacks, so their absence is none.
        `tokenizer`: whether it is needed, too.
        """
        model, folder = self.settings.model, self.folder()
        if folder is None and (place := Path(model).expanduser()).exists():
            remedy = "set llm.loader: gguf" if place.suffix == ".gguf" else "set llm.model to the folder it lies in"
            return Fault("a file, not a folder", remedy)
        if folder is None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
            return Fault("no such folder", "correct llm.model in params.yaml")
        again = (
            f"run `git lfs pull` in {shlex.quote(str(folder))}, or copy the file again"
            if folder
            else self.download_command()
        )
        missing = "" if fetches and folder is None else again
        return ModelFiles(model, self.settings.revision, folder, missing, again).fault(tokenizer)

    def place(self) -> str:
        return str(self.folder() or "in the hub's local cache")

    def shape(self) -> tuple[float, int, int] | None:
        """As its config.json has it; None where that is not there or not whole."""
        if self.settings.model in SHAPES:
            return SHAPES[self.settings.model]
        values = self._config()
        if values is None:
            return None
        values = values.get("text_config") or values
        width = int(values.get("hidden_size") or values.get("n_embd") or values.get("d_model") or 4096)
        layers = int(values.get("num_hidden_layers") or values.get("n_layer") or values.get("n_layers") or 32)
        inner = int(values.get("intermediate_size") or 4 * width)
        embedded = float(values.get("vocab_size", 32000)) * width
        return layers * (4 * width**2 + 3 * width * inner) + embedded, width, layers

    def is_text_alone(self) -> bool:
        values = self._config()
        return values is not None and TOWERS.isdisjoint(values)

    def _config(self) -> dict[str, Any] | None:
        """config.json; None where that is not there or not whole."""
        own, folder = self.settings, self.folder()
        path = folder / "config.json" if folder else cached(own.model, "config.json", own.revision)
        try:
            return read_json(path) if path and path.is_file() else None
        except Damaged:
            return None

    def remedy(self) -> str:
        if self.folder() is None:
            return f"correct llm.model, or fetch it with `{self.download_command()}`"
        return super().remedy()

    def folder(self) -> Path | None:
        """The folder that llm.model names, `~` included; None where it is a hub id."""
        folder = Path(self.settings.model).expanduser()
        return folder if folder.is_dir() else None

    def download_command(self) -> str:
        """What fetches the model from the hub, without weights that are not read here."""
        revision = f" --revision {self.settings.revision}" if self.settings.revision else ""
        patterns = " ".join(
            f"--include '{pattern}'" for pattern in ("*.json", "*.jinja", "model*.safetensors", "tokenizer*")
        )
        return f"hf download {self.settings.model}{revision} {patterns}"
