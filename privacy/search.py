"""What a search for good settings costs: all its trials composed, or less where only the winner is ever seen.

Guarantee: draw the number of trials by `Repetitions.draw`, in secret; in each trial draw a candidate without looking at
data, run it, score what came out; show the best trial's output and nothing else. Whoever sees that alone learns about
a data set at most what `best_of` says (Papernot and Steinke 2022, Theorems 2 and 6). It is about one kind of
neighbours: a trial's history is of the one account whose data they differ in, and other accounts have figures of their
own. Every trial is to be the same mechanism: nobody may be left out of a later one. It does not hold against whoever
sees the trials, counts them, or times the search; against them only `composed` does.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting.rdp import compute_epsilon, rdp_privacy_accountant

from privacy import accounting
from privacy.plan import History, Mechanism
from privacy.refused import Refused

DISTRIBUTIONS = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}
"""Shapes of the number of trials: Poisson, or the truncated negative binomial of that shape."""


@dataclass(frozen=True)
class Repetitions:
    """The distribution of the number of trials: Poisson (shape infinite), else truncated negative binomial, from 1 on.

    TNB(shape, gamma): P(k) proportional to (1 - gamma)^k Gamma(k + shape) / k!, k >= 1 (Papernot and Steinke 2022,
    Definition 1); geometric for shape 1, logarithmic for shape 0.
    """

    mean: float
    """Expected number of trials, at least 1."""
    shape: float = math.inf

    def __post_init__(self) -> None:
        if not (1 <= self.mean < math.inf and self.shape >= 0):
            raise Refused(f"a search has 1 trial or more on average and a shape of at least 0, not {self.mean:g}")

    @classmethod
    def named(cls, distribution: str, mean: float) -> "Repetitions":
        """Raises Refused for a distribution that is not in DISTRIBUTIONS."""
        if distribution not in DISTRIBUTIONS:
            raise Refused(f"there is no distribution {distribution!r}: choose one of {', '.join(DISTRIBUTIONS)}")
        return cls(mean, DISTRIBUTIONS[distribution])

    @property
    def gamma(self) -> float:
        """The chance to stop after a trial that gives this mean; of the negative binomial alone."""
        return float(rdp_privacy_accountant._gamma_truncated_negative_binomial(self.shape, self.mean))

    def draw(self, random: np.random.Generator) -> int:
        """How many trials to make: a secret. Poisson may say none. No cap is allowed: it would be another distribution.

        random: from the operating system's entropy (`cohort_noise.generator(None)`).
        """
        if self.shape == math.inf:
            return int(random.poisson(self.mean))
        if self.shape == 0:
            return int(random.logseries(1 - self.gamma))
        while True:
            if drawn := int(random.negative_binomial(self.shape, self.gamma)):
                return drawn


def composed(trials: Iterable[History], delta: float) -> float:
    """Epsilon at delta of all trials, each of them seen: their histories added up."""
    total: Counter[Mechanism] = Counter()
    for history in trials:
        total.update(history)
    return accounting.epsilon(total, delta)


def best_of(candidates: Sequence[History], delta: float, repetitions: Repetitions) -> float:
    """Epsilon at delta of the winner alone, by Renyi divergences; infinity where a candidate has no noise.

    candidates: what one trial of each costs the account; nothing for one that does not touch its data, never for one
    that does without noise. A trial of a random candidate is, at every order, at most as divergent as the worst
    candidate, since which one it is does not depend on the data (Renyi divergence is quasi-convex: van Erven and
    Harremoes 2014, Theorem 13).
    """
    rows = []
    for history in candidates:
        accountant = rdp_privacy_accountant.RdpAccountant()
        for mechanism, count in history.items():
            if mechanism.population:
                raise Refused("RepeatAndSelect is not accounted for cohorts of a fixed number: sample them by Poisson")
            if count > 0 and mechanism.noise_multiplier == 0:
                return math.inf
            if count > 0:
                accountant.compose(mechanism.event, count)
        rows.append(accountant._rdp)
    orders = np.array(rdp_privacy_accountant.DEFAULT_RDP_ORDERS, dtype=np.float64)
    one = np.max(rows, axis=0)
    if not one.any():
        return 0.0
    with np.errstate(over="ignore"):  # exp of a large divergence is infinite, and another order decides
        best = rdp_privacy_accountant._compute_rdp_repeat_and_select(orders, one, repetitions.mean, repetitions.shape)
        return float(compute_epsilon(orders, best, delta)[0])
