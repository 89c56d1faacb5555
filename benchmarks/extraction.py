"""Extraction from picture files to shards, beside the best it could be, and beside clip-retrieval's inference.

    pip install -e '.[dev]' && pip install --no-deps --target FOLDER clip-retrieval
    PYTHONPATH=FOLDER python benchmarks/extraction.py [--encoder lite0] [--pictures 256] [--rounds 5]
    python benchmarks/extraction.py --decoders [--encoder coca] [--batch 64] [--folder PICTURES]
    python benchmarks/extraction.py --memory

Pictures are JPEGs of 640 x 480, made from a seed. One after the other in every round: extraction with all it does
(reading, SHA-256, decoding, encoding, writing, fsync), the bare encoder over the same batches ready in memory, in the
two ways there are (pass after pass on all of torch's threads; as many passes side by side, one thread each), decoding
alone on one thread, and clip-retrieval's inference. A figure is the median over the rounds of the ratio within a round,
so what else runs on the machine weighs on all sides.

--decoders: of every decoder that works here, extraction with it and where its time went (seconds of threads add up),
and how far its pixels and tokens are from PIL's. On a CPU also the time of the processor, on one thread, from the bytes
of a picture to its pixels: the least of `--rounds` for each picture, the decoders in turn. With --folder, of the JPEGs
below that folder.

--memory: the peak of a process that extracts 2,000 and of one that extracts 20,000 rows, in as many shards.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image

from pipeline.config import Params
from pipeline.devices import pick_device
from pipeline.encoders.vision import VisionEncoder, load_vision_encoder
from pipeline.errors import UserError
from pipeline.extraction.images import ImageShards, extract_images, one_thread_each
from pipeline.media.decoding import Decoder, decoder_for, padded
from pipeline.media.pictures import decode
from pipeline.runs import STORE, Run
from pipeline.sources import manifest as manifest_table
from pipeline.sources.prepare import prepare
from pipeline.store.inventory import timings

SHARDS = 2
AFTER, BESIDE = "bare passes one after the other, all threads", "bare passes side by side, one thread each"
PROFILE = Path(__file__).parents[1] / "profiles" / "demo.yaml"
VISION = {
    "coca": {"encoder": "open_clip", "model": "coca_ViT-B-32", "pretrained": "random", "dtype": "float32"},
    "lite0": {"encoder": "efficientnet_lite0", "dtype": "auto"},  # bfloat16 where the processor computes in it
}


def write_pictures(folder: Path, count: int) -> None:
    """JPEGs as large as photographs of their size: blurred colours with some grain. From the 129th on, copies."""
    generator = np.random.default_rng(0)
    for i in range(min(count, 128)):
        colours = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), 3)
        picture = np.asarray(colours) + generator.normal(0, 6, (480, 640, 3))
        path = folder / f"class{i % 2}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    for i in range(128, count):
        shutil.copy(folder / f"class{i % 2}" / f"{i % 128:06}.jpg", folder / f"class{i % 2}" / f"{i:06}.jpg")


def copy_pictures(folder: Path, count: int) -> None:
    """JPEGs from below a folder, every so many, as two classes."""
    found = sorted(folder.rglob("*.jpg"))
    for i, path in enumerate(found[:: max(1, len(found) // count)][:count]):
        Path(f"pictures/class{i % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, f"pictures/class{i % 2}/{i:06}.jpg")


def parameters(vision: dict[str, str], shards: int, threads: int, batch: int = 8) -> Params:
    values = yaml.safe_load(PROFILE.read_text())
    values["data"]["classes"] |= {"source": "imagefolder", "root": "pictures", "count": None}
    values["vision"] = {**vision, "batch": batch}
    values["cache"]["shards"] = shards
    values["runtime"]["decode_threads"] = threads
    return Params.model_validate(values)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ways(params: Params, encoder: VisionEncoder) -> dict[str, Callable[[], object]]:
    """What a round measures."""
    work = ImageShards(params, "classes", encoder)
    names, batches = [], []
    for rows in work.parts.values():  # no batch crosses a shard
        pictures = [encoder.preprocess(decode(Path(name).read_bytes())) for name in rows["image"]]
        batches += [padded(pictures[i : i + work.size], work.size) for i in range(0, len(pictures), work.size)]
        names += list(rows["image"])

    def extraction() -> None:
        shutil.rmtree(STORE, ignore_errors=True)
        extract_images(params, "classes", encoder, lambda n: None)

    def side_by_side() -> None:
        with one_thread_each(work.passes) as pool:
            list(pool.map(encoder.encode, batches))

    return {
        "extraction": extraction,
        AFTER: lambda: [encoder.encode(pixels) for pixels in batches],
        BESIDE: side_by_side,
        "decoding alone": lambda: [encoder.preprocess(decode(Path(name).read_bytes())) for name in names],
        "clip-retrieval": clip_retrieval(encoder, params.runtime.decode_threads),
    }


def _without_its_web_server() -> None:
    """Make the packages importable without their __init__, which load a web server and an index."""
    for name in ("clip_retrieval", "clip_retrieval.clip_inference"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise SystemExit("clip-retrieval is not there; the first lines of this file say how to get it")
        sys.modules[name] = importlib.util.module_from_spec(spec)


class NoLogger:
    """Takes what clip-retrieval's loop tells its logger."""

    def start(self) -> None: ...

    def end(self) -> None: ...

    def __call__(self, stats: dict[str, float]) -> None: ...


def clip_retrieval(encoder: VisionEncoder, cores: int) -> Callable[[], object]:
    """clip-retrieval's inference: its reader, loop and writer, in one part as by its default.

    Its mapper, which loads CLIP, is ours. Its logger is left out: a process a part that has to start first.
    """
    _without_its_web_server()
    from clip_retrieval.clip_inference.reader import FilesReader
    from clip_retrieval.clip_inference.runner import Runner
    from clip_retrieval.clip_inference.writer import NumpyWriter

    def mapper(item: dict[str, Any]) -> dict[str, Any]:
        """Theirs divides by the norm besides, which we leave out."""
        tokens = encoder.encode(item["image_tensor"]).to(torch.float16).numpy()
        return {"image_embs": tokens, "image_filename": item["image_filename"], "text": None, "metadata": None}

    def inference() -> None:
        shutil.rmtree("theirs", ignore_errors=True)
        what = {"enable_text": False, "enable_image": True, "enable_metadata": False}
        runner = Runner(
            lambda sampler: FilesReader(sampler, encoder.preprocess, None, "pictures", 8, cores, **what),
            lambda: mapper,
            lambda part: NumpyWriter(part, "theirs", **what, output_partition_count=1),
            lambda part: NoLogger(),
            1,
        )
        runner(0)

    return inference


def measure(params: Params, encoder: VisionEncoder, rounds: int, cores: int) -> None:
    took: dict[str, list[float]] = {}
    rivals = ways(params, encoder)
    for number in range(rounds + 1):
        for name, work in rivals.items():
            spent = seconds(work)
            if number:  # the first round is for warming up
                took.setdefault(name, []).append(spent)
    print("computed in", encoder.identity["dtype"])
    print({name: round(statistics.median(times), 3) for name, times in took.items()})
    print("where extraction's time went:", dict(timings("images", next(STORE.glob("images/*")).name)))
    rivals_times = {name: took[name] for name in (AFTER, BESIDE, "clip-retrieval")}
    for name in (AFTER, BESIDE):
        both = zip(took[name], took["decoding alone"], strict=True)
        rivals_times[f"({name} + decoding / {cores})"] = [e + d / cores for e, d in both]
    for name, best in rivals_times.items():
        ratios = [other / ours for other, ours in zip(best, took["extraction"], strict=True)]
        print(f"speed of extraction / {name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def decoders_here(encoder: VisionEncoder) -> dict[str, Decoder]:
    found = {}
    for name in ("pil", "torchvision", "nvjpeg"):
        try:
            found[name] = decoder_for(name, encoder.preprocess, pick_device("auto"))
        except UserError as fault:
            print(fault)
    return found


def processor_time(decoders: dict[str, Decoder], contents: list[bytes], rounds: int) -> dict[str, float]:
    """Milliseconds of the processor a picture, by decoder."""
    least = {name: [float("inf")] * len(contents) for name in decoders}
    for _ in range(rounds):
        for at, content in enumerate(contents):
            for name, decoder in decoders.items():
                began = time.thread_time()
                decoder.load(content)
                least[name][at] = min(least[name][at], time.thread_time() - began)
    return {name: statistics.mean(times) * 1000 for name, times in least.items()}


def distance(encoder: VisionEncoder, one: torch.Tensor, other: torch.Tensor) -> str:
    """How far two batches of pixels and their tokens are from one another."""
    levels = (one.float() - other.float()).abs()
    tokens = [encoder.encode(pixels) for pixels in (one, other)]
    cosine = torch.nn.functional.cosine_similarity(*tokens, dim=-1)[tokens[1].norm(dim=-1) > 0]
    apart = (tokens[0] - tokens[1]).norm() / tokens[1].norm()
    return (
        f"pixels off by {levels.mean():.4f} of 255, at most {levels.max():.0f}; tokens off by {apart:.5f} (L2), "
        f"cosine {cosine.mean():.6f}, at least {cosine.min():.6f}"
    )


def measure_decoders(params: Params, encoder: VisionEncoder, pictures: int, rounds: int) -> None:
    torch.set_num_threads(1 if pick_device("auto").type == "cpu" else torch.get_num_threads())
    contents = [path.read_bytes() for path in sorted(Path("pictures").glob("*/*"))][:256]
    decoders, by_pil = decoders_here(encoder), Decoder(encoder.preprocess)
    spent = {} if torch.cuda.is_available() else processor_time(decoders, contents, rounds)
    pixels = by_pil.batch([by_pil.load(content) for content in contents], len(contents))
    for name, decoder in decoders.items():
        vision = params.vision.model_copy(update={"decoder": name})
        by_it, times = params.model_copy(update={"vision": vision}), []
        for _ in range(rounds):
            shutil.rmtree(STORE, ignore_errors=True)
            began = time.perf_counter()
            extract_images(by_it, "classes", encoder, lambda n: None)
            times.append(time.perf_counter() - began)
        took = timings("images", next(STORE.glob("images/*")).name)
        of_it = ", ".join(f"{work} {took[work]:.2f} s" for work in ("read", "decode", "encode", "write"))
        print(f"{name}: {pictures / min(times):.0f} images/s; of {took['all']:.2f} s in the last round: {of_it}")
        if name in spent:
            print(f"    {spent[name]:.3f} ms of the processor a picture, {spent[name] / spent['pil']:.2f} of PIL's")
        found = decoder.batch([decoder.load(content) for content in contents], len(contents)).cpu()
        print(f"    {distance(encoder, found, pixels)}")


class Cheap:
    """An encoder of no layers with tokens of 50 kB a picture in float16."""

    def __init__(self) -> None:
        self.identity = {"encoder": "cheap"}

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((16, 16)), np.float32)).permute(2, 0, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, :512, None].expand(-1, -1, 49).transpose(1, 2).contiguous()


def peak_of_extraction(rows: int) -> None:
    """Extract rows that share 100 pictures, in a process that did nothing else, and print its peak in MB."""
    params = parameters(VISION["lite0"], 8, 2)
    extract_images(params, "classes", Cheap(), lambda n: None)
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(int(peak.split()[1]) / 1024)


def measure_memory() -> None:
    params, peaks = parameters(VISION["lite0"], 8, 2), []
    write_pictures(Path("pictures"), 100)
    table = prepare(params, "classes").to_pylist()
    for rows in (2_000, 20_000):
        repeated = [{**table[i % 100], "id": f"{i:06}"} for i in range(rows)]
        manifest_table.write(
            pa.Table.from_pylist(repeated, schema=manifest_table.SCHEMA), Run.of(params).manifest("classes")
        )
        shutil.rmtree(STORE, ignore_errors=True)
        command = [sys.executable, __file__, "--peak", str(rows)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        size = sum(path.stat().st_size for path in STORE.glob("images/*/*.arrow")) / 1e6
        print(f"{rows} rows, {size:.0f} MB of tokens in 8 shards: peak {peaks[-1]:.0f} MB")
    print(f"20,000 rows / 2,000 rows: {peaks[1] / peaks[0]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=list(VISION), default="lite0")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--decoders", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak_of_extraction(options.peak)
        return
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    folder_of = options.folder and options.folder.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if options.memory:
            measure_memory()
            return
        params = parameters(VISION[options.encoder], SHARDS, cores, options.batch)
        if folder_of is None:
            write_pictures(Path("pictures"), options.pictures)
        else:
            copy_pictures(folder_of, options.pictures)
        manifest_table.write(prepare(params, "classes"), Run.of(params).manifest("classes"))
        torch.manual_seed(0)
        encoder = load_vision_encoder(params.vision)
        if options.decoders:
            measure_decoders(params, encoder, len(list(Path("pictures").glob("*/*"))), options.rounds)
        else:
            measure(params, encoder, options.rounds, cores)


if __name__ == "__main__":
    main()
