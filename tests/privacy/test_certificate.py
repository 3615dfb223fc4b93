"""The certificate is held against tables, the gate's exact epsilon and itself under a wrong claim."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import accounting, certificate, dp_sgd
from privacy.certificate import Certificate
from privacy.plan import Mechanism


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "known"),
    [(0.0256, 1.0, 400, 1e-5, 3.2505), (0.004, 1.3, 3750, 1e-5, 0.8336), (1.0, 4.0, 100, 1e-3, 10.2048)],
)
def test_a_certificate_is_the_pld_at_one_in_ten_thousand_inside_the_prv_interval(
    rate: float, noise: float, steps: int, delta: float, known: float
) -> None:
    found = certificate.certify({Mechanism(rate, noise): steps}, delta)
    assert found.epsilon == pytest.approx(known, abs=6e-5)
    assert found.low is not None
    assert found.prv is not None
    assert found.low <= found.epsilon <= found.prv
    assert not found.contradicted


@settings(max_examples=8, deadline=None)
@given(
    st.dictionaries(
        st.builds(Mechanism, st.sampled_from([0.03, 0.2, 1.0]), st.sampled_from([0.9, 2.0, 10.0])),
        st.integers(1, 100),
        min_size=1,
        max_size=2,
    ),
    st.sampled_from([1e-3, 1e-5]),
)
def test_the_exact_epsilon_is_at_least_the_certified_one_and_at_most_one_percent_above(
    history: dict[Mechanism, int], delta: float
) -> None:
    certified = certificate.certify(history, delta)
    assert certified.epsilon * (1 - 1e-6) <= accounting.epsilon(history, delta) <= certified.epsilon * 1.01
    assert not certified.contradicted


@pytest.mark.parametrize("rate", [0.13, 1.0])
@pytest.mark.parametrize("budget", [0.4, 3.0])
def test_a_calibrated_budget_is_kept_by_the_certificate_too(rate: float, budget: float) -> None:
    noise = accounting.calibrate(rate, 60, budget, 1 / 700, 200.0)
    assert 0.99 * budget <= certificate.certify({Mechanism(rate, noise): 60}, 1 / 700).epsilon <= budget


def test_a_claim_below_what_the_other_accountant_proves_is_a_contradiction() -> None:
    assert Certificate(1.0, 1.01, 1.03).contradicted
    assert not Certificate(1.02, 1.01, 1.03).contradicted
    assert not Certificate(1.0, None, None).contradicted


def test_nothing_run_costs_nothing_and_no_noise_costs_infinity() -> None:
    assert certificate.certify({}, 1e-5) == (0.0, 0.0, 0.0)
    assert certificate.certify({Mechanism(0.5, 0.0): 1}, 1e-5).epsilon == math.inf


def test_a_history_too_loud_for_a_fine_grid_is_certified_on_a_coarser_one() -> None:
    found = certificate.certify({Mechanism(0.5, 0.06): 2}, 1e-5)
    assert 200 < found.epsilon < 700


def test_a_large_fleet_certifies_its_costliest_clients_and_bounds_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "_EFFORT", 62)
    monkeypatch.setattr(certificate, "_SAMPLED", 30)
    mechanism = Mechanism(0.2, 2.0)
    accounts = [({mechanism: steps}, 1e-3) for steps in (5, 40, 40, 20, 10, 40)] + [({Mechanism(1.0, 5.0): 1}, 1e-3)]
    found = certificate.certify_all(accounts)
    checked = [one.low is not None for one in found]
    assert checked == [False, True, True, True, False, True, False]
    for one, (history, delta) in zip(found, accounts, strict=True):
        bound = accounting.epsilon(history, delta)
        assert one.epsilon == (certificate.certify(history, delta).epsilon if one.low is not None else bound)


def test_prv_gives_no_answer_rather_than_a_wrong_one_where_its_grid_would_not_fit() -> None:
    assert dp_sgd.epsilon_prv({Mechanism(0.5, 0.05): 10_000}, 1e-5) is None
    assert dp_sgd.epsilon_prv({}, 1e-5) == (0.0, 0.0)
