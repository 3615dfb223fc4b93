"""DP-FTRL: the sensitivity over every way to take part, the noise both ways, the proof's corners, what it gains."""

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import binom

from privacy import accounting, matrix_noise
from privacy.matrix_noise import BandedNoise, coefficients, turns
from privacy.plan import Mechanism
from privacy.refused import Refused

Array = NDArray[np.float64]


def matrix(bands: int, rounds: int) -> Array:
    """C (T, T), lower triangular and Toeplitz, as a matrix."""
    made = np.zeros((rounds, rounds))
    for i, value in enumerate(coefficients(bands)[:rounds]):
        made += np.diag(np.full(rounds - i, value), -i)
    return made


def patterns(bands: int, rounds: int) -> Iterator[list[int]]:
    """Every way to take part at most once in any `bands` consecutive rounds."""
    for bits in product((0, 1), repeat=rounds):
        chosen = [t for t, bit in enumerate(bits) if bit]
        if all(later - earlier >= bands for earlier, later in zip(chosen, chosen[1:], strict=False)):
            yield chosen


def sensitivity(c_TT: Array, chosen: list[int]) -> float:
    """The furthest that C G moves in L2 when the rows `chosen` of G move by unit vectors of any direction.

    ||sum_t c_t u_t^T||^2 = sum_st (c_s . c_t) (u_s . u_t), at most sum_st |c_s . c_t|.
    """
    columns = c_TT[:, chosen]
    return math.sqrt(np.abs(columns.T @ columns).sum())


# the docstring's sentence: k participations are k steps


@pytest.mark.parametrize(("bands", "rounds"), [(1, 6), (2, 9), (3, 10), (4, 12), (7, 12)])
def test_k_participations_are_never_more_sensitive_than_k_steps_and_almost_as_sensitive(
    bands: int, rounds: int
) -> None:
    c_TT, closest = matrix(bands, rounds), 0.0
    for chosen in patterns(bands, rounds):
        found = sensitivity(c_TT, chosen)
        assert found <= math.sqrt(len(chosen))
        if chosen:
            closest = max(closest, found / math.sqrt(len(chosen)))
    assert closest > 0.9999


def test_taking_part_too_often_or_longer_columns_would_cost_more() -> None:
    c_TT = matrix(4, 12)
    assert sensitivity(c_TT, [0, 3]) > 1.05 * math.sqrt(2)
    assert sensitivity(1.1 * c_TT, [0, 4]) > 1.05 * math.sqrt(2)


def test_the_coefficients_are_those_of_the_inverse_square_root() -> None:
    found = coefficients(9) / coefficients(9)[0]
    assert np.allclose(found, [(-1) ** i * binom(-0.5, i) for i in range(9)])
    assert 1 - 1e-9 < np.linalg.norm(found * coefficients(9)[0]) <= 1
    assert coefficients(1) == pytest.approx([1])
    assert (np.diff(coefficients(200)) < 0).all()


def test_a_round_that_is_repeated_in_a_new_block_is_covered_by_one_more_participation_of_those_it_asks() -> None:
    """Block one ends with the row of the round that was cut off; block two begins with it and goes on."""
    bands, first, second = 4, 7, 8
    c_TT = np.zeros((first + second, first + second))
    c_TT[:first, :first], c_TT[first:, first:] = matrix(bands, first), matrix(bands, second)
    asked_again = [2, 6, 7, 11]  # in the round that was cut off, and again: paid for as four
    assert sensitivity(c_TT, asked_again) <= math.sqrt(4)
    for before in range(first - bands + 1, first - 1):  # who took part in the rounds before pays nothing more
        assert sensitivity(c_TT, [before]) <= 1


def test_repeated_within_the_block_it_would_tell_of_those_who_took_part_before_and_do_not_pay() -> None:
    c_TT = matrix(4, 7)
    repeated = np.vstack([c_TT, c_TT[-1:]])
    assert all(sensitivity(repeated, [before]) > 1.003 for before in (3, 4, 5))


# the noise


def released(noise: BandedNoise, rounds: int, size: int, seed: int, clip: float = 0.5) -> Array:
    """(T, P) what `rounds` rounds add to sums of zero, over one after another."""
    random, earlier, rows = np.random.default_rng(seed), None, []
    for _ in range(rounds):
        update, earlier = noise.release(np.zeros(size), clip, random, earlier)
        rows.append(update.astype(np.float64) * noise.expected)
    return np.array(rows)


def covariance_fits(noise: BandedNoise, multiplier: float, bands: int, rounds: int = 6, size: int = 60_000) -> bool:
    """Whether the noise of the rounds has covariance (z c)^2 (C^T C)^-1, five deviations of the estimate allowed."""
    rows = released(noise, rounds, size, 5)
    inverse = np.linalg.inv(matrix(bands, rounds))
    expected = (multiplier * 0.5) ** 2 * inverse @ inverse.T
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / size)
    return bool((np.abs(rows @ rows.T / size - expected) < 5 * spread).all())


def test_the_noise_has_the_covariance_of_the_matrix_and_of_no_other() -> None:
    assert covariance_fits(BandedNoise(1.5, 4, 10.0), 1.5, 4)
    assert not covariance_fits(BandedNoise(1.5 * 0.97, 4, 10.0), 1.5, 4)
    assert not covariance_fits(BandedNoise(1.5, 3, 10.0), 1.5, 4)
    assert not covariance_fits(BandedNoise(1.5, 1, 10.0), 1.5, 4)


@given(st.integers(1, 6), st.integers(1, 15))
def test_the_recurrence_is_the_inverse_of_the_matrix(bands: int, rounds: int) -> None:
    noise, earlier = BandedNoise(1.0, bands, 1.0), None
    independent = np.random.default_rng(rounds).normal(size=(rounds, 3))
    rows = []
    for each in independent:
        row, earlier = noise.correlated(each, earlier)
        rows.append(row)
        assert earlier.shape == (bands - 1, 3)
    assert np.allclose(matrix(bands, rounds) @ np.array(rows), independent)


def test_one_band_is_independent_noise_and_what_is_remembered_is_not_written_to() -> None:
    one, _ = BandedNoise(2.0, 1, 4.0).release(np.zeros(5), 0.5, np.random.default_rng(3), None)
    assert np.allclose(one, np.random.default_rng(3).normal(size=5) * 2.0 * 0.5 / 4, rtol=1e-6)
    noise, earlier = BandedNoise(2.0, 3, 4.0), np.ones((2, 5))
    noise.release(np.zeros(5), 0.5, np.random.default_rng(3), earlier)
    assert np.array_equal(earlier, np.ones((2, 5)))


@pytest.mark.parametrize("bands", [2, 4, 8])
def test_at_equal_epsilon_the_noise_in_the_weights_is_less_than_that_of_independent_noise(bands: int) -> None:
    """The same turns, the same z, so the same account: the sum of the rounds is what ends up in the weights."""
    rounds, size = 48, 2000
    banded = released(BandedNoise(1.0, bands, 10.0), rounds, size, 1).cumsum(axis=0).std(axis=1)
    independent = released(BandedNoise(1.0, 1, 10.0), rounds, size, 1).cumsum(axis=0).std(axis=1)
    expected = float(coefficients(bands).sum())  # in the long run
    assert (banded[bands:] < independent[bands:]).all()
    assert independent[-1] / banded[-1] == pytest.approx(expected, rel=0.1)


# turns and the plan


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 5))
def test_a_client_is_asked_once_in_any_b_rounds_and_everyone_is(bands: int, more: int, seed: int) -> None:
    names = [f"c{i:02}" for i in range(bands + more)]
    asked = [turns(names, bands, number, np.random.default_rng(seed)) for number in range(1, 2 * bands + 1)]
    for start in range(bands + 1):
        window = [name for cohort in asked[start : start + bands] for name in cohort]
        assert sorted(window) == names
    assert all(len(cohort) in (len(names) // bands, -(-len(names) // bands)) for cohort in asked)


def test_the_plan_pays_for_the_rounds_that_may_be_a_clients_turn() -> None:
    made = matrix_noise.plan(60, 4, 50, 8.0, None, 0.5, 100.0)
    assert (made.steps, made.delta) == (13, 1 / 600)
    assert 7.98 < accounting.epsilon({made.mechanism: 13}, made.delta) <= 8
    assert made.mechanism == Mechanism(1.0, made.mechanism.noise_multiplier)
    everyone = matrix_noise.plan(60, 1, 50, 8.0, None, 0.5, 100.0).mechanism.noise_multiplier
    assert made.mechanism.noise_multiplier == pytest.approx(everyone * math.sqrt(13 / 50), rel=0.01)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(Refused, match="publish one of 60 clients"):
        matrix_noise.plan(60, 4, 50, 8.0, 0.5, 0.5, 100.0)
    with pytest.raises(Refused, match=r"60 clients in 50 rounds.*smallest epsilon") as caught:
        matrix_noise.plan(60, 4, 50, 1.0, None, 0.5, 2.0)
    assert "\n" not in str(caught.value)
