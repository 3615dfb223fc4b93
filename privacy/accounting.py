"""From what ran to what it cost: may a client join, what has it spent exactly, and the noise that a budget needs.

Every answer is an upper bound on epsilon at delta, mechanisms composed in any order, at add-or-remove adjacency, or at
replace-one where all have a population (`one_adjacency`). What is signed for comes from `privacy.certificate`, which is
never above what is said here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from privacy import fourier, renyi
from privacy.plan import History, Mechanism
from privacy.refused import Refused

_TIGHT = 2e-3
_MARGIN = 1e-4


def default_delta(examples: int) -> float:
    """1 / (10 n): the chance that the guarantee fails stays well below one example's share of the data."""
    return 1 / (10 * examples)


def may_join(histories: Sequence[History], deltas: Sequence[float], budgets: Sequence[float]) -> list[bool]:
    """May each client's history become this one, its next round included, within its budget?

    The Renyi bound answers for all at once, a few microseconds a client; only whom it would refuse is asked exactly.
    A caller with many mechanisms a client keeps `renyi.spent` and adds a round by `renyi.after`: see `renyi.bounds`.
    """
    quick = renyi.epsilons(histories, deltas)
    return [
        bool(bound <= budget) or epsilon(history, delta) <= budget
        for bound, history, delta, budget in zip(quick, histories, deltas, budgets, strict=True)
    ]


def one_adjacency(mechanisms: Iterable[Mechanism]) -> None:
    """Refuse to add up what is promised for different neighbours: their epsilons have no common meaning."""
    if len({mechanism.population > 0 for mechanism in mechanisms}) > 1:
        raise Refused(
            "cohorts of a fixed size (replace one client) cannot be added to what was spent at add-or-remove-one: keep "
            "privacy.sampling as it was for this data, or name another folder by --state"
        )


def merged(history: History) -> tuple[tuple[Mechanism, int], ...]:
    """What ran at least once, sorted, steps over all data as the one Gaussian that they are.

    n steps of multiplier z over all data are exactly one of z / sqrt(n) (Dong, Roth and Su 2022, Corollary 3.3).
    Without noise: a mechanism of multiplier 0.
    """
    counts = sorted((mechanism, count) for mechanism, count in history.items() if count > 0)
    sampled = [(mechanism, count) for mechanism, count in counts if mechanism.sampling_rate < 1]
    if not (full := [(m.noise_multiplier, count) for m, count in counts if m.sampling_rate == 1]):
        return tuple(sampled)
    noiseless = any(noise == 0 for noise, _ in full)
    noise = 0.0 if noiseless else 1 / math.sqrt(sum(count / noise**2 for noise, count in full))
    return (*sampled, (Mechanism(1.0, noise), 1))


def epsilon(history: History, delta: float) -> float:
    """What ran costs at most this; milliseconds for any mix, however long. Nothing ran: 0. Without noise: infinity.

    Only steps over all data: the closed form of the one Gaussian they are. Else the smaller of two bounds, composed
    privacy loss distributions and Renyi. Raises Refused for a delta outside (0, 1).
    """
    if not 0 < delta < 1:
        raise Refused(f"delta must lie between 0 and 1, it is {delta:g}")
    counts = tuple(sorted((mechanism, count) for mechanism, count in history.items() if count > 0))
    one_adjacency(mechanism for mechanism, _ in counts)
    if any(mechanism.noise_multiplier == 0 for mechanism, _ in counts):
        return math.inf
    return _epsilon(counts, delta) if counts else 0.0


@lru_cache(maxsize=65_536)
def _epsilon(counts: tuple[tuple[Mechanism, int], ...], delta: float) -> float:
    if all(mechanism.sampling_rate == 1 for mechanism, _ in counts):
        ((one, _),) = merged(dict(counts))
        return gaussian(1 / one.noise_multiplier, delta)
    bound = float(renyi.epsilons([dict(counts)], [delta])[0])
    if all(mechanism.population for mechanism, _ in counts):  # or as if nobody were drawn by chance
        return min(bound, gaussian(math.sqrt(sum(count * (2 / m.noise_multiplier) ** 2 for m, count in counts)), delta))
    exact = fourier.epsilon(counts, delta)
    return bound if exact is None else min(bound, exact)


def gaussian(mu: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism of sensitivity mu standard deviations, 1e-9 above the closed form at most.

    Balle and Wang 2018, Theorem 8: delta = Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu).
    """

    def delta_at(guess: float) -> float:
        near, far = mu / 2 - guess / mu, mu / 2 + guess / mu
        if far < 30:
            log_tail = math.log(math.erfc(far / math.sqrt(2)) / 2)
        else:  # where it would underflow, a lower bound: x / (x^2 + 1) times the density at x
            log_tail = -far * far / 2 - math.log(2 * math.pi) / 2 + math.log(far / (far * far + 1))
        return math.erfc(-near / math.sqrt(2)) / 2 - math.exp(guess + log_tail)

    low, high = 0.0, 1.0
    if delta_at(low) <= delta:
        return 0.0
    while delta_at(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if delta_at(middle) <= delta else (middle, high)
    return high * (1 + 5e-10)


def calibrate(
    sampling_rate: float, steps: int, budget: float, delta: float, max_noise: float, population: int = 0
) -> float:
    """The noise multiplier with which `steps` steps cost at most `budget`, and at least 0.998 of it.

    One part in 10,000 is left, so that the certificate, computed on another grid, keeps the budget as well.
    Raises Refused when more than `max_noise` would be needed; the message has the smallest epsilon for these steps.
    """

    def cost(noise_multiplier: float) -> float:
        return epsilon({Mechanism(sampling_rate, noise_multiplier, population): steps}, delta)

    if (least := cost(max_noise)) > budget:
        raise Refused(f"epsilon {budget:g} needs more noise than privacy.max_noise={max_noise:g} allows: {least:.4g}")
    allowed = budget * (1 - _MARGIN)
    if least > allowed:
        return max_noise
    low, high = 0.0, max_noise  # cost(low) > allowed >= cost(high)
    guess = min(max_noise, max(0.3, sampling_rate * math.sqrt(2 * steps * math.log(1 / delta)) / budget + 0.3))
    points: list[tuple[float, float]] = []
    for _ in range(60):
        value = cost(guess)
        if (1 - _TIGHT) * budget <= value <= allowed:
            return guess
        low, high = (guess, high) if value > allowed else (low, guess)
        points.append((math.log(guess), math.log(max(value, 1e-9))))
        guess = _secant(points, math.log(budget * (1 - _TIGHT / 2)))
        if not low < guess < high:
            guess = math.sqrt(low * high) if low else high / 2
        if high - low < 1e-6 * high:
            break
    return high


def _secant(points: list[tuple[float, float]], target: float) -> float:
    """log epsilon is almost linear in log noise: the line through the last two points, or slope -1 through the one."""
    (x, y), slope = points[-1], -1.0
    if len(points) > 1 and points[-2][0] != x:
        slope = (y - points[-2][1]) / (x - points[-2][0]) or -1.0
    return math.exp(min(max(x + (target - y) / slope, x - 2), x + 2))


def most_steps(mechanism: Mechanism, budget: float, delta: float, at_most: int = 1 << 20) -> int:
    """The most steps of `mechanism` that cost at most `budget`; `at_most` if that many do."""
    if epsilon({mechanism: at_most}, delta) <= budget:
        return at_most
    quick = _most(lambda steps: float(renyi.epsilons([{mechanism: steps}], [delta])[0]) <= budget, 0, at_most)
    high = max(1, 2 * quick)
    while high < at_most and epsilon({mechanism: high}, delta) <= budget:
        quick, high = high, 2 * high
    return _most(lambda steps: epsilon({mechanism: steps}, delta) <= budget, quick, min(high, at_most))


def _most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest step count that fits, where `low` does and `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
