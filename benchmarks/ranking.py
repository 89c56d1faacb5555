"""How fast are names ranked? Images/s of generating a name, and of ranking names by log-likelihood, side by side.

    python benchmarks/ranking.py --project FOLDER [--data classes] [--images 32] [--batches 1 8 32] [--steps 24]

FOLDER is a project whose pictures are extracted; nothing is written there but data/models. An mlp adapter and a LoRA
are fine-tuned for a few steps first, since how long answers are, and how many names can still be the best, depends on a
model that knows the names. Each way names the same test pictures with the same weights and number type:
    floor      the pass over the prompt and the picture alone, which every way needs; the mask of a plain prompt
    generate   greedy, up to evaluate.class_tokens
    all        all names in one pass
    likeliest  ten names of each picture's own in one pass: the right one and nine others
    best       the best of all names, by `rank(top=1)`, which reads only those that can still be it
On a CPU a second is one of CPU time of this process, all threads together, so that others on the machine count little.
At most eight batches are measured.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.adapters.module import build_adapter
from pipeline.config import load_params
from pipeline.config.schema import LoRA
from pipeline.llms.load import load_llm
from pipeline.naming.classes import class_names, labelled
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens
from pipeline.vlm import VLM, add_lora

TRAINED_AT_ONCE, LIKELIEST = 8, 10


def taught(model: VLM, images: ImageTokens, prompt: str, steps: int) -> VLM:
    """The model after a few steps of fine-tuning on training pictures."""
    train = labelled(images, "train")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.002)
    for step in range(steps):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(step))[:TRAINED_AT_ONCE]
        rows = [train[i] for i in order]
        total, count = model.loss(images.tokens(rows), prompt, list(images.rows["label"].iloc[rows]))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"fine-tuning step {step + 1}: loss {total.item() / count:.2f}", flush=True)
    return model.eval()


class Ways:
    """The ways of naming some pictures; each takes the places of a batch among them."""

    def __init__(self, model: VLM, tokens: Tensor, prompt: str, names: list[str], labels: list[str], length: int):
        self.model, self.tokens, self.prompt, self.names, self.length = model, tokens, prompt, names, length
        draw = torch.Generator().manual_seed(0)
        others = [[names[i] for i in torch.randperm(len(names), generator=draw)] for _ in labels]
        self.likeliest = [
            [label, *(name for name in some if name != label)][:LIKELIEST]
            for label, some in zip(labels, others, strict=True)
        ]

    @torch.no_grad()
    def floor(self, part: slice) -> None:
        before, after = self.model.prompt(self.prompt)
        tokens = self.tokens[part]
        inputs, mask, cache = self.model._splice(tokens, before, [after] * len(tokens))
        done = cache.get_seq_length() if cache is not None else 0
        self.model.network(
            inputs_embeds=inputs[:, done:], attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1
        )

    def generate(self, part: slice) -> list[str]:
        return self.model.generate(self.tokens[part], self.prompt, self.length)

    def all(self, part: slice) -> list[str]:
        return self._named(self.model.rank(self.tokens[part], self.prompt, self.names))

    def likeliest_ten(self, part: slice) -> None:
        self.model.rank(self.tokens[part], self.prompt, self.likeliest[part])

    def best(self, part: slice) -> list[str]:
        return self._named(self.model.rank(self.tokens[part], self.prompt, self.names, top=1))

    def _named(self, scores: Tensor) -> list[str]:
        return [self.names[i] for i in scores.argmax(1).tolist()]


def measure(ways: list[Callable[[slice], list[str] | None]], count: int, batch: int) -> dict[str, tuple[float, list]]:
    """By name of a way: images/s, and the names given. The ways take turns, a batch each."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    found: dict[str, tuple[float, list]] = {way.__name__: (0.0, []) for way in ways}
    for way in ways:
        way(slice(0, batch))
    for start in range(0, count, batch):
        for way in ways:
            began, (spent, names) = clock(), found[way.__name__]
            names += way(slice(start, min(start + batch, count))) or []
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[way.__name__] = spent + clock() - began, names
    return {name: (count / spent, names) for name, (spent, names) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", required=True)
    parser.add_argument("--data", default="classes")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    os.chdir(options.project)
    params = load_params()
    images = ImageTokens.open(Run(params.profile), options.data)
    names, prompt = class_names(images), params.evaluate.class_prompt
    torch.manual_seed(0)
    llm = load_llm(params.llm, params.runtime.device)
    add_lora(llm, LoRA(modules=["q_proj", "v_proj"]))
    model = VLM(build_adapter("mlp", images.shape[-1], llm.width, pool=3), llm)
    print(f"{model.device}, {llm.network.dtype}, {torch.get_num_threads()} threads, {len(names)} names", flush=True)
    taught(model, images, prompt, options.steps)
    rows = labelled(images, "test")
    rows = rows[:: max(1, len(rows) // options.images)][: options.images]
    labels = list(images.rows["label"].iloc[rows])
    ways = Ways(model, images.tokens(rows, model.device), prompt, names, labels, params.evaluate.class_tokens)
    each = [ways.floor, ways.generate, ways.all, ways.likeliest_ten, ways.best]
    for batch in options.batches:
        count = min(len(rows), 8 * batch)
        found = measure(each, count, batch)
        for name, (speed, given) in found.items():
            right = f", {sum(map(str.__eq__, given, labels))} of {count} right" if given else ""
            print(
                f"batch {batch}, {name}: {speed:.2f} images/s, {speed / found['generate'][0]:.2f} x generated, "
                f"{found['floor'][0] / speed:.2f} x the time of the floor{right}", flush=True,
            )  # fmt: skip
        print(
            f"batch {batch}: best and all agree in {sum(map(str.__eq__, found['best'][1], found['all'][1]))} of {count}"
        )


if __name__ == "__main__":
    main()
