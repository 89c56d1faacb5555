"""The image towers that Hugging Face's transformers has, too: CLIP's (of open_clip) and SigLIP's (of timm).

Image tokens here have gone through the tower's last norm; the states that LLaVA reads have not. So a tower gets one
more block, whose attention gives nothing and whose feed-forward layers give back what its own norm, which is the
tower's last one, lets in: by gelu(x) - gelu(-x) = x, true of GELU, its tanh form and QuickGELU alike, as each is x
times a function whose values at x and -x add up to 1. The block adds that to the state h, so the projector, which reads
both states, gets norm(h) as the difference of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoders.base import Parts
from pipeline.encoders.timm_network import TimmTokens
from pipeline.errors import UserError

NO_EQUAL = "has no equal among the towers of Hugging Face's LLaVA"
WOULD_WORK = "take a CLIP ViT of open_clip (such as ViT-B-32), or a SigLIP of open_clip or timm"
# torch's (with `approximate`), timm's and open_clip's, as transformers names them.
ACTIVATIONS = {
    "GELU": "gelu",
    "GELUtanh": "gelu_pytorch_tanh",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
}


@dataclass(frozen=True)
class Tower:
    """A vision model of transformers, its weights those of an encoder."""

    model: Any
    normed: bool  # whether its last block is the added one; else tokens are the last states as they are
    prefix: int  # class tokens before those of the patches


def tower_of(parts: Parts, named: str) -> Tower:
    """Raises UserError, naming the encoder, for one that transformers has no equal of."""
    network = parts.network
    if isinstance(parts.tokens, TimmTokens):
        return _siglip(parts.tokens.network, named)
    if all(hasattr(network, part) for part in ("conv1", "class_embedding", "transformer", "ln_post", "attn_pool")):
        return _clip(network, named)
    raise UserError(named, NO_EQUAL, WOULD_WORK)


@torch.no_grad()
def _clip(visual: Any, named: str) -> Tower:
    """open_clip's VisionTransformer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    blocks = list(visual.transformer.resblocks)
    first = blocks[0]
    _check_clip(visual, blocks, named)
    normed = not visual.final_ln_after_pool
    config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels, intermediate_size=first.mlp.c_fc.out_features,
        num_hidden_layers=len(blocks) + normed, num_attention_heads=first.attn.num_heads,
        image_size=visual.image_size[0], patch_size=visual.patch_size[0], hidden_act=_activation(first.mlp.gelu, named),
        layer_norm_eps=_eps(named, visual.ln_pre, visual.ln_post, first.ln_1, first.ln_2),
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    model.embeddings.class_embedding.copy_(visual.class_embedding)
    model.embeddings.patch_embedding.weight.copy_(visual.conv1.weight)
    model.embeddings.position_embedding.weight.copy_(visual.positional_embedding)
    pairs = [(model.pre_layrnorm, visual.ln_pre), (model.post_layernorm, visual.ln_post)]
    for layer, block in zip(model.encoder.layers, blocks, strict=False):
        _attention(layer.self_attn, block.attn.in_proj_weight, block.attn.in_proj_bias)
        pairs += [
            (layer.layer_norm1, block.ln_1), (layer.self_attn.out_proj, block.attn.out_proj),
            (layer.layer_norm2, block.ln_2), (layer.mlp.fc1, block.mlp.c_fc), (layer.mlp.fc2, block.mlp.c_proj),
        ]  # fmt: skip
    _copy(pairs)
    if normed:
        _only_norm(model.encoder.layers[-1], visual.ln_post, named)
    return Tower(model, normed, 1)


@torch.no_grad()
def _siglip(network: Any, named: str) -> Tower:
    """timm's VisionTransformer without a class token."""
    from timm.models.vision_transformer import VisionTransformer
    from transformers import SiglipVisionConfig, SiglipVisionModel

    if type(network) is not VisionTransformer:
        raise UserError(named, NO_EQUAL, WOULD_WORK)
    blocks, embed = list(network.blocks), network.patch_embed
    first = blocks[0]
    _check_siglip(network, blocks, named)
    normed = not isinstance(network.norm, nn.Identity)
    norms = [first.norm1, first.norm2, *([network.norm] if normed else [])]
    config = SiglipVisionConfig(
        hidden_size=network.embed_dim, intermediate_size=first.mlp.fc1.out_features,
        num_hidden_layers=len(blocks) + normed, num_attention_heads=first.attn.num_heads,
        image_size=embed.img_size[0], patch_size=embed.patch_size[0], hidden_act=_activation(first.mlp.act, named),
        layer_norm_eps=_eps(named, *norms), vision_use_head=False,
    )  # fmt: skip
    model = SiglipVisionModel(config).eval()
    model.embeddings.position_embedding.weight.copy_(network.pos_embed[0])
    pairs: list[tuple[Any, Any]] = [(model.embeddings.patch_embedding, embed.proj)]
    if normed:
        pairs.append((model.post_layernorm, network.norm))
    for layer, block in zip(model.encoder.layers, blocks, strict=False):
        _attention(layer.self_attn, block.attn.qkv.weight, block.attn.qkv.bias)
        pairs += [
            (layer.layer_norm1, block.norm1), (layer.self_attn.out_proj, block.attn.proj),
            (layer.layer_norm2, block.norm2), (layer.mlp.fc1, block.mlp.fc1), (layer.mlp.fc2, block.mlp.fc2),
        ]  # fmt: skip
    _copy(pairs)
    if normed:
        _only_norm(model.encoder.layers[-1], network.norm, named)
    return Tower(model, normed, 0)


def _check_clip(visual: Any, blocks: list[Any], named: str) -> None:
    """UserError for what CLIP's tower has not."""
    _refuse_unless(
        named,
        {
            "pools its tokens by attention": visual.attn_pool is None,
            "has no norm before its blocks": isinstance(visual.ln_pre, nn.LayerNorm),
            "is not square": len({*visual.image_size}) == 1 and len({*visual.patch_size}) == 1,
            "has blocks of another kind": all(
                type(getattr(one, "attn", None)) is nn.MultiheadAttention for one in blocks
            ),
            "scales its layers": all(isinstance(getattr(one, "ls_1", None), nn.Identity) for one in blocks),
        },
    )


def _check_siglip(network: Any, blocks: list[Any], named: str) -> None:
    """UserError for what SigLIP's tower has not."""
    from timm.models.vision_transformer import Block

    embed, first = network.patch_embed, blocks[0]
    positions = network.pos_embed is not None and network.pos_embed.shape[1] == embed.num_patches
    _refuse_unless(
        named,
        {
            "has class tokens, which SigLIP has not": network.num_prefix_tokens == 0 and positions,
            "has a norm before its blocks": isinstance(network.norm_pre, nn.Identity),
            "is not square": len({*embed.img_size}) == 1 and len({*embed.patch_size}) == 1,
            "takes pictures of any size": not network.dynamic_img_size,
            "has blocks of another kind": all(type(one) is Block for one in blocks),
            "has no bias where SigLIP has one": first.attn.qkv.bias is not None and embed.proj.bias is not None,
            "scales or norms inside its blocks": all(
                isinstance(part, nn.Identity)
                for one in blocks
                for part in (one.ls1, one.ls2, one.attn.q_norm, one.attn.k_norm, one.attn.norm, one.mlp.norm)
            ),
        },
    )


def _refuse_unless(named: str, conditions: dict[str, bool]) -> None:
    for what, holds in conditions.items():
        if not holds:
            raise UserError(named, f"{what}, so no tower of Hugging Face's LLaVA equals it", WOULD_WORK)


def _activation(module: nn.Module, named: str) -> str:
    """As transformers names it."""
    kind = type(module).__name__ + str(getattr(module, "approximate", "none")).replace("none", "")
    if kind not in ACTIVATIONS:
        raise UserError(named, f"has {kind} between its layers, where LLaVA's towers have GELU", WOULD_WORK)
    return ACTIVATIONS[kind]


def _eps(named: str, *norms: Any) -> float:
    """The one that all norms have."""
    found = [float(norm.eps) for norm in norms]
    _refuse_unless(named, {"has norms of different eps": all(a == b for a, b in pairwise(found))})
    return found[0]


def _attention(attention: Any, weight: Tensor, bias: Tensor) -> None:
    """Queries, keys and values out of one matrix of all three."""
    for name, rows, some in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
        projection = getattr(attention, f"{name}_proj")
        projection.weight.copy_(rows)
        projection.bias.copy_(some)


def _copy(pairs: list[tuple[Any, Any]]) -> None:
    """All parameters of the second of each pair into the first."""
    for to, of in pairs:
        to.load_state_dict(of.state_dict())


def _only_norm(layer: Any, norm: nn.LayerNorm, named: str) -> None:
    """Make a block add the norm of its input to it, see above."""
    width, inner = layer.mlp.fc2.out_features, layer.mlp.fc1.out_features
    _refuse_unless(named, {"has feed-forward layers less than twice as wide as its tokens": inner >= 2 * width})
    for parameter in layer.parameters():
        parameter.zero_()
    _copy([(layer.layer_norm1, norm), (layer.layer_norm2, norm)])
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    layer.mlp.fc1.weight[: 2 * width] = both
    layer.mlp.fc2.weight[:, : 2 * width] = both.T
