"""What is exported: a fine-tuned adapter of a run, and all that its answers depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from PIL import Image

from pipeline.adapters.module import Adapter, load_adapter
from pipeline.config import Params, components
from pipeline.config.schema import Recipe
from pipeline.devices import hash_weights, pick_device, pick_dtype
from pipeline.encoders.base import Encoder, Parts
from pipeline.encoders.vision import seeded
from pipeline.errors import UserError
from pipeline.llms.load import load_tokenizer
from pipeline.llms.text import Texts
from pipeline.media.preprocess import Preprocess, in_parts, normalise
from pipeline.naming.namer import Namer
from pipeline.origin import check_start
from pipeline.runs import Run
from pipeline.store.reader import training_captions
from pipeline.tasks.base import Task

# What Task.decoding says, in the words of transformers' generate.
GENERATE = {"beams": "num_beams", "no_repeat": "no_repeat_ngram_size", "repetition_penalty": "repetition_penalty"}


@dataclass(frozen=True)
class Asked:
    """What the LLM is asked of a picture: token ids before and behind it, and how the answer is decoded."""

    text: str
    before: list[int]
    after: list[int]
    generation: dict[str, Any]  # arguments of transformers' generate
    may_repeat: list[int] | None  # vlm.SaidOnce


@dataclass(frozen=True)
class Trained:
    """Data set and task are the first of the recipe with a task that was asked for."""

    params: Params
    folder: Path
    data: str
    parts: Parts

    @classmethod
    def of(cls, params: Params, folder: Path, task: str, parts: Parts) -> Trained:
        """Raises UserError for what cannot leave: an encoder of a class of the user's own."""
        sets = params.finetune_for(*_names(folder)).data
        found = cls(params, folder, next(data for data in sets if params.data[data].task == task), parts)
        if components.is_foreign(params.vision.encoder):
            why = "is a class of your own, which an export cannot build without TerraAlign"
            known = ", ".join(components.known("encoder"))
            raise UserError(f"vision.encoder {params.vision.encoder}", why, f"exports have one of {known}")
        return found

    @property
    def adapter_name(self) -> str:
        return _names(self.folder)[0]

    @property
    def recipe_name(self) -> str:
        return _names(self.folder)[1]

    @property
    def recipe(self) -> Recipe:
        return self.params.finetune_for(*_names(self.folder))

    @property
    def hints(self) -> int:
        """How many names, found without the LLM, stand in the prompt about a picture at most."""
        return self.recipe.hints if self.params.data[self.data].task == "classify" else 0

    @cached_property
    def namer(self) -> Namer:
        """What finds them. Raises UserError where stage `name` has not run, or not since pre-training."""
        folder = self.run.named(self.adapter_name) / self.data
        namer = Namer.load(folder, self.params.runtime.emd_threads)
        check_start(folder, self.run.pretrained(self.adapter_name))
        return namer

    @property
    def task(self) -> Task:
        return Task.of(self.params.data[self.data].task, self.params.evaluate)

    @property
    def run(self) -> Run:
        return Run.of(self.params)

    @property
    def title(self) -> str:
        return f"{self.params.profile}: {self.adapter_name} on {self.recipe_name}"

    @property
    def encoder(self) -> dict[str, str | None]:
        """The encoder's names; of a file of weights its own, without the folders of this machine."""
        vision = self.params.vision
        file = Path(str(vision.pretrained))
        named = file.name if vision.pretrained and file.is_file() else vision.pretrained
        return {"encoder": vision.encoder, "model": vision.model, "pretrained": named}

    @cached_property
    def adapter(self) -> Adapter:
        return load_adapter(self.folder, "adapter")

    @property
    def preprocess(self) -> Preprocess | None:
        """None where the encoder's transform has parts that are not known here."""
        return in_parts(self.parts.preprocess)

    @torch.inference_mode()
    def tokens(self, image: Image.Image) -> torch.Tensor:
        """Image tokens of an RGB picture, float32 [1, N, D]; a step apart from what the encoder's dtype rounds."""
        self.parts.network.eval()
        steps = self.preprocess
        if steps is None:
            return self.parts.tokens(self.parts.preprocess(image)[None])
        return self.parts.tokens(normalise(steps(image)[None], steps.constants(torch.device("cpu"))))

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Number and width of a picture's image tokens."""
        count, width = self.tokens(Image.new("RGB", (64, 64))).shape[1:]
        return int(count), int(width)

    @cached_property
    def texts(self) -> Texts:
        return Texts(load_tokenizer(self.params.llm))

    @cached_property
    def asked(self) -> Asked:
        """As `terraalign caption` and `classify --llm` ask it."""
        texts, task, tokenizer = self.texts, self.task, self.texts.tokenizer
        before, after = texts.prompt(task.prompt, self.params.llm.system_prompt)
        # A task decodes by the words of its data set alone, so that nobody has to load the LLM for them.
        captions = training_captions(self.run, self.data)
        decoding = task.decoding(cast(Any, SimpleNamespace(texts=texts)), captions)
        once = decoding.pop("may_repeat", None)
        may_repeat = None if once is None else sorted({*once, tokenizer.eos_token_id})
        generation = {
            "max_new_tokens": task.max_tokens,
            "do_sample": False,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
            **{GENERATE[key]: value for key, value in decoding.items()},
        }
        return Asked(task.prompt, before, after, generation, may_repeat)


def _names(folder: Path) -> tuple[str, str]:
    """Adapter and recipe of a folder finetune/<adapter>-<recipe>."""
    adapter, _, recipe = folder.name.partition("-")
    return adapter, recipe


def encoder_of(params: Params) -> tuple[Parts, dict[str, str]]:
    """The encoder that the parameters name, on the CPU, and its identity (origin.check_encoder)."""
    encoder = Encoder.of(params.vision)
    parts = seeded(encoder.build)
    dtype = pick_dtype(params.vision.dtype, pick_device(params.runtime.device))
    identity = encoder.identity(parts, hash_weights(parts.network), dtype)
    parts.network.eval().requires_grad_(False)
    return parts, identity
