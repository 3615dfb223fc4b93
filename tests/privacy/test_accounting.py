"""Epsilon is checked against the closed form, Opacus' independent accountants and the tables of docs/decisions/002."""

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from privacy import accounting, dp_sgd, renyi
from privacy.plan import Mechanism
from privacy.refused import Refused

# (sampling rate, noise multiplier, steps, delta, epsilon of the PLD at 1e-4), measured once with dp-accounting 0.6
SETTINGS = [
    (0.0256, 1.0, 400, 1e-5, 3.2505),
    (0.25, 1.1, 200, 1e-3, 18.2638),
    (1.0, 4.0, 100, 1e-3, 10.2048),
    (0.004, 1.3, 3750, 1e-5, 0.8336),
    (0.01, 1.0, 1000, 1e-5, 1.8282),
    (0.001, 0.8, 2000, 1e-7, 0.8071),
    (0.02, 0.5, 1000, 1e-5, 24.3055),
    (0.2, 0.2, 3, 1e-2, 31.5517),
    (0.05, 2.0, 20_000, 1e-6, 24.4110),
]
# 1000 rounds over 30 mechanisms, delta 1e-5: the PLD at 1e-4 took 7 s
MIXED = Counter(Mechanism((0.005, 0.01, 0.02)[i % 3], round(0.8 + 0.1 * (i % 10), 1)) for i in range(1000))
MIXED_EPSILON = 2.55201

mechanisms = st.builds(Mechanism, st.sampled_from([0.05, 0.2, 0.5, 1.0]), st.sampled_from([0.7, 1.0, 2.5, 5.0]))
histories = st.dictionaries(mechanisms, st.integers(1, 300), min_size=1, max_size=3)
deltas = st.sampled_from([1e-2, 1e-3, 1e-5, 1e-7])


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian mechanism (Balle and Wang 2018, Theorem 5)."""

    def surplus(epsilon: float) -> float:
        a, b = 1 / (2 * multiplier), epsilon * multiplier
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta

    return brentq(surplus, 0, 200) if surplus(0) > 0 else 0.0


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "known"), SETTINGS)
def test_epsilon_is_within_one_percent_of_the_certified_one(
    rate: float, noise: float, steps: int, delta: float, known: float
) -> None:
    found = accounting.epsilon({Mechanism(rate, noise): steps}, delta)
    assert known * 0.9999 <= found <= known * 1.01


def test_a_history_of_thirty_mechanisms_is_within_one_percent_of_the_certified_one() -> None:
    assert len(MIXED) == 30
    assert MIXED_EPSILON * 0.9999 <= accounting.epsilon(MIXED, 1e-5) <= MIXED_EPSILON * 1.01


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "known"), SETTINGS)
def test_epsilon_is_never_below_the_lower_bound_of_an_independent_accountant(
    rate: float, noise: float, steps: int, delta: float, known: float
) -> None:
    history = {Mechanism(rate, noise): steps}
    interval = dp_sgd.epsilon_prv(history, delta)
    assert interval is not None
    low, high = interval
    assert low <= accounting.epsilon(history, delta)
    assert low <= known <= high


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "known"), SETTINGS)
def test_opacus_renyi_bound_lies_above_the_claimed_epsilon(
    rate: float, noise: float, steps: int, delta: float, known: float
) -> None:
    history = {Mechanism(rate, noise): steps}
    assert dp_sgd.epsilon_rdp(history, delta) >= accounting.epsilon(history, delta)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.8, 60), st.integers(1, 60), st.sampled_from([1e-2, 1e-3, 1e-5, 1e-9]))
def test_steps_over_all_data_cost_exactly_one_gaussian(noise: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(noise / math.sqrt(steps), delta)
    found = accounting.epsilon({Mechanism(1.0, noise): steps}, delta)
    assert exact * (1 - 1e-9) - 1e-9 <= found <= exact * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("noise", [1e-3, 0.02, 0.1])
def test_far_beyond_floating_point_a_gaussian_costs_at_least_its_mean_loss(noise: float) -> None:
    mu = 1 / noise
    found = accounting.epsilon({Mechanism(1.0, noise): 1}, 1e-5)
    assert mu * mu / 2 < found < mu * mu / 2 + 5 * mu


@settings(max_examples=20, deadline=None)
@given(histories, deltas, st.randoms(use_true_random=False))
def test_epsilon_does_not_depend_on_the_order(history: dict[Mechanism, int], delta: float, shuffle: Random) -> None:
    items = list(history.items())
    shuffle.shuffle(items)
    assert accounting.epsilon(dict(items), delta) == accounting.epsilon(history, delta)
    assert renyi.epsilons([dict(items)], [delta])[0] == pytest.approx(renyi.epsilons([history], [delta])[0], rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(histories, mechanisms, st.integers(1, 50), deltas)
def test_more_steps_never_cost_less(history: dict[Mechanism, int], more: Mechanism, steps: int, delta: float) -> None:
    after = Counter(history) + Counter({more: steps})
    assert accounting.epsilon(after, delta) >= accounting.epsilon(history, delta) * (1 - 2e-3)
    same = next(iter(history))
    assert accounting.epsilon({same: history[same] + steps}, delta) >= accounting.epsilon({same: history[same]}, delta)


@settings(max_examples=20, deadline=None)
@given(histories, histories, deltas)
def test_two_histories_together_cost_at_most_the_sum_at_the_sum_of_deltas(
    one: dict[Mechanism, int], other: dict[Mechanism, int], delta: float
) -> None:
    together = accounting.epsilon(Counter(one) + Counter(other), 2 * delta)
    assert together <= (accounting.epsilon(one, delta) + accounting.epsilon(other, delta)) * (1 + 2e-3)


@settings(max_examples=20, deadline=None)
@given(histories, deltas)
def test_sampling_costs_at_most_what_all_the_data_costs(history: dict[Mechanism, int], delta: float) -> None:
    whole: Counter[Mechanism] = Counter()
    for mechanism, count in history.items():
        whole[Mechanism(1.0, mechanism.noise_multiplier)] += count
    assert accounting.epsilon(history, delta) <= accounting.epsilon(whole, delta) * (1 + 2e-3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(histories, deltas, st.floats(0.5, 40)), min_size=1, max_size=6))
def test_the_gate_lets_in_exactly_those_whom_the_exact_epsilon_lets_in(
    clients: list[tuple[dict[Mechanism, int], float, float]],
) -> None:
    spent, at, budgets = [list(column) for column in zip(*clients, strict=True)]
    allowed = accounting.may_join(spent, at, budgets)
    assert allowed == [accounting.epsilon(h, d) <= budget for h, d, budget in clients]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_chance_is_refused(delta: float) -> None:
    with pytest.raises(Refused, match="delta must lie between 0 and 1"):
        accounting.epsilon({Mechanism(0.1, 1.0): 1}, delta)


def test_mechanisms_compose_in_any_order_to_more_than_each_alone() -> None:
    one, other = Mechanism(0.1, 1.5), Mechanism(1.0, 8.0)
    both = accounting.epsilon({one: 30, other: 5}, 1e-3)
    assert both == accounting.epsilon({other: 5, one: 30}, 1e-3)
    assert both > max(accounting.epsilon({one: 30}, 1e-3), accounting.epsilon({other: 5}, 1e-3))


def test_nothing_run_costs_nothing_and_no_noise_costs_infinity() -> None:
    assert accounting.epsilon({}, 1e-5) == 0
    assert accounting.epsilon({Mechanism(0.5, 1.0): 0}, 1e-5) == 0
    assert accounting.epsilon({Mechanism(0.5, 0.0): 1}, 1e-5) == math.inf


@pytest.mark.parametrize("rate", [0.05, 0.37, 1.0])
@pytest.mark.parametrize("budget", [0.5, 3.0, 8.0])
def test_calibrated_noise_spends_the_budget_and_never_more(rate: float, budget: float) -> None:
    noise = accounting.calibrate(rate, 114, budget, 1 / 700, 100.0)
    assert 0.995 * budget <= accounting.epsilon({Mechanism(rate, noise): 114}, 1 / 700) <= budget


def test_a_budget_beyond_the_largest_noise_is_refused_with_the_smallest_epsilon() -> None:
    least = accounting.epsilon({Mechanism(1.0, 10.0): 38}, 1e-3)
    with pytest.raises(Refused, match=f"{least:.4g}"):
        accounting.calibrate(1.0, 38, 0.5, 1e-3, 10.0)


def test_the_most_steps_are_the_last_that_keep_the_budget() -> None:
    mechanism = Mechanism(1.0, 20.0)
    most = accounting.most_steps(mechanism, 3.0, 1e-3)
    assert accounting.epsilon({mechanism: most}, 1e-3) <= 3.0 < accounting.epsilon({mechanism: most + 1}, 1e-3)


@pytest.mark.parametrize(
    ("rate", "noise", "budget"), [(0.02, 1.0, 2.0), (0.3, 2.0, 8.0), (1.0, 9.0, 0.05), (1.0, 9.0, 1e9)]
)
def test_the_most_steps_agree_with_a_linear_search_and_stop_at_the_limit(
    rate: float, noise: float, budget: float
) -> None:
    mechanism, limit = Mechanism(rate, noise), 400
    slow = max((n for n in range(limit + 1) if accounting.epsilon({mechanism: n}, 1e-4) <= budget), default=0)
    assert accounting.most_steps(mechanism, budget, 1e-4, limit) == slow
