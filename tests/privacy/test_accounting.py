"""Epsilon is checked against the closed form, Opacus' independent accountants and the tables of docs/decisions/002."""

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from privacy import accounting, dp_sgd
from privacy.plan import Mechanism
from privacy.refused import Refused

# (sampling rate, noise multiplier, steps, delta, epsilon of the PLD at 1e-4), measured once with dp-accounting 0.6
SETTINGS = [
    (0.0256, 1.0, 400, 1e-5, 3.2505),
    (0.25, 1.1, 200, 1e-3, 18.2638),
    (1.0, 4.0, 100, 1e-3, 10.2048),
    (0.004, 1.3, 3750, 1e-5, 0.8336),
    (0.01, 1.0, 1000, 1e-5, 1.8282),
    (0.02, 0.5, 1000, 1e-5, 24.3055),
    (0.2, 0.2, 3, 1e-2, 31.5517),
]


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian mechanism (Balle and Wang 2018, Theorem 5)."""

    def surplus(epsilon: float) -> float:
        a, b = 1 / (2 * multiplier), epsilon * multiplier
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta

    return brentq(surplus, 0, 200)


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "known"), SETTINGS)
def test_epsilon_is_within_one_percent_of_the_certified_one(
    rate: float, noise: float, steps: int, delta: float, known: float
) -> None:
    found = accounting.epsilon({Mechanism(rate, noise): steps}, delta)
    assert known * 0.9999 <= found <= known * 1.01


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "known"), SETTINGS[:5])
def test_epsilon_is_never_below_the_lower_bound_of_an_independent_accountant(
    rate: float, noise: float, steps: int, delta: float, known: float
) -> None:
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        composed = accountant._get_dprv(eps_error=0.01, delta_error=delta / 1000)
    lower = composed.compute_epsilon(delta, delta / 1000, 0.01)[0]
    assert accounting.epsilon({Mechanism(rate, noise): steps}, delta) >= lower
    assert known >= lower


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "known"), SETTINGS)
def test_opacus_renyi_bound_lies_above_the_claimed_epsilon(
    rate: float, noise: float, steps: int, delta: float, known: float
) -> None:
    history = {Mechanism(rate, noise): steps}
    assert dp_sgd.epsilon_rdp(history, delta) >= accounting.epsilon(history, delta)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.8, 20), st.integers(1, 60), st.sampled_from([1e-2, 1e-3, 1e-5]))
def test_steps_over_all_data_cost_exactly_one_gaussian(noise: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(noise / math.sqrt(steps), delta)
    found = accounting.epsilon({Mechanism(1.0, noise): steps}, delta)
    assert exact - 1e-9 <= found <= exact * 1.005 + 2e-3


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
