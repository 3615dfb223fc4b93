"""Cohorts of a fixed size: the draw, the bound against dp-accounting and exact arithmetic, accounts that do not mix."""

import math
from collections import Counter
from decimal import Decimal, getcontext
from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import gaussian_mechanism
from scipy import stats

from privacy import accounting, certificate, cohort_noise, dp_sgd, fixed_size, recompute, renyi
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused

PUBLISHED = Mechanism(0.01, 2.0, 10_000), 1000, 1e-5
"""10,000 clients, 100 drawn, noise of one sensitivity, that is of 2C, for 1000 rounds."""


def theirs(mechanism: Mechanism, order: int) -> float:
    """dp-accounting's divergence of one round, replace-one."""
    accountant = dp.rdp.RdpAccountant([float(order)], dp.NeighboringRelation.REPLACE_ONE)
    return float(accountant.compose(mechanism.event)._rdp[0])


# the draw


def test_every_choice_of_the_size_is_equally_likely_and_no_other_size_is_drawn() -> None:
    random, names = cohort_noise.generator(3), list("abcde")
    seen = Counter(tuple(fixed_size.draw(names, 2, random)) for _ in range(4000))
    assert all(len(draw) == 2 and draw == tuple(sorted(draw)) for draw in seen)
    assert len(seen) == 10
    assert stats.chisquare(list(seen.values())).pvalue > 0.001
    poisson = Counter(len(cohort_noise.sample(names, 0.4, random)) for _ in range(4000))
    assert len(poisson) > 3


# the bound


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("noise", [0.2, 1.0, 2.0, 5.0])
def test_a_row_is_dp_accountings_bound(rate: float, noise: float) -> None:
    mechanism = Mechanism(rate, noise, 1000)
    row = renyi.row(mechanism)
    for order in (2, 3, 7, 24, 320, 1024):
        found = row[renyi.ORDERS.tolist().index(order)]
        assert found == pytest.approx(theirs(mechanism, order), rel=2e-9)


def test_where_dp_accountings_differences_cancel_ours_is_lower_and_elsewhere_the_same() -> None:
    noisy, plain = Mechanism(0.5, 30.0, 1000), Mechanism(0.5, 10.0, 1000)
    at_64 = renyi.ORDERS.tolist().index(64)
    assert renyi.row(plain)[at_64] == pytest.approx(theirs(plain, 64), rel=2e-9)
    assert theirs(noisy, 64) > 1.5 * renyi.row(noisy)[at_64] > 0


@pytest.mark.parametrize("sigma", [0.5, 1.0, 5.0, 20.0, 50.0])
def test_the_moments_of_the_likelihood_ratio_are_the_exact_ones(sigma: float) -> None:
    """sum_k (-1)^(l-k) C(l, k) exp(k (k-1) / (2 sigma^2)) in 250 digits, where doubles cancel."""
    getcontext().prec = 250

    def moment(order: int) -> Decimal:
        terms = (
            (-1) ** (order - k) * math.comb(order, k) * (Decimal(k * (k - 1)) / (2 * Decimal(sigma) ** 2)).exp()
            for k in range(order + 1)
        )
        return sum(terms, Decimal(0))

    found = fixed_size._log_moments(sigma, 100)
    for order in (2, 4, 10, 20, 40, 64, 100):
        exact = min(math.log(2) + order * (order - 1) / (2 * sigma**2), float((4 * moment(order)).ln()))
        assert found[order - 2] == pytest.approx(exact, abs=1e-9)


def test_the_sum_moves_by_twice_the_norm_so_the_noise_counts_half() -> None:
    event = Mechanism(0.25, 3.0, 40).event
    assert event == dp.SampledWithoutReplacementDpEvent(40, 10, dp.GaussianDpEvent(1.5))
    alone = dp.rdp.RdpAccountant([2.0], dp.NeighboringRelation.REPLACE_ONE)
    alone.compose(dp.SampledWithoutReplacementDpEvent(10, 10, dp.GaussianDpEvent(1.5)))
    assert alone._rdp[0] == pytest.approx(
        2 / (2 * 1.5**2)
    )  # it takes the multiplier as given: nothing is doubled twice


def test_the_published_setting_costs_what_was_published_and_more_than_poisson_draws() -> None:
    mechanism, rounds, delta = PUBLISHED
    assert accounting.epsilon({mechanism: rounds}, delta) == pytest.approx(3.576, abs=1e-3)
    assert accounting.epsilon({Mechanism(0.01, 1.0): rounds}, delta) < 1.83  # noise of C, add or remove
    assert accounting.epsilon({Mechanism(0.01, 1.0, 10_000): rounds}, delta) == pytest.approx(20.99, abs=0.01)


def test_where_sampling_does_not_help_it_costs_as_if_all_were_asked() -> None:
    half = {Mechanism(0.5, 10.0, 60): 53}
    closed = gaussian_mechanism.get_epsilon_gaussian(5.0 / math.sqrt(53), 1 / 600)
    assert accounting.epsilon(half, 1 / 600) == pytest.approx(closed, rel=1e-8)
    assert renyi.epsilons([half], [1 / 600])[0] > closed


HISTORIES = [
    ({PUBLISHED[0]: 1000}, 1e-5),
    ({Mechanism(0.5, 10.0, 60): 53}, 1 / 600),
    ({Mechanism(0.1, 5.0, 1000): 300, Mechanism(0.02, 2.0, 500): 40}, 1e-4),
]


@pytest.mark.parametrize(("history", "delta"), HISTORIES)
def test_what_is_certified_is_dp_accountings_and_never_above_what_the_gate_and_the_plan_say(
    history: dict[Mechanism, int], delta: float
) -> None:
    certified = certificate.certify(history, delta)
    assert certified.epsilon <= accounting.epsilon(history, delta) <= renyi.epsilons([history], [delta])[0]
    alone = recompute._epsilon({mechanism.figures: count for mechanism, count in history.items()}, delta)
    assert certified.epsilon == pytest.approx(alone, rel=1e-6)
    assert (certified.low, certified.prv, certified.contradicted) == (None, None, False)
    assert dp_sgd.epsilon_rdp(history, delta) is dp_sgd.epsilon_prv(history, delta) is None


def test_the_plan_keeps_its_budget_and_takes_nothing_off_delta() -> None:
    made = cohort_noise.plan(1000, 0.1, 60, 50, 4.0, None, 0.5, 100.0, fixed=True)
    assert (made.mechanism.population, made.chance, made.delta) == (1000, 0.0, 1e-4)
    assert 3.98 < accounting.epsilon({made.mechanism: 60}, made.delta) <= 4
    poisson = cohort_noise.plan(1000, 0.1, 60, 50, 4.0, None, 0.5, 100.0)
    assert poisson.mechanism.noise_multiplier < made.mechanism.noise_multiplier / 2


@pytest.mark.parametrize(("rate", "population"), [(1.0, 20), (0.0, 20), (0.5, 1), (0.5, -3)])
def test_a_cohort_that_is_no_part_of_the_clients_is_no_mechanism(rate: float, population: int) -> None:
    with pytest.raises(ValueError, match="a fixed number"):
        Mechanism(rate, 1.0, population)
    with pytest.raises(Refused, match=r"lower rounds\.fraction"):
        fixed_size.rate(20, 20)


# accounts of different adjacency


def test_a_history_of_two_adjacencies_is_refused_and_never_added_up() -> None:
    fixed = Mechanism(0.5, 3.0, 60)
    for other in (Mechanism(0.5, 3.0), Mechanism(1.0, 3.0)):
        for ask in (accounting.epsilon, certificate.certify):
            with pytest.raises(Refused, match="cannot be added") as caught:
                ask({fixed: 1, other: 1}, 1e-3)
            assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="another adjacency"):
            recompute._epsilon({fixed.figures: 1, other.figures: 1}, 1e-3)
    assert accounting.epsilon({fixed: 1, Mechanism(0.5, 3.0): 0}, 1e-3) > 0
    assert accounting.epsilon({fixed: 1, Mechanism(0.25, 3.0, 80): 1}, 1e-3) > 0


def test_a_ledger_keeps_the_population_and_refuses_the_other_adjacency_without_a_record(tmp_path: Path) -> None:
    path, account = tmp_path / "a.ledger", Account("client", "a", "d")
    fixed, poisson = Mechanism(0.5, 3.0, 60), Mechanism(0.5, 3.0)
    ledger = Ledger(path)
    ledger.open({account: (None, 1e-3)})
    assert ledger.reserve("run", 1, {account: (fixed, 1)}) == {}
    before = path.read_bytes()
    with pytest.raises(Refused, match="cannot be added"):
        ledger.reserve("run", 2, {account: (poisson, 1)})
    assert path.read_bytes() == before
    again = Ledger(path)
    again.read()
    assert again.accounts[account].history == {fixed: 1}
    (row,) = recompute.accounts(recompute.records(path))
    assert row["epsilon"] == pytest.approx(certificate.certify({fixed: 1}, 1e-3).epsilon, rel=1e-6)


def test_a_mechanism_without_population_is_written_as_ever() -> None:
    assert Mechanism(0.5, 3.0).figures == (0.5, 3.0)
    assert Mechanism(*Mechanism(0.5, 3.0, 60).figures) == Mechanism(0.5, 3.0, 60)
    assert np.array_equal(renyi.row(Mechanism(0.5, 3.0)), renyi.row(Mechanism(0.5, 3.0, 0)))
