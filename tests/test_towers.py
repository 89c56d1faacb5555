"""An encoder's own two towers, zero-shot names and CLIPScore, against open_clip called directly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from torch.nn.functional import normalize

from pipeline.config import Params, Vision, load_params
from pipeline.encoders.base import Encoder
from pipeline.encoders.vision import TwoTowers
from pipeline.errors import UserError
from pipeline.metrics import base
from pipeline.metrics.clip_score import CLIPScore
from pipeline.metrics.zero_shot import ZeroShot
from pipeline.runs import Run
from pipeline.store.reader import ImageTokens

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
OWN = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
COCA = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 8, "output_tokens": True}
MODELS: dict[str, dict[str, Any]] = {
    "tiny-clip": {"vision_cfg": OWN | {"pool_type": "avg"}, "text_cfg": TEXT},
    "tiny-timm": {"vision_cfg": TIMM | {"image_size": 160}, "text_cfg": TEXT},
    "tiny-coca": {
        "vision_cfg": OWN | COCA,
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
        "custom_text": True,
    },
}
NAMES = ["12 %", "egg", "juice of an orange", "rice", "soup"]


@pytest.fixture(scope="module", autouse=True)
def _tiny_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models of open_clip's own architectures, as small as they come."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 16, **config}))
    open_clip.add_model_config(folder)


def vision_of(model: str, dtype: str = "float32") -> Vision:
    return Vision.model_validate({"encoder": "open_clip", "model": model, "pretrained": "random", "dtype": dtype})


def directly(model: str) -> tuple[Any, Any]:
    """The same untrained network, and its transform of pictures."""
    torch.manual_seed(0)
    whole, _, transform = open_clip.create_model_and_transforms(model)
    return whole.eval(), transform


def photo(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (5, 4 + number % 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((60, 44 + number), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("model", MODELS)
@torch.inference_mode()
def test_both_towers_are_the_librarys(model: str) -> None:
    towers = TwoTowers(vision_of(model), "cpu")
    whole, transform = directly(model)
    photos, texts = [photo(number) for number in range(5)], ["a dog", "two red apples on a table", "word " * 100]
    found = towers.pictures(torch.stack([towers.preprocess(one) for one in photos]))
    expected = normalize(whole.encode_image(torch.stack([transform(one) for one in photos])), dim=1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    expected = normalize(whole.encode_text(open_clip.get_tokenizer(model)(texts)), dim=1)
    torch.testing.assert_close(towers.texts(texts), expected, atol=1e-5, rtol=1e-4)
    rough = TwoTowers(vision_of(model, "bfloat16"), "cpu").texts(texts)
    assert rough.dtype == torch.float32 and (rough * expected).sum(1).min() > 0.999
    torch.testing.assert_close(rough.norm(dim=1), torch.ones(3))


def test_who_has_a_text_tower(tiny_params: Params) -> None:
    assert Encoder.of(vision_of("tiny-clip")).has_text_tower()
    values = yaml.safe_load(Path("params.yaml").read_text())  # with an encoder of timm
    for name in ("zero_shot", "clip_score"):
        values["evaluate"]["metrics"] = ["probe", name]
        Path("params.yaml").write_text(yaml.safe_dump(values))
        why = f"evaluate.metrics.1 is {name}: vision.encoder timm has no text tower; take {name} out of evaluate.metr"
        with pytest.raises(UserError, match=rf"params.yaml:\d+: {why}"):
            load_params()
    with pytest.raises(UserError, match=r"vision\.encoder timm: has no text tower"):
        TwoTowers(tiny_params.vision, "cpu")


def answered(params: Params, data: str, rows: pd.DataFrame, predictions: pd.DataFrame) -> base.Tested:
    """Rows of a prepared data set and their pictures as files, with some task's answers."""
    params = params.model_copy(update={"vision": vision_of("tiny-clip").model_copy(update={"batch": 4})})
    for number, name in enumerate(rows["image"]):
        photo(number).save(name)
    rows["sha256"] = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in rows["image"]]
    path = Run.of(params).manifest(data)
    path.parent.mkdir(parents=True)
    rows.to_parquet(path)
    return base.Tested(
        params,
        data,
        ImageTokens(rows, (1, 1), "float32", lambda at: {}),
        predictions,
        lambda wanted: pytest.fail("no LLM is needed for this"),
    )


def embedded(rows: pd.DataFrame) -> tuple[Any, torch.Tensor]:
    whole, transform = directly("tiny-clip")
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(name)) for name in rows["image"]])
        return whole, whole.encode_image(pixels, normalize=True)


def rows_of(count: int) -> pd.DataFrame:
    """Pictures, the first of them for training."""
    ids = [f"p{i:02d}" for i in range(count)]
    rows = pd.DataFrame(
        {"id": ids, "image": [f"{name}.png" for name in ids], "split": ["train", *["test"] * count][:count]}
    )
    return rows.assign(captions=[["a", "b"]] * count, label=NAMES[0])


def test_zero_shot_names_as_open_clip_does(tiny_params: Params, project: Path) -> None:
    rows = rows_of(19)
    one = answered(tiny_params, "classes", rows, pd.DataFrame())
    whole, pictures = embedded(rows)
    weights = open_clip.build_zero_shot_classifier(
        whole, open_clip.get_tokenizer("tiny-clip"), NAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    named = (pictures @ weights).argmax(1).tolist()
    assert len(set(named)) > 1, "or every classifier would do"
    wrong = (5, 7, 8)  # and the picture for training has no say
    rows["label"] = [NAMES[(place + (i in wrong)) % len(NAMES)] for i, place in enumerate(named)]
    rows.loc[0, "label"] = NAMES[named[0] - 1]
    assert set(rows["label"]) == set(NAMES)
    [figure] = ZeroShot(None).figures(one)
    assert figure == base.Figure("zero_shot", 15 / 18, figure.label, base.wilson(15, 18), baseline=True)
    for name in rows["image"]:
        Path(name).unlink()
    assert ZeroShot(None).figures(one) == [figure], "the pictures are not looked at again for the next adapter"


@pytest.mark.parametrize(("content", "why"), [(None, "cannot be read .no such file"), (b"x", "changed since it was")])
def test_pictures_that_are_no_longer_what_they_were_are_named(
    tiny_params: Params, project: Path, content: bytes | None, why: str
) -> None:
    one = answered(tiny_params, "classes", rows_of(6), pd.DataFrame())
    Path("p05.png").write_bytes(content) if content else Path("p05.png").unlink()
    with pytest.raises(UserError, match=f"p05.png: {why}.*dvc repro --force"):
        ZeroShot(None).figures(one)


def test_clip_score_is_that_of_the_paper(tiny_params: Params, project: Path) -> None:
    rows = rows_of(8)
    texts = [f"a {colour} {thing}" for colour in ("red", "very green") for thing in ("dog", "cat", "house")]
    said = rows.iloc[[1, 3, 4, 6, 7]].reset_index(drop=True)  # not all were captioned
    said = said.assign(
        finetuned=texts[:5], pretrained=texts[1:], references=[texts[i : i + 1 + i % 2] for i in range(5)]
    )
    found = {figure.key: figure for figure in CLIPScore(None).figures(answered(tiny_params, "captions", rows, said))}
    whole, _ = embedded(rows)
    tokenizer, pictures = open_clip.get_tokenizer("tiny-clip"), embedded(said)[1].numpy()

    def score(i: int, text: str) -> float:
        with torch.inference_mode():
            words = whole.encode_text(tokenizer([f"A photo depicts {text}"]), normalize=True)[0].numpy()
        return 2.5 * max(float(pictures[i] @ words), 0.0)

    expected = {
        "clip_score": [score(i, said["finetuned"][i]) for i in range(5)],
        "clip_score_pretrained": [score(i, said["pretrained"][i]) for i in range(5)],
        "clip_score_shuffled": [score(i, said["finetuned"][(i + 1) % 5]) for i in range(5)],
        "clip_score_references": [np.mean([score(i, text) for text in said["references"][i]]) for i in range(5)],
    }
    assert {key: figure.value for key, figure in found.items()} == pytest.approx(
        {key: np.mean(scores) for key, scores in expected.items()}, abs=1e-5
    )
    assert len({round(figure.value, 4) for figure in found.values()}) == 4
    for key, figure in found.items():
        assert figure.interval is not None and figure.interval[0] < figure.value < figure.interval[1], key
        assert figure.kind == "number" and figure.baseline == (key == "clip_score_references")
