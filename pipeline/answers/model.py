"""A trained model in use: pictures go in; captions, names and answers to questions come out."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.answers.best import best_adapter, best_finetuned, classes, namers, pretrained
from pipeline.answers.familiar import STRANGE, Familiar, digests_of, familiar_with
from pipeline.answers.names import TOP, NamedBy, emd_at_work, hints_at_work, likeliest, namer_at_work
from pipeline.answers.pictures import Picture, content_of, digest_of, explained, name_of, naming
from pipeline.config import Params, load_params
from pipeline.devices import pick_device
from pipeline.encoders.base import Encoder
from pipeline.encoders.vision import VisionEncoder, load_vision_encoder
from pipeline.errors import UserError
from pipeline.media.decoding import Broken, Decoder, Loaded
from pipeline.media.pictures import decode
from pipeline.runs import RESULTS, Run, no_results
from pipeline.store.reader import training_captions

if TYPE_CHECKING:
    from pipeline.llms.load import LanguageModel
    from pipeline.vlm import VLM

P = TypeVar("P", str, Path, bytes, Image.Image, np.ndarray)
Rule = Literal["llm", "namer", "emd", "discriminant"]
ANSWER_TOKENS, NO_REPEAT = 40, 4  # of an answer to a question of one's own; and a run of tokens that stands there once
# What libraries warn of that is meant so (VLM.generate), or that is between them (PEFT asks transformers).
MEANT = "Passing `(repetition_penalty|no_repeat_ngram_size)`|`is_gradient_checkpointing` is deprecated"


@dataclass(frozen=True)
class Answer:
    """What is said of a picture, by which adapter, and how sure that is."""

    text: str
    adapter: str
    recipe: str | None = None
    """Of the fine-tuning; None where the LLM was not asked, or is the frozen one."""
    rule: Rule = "llm"
    """What answered: an LLM; EMD to the names and discriminant analysis, weighed; or EMD alone."""
    names: dict[str, float] = field(default_factory=dict)
    """The likeliest names with their probabilities, the likeliest first; of classification alone."""
    strangeness: float | None = None
    """How unlike the training pictures it is, by Familiar, 0 to 1; None where too few are held out to tell."""

    def __str__(self) -> str:
        return self.text

    @property
    def is_strange(self) -> bool:
        """Whether the picture is unlike those that the model was trained on, so that its answer is worth little."""
        return self.strangeness is not None and self.strangeness >= STRANGE


Ask = Callable[[Tensor], list[Answer]]
"""What answers one question about pictures: tokens [B, N, D_img] to an answer each."""


class Model:
    """The best adapters of a run, with the encoder and, once it is asked, the one LLM. Threads may share it.

    All methods raise UserError where something is missing, or does not fit what is there now. While anything is loaded
    the process's current folder is that of the run's project.
    """

    def __init__(self, params: Params, project: Path | None = None):
        self.params, self.run = params, Run.of(params)
        self._project, self._lock = project or Path.cwd(), threading.RLock()
        self._inserted = contextlib.ExitStack()
        self._vlm: tuple[Path, VLM] | None = None
        self._familiar: dict[tuple[str, ...], Familiar | None] = {}
        self._namers: dict[Path, NamedBy] = {}

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Model:
        """The model of a run: `folder` is that of its results, data/<profile> in a project's folder.

        Its parameters are those of params.yaml or, where another profile is active, of profiles/<profile>.yaml.
        """
        folder = Path(name_of(folder)).resolve()
        if not folder.is_dir() or folder.parent.name != RESULTS.name:
            raise no_results(folder)
        project = folder.parents[1]
        with contextlib.chdir(project):
            params = _params_of(folder.name)
        runtime = params.runtime.model_copy(update={"device": device})
        return cls(params.model_copy(update={"runtime": runtime}), project)

    def caption(self, picture: Picture) -> Answer:
        """What is to be seen in a picture. Raises ValueError, as `encode`, where it is none."""
        return self.captions()(self.encode([picture]))[0]

    def classify(self, picture: Picture, llm: bool = False, top: int = TOP) -> Answer:
        """Which of its classes a picture is of, with probabilities; `llm`: said and ranked by the fine-tuned LLM."""
        return self.names(llm, top)(self.encode([picture]))[0]

    def ask(self, picture: Picture, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """The fine-tuned LLM's answer to any question; `on_text` gets what there is of it with each token added."""
        return self.question(question, on_text)(self.encode([picture]))[0]

    def each(
        self, pictures: Iterable[P], ask: Ask, batch: int | None = None
    ) -> Iterator[tuple[P, Answer | ValueError]]:
        """Many pictures in their order, each with its answer, or with why it is no readable picture.

        Threads decode the next `batch` (default: evaluate.batch) while the models are at work.
        """
        if batch is not None and batch < 1:
            raise ValueError(f"batch: at least 1, not {batch}")
        size, rest = batch or self.params.evaluate.batch, iter(pictures)
        with ThreadPoolExecutor(self.params.runtime.decode_threads) as pool:

            def loading() -> list[tuple[P, Future[Loaded]]]:
                return [(picture, pool.submit(self._load, picture)) for picture in islice(rest, size)]

            ahead = loading()
            while ahead:
                now, ahead = ahead, loading()
                yield from self._answered(now, ask)

    def trained_on(self, picture: Picture) -> bool | None:
        """Whether a file, by its SHA-256, is one that this run trained on: its answers say little about new ones.

        None where it cannot be told: the file or, which stderr says once, a list of the run's pictures can't be read.
        """
        known, digest = self._digests, digest_of(picture)
        return None if known is None or digest is None else digest in known

    def encode(self, pictures: Sequence[Picture]) -> Tensor:
        """Image tokens of pictures, float32 [B, N, D_img] on the CPU: those of extraction, but for its decoder.

        Raises ValueError, with the name of a file, where one is no readable picture.
        """
        loaded = []
        for picture in pictures:
            with naming(picture):
                loaded.append(self._load(picture))
        return self._tokens(loaded)

    def seen(self, picture: Picture) -> Image.Image | None:
        """What the encoder is shown of a picture: its middle where the rest is cut off, resized; None where the
        encoder's own transform does not say. Raises ValueError, as `encode`."""
        self._load(picture)  # whatever that refuses
        pixels = self.encoder.preprocess(decode(content_of(picture)))
        return Image.fromarray(pixels.permute(1, 2, 0).numpy()) if pixels.dtype == torch.uint8 else None

    def check_encoder(self, folder: Path) -> None:
        """Raises UserError where an adapter was made from image tokens of another encoder than that of now."""
        from pipeline.origin import check_encoder

        with self._in_project() if "encoder" not in self.__dict__ else contextlib.nullcontext():
            identity = self.encoder.identity
        check_encoder(self._project / folder, identity)

    def captions(self, trained: bool = True) -> Ask:
        """What captions pictures; not `trained`: the same adapter before fine-tuning, in front of the frozen LLM."""
        folder, task = self._best_finetuned("caption"), self._task("caption")
        adapter, recipe, sets = self._made_by(folder)
        look, decoding = self._familiar_with(sets), dict[str, Any]()
        if trained:
            with self._at_work(folder, "adapter") as model, self._in_project():
                decoding = task.decoding(model, training_captions(self.run, self._data_of("caption", sets)))

        def answers(tokens: Tensor) -> list[Answer]:
            weights = (folder, "adapter") if trained else (self.run.pretrained(adapter), "last")
            with self._at_work(*weights) as model:
                if trained:
                    said = model.generate(tokens, task.prompt, task.max_tokens, **decoding)
                else:
                    said = model.generate(tokens, max_new_tokens=task.max_tokens, **task.settings.before_finetuning)
            return _told([text.split("\n")[0] for text in said], look(tokens), adapter, recipe if trained else None)

        return answers

    def names(self, llm: bool = False, top: int = TOP, rule: Rule = "namer") -> Ask:
        """What names pictures: the namer, by one of naming.rules.RULES, or the fine-tuned LLM with its hints.

        Before stage `name` has run it is EMD alone, whatever the rule.
        """
        if top < 1:
            raise ValueError(f"top: at least 1, not {top}")
        if llm:
            return self._names_by_llm(top)
        with self._in_project():
            found = namers(self.params)
            used: Rule = rule if found else "emd"
            folder = best_adapter(self.params, found or pretrained(self.params), self.encoder.identity)
            adapter, data = (folder.parent.name, folder.name) if found else (folder.name, classes(self.params)[0])
        named, look = self._named_by(folder, data), self._familiar_with([data])

        def answers(tokens: Tensor) -> list[Answer]:
            best = named(tokens, used)
            return _told([next(iter(some)) for some in best], look(tokens), adapter, None, best, top, used)

        return answers

    def question(self, question: str, on_text: Callable[[str], None] | None = None) -> Ask:
        """What answers a question about pictures: the LLM as it was fine-tuned for captions or, without such, names."""
        if not question.strip():
            raise UserError("", "the question is empty", "ask something")
        folder = self._best_finetuned("caption", "classify")
        adapter, recipe, sets = self._made_by(folder)
        look, hints = self._familiar_with(sets), self._hints_of(adapter, recipe)

        def answers(tokens: Tensor) -> list[Answer]:
            with self._at_work(folder, "adapter") as model:
                said = model.generate(
                    tokens, question, ANSWER_TOKENS, hints=hints(tokens), no_repeat=NO_REPEAT, on_text=on_text
                )
            return _told(said, look(tokens), adapter, recipe)

        return answers

    @contextlib.contextmanager
    def vlm(self, task: str) -> Iterator[VLM]:
        """The LLM with the best adapter of a task, caption or classify, until it is given back."""
        with self._at_work(self._best_finetuned(task), "adapter") as model:
            yield model

    # What answers.

    def _names_by_llm(self, top: int) -> Ask:
        folder, task = self._best_finetuned("classify"), self._task("classify")
        adapter, recipe, sets = self._made_by(folder)
        look, hints = self._familiar_with(sets), self._hints_of(adapter, recipe)
        data = self._data_of("classify", sets)
        named = self._named_by(self.run.named(adapter) / data, data)

        def answers(tokens: Tensor) -> list[Answer]:
            names, hinted = sorted(named(tokens[:1], "namer")[0]), hints(tokens)
            with self._at_work(folder, "adapter") as model:
                said = model.generate(tokens, task.prompt, task.max_tokens, hints=hinted)
                ranked = likeliest(names, model.rank(tokens, task.prompt, names, hinted).softmax(1))
            return _told(said, look(tokens), adapter, recipe, ranked, top)

        return answers

    def _hints_of(self, adapter: str, recipe: str) -> Callable[[Tensor], list[str] | None]:
        return hints_at_work(self.params, adapter, recipe, lambda folder: self._named_by(folder, folder.name))

    def _named_by(self, folder: Path, data: str) -> NamedBy:
        """All names of a picture with their probabilities, the likeliest first, by a rule of a namer, or by EMD."""
        with self._in_project():
            if folder not in self._namers:
                alone = folder == self.run.pretrained(folder.name)
                self._namers[folder] = (
                    emd_at_work(self.params, folder.name, data) if alone else namer_at_work(self.params, folder)
                )
        return self._namers[folder]

    def _familiar_with(self, sets: Sequence[str]) -> Callable[[Tensor], Sequence[float | None]]:
        """How strange pictures are to what was trained on some data sets; None each where that cannot be told."""
        key = tuple(sets)
        with self._in_project():
            if key not in self._familiar:
                self._familiar[key] = familiar_with(self.run, list(key))
        known = self._familiar[key]
        return lambda tokens: [None] * len(tokens) if known is None else known.strangeness(tokens)

    def _best_finetuned(self, *tasks: str) -> Path:
        """The best adapter of the first of some tasks that anything is fine-tuned for."""
        with self._in_project():
            return best_finetuned(self.params, self.encoder.identity, *tasks)

    def _made_by(self, folder: Path) -> tuple[str, str, list[str]]:
        """Adapter, recipe and data sets of a fine-tuned adapter."""
        adapter, _, recipe = folder.name.partition("-")
        return adapter, recipe, self.params.finetune_for(adapter, recipe).data

    def _data_of(self, task: str, sets: Sequence[str]) -> str:
        return next(data for data in sets if self.params.data[data].task == task)

    def _task(self, name: str) -> Any:
        from pipeline.tasks.base import Task

        return Task.of(name, self.params.evaluate)

    # Models, loaded when they are first asked for.

    @cached_property
    def _digests(self) -> set[str] | None:
        with self._in_project():
            return digests_of(self.params)

    @cached_property
    def encoder(self) -> VisionEncoder:
        return load_vision_encoder(self.params.vision, self.params.runtime.device)

    @cached_property
    def _llm(self) -> LanguageModel:
        from pipeline.llms.load import load_llm

        return load_llm(self.params.llm, self.params.runtime.device)

    @cached_property
    def _decoder(self) -> Decoder:
        """PIL, which decides what is broken anyway; torchvision, two seconds to import, differs from it by rounding."""
        vision = self.params.vision.model_copy(update={"decoder": "pil"})
        return Encoder.of(vision).decoder(self.encoder.preprocess, pick_device(self.params.runtime.device))

    @contextlib.contextmanager
    def _at_work(self, folder: Path, weights: str) -> Iterator[VLM]:
        """The LLM with an adapter and its LoRA inserted, which stay until others are asked for."""
        from pipeline.vlm import tuned

        with self._lock, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=MEANT)
            if self._vlm is None or self._vlm[0] != folder:
                self._inserted.close()
                self._vlm = None
                with self._in_project():
                    self._vlm = folder, self._inserted.enter_context(tuned(self._llm, folder, weights))
            yield self._vlm[1]

    @contextlib.contextmanager
    def _in_project(self) -> Iterator[None]:
        with self._lock, contextlib.chdir(self._project):
            yield

    # Pictures.

    def _load(self, picture: Picture) -> Loaded:
        """A picture, decoded as far as a thread has to. Raises ValueError with the reason where it does not decode."""
        with self._in_project() if "_decoder" not in self.__dict__ else contextlib.nullcontext():
            decoder = self._decoder
        with explained(picture):
            return decoder.load(content_of(picture))

    def _tokens(self, loaded: Sequence[Loaded]) -> Tensor:
        """Part by part, in batches of the shape of extraction. Raises Broken with the place among all."""
        size, found = self.params.vision.batch, []
        for at in range(0, len(loaded), size):
            some = list(loaded[at : at + size])
            try:
                pixels = self._decoder.batch(some, size)
            except Broken as error:
                raise Broken(at + error.row, str(error)) from None
            found.append(self.encoder.encode(pixels)[: len(some)])
        return torch.cat(found)

    def _answered(self, some: list[tuple[P, Future[Loaded]]], ask: Ask) -> Iterator[tuple[P, Answer | ValueError]]:
        said: list[Answer | ValueError | None] = [None] * len(some)
        loaded: dict[int, Loaded] = {}
        for place, (_, future) in enumerate(some):
            try:
                loaded[place] = future.result()
            except ValueError as error:
                said[place] = error
        while loaded:
            places = list(loaded)
            try:
                tokens = self._tokens(list(loaded.values()))
            except Broken as error:  # an own decoder found out
                said[places[error.row]] = error
                del loaded[places[error.row]]
                continue
            for place, answer in zip(places, ask(tokens), strict=True):
                said[place] = answer
            break
        for (picture, _), answer_or_fault in zip(some, said, strict=True):
            assert answer_or_fault is not None, "each place has one by now"
            yield picture, answer_or_fault


def _told(
    texts: list[str], strangeness: Sequence[float | None], adapter: str, recipe: str | None,
    names: Sequence[dict[str, float]] | None = None, top: int = TOP, rule: Rule = "llm",
) -> list[Answer]:  # fmt: skip
    best = [dict(islice(some.items(), top)) for some in names] if names else [dict[str, float]()] * len(texts)
    told = zip(texts, best, strangeness, strict=True)
    return [Answer(text, adapter, recipe, rule, names, strange) for text, names, strange in told]


def _params_of(profile: str) -> Params:
    """The parameters of a profile in the current folder: those that are active or, where another is, its file's."""
    params = load_params()
    if params.profile == profile:
        return params
    path = Path("profiles") / f"{profile}.yaml"
    if not path.exists():
        remedy = f"`terraalign profile use` the parameters that data/{profile} was made with"
        raise UserError("params.yaml", f"is of the profile {params.profile}, and there is no {path}", remedy)
    print(f"parameters of {path}: params.yaml is of the profile {params.profile}", file=sys.stderr)
    return load_params(path)
