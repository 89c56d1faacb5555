"""Fine-tuning: adapter and LoRA together on next-token cross-entropy, from cached image tokens (QLoRA with nf4)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.adapters import Adapter, build_adapter, load_adapter
from pipeline.config.params import AdapterName, Dataset, FinetuneTask, Params
from pipeline.devices import fast_products
from pipeline.errors import UserError
from pipeline.llms.load import load_llm
from pipeline.store.reader import ImageTokens
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import Trainer, total_steps, write_history
from pipeline.training.origin import Origin, Words, check_llm, check_tokens
from pipeline.vlm import VLM, add_lora


class Examples:
    """Images with the prompts and answers of a task."""

    def __init__(self, images: ImageTokens, data: Dataset, settings: FinetuneTask, seed: int):
        self.images, self.prompts = images, settings.prompts
        column = images.rows["captions"] if data == "captions" else images.rows["label"].map(lambda label: [label])
        self.answers: list[list[str]] = [[text for text in texts if text and text.strip()] for texts in column]
        self.train, val = self._answered("train"), self._answered("val")
        unanswered = [images.ids[i] for i, texts in enumerate(self.answers) if not texts]
        if unanswered:
            names = f"{', '.join(unanswered[:3])}{', ...' if len(unanswered) > 3 else ''}"
            print(f"{data}: {len(unanswered)} pictures have no words and are left out: {names}", file=sys.stderr)
        if not self.train or not val:
            raise UserError(
                f"{data}: {len(self.train)} train and {len(val)} val pictures with words; both are needed: add pictures"
            )
        order = torch.randperm(len(val), generator=torch.Generator().manual_seed(seed)).tolist()
        self.val = [val[i] for i in order[: settings.validation_images]]

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

    def draw(self, batch: list[int]) -> tuple[Tensor, str, list[str]]:
        """Training images, a random prompt for all, and a random answer for each; random by torch's own state."""
        positions = [self.train[i] for i in batch]
        prompt = self.prompts[int(torch.randint(len(self.prompts), ()))]
        answers = [self.answers[p][int(torch.randint(len(self.answers[p]), ()))] for p in positions]
        return self.images.tokens(positions), prompt, answers

    def fixed(self, positions: list[int]) -> tuple[Tensor, str, list[str]]:
        """The same images with the first prompt and the first answer."""
        answers = [self.answers[position][0] for position in positions]
        return self.images.tokens(positions), self.prompts[0], answers


def finetune(params: Params, name: AdapterName, data: Dataset, pretrained: Path | None, out: Path) -> None:
    """Fine-tune an adapter with a fresh LoRA on one data set and write weights, history and metrics to `out`.

    Starts from the pre-trained adapter in `pretrained`, or from scratch when that is None.
    """
    base = Path("data") / params.profile
    settings = params.finetune_for(name, data)
    if pretrained:
        check_tokens(pretrained, base, data)
    images = ImageTokens.open(base, data)
    examples = Examples(images, data, settings, params.seed)
    torch.manual_seed(params.seed)
    fast_products()
    llm = load_llm(params.llm, params.runtime.device)
    embedding = llm.network.get_input_embeddings()
    if pretrained:
        check_llm(pretrained, embedding)
    lora = add_lora(llm, params.finetune.lora)
    architecture = params.adapters[name].architecture
    adapter = (
        load_adapter(pretrained, "last")
        if pretrained
        else build_adapter(name, images.shape[1], llm.width, **architecture)
    )
    _check_fit(adapter, images.shape[1], llm.width)
    model = VLM(adapter, llm)
    if params.runtime.activations == "recompute":
        model.recompute_activations()
    _leave_room(model, examples, name)
    examples.warn_of_cuts(model)
    files = [base / "images" / data / "manifest.json", base / "prepare" / f"{data}.parquet"]
    files += [pretrained / "last.safetensors"] if pretrained else []
    decides = [params.seed, settings.model_dump(), params.finetune.lora, params.llm, architecture]
    checkpoint = Checkpoint.of(base, "-".join(out.parts[-2:]), decides, files, __name__)
    trainer = _trainer(model, lora, examples, settings, params.seed, checkpoint)
    trainer.name = f"{'fine-tune' if pretrained else 'from scratch'} {name} on {data}"
    history = trainer.run()
    _write(out, adapter, lora, trainer)
    start = pretrained / "last.safetensors" if pretrained else None
    Origin.of(base, data, Words.of_module(embedding), params.llm, start).write(out)
    print(f"{trainer.name}: validation loss {history[0]['val_loss']:.3f} -> {history[-1]['val_loss']:.3f}")
    trainer.checkpoint.remove()


def _check_fit(adapter: Adapter, d_in: int, d_out: int) -> None:
    if (adapter.config["d_in"], adapter.config["d_out"]) != (d_in, d_out):
        raise UserError(
            f"the pre-trained adapter maps {adapter.config['d_in']} to {adapter.config['d_out']}, but the image tokens "
            f"and the LLM need {d_in} to {d_out}; run `dvc repro`"
        )


@torch.no_grad()
def _leave_room(model: VLM, examples: Examples, name: AdapterName) -> None:
    """Let answers be as long as the LLM's context allows after prompt and image tokens."""
    model.eval()  # dropout would draw random numbers, and so change the run
    count = model.adapter(examples.images.tokens(examples.train[:1]).to(model.device)).shape[1]
    rooms = [room for prompt in examples.prompts if (room := model.room(prompt, count)) is not None]
    room = min(rooms, default=model.max_answer_tokens)
    if room < 2:
        raise UserError(
            f"{count} image tokens of {name} and the prompt fill the LLM's context of {model.context} tokens; "
            f"set adapters.{name}.architecture to give fewer, shorten finetune.*.prompts, or take another llm.model"
        )
    model.max_answer_tokens = min(model.max_answer_tokens, room)


def _trainer(
    model: VLM, lora: Any, examples: Examples, settings: FinetuneTask, seed: int, checkpoint: Checkpoint
) -> Trainer:
    def loss(batch: list[int]) -> Callable[[], Tensor]:
        total, count = model.loss(*examples.draw(batch))
        return lambda: total / count

    def validate(step: int) -> dict[str, float]:
        size = 2 * settings.batch  # no gradients are kept, so twice as many fit
        parts = [examples.val[i : i + size] for i in range(0, len(examples.val), size)]
        sums = [model.loss(*examples.fixed(part)) for part in parts]
        return {"val_loss": sum(total.item() for total, _ in sums) / sum(count for _, count in sums)}

    total = total_steps(settings, len(examples.train))
    points = {max(1, round(total * i / settings.validations)) for i in range(1, settings.validations + 1)}
    groups = [
        {"params": list(model.adapter.parameters()), "lr": settings.adapter_lr},
        {"params": [p for p in lora.parameters() if p.requires_grad], "lr": settings.lr},
    ]
    return Trainer(
        name="", model=model, groups=groups, settings=settings, examples=len(examples.train), seed=seed,
        loss=loss, validate=validate, validate_at=points, checkpoint=checkpoint,
    )  # fmt: skip


def _write(out: Path, adapter: Adapter, lora: Any, trainer: Trainer) -> None:
    adapter.save(out, "adapter")
    config = lora.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set: another order in every process
    lora.save_pretrained(out / "lora")
    write_history(out / "history.csv", trainer.history)
    trained, everything = lora.get_nb_trainable_parameters()
    metrics = {
        "val_loss": trainer.history[-1]["val_loss"],
        "steps": int(trainer.history[-1]["step"]),
        "parameters_adapter": sum(p.numel() for p in adapter.parameters()),
        "parameters_lora": trained,
        "lora_percent": 100 * trained / everything,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
