"""The store beside the usual ways to keep features: reading at random, writing, bytes on disk.

    pip install -e '.[dev,bench]'
    python benchmarks/store.py [--samples 2048] [--folder /dev/shm]

Samples are CoCa's image tokens, [255, 512] in float16, of random numbers. All ways read the same random batches of 32
in the same order from files that the system has cached, one after the other in every round; a figure is the median over
the rounds of the ratio within a round, so what else runs on the machine weighs on both sides.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import webdataset

from pipeline.devices import keep_freed_memory
from pipeline.store import schema
from pipeline.store.reader import CaptionTokens, ImageTokens, Mapped
from pipeline.store.shards import ShardFile, atomically, open_shard, write_shard
from pipeline.store.webdataset import export, read_tars

SHAPE, BATCH, SHARDS = (255, 512), 32, 8
SAMPLE = SHAPE[0] * SHAPE[1] * 2  # bytes


ARROW = schema.image_schema(SHAPE, "float16", "bench")


def write_store(folder: Path, tokens: np.ndarray) -> None:
    """Shards as whole tables, hashed and on the disk (fsync)."""
    for number, part in enumerate(np.split(tokens, SHARDS)):
        columns = [*leading(number, part), schema.tensor_column(part, ARROW.field("tokens"))]
        write_shard(folder / f"{number}.arrow", pa.table(columns, schema=ARROW))


def write_by_batches(folder: Path, tokens: np.ndarray) -> None:
    """The same shards as extraction writes them: batch by batch."""
    for number, part in enumerate(np.split(tokens, SHARDS)):
        with atomically(folder / f"{number}.arrow") as stream:
            file = ShardFile(stream, ARROW, leading(number, part))
            for start in range(0, len(part), 8):
                batch = part[start : start + 8]
                file.put(list(range(start, start + len(batch))), {"tokens": batch})
            file.finish()


def leading(number: int, part: np.ndarray) -> list[pa.Array]:
    """The columns id and sha256 of a shard."""
    return [pa.array([f"{number * len(part) + row:08}" for row in range(len(part))]), pa.array(["0" * 64] * len(part))]


def write_webdataset(folder: Path, tokens: np.ndarray, sync: bool = False) -> None:
    """Tar shards of one .npy member a sample, by WebDataset's own writer."""
    folder.mkdir()
    for number, part in enumerate(np.split(tokens, SHARDS)):
        path = folder / f"{number}.tar"
        with webdataset.TarWriter(str(path)) as tar:
            for row, sample in enumerate(part):
                tar.write({"__key__": f"{number * len(part) + row:08}", "tokens.npy": sample})
        if sync:
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def open_store(folder: Path, count: int) -> ImageTokens:
    tables = [open_shard(folder / f"{number}.arrow", "bench") for number in range(SHARDS)]
    places = [(number, row) for number, table in enumerate(tables) for row in range(len(table))]
    columns = [{"tokens": schema.dense(table, "tokens")} for table in tables]
    rows = pd.DataFrame({"id": [f"{i:08}" for i in range(count)], "split": "train"})
    return ImageTokens(rows, SHAPE, "float16", Mapped(columns, places))


class TarMembers:
    """Random access to the .npy members of tar shards, by an index of their places: the best that tar allows."""

    def __init__(self, folder: Path):
        import tarfile

        self.members = []
        for path in sorted(folder.glob("*.tar")):
            file = path.open("rb")
            with tarfile.open(path) as tar:
                self.members += [(file, member.offset_data, member.size) for member in tar]

    def read(self, positions: list[int]) -> np.ndarray:
        samples = []
        for position in positions:
            file, offset, size = self.members[position]
            file.seek(offset)
            samples.append(np.load(io.BytesIO(file.read(size))))
        return np.stack(samples)


def open_export(folder: Path, store: ImageTokens) -> ImageTokens:
    """What `cache.reader: webdataset` reads, of the same samples."""
    captions = CaptionTokens({row_id: [[0]] for row_id in store.ids}, np.zeros(1, np.int32), torch.zeros(1, 1))
    export(store, captions, "bench", folder, 256, lambda n: None)
    return read_tars(str(folder), "bench", "")[0]


def hf_dataset(folder: Path, tokens: np.ndarray) -> datasets.Dataset:
    features = datasets.Features({"tokens": datasets.Array2D(SHAPE, "float16")})
    made = datasets.Dataset.from_generator(
        lambda: ({"tokens": sample} for sample in tokens), features=features, cache_dir=str(folder)
    )
    return made.with_format("torch", dtype=torch.float16)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratios(ways: dict[str, Callable[[], object]], base: str, rounds: int) -> dict[str, tuple[float, float]]:
    """For each way: median seconds, and the median of base seconds / its seconds within a round."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            took[name].append(seconds(work))
    return {
        name: (
            statistics.median(times),
            statistics.median(b / t for b, t in zip(took[base], times, strict=True)),
        )
        for name, times in took.items()
    }


def measure_reading(folder: Path, tokens: np.ndarray, rounds: int) -> None:
    store = open_store(folder / "store", len(tokens))
    tars, hub = TarMembers(folder / "tars"), hf_dataset(folder / "hf", tokens)
    exported = open_export(folder / "exported", store)
    order = np.random.default_rng(1).permutation(len(tokens))[: len(tokens) // BATCH * BATCH].tolist()
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    check = batches[0]
    for name, found in {
        "store": store.stored(check)["tokens"], "tar": tars.read(check),
        "exported": exported.stored(check)["tokens"], "hub": hub[check]["tokens"].numpy()
    }.items():  # fmt: skip
        assert np.array_equal(found, tokens[check]), name
    ways: dict[str, Callable[[], object]] = {
        "memcpy (same bytes, in order)": lambda: [tokens[i : i + BATCH].copy() for i in range(0, len(order), BATCH)],
        "store, as stored": lambda: [store.stored(batch) for batch in batches],
        "store, float32": lambda: [store.tokens(batch) for batch in batches],
        "exported tars, as stored": lambda: [exported.stored(batch) for batch in batches],
        "exported tars, float32": lambda: [exported.tokens(batch) for batch in batches],
        "WebDataset .npy members, indexed": lambda: [tars.read(batch) for batch in batches],
        "HF datasets, torch": lambda: [hub[batch]["tokens"] for batch in batches],
    }
    print(f"\n| reading {len(order)} samples at random | GB/s | store as stored is faster by |\n|---|---|---|")
    for name, (took, ratio) in ratios(ways, "store, as stored", rounds).items():
        print(f"| {name} | {len(order) * SAMPLE / took / 1e9:.2f} | {1 / ratio:.2f} x |")


def measure_sequential_tar(folder: Path, tokens: np.ndarray, rounds: int) -> None:
    """WebDataset's own loader reads tars in order; the store reads as many batches at random."""
    store = open_store(folder / "store", len(tokens))
    urls = [str(path) for path in sorted((folder / "tars").glob("*.tar"))]
    order = np.random.default_rng(1).permutation(len(tokens)).tolist()

    def read_tars() -> int:
        loader = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("tokens.npy").batched(BATCH)
        return sum(len(batch) for (batch,) in loader)

    assert read_tars() == len(tokens)
    ways: dict[str, Callable[[], object]] = {
        "store, as stored, again": lambda: [store.stored(order[i : i + BATCH]) for i in range(0, len(order), BATCH)],
        "WebDataset loader, in order": read_tars,
    }
    for name, (took, ratio) in ratios(ways, "store, as stored, again", rounds).items():
        print(f"| {name} | {len(tokens) * SAMPLE / took / 1e9:.2f} | {1 / ratio:.2f} x |")


def measure_writing(folder: Path, tokens: np.ndarray, rounds: int) -> None:
    fresh = iter(folder / f"write{n}" for n in range(10**6))
    ways: dict[str, Callable[[], object]] = {
        "store (hashed, fsync)": lambda: write_store(next(fresh), tokens),
        "store, batch by batch": lambda: write_by_batches(next(fresh), tokens),
        "WebDataset .npy": lambda: write_webdataset(next(fresh), tokens),
        "WebDataset .npy, fsync": lambda: write_webdataset(next(fresh), tokens, sync=True),
    }
    print(f"\n| writing {len(tokens)} samples | GB/s | store is faster by |\n|---|---|---|")
    for name, (took, ratio) in ratios(ways, "store (hashed, fsync)", rounds).items():
        print(f"| {name} | {tokens.nbytes / took / 1e9:.2f} | {1 / ratio:.2f} x |")


def measure_bytes(folder: Path, tokens: np.ndarray) -> None:
    stored = sum(path.stat().st_size for path in (folder / "store").glob("*.arrow"))
    tars = sum(path.stat().st_size for path in (folder / "tars").glob("*.tar"))
    print(f"\nbytes on disk / raw: store {stored / tokens.nbytes:.5f}, tars {tars / tokens.nbytes:.5f}")


def measure_captions(folder: Path, used: int, images: int = 118_287, width: int = 4096) -> None:
    """As many captions as COCO train has, five of 8 to 16 tokens an image, of `used` words by Zipf's law."""
    generator = np.random.default_rng(2)
    lengths = generator.integers(8, 17, images * 5)
    words = pa.array(np.minimum(generator.zipf(1.1, lengths.sum()), used) - 1, pa.int32())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    captions = pa.ListArray.from_arrays(offsets, words)
    captions = pa.ListArray.from_arrays(pa.array(np.arange(0, images * 5 + 1, 5), pa.int32()), captions)
    ids = pa.array([f"{i:012}" for i in range(images)])
    path = folder / f"captions{used}.arrow"
    shard = write_shard(path, pa.table([ids, captions], schema=schema.caption_schema("bench")))
    print(f"captions: {len(words)} tokens of {used} words at width {width}, token ids {shard.bytes / 1e9:.3f} GB")
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        kept = shard.bytes + len(words.unique()) * (size * width + 4)  # rows and their token ids
        share = len(words) * width * 2 / kept
        print(f"  and a table in {dtype}: {kept / 1e9:.3f} GB, 1/{share:.0f} of all embeddings in 16 bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to write; a memory file system leaves the disk out")
    options = parser.parse_args()
    keep_freed_memory()  # as the training stages do
    datasets.disable_progress_bars()
    versions = f"torch {torch.__version__}, arrow {pa.__version__}, webdataset {webdataset.__version__}"
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {versions}, datasets {datasets.__version__}")
    tokens = np.random.default_rng(0).standard_normal((options.samples, *SHAPE), np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_store(folder / "store", tokens)
        write_webdataset(folder / "tars", tokens)
        measure_reading(folder, tokens, options.rounds)
        measure_sequential_tar(folder, tokens, options.rounds)
        measure_bytes(folder, tokens)
        for used in (10_000, 20_000, 30_000):
            measure_captions(folder, used)
        measure_writing(folder, tokens[: options.samples // 4], options.rounds)


if __name__ == "__main__":
    main()
