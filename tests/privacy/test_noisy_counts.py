"""Counts of test results under DP: the sentence of the docstring, both ways."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import accounting, noisy_counts
from privacy.plan import Mechanism


@given(st.integers(0, 500), st.integers(0, 500), st.booleans())
def test_one_test_example_moves_the_counts_by_at_most_the_sensitivity(wrong: int, right: int, is_right: bool) -> None:
    before = np.array([right, right + wrong])
    after = before + np.array([is_right, 1])
    assert np.linalg.norm(after - before) <= noisy_counts.SENSITIVITY


@pytest.mark.parametrize(("multiplier", "fits"), [(20.0, True), (18.0, False), (22.0, False)])
def test_both_counts_get_noise_of_the_mechanism_and_no_other(multiplier: float, fits: bool) -> None:
    random = np.random.default_rng(5)
    drawn = np.array([noisy_counts.noised(40, 50, Mechanism(1.0, 20.0), random) for _ in range(20_000)]) - [40, 50]
    deviations = drawn.std(axis=0) / (multiplier * np.sqrt(2))
    assert np.all(np.abs(deviations - 1) < 0.03) == fits
    assert np.abs(np.corrcoef(drawn.T)[0, 1]) < 0.03
    assert np.all(np.abs(drawn.mean(axis=0)) < 1)


@pytest.mark.parametrize("epsilon", [0.01, 1.0, 30.0])
def test_the_plan_spends_its_budget_over_all_evaluations_and_never_more(epsilon: float) -> None:
    plan = noisy_counts.plan(51, epsilon, None, 80)
    assert plan.delta == 1 / 800
    assert 0.99 * epsilon < accounting.epsilon({plan.mechanism: plan.steps}, plan.delta) <= epsilon


def test_the_accuracy_of_noised_sums_stays_a_share() -> None:
    assert noisy_counts.accuracy(60, 50) == 1.0
    assert noisy_counts.accuracy(-3, 50) == 0.0
    assert noisy_counts.accuracy(20, 50) == 0.4
    assert noisy_counts.accuracy(20, 0) is None
    assert noisy_counts.accuracy(20, -9) is None
