"""What the vision encoder names on its own: zero-shot classification by its text tower (Radford et al. 2021, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.metrics.base import Figure, Metric, Tested, share_of
from pipeline.naming.classes import class_names, labelled, numbers

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.encoders.vision import TwoTowers


class ZeroShot(Metric):
    """Test accuracy of the class whose text embedding is nearest by cosine: no adapter, LLM or label has a part."""

    tasks = ("classify",)
    needs_text_tower = True

    def figures(self, tested: Tested) -> list[Figure]:
        import torch

        from pipeline.encoders.vision import TwoTowers
        from pipeline.metrics.joint import pictures_of

        positions, names = labelled(tested.images, "test"), class_names(tested.images)
        towers = TwoTowers(tested.params.vision, tested.params.runtime.device)
        named = (pictures_of(tested, towers, positions) @ class_embeddings(towers, names).T).argmax(1)
        hits = named == torch.tensor(numbers(tested.images, positions, names))
        return [share_of("zero_shot", hits.tolist(), "zero-shot, encoder alone", baseline=True)]


def class_embeddings(towers: TwoTowers, names: Sequence[str]) -> Tensor:
    """Of each name the mean of its embeddings in CLIP's 80 prompts for ImageNet, float32 [C, E] of length 1."""
    import torch
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    means = [towers.texts([write(name) for write in OPENAI_IMAGENET_TEMPLATES]).mean(0) for name in names]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)
