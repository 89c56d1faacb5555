"""Any timm model: patch tokens of a transformer (without class tokens), the last map of a convolutional one."""

from __future__ import annotations

from pathlib import Path

from pipeline.encoders.base import RANDOM, Parts
from pipeline.encoders.library import HubFiles, LibraryEncoder
from pipeline.errors import UserError

HUB = "hub"
"""vision.pretrained of the weights that timm names for a model."""


class Timm(LibraryEncoder):
    """A timm model without its head."""

    def build(self) -> Parts:
        import timm
        from timm.data import create_transform, resolve_data_config

        from pipeline.encoders.timm_network import TimmTokens, load_checkpoint

        model, named = str(self.settings.model), str(self.settings.pretrained)
        if not timm.is_model(model):
            raise UserError(f"vision.model {model}", "timm has no such model", "see timm.list_models()")
        of_file = named not in (RANDOM, HUB)
        if of_file:
            self.check_file("no such file; timm takes a weights file, or hub")
        with self.loading():
            network = timm.create_model(model, num_classes=0, pretrained=named == HUB)
            if of_file:
                load_checkpoint(network, Path(named))
        transform = create_transform(**resolve_data_config({}, model=network))
        return Parts(network, TimmTokens(network, self.unfit), transform)

    def hub_files(self) -> HubFiles | None:
        from timm.models import get_pretrained_cfg

        own = get_pretrained_cfg(str(self.settings.model)) if self.settings.pretrained == HUB else None
        if own is None:
            return None
        names = [own.hf_hub_filename] if own.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        found = HubFiles(own.hf_hub_id or "", names, "" if own.hf_hub_id else own.url or "")
        return found if found.repo or found.url else None
