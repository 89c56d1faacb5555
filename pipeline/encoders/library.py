"""What the encoders of open_clip and timm share: a model by its name, with weights by a tag, of a file, or random."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import model_validator

from pipeline.config.schema import Vision
from pipeline.encoders.base import RANDOM, Encoder
from pipeline.errors import UserError
from pipeline.needs import Fault, Need
from pipeline.weights import told_in_one_line, weights_fault


class NamedModel(Vision):
    """An encoder of a library, by its model's name."""

    @model_validator(mode="after")
    def _model_named(self) -> NamedModel:
        if not self.model:
            raise ValueError(f"encoder {self.encoder} needs model: the name of the architecture")
        if not self.pretrained:
            raise ValueError(
                f"encoder {self.encoder} needs pretrained: a tag of open_clip, hub for timm, a weights file, "
                "or random for an untrained network"
            )
        return self


class HubFiles(NamedTuple):
    """Where a library looks for weights: files of a hub repository, in their order, or else a URL."""

    repo: str
    names: list[str]
    url: str = ""

    def cached(self) -> Path | None:
        """The file that the library would find on this machine."""
        import torch
        from huggingface_hub import try_to_load_from_cache

        name = self.url.rsplit("/", 1)[-1]
        fetched = [Path("~/.cache/clip").expanduser() / name, Path(torch.hub.get_dir()) / "checkpoints" / name]
        paths = (try_to_load_from_cache(self.repo, name) for name in self.names) if self.repo else fetched
        return next((Path(path) for path in paths if isinstance(path, str | Path) and Path(path).is_file()), None)


class LibraryEncoder(Encoder):
    """A model of a library, vision.model, with the weights that vision.pretrained names."""

    Settings = NamedModel
    settings: NamedModel

    @abstractmethod
    def hub_files(self) -> HubFiles | None:
        """Where the weights of a tag come from, or None: there are none by this name.

        What the library's own tables say; importing them takes seconds.
        """

    def need(self) -> Need:
        named = self.settings.pretrained
        if named == RANDOM:
            return Need(self.title, True, "random, as asked for")
        if self._file.is_file():
            fault = _fault(self._file)
            if fault:
                return Need(self.title, False, f"{self._file} {fault.found}", fault.remedy)
            return Need(self.title, True, str(self._file))
        source = self.hub_files()
        if source is None:
            return Need(self.title, False, f"{self.settings.encoder} knows no {named}", "correct vision.pretrained")
        path = source.cached()
        fault = weights_fault(path) if path else None
        found = f"{path} {fault.found}" if fault else f"hub {source.repo}" if source.repo else source.url
        ok = path is not None and not fault
        return Need(self.title, ok, found, "" if ok else self._how_to_fetch())

    def check_file(self, otherwise: str) -> None:
        """UserError where vision.pretrained is no file of weights that can be whole; `otherwise` if it is no file."""
        if not self._file.is_file():
            raise UserError(f"vision.pretrained {self._file}", otherwise)
        if fault := _fault(self._file):
            raise UserError(f"vision.pretrained {self._file}", fault.found, fault.remedy)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Has the library build its model, and turns what it raises into one line with its remedy."""
        logging.disable(logging.ERROR)  # open_clip warns of random weights that were asked for, and says errors twice
        try:
            with told_in_one_line(self._failure):
                yield
        finally:
            logging.disable(logging.NOTSET)

    def unfit(self, why: str) -> UserError:
        """The error for a model whose features are no image tokens."""
        model, library = self.settings.model, self.settings.encoder
        return UserError(f"vision.model {model}", f"{library}'s model {why}", "take another vision.model")

    @property
    def _file(self) -> Path:
        return Path(str(self.settings.pretrained))

    def _how_to_fetch(self) -> str:
        """The command that gets the weights, or what to change where there are none."""
        source, own = self.hub_files(), self.settings
        if source is None:
            return f"{own.encoder} knows no weights {own.pretrained} of {own.model}; correct vision.pretrained"
        if source.repo:
            damaged = (path := source.cached()) is not None and weights_fault(path) is not None
            return f"hf download {'--force-download ' if damaged else ''}{source.repo}"
        return f"download {source.url} and set vision.pretrained to the file"

    def _failure(self, error: Exception, reason: str) -> UserError:
        own, what = self.settings, f"{self.settings.encoder} {self.settings.model}"
        if own.pretrained == RANDOM:
            return UserError(f"vision.model {what} cannot be built", reason, "take another vision.model")
        if self._file.is_file() and "weights_only" in str(error):
            reason = "it holds Python objects, not tensors alone, and code in a weights file is never run"
            mend = "save the state_dict alone, best as safetensors"
        elif self._file.is_file():
            mend = f"give vision.pretrained a file of {own.model}, or vision.model the model of this file"
        else:
            source = self.hub_files()
            path = source.cached() if source else None
            reason = f"{path} {fault.found}" if path and (fault := weights_fault(path)) else reason
            mend = self._how_to_fetch()
        return UserError(f"weights of {what} ({own.pretrained}) cannot be loaded", reason, mend)


def _fault(path: Path) -> Fault | None:
    """What is wrong with a file of weights; JAX's, in numpy's formats, are left to timm."""
    return None if path.suffix in (".npz", ".npy") else weights_fault(path)
