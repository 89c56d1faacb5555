"""Any open_clip model: CoCa gives its 255 x 512 caption tokens, a ViT or a timm tower its patch tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.encoders.base import RANDOM, Parts, Towers
from pipeline.encoders.library import HubFiles, LibraryEncoder
from pipeline.errors import UserError
from pipeline.needs import Need
from pipeline.weights import told_in_one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor

TOKENS = {"coca_ViT-B-32": (255, 512)}  # of the profiles' model; others are known once they are built


class OpenClip(LibraryEncoder):
    """The image tower of an open_clip model; every one has a text tower, too."""

    def build(self) -> Parts:
        from pipeline.encoders.timm_network import TimmTokens

        whole, preprocess = self._whole()
        visual = whole.visual
        if hasattr(visual, "trunk"):  # a timm model, whose own head is left out
            return Parts(visual, TimmTokens(visual.trunk, self.unfit), preprocess)
        if not hasattr(visual, "output_tokens") or not hasattr(visual, "grid_size"):
            why = "open_clip gives no patch tokens of it"
            raise UserError(f"vision.model {self.settings.model}", why, "take a ViT or CoCa")
        visual.output_tokens = True
        return Parts(visual, lambda x: self._own_tokens(visual, x), preprocess)

    def two_towers(self) -> Towers:
        import open_clip

        whole, preprocess = self._whole()
        with told_in_one_line(self._no_tokenizer):
            tokenizer = open_clip.get_tokenizer(str(self.settings.model))

        def texts(some: list[str]) -> Tensor:
            found: Tensor = whole.encode_text(tokenizer(some).to(next(whole.parameters()).device))
            return found

        return Towers(Parts(whole, lambda x: whole.encode_image(x)[:, None], preprocess), texts)

    def _whole(self) -> tuple[Any, Callable[[Image.Image], Tensor]]:
        """Both towers, and the transform of pictures."""
        import open_clip

        model, named = str(self.settings.model), self.settings.pretrained
        if model not in open_clip.list_models():
            raise UserError(f"vision.model {model}", "open_clip has no such model", "see open_clip.list_models()")
        if named != RANDOM and not open_clip.is_pretrained_cfg(model, named):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "it has none"
            self.check_file(f"neither a file nor one of {model}'s tags: {tags}")
        with self.loading():
            whole, _, preprocess = open_clip.create_model_and_transforms(
                model, pretrained=None if named == RANDOM else named, weights_only=True, pretrained_text=False
            )
        return whole, preprocess

    def text_need(self) -> Need | None:
        from huggingface_hub import try_to_load_from_cache

        if not (repo := self._tokenizer_repo()):
            return None
        there = isinstance(try_to_load_from_cache(repo, "tokenizer_config.json"), str)
        return Need(f"tokenizer of {self.settings.model}", there, f"hub {repo}", "" if there else _fetch(repo))

    def _no_tokenizer(self, error: Exception, reason: str) -> UserError:
        repo = self._tokenizer_repo()
        mend = _fetch(repo) if repo else "see open_clip.get_tokenizer"
        return UserError(f"tokenizer of open_clip {self.settings.model} cannot be loaded", reason, mend)

    def _tokenizer_repo(self) -> str | None:
        """The hub's repository of its tokenizer, where that is none of open_clip's own."""
        from open_clip import get_model_config

        config = get_model_config(str(self.settings.model)) or {}
        found: str | None = config.get("text_cfg", {}).get("hf_tokenizer_name")
        return found

    def tokens(self) -> tuple[int, int] | None:
        return TOKENS.get(str(self.settings.model))

    def hub_files(self) -> HubFiles | None:
        from open_clip import constants, get_pretrained_cfg

        cfg = get_pretrained_cfg(str(self.settings.model), str(self.settings.pretrained))
        repo, _, name = cfg.get("hf_hub", "").rpartition("/")
        name = name or constants.HF_WEIGHTS_NAME
        default = constants.HF_SAFE_WEIGHTS_NAME if name == constants.HF_WEIGHTS_NAME else ""
        safe = default or str(Path(name).with_suffix(".safetensors"))
        found = HubFiles(repo, list(dict.fromkeys([safe, name])), "" if repo else cfg.get("url", ""))
        return found if found.repo or found.url else None

    def _own_tokens(self, visual: Any, x: Tensor) -> Tensor:
        """Patch tokens without the class token, or those of the attentional pooler, [B, N, D]."""
        tokens: Tensor = visual(x)[1]
        if visual.attn_pool is None:
            expected, width = math.prod(visual.grid_size), visual.positional_embedding.shape[-1]
            if visual.pool_type not in ("tok", "avg"):  # all tokens come, and the class token is the first
                tokens = tokens[:, 1:]
        else:
            expected, width = visual.attn_pool.query.shape[0], visual.attn_pool.query.shape[-1]
            if visual.attn_pool_contrastive is None and visual.pool_type in ("tok", "avg"):
                expected -= 1  # the first query is the pooled one
        if tokens.shape[1:] != (expected, width):
            found = " x ".join(map(str, tokens.shape[1:]))
            raise self.unfit(f"gives tokens {found}, and says it has {expected} x {width}")
        return tokens


def _fetch(repo: str) -> str:
    return f"hf download {repo} --include '*token*' '*.model' 'vocab*' 'merges*' config.json"
