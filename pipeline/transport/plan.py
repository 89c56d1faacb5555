"""Transport plans of P pairs (image, caption): few of the N * m masses of a pair are not zero, so they are listed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Plan(NamedTuple):
    """Entry e moves mass[e] of its pair from a token to a word; on the CPU, as solvers find it."""

    pair: np.ndarray  # [E] int64
    token: np.ndarray  # [E] int64
    word: np.ndarray  # [E] int64, counted through all captions
    mass: np.ndarray  # [E] float64, sums to 1 in each pair, less what is unmatched


class Entries(NamedTuple):
    """The same by places in the costs, on their device."""

    place: Tensor  # [E] int64, in the flattened costs [B, N, L]
    pair: Tensor  # [E] int64
    mass: Tensor  # [E] float64; of Sinkhorn's plans float32
