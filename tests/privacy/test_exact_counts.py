"""Test results as digits: sums of any clients are exact at any bits, and no sum of lies passes for test results."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import exact_counts
from privacy.integers import Grid, Integers

Client = tuple[int, int, float]
"""(examples, correct, mean loss)."""
POINT = 1 << 20


def client() -> st.SearchStrategy[Client]:
    counts = st.integers(0, 10**6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
    return st.tuples(counts, st.floats(-100, 100)).map(lambda drawn: (*drawn[0], drawn[1]))


def summed(grid: Grid, clients: list[Client]) -> Integers:
    return np.sum([exact_counts.entries(grid, *one) for one in clients], axis=0, dtype=np.uint64)


def told(grid: Grid, total: Integers, clients: int) -> tuple[float | None, float] | None:
    values, weight, votes = grid.read(total, clients)
    assert weight == clients
    return exact_counts.read(grid, values, clients, votes)


@given(st.integers(2, 24), st.lists(client(), min_size=1, max_size=12))
def test_what_is_read_off_a_sum_is_exact_but_for_each_losss_own_rounding(bits: int, clients: list[Client]) -> None:
    grid = exact_counts.grid(bits, 12)
    found = told(grid, summed(grid, clients), len(clients))
    if not (examples := sum(count for count, _, _ in clients)):
        assert found is None
        return
    assert found
    loss, share = found
    assert share == sum(right for _, right, _ in clients) / examples
    rounded = sum(round(mean * count * POINT) for count, _, mean in clients)
    assert loss == pytest.approx(float(Fraction(rounded, POINT * examples)), rel=1e-12, abs=1e-300)


@given(st.integers(2, 24), st.lists(client(), min_size=1, max_size=5))
def test_every_entry_is_one_that_a_client_can_have_made(bits: int, clients: list[Client]) -> None:
    grid = exact_counts.grid(bits, 5)
    for one in clients:
        grid.check(exact_counts.entries(grid, *one))


@pytest.mark.parametrize("bits", [2, 16, 24])
def test_the_largest_numbers_of_the_most_clients_carry_nowhere(bits: int) -> None:
    grid = exact_counts.grid(bits, 3)
    most = (2 * grid.top + 1) ** (grid.size // 3) // 2
    assert told(grid, summed(grid, [(most, most, 0.0)] * 3), 3) == (0.0, 1.0)
    with pytest.raises(ValueError, match="more digits"):
        exact_counts.entries(grid, most + 1, 0, 0.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e300])
def test_a_loss_that_is_none_leaves_no_mean_of_all_and_their_counts_as_they_are(loss: float) -> None:
    grid = exact_counts.grid(16, 3)
    assert told(grid, summed(grid, [(10, 5, 0.3), (10, 0, loss)]), 2) == (None, 0.25)


def test_a_client_without_examples_has_no_mean_and_takes_none_from_the_others() -> None:
    grid = exact_counts.grid(16, 3)
    assert told(grid, summed(grid, [(10, 5, 0.25), (0, 0, math.nan)]), 2) == (0.25, 0.5)


@pytest.mark.parametrize("lie", [(10, 40, 0.1), (10, -11, 0.1), (-30, 0, 0.1)], ids=["right", "wrong", "fewer"])
def test_a_sum_that_is_of_no_test_results_is_refused(lie: Client) -> None:
    grid = exact_counts.grid(16, 3)
    with pytest.raises(ValueError, match="no test results"):
        told(grid, summed(grid, [(10, 5, 0.3), (10, 5, 0.3), lie]), 3)
