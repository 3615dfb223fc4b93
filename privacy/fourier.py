"""How much exactly: privacy loss distributions composed in the Fourier domain, in milliseconds for any mix.

One step of a mechanism is dp-accounting's pessimistic probability mass function on the grid of losses h * integers. Its
transform on a cyclic grid of N points is kept; composing is adding n_i log F_i, whatever the n_i are (Koskela et al.
2020, Section 5). Both directions, an example added and one removed, are composed, and the larger epsilon is taken.

**Wrap-around.** Let S be the composed loss over h, an integer, and [a, a + N) the window. A cyclic transform returns
w(j) = sum_m P(S = j + mN), so P(S = j) <= w(j) for every j of the window. What is wanted is
delta(e) = sum_j P(S = j) g(j) with g(j) = max(0, 1 - exp(e - jh)), which grows with j and is at most 1. Then

    delta(e) <= sum_(j in window) w(j) g(j) + P(S >= a + N):

mass of the window stands in w as it is; mass below it is moved up by a multiple of N, where g is no smaller; mass
above it is at most P(S >= a + N) since g <= 1. The last term is at most exp(sum n_i K_i(t) - t h (a + N)) for every
t > 0 (Chernoff), K_i being the logarithm of the moment generating function of step i's own mass function. The least of
these over `_TILTS` is taken off delta, so the result holds for any window; `_window` makes it at most `_TAIL` * delta,
and the mass below as small, which keeps the result tight.

**Rounding.** With unit roundoff u, a transform of mass at most 1 is off by at most eta = 4 u log2 N at any frequency,
so a product of n factors by at most n eta times the product without one of them. By Parseval and Cauchy-Schwarz
the L1 error after the inverse transform is at most (n + 1) eta times the 2-norm of those products over all
frequencies: that, too, is taken off delta, together with the mass at infinite loss.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privacy.plan import Mechanism

if TYPE_CHECKING:
    from dp_accounting.pld import privacy_loss_distribution as pld

Array = NDArray[np.float64]

_TAIL = 1e-6
_INTERVALS = (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)
_TILTS = np.concatenate([-np.geomspace(0.02, 2000, 32), np.geomspace(0.02, 2000, 32)])
_LARGEST = 1 << 18


class _Losses(NamedTuple):
    """One direction of one step."""

    lowest: int
    masses: Array
    """Probability of the losses interval * (lowest + 0, 1, 2 ...)."""
    infinite: float
    """Probability of an infinite loss."""
    cumulants: Array
    """log E exp(t * loss) at every t of _TILTS."""


def epsilon(counts: Sequence[tuple[Mechanism, int]], delta: float) -> float | None:
    """An upper bound on epsilon of `counts` (at least one, all with noise); None if out of reach.

    A window of more than 2^18 points gets a wider interval, which is looser. Out of reach is one that is too wide at
    the widest (an epsilon of a thousand), or a delta that rounding swallows; and cohorts of a fixed size, for which
    there is no tight pair of distributions here: the Renyi bound is their answer.
    """
    if any(mechanism.population for mechanism, _ in counts):
        return None
    interval = min(_interval(mechanism) for mechanism, _ in counts)
    widest = max(20 / m.noise_multiplier + m.noise_multiplier**-2 for m, _ in counts)  # a step's loss, ten deviations
    while interval <= _INTERVALS[0]:
        sides = (0, 1) if widest <= 8 * _LARGEST * interval else ()
        both = [found for side in sides if (found := _one_direction(counts, delta, interval, side)) is not None]
        if len(both) == 2:
            return max(both)
        interval *= 10
    return None


def _interval(mechanism: Mechanism) -> float:
    """The widest interval that adds about a thousandth to epsilon: a tenth of one step's deviation of loss.

    All are whole multiples of 1e-4, and connect-the-dots on a coarser grid dominates the finer: the bound stays at or
    above dp-accounting's at 1e-4.
    """
    deviation = mechanism.sampling_rate * math.sqrt(math.expm1(min(50.0, mechanism.noise_multiplier**-2)))
    return next((width for width in _INTERVALS if width <= 0.1 * deviation), _INTERVALS[-1])


def _one_direction(
    counts: Sequence[tuple[Mechanism, int]], delta: float, interval: float, direction: int
) -> float | None:
    steps = [_one_step(m, interval)[direction] for m, _ in counts]
    times = [count for _, count in counts]
    cumulants = np.array(times, dtype=np.float64) @ np.array([step.cumulants for step in steps])
    start, size = _window(cumulants, _TAIL * delta, interval)
    if size > _LARGEST:
        return None
    rising = _TILTS > 0
    above = math.exp(min(0.0, float((cumulants - _TILTS * interval * (start + size))[rising].min())))
    total = np.zeros(size // 2 + 1, dtype=np.complex128)
    least = np.zeros(size // 2 + 1)
    for mechanism, n in counts:
        logs = _transform(mechanism, interval, direction, size)
        total += n * logs
        np.minimum(least, logs.real, out=least)
    masses = np.maximum(np.roll(np.fft.irfft(np.exp(total), size), -start), 0.0)
    one_less = np.exp(total.real - least)
    rounding = 4 * 2.0**-53 * math.log2(size) * (sum(times) + 1) * math.sqrt(2 * float(one_less @ one_less))
    infinite = sum(n * step.infinite for n, step in zip(times, steps, strict=True))
    left = delta - above - infinite - rounding
    return _epsilon(masses, start, interval, left) if left > 0 else None


def _window(cumulants: Array, tail: float, interval: float) -> tuple[int, int]:
    """First point and size, a power of two, of a window that at most `tail` of the mass lies beyond at either end."""
    edges = (cumulants - math.log(tail)) / _TILTS / interval
    start, end = math.floor(edges[_TILTS < 0].max()), math.ceil(edges[_TILTS > 0].min())
    return start, 1 << max(10, (end - start).bit_length())


@lru_cache(maxsize=2048)
def _one_step(mechanism: Mechanism, interval: float) -> tuple[_Losses, _Losses]:
    """dp-accounting's connect-the-dots (Doroshenko et al. 2022) for removing and for adding an example."""
    from dp_accounting.pld import privacy_loss_distribution as pld  # loaded where something is accounted

    found = pld.from_gaussian_mechanism(
        mechanism.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=mechanism.sampling_rate,
        use_connect_dots=True,
    )
    removed = _losses(found._pmf_remove.to_dense_pmf(), interval)
    return removed, removed if found._symmetric else _losses(found._pmf_add.to_dense_pmf(), interval)


def _losses(pmf: "pld.pld_pmf.DensePLDPmf", interval: float) -> _Losses:
    masses = np.asarray(pmf._probs, dtype=np.float64)
    losses = interval * (pmf._lower_loss + np.arange(len(masses)))
    with np.errstate(divide="ignore"):
        logs = np.log(masses)
    cumulants = np.empty(len(_TILTS))
    for i, tilt in enumerate(_TILTS):
        terms = logs + tilt * losses
        top = terms.max()
        cumulants[i] = top + math.log(np.exp(terms - top).sum())
    return _Losses(int(pmf._lower_loss), masses, float(pmf._infinity_mass), cumulants)


@lru_cache(maxsize=128)
def _transform(mechanism: Mechanism, interval: float, direction: int, size: int) -> NDArray[np.complex128]:
    """(size / 2 + 1,) logarithm of the transform of one step, losses modulo `size`."""
    lowest, masses, _, _ = _one_step(mechanism, interval)[direction]
    folded = np.zeros(size)
    for first in range(0, len(masses), size):
        part = masses[first : first + size]
        folded[: len(part)] += part
    transform = np.fft.rfft(np.roll(folded, lowest))
    transform[np.abs(transform) < 1e-300] = 1e-300
    return np.log(transform)


def _epsilon(masses: Array, start: int, interval: float, delta: float) -> float:
    """The smallest epsilon >= 0 whose hockey-stick divergence is at most delta; masses are of start, start + 1 ..."""
    masses, start = masses[max(0, -start) :], max(0, start)
    gain = -np.expm1(-interval * np.arange(len(masses)))  # of a loss that lies that far above epsilon
    if masses @ -np.expm1(-interval * (start + np.arange(len(masses)))) <= delta:
        return 0.0
    low, high = -1, len(masses)  # divergence at loss `high` <= delta; above it at `low`, or `low` is below the window
    while high - low > 1:
        middle = (low + high) // 2
        if masses[middle:] @ gain[: len(masses) - middle] <= delta:
            high = middle
        else:
            low = middle
    upper = float(masses[high:].sum())
    lower = upper - float(masses[high:] @ gain[: len(masses) - high])
    if upper <= delta or lower <= 0:
        return interval * (start + high)
    return max(0.0, interval * (start + high) + math.log((upper - delta) / lower))
