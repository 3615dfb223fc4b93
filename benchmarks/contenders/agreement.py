"""Whether contenders do the same work: the weights of each after one noise-free round, beside those of the truth."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

MEDIAN, LARGEST = 1e-5, 1e-2
MEDIAN_BF16 = 1e-4
"""How far the weights of contenders may be apart, as a share of max|w|: the median entry, and every one. The order of
sums shifts a few entries, as where a rounding decides what a ReLU lets through; other work shifts them all by more. Who
takes products in bf16 shifts all of them by its rounding, and its ratios are said to be of another precision.
"""


class Apart(NamedTuple):
    """|dw| / max|w|; infinite where weights are of another shape or not finite."""

    median: float
    largest: float


def apart(weights: Mapping[str, np.ndarray[Any, Any]], truth: str) -> dict[str, Apart]:
    """How far each is from `truth`."""
    true = weights[truth].astype(np.float64)
    return {name: _apart(one.astype(np.float64), true) for name, one in weights.items()}


def agrees(found: Apart, precision: str = "float32") -> bool:
    """Whether a contender that takes products in `precision` may be set in a ratio."""
    return found.median <= (MEDIAN_BF16 if precision == "bf16" else MEDIAN) and found.largest <= LARGEST


def _apart(one: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> Apart:
    if one.shape != true.shape or not np.isfinite(one).all():
        return Apart(float("inf"), float("inf"))
    difference = np.abs(one - true) / np.abs(true).max()
    return Apart(float(np.median(difference)), float(difference.max()))
