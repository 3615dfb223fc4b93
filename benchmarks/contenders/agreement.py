"""Whether contenders do the same work: the weights of each after one noise-free round, beside those of the truth."""

from collections.abc import Mapping
from typing import Any

import numpy as np

TOLERANCE = 1e-4
"""max|dw| as a share of max|w|: summation orders differ by about 1e-6 after one round, other work by 1e-2 and more."""


def apart(weights: Mapping[str, np.ndarray[Any, Any]], truth: str) -> dict[str, float]:
    """How far each is from `truth`, max|dw| / max|w|; infinite where it is of another shape or not finite."""
    true = weights[truth].astype(np.float64)
    return {name: _distance(one.astype(np.float64), true) for name, one in weights.items()}


def agrees(distance: float) -> bool:
    """Whether a contender may be set in a ratio."""
    return distance <= TOLERANCE


def _distance(one: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> float:
    if one.shape != true.shape or not np.isfinite(one).all():
        return float("inf")
    return float(np.abs(one - true).max() / np.abs(true).max())
