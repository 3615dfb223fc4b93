"""The Renyi filter's sentence: whatever rule chooses the steps, what it claims holds; it is never the cheaper claim."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from privacy import accounting, certificate, renyi
from privacy.filter import filtered, order_for
from privacy.plan import Mechanism
from privacy.refused import Refused

mechanisms = st.builds(Mechanism, st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.7, 1.0, 3.0, 8.0]))


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(mechanisms, st.integers(1, 60), min_size=1, max_size=2), st.floats(0.3, 30), st.floats(1e-8, 0.1)
)
def test_it_is_never_below_what_fixed_steps_cost(history: dict[Mechanism, int], budget: float, delta: float) -> None:
    claim = filtered(history, budget, delta)
    assert claim.epsilon >= accounting.epsilon(history, delta) * (1 - 1e-9)
    assert claim.epsilon >= renyi.epsilons([history], [delta])[0] - 1e-9


@pytest.mark.parametrize(("rate", "noise", "steps"), [(1.0, 4.0, 100), (0.05, 1.0, 200)])
def test_it_is_never_below_the_certificate(rate: float, noise: float, steps: int) -> None:
    history = {Mechanism(rate, noise): steps}
    assert filtered(history, 8.0, 1e-5).epsilon >= certificate.certify(history, 1e-5).epsilon


@given(st.floats(1e-3, 100), st.floats(1e-10, 0.4))
def test_the_order_is_near_the_best_for_gaussian_steps_that_reach_the_budget(budget: float, delta: float) -> None:
    order, length = order_for(budget, delta), math.log(1 / delta)
    root = (math.sqrt(length + budget) - math.sqrt(length)) ** 2
    assert order in renyi.ORDERS
    at_best = root + 2 * math.sqrt(root * length)
    assert at_best == pytest.approx(budget, rel=1e-6)
    if 2.5 < 1 + math.sqrt(length / root) < 900:
        assert root * order + length / (order - 1) <= 1.1 * at_best


def released_delta(first: float, then: tuple[float, float], epsilon: float) -> float:
    """Exact delta of: one Gaussian release of `first`, then one whose noise its sign chooses; neighbours 1 apart.

    The outer release on a grid; given it, the inner one has a closed form, in both directions of removing one.
    """
    x = np.linspace(-14 * first, 14 * first, 40_001)
    worst = 0.0
    for here, there in ((0.0, 1.0), (1.0, 0.0)):
        density = norm.pdf(x, here, first)
        loss = norm.logpdf(x, here, first) - norm.logpdf(x, there, first)
        z = np.where(x > 0.5, then[0], then[1])
        left = epsilon - loss  # what the second release may still lose
        inner = norm.cdf(1 / (2 * z) - left * z) - np.exp(np.minimum(left, 700)) * norm.cdf(-1 / (2 * z) - left * z)
        worst = max(worst, float(np.trapezoid(density * np.maximum(inner, 0), x)))
    return worst


@pytest.mark.parametrize("delta", [1e-2, 1e-4])
@pytest.mark.parametrize("budget", [1.0, 4.0])
def test_what_it_claims_holds_for_steps_that_a_release_chose_and_fails_with_less_noise(
    budget: float, delta: float
) -> None:
    first, then = 2.5, (1.5, 40.0)
    most = {Mechanism(1.0, first): 1, Mechanism(1.0, min(then)): 1}  # no choice passes this sum, at any order
    claim = filtered(most, budget, delta)
    assert released_delta(first, then, claim.epsilon) <= delta
    assert released_delta(first / 3, (then[0] / 3, then[1]), claim.epsilon) > delta


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert filtered({}, 8.0, 1e-5).epsilon == 0
    assert math.isinf(filtered({Mechanism(1.0, 0.0): 1}, 8.0, 1e-5).epsilon)


@pytest.mark.parametrize(("budget", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (8.0, 0.0), (8.0, 1.0)])
def test_a_filter_without_budget_or_delta_is_refused(budget: float, delta: float) -> None:
    with pytest.raises(Refused, match="filter"):
        order_for(budget, delta)
