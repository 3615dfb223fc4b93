"""From what ran to what it cost: epsilon at delta by privacy loss distributions, and the noise that a budget needs."""

import math
from collections.abc import Mapping
from functools import lru_cache

from dp_accounting.pld import privacy_loss_distribution as pld

from privacy.plan import History, Mechanism
from privacy.refused import Refused

ACCOUNTANT = "dp-accounting PLD (pessimistic connect-the-dots, interval 1e-4 to 1e-2 by mechanism)"
ADJACENCY = "add or remove one example"
_TIGHT = 2e-3


def default_delta(examples: int) -> float:
    """1 / (10 n): the chance that the guarantee fails stays well below one example's share of the data."""
    return 1 / (10 * examples)


def epsilon(history: History, delta: float) -> float:
    """An upper bound on epsilon at `delta` for mechanisms composed in any order (add-or-remove adjacency).

    Doroshenko et al. 2022 (connect-the-dots). Steps over all data compose to one Gaussian exactly: n steps of
    multiplier z are one of z / sqrt(n). Nothing ran: 0. Ran without noise: infinity.
    """
    counts = {mechanism: count for mechanism, count in history.items() if count > 0}
    if any(mechanism.noise_multiplier == 0 for mechanism in counts):
        return math.inf
    return _epsilon(tuple(sorted(counts.items())), delta) if counts else 0.0


@lru_cache(maxsize=65_536)
def _epsilon(counts: tuple[tuple[Mechanism, int], ...], delta: float) -> float:
    sampled = [(mechanism, count) for mechanism, count in counts if mechanism.sampling_rate < 1]
    full = sum(count / mechanism.noise_multiplier**2 for mechanism, count in counts if mechanism.sampling_rate == 1)
    # wide enough for speed, narrow against a step's own loss: within 2e-4 of what 1e-4 gives (docs/decisions/002)
    intervals = [min(1e-2, max(1e-3, 0.04 * m.sampling_rate / m.noise_multiplier)) for m, _ in sampled]
    intervals += [min(1e-2, 5e-3 * math.sqrt(full))] if full else []
    interval = min(intervals)
    parts = [_one_step(m.sampling_rate, m.noise_multiplier, interval).self_compose(count) for m, count in sampled]
    parts += [_gaussian(1 / math.sqrt(full), 1.0, interval)] if full else []
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


def _gaussian(deviation: float, rate: float, interval: float) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        deviation, value_discretization_interval=interval, sampling_prob=rate, use_connect_dots=True
    )


@lru_cache(maxsize=4096)
def _one_step(rate: float, noise_multiplier: float, interval: float) -> pld.PrivacyLossDistribution:
    return _gaussian(noise_multiplier, rate, interval)


def calibrate(sampling_rate: float, steps: int, budget: float, delta: float, max_noise: float) -> float:
    """The noise multiplier with which `steps` steps cost at most `budget`, and at least 0.998 of it.

    Raises Refused when more than `max_noise` would be needed; the message has the smallest epsilon for these steps.
    """

    def cost(noise_multiplier: float) -> float:
        return epsilon({Mechanism(sampling_rate, noise_multiplier): steps}, delta)

    if (least := cost(max_noise)) > budget:
        raise Refused(f"epsilon {budget:g} needs more noise than privacy.max_noise={max_noise:g} allows: {least:.4g}")
    low, high = 0.0, max_noise  # cost(low) > budget >= cost(high)
    guess = min(max_noise, max(0.3, sampling_rate * math.sqrt(2 * steps * math.log(1 / delta)) / budget + 0.3))
    points: list[tuple[float, float]] = []
    for _ in range(60):
        value = cost(guess)
        if (1 - _TIGHT) * budget <= value <= budget:
            return guess
        low, high = (guess, high) if value > budget else (low, guess)
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
    """The most steps of `mechanism` that cost at most `budget`, searched up to `at_most`."""
    low, high = 0, 1
    while high <= at_most and epsilon({mechanism: high}, delta) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon({mechanism: middle}, delta) <= budget else (low, middle)
    return low


def worst(histories: Mapping[str, tuple[History, float]]) -> float | None:
    """The largest epsilon of clients given as (history, delta); None for no clients."""
    return max((epsilon(history, delta) for history, delta in histories.values()), default=None)
