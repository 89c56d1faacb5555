"""A namer: which class a picture is of, with probabilities, from its tokens and an adapter; no LLM."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import UserError, reason
from pipeline.naming.discriminant import Discriminant
from pipeline.naming.nearest import Nearest
from pipeline.naming.weigh import combined
from pipeline.runs import remedy

WEIGHTS, TEXTS = "namer.safetensors", "namer.json"


@dataclass(frozen=True)
class Scales:
    """What the scores of the two parts are multiplied by: each alone, and in their sum."""

    emd: float
    discriminant: float
    together: tuple[float, float]


@dataclass(frozen=True)
class Namer:
    """Names, the two parts that score them, and what makes probabilities of the scores.

    `val_loss` is minus the mean log-probability of the right names of validation pictures, by both parts.
    """

    names: list[str]
    nearest: Nearest
    discriminant: Discriminant
    scales: Scales
    val_loss: float

    def rules(self, tokens: Tensor, adapted: Tensor) -> dict[str, Tensor]:
        """Log-probabilities of the names by each of RULES, [B, C]; tokens [B, N, D_img], adapted [B, M, D]."""
        return by_rule(self.nearest.scores(adapted), self.discriminant.scores(tokens).cpu(), self.scales)

    def save(self, folder: Path) -> None:
        """Write namer.safetensors and namer.json."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors, texts = _split(self.nearest)
        tensors |= _split(self.discriminant)[0]
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
        texts |= {"names": self.names, "scales": asdict(self.scales), "val_loss": self.val_loss}
        (folder / TEXTS).write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, threads: int) -> Namer:
        """Raises UserError naming the file that is missing or is not what `save` wrote."""
        try:
            texts, tensors = json.loads((folder / TEXTS).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
            names, scales, loss = (texts.pop(key) for key in ("names", "scales", "val_loss"))
            discriminant = Discriminant(tensors.pop("weight"), tensors.pop("discriminant_bias"))
            nearest = Nearest(**{"into_space": None, **tensors, **texts, "threads": threads})
            return cls(names, nearest, discriminant, Scales(**scales | {"together": tuple(scales["together"])}), loss)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(folder, f"cannot be loaded as a namer ({reason(error)})", remedy(folder.parent)) from None


def _split(part: Nearest | Discriminant) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a part by their names, and the rest."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    if isinstance(part, Discriminant):
        values["discriminant_bias"] = values.pop("bias")
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in values.items() if key not in tensors and value is not None}
    return tensors, {key: value for key, value in rest.items() if key != "threads"}


def by_rule(emd: Tensor, discriminant: Tensor, scales: Scales) -> dict[str, Tensor]:
    """Log-probabilities by each of RULES, [n, C], from the scores of both parts."""
    first, second = scales.together
    return {
        "emd": (scales.emd * emd).log_softmax(1),
        "discriminant": (scales.discriminant * discriminant).log_softmax(1),
        "namer": combined({"emd": emd, "discriminant": discriminant}, {"emd": first, "discriminant": second}),
    }
