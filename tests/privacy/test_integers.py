"""Quantized integers: exact sums, the norm after rounding, rounding without bias, what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import integers
from privacy.integers import FEWEST, MOST, Grid
from privacy.refused import Refused

BITS = st.integers(FEWEST, MOST)


def vector(size: int, norm: float, seed: int, spikes: int = 0) -> np.ndarray:
    """(size,) float32 of length `norm`; with `spikes` only so many coordinates are not 0."""
    values = np.random.default_rng(seed).normal(size=size)
    if spikes:
        values[spikes:] = 0
    return (values * (norm / np.linalg.norm(values))).astype(np.float32)


def values(entries: np.ndarray, grid: Grid) -> np.ndarray:
    """The (P,) values of entries, by hand, as the grid's own coordinates."""
    return np.array([(int(entry) - grid.top) * grid.step for entry in entries[:-2]])


# ---- sums ----


@given(BITS, st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_the_sum_of_the_integers_is_exact_for_any_bits_lengths_counts_and_weights(bits, size, data):
    clients = data.draw(st.integers(1, 300))
    count = data.draw(st.integers(1, min(clients, 12)))
    weights = data.draw(st.lists(st.floats(1e-6, 1), min_size=count, max_size=count))
    clip, limit = data.draw(st.sampled_from([0.0, 0.7])), data.draw(st.floats(1e-3, 1e3))
    grid = Grid(size, bits, limit, clients, clip)
    each = [grid.quantize(vector(size, 3.0, i), weight, bool(i % 2), i) for i, weight in enumerate(weights)]

    total = sum(each[1:], start=each[0].copy())
    assert total.tolist() == [sum(int(one[i]) for one in each) for i in range(grid.entries)]  # Python's own integers
    summed, weight, votes = grid.read(total, count)
    steps = [sum(int(one[i]) - grid.top for one in each) for i in range(size)]
    assert summed.tolist() == [number * grid.step for number in steps]
    assert weight == sum(int(one[-2]) for one in each) / (2**bits - 1)
    assert votes == sum(0.5 if i % 2 else -0.5 for i in range(count))


@given(BITS, st.integers(1, 2**30))
def test_no_sum_carries_at_the_most_clients_and_one_bit_less_would(bits, clients):
    grid = Grid(1, bits, 1.0, clients)
    largest = max(int(grid.quantize(np.ones(1, np.float32), 1.0, True, 0).max()), grid.heaviest)
    assert largest == 2**bits - 1
    assert (clients * largest) >> grid.width == 0
    assert clients == 1 or (clients * 2**bits - 1) >> (grid.width - 1)


def test_the_sum_over_the_sum_of_weights_is_the_weighted_mean():
    grid, counts = Grid(50, 20, 1.0, 10), [7, 300, 41]
    updates = [vector(50, 2.0, i) for i in range(3)]
    total = sum(grid.quantize(update, n / 300, True, 1) for update, n in zip(updates, counts, strict=True))
    summed, weight, _ = grid.read(total, 3)
    mean = sum(n * update.astype(float) for update, n in zip(updates, counts, strict=True)) / sum(counts)
    np.testing.assert_allclose(summed / weight, mean, atol=4 * grid.step)
    plain = sum(updates) / 3
    assert np.abs(plain - mean).max() > 100 * grid.step  # the test would see weights that are left out


def test_a_rotated_sum_is_read_back_as_the_sum_of_the_updates():
    grid = Grid.default(4001, 7, 5, 0.5, seed=3)
    assert grid.rotation == 3
    updates = [vector(4001, 0.5, i) for i in range(5)]
    total = sum(grid.quantize(update, 1.0, True, i) for i, update in enumerate(updates))
    summed, weight, _ = grid.read(total, 5)
    assert weight == 5
    error = np.linalg.norm(summed - sum(update.astype(float) for update in updates))
    assert 0 < error < 5 * 0.5 * 0.02


# ---- rounding ----


@given(BITS, st.integers(1, 60), st.floats(1e-3, 10), st.floats(0.01, 4), st.booleans(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=150)
def test_the_norm_after_rounding_holds_whatever_the_update(bits, size, clip, spread, turned, seed):
    grid = Grid(size, bits, clip * spread, 1, clip, seed if turned else None)
    update = vector(size, clip * (1 + seed % 3), seed, spikes=seed % 2)
    entries = grid.quantize(update, 1.0, True, seed)
    assert np.linalg.norm(values(entries, grid)) <= grid.norm
    grid.check(entries)


def test_the_norm_holds_where_every_rounding_goes_up(monkeypatch):
    class Up:
        def random(self, size):
            return np.full(size, 1 - 2**-53)

    grid = Grid(10_000, 9, 1.0, 1, 1.0)
    update = np.full(10_000, 1e-2, np.float32)
    assert 1.02 < grid.norm < 1 + grid.step * 100  # the bound of conditional rounding, not the worst case
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Up())
    rounded_up = np.ceil(update.astype(float) / grid.step) * grid.step
    assert np.linalg.norm(rounded_up) > grid.norm
    assert np.linalg.norm(values(grid.quantize(update, 1.0, True, 0), grid)) <= 1.0  # at last towards zero


@pytest.mark.parametrize(("bits", "most", "turned"), [(16, 1.04, False), (9, 1.02, True), (8, 1.02, True)])
def test_rounding_costs_what_is_claimed_of_the_norm_at_1_7_million_coordinates(bits, most, turned):
    grid = Grid.default(1_663_370, bits, 100, 0.3, seed=1)
    assert grid.norm <= most * 0.3
    assert (grid.rotation is not None) == turned
    assert turned == (Grid(1_663_370, bits, 0.3, 100, 0.3).norm > 1.04 * 0.3)


def test_rounding_is_unbiased_and_the_test_would_see_a_bias():
    grid, update = Grid(64, 3, 1.0, 1), np.linspace(-0.99, 0.99, 64, dtype=np.float32)
    drawn = np.mean([values(grid.quantize(update, 1.0, True, seed), grid) for seed in range(4000)], axis=0)
    deviation = grid.step / 2 / math.sqrt(4000)
    assert np.abs(drawn - update).max() < 5 * deviation
    nearest = np.round(update / grid.step) * grid.step
    assert np.abs(nearest - update).max() > 20 * deviation


def test_rounding_goes_by_the_seed():
    grid, update = Grid(100, 8, 1.0, 1), vector(100, 1.0, 0)
    first, again, other = (grid.quantize(update, 1.0, True, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_what_lies_outside_the_range_is_clamped():
    grid = Grid(3, 8, 0.5, 1)
    np.testing.assert_allclose(
        values(grid.quantize(np.array([9, -9, 0], np.float32), 1.0, True, 0), grid), [0.5, -0.5, 0]
    )


# ---- rotation ----


@given(st.integers(1, 500), st.integers(0, 2**32))
def test_a_rotation_keeps_lengths_and_is_undone(size, seed):
    update = vector(size, 1.0, seed).astype(float)
    turned = integers.rotated(update, seed)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(update), rel=1e-12)
    np.testing.assert_allclose(integers.unrotated(turned, seed), update, atol=1e-12)


@pytest.mark.parametrize("spikes", [1, 2, 10, 1000, 0])
def test_four_deviations_clamp_next_to_nothing_of_a_rotated_vector_however_spiky(spikes):
    size, lost = 50_021, []  # a prime: two overlapping turns
    for seed in range(5):
        turned = integers.rotated(vector(size, 1.0, seed, spikes).astype(float), seed)
        limit = 4 / math.sqrt(size)
        lost.append(np.linalg.norm(turned - np.clip(turned, -limit, limit)))
    assert max(lost) < 0.01  # of a norm of 1
    if 0 < spikes <= 10:  # the same range would cut the vector as it is
        straight = vector(size, 1.0, 0, spikes).astype(float)
        assert np.linalg.norm(straight - np.clip(straight, -limit, limit)) > 0.9


# ---- ranges, refusals ----


def test_without_a_norm_the_range_is_one():
    grid = Grid.default(100, 4, 10, 0.0, seed=1)
    assert (grid.limit, grid.rotation, grid.clip) == (1.0, None, 0.0)


@pytest.mark.parametrize(
    ("bits", "clients", "nearest"),
    [
        (1, 10, "the nearest is 2"),
        (25, 10, "the nearest is 24"),
        (16, 0, "the nearest is 1"),
        (16, 2**50, f"protect.max_clients={2**47} or protect.bits=13"),
        (16, 2**62, f"protect.max_clients={2**47}$"),
    ],
)
def test_an_impossible_width_is_refused_with_the_nearest_possible(bits, clients, nearest):
    with pytest.raises(Refused, match=nearest):
        integers.width(bits, clients)


@given(BITS, st.integers(1, 2**62))
def test_the_nearest_clients_that_a_refusal_names_are_possible(bits, clients):
    try:
        assert integers.width(bits, clients) <= integers.WIDEST
    except Refused as error:
        nearest = int(str(error).split("protect.max_clients=")[1].split()[0])
        assert integers.width(bits, nearest) == integers.WIDEST
        assert nearest < clients


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused_at_the_client(bad):
    with pytest.raises(ValueError, match="not finite"):
        Grid(3, 8, 1.0, 1).quantize(np.array([0, bad, 1], np.float32), 1.0, True, 0)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.01, math.nan])
def test_a_weight_outside_0_to_1_is_refused(weight):
    with pytest.raises(ValueError, match="a weight of"):
        Grid(3, 8, 1.0, 1).quantize(np.zeros(3, np.float32), weight, True, 0)


def test_entries_that_no_client_can_have_made_are_refused_with_the_reason():
    grid = Grid(3, 8, 1.0, 5, clip=0.5)
    good = grid.quantize(vector(3, 0.5, 0), 1.0, True, 0)
    grid.check(good)
    for place, value, reason in [
        (0, 255, "above 254"),
        (3, 0, "a weight of 0"),
        (3, 256, "a weight of 256"),
        (4, 2, "clip bit of 2"),
        (0, 254, "longer than 0.5"),
    ]:
        bad = good.copy()
        bad[place] = value
        with pytest.raises(ValueError, match=reason):
            grid.check(bad)
    for wrong in (good[:-1], good.astype(np.int64)):
        with pytest.raises(ValueError, match="for a grid of 5 entries"):
            grid.check(wrong)


def test_a_sum_that_so_few_clients_cannot_make_is_refused():
    grid = Grid(3, 8, 1.0, 5)
    total = grid.quantize(np.ones(3, np.float32), 1.0, True, 0) * np.uint64(3)
    grid.read(total, 3)
    with pytest.raises(ValueError, match="no 2 clients"):
        grid.read(total, 2)
    with pytest.raises(ValueError, match="1 to 5"):
        grid.read(total, 6)
