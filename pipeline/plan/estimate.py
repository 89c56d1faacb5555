"""What each stage of a profile takes, from how much there is and from short measurements on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.config import Params, components
from pipeline.plan import costs
from pipeline.plan.calibrate import Language, Vision, is_there, tokens_of
from pipeline.plan.rows import Rows
from pipeline.training.loop import steps_per_epoch, total_steps

# Seconds of what is not measured, where importing what pre-training needs takes IMPORTS beside another process.
IMPORTS = 4.7
LIGHT, DRAWING, REPORT = 1.0, 3.0, 1.5  # imports of prepare; pictures of a PCA; the page
LOADED = 1e8  # parameters of an LLM a second
CONVERTING = 16.0 / 135e6  # a GGUF file's parameters
RENDERED = 0.006  # a drawing
PASSES = 14  # of a constant set over its sample
RIDGE, FITS, CROSS_FITS = 3, 8, 11  # decompositions of a closed form by ridge regression alone, or by all; of a namer
FEW = 0.1  # of such a decomposition, with fewer pictures than numbers in a token
ENDED = 0.7  # of an answer's longest length, after which all of a batch have ended
PROMPT, HINT = 12, 4  # tokens behind an image, and of what hints begin with
TOLD = 1.5  # names in a hint: as many as are likely enough together, and at most `hints`


@dataclass(frozen=True)
class Estimate:
    """A stage: pictures it goes through, bytes it writes, seconds until it begins to work, those of the work (together
    as it measures itself), and bytes it holds at most."""

    rows: int
    bytes: float
    start: float
    work: float
    peak: float


@dataclass(frozen=True)
class Machine:
    """What was measured, and what there is to do; all times are those of a stage on its share of the cores."""

    params: Params
    rows: dict[str, Rows]
    language: Language
    vision: Vision

    def estimate(self, stage: str) -> Estimate:
        """Of a stage by its name in dvc.yaml."""
        kind, _, item = stage.partition("@")
        of: Callable[[str], Estimate] = getattr(self, f"_{kind}")
        return of(item)

    def _prepare(self, data: str) -> Estimate:
        count, source = self.rows[data].pictures, self.params.data[data].source
        each = (RENDERED if source.startswith("openmoji") else 0) + 1.5 * self.vision.decoded / 2  # by two threads
        return Estimate(count, 200 * count, self.pace * LIGHT, count * each, 0.25e9)

    def _extract_images(self, data: str) -> Estimate:
        count = max(0, self.rows[data].pictures - self.vision.stored.get(data, 0))  # pictures may be gone since
        size = count * costs.picture_bytes(self.params)
        each = costs.views(self.params) * self.vision.encoded + self.vision.decoded
        return Estimate(count, size, self._start() + self.vision.load, count * each, self.vision.resident + 0.1e9)

    def _extract_captions(self, data: str) -> Estimate:
        own = self.rows[data]
        size, width, _ = costs.llm_shape(self.params)
        # Of two that are run side by side one converts the LLM.
        first = not is_there(self.params) and data == self.params.run.data[0]
        start = self._start() + self.pace * (LIGHT + CONVERTING * size * first)
        written = 4 * own.pictures * own.texts * own.tokens + 2000 * width
        peak = self.vision.resident + 8 * size * first
        return Estimate(own.pictures, written, start, 2e-4 * own.pictures * own.texts, peak)

    def _inputs(self, _: str) -> Estimate:
        return Estimate(0, 2000, 0.1, 0.0, 0.1e9)

    def _start(self) -> float:
        return self.vision.start

    @property
    def pace(self) -> float:
        """How much slower this machine is now than where the constants were measured."""
        return self.vision.start / IMPORTS

    def _pretrain(self, adapter: str) -> Estimate:
        settings, one = self.params.pretrain_for(adapter), self.vision.adapters[adapter]
        sets = [self.rows[data] for data in settings.data]
        train = sum(rows.train for rows in sets)
        held, steps = min(sets[0].val, settings.validation_images), total_steps(settings, train)
        candidates = min(held, settings.candidates)
        points = settings.validations or math.ceil(steps / steps_per_epoch(settings, train))
        step = one.step * settings.accumulate
        if components.find("objective", settings.objective.name).needs_llm:
            length = tokens_of(self.params) + PROMPT + sets[0].tokens
            step = self.language.trained * length * settings.batch * settings.accumulate
        training = min(steps * step, settings.max_seconds or math.inf)
        # Own and other picture; own and plain distances at the end.
        validating = (points + 1) * (2 * held * one.held_out + candidates**2 * one.pair) + 4 * held * one.held_out
        validating += min(held, self.params.pretrain.candidates) ** 2 * one.pair
        work = self._beginning(adapter, train, one.held_out) + training + validating
        weights = 4 * costs.adapter_parameters(self.params)
        return Estimate(train, 2 * weights, self._start(), work, self.vision.resident + 5 * weights + 0.2e9)

    def _beginning(self, adapter: str, train: int, each: float) -> float:
        """Of what an adapter starts from, which the first of several that share it computes."""
        own = self.params.pretrain_for(adapter).objective
        start = getattr(own, "start", "random")
        if start == "random":
            return 0.0
        fits = RIDGE if getattr(own, "closed_form", "") == "ridge" else FITS
        first = adapter == self.params.run.adapters[0]
        seconds = 2 * PASSES * min(512, train) * each / 2  # of one token and of as many as the adapter gives
        return seconds + (fits * self.vision.axes if start == "closed_form" else 0.0) if first else seconds / 2

    def _name(self, adapter: str) -> Estimate:
        work, count = 0.0, 0
        for data in self._classes():
            own, pair = self.rows[data], self.vision.adapters[adapter].pair
            seen = own.val + own.test + min(512, own.train) + min(256, own.val + own.test) * 2
            fitted = costs.views(self.params) * (own.train + own.val)
            few = fitted + own.classes < costs.tokens_per_picture(self.params)[1]
            work += seen * own.classes * pair + CROSS_FITS * self.vision.axes * (FEW if few else 1)
            count += own.pictures
        return Estimate(count, 100 * count, self._start(), work, self.vision.resident + 0.2e9)

    def _classes(self) -> list[str]:
        return [data for data in self.params.run.data if self.params.data[data].task == "classify"]

    def _finetune(self, item: str) -> Estimate:
        adapter, recipe = item.split("-")
        own = self.params.finetune_for(adapter, recipe)
        sets = [self.rows[data] for data in own.data]
        length = max(self._length(rows, own.hints) for rows in sets)
        steps = total_steps(own, sum(rows.train for rows in sets))
        batch, held = own.batch * own.accumulate, sum(min(rows.val, own.validation_images) for rows in sets)
        read = (own.validations + 1) * held * length * self.language.read
        work = steps * batch * length * self.language.trained + read
        peak = self.language.resident + costs.activation_bytes(self.params, on_cpu=True) * own.batch * length
        weights = 4 * costs.adapter_parameters(self.params)
        return Estimate(steps * batch, 2 * weights, self._with_llm(), work, peak + 3 * weights)

    _finetune_scratch = _finetune

    def _with_llm(self) -> float:
        return self.language.start + self.language.load + self.pace * costs.llm_shape(self.params)[0] / LOADED

    def _length(self, rows: Rows, hints: int = 0) -> float:
        """Tokens that the LLM reads for a picture: image, prompt, hints and answer."""
        behind = HINT + min(hints, TOLD) * (rows.tokens + 1) if hints else 0.0
        return tokens_of(self.params) + PROMPT + behind + rows.tokens + 1

    def _evaluate(self, item: str) -> Estimate:
        adapter, recipe = item.split("-")
        own, work, count = self.params.finetune_for(adapter, recipe), 0.0, 0
        for data in own.data:
            rows, captions = self.rows[data], self.params.data[data].task == "caption"
            some = min(rows.test, self._setting("captions", rows.test)) if captions else rows.test
            longest = self._setting("caption_tokens" if captions else "class_tokens", 16)
            read = some * self._length(rows, own.hints) * self.language.read
            beams = self._setting("finetuned_beams", 1) if captions else 1
            # Captions also by the model before fine-tuning, which has no beam.
            each = [1, beams] if captions else [1]
            work += len(each) * read + sum(self._writing(some, longest, wide) for wide in each)
            work += self.vision.axes if not captions else LIGHT
            count += some
        return Estimate(count, 500 * count, self._with_llm() + self.pace * LIGHT, work, self.language.resident + 0.2e9)

    def _writing(self, count: int, longest: int, beams: int) -> float:
        """Of greedy answers, or by a beam, batch by batch."""
        batch = self.params.evaluate.batch
        batches = [batch] * (count // batch) + ([count % batch] if count % batch else [])
        return sum(ENDED * longest * self._decoding(rows * beams) for rows in batches)

    def _decoding(self, rows: int) -> float:
        """Of a step for so many rows, between and beyond those that were measured."""
        known = sorted(self.language.written.items())
        (low, first), (high, last) = known[0], known[-1]
        for (a, x), (b, y) in pairwise(known):
            if a <= rows <= b:
                return x + (y - x) * (rows - a) / (b - a)
        return first if rows < low else last + (last - first) / max(1, high - low) * (rows - high)

    def _setting(self, key: str, otherwise: int) -> int:
        value: Any = getattr(self.params.evaluate, key, None)
        return otherwise if value is None else int(value)

    def _pca(self, _: str) -> Estimate:
        count = min(self.rows[self.params.pca.data].val, self.params.pca.images)
        start, peak = self._start() + self.pace * DRAWING, self.vision.resident + 0.4e9
        return Estimate(count, 1e6, start, 4 * self.vision.axes, peak)

    def _report(self, _: str) -> Estimate:
        return Estimate(sum(rows.test for rows in self.rows.values()), 5e6, self.pace * REPORT, 0.0, 0.4e9)
