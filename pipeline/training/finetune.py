"""Fine-tuning: adapter and LoRA together on next-token cross-entropy, from cached image tokens (QLoRA with nf4)."""

from __future__ import annotations

import json
import operator
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.module import Adapter, build_adapter, load_adapter
from pipeline.config import Params
from pipeline.config.components import sources_of
from pipeline.config.schema import Recipe
from pipeline.devices import fast_products
from pipeline.errors import UserError
from pipeline.llms.load import load_llm
from pipeline.naming.table import Named
from pipeline.origin import Origin, Words, check_llm, check_of_one_kind, check_tokens
from pipeline.runs import Run
from pipeline.started import Started
from pipeline.store.reader import ImageTokens, drawn_views
from pipeline.tasks.base import Task
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import Trainer, batch_at, points, total_steps, write_history
from pipeline.vlm import VLM, add_lora


class Examples:
    """Images of a data set with the prompts and answers of its task, and hints where the recipe has some."""

    def __init__(
        self, images: ImageTokens, name: str, task: Task, settings: Recipe, seed: int, named: Named | None = None
    ):
        self.name, self.images, self.task, self.prompts = name, images, task, settings.prompts[name]
        self.hinted = [] if named is None else [named.hinted(row_id, settings.hints) for row_id in images.ids]
        self.hints, self.decoys = [task.hint(names) for names in self.hinted] or None, settings.decoys
        self.answers = [[text for text in texts if text and text.strip()] for texts in task.answers(images.rows)]
        self.train, val = self._answered("train"), self._answered("val")
        unanswered = [images.ids[i] for i, texts in enumerate(self.answers) if not texts]
        if unanswered:
            names = f"{', '.join(unanswered[:3])}{', ...' if len(unanswered) > 3 else ''}"
            print(f"{name}: {len(unanswered)} pictures have no words and are left out: {names}", file=sys.stderr)
        if not self.train or not val:
            raise UserError(
                name, f"{len(self.train)} train and {len(val)} val pictures with words", "both are needed: add pictures"
            )
        order = torch.randperm(len(val), generator=torch.Generator().manual_seed(seed)).tolist()
        # Those of one length together, so that little is padded.
        self.val = sorted((val[i] for i in order[: settings.validation_images]), key=self._length)

    def _length(self, position: int) -> int:
        """Of what is behind a picture in the prompt and of its first answer, in characters: tokens, about."""
        return len(self.answers[position][0]) + len(self.hints[position] if self.hints else "")

    def _answered(self, split: str) -> list[int]:
        """Positions of a split's pictures that have an answer."""
        return [i for i in self.images.split(split) if self.answers[i]]

    def warn_of_cuts(self, model: VLM) -> None:
        """Say on stderr which pictures have answers longer than the model takes; a byte gives a token at most."""
        limit = model.max_answer_tokens
        long = [
            i
            for i in sorted({*self.train, *self.val})
            if any(2 * len(text.encode()) >= limit and model.is_cut(text) for text in self.answers[i])
        ]
        if long:
            names = f"{', '.join(self.images.ids[i] for i in long[:3])}{', ...' if len(long) > 3 else ''}"
            print(f"answers of {len(long)} pictures are cut to {limit} tokens: {names}", file=sys.stderr)

    def draw(self, batch: list[int]) -> tuple[Tensor, str, list[str], list[str] | None]:
        """Training images, a random view of each where there are several, a random prompt for all, and a random answer
        for each; random by torch's own state."""
        positions = [self.train[i] for i in batch]
        prompt = self.prompts[int(torch.randint(len(self.prompts), ()))]
        answers = [self.answers[p][int(torch.randint(len(self.answers[p]), ()))] for p in positions]
        shown, views = self._with_decoys(positions), drawn_views(self.images.views, len(positions))
        return self.images.tokens(shown, views=views), prompt, answers, self._hints_of(positions)

    def _with_decoys(self, positions: list[int]) -> list[int]:
        """Positions of the pictures whose tokens are shown: now and then one of another name among the hints."""
        if not self.hinted or not self.decoys:
            return positions
        shown = []
        for position in positions:
            names = self.hinted[position]
            others = self.named_so[names[int(torch.randint(len(names), ()))]] if names else []
            swap = bool(torch.rand(()) < self.decoys) and others
            shown.append(others[int(torch.randint(len(others), ()))] if swap else position)
        return shown

    @cached_property
    def named_so(self) -> dict[str, list[int]]:
        """The training pictures of each name."""
        found: dict[str, list[int]] = defaultdict(list)
        for position in self.train:
            found[self.answers[position][0]].append(position)
        return found

    def fixed(self, positions: list[int]) -> tuple[Tensor, str, list[str], list[str] | None]:
        """The same images with the first prompt and the first answer."""
        answers = [self.answers[position][0] for position in positions]
        return self.images.tokens(positions), self.prompts[0], answers, self._hints_of(positions)

    def _hints_of(self, positions: list[int]) -> list[str] | None:
        return self.hints and [self.hints[position] for position in positions]

    @torch.no_grad()
    def mean_loss(self, model: VLM, batch: int) -> float:
        """The loss of the validation images, by parts of their answers."""
        parts = [self.val[i : i + batch] for i in range(0, len(self.val), batch)]
        sums = [self.task.loss(model, *self.fixed(part)) for part in parts]
        return sum(total.item() for total, _ in sums) / sum(count for _, count in sums)


class Mixture:
    """Which of several data sets each batch of a run is of: as evenly as their shares allow, the same in every run.

    A batch is of one data set, as it has one prompt.
    """

    def __init__(self, sets: Sequence[Examples], shares: Mapping[str, float] | None):
        weights = [len(one.train) if shares is None else shares[one.name] for one in sets]
        self.sets, self.shares = sets, [weight / sum(weights) for weight in weights]
        self._turns: list[tuple[int, int]] = []  # of each batch: its data set, and how many of that came before
        self._taken = [0] * len(sets)

    @property
    def size(self) -> int:
        """Training images of all data sets."""
        return sum(len(one.train) for one in self.sets)

    def turn(self, number: int) -> tuple[Examples, int]:
        """The data set of the number-th batch, and the how-manieth of its own that is: who is furthest behind."""
        while len(self._turns) <= number:
            due = [
                share * (len(self._turns) + 1) - taken for share, taken in zip(self.shares, self._taken, strict=True)
            ]
            chosen = due.index(max(due))
            self._turns.append((chosen, self._taken[chosen]))
            self._taken[chosen] += 1
        chosen, own = self._turns[number]
        return self.sets[chosen], own


def finetune(params: Params, name: str, recipe: str, scratch: bool = False) -> float:
    """Fine-tune an adapter with a fresh LoRA by one recipe, write weights, history and metrics; returns the seconds.

    Starts from the pre-trained adapter, or from a random one. Raises UserError when features or adapter are not there,
    or of other models than the parameters name.
    """
    run, settings = Run.of(params), _settings(params, name, recipe, scratch)
    of_data, params = params.seed, params.seeded(settings)
    pretrained, out = None if scratch else run.pretrained(name), run.finetuned(name, recipe, scratch)
    check_of_one_kind(run, "images", settings.data)
    if pretrained:
        for data in settings.data:
            check_tokens(pretrained, run, data)
    sets = [_examples(params, run, data, settings, name, of_data) for data in settings.data]
    mixture, shape = Mixture(sets, settings.mixture), sets[0].images.shape
    torch.manual_seed(params.seed)
    fast_products()
    llm = load_llm(params.llm, params.runtime.device)
    embedding = llm.network.get_input_embeddings()
    if pretrained:
        check_llm(pretrained, embedding)
    lora = add_lora(llm, params.finetune.lora)
    section = params.adapter(name)
    if pretrained:
        adapter = load_adapter(pretrained, "last")
    else:
        adapter = build_adapter(params.kind_of(name), shape[1], llm.width, **section.architecture)
    _check_fit(adapter, shape[1], llm.width)
    model = VLM(adapter, llm)
    if params.runtime.activations == "recompute":
        model.recompute_activations()
    for examples in sets:
        _leave_room(model, examples, name)
    for examples in sets:
        examples.warn_of_cuts(model)
    start = pretrained / "last.safetensors" if pretrained else None
    read = [start] if start else []
    if settings.hints:
        read.append(run.named(name) / f"{recipe}.json")
    checkpoint = _checkpoint(params, name, recipe, scratch, read)
    trainer = _trainer(model, lora, mixture, settings, scratch, params.seed, checkpoint)
    trainer.name = f"{'from scratch' if scratch else 'fine-tune'} {name} on {recipe}"
    history = trainer.run()
    _write(out, adapter, lora, trainer)
    Origin.of(run, settings.data[0], Words.of_module(embedding), params.llm, start).write(out)
    print(f"{trainer.name}: validation loss {history[0]['val_loss']:.3f} -> {history[-1]['val_loss']:.3f}")
    trainer.checkpoint.remove()
    return history[-1]["seconds"]


def _settings(params: Params, name: str, recipe: str, scratch: bool) -> Recipe:
    """The recipe; from scratch without hints, which a pre-trained adapter gives."""
    found = params.finetune_for(name, recipe)
    return found.model_copy(update={"hints": 0, "decoys": 0.0}) if scratch else found


def _examples(params: Params, run: Run, data: str, settings: Recipe, adapter: str, seed: int) -> Examples:
    """Examples of a data set; `seed` chooses the validation pictures, the same whatever a training's own seed."""
    kind = params.data_set(data).task
    named = Named.read(run, adapter, data) if settings.hints and kind == "classify" else None
    return Examples(ImageTokens.open(run, data), data, Task.of(kind, params.evaluate), settings, seed, named)


def _checkpoint(params: Params, name: str, recipe: str, scratch: bool, read: list[Path]) -> Checkpoint:
    """A checkpoint that holds as long as all that decides this run is the same."""
    run, settings, section = Run.of(params), _settings(params, name, recipe, scratch), params.adapter(name)
    files = [path for data in settings.data for path in (run.features("images", data), run.manifest(data))]
    parts = [("task", params.data_set(data).task) for data in settings.data] + [("adapter", params.kind_of(name))]
    decides = [params.seed, settings.model_dump(), params.finetune.lora, params.llm, section.architecture, parts]
    stage = f"{'finetune_scratch' if scratch else 'finetune'}-{name}-{recipe}"
    return Checkpoint.of(run, stage, decides, [*files, *read, *sources_of(parts)], __name__)


def _check_fit(adapter: Adapter, d_in: int, d_out: int) -> None:
    if (adapter.config["d_in"], adapter.config["d_out"]) != (d_in, d_out):
        raise UserError(
            "",
            (
                f"the pre-trained adapter maps {adapter.config['d_in']} to {adapter.config['d_out']}, but the "
                f"image tokens and the LLM need {d_in} to {d_out}"
            ),
            "run `dvc repro`",
        )


@torch.no_grad()
def _leave_room(model: VLM, examples: Examples, name: str) -> None:
    """Let answers be as long as the LLM's context allows after prompt and image tokens."""
    model.eval()  # dropout would draw random numbers, and so change the run
    count = model.adapter(examples.images.tokens(examples.train[:1]).to(model.device)).shape[1]
    longest = [max(examples.hints, key=len)] if examples.hints else []
    rooms = [room for prompt in examples.prompts if (room := model.room(prompt, count, longest)) is not None]
    room = min(rooms, default=model.max_answer_tokens)
    if room < 2:
        raise UserError(
            "",
            f"{count} image tokens of {name} and the prompt fill the LLM's context of {model.context} tokens",
            f"set adapters.{name}.architecture to give fewer, shorten finetune.recipes.*.prompts, or take another LLM",
        )
    model.max_answer_tokens = min(model.max_answer_tokens, room)


def _trainer(
    model: VLM, lora: Any, mixture: Mixture, settings: Recipe, scratch: bool, seed: int, checkpoint: Checkpoint
) -> Trainer:
    def loss(number: int) -> Started:
        examples, own = mixture.turn(number)
        batch = batch_at(own, settings.batch, len(examples.train), seed)
        total, count = examples.task.loss(model, *examples.draw(batch))
        return Started(lambda: total / count)

    def validate(step: int) -> dict[str, float]:
        size = 2 * settings.batch  # no gradients are kept, so twice as many fit
        values = [examples.mean_loss(model, size) for examples in mixture.sets]
        if len(values) == 1:
            return {"val_loss": values[0]}
        each = {f"val_loss/{examples.name}": value for examples, value in zip(mixture.sets, values, strict=True)}
        return {"val_loss": sum(map(operator.mul, mixture.shares, values)), **each}

    total = total_steps(settings, mixture.size)
    rate = (settings.scratch_adapter_lr if scratch else None) or settings.adapter_lr
    groups = [
        {"params": list(model.adapter.parameters()), "lr": rate},
        {"params": [p for p in lora.parameters() if p.requires_grad], "lr": settings.lr},
    ]
    return Trainer(
        name="", model=model, groups=groups, settings=settings, examples=mixture.size, seed=seed,
        loss=loss, validate=validate, validate_at=points(total, settings.validations), checkpoint=checkpoint,
    )  # fmt: skip


def _write(out: Path, adapter: Adapter, lora: Any, trainer: Trainer) -> None:
    adapter.save(out, "adapter")
    config = lora.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set: another order in every process
    lora.save_pretrained(out / "lora")
    write_history(out / "history.csv", trainer.history)
    trained, everything = lora.get_nb_trainable_parameters()
    metrics = {
        **{key: value for key, value in trainer.history[-1].items() if key.startswith("val_loss")},
        "steps": int(trainer.history[-1]["step"]),
        "parameters_adapter": sum(p.numel() for p in adapter.parameters()),
        "parameters_lora": trained,
        "lora_percent": 100 * trained / everything,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
