"""What a search costs: the published figures, the library's own event, and the law of the secret number of trials."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting import SelfComposedDpEvent, dp_event
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from privacy import accounting, cohort_noise, search
from privacy.plan import Mechanism
from privacy.refused import Refused
from privacy.search import Repetitions

ONE = Mechanism(0.01, 1.0)
"""10,000 clients, 100 of them a round, noise multiplier 1."""
RUN = {ONE: 1000}


def test_the_best_of_ten_runs_costs_less_than_ten_runs() -> None:
    assert accounting.epsilon(RUN, 1e-5) == pytest.approx(1.83, abs=5e-3)
    assert search.composed([RUN] * 10, 1e-5) == pytest.approx(6.19, abs=5e-3)
    assert search.best_of([RUN], 1e-5, Repetitions(10)) == pytest.approx(4.33, abs=5e-3)
    assert search.best_of([RUN], 1e-5, Repetitions(50)) == pytest.approx(11.3, abs=0.05)


@pytest.mark.parametrize("shape", [math.inf, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("mean", [1, 10])
def test_one_candidate_costs_what_the_event_of_dp_accounting_costs(shape: float, mean: float) -> None:
    accountant = RdpAccountant()
    accountant.compose(dp_event.RepeatAndSelectDpEvent(SelfComposedDpEvent(ONE.event, 1000), mean, shape))
    assert search.best_of([RUN], 1e-5, Repetitions(mean, shape)) == pytest.approx(accountant.get_epsilon(1e-5))


def test_a_random_candidate_costs_no_less_than_any_of_them_and_no_more_than_a_mechanism_above_all() -> None:
    candidates = [{Mechanism(0.01, 1.0): 400}, {Mechanism(1.0, 20.0): 50}]
    both = search.best_of(candidates, 1e-5, Repetitions(5))
    alone = [search.best_of([one], 1e-5, Repetitions(5)) for one in candidates]
    assert max(alone) <= both
    assert both <= search.best_of([{**candidates[0], **candidates[1]}], 1e-5, Repetitions(5))


def test_a_candidate_that_does_not_touch_the_data_adds_nothing_to_the_others() -> None:
    assert search.best_of([RUN, {}], 1e-5, Repetitions(5)) == search.best_of([RUN], 1e-5, Repetitions(5))


@pytest.mark.parametrize("order", [1.5, 2, 8, 32])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("noises", [(1.0, 3.0), (2.0, math.inf)])
def test_a_random_candidate_is_at_no_order_more_divergent_than_the_worst(
    order: float, share: float, noises: tuple[float, float]
) -> None:
    """By integration. A noise of infinity: a candidate that does not touch the data, here N(0, 1) whatever they are."""
    x = np.linspace(-80, 80, 200_001)

    def density(shift: float) -> np.ndarray:
        parts = [stats.norm.pdf(x, shift, z) if math.isfinite(z) else stats.norm.pdf(x) for z in noises]
        return share * parts[0] + (1 - share) * parts[1] + np.finfo(float).tiny

    ratio = order * np.log(density(1.0)) - (order - 1) * np.log(density(0.0))
    mixed = math.log(float(np.trapezoid(np.exp(ratio), x))) / (order - 1)
    worst = max(order / (2 * z**2) for z in noises)
    assert 0.01 * worst < mixed <= worst * (1 + 1e-6)


def test_trials_without_noise_cost_infinity_and_no_trial_nothing() -> None:
    assert search.best_of([RUN, {Mechanism(1.0, 0.0): 1}], 1e-5, Repetitions(3)) == math.inf
    assert search.composed([RUN, {Mechanism(1.0, 0.0): 1}], 1e-5) == math.inf
    assert search.best_of([{}], 1e-5, Repetitions(3)) == 0


def test_cohorts_of_a_fixed_number_have_no_account_of_a_winner_alone() -> None:
    with pytest.raises(Refused, match="fixed number"):
        search.best_of([{Mechanism(0.1, 2.0, 100): 5}], 1e-5, Repetitions(3))


def truncated_negative_binomial(shape: float, gamma: float) -> Callable[[int], float]:
    """P(k), k >= 1, of Papernot and Steinke 2022, Definition 1; the logarithmic law where shape is 0."""
    if shape == 0:
        return lambda k: float(stats.logser.pmf(k, 1 - gamma))
    none = float(stats.nbinom.pmf(0, shape, gamma))
    return lambda k: float(stats.nbinom.pmf(k, shape, gamma)) / (1 - none) if k else 0.0


LAWS = [(10, math.inf), (2, math.inf), (5, 1.0), (5, 0.0), (4, 0.5)]


@pytest.mark.parametrize(("mean", "shape"), LAWS)
def test_the_number_of_trials_follows_its_law_and_not_one_of_another_mean(mean: float, shape: float) -> None:
    wanted = Repetitions(mean, shape)
    random = np.random.default_rng(1)
    draws = np.array([wanted.draw(random) for _ in range(4000)])

    def fit(other: Repetitions) -> float:
        """p-value of the chi-squared test of `draws` against the law of `other`; cells of at least 20 expected."""
        law = (
            (lambda k: float(stats.poisson.pmf(k, other.mean)))
            if math.isinf(shape)
            else truncated_negative_binomial(shape, other.gamma)
        )
        expected = [len(draws) * law(k) for k in range(200)]
        cells = [k for k in range(200) if expected[k] >= 20]
        seen = [int((draws == k).sum()) for k in cells]
        rest = len(draws) - sum(expected[k] for k in cells)
        return float(stats.chisquare([*seen, len(draws) - sum(seen)], [*(expected[k] for k in cells), rest]).pvalue)

    assert fit(wanted) > 0.01
    assert fit(Repetitions(mean * 1.15, shape)) < 0.001
    assert draws.mean() == pytest.approx(mean, rel=0.08)
    assert math.isinf(shape) or draws.min() == 1


def test_the_secret_number_comes_from_the_systems_entropy() -> None:
    drawn = {tuple(Repetitions(50).draw(cohort_noise.generator(None)) for _ in range(8)) for _ in range(4)}
    assert len(drawn) == 4


def test_a_search_of_less_than_a_trial_or_of_an_unknown_law_is_refused() -> None:
    for mean in (0, 0.5, -1, math.nan, math.inf):
        with pytest.raises(Refused, match="1 trial or more"):
            Repetitions(mean)
    with pytest.raises(Refused, match="poisson, geometric, logarithmic"):
        Repetitions.named("uniform", 10)
