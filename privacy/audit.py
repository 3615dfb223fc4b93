"""What canaries say of a mechanism: an estimate of its epsilon, a bound from below, and whether a claim survives them.

A canary is a contribution that was in the data or not, by a fair coin, and left a score: a number that is larger where
it was in. Legend: k is the number of canaries, mu how far the scores of those in lie above the others, in deviations.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy import accounting
from privacy.plan import Mechanism
from privacy.refused import Refused

CONFIDENCE = 0.95
TOLERATED = 1.5
"""An estimate above this many times the claim fails it: noise halved doubles mu and more than doubles epsilon."""
_ERRORS = 3.0
"""Standard errors of mu that an estimate above 1.5 times the claim must lie beyond it."""
_GUESSES = 8
"""Numbers of guesses that are tried for the bound: k, k / 2, ..., each at a share of what may go wrong."""
_BINS = 40
_STILL = 1e-3
"""Scores that spread over less than this share of the distance between in and out hold no noise worth the name."""

Scores = NDArray[np.float64]
Included = NDArray[np.bool_]


@dataclass(frozen=True)
class Verdict:
    """What the canaries say. `estimate` may be infinite: what is released holds no noise."""

    estimate: float
    lower_bound: float
    passed: bool
    reason: str


def verdict(scores: Scores, included: Included, claimed: float, delta: float) -> Verdict:
    """Hold `claimed` epsilon at `delta` against the canaries' scores (k,).

    It fails where the lower bound passes the claim, which happens to a true claim in at most 1 of 20 audits, or where
    the estimate passes 1.5 times the claim, unless chance could be why: a small claim is within the error of the
    estimate. A pass means that these canaries found nothing, not that there is nothing.
    """
    found, bound = estimate(scores, included, delta), lower_bound(scores, included, delta)
    mu = separation(scores, included)
    error = math.sqrt(4 / len(scores) + mu * mu / (2 * len(scores)))  # of a difference of means, and of a deviation
    if bound > claimed:
        reason = f"the lower bound {bound:.4g} is above the claim {claimed:.4g}: the claim is false"
    elif found > TOLERATED * claimed and math.isfinite(mu) and _epsilon(mu - _ERRORS * error, delta) <= claimed:
        reason = f"the estimate {found:.4g} is above the claim {claimed:.4g} by no more than chance: ask more canaries"
        return Verdict(found, bound, True, reason)
    elif found > TOLERATED * claimed:
        what = "the canaries were released without noise" if math.isinf(found) else f"the estimate {found:.4g}"
        reason = f"{what}, more than {TOLERATED:g} times the claim {claimed:.4g}: something adds too little noise"
    else:
        return Verdict(found, bound, True, f"nothing was found against the claim {claimed:.4g}")
    return Verdict(found, bound, False, reason)


def separation(scores: Scores, included: Included) -> float:
    """mu: difference of the means of scores in and out, over their common deviation; infinite where nothing spreads.

    Raises Refused where one of the two groups has fewer than two canaries.
    """
    inside, outside = scores[included], scores[~included]
    if min(len(inside), len(outside)) < 2:
        raise Refused(f"{len(scores)} canaries are too few: at least two must be in and two out, ask for more")
    between = float(inside.mean() - outside.mean())
    if between <= 0:
        return 0.0
    spread = float(inside.std(ddof=1)), float(outside.std(ddof=1))
    if min(spread) < _STILL * between:
        return math.inf
    degrees = len(inside) - 1, len(outside) - 1
    pooled = sum(n * s * s for n, s in zip(degrees, spread, strict=True)) / sum(degrees)
    return between / math.sqrt(pooled)


def estimate(scores: Scores, included: Included, delta: float) -> float:
    """Epsilon at `delta` of the Gaussian mechanism whose outputs look like the scores (Andrew et al. 2023, section 3).

    Both groups are fitted with one deviation, as noise that does not know who is in has. No bound: half of all
    estimates of an exactly accounted mechanism lie above it.
    """
    return _epsilon(separation(scores, included), delta)


def _epsilon(mu: float, delta: float) -> float:
    return max(0.0, mu) if mu <= 0 or math.isinf(mu) else accounting.gaussian(mu, delta)


def lower_bound(scores: Scores, included: Included, delta: float, confidence: float = CONFIDENCE) -> float:
    """With this confidence no mechanism of a smaller epsilon at `delta` gave these scores (Steinke et al. 2023).

    The highest scores are guessed in, as many of the lowest out, the others not. Several numbers of guesses are tried,
    each with its share of 1 - confidence (Bonferroni), and the best bound counts.
    """
    k, order = len(scores), np.argsort(scores, kind="stable")
    right_low, right_high = np.cumsum(~included[order]), np.cumsum(included[order[::-1]])
    halves = sorted({max(1, k // 2 >> i) for i in range(_GUESSES)})
    best = 0.0
    for half in halves:
        right = int(right_low[half - 1] + right_high[half - 1]) if 2 * half <= k else 0
        best = max(best, _least_epsilon(k, 2 * half, right, delta, (1 - confidence) / len(halves), best))
    return best


def _least_epsilon(k: int, guesses: int, right: int, delta: float, chance: float, known: float) -> float:
    """The largest epsilon, to 1e-4, under which so many right guesses have at most this chance; at least `known`."""
    if chance_of(k, guesses, right, known, delta) > chance:
        return known
    low, high = known, known + 1
    while chance_of(k, guesses, right, high, delta) <= chance:
        low, high = high, high + 1
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if chance_of(k, guesses, right, middle, delta) <= chance else (low, middle)
    return low


def chance_of(k: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The most that P(at least `right` of `guesses` on k canaries are right) can be under (epsilon, delta)-DP.

    P(W >= v) + 2 k delta max_i P(v > W >= v - i) / i, W binomial with chance e^epsilon / (e^epsilon + 1) of a right
    guess (Steinke, Nasr and Jagielski 2023, Theorem 5.2).
    """
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, guesses + 1)))])
    counts = np.arange(guesses + 1)
    hit, miss = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    mass = np.exp(logs[-1] - logs - logs[::-1] + counts * hit + counts[::-1] * miss)
    below = np.cumsum(mass[:right][::-1]) / np.arange(1, right + 1)
    return min(1.0, float(mass[right:].sum()) + 2 * k * delta * float(below.max(initial=0.0)))


def evidence(released: Scores, mechanism: Mechanism, steps: int) -> Scores:
    """How much likelier (k,) sums of `steps` steps are with the canary in: the log ratio, up to a constant.

    released: in units of what a canary adds to a step that draws it; then the noise has deviation z sqrt(steps), and
    the canary is in a binomial number of steps. A canary that is out adds nothing; with a population, replace one, it
    adds the opposite. No test tells the two cases better apart (Neyman and Pearson 1933).
    """
    if mechanism.sampling_rate == 1 or mechanism.noise_multiplier == 0:  # linear: the scale does not matter
        return released
    if mechanism.population:
        return _against_none(released, mechanism, steps) - _against_none(-released, mechanism, steps)
    return _against_none(released, mechanism, steps)


def _against_none(released: Scores, mechanism: Mechanism, steps: int) -> Scores:
    """The log ratio against a canary that adds nothing."""
    q, z = mechanism.sampling_rate, mechanism.noise_multiplier
    times = np.arange(steps + 1)
    ways = [math.lgamma(steps + 1) - math.lgamma(j + 1) - math.lgamma(steps - j + 1) for j in times]
    log_chance = np.array(ways) + times * math.log(q) + (steps - times) * math.log1p(-q)
    fit = (2 * released[:, None] * times - times**2) / (2 * steps * z**2)
    return np.asarray(np.logaddexp.reduce(log_chance + fit, axis=1))


def histogram(scores: Scores, included: Included) -> dict[str, list[float]]:
    """{edges, in, out}: how the scores of canaries that were in and of those held out spread; counts per bin."""
    bins = max(4, min(_BINS, round(math.sqrt(len(scores)))))
    edges = np.histogram_bin_edges(scores, bins)
    inside, outside = (np.histogram(part, edges)[0] for part in (scores[included], scores[~included]))
    return {"edges": edges.tolist(), "in": inside.tolist(), "out": outside.tolist()}


def ranking(inside: Scores, outside: Scores, false: float = 0.01) -> tuple[float, float]:
    """(AUC; the share of `inside` that is found where `false` of `outside` is accused) of a threshold on scores."""
    ordered = np.sort(outside)
    below, upto = np.searchsorted(ordered, inside, "left"), np.searchsorted(ordered, inside, "right")
    auc = float((below + upto).mean() / (2 * len(ordered)))
    accused = math.floor(false * len(ordered))
    return auc, float((inside > ordered[len(ordered) - 1 - accused]).mean())
