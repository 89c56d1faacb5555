"""What does fine-tuning lose of what pre-training knew about the classes? Fine-tunes one adapter in several ways.

    python benchmarks/forgetting.py --project FOLDER --out runs.jsonl [--only thesis "adapter frozen"] [--seeds 17]
        [--adapter mlp] [--recipe classes] [--steps 48] [--images 128] [--table]

FOLDER is a project whose adapter is pre-trained and whose pictures are named (stage `name`); nothing is written there
but data/models and checkpoints. Each way starts from the same pre-trained adapter, with the recipe's prompts, batch
and rates and a fresh LoRA, and differs from `thesis` (LoRA on the queries and values, no hints) in what VARIANTS
says. All figures are of validation pictures, and of half as many training pictures; the test part is not read. Every
finished run adds a line of JSON to the file, and a run that has its line is not repeated. In the end (with --table at
once) the means over seeds are printed.

Figures, in percent:
    said, valid      greedy answers that hold the right name (the thesis's rule); that hold the name of any class
    ranked           the right one of the ten likeliest names (of stage `name`) is the most likely answer to the LLM
    EMD              the nearest name by the adapter's own tokens, debiased, without the LLM
    state            logistic regression on the LLM's last state where the answer begins, from 600 training pictures
With `head` there are no answers: a linear layer in place of the LLM's own says the class, which is `said`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.module import Adapter, build_adapter, load_adapter
from pipeline.config import Params, load_params
from pipeline.config.schema import LoRA, Recipe
from pipeline.devices import CPU
from pipeline.extraction.near import series_of
from pipeline.llms.load import load_llm
from pipeline.llms.spliced import IGNORED
from pipeline.naming.classes import class_names, labelled, numbers
from pipeline.naming.discriminant import deal
from pipeline.naming.fit import KEPT, REFERENCE, _nearest
from pipeline.naming.nearest import adapted_by, many
from pipeline.naming.table import Named
from pipeline.objectives.base import Means
from pipeline.objectives.emd import EMD, EMDSettings
from pipeline.objectives.pairs import Pairs
from pipeline.runs import Run
from pipeline.started import Started
from pipeline.store.reader import ImageTokens
from pipeline.tasks.base import Task
from pipeline.tasks.naming import find_class
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.finetune import Examples
from pipeline.training.loop import Trainer, batch_at
from pipeline.training.pretrain import _trainer
from pipeline.vlm import VLM, add_lora

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIGURES = {  # a column of the table, and its key
    "said": "said/val", "valid": "valid/val", "ranked": "ranked/val", "EMD": "emd/val", "said, train": "said/train",
    "EMD, train": "emd/train", "state": "state/val",
}  # fmt: skip
PROBED = 600  # training pictures that the classifier of the LLM's states is fitted on


PLAIN = "no LLM"


@dataclass(frozen=True)
class Variant:
    """What a way of fine-tuning changes; without any, it is the thesis's."""

    trains: bool = True
    frozen: float = 0.0  # for this share of the steps, the adapter
    modules: tuple[str, ...] = QV
    hints: int = 0
    pictures: bool = True  # or hints alone
    pictures_first: bool = False  # `[INST] image tokens, prompt [/INST]`
    emd: float = 0.0  # weight of pre-training's loss, with that of the names, as a second one
    shaken: float = 0.0  # brightness and contrast of cached tokens
    mixed: float | None = None  # tokens become mixtures of words, by their squared distances over this
    smoothing: float = 0.0
    rate: float = 1.0  # times the recipe's learning rates
    unseen: bool = False  # tokens of training pictures are of adapters that were pre-trained without them
    head: bool = False  # a linear layer for the classes in place of the LLM's output layer
    probed: bool = field(default=False, compare=False)


VARIANTS = {
    "before": Variant(trains=False, probed=True),
    "thesis": Variant(probed=True),
    "adapter frozen": Variant(frozen=1.0),
    "adapter frozen first": Variant(frozen=0.5),
    "picture before the words": Variant(pictures_first=True),
    "all linear layers": Variant(modules=ALL),
    "EMD kept": Variant(emd=1.0),
    "hints": Variant(hints=5),
    "hints, all linear layers": Variant(hints=5, modules=ALL),
    "hints, words only": Variant(hints=5, modules=ALL, pictures=False),
    "hints, adapter frozen": Variant(hints=5, modules=ALL, frozen=1.0),
    "unseen tokens": Variant(modules=ALL, frozen=1.0, unseen=True),
    "hints, unseen tokens": Variant(hints=5, modules=ALL, frozen=1.0, unseen=True),
    "brightness and contrast": Variant(shaken=0.5),
    "mixtures of words": Variant(mixed=0.5),
    "label smoothing": Variant(smoothing=0.1),
    "lower rates": Variant(rate=0.25),
    "head": Variant(head=True),
    "head, all linear layers": Variant(head=True, modules=ALL),
    "head, hints": Variant(head=True, modules=ALL, hints=5),
}


class Altered(nn.Module):
    """An adapter with what a variant does before and behind it; `words` [T, D] are those to mix tokens of."""

    def __init__(self, adapter: Adapter, variant: Variant, words: Tensor):
        super().__init__()
        self.words: Tensor
        self.inner, self.variant = adapter.requires_grad_(variant.frozen < 1), variant
        self.register_buffer("words", words, persistent=False)

    def train(self, mode: bool = True) -> Altered:
        super().train(mode)
        self.inner.train(mode and self.variant.frozen < 1)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D_img] to [B, M, D]; [B, 0, D] where the LLM is to get no picture."""
        own = self.variant
        if not own.pictures:
            return tokens.new_zeros(len(tokens), 0, self.words.shape[1])
        if own.unseen and self.training:
            return tokens  # adapted already
        if own.shaken and self.training:
            tokens = shaken(tokens, own.shaken)
        found: Tensor = self.inner(tokens)
        if own.mixed is not None:
            near = torch.cdist(found, self.words[None]).square() / -own.mixed
            found = near.softmax(-1) @ self.words
        return found


@dataclass
class Unseen:
    """Image tokens of a data set, but adapted ones of some pictures."""

    images: ImageTokens
    adapted: dict[int, Tensor]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.images, name)

    def tokens(self, positions: list[int], device: torch.device = CPU, views: Sequence[int] | None = None) -> Tensor:
        """Adapted [B, M, D] where all are of those, else [B, N, D_img]."""
        if all(position in self.adapted for position in positions):
            return torch.stack([self.adapted[position] for position in positions]).to(device)
        return self.images.tokens(positions, device, views)


def shaken(tokens: Tensor, most: float) -> Tensor:
    """Cached tokens [B, N, D] with a random contrast a picture, and a random brightness a channel (FroFA, Lange et al.
    2024)."""
    mean, spread = tokens.mean((1, 2), keepdim=True), tokens.std((1, 2), keepdim=True)
    contrast = 1 + most * (2 * torch.rand_like(mean) - 1)
    brightness = most * (2 * torch.rand(len(tokens), 1, tokens.shape[2], device=tokens.device) - 1)
    return mean + contrast * (tokens - mean) + brightness * spread


class Model(VLM):
    """The model of a variant."""

    smoothing, pictures_first = 0.0, False
    head: nn.Linear | None  # set on every model: a default here would hide the layer
    names: list[str]

    def prompt(self, text: str, hint: str = "") -> tuple[list[int], list[int]]:
        return super().prompt("", f"{text} {hint}") if self.pictures_first else super().prompt(text, hint)

    def loss(
        self, tokens: Tensor, prompt: str, answers: Sequence[str], hints: Sequence[str] | None = None
    ) -> tuple[Tensor, int]:
        if self.head is not None:
            own = torch.tensor([self.names.index(answer) for answer in answers], device=self.device)
            return F.cross_entropy(self.head(self._state(tokens, prompt, hints)), own, reduction="sum"), len(own)
        if not (self.smoothing and self.training):
            return super().loss(tokens, prompt, answers, hints)
        answer_ids = self.answer_ids(answers)
        logits, labels = self._taught(tokens, prompt, answer_ids, hints)
        total = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum",
            label_smoothing=self.smoothing,
        )  # fmt: skip
        return total, sum(map(len, answer_ids))


class Bench:
    """A project's data, and what all variants share."""

    def __init__(self, params: Params, adapter: str, recipe: str, steps: int, images: int):
        self.params, self.adapter, self.run, self.steps = params, adapter, Run.of(params), steps
        self.recipe = params.finetune_for(adapter, recipe).model_copy(update={"max_steps": steps, "epochs": 10**6})
        (self.data,) = self.recipe.data
        self.images = ImageTokens.open(self.run, self.data)
        self.names, self.named = class_names(self.images), Named.read(self.run, adapter, self.data)
        self.task = Task.of(params.data[self.data].task, params.evaluate)
        val, train = labelled(self.images, "val"), labelled(self.images, "train")
        self.asked = {"val": spread(val, images), "train": spread(train, images // 2)}
        self.val, self.reference, self.probed = val, spread(train, REFERENCE), spread(train, PROBED)
        settings = params.pretrain_for(adapter)
        if self.data not in settings.data:
            settings = settings.model_copy(update={"data": [*settings.data, self.data]})
        own = settings.objective
        assert isinstance(own, EMDSettings), "the adapter is to be pre-trained by EMD"
        pairs = Pairs.open(params, settings)
        self.objective = EMD(own.model_copy(update={"names": own.names or 1.0}), pairs, Means(params.seed, 1))
        self.settings, self.pairs = settings, pairs
        self.words, self.first = pairs.table, pairs.starts[settings.data.index(self.data)]
        adapted = adapted_by(load_adapter(self.run.pretrained(adapter), "last"), self.images.tokens)
        self.nearest = replace(_nearest(params, adapter, self.data, self.images, self.names, adapted), threads=1)

    def measure(self, name: str, seed: int, beside: Path) -> dict[str, Any]:
        """Fine-tune and measure one variant."""
        variant = VARIANTS[name]
        rates = {key: getattr(self.recipe, key) * variant.rate for key in ("lr", "adapter_lr")}
        settings = self.recipe.model_copy(update={"hints": variant.hints, **rates})
        named = self.named if variant.hints else None
        examples = Examples(self.images, self.data, self.task, settings, seed, named)
        if variant.unseen:
            examples.images = self.unseen  # type: ignore[assignment]  # of which no more is asked
        torch.manual_seed(seed)
        llm = load_llm(self.params.llm, self.params.runtime.device)
        lora = add_lora(llm, LoRA(modules=list(variant.modules))) if variant.trains else None
        adapter = Altered(load_adapter(self.run.pretrained(self.adapter), "last"), variant, self.words)
        model = Model(adapter, llm)  # type: ignore[arg-type]  # an adapter in all that is asked of it here
        model.smoothing, model.pictures_first, model.names = variant.smoothing, variant.pictures_first, self.names
        model.head = nn.Linear(llm.width, len(self.names), device=model.device) if variant.head else None
        found: dict[str, Any] = {"variant": name, "seed": seed, "batch": settings.batch, "steps": 0, "seconds": 0.0}
        found |= {"lr": settings.lr, "adapter_lr": settings.adapter_lr}
        if lora is not None:
            decides = json.dumps([asdict(variant), settings.model_dump(), seed], default=str)
            key = hashlib.sha256(decides.encode()).hexdigest()
            checkpoint = Checkpoint(beside.with_suffix(f".{key[:12]}.pt"), key)
            found |= self._train(name, variant, model, lora, examples, settings, seed, checkpoint)
            checkpoint.remove()
        return found | self._figures(model.eval(), examples, variant)

    @functools.cached_property
    def unseen(self) -> Unseen:
        """Training pictures as adapters give them that were pre-trained without them, each without a half."""
        train = labelled(self.images, "train")
        series, adapted = series_of(self.images), dict[int, Tensor]()
        fold = deal(numbers(self.images, train, self.names), [series[i] for i in train], 2)
        for one in range(2):
            hidden = [position for position, own in zip(train, fold, strict=True) if own == one]
            adapter = self._pretrained_without({self.first + position for position in hidden})
            tokens = many(lambda some: some, adapted_by(adapter, self.images.tokens), hidden)
            adapted |= dict(zip(hidden, tokens, strict=True))
        return Unseen(self.images, adapted)

    def _pretrained_without(self, hidden: set[int]) -> Adapter:
        kept = [position for position in self.pairs.train if position not in hidden]
        objective = EMD(self.objective.settings, replace(self.pairs, train=kept), Means(self.params.seed, 1))
        sample = self.pairs.tokens(kept[: self.settings.batch])
        torch.manual_seed(self.params.seed)
        architecture = self.params.adapter(self.adapter).architecture
        kind = self.params.kind_of(self.adapter)
        adapter = build_adapter(kind, sample.shape[2], self.words.shape[1], **architecture).eval()
        objective.initialise(adapter, sample)
        trainer = _trainer(self.params, self.adapter, self.settings, objective, adapter, {})
        trainer.checkpoint.path = trainer.checkpoint.path.with_stem(f"unseen-{hash(frozenset(hidden)) & 0xFFFF:04x}")
        trainer.run()
        trainer.checkpoint.remove()
        return adapter.eval()

    def _train(
        self, name: str, variant: Variant, model: Model, lora: Any, examples: Examples, settings: Recipe, seed: int,
        checkpoint: Checkpoint,
    ) -> dict[str, Any]:  # fmt: skip
        validating = 0.0

        def loss(number: int) -> Started:
            model.adapter.requires_grad_(number // settings.accumulate >= variant.frozen * self.steps)
            batch = batch_at(number, settings.batch, len(examples.train), seed)
            tokens, prompt, answers, hints = examples.draw(batch)
            total, count = self.task.loss(model, tokens, prompt, answers, hints)
            if not variant.emd:
                return Started(lambda: total / count)
            places = [self.first + examples.train[i] for i in batch]
            return self.objective.start(model._adapted(tokens), places).then(
                lambda other: total / count + variant.emd * other
            )

        def validate(step: int) -> dict[str, float]:
            nonlocal validating
            began = time.process_time()
            value = examples.mean_loss(model, settings.batch)
            validating += time.process_time() - began
            return {"val_loss": value}

        parts = [(model.adapter, settings.adapter_lr), (lora, settings.lr)]
        if model.head is not None:
            parts.append((model.head, settings.lr))
        groups = [{"params": [p for p in part.parameters() if p.requires_grad], "lr": rate} for part, rate in parts]
        trainer = Trainer(
            name=name, model=model, groups=[group for group in groups if group["params"]], settings=settings,
            examples=len(examples.train), seed=seed, loss=loss, validate=validate, validate_at=set(),
            checkpoint=checkpoint,
        )  # fmt: skip
        began = time.process_time()
        first, last = (row := trainer.run())[0], row[-1]
        return {
            "steps": int(last["step"]), "seconds": time.process_time() - began - validating,
            "train_loss": last["train_loss"], "val_loss": [first["val_loss"], last["val_loss"]],
        }  # fmt: skip

    def _figures(self, model: Model, examples: Examples, variant: Variant) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for split, positions in self.asked.items():
            hints = examples.hints and [examples.hints[i] for i in positions]
            ask = (self.images, positions, self.task.prompt)
            if model.head is not None:
                states = model.states(*ask, self.params.evaluate.batch, hints).to(model.device)
                best = model.head(states).argmax(1).tolist()
                found[f"said/{split}"] = self._right(positions, [self.names[i] for i in best])
                continue
            outputs = model.answers(*ask, self.task.max_tokens, self.params.evaluate.batch, hints)
            said = [find_class(output, self.names) for output in outputs]
            listed = [self.named.candidates(self.images.ids[i], KEPT) for i in positions]
            best = model.ranks(*ask, listed, self.params.evaluate.batch, hints).argmax(1).tolist()
            found[f"said/{split}"] = self._right(positions, said)
            found[f"valid/{split}"] = sum(name is not None for name in said) / len(said)
            found[f"ranked/{split}"] = self._right(positions, [row[i] for row, i in zip(listed, best, strict=True)])
            found[f"examples/{split}"] = outputs[:8]
        if variant.pictures:
            found |= self._emd(model.adapter, model.device)
        if variant.probed:
            found["state/val"] = self._probe(model)
        return found

    def _emd(self, adapter: Adapter, device: torch.device) -> dict[str, float]:
        """How often the adapter's tokens are nearest the right name, and by how much they are nearer it than the next
        one (the median, in units of the EMD, debiased)."""
        found: dict[str, float] = {}
        adapted = adapted_by(adapter, lambda some: self.images.tokens(some, device))
        nearest = self.nearest.debiased(adapted, self.reference)
        for split, positions in {"val": self.val, "train": self.asked["train"]}.items():
            scores = many(nearest.scores, adapted, positions)
            own = torch.tensor(numbers(self.images, positions, self.names))[:, None]
            margins = scores.gather(1, own) - scores.scatter(1, own, -torch.inf).amax(1, keepdim=True)
            found |= {f"emd/{split}": (margins > 0).float().mean().item(), f"margin/{split}": margins.median().item()}
        return found

    def _right(self, positions: list[int], said: Sequence[str | None]) -> float:
        labels = self.images.rows["label"].iloc[positions]
        return sum(label == one for label, one in zip(labels, said, strict=True)) / len(positions)

    def _probe(self, model: Model) -> float:
        fitted, held_out = (
            model.states(self.images, some, self.task.prompt, self.params.evaluate.batch)
            for some in (self.probed, self.val)
        )
        labels = self.images.rows["label"].to_numpy()
        return regression(fitted, labels[self.probed]).score(held_out.numpy(), labels[self.val])

    def plain(self) -> dict[str, float]:
        """What needs no LLM: validation pictures right by the namer's parts, and logistic regression on mean tokens."""
        found = self._emd(load_adapter(self.run.pretrained(self.adapter), "last"), torch.device("cpu"))
        for key, positions in {"val": self.val, "asked": self.asked["val"]}.items():
            for rule in ("emd", "discriminant", "namer"):
                best = self.named.log_probabilities(rule, [self.images.ids[i] for i in positions]).argmax(1).tolist()
                found[f"{rule} of {key}"] = self._right(positions, [self.names[i] for i in best])
        train = labelled(self.images, "train")
        labels = self.images.rows["label"].to_numpy()
        held_out = self._means(self.val).numpy()
        for key, some in {f"mean token, {PROBED}": self.probed, "mean token, all": train}.items():
            model = regression(self._means(some), labels[some])
            found[key] = model.score(held_out, labels[self.val])
        hints = [self.named.candidates(self.images.ids[i], 1)[0] for i in train]
        found["first hint of train"] = self._right(train, hints)
        return found

    def _means(self, positions: list[int]) -> Tensor:
        return torch.cat([self.images.tokens(positions[at : at + 256]).mean(1) for at in range(0, len(positions), 256)])


def regression(features: Tensor, labels: Any) -> Any:
    """Logistic regression on standardised features, as the linear probe of `evaluate` has it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(features.numpy(), labels)


def spread(positions: list[int], count: int) -> list[int]:
    """At most `count` of some positions, evenly spread."""
    count = min(count, len(positions))
    return [positions[i * len(positions) // count] for i in range(count)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a variant, means over the seeds."""
    shown: dict[str, Callable[[pd.DataFrame], str]] = {
        "steps": lambda some: f"{some['steps'].max():.0f} x {some['batch'].max():.0f}",
        "s": lambda some: f"{some['seconds'].mean():.0f}",
    }
    shown |= {head: functools.partial(percent, key) for head, key in FIGURES.items()}
    lines = ["| " + " | ".join(["fine-tuning", "runs", *shown]) + " |", "|---" * (len(shown) + 2) + "|"]
    found = pd.DataFrame(rows)
    for name in [name for name in VARIANTS if (found["variant"] == name).any()]:
        some = found[found["variant"] == name]
        lines.append("| " + " | ".join([name, str(len(some)), *(cell(some) for cell in shown.values())]) + " |")
    return "\n".join(lines)


def percent(key: str, rows: pd.DataFrame) -> str:
    values = rows[key].dropna() if key in rows else rows["seed"][:0]
    if values.empty:
        return "-"
    return f"{100 * values.mean():.1f}" + (f" ± {100 * values.std():.1f}" if len(values) > 1 else "")


def keep(row: dict[str, Any], out: Path) -> None:
    print(json.dumps(row), flush=True)
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17])
    parser.add_argument("--adapter", default="mlp")
    parser.add_argument("--recipe", default="classes")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    out = options.out.absolute()
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if not options.table:
        os.chdir(options.project)
        bench = Bench(load_params(), options.adapter, options.recipe, options.steps, options.images)
        if not any(row["variant"] == PLAIN for row in rows):
            rows.append({"variant": PLAIN, "seed": 0, **bench.plain()})
            keep(rows[-1], out)
        for name, seed in [(name, seed) for name in options.only for seed in options.seeds]:
            if any((row["variant"], row["seed"]) == (name, seed) for row in rows):
                continue
            rows.append(bench.measure(name, seed, out))
            keep(rows[-1], out)
    print(table(rows))


if __name__ == "__main__":
    main()
