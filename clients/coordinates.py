"""Shared coordinates, both halves: all clients of a round send the same k of an update's P values, so that k sum.

codec=shared-topk:SHARE, k = ceil(SHARE P). `of_round` makes the set of a round from the run's seed, the round and the
updates that were applied, which clients know from the weights: it is public, it travels with the task, and nothing of
it comes back. Half of the set are the coordinates that move fastest, by what came when they were last sent over the
rounds since the time before; the other half is a window that wanders over all, in an order drawn once a run.

Guarantee: every coordinate is in the set at least once in any ceil(P / m) rounds in a row, m = `fresh(k)`.

**Proof.** Window t begins at place (t - 1) m of the order and has m places; ceil(P / m) of them in a row cover the
circle of P. What is there already for its speed takes none of the window's places: more are taken behind it.

A client picks the k values *before* anything is done to protect them: clip, local noise, rounding and encryption see a
vector (k,), and the server sums, noises and combines such vectors; `spread` puts zeros elsewhere, last. What is not
picked stays with the client, as error feedback (Stich et al. 2018), and is sent when its coordinate's turn comes.

Privacy: whatever the residual and whoever chose the set, a client's part in a round is clipped as it leaves, residual
included. So one client moves the sum by at most C in L2, and by nothing outside the set, which is public: the noise of
a sum on its k values, and on nothing else, is the whole mechanism. The residual is the client's own state. Given all
that was released before, a round is a mixture over what that state may be; the bound holds for each, so it does for the
mixture, as divergences are jointly convex. Local DP: likewise, two clipped vectors (k,) are at most 2C apart.
Example-level DP: residual and set are made of gradients that were noised, and cost nothing.

Legend: P is the number of values of an update, k that of shared coordinates; coordinates (k,) uint32 increase.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from clients.codecs import largest
from privacy.refused import Refused
from scenarios.seeds import derive
from scenarios.weights import Vector

Coordinates = NDArray[np.uint32]

_NAME = "shared-topk"
_VALUES = ("float32", "float16", "qsgd8")
_FASTEST = 0.5
"""Share of the set that goes by speed (docs/decisions/020)."""


@dataclass(frozen=True)
class Pace:
    """How fast each coordinate moves, as far as applied updates have said."""

    speed: Vector
    """(P,) float32: magnitude of what was last sent, over the rounds that it was gathered in; 0: never sent."""
    sent: NDArray[np.uint32]
    """(P,) the round of that."""


@lru_cache
def split(codec: str) -> tuple[float | None, str]:
    """(SHARE of the setting `codec`, None where all coordinates are sent; the codec of the values that are sent).

    Raises Refused for a share that is none, and for values whose codec chooses coordinates itself.
    """
    name, *said = codec.split(":", 2)
    if name != _NAME:
        return None, codec
    values = said[1] if len(said) > 1 else "float32"
    try:
        share = float(said[0]) if said else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise Refused(f"codec={codec}: the share must be above 0 and at most 1, as in {_NAME}:0.05")
    if values not in _VALUES and not values.startswith("int"):
        raise Refused(f"codec={codec}: the values may be {', '.join(_VALUES)} or intN, as in {_NAME}:0.05:int16")
    return share, values


def joined(share: float | None, values: str) -> str:
    """The setting `codec`: the reverse of `split`."""
    return values if share is None else f"{_NAME}:{share!r}:{values}"


def count(share: float | None, size: int) -> int:
    """k for updates of P = `size` values; P where all are sent."""
    return size if share is None else ceil(share * size)


def fresh(count: int) -> int:
    """m: of `count` coordinates those that the window has places for, at least 1."""
    return count - int(_FASTEST * count)


# ---- the server's half ----


def of_round(share: float, size: int, seed: int, number: int, pace: Pace | None) -> Coordinates:
    """The set of round `number`. seed: of the run. pace: after the last applied update; None: there was none."""
    wanted, order = count(share, size), np.random.default_rng(derive(seed, "coordinates")).permutation(size)
    chosen = np.zeros(size, bool)
    if pace is not None:
        chosen[largest(pace.speed, wanted - fresh(wanted))] = True
    wandering = np.roll(order, -((number - 1) * fresh(wanted) % size))
    chosen[wandering[~chosen[wandering]][: wanted - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen).astype(np.uint32)


def paced(pace: Pace | None, update: Vector, coordinates: Coordinates, size: int, number: int) -> Pace:
    """`pace` (P,) once `update` (k,) of round `number` was applied. Residuals began with the first that was."""
    before = pace or Pace(np.zeros(size, np.float32), np.full(size, number - 1, np.uint32))
    speed, sent = before.speed.copy(), before.sent.copy()
    speed[coordinates] = np.abs(update) / (number - sent[coordinates]).astype(np.float32)
    sent[coordinates] = number
    return Pace(speed, sent)


def spread(update: Vector, coordinates: Coordinates, size: int) -> Vector:
    """`update` (k,) as an update (P,): zeros where nothing was sent."""
    whole = np.zeros(size, np.float32)
    whole[coordinates] = update
    return whole


# ---- the client's half ----


def hold_to(coordinates: Coordinates | None, share: float | None, size: int) -> None:
    """Refuse coordinates that are not what a client that sends `share` of P = `size` values is to be told."""
    if share is None:
        if coordinates is not None:
            raise Refused("the task names coordinates, and this node's settings send all of them")
        return
    if coordinates is None:
        raise Refused("the task is without the coordinates that this node's settings ask for")
    wanted = count(share, size)
    if coordinates.dtype != np.uint32 or coordinates.shape != (wanted,):
        raise Refused(f"the task names {coordinates.size} coordinates, this node's settings ask for {wanted}")
    if (coordinates >= size).any() or (coordinates[1:] <= coordinates[:-1]).any():
        raise Refused(f"the task's coordinates must increase and lie below {size}")


def picked(update: Vector, residual: Vector | None, coordinates: Coordinates) -> tuple[Vector, Vector | None]:
    """(the values (k,) to be sent of update (P,) plus residual (P,), the next residual: zero where they are sent).

    Where the sum is not finite, so is nothing that is sent of it, and the residual stays as it was.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # looked at in the next line
        whole = update.copy() if residual is None else update + residual
    if not np.isfinite(whole).all():
        return np.full(len(coordinates), np.nan, np.float32), residual
    sent = whole[coordinates]
    whole[coordinates] = 0
    return sent, whole
