"""How well captions fit their pictures by the vision encoder's own two towers: CLIPScore (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.metrics.base import Figure, Metric, Tested, mean_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pipeline.encoders.vision import TwoTowers

PREFIX, WEIGHT = "A photo depicts ", 2.5
PART = 256  # texts at a time


class CLIPScore(Metric):
    """Without references: WEIGHT * max(cos, 0) of picture and caption, the mean over the captioned test pictures.

    Scores of different encoders do not compare. The published ones are CLIP ViT-B/32's.
    """

    tasks = ("caption",)
    needs_text_tower = True

    def figures(self, tested: Tested) -> list[Figure]:
        from pipeline.encoders.vision import TwoTowers
        from pipeline.metrics.joint import pictures_of

        rows = tested.predictions
        place = {row_id: position for position, row_id in enumerate(tested.images.ids)}
        towers = TwoTowers(tested.params.vision, tested.params.runtime.device)
        pictures = pictures_of(tested, towers, [place[row_id] for row_id in rows["id"]])

        after, before = embedded(towers, list(rows["finetuned"])), embedded(towers, list(rows["pretrained"]))
        shuffled = clip_scores(pictures, after.roll(-1, 0))  # what captions get that would fit any picture
        references = of_references(towers, pictures, list(rows["references"]))
        return [
            mean_of("clip_score", clip_scores(pictures, after), "CLIPScore"),
            mean_of("clip_score_pretrained", clip_scores(pictures, before), "CLIPScore before fine-tuning"),
            mean_of("clip_score_shuffled", shuffled, "CLIPScore of the next picture's caption"),
            mean_of("clip_score_references", references, "CLIPScore of the references", baseline=True),
        ]


def embedded(towers: TwoTowers, captions: Sequence[str]) -> Tensor:
    """Captions behind PREFIX, as in the paper: float32 [n, E] of length 1."""
    import torch

    parts = [captions[at : at + PART] for at in range(0, len(captions), PART)]
    return torch.cat([towers.texts([PREFIX + text for text in part]) for part in parts])


def of_references(towers: TwoTowers, pictures: Tensor, references: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each picture [n, E] the mean score of its references; pictures without any are left out."""
    import numpy as np

    at = np.array([i for i, texts in enumerate(references) for _ in texts], int)
    scores = clip_scores(pictures[at], embedded(towers, [text for texts in references for text in texts]))
    counts = np.bincount(at)
    return np.bincount(at, scores)[counts > 0] / counts[counts > 0]


def clip_scores(pictures: Tensor, texts: Tensor) -> np.ndarray:
    """The scores [n] of pictures and texts, row by row; both [n, E] of length 1."""
    found: np.ndarray = WEIGHT * (pictures * texts).sum(1).clamp(min=0).double().numpy()
    return found
