"""What is signed for: dp-accounting's privacy loss distribution at 1e-4, held against Opacus' PRV interval."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import dp_accounting as dp
from dp_accounting import gaussian_mechanism
from dp_accounting.pld import privacy_loss_distribution as pld

from privacy import accounting, dp_sgd, renyi
from privacy.accounting import merged
from privacy.plan import History, Mechanism

ACCOUNTANT = (
    "dp-accounting: PLD (pessimistic connect-the-dots, interval 1e-4), the closed form where every step is over all "
    "data; held against Opacus' PRV interval"
)
FIXED_SIZE = (
    "dp-accounting: Renyi bound of sampling without replacement at replace-one (Wang et al. 2019), or the closed form "
    "as if all were asked, where that is less; no other accountant gives a lower end for it"
)
_SOUND = [*range(2, 25), 320, 512, 1024]
"""Orders at which dp-accounting's bound of sampling without replacement is free of cancellation (decisions/010)."""
INTERVAL = 1e-4
_POINTS = 1 << 21
_EFFORT, _SAMPLED = 400, 45


class Certificate(NamedTuple):
    """Epsilon of one history at one delta, from code that shares nothing with `privacy.fourier`."""

    epsilon: float
    """The claim: an upper bound."""
    low: float | None
    """The lower end of Opacus' PRV interval; None where it gives no answer, as for cohorts of a fixed size."""
    prv: float | None
    """The upper end of it."""

    @property
    def contradicted(self) -> bool:
        """The claim lies below what the other accountant proves was spent at least: one of the two is wrong."""
        return self.low is not None and self.epsilon < self.low


def certify_all(accounts: Sequence[tuple[History, float]]) -> list[Certificate]:
    """One certificate for each (history, delta), the costliest first, until some 6 s of computing are used up.

    In a large fleet the rest keep the bound of `accounting.epsilon`, about a thousandth above, without cross-check:
    what a run claims is what its costliest client spent, and that one is certified.
    """
    bounds = [accounting.epsilon(history, delta) for history, delta in accounts]
    made = [Certificate(bound, None, None) for bound in bounds]
    effort, seen = _EFFORT, set()
    for client in sorted(range(len(accounts)), key=lambda i: -bounds[i]):
        history, delta = accounts[client]
        key = merged(history), delta
        if key not in seen:
            seen.add(key)
            effort -= 1 if all(mechanism.sampling_rate == 1 for mechanism, _ in key[0]) else _SAMPLED
        if effort >= 0:
            made[client] = certify(history, delta)
    return made


def certify(history: History, delta: float) -> Certificate:
    """0.01 to 3 s for each distinct history, once. Nothing ran: 0. Ran without noise: infinity, unchecked."""
    counts = merged(history)
    if any(mechanism.noise_multiplier == 0 for mechanism, _ in counts):
        return Certificate(math.inf, None, None)
    accounting.one_adjacency(mechanism for mechanism, _ in counts)
    if counts and counts[0][0].population:
        return _certify_fixed(counts, delta)
    return _certify(counts, delta) if counts else Certificate(0.0, 0.0, 0.0)


@lru_cache(maxsize=4096)
def _certify(counts: tuple[tuple[Mechanism, int], ...], delta: float) -> Certificate:
    low, high = dp_sgd.epsilon_prv(dict(counts), delta) or (None, None)
    if len(counts) == 1 and counts[0][0].sampling_rate == 1:
        exact = float(gaussian_mechanism.get_epsilon_gaussian(counts[0][0].noise_multiplier, delta))
        return Certificate(exact, low, high)
    interval = INTERVAL
    while max(_width(mechanism) for mechanism, _ in counts) > _POINTS * interval:
        interval *= 10  # an epsilon in the hundreds: a grid of 1e-4 would not fit in memory
    total = None
    for mechanism, count in counts:
        part = _step(mechanism, interval).self_compose(count)
        total = part if total is None else total.compose(part)
    assert total is not None
    coarse = float(renyi.epsilons([dict(counts)], [delta])[0])  # tighter where a step's loss is far below the interval
    return Certificate(min(coarse, float(total.get_epsilon_for_delta(delta))), low, high)


@lru_cache(maxsize=1024)
def _certify_fixed(counts: tuple[tuple[Mechanism, int], ...], delta: float) -> Certificate:
    sampled = dp.rdp.RdpAccountant(_SOUND, dp.NeighboringRelation.REPLACE_ONE)
    for mechanism, count in counts:
        sampled.compose(mechanism.event, count)
    everyone = 1 / math.sqrt(sum(count * (2 / mechanism.noise_multiplier) ** 2 for mechanism, count in counts))
    closed = float(gaussian_mechanism.get_epsilon_gaussian(everyone, delta))
    bound = accounting.epsilon(dict(counts), delta)  # also tries the orders in between
    return Certificate(min(bound, closed, float(sampled.get_epsilon(delta))), None, None)


def _width(mechanism: Mechanism) -> float:
    """The loss of a draw ten deviations out, both ways."""
    z = mechanism.noise_multiplier
    return 20 / z + 1 / z**2


@lru_cache(maxsize=32)
def _step(mechanism: Mechanism, interval: float) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        mechanism.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=mechanism.sampling_rate,
        use_connect_dots=True,
    )
