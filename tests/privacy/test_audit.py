"""The audit's statistics against closed forms, slow binomials and mechanisms whose epsilon is known exactly."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from privacy import accounting, audit
from privacy.plan import Mechanism
from privacy.refused import Refused


def gaussian(seed: int, mu: float, k: int = 5000) -> tuple[audit.Scores, audit.Included]:
    random = np.random.default_rng(seed)
    included = random.random(k) < 0.5
    return random.normal(size=k) + mu * included, included


def randomized_response(seed: int, epsilon: float, k: int = 2000) -> tuple[audit.Scores, audit.Included]:
    """Exactly epsilon-DP: whether a canary was in is told truly with chance e^epsilon / (1 + e^epsilon)."""
    random = np.random.default_rng(seed)
    included = random.random(k) < 0.5
    lie = random.random(k) > 1 / (1 + math.exp(-epsilon))
    return (included ^ lie) + random.random(k) / 10, included


# the estimate


@pytest.mark.parametrize("mu", [0.3, 1.054, 3.162, 10.54])
def test_the_estimate_of_a_gaussian_mechanism_is_its_epsilon(mu: float) -> None:
    exact = accounting.gaussian(mu, 1e-5)
    found = [audit.estimate(*gaussian(seed, mu), 1e-5) for seed in range(40)]
    assert np.median(found) == pytest.approx(exact, rel=0.03)
    assert sum(abs(one / exact - 1) < 0.2 for one in found) >= (38 if mu > 1 else 30)
    assert abs(np.median(found) / accounting.gaussian(2 * mu, 1e-5) - 1) > 0.2  # another mechanism's it is not


def test_scores_without_noise_have_no_finite_estimate_and_scores_of_nothing_have_none() -> None:
    _, included = gaussian(0, 1)
    assert audit.estimate(included.astype(np.float64), included, 1e-5) == math.inf
    assert audit.estimate(included + np.random.default_rng(0).normal(size=5000) * 1e-6, included, 1e-5) == math.inf
    assert audit.estimate(np.zeros(5000), included, 1e-5) == 0
    assert audit.estimate(-included.astype(np.float64), included, 1e-5) == 0


@given(st.floats(-100, 100), st.floats(0.01, 100), st.integers(0, 50))
def test_units_and_origin_of_the_scores_do_not_matter(shift: float, scale: float, seed: int) -> None:
    scores, included = gaussian(seed, 1.5, 200)
    moved = scores * scale + shift
    assert audit.estimate(moved, included, 1e-5) == pytest.approx(audit.estimate(scores, included, 1e-5), rel=1e-6)
    assert audit.lower_bound(moved, included, 1e-5) == audit.lower_bound(scores, included, 1e-5)


def test_canaries_all_in_or_all_out_are_refused() -> None:
    for included in (np.ones(50, bool), np.zeros(50, bool), np.arange(50) == 3):
        with pytest.raises(Refused, match="too few"):
            audit.separation(np.arange(50.0), included)


# the lower bound


def slow_chance(k: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 of Steinke et al. 2023, term by term."""
    law = stats.binom(guesses, math.exp(epsilon) / (1 + math.exp(epsilon)))
    mass = law.pmf(range(guesses + 1)).tolist()
    tail = sum(mass[right:])
    gaps = [sum(mass[max(0, right - i) : right]) / i for i in range(1, k + 1)]
    return min(1.0, tail + 2 * k * delta * max(gaps))


@given(st.data())
def test_the_chance_of_right_guesses_is_the_theorem_s(data: st.DataObject) -> None:
    k = data.draw(st.integers(2, 60))
    guesses = data.draw(st.integers(1, k))
    right = data.draw(st.integers(0, guesses))
    epsilon, delta = data.draw(st.floats(0, 8)), data.draw(st.sampled_from([0.0, 1e-5, 1e-3]))
    found = audit.chance_of(k, guesses, right, epsilon, delta)
    assert found == pytest.approx(slow_chance(k, guesses, right, epsilon, delta), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 4.0])
def test_the_bound_is_below_an_exactly_known_epsilon_in_95_of_100_and_near_it(epsilon: float) -> None:
    bounds = [audit.lower_bound(*randomized_response(seed, epsilon), 0.0) for seed in range(100)]
    assert sum(bound <= epsilon for bound in bounds) >= 95
    assert np.median(bounds) > 0.75 * epsilon - 0.05
    assert sum(bound <= 0.7 * epsilon for bound in bounds) <= 50 or not epsilon


def test_the_bound_asks_for_less_where_delta_is_large() -> None:
    scores, included = gaussian(1, 3.0)
    bounds = [audit.lower_bound(scores, included, delta) for delta in (0.0, 1e-6, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 3
    assert bounds[-1] < 0.5


def test_the_bound_is_the_best_of_its_numbers_of_guesses() -> None:
    """Against a search on a grid of epsilons."""
    scores, included = gaussian(2, 2.0, 64)
    order, best = np.argsort(scores), 0.0
    for half in (32, 16, 8, 4, 2, 1):
        right = int((~included[order[:half]]).sum() + included[order[-half:]].sum())
        grid = (epsilon for epsilon in np.arange(0, 4, 0.05))
        best = max([best, *(e for e in grid if slow_chance(64, 2 * half, right, e, 1e-5) <= 0.05 / 6)])
    assert best > 0.3
    assert best - 1e-3 <= audit.lower_bound(scores, included, 1e-5) <= best + 0.051


# the verdict


def test_the_verdict_fails_by_the_bound_by_the_estimate_and_for_missing_noise() -> None:
    scores, included = gaussian(3, 3.162)
    claim = accounting.gaussian(3.162, 1e-5)
    assert audit.verdict(scores, included, claim, 1e-5).passed
    low = audit.verdict(scores, included, 1.0, 1e-5)
    assert not low.passed
    assert "lower bound" in low.reason
    between = audit.verdict(scores, included, claim / 1.7, 1e-5)
    assert not between.passed
    assert "1.5 times" in between.reason
    silent = audit.verdict(included.astype(np.float64), included, 100.0, 1e-5)
    assert not silent.passed
    assert "without noise" in silent.reason


def test_a_small_claim_is_not_failed_by_the_error_of_its_estimate_and_a_false_one_is() -> None:
    small = accounting.gaussian(0.02, 1e-5)
    said = [audit.verdict(*gaussian(seed, 0.02), small, 1e-5) for seed in range(60)]
    assert any(one.estimate > 1.5 * small for one in said)
    assert all(one.passed for one in said)
    assert any("chance" in one.reason for one in said)
    assert not any(audit.verdict(*gaussian(seed, 0.3), small, 1e-5).passed for seed in range(60))


# what the canaries left, and how well they are told apart


@pytest.mark.parametrize(("q", "steps"), [(0.2, 1), (0.2, 7), (0.9, 3)])
def test_the_evidence_is_the_log_ratio_of_the_two_densities(q: float, steps: int) -> None:
    z, at = 0.8, np.linspace(-3, 6, 40)
    spread = z * math.sqrt(steps)
    inside = sum(stats.binom.pmf(j, steps, q) * stats.norm.pdf(at, j, spread) for j in range(steps + 1))
    truth = np.log(inside / stats.norm.pdf(at, 0, spread))
    assert np.allclose(audit.evidence(at, Mechanism(q, z), steps), truth)


def test_without_sampling_the_evidence_is_what_was_released() -> None:
    at = np.linspace(-3, 6, 40)
    assert np.array_equal(audit.evidence(at, Mechanism(1.0, 0.8), 3), at)
    assert np.array_equal(audit.evidence(at, Mechanism(0.5, 0.0), 3), at)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_the_ranking_is_scikit_learn_s(inside: list[int], outside: list[int]) -> None:
    auc, found = audit.ranking(np.array(inside, float), np.array(outside, float), 0.2)
    truth = roc_auc_score([1] * len(inside) + [0] * len(outside), inside + outside)
    assert auc == pytest.approx(truth)
    rates = [np.mean([one > t for one in inside]) for t in range(-1, 7) if np.mean([one > t for one in outside]) <= 0.2]
    assert found <= max(rates) + 1e-12
    assert np.mean([one > min(inside + outside) - 1 for one in outside]) == 1


def test_the_histogram_counts_every_canary_once() -> None:
    scores, included = gaussian(4, 1.0)
    drawn = audit.histogram(scores, included)
    assert sum(drawn["in"]) == included.sum()
    assert sum(drawn["out"]) == (~included).sum()
    assert len(drawn["in"]) == len(drawn["out"]) == len(drawn["edges"]) - 1 <= 40
