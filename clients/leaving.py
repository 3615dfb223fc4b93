"""What leaves the device on which a block was trained: the sum of updates or the updates, in one transfer.

Legend: P is the number of weights, K of clients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients import placement
from privacy import on_device

Made = Callable[[], tuple[Tensor, int]]
"""Gives (an update (P,), the steps taken)."""


@dataclass(frozen=True)
class Part:
    """What is known of one client's share of a sum."""

    steps: int
    within: bool
    """Whether its update was within the clipping norm."""
    unsound: int
    """How many entries of it are not finite; over 0 it is not in the sum."""


def updates(made: Sequence[Made]) -> list[Made]:
    """`made`, whose updates then lie in this machine's memory; what raises, raises when it is called."""
    found = [_tried(partial(_kept, one)) for one in made]
    there = [one[0] for one in found if isinstance(one, tuple)]
    rows = iter(torch.from_numpy(placement.fetched(torch.stack(there)))) if there else iter(())
    return [partial(_raise, one) if isinstance(one, Exception) else partial(_same, next(rows), one[1]) for one in found]


def total(
    made: Sequence[Made], weights: Sequence[float], clip: float
) -> tuple[NDArray[np.float64] | None, list[Part | Exception]]:
    """(the sum (P,) of weights times updates, each clipped where `clip` is not 0, None without any; what came of each).

    The same as one by one in this machine's memory, to rounding.
    """
    summed: Tensor | None = None
    told, parts = list[Tensor](), list[Part | Exception]()
    for one, weight in zip(map(_tried, made), weights, strict=True):
        if isinstance(one, Exception):
            parts.append(one)
            continue
        update, steps = one
        within = update.new_ones((), dtype=torch.bool)
        if clip:
            update, within = on_device.clipped(update, clip)
        unsound = (~update.isfinite()).sum()
        share = torch.where(unsound == 0, update.double() * weight, 0.0)
        summed = share if summed is None else summed.add_(share)
        told += [within.double(), unsound.double()]
        parts.append(Part(steps, True, 0))
    if summed is None:
        return None, parts
    whole = placement.fetched(torch.cat([summed, torch.stack(told)]))
    notes = iter(whole[len(summed) :].reshape(-1, 2))
    read = [one if isinstance(one, Exception) else _noted(one.steps, next(notes)) for one in parts]
    return whole[: len(summed)], read


def _noted(steps: int, note: NDArray[np.float64]) -> Part:
    return Part(steps, bool(note[0]), int(note[1]))


def _tried(made: Made) -> tuple[Tensor, int] | Exception:
    try:
        return made()
    except torch.AcceleratorError:  # the device's, for all of its clients
        raise
    except Exception as error:
        return error


def _kept(made: Made) -> tuple[Tensor, int]:
    update, steps = made()
    return update.clone(), steps  # the next may overwrite it


def _raise(error: Exception) -> tuple[Tensor, int]:
    raise error


def _same(update: Tensor, steps: int) -> tuple[Tensor, int]:
    return update, steps
