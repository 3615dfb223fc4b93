"""Renyi rows are held against Opacus' own divergences and against the tighter accountant."""

import math
from collections import Counter

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp

from privacy import accounting, dp_sgd, renyi
from privacy.plan import Mechanism


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("noise", [0.5, 1.0, 5.0])
def test_a_row_holds_the_divergences_that_opacus_computes(rate: float, noise: float) -> None:
    theirs = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=[float(order) for order in renyi.ORDERS])
    np.testing.assert_allclose(renyi.row(Mechanism(rate, noise)), theirs, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize(
    "history",
    [
        {Mechanism(0.0256, 1.0): 400},
        {Mechanism(0.05, 2.0): 20_000, Mechanism(1.0, 30.0): 3},
        {Mechanism(1.0, 4.0): 100},
        {Mechanism(0.2, 0.9): 5, Mechanism(0.01, 1.2): 900},
    ],
)
def test_the_gate_is_above_the_exact_epsilon_and_near_opacus_bound(history: dict[Mechanism, int], delta: float) -> None:
    found = renyi.epsilons([history], [delta])[0]
    assert found >= accounting.epsilon(history, delta)
    # Opacus tries fractional orders below 12 too, so it may be a little tighter
    assert dp_sgd.epsilon_rdp(history, delta) * (1 - 1e-9) <= found <= dp_sgd.epsilon_rdp(history, delta) * 1.25


def test_clients_are_answered_together_as_they_are_alone() -> None:
    one, other = Mechanism(0.1, 1.1), Mechanism(1.0, 7.0)
    histories = [{one: 4, other: 2}, {}, {one: 0}, {other: 50}, {Mechanism(0.3, 0.0): 1}, {one: 10**6}]
    deltas = [1e-5, 1e-5, 1e-3, 1e-3, 1e-5, 1e-7]
    together = renyi.epsilons(histories, deltas)
    alone = [renyi.epsilons([history], [delta])[0] for history, delta in zip(histories, deltas, strict=True)]
    assert together.tolist() == alone
    assert together[1] == together[2] == 0
    assert together[4] == math.inf
    assert renyi.epsilons([], []).shape == (0,)


def test_a_long_history_is_looked_up_once_a_mechanism() -> None:
    history = {Mechanism(0.1, 1.3): 10**9, Mechanism(0.2, 1.3): 10**8}
    renyi.epsilons([history], [1e-5])
    before = renyi.row.cache_info()
    renyi.epsilons([history] * 50, [1e-5] * 50)
    after = renyi.row.cache_info()
    assert after.misses == before.misses
    assert after.hits - before.hits == 100


def test_rounds_added_one_by_one_are_the_history_at_once() -> None:
    mechanisms = [Mechanism(0.1, 1.1), Mechanism(1.0, 7.0), Mechanism(0.02, 0.8)]
    spent, histories = renyi.spent([{}, {}]), [Counter[Mechanism](), Counter[Mechanism]()]
    for number in range(9):
        asked = [mechanisms[number % 3], mechanisms[number % 2]]
        spent = renyi.after(spent, asked, [3, 1])
        histories[0][asked[0]] += 3
        histories[1][asked[1]] += 1
    deltas = [1e-5, 1e-3]
    np.testing.assert_allclose(renyi.bounds(spent, deltas), renyi.epsilons(histories, deltas), rtol=1e-12)


def test_a_row_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        renyi.row(Mechanism(0.1, 1.0))[0] = 0.0
