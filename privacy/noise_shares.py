"""Client-level DP with noise in shares: each client adds its own before its update is hidden; both halves in one file.

Guarantee: the integers of a `Grid` (privacy/integers.py) are at most `norm` long, and each of n clients adds `share` to
its own. Let h of the n be honest. Whoever sees the sum alone, and knows what the n - h others sent, sees, but for a
chance of at most 2^-`_RARE` a value, client and round, what some function that knows no data makes of the sum of the
integers plus a *continuous Gaussian* of standard deviation z norm. So a round is a `Mechanism(1.0, z)` step at
sensitivity `norm`, by every accountant of Gaussians, and all that may fail in a run is taken off delta (`CHANCE`). One
change of the data is one client's update against none (zeros): who took part is known. Fewer than h: nothing is said.

**Proof.** D(v) is the discrete Gaussian on the integers, P(k) in proportion to exp(-k^2 / 2v) (Canonne, Kamath and
Steinke 2020). By Poisson's sum, for v >= 1 and any real c, the sum of exp(-(j - c)^2 / 2v) over all integers j is
sqrt(2 pi v) (1 + r), |r| <= rho(v) = 2.1 exp(-2 pi^2 v). Two distributions whose masses differ by factors of 1 + r,
up to one constant, are at most 1.01 rho apart in total variation. Three times that is all there is to show:

1. *Sums.* D(v) + D(w) is D(v + w) up to rho(vw / (v + w)): complete the square in the sum over j of
   exp(-j^2 / 2v - (k - j)^2 / 2w) (Kairouz, Liu and Steinke 2021). B D(v) + D(w) is D(B^2 v + w) up to
   rho(vw / (B^2 v + w)), the same over multiples of B.
2. *Domination.* For integer x, x + D(v) is, up to rho(b), what comes of y = x + N(0, v - b) and then of drawing k in
   proportion to exp(-(k - y)^2 / 2b) (Peikert 2010, Theorem 3.1): the Gaussians in y convolve to
   exp(-(k - x)^2 / 2v), and what the second draw is divided by is the same for all y up to rho(b). It sees y alone.
3. h shares D(v) are D(hv) by 1, dominated by N(0, hv - b) by 2; `variance` makes hv - b at least (z norm / step)^2.
   The shares of the others only add to what is seen.

With b = 8, v >= 16 every rho is below 2^-226; a share beyond 16 standard deviations is clamped, P <= 2 exp(-128) <
2^-183; what is drawn from tables is 2^-200 off. Together: below 2^-180 a value, client and round.

Legend: P values, h honest clients, z the noise multiplier, v a variance in steps^2.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privacy import accounting, cohort_noise
from privacy.integers import Grid, Integers
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused

CHANCE = 2.0**-40
"""Taken off delta for a whole run. A distance of eta between what is drawn and what is accounted costs (1 + e^epsilon)
eta: 2^72 values x clients x rounds leave eta below 2^-108, which 2^-40 covers up to epsilon 47, twice `MOST_EPSILON`
and nearly so at every delta that a report's curve shows."""
MOST_EPSILON = 25.0
_RARE = 180
_SMOOTH = 8
"""b: variance of the second draw of the proof."""
_LEAST = 2 * _SMOOTH
"""Least variance of a share, so that sums of two are smooth."""
_ONE_TABLE = 2**20
"""Largest variance that is drawn from one table; above, B D(v1) + D(v0)."""
_BASE = 64
"""B."""
_DIGITS = 320
"""Bits of a table's weights while it is made; they are compared at `_COMPARED`."""
_COMPARED = 256
_ENDS = 18
"""A table ends after so many standard deviations: 2 exp(-162) = 2^-232 is beyond."""

Entropy = Callable[[int], bytes]
"""So many random bytes."""
_Signed = NDArray[np.int64]


@dataclass(frozen=True)
class Shares:
    """What a round says of its noise, the same to every client."""

    multiplier: float
    """z, of the sum over `honest` clients, in units of the grid's norm."""
    honest: int
    """h: the fewest honest clients in a sum that is read."""

    def variance(self, grid: Grid) -> int:
        """v of one share: h of them make the noise that is charged, and b for the domination."""
        charged = (self.multiplier * grid.norm / grid.step) ** 2
        return max(_LEAST, math.ceil((charged + _SMOOTH) * (1 + 1e-12) / self.honest))

    def on(self, grid: Grid) -> Grid:
        """`grid` with room for the noise of a share. Raises Refused where its fields would be too wide."""
        return replace(grid, noise=self.variance(grid))


def plan(clients: int, rounds: int, epsilon: float, delta: float | None, clip: float, most: float) -> Plan:
    """The one plan that all clients share, each of `rounds` rounds a step of all clients; `CHANCE` is off its delta.

    Raises Refused for a delta or an epsilon that promises nothing, and where more noise than `most` would be needed.
    """
    if epsilon > MOST_EPSILON:
        raise Refused(f"privacy.epsilon={epsilon:g} is above {MOST_EPSILON:g}, the most that noise shares are made for")
    delta = cohort_noise.client_delta(delta, clients)
    if delta <= 2 * CHANCE:
        raise Refused(f"privacy.delta={delta:g} is below {2 * CHANCE:.2g}, the least that noise shares can keep")
    made = cohort_noise.plan(clients, 1.0, rounds, 0, epsilon, delta - CHANCE, clip, most)
    return replace(made, chance=CHANCE)


def hold_to(
    asked: Shares | None, epsilon: float, delta: float | None, rounds: int, least: int | None, colluding: int
) -> None:
    """Refuse a task of less noise than the node's own settings ask for.

    least: clients whose sum is opened at the fewest, as this node will insist; None: it cannot insist on any number.
    A node does not know how many clients there are: where privacy.delta is unset it checks what any fleet must keep.
    """
    if asked is None or asked.honest < 1 or not 0 < asked.multiplier < math.inf:
        raise Refused("the task is without the noise share that this node's settings ask for")
    allowed = delta or accounting.default_delta(1)
    if accounting.epsilon({Mechanism(1.0, asked.multiplier): rounds}, allowed) > epsilon:
        raise Refused("the task is with a smaller noise share than this node's settings ask for")
    if least is not None and asked.honest > least - colluding:
        raise Refused(
            f"the task spreads the noise over {asked.honest} honest clients, and of the {least} that a sum has at "
            f"the fewest {colluding} may collude (privacy.colluding)"
        )


def added(entries: Integers, grid: Grid, random: Entropy) -> Integers:
    """The client's half: `entries` (P + 2,) of `Grid.quantize` with a share of noise on each of the P values."""
    noise = np.clip(share(grid.noise, grid.size, random), -grid.tail, grid.tail)
    noised = entries.copy()
    noised[:-2] = (entries[:-2].astype(np.int64) + noise).astype(np.uint64)
    return noised


def released(total: NDArray[np.float64], expected: float) -> NDArray[np.float32]:
    """The server's half: the round's update (P,) of a sum that has its noise; the denominator is fixed."""
    return (total / expected).astype(np.float32)


def entropy(seed: int | None) -> Entropy:
    """The operating system's; from `seed` only where no guarantee is claimed."""
    return os.urandom if seed is None else np.random.default_rng(seed).bytes


def share(variance: int, size: int, random: Entropy) -> _Signed:
    """(size,) independent draws of D(variance), each at most 2^-200 off in total variation; whole numbers throughout.

    A large variance is B D(v1) + D(v0) with v0 at least 16 B^2, so that the gaps of B are smooth (proof, 1).
    """
    if variance <= _ONE_TABLE:
        return _drawn(variance, size, random)
    coarse = variance // _BASE**2 - 2 * _SMOOTH
    return _BASE * share(coarse, size, random) + _drawn(variance - _BASE**2 * coarse, size, random)


def _drawn(variance: int, size: int, random: Entropy) -> _Signed:
    """(size,) draws by inversion: how many thresholds are at most a uniform number of `_COMPARED` bits.

    The first 64 bits decide, but for a chance of 2^-48; only then are the others drawn.
    """
    thresholds, heads = _table(variance)
    uniform = np.frombuffer(random(8 * size), "<u8")
    found = np.searchsorted(heads, uniform, side="right")
    for i in np.flatnonzero(heads[np.maximum(found, 1) - 1] == uniform):
        rest = _COMPARED - 64
        whole = int(uniform[i]) << rest | int.from_bytes(random(rest // 8), "little")
        found[i] = bisect_right(thresholds, whole)
    return found.astype(np.int64) - len(thresholds) // 2


@lru_cache(maxsize=16)
def _table(variance: int) -> tuple[list[int], NDArray[np.uint64]]:
    """(the thresholds 2^256 P(D < k) for k from -m + 1 to m; the first 64 bits of each), m = 18 standard deviations.

    exp(-k^2 / 2v) by products of exp(-1 / 2v), in fixed point of 320 bits: k^2 roundings down of 2^-320 each.
    """
    with localcontext() as context:
        context.prec = 120
        half = int((Decimal(-1) / (2 * variance)).exp() * 2**_DIGITS)
    end = math.isqrt(_ENDS**2 * variance) + 1
    weights, factor, square = [1 << _DIGITS], half, half * half >> _DIGITS
    for _ in range(end):
        weights.append(weights[-1] * factor >> _DIGITS)
        factor = factor * square >> _DIGITS
    symmetric = weights[:0:-1] + weights
    total, below, thresholds = sum(symmetric), 0, []
    for weight in symmetric[:-1]:
        below += weight
        thresholds.append((below << _COMPARED) // total)
    heads = np.array([threshold >> (_COMPARED - 64) for threshold in thresholds], np.uint64)
    return thresholds, heads
