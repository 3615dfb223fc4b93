"""Combiners: many clients' updates and weights -> one update, or none where too few came.

Legend: C is the number of contributions, P the number of entries of an update. Every combiner sums in float64 in the
order in which the contributions are given, so that equal inputs in equal order give equal bits.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isclose, isfinite

import numpy as np
from numpy.typing import NDArray

from privacy.refused import Refused
from scenarios.settings import Server
from scenarios.weights import Vector

_BLOCK = 1 << 16
"""Entries of an update that Krum's distances take at a time: bounds the float64 copy to 8 * C * _BLOCK bytes."""


@dataclass(frozen=True)
class Contribution:
    """One client's good reply, decoded. The values of the update are finite: the codecs see to that.

    Raises ValueError for what no honest client sends, so that it can cost that client its update and nothing else.
    """

    update: Vector
    """(P,) float32, new weights minus old."""
    weight: float
    """What it weighs in the mean, above 0. The other combiners give every client one vote: a liar names any weight."""
    steps: float
    """Local steps taken, at least 1; with momentum as many as `plain_steps` says."""
    within: bool = True
    """Client-level DP: whether it was within the clipping norm before it was clipped."""

    def __post_init__(self) -> None:
        if self.update.ndim != 1 or self.update.dtype != np.float32:
            raise ValueError(f"an update must be float32 (P,), not {self.update.dtype} {self.update.shape}")
        if not (isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"an update must weigh a finite number above 0, not {self.weight}")
        if self.steps < 1:
            raise ValueError(f"an update must come of at least one local step, not {self.steps}")


Combine = Callable[[Iterable[Contribution], Server], Vector | None]
"""(contributions, settings) -> the combined update (P,), float32; None: fewer came than `least`, apply nothing.

Raises ValueError when the updates differ in length.
"""


def mean(contributions: Iterable[Contribution], server: Server) -> Vector | None:
    """The weighted mean, as a running sum: one pass, O(P) memory (FedAvg, McMahan et al. 2017, Algorithm 1).

    With server.normalize, FedNova (Wang et al. 2020, section 4, for local SGD): with tau_i the steps of client i (the
    length of its a_i, see `plain_steps`) and p_i its share of the weights, tau_eff * sum_i p_i update_i / tau_i,
    tau_eff = sum_i p_i tau_i. Equal steps give the weighted mean.
    """
    total, weight, steps = None, 0.0, 0.0
    for one in contributions:
        scale = one.weight / one.steps if server.normalize else one.weight
        term = one.update.astype(np.float64) * scale
        if total is None:
            total = term
        elif total.shape == term.shape:
            total += term
        else:
            raise ValueError(f"updates of {total.size} and of {term.size} entries cannot be summed")
        weight += one.weight
        steps += one.weight * one.steps
    if total is None:
        return None
    return _float32(total * (steps / weight / weight) if server.normalize else total / weight)


def plain_steps(steps: int, momentum: float) -> float:
    """What `steps` of SGD with momentum weigh their gradients with, summed: as many steps without it go as far.

    ||a_i||_1 of FedNova, a_i = (1 - m^tau, ..., 1 - m) / (1 - m).
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True)
class Summed:
    """Sums over the clients of a round."""

    total: NDArray[np.float64]
    """(P,) updates times weights; zeros where none came."""
    weight: float
    """Of the weights."""
    votes: float
    """+1/2 for every client within the norm, -1/2 for every other."""
    reason: str | None = None
    """Why no sum came of the replies: the round is not applied, and paid for whole."""
    noised: bool = False
    """Whether the central noise of the round is on total and votes already: the key holder put it there."""

    @property
    def mean(self) -> Vector | None:
        """The weighted mean (P,); None where nobody came."""
        return _float32(self.total / self.weight) if self.weight else None


def total(contributions: Iterable[Contribution], size: int) -> Summed:
    """The plain sum of the updates: what client-level DP noises; every client counts once, whatever weight it names."""
    summed, count, votes = np.zeros(size), 0, 0.0
    for one in contributions:
        summed += one.update
        count += 1
        votes += 0.5 if one.within else -0.5
    return Summed(summed, count, votes)


@dataclass(frozen=True)
class Part:
    """One client's share of a sum, part of which may have been made where its block was trained."""

    weight: float
    within: bool
    """Client-level DP: whether its update was within the clipping norm before it was clipped."""
    total: NDArray[np.float64] | None
    """(P,) of this client and those before it that had none."""
    whole: float
    """The weights of all in `total`."""


def of_parts(parts: Iterable[Part], size: int) -> Summed:
    """The sums over the clients of a round, from those of blocks; in the order in which they are given."""
    summed, weight, votes, unread = np.zeros(size), 0.0, 0.0, 0.0
    for one in parts:
        weight += one.weight
        votes += 0.5 if one.within else -0.5
        unread += one.weight
        if one.total is not None:
            if not isclose(unread, one.whole, rel_tol=1e-9):
                break
            summed += one.total
            unread = 0.0
    if unread:
        return Summed(np.zeros(size), 0.0, 0.0, "a block's sum holds other clients than those whose replies are good")
    return Summed(summed, weight, votes)


def median(contributions: Iterable[Contribution], server: Server) -> Vector | None:
    """The median of each coordinate, the mean of the middle two where C is even (Yin et al. 2018, Definition 1)."""
    updates_CP = _gather(contributions, server)
    return None if updates_CP is None else _middle(updates_CP, (len(updates_CP) - 1) // 2)


def trimmed(contributions: Iterable[Contribution], server: Server) -> Vector | None:
    """The mean of each coordinate without its lowest and highest values (Yin et al. 2018, Definition 2).

    Cut at each end: floor(server.trim * C) values, but at least one where server.trim is above 0: with fewer replies
    than 1 / server.trim the plain mean would come out, and one liar would move it anywhere.
    """
    updates_CP = _gather(contributions, server)
    if updates_CP is None:
        return None
    return _middle(updates_CP, max(int(server.trim * len(updates_CP)), int(server.trim > 0)))


def krum(contributions: Iterable[Contribution], server: Server) -> Vector | None:
    """The update that lies nearest to its C - f - 2 nearest ones, f = server.byzantine (Blanchard et al. 2017, eq. 3).

    Its guarantee needs C >= 2f + 3; with fewer nothing is applied. Of equals, the first given.
    """
    updates_CP = _gather(contributions, server)
    return None if updates_CP is None else updates_CP[_by_score(updates_CP, server.byzantine)[0]].copy()


def multikrum(contributions: Iterable[Contribution], server: Server) -> Vector | None:
    """The plain mean of the C - f - 2 updates of the lowest Krum score (Blanchard et al. 2017, section 5).

    C - f - 2 is the most for which resilience is proven (El Mhamdi et al. 2018). Needs C >= 2f + 3, as `krum`.
    """
    updates_CP = _gather(contributions, server)
    if updates_CP is None:
        return None
    chosen = np.sort(_by_score(updates_CP, server.byzantine)[: len(updates_CP) - server.byzantine - 2])
    return _float32(updates_CP[chosen].mean(axis=0, dtype=np.float64))


COMBINERS: dict[str, Combine] = {
    "mean": mean,
    "median": median,
    "trimmed": trimmed,
    "krum": krum,
    "multikrum": multikrum,
}

_LEAST: dict[str, Callable[[Server], int]] = {
    "mean": lambda server: 1,
    "median": lambda server: 1,
    "trimmed": lambda server: 3 if server.trim else 1,
    "krum": lambda server: 2 * server.byzantine + 3,
    "multikrum": lambda server: 2 * server.byzantine + 3,
}


def least(server: Server) -> int:
    """The fewest contributions with which server.combine keeps its promise; with fewer it gives None."""
    return _LEAST[server.combine](server)


def resolve(server: Server) -> Combine:
    """The combiner that server.combine names. Raises Refused for an unknown name or a pair that makes no sense."""
    if server.combine not in COMBINERS:
        raise Refused(f"there is no server.combine={server.combine}: choose one of {', '.join(COMBINERS)}")
    if server.normalize and server.combine != "mean":
        raise Refused(
            f"server.normalize=true rescales a weighted mean, which server.combine={server.combine} is not: "
            "set server.normalize=false or server.combine=mean"
        )
    return COMBINERS[server.combine]


def _gather(contributions: Iterable[Contribution], server: Server) -> Vector | None:
    """All updates as one array (C, P), or None where fewer than `least` came."""
    updates = [one.update for one in contributions]
    return np.stack(updates) if len(updates) >= least(server) else None


def _middle(updates_CP: Vector, cut: int) -> Vector:
    """The mean of each coordinate without its `cut` lowest and `cut` highest values."""
    last = len(updates_CP) - 1 - cut
    ordered_CP = np.partition(updates_CP, (cut, last), axis=0)
    return _float32(ordered_CP[cut : last + 1].mean(axis=0, dtype=np.float64))


def _by_score(updates_CP: Vector, byzantine: int) -> NDArray[np.int64]:
    """Indices of the updates, the lowest Krum score first: the sum of squared distances to the C - f - 2 nearest."""
    count, size = updates_CP.shape
    products_CC = np.zeros((count, count))
    for start in range(0, size, _BLOCK):
        block = updates_CP[:, start : start + _BLOCK].astype(np.float64)
        products_CC += block @ block.T
    norms_C = np.diag(products_CC)
    distances_CC = norms_C[:, None] + norms_C[None, :] - 2 * products_CC
    np.fill_diagonal(distances_CC, np.inf)
    scores_C = np.sort(distances_CC, axis=1)[:, : count - byzantine - 2].sum(axis=1)
    return np.argsort(scores_C, kind="stable")


def _float32(values: NDArray[np.float64]) -> Vector:
    with np.errstate(over="ignore"):  # an infinity is for the server step to refuse
        return values.astype(np.float32)
