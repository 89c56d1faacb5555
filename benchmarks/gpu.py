"""Every stage at the thesis's size on a GPU, on pictures and weights made here; see gpu.sh, which calls this."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
# fmt: off
WORDS = [
    "a", "the", "red", "green", "small", "dog", "cat", "table", "bus", "man", "woman",
    "plays", "holds", "stands", "on", "beside", "under", "street", "ball", "kite", "train",
]
# fmt: on
CHAT = "{{ bos_token }}{% for m in messages %} [INST] {{ m['content'] }} [/INST]{% endfor %}"
COCO = 118_287  # images of train2017


def line(what: str, value: str, before: str = "") -> None:
    print(f"{what:<58}{value:<34}{before and f'before: {before}'}", flush=True)


@contextmanager
def seconds(found: list[float]) -> Iterator[None]:
    wait()
    began = time.perf_counter()
    yield
    wait()
    found.append(time.perf_counter() - began)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    found: list[float] = []
    with seconds(found):
        work()
    return found[0]


def peak(work: Callable[[], object]) -> float:
    """GiB of GPU memory that some work takes at most, with what is there already."""
    if not torch.cuda.is_available():
        work()
        return float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    wait()
    return torch.cuda.max_memory_allocated() / 2**30


class Bench:
    """The steps, in order; each prints its lines. `tiny`: sizes for a CPU, to see that all of it runs."""

    def __init__(self, tiny: bool):
        from pipeline.config import load_params
        from pipeline.runs import Run

        self.tiny = tiny
        self.pictures, self.labelled = (40, 40) if tiny else (4096, 512)
        values = yaml.safe_load((HERE / "profiles/thesis.yaml").read_text(encoding="utf-8"))
        values["data"]["captions"] |= {"root": "coco", "captions": "captions.json", "images": "images"}
        values["data"]["classes"] |= {"root": "food", "source": "imagefolder"}
        values["vision"] |= {"pretrained": "random"}
        values["llm"] |= {"model": "llm", "revision": None}
        values["cache"]["shards"] = 4
        values["run"] |= {"adapters": ["mlp"], "scratch": ["mlp"]}
        values["pretrain"] |= {"epochs": 1, "validation_images": 64, "candidates": 32}
        for recipe in values["finetune"]["recipes"].values():
            recipe |= {"max_steps": 4, "validations": 1, "validation_images": 16}
        # Those of packages that a bare machine has.
        values["evaluate"] |= {"captions": 96, "metrics": ["accuracy", "probe", "things"]}
        values["pca"] |= {"images": 24}
        if tiny:
            values["vision"] |= {"encoder": "timm", "model": "test_resnet", "batch": 4, "dtype": "float32"}
            values["llm"] |= {"quantization": "none", "dtype": "float32"}
            values["pretrain"] |= {"batch": 4, "max_steps": 2, "validation_images": 4, "candidates": 3}
            values["evaluate"] |= {"captions": 2, "caption_tokens": 3, "class_tokens": 2}
            values["pca"] |= {"images": 3, "vocabulary": 50}
            values["runtime"] |= {"device": "cpu", "decode_threads": 2, "emd_threads": 2}
        else:
            values["runtime"] |= {"decode_threads": os.cpu_count(), "emd_threads": max(1, (os.cpu_count() or 1) // 2)}
        Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        self.params = load_params()
        self.run = Run.of(self.params)

    def make(self) -> None:
        """Pictures like photos (smooth, with edges), 640 x 480, and captions; a Mistral-7B of random weights."""
        line("made: JPEGs, captions, weights", f"{timed(self._pictures):.0f} s, {timed(self._llm):.0f} s")

    def _pictures(self) -> None:
        rng = np.random.default_rng(0)
        size = (64, 48) if self.tiny else (640, 480)
        kinds = [rng.integers(256, size=(12, 16, 3), dtype=np.uint8) for _ in range(64)]

        def write(number: int) -> None:  # those of the classes come after the others: no two are the same
            picture = Image.fromarray(kinds[number % 64]).resize(size, Image.Resampling.BICUBIC)
            picture.paste((number % 256, number // 256, 99), (9, 9, size[0] // 4 + number % 7, size[1] // 3))
            folder = "coco/images" if number < self.pictures else f"food/class {number % 4}"
            picture.save(f"{folder}/{number:06d}.jpg", quality=90)

        for folder in ("coco/images", *(f"food/class {i}" for i in range(4))):
            Path(folder).mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, range(self.pictures + self.labelled)))
        images = [{"id": i, "file_name": f"{i:06d}.jpg"} for i in range(self.pictures)]
        captions = [
            {"id": 5 * i + j, "image_id": i, "caption": " ".join(rng.choice(WORDS, rng.integers(8, 15)))}
            for i in range(self.pictures)
            for j in range(5)
        ]
        Path("coco/captions.json").write_text(json.dumps({"images": images, "annotations": captions}))

    def _llm(self) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
        tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.chat_template = CHAT
        fast.save_pretrained("llm")
        tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        size = {**tiny, "num_key_value_heads": 2, "vocab_size": 400} if self.tiny else {"sliding_window": None}
        with torch.device(self.device):
            torch.set_default_dtype(torch.float32 if self.tiny else torch.bfloat16)
            network = MistralForCausalLM(MistralConfig(bos_token_id=0, eos_token_id=1, **size))
            torch.set_default_dtype(torch.float32)
        network.save_pretrained("llm")

    @property
    def device(self) -> torch.device:
        from pipeline.devices import pick_device

        return pick_device(self.params.runtime.device)

    def extraction(self) -> None:
        """Stages prepare, extract_captions and extract_images, the last with each decoder and nothing in the store."""
        from benchmarks.extraction import decoders_here, distance
        from pipeline.encoders.vision import load_vision_encoder
        from pipeline.extraction.captions import extract_captions
        from pipeline.extraction.images import ImageShards, extract_images
        from pipeline.llms.load import load_embedding, load_tokenizer
        from pipeline.media.decoding import Decoder
        from pipeline.sources import manifest
        from pipeline.sources.prepare import prepare
        from pipeline.store.inventory import timings

        words = load_tokenizer(self.params.llm), load_embedding(self.params.llm)
        for data in ("captions", "classes"):
            to = self.run.manifest(data)
            spent = timed(lambda data=data, to=to: manifest.write(prepare(self.params, data), to))
            line(f"prepare {data}", f"{spent:.1f} s")
            extract_captions(self.params, data, *words, lambda n: None).write(self.run.features("text", data))
        torch.manual_seed(0)
        encoder = load_vision_encoder(self.params.vision, self.params.runtime.device)
        decoders, by_pil = decoders_here(encoder), Decoder(encoder.preprocess)
        contents = [path.read_bytes() for path in sorted(Path("coco/images").iterdir())[:64]]
        pixels = by_pil.batch([by_pil.load(content) for content in contents], 64)
        stored = torch.zeros(2**22 if self.tiny else 2**28, dtype=torch.uint8).numpy()
        spent = timed(lambda: hashlib.sha256(stored.data).digest())
        line("SHA-256, which every stored byte goes through", f"{len(stored) / spent / 1e9:.2f} GB/s")
        for name, decoder in decoders.items():
            vision = self.params.vision.model_copy(update={"decoder": name})
            params = self.params.model_copy(update={"vision": vision})
            for data, count in (("classes", self.labelled), ("captions", self.pictures)):
                began = time.perf_counter()
                extract_images(params, data, encoder, lambda n: None).write(self.run.features("images", data))
                spent = time.perf_counter() - began
                line(f"extract_images {data}, decoder {name}", f"{count / spent:.0f} images/s", "349 images/s")
                took = timings("images", ImageShards(params, data, encoder).fingerprint)
                print(f"    seconds of all threads, since the first: {dict(took)}", flush=True)
            found = decoder.batch([decoder.load(content) for content in contents], 64).cpu()
            print(f"    {name} and PIL: {distance(encoder, found, pixels)}", flush=True)

    def solver(self) -> None:
        """Plans alone, thesis's shapes, on as many threads as pre-training may have them found on."""
        from benchmarks.emd import batch, costs_of, plans

        data = batch(4 if self.tiny else 64, 255, 5, (8, 20), 64)
        (costs, _), pairs = costs_of(data), len(data[3])
        one = 0.0
        for threads in (1, 8, 16):
            plans(costs, data, threads=threads)
            spent = min(timed(lambda t=threads: plans(costs, data, threads=t)) for _ in range(2 if self.tiny else 12))
            one = one or spent
            before = {1: "13,470", 8: "27,930", 16: "17,619"}[threads]
            line(
                f"solver, {pairs} pairs a batch, {threads} threads",
                f"{pairs / spent:,.0f} pairs/s, {one / spent:.1f} x one",
                before,
            )

    def objective(self) -> Any:
        from pipeline.objectives.base import Means
        from pipeline.objectives.emd import EMD
        from pipeline.objectives.pairs import Pairs

        settings = self.params.pretrain_for("mlp")
        means = Means(self.params.seed, self.params.runtime.emd_threads)
        return EMD(settings.objective, Pairs.open(self.params, settings), means)

    def constant_set(self) -> None:
        from pipeline.objectives.constant_set import fit_constant_set

        objective = self.objective()
        fit_constant_set(objective, 1)  # compiles
        spent = timed(lambda: fit_constant_set(objective, 1)), timed(lambda: fit_constant_set(objective, 255))
        line("constant token; constant set of 255", f"{spent[0]:.1f} s; {spent[1]:.1f} s", "19.5 s")

    def pretraining(self) -> None:
        """The whole stage, then its steps alone, as the profile has it and with the adapter alone."""
        from benchmarks.emd import Flight
        from pipeline.training.pretrain import pretrain

        line(
            "pretrain mlp, the stage, one epoch of these pictures",
            f"{timed(lambda: pretrain(self.params, 'mlp')):.1f} s",
            "30.9 s",
        )
        settings = self.params.pretrain_for("mlp")
        objective = self.objective()
        pairs = objective.pairs
        tokens = pairs.tokens(pairs.train[: settings.batch])
        widths = tokens.shape[2], pairs.table.shape[1]
        side = Flight(objective, settings, "mlp", widths, objective.in_flight, len(pairs.train))
        for _ in range(2 if self.tiny else 4):
            side.fly(2 if self.tiny else 12)
        spent, idle = min(side.turns[1:])
        what = f"micro-batches of {settings.batch} x {settings.accumulate}"
        line(
            f"pretrain mlp, steps, {what}",
            f"{1 / spent:,.0f} images/s, COCO epoch {COCO * spent:.0f} s",
            "304, as the profile had it; 1,319, 90 s",
        )
        line("    of it without work for want of plans", f"{idle / spent:.1%}")
        adapter, optimizer = side.adapter, side.optimizer

        def alone() -> None:
            for _ in range(4 if self.tiny else 20):
                adapter(tokens).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

        alone()
        spent = timed(alone) / (4 if self.tiny else 20) / len(tokens)
        line("    the adapter alone, a step each micro-batch", f"{1 / spent:,.0f} images/s", "4,935")

    def language_model(self) -> None:
        """Fine-tuning steps, then cross-entropy through the frozen LLM."""
        from pipeline.adapters.module import build_adapter
        from pipeline.config.schema import LoRA
        from pipeline.devices import fast_products
        from pipeline.llms.load import load_llm
        from pipeline.store.reader import ImageTokens
        from pipeline.vlm import VLM, add_lora

        fast_products()
        images = ImageTokens.open(self.run, "captions")
        loaded: list[Any] = []
        line(
            "load_llm",
            f"{timed(lambda: loaded.append(load_llm(self.params.llm, self.params.runtime.device))):.1f} s",
            "4.7 s",
        )
        llm = loaded[0]
        answer = "a red dog stands beside a green table on the street"
        adapter = build_adapter("mlp", images.shape[1], llm.width)

        def step(model: VLM, size: int) -> None:
            total, count = model.loss(images.tokens(list(range(size))), "Describe this image", [answer] * size)
            (total / count).backward()

        def measure(model: VLM, size: int, what: str, before: str) -> None:
            step(model, size)
            spent = min(timed(lambda: step(model, size)) for _ in range(2 if self.tiny else 4))
            line(
                what,
                f"{spent:.2f} s a step, {peak(lambda: step(model, size)):.1f} GiB, {size / spent:.1f} images/s",
                before,
            )
            model.zero_grad(set_to_none=True)

        frozen = VLM(adapter, llm).train()
        for size, before in ((8, "18.7 images/s"), (32, "42.7 images/s")):
            measure(frozen, 2 if self.tiny else size, f"cross-entropy through the frozen LLM, batch {size}", before)
        add_lora(llm, LoRA())
        model = VLM(adapter, llm).train()
        sizes = (2,) if self.tiny else (8, 16)
        for size in sizes:
            measure(
                model,
                size,
                f"fine-tune mlp, activations kept, batch {size}",
                {8: "0.44 s, 19.1 GB"}.get(size, "0.64 s, 33.4 GB"),
            )
        model.recompute_activations()
        for size in (*sizes, *(() if self.tiny else (64,))):
            measure(
                model,
                size,
                f"fine-tune mlp, activations recomputed, batch {size}",
                {16: "0.51 s, 7.5 GB", 64: "15.9 GB"}.get(size, ""),
            )

    def evaluation(self) -> None:
        """Stages finetune (a few steps), evaluate and pca."""
        from pipeline.alignment import pca
        from pipeline.metrics.evaluate import evaluate
        from pipeline.training.finetune import finetune

        for recipe in self.params.run.recipes:
            spent = timed(lambda recipe=recipe: finetune(self.params, "mlp", recipe))
            line(f"finetune mlp {recipe}, the stage, 4 steps", f"{spent:.1f} s")
        spent = sum(timed(lambda r=recipe: evaluate(self.params, "mlp", r)) for recipe in self.params.run.recipes)
        line("evaluate, the stages: names, and captions twice", f"{spent:.1f} s", "58 s for 196 pictures")
        line(f"pca, {self.params.pca.images} pictures", f"{timed(lambda: pca(self.params, 'mlp')):.1f} s", "49 s")

    def answers(self) -> None:
        from pipeline.store.reader import ImageTokens
        from pipeline.vlm import load_vlm

        settings = self.params.evaluate
        for data, tokens, before in (
            ("classes", settings.class_tokens, "54 at batch 100"),
            ("captions", settings.caption_tokens, "2.6 to 2.9"),
        ):
            images = ImageTokens.open(self.run, data)
            folder = self.run.finetuned("mlp", data)
            model = load_vlm(self.params.llm, folder, "adapter", self.params.runtime.device)
            some = list(range(min(len(images), 4 if self.tiny else settings.batch)))
            model.answers(images, some[:2], "Describe", 2, 2)
            spent = timed(
                lambda m=model, i=images, s=some, t=tokens: m.answers(i, s, "Describe the image: ", t, settings.batch)
            )
            line(f"answers, {data}, {tokens} tokens, batch {len(some)}", f"{len(some) / spent:.1f} images/s", before)
            if data == "classes":
                self.ranks(model, images, some, len(some) / spent)
            del model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def ranks(self, model: Any, images: Any, some: list[int], generated: float) -> None:
        """The names of 81 classes, ranked; against `generated` images/s."""
        rng, batch = np.random.default_rng(0), self.params.evaluate.batch
        names = sorted({" ".join(rng.choice(WORDS, 3, replace=False)) for _ in range(81)})
        each = [[names[(i + j) % len(names)] for j in range(10)] for i in range(len(some))]
        for what, listed in (("all", names), ("ten of their own", each)):
            model.ranks(images, some[:2], "Describe", listed if listed is names else each[:2], 2)
            spent = timed(lambda n=listed: model.ranks(images, some, "Describe the image: ", n, batch))
            found = len(some) / spent
            line(f"names ranked, {what} of {len(names)}", f"{found:.1f} images/s, {found / generated:.1f} x answers")


STEPS = ("make", "extraction", "solver", "constant_set", "pretraining", "language_model", "evaluation", "answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], help="default: all, in order")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, to see that it runs")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="terraalign-gpu-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    os.chdir(folder)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}", flush=True)
    failed = []
    try:
        bench = Bench(arguments.tiny)
        for step in dict.fromkeys(("make", *(arguments.steps or STEPS))):
            began = time.perf_counter()
            try:
                getattr(bench, step)()
            except Exception:  # whatever it is: the other figures are wanted all the same
                traceback.print_exc(limit=6)
                failed.append(step)
                line(step, "FAILED")
            print(f"-- {step}: {time.perf_counter() - began:.0f} s", flush=True)
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
