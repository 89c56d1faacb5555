"""lmms-eval's interface to a model (lmms_eval.api.model.lmms), answered by a fine-tuned adapter and its LLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor

from pipeline.answers.names import hints_at_work
from pipeline.config import Params, load_params
from pipeline.encoders.vision import load_vision_encoder
from pipeline.media.decoding import padded
from pipeline.origin import check_encoder, check_llm_named
from pipeline.runs import Run
from pipeline.vlm import VLM, load_vlm

Ask = Callable[[list[Image.Image]], Tensor]
Hints = Callable[[Tensor], list[str] | None]


class TerraAlign(lmms):  # type: ignore[misc]
    """`--model_args adapter=mlp,recipe=captions`, in a project folder, whose params.yaml names the run.

    A question is about one picture; its prompt is the task's, in the LLM's chat format, with the hints that the recipe
    has. Answers are greedy, or of a beam where the task asks for one.
    """

    def __init__(self, adapter: str, recipe: str, batch_size: int | str = 8, device: str | None = None, **_: Any):
        super().__init__()
        self.batch = int(batch_size)
        self.encode, self.vlm, self.hints = loaded(load_params(), adapter, recipe, device or "auto")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A text for each request: (context, arguments of generation, doc_to_visual, doc_id, task, split)."""
        found: dict[int, str] = {}
        for part, context, options in self._batches(requests):
            if options.get("do_sample") or options.get("temperature"):
                raise ValueError("terraalign answers greedily or by a beam; set do_sample: false and temperature: 0")
            limit, beams = int(options.get("max_new_tokens", 128)), int(options.get("num_beams") or 1)
            tokens = self.encode([self._picture(requests[i].args) for i in part])
            answers = self.vlm.generate(tokens, _words(context), limit, hints=self.hints(tokens), beams=beams)
            until = options.get("until") or []
            for i, answer in zip(part, answers, strict=True):
                for stop in [until] if isinstance(until, str) else until:
                    answer = answer.split(stop)[0] if stop else answer
                found[i] = answer
        return [found[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation, doc_to_visual, doc_id, task, split) what it costs to say it, and whether a
        greedy answer is that.

        Minus the log-likelihood, with the end of the turn: lmms-eval takes the lowest for the best, as its own models
        give losses. All continuations of one picture are read in one pass.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            context, _, _, *which = request.args
            groups.setdefault((context, *which), []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for (context, *_), numbers in groups.items():
            args = requests[numbers[0]].args
            tokens = self.encode([self._picture(args)])
            names = [self._continuation(requests[i].args) for i in numbers]
            hints = self.hints(tokens)
            scores = self.vlm.rank(tokens, _words(context), names, hints)[0].tolist()
            longest = max(map(len, self.vlm.answer_ids(names)))
            [greedy] = self.vlm.generate(tokens, _words(context), longest, hints=hints)
            found |= {i: (-score, greedy == name) for i, score, name in zip(numbers, scores, names, strict=True)}
        return [found[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not a thing of ours: one question, one answer."""
        raise NotImplementedError("terraalign answers one question about a picture, not several in a row")

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], str, dict[str, Any]]]:
        """Numbers of requests with the same words and options, at most `batch` of them."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[:2], sort_keys=True, default=str), []).append(number)
        for numbers in groups.values():
            context, options, *_ = requests[numbers[0]].args
            for start in range(0, len(numbers), self.batch):
                yield numbers[start : start + self.batch], context, dict(options)

    def _doc(self, args: tuple[Any, ...]) -> Any:
        doc_id, task, split = args[3:6]
        return self.task_dict[task][split][doc_id]

    def _picture(self, args: tuple[Any, ...]) -> Image.Image:
        visuals = args[2](self._doc(args))
        if len(visuals) != 1 or not isinstance(visuals[0], Image.Image):
            raise ValueError(f"terraalign takes one picture with a question, not {len(visuals)} of them or a video")
        return visuals[0].convert("RGB")

    def _continuation(self, args: tuple[Any, ...]) -> str:
        text = args[1] if isinstance(args[1], str) else args[1](self._doc(args))
        return str(text).strip()  # the chat format has the space before an answer


def loaded(params: Params, adapter: str, recipe: str, device: str) -> tuple[Ask, VLM, Hints]:
    """What makes image tokens of pictures, the model that is asked about them, and what hints it of them.

    Raises UserError.
    """
    folder = Run.of(params).finetuned(adapter, recipe)
    encoder = load_vision_encoder(params.vision, device)
    check_encoder(folder, encoder.identity)
    check_llm_named(folder, params.llm)

    def encode(images: list[Image.Image]) -> Tensor:
        return encoder.encode(padded([encoder.preprocess(image) for image in images], len(images)))

    return encode, load_vlm(params.llm, folder, "adapter", device), hints_at_work(params, adapter, recipe)


def _words(context: str) -> str:
    """Without lmms-eval's word for the picture, whose place our prompts have behind the text."""
    return context.replace("<image>", "").strip()
