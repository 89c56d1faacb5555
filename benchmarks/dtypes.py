"""What each cache.dtype loses: image tokens of EfficientNet-Lite0 on the demo's pictures, before and after the store.

python benchmarks/dtypes.py [--scenes 200]
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import yaml
from torch import Tensor

from pipeline.config import Params
from pipeline.encoders.vision import load_vision_encoder
from pipeline.media.pictures import decode
from pipeline.sources.prepare import prepare
from pipeline.store.dtypes import pack, unpack

PROFILE = Path(__file__).parents[1] / "profiles" / "demo.yaml"


def image_tokens(scenes: int) -> Tensor:
    """Float32 tokens [R, 49, 1280] of rendered scenes and of 100 food pictures."""
    values = yaml.safe_load(PROFILE.read_text())
    values["data"]["captions"]["count"], values["data"]["classes"]["count"] = scenes, 2
    params = Params.model_validate(values)
    rows = [row for data in ("captions", "classes") for row in prepare(params, data).to_pylist()]
    rows = rows[: scenes + 100]
    encoder = load_vision_encoder(params.vision)
    parts = []
    for start in range(0, len(rows), 8):
        contents = [Path(row["image"]).read_bytes() for row in rows[start : start + 8]]
        parts.append(encoder.encode(torch.stack([encoder.preprocess(decode(content)) for content in contents])))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    scenes = parser.parse_args().scenes
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        x = image_tokens(scenes)
    print(f"tokens {tuple(x.shape)}, largest {x.abs().max():.2f}, deviation {x.std():.2f}")
    print("| dtype | bytes a picture | relative error (L2) | worst error / largest of its token | least cosine |")
    print("|---|---|---|---|---|")
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        columns = pack(x, dtype)
        error, back = unpack(columns, dtype) - x, unpack(columns, dtype).double()
        worst = (error.abs().amax(-1) / x.abs().amax(-1)).max()
        cosine = torch.nn.functional.cosine_similarity(back, x.double(), dim=-1).min()
        size = sum(column.nbytes for column in columns.values()) // len(x)
        print(f"| {dtype} | {size:,} | {error.norm() / x.norm():.5f} | {worst:.5f} | {cosine:.6f} |")


if __name__ == "__main__":
    main()
