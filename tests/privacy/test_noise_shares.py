"""Noise in shares: the discrete Gaussian and what dominates it, the noise of the sum, fields that never carry."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import accounting, noise_shares, packing
from privacy.integers import FEWEST, MOST, Grid
from privacy.noise_shares import CHANCE, Shares
from privacy.plan import Mechanism
from privacy.refused import Refused

RANGE = np.arange(-120, 121)


def masses(variance: float) -> np.ndarray:
    """P(D(variance) = k) for k of RANGE."""
    weights = np.exp(-(RANGE**2) / (2 * variance))
    return weights / weights.sum()


def rho(variance: float) -> float:
    """As in the proof."""
    return 2.1 * math.exp(-2 * math.pi**2 * variance)


def apart(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(p - q).sum() / 2)


# ---- the proof, where its errors are large enough to be seen ----


@pytest.mark.parametrize(("v", "w"), [(0.8, 0.8), (1.0, 2.0), (0.7, 5.0), (1.2, 1.2), (2.5, 3.0)])
def test_a_sum_of_two_discrete_gaussians_is_as_near_to_one_as_the_proof_says(v: float, w: float) -> None:
    bound = rho(v * w / (v + w))
    found = apart(np.convolve(masses(v), masses(w), "same"), masses(v + w))
    assert bound / 100 < found + 1e-15 <= 1.01 * bound + 1e-15 or bound < 1e-9 >= found


def test_multiples_of_a_base_and_a_remainder_are_one_discrete_gaussian_where_the_gaps_are_smooth() -> None:
    def made(base: int, v1: float, v0: float) -> float:
        spread = np.where(RANGE % base == 0, np.exp(-((RANGE / base) ** 2) / (2 * v1)), 0.0)
        return apart(np.convolve(spread / spread.sum(), masses(v0), "same"), masses(base**2 * v1 + v0))

    assert made(4, 3.0, 16.0) <= 1.01 * rho(3.0 * 16 / (16 * 3.0 + 16))
    assert made(4, 3.0, 4.0) > 0.005  # the remainder must be wide


@pytest.mark.parametrize("b", [0.8, 1.0, 1.5])
@pytest.mark.parametrize("v", [2.0, 3.5, 9.0])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_discrete_gaussian_is_dominated_by_a_gaussian_of_variance_v_less_b(b: float, v: float, shift: int) -> None:
    here, there = masses(v), np.roll(masses(v), shift)
    for delta in (0.2, 1e-2, 1e-4):
        epsilon = accounting.gaussian(shift / math.sqrt(v - b), delta)
        found = np.maximum(here - math.exp(epsilon) * there, 0).sum()
        assert found <= delta + (1 + math.exp(epsilon)) * 1.01 * rho(b)


def test_a_gaussian_of_variance_v_itself_does_not_dominate_it() -> None:
    v, worse = 2.0, 0
    for delta in np.geomspace(1e-4, 0.2, 30):
        epsilon = accounting.gaussian(1 / math.sqrt(v), delta)
        worse += np.maximum(masses(v) - math.exp(epsilon) * np.roll(masses(v), 1), 0).sum() > delta
    assert worse > 5  # the allowance b is there for a reason


def test_what_may_fail_in_the_longest_run_is_below_the_chance_taken_off_delta() -> None:
    one = 5 * 1.01 * rho(8) + 2 * math.exp(-(16**2) / 2)  # three levels of tables, a sum, the domination; a clamp
    assert one < 2.0**-noise_shares._RARE
    assert (1 + math.exp(47)) * 2.0 ** (72 - noise_shares._RARE) < CHANCE


# ---- the draws ----


@pytest.mark.parametrize("variance", [16, 700])
def test_draws_have_the_masses_of_the_discrete_gaussian(variance: int) -> None:
    draws = noise_shares.share(variance, 400_000, noise_shares.entropy(variance))
    wide = np.arange(-4 * math.isqrt(variance), 4 * math.isqrt(variance) + 1)
    weights = np.exp(-(np.arange(-2000, 2001) ** 2) / (2 * variance))
    expected = np.exp(-(wide**2) / (2 * variance)) / weights.sum() * len(draws)
    counts = np.array([(draws == k).sum() for k in wide])
    chi, freedom = ((counts - expected) ** 2 / expected).sum(), len(wide)
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)
    wrong = np.exp(-(wide**2) / (2 * 1.05 * variance)) / (weights.sum() * math.sqrt(1.05)) * len(draws)
    assert ((counts - wrong) ** 2 / wrong).sum() > freedom + 20 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("variance", [2**20, 2**20 + 1, 21_500_000, 10**13])
def test_wide_draws_have_the_moments_of_a_gaussian_and_every_remainder(variance: int) -> None:
    draws = noise_shares.share(variance, 200_000, noise_shares.entropy(3)) / 1.0
    assert abs(draws.mean()) < 5 * math.sqrt(variance / len(draws))
    assert (draws**2).mean() == pytest.approx(variance, rel=5 * math.sqrt(2 / len(draws)))
    assert (draws**4).mean() == pytest.approx(3 * variance**2, rel=5 * math.sqrt(96 / 9 / len(draws)))
    counts = np.bincount((draws % 64).astype(int), minlength=64)  # B D(v1) alone would be multiples of 64
    assert ((counts - len(draws) / 64) ** 2 / (len(draws) / 64)).sum() < 63 + 5 * math.sqrt(126)


def test_where_the_first_64_bits_do_not_decide_the_others_do() -> None:
    thresholds, heads = noise_shares._table(16)
    i = len(thresholds) // 2

    def bits(rest: int) -> Callable[[int], bytes]:
        parts = [int(heads[i]).to_bytes(8, "little"), rest.to_bytes(24, "little")]
        return lambda size: parts.pop(0)[:size]

    tail = thresholds[i] & (2**192 - 1)
    below = noise_shares.share(16, 1, bits(tail - 1))
    at = noise_shares.share(16, 1, bits(tail))
    assert at.tolist() == [below[0] + 1] == [i + 1 - len(thresholds) // 2]


def test_a_table_is_the_exact_distribution_to_fifty_digits() -> None:
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 80
        weights = [(Decimal(-(k**2)) / 34).exp() for k in range(-90, 91)]
        total = sum(weights)
        thresholds, _ = noise_shares._table(17)
        end = len(thresholds) // 2
        for k in (-20, -3, 0, 1, 15):
            exact = sum(weights[: k + 90]) / total  # P(D < k)
            assert abs(Decimal(thresholds[k - 1 + end]) / 2**256 - exact) < Decimal(10) ** -50


def test_noise_is_of_the_operating_system_unless_it_is_seeded() -> None:
    fresh = [noise_shares.share(100, 50, noise_shares.entropy(None)).tolist() for _ in range(2)]
    again = [noise_shares.share(100, 50, noise_shares.entropy(7)).tolist() for _ in range(2)]
    assert fresh[0] != fresh[1]
    assert again[0] == again[1]


# ---- the noise of a sum ----

GRIDS = st.builds(
    Grid.default,
    size=st.integers(1, 5000),
    bits=st.integers(FEWEST, 20),
    clients=st.integers(1, 200),
    clip=st.floats(1e-3, 1e3),
    seed=st.just(0),
)


@given(GRIDS, st.floats(0.01, 50), st.integers(1, 500))
@settings(deadline=None)
def test_the_honest_shares_have_the_noise_that_is_charged_and_hardly_more(grid: Grid, z: float, h: int) -> None:
    variance = Shares(z, h).variance(grid)
    charged = (z * grid.norm / grid.step) ** 2
    assert h * variance - 8 >= charged * (1 - 1e-14)
    assert variance >= 16
    assert variance == 16 or h * (variance - 1) <= (charged + 8) * (1 + 1e-11)


def noised_sum(shares: Shares, clients: int, seed: int) -> tuple[np.ndarray, Grid]:
    """(what noise alone makes of the sum, in units of the norm (P,); the grid)."""
    grid = shares.on(Grid.default(20_000, 12, clients, 0.5, 0))
    nothing = grid.quantize(np.zeros(grid.size, np.float32), 1.0, True, 0)
    random = noise_shares.entropy(seed)
    total = sum(noise_shares.added(nothing, grid, random) for _ in range(clients))
    summed, weight, _ = grid.read(total, clients)
    assert weight == clients
    return summed / grid.norm, grid


@pytest.mark.parametrize("clients", [4, 9])
def test_the_sum_of_h_shares_has_standard_deviation_z_norm_and_half_of_it_would_show(clients: int) -> None:
    error = 5 / math.sqrt(2 * 20_000)
    found, _ = noised_sum(Shares(1.5, clients), clients, 1)
    assert found.std() == pytest.approx(1.5, rel=error)
    assert noised_sum(Shares(0.75, clients), clients, 1)[0].std() < 1.5 * (1 - error)
    assert noised_sum(Shares(1.5, 2 * clients), clients, 1)[0].std() < 1.5 * (1 - error)  # too few of them came


def test_the_shares_of_the_others_only_add() -> None:
    found, _ = noised_sum(Shares(1.5, 4), 9, 2)
    assert found.std() == pytest.approx(1.5 * math.sqrt(9 / 4), rel=0.03)


# ---- fields ----


@given(st.integers(FEWEST, 20), st.integers(1, 1000), st.floats(0.01, 50), st.integers(1, 300), st.data())
@settings(deadline=None, max_examples=60)
def test_no_sum_of_noised_values_carries_and_all_of_it_is_read_back(bits, clients, z, h, data):
    grid = Shares(z, h).on(Grid.default(30, bits, clients, 1.0, 0))
    count = data.draw(st.integers(1, min(clients, 9)))
    each = []
    for i in range(count):
        update = np.random.default_rng(i).normal(size=30).astype(np.float32)
        entries = noise_shares.added(grid.quantize(update, 1.0, True, i), grid, noise_shares.entropy(i))
        grid.check(entries)
        assert packing.unpack(packing.pack(entries, grid.field), 32, grid.field).tolist() == entries.tolist()
        each.append(entries)
    assert max(2 * grid.reach, grid.heaviest) * clients < 2**grid.width <= 2**63
    summed, weight, votes = grid.read(sum(each[1:], start=each[0].copy()), count)
    steps = np.array([sum(int(one[i]) - grid.reach for one in each) * grid.step for i in range(30)])
    if grid.rotation is None:
        np.testing.assert_array_equal(summed, steps)
    assert np.linalg.norm(summed) == pytest.approx(np.linalg.norm(steps))
    assert (weight, votes) == (count, count / 2)


@pytest.mark.parametrize(("byte", "at"), [(b"\x00", 0), (b"\xff", 2)])
def test_noise_beyond_sixteen_deviations_is_clamped_into_the_field(byte: bytes, at: int) -> None:
    grid = Shares(1.0, 1).on(Grid(4, 8, 1.0, 5, clip=1.0))
    ends = noise_shares.share(grid.noise, 4, lambda size: byte * size)
    assert abs(ends).min() > 17 * math.sqrt(grid.noise)
    zeros = grid.quantize(np.zeros(4, np.float32), 1.0, True, 0)
    entries = noise_shares.added(zeros, grid, lambda size: byte * size)
    assert set(entries[:-2].tolist()) == {grid.top + at * grid.tail}


def test_an_entry_is_checked_against_its_own_field_and_not_against_the_norm() -> None:
    grid = Shares(2.0, 1).on(Grid(40, 8, 1.0, 5, clip=0.5))
    long = np.full(42, 2 * grid.reach, np.uint64)
    long[-2:] = grid.heaviest, 1
    grid.check(long)
    long[3] += np.uint64(1)
    with pytest.raises(ValueError, match=f"above {2 * grid.reach}"):
        grid.check(long)


def test_a_field_that_cannot_be_that_wide_is_refused_with_what_can() -> None:
    with pytest.raises(Refused, match=r"bits=24 and 9 for noise need 64 bits.*max_clients=1073741824 or .*bits=23"):
        Shares(30.0, 1).on(Grid(4, MOST, 1.0, 2**30 + 1, clip=1.0))


# ---- plans and what a node insists on ----


def test_the_plan_takes_its_chance_off_delta_and_charges_a_gaussian_over_all_clients() -> None:
    plan = noise_shares.plan(40, 30, 8.0, None, 0.5, 100.0)
    assert plan.mechanism.sampling_rate == 1
    assert plan.mechanism.population == 0
    assert plan.delta + plan.chance == pytest.approx(1 / 400, rel=1e-12)
    assert plan.chance == CHANCE > 0
    assert 7.97 < accounting.epsilon({plan.mechanism: 30}, plan.delta) <= 8.0


@pytest.mark.parametrize(
    ("epsilon", "delta", "said"),
    [
        (26.0, None, "above 25"),
        (8.0, 1e-12, "the least that noise shares"),
        (8.0, 0.1, "outright"),
        (1e-3, None, "most rounds"),
    ],
)
def test_a_plan_that_cannot_be_kept_is_refused(epsilon: float, delta: float | None, said: str) -> None:
    with pytest.raises(Refused, match=said):
        noise_shares.plan(40, 30, epsilon, delta, 0.5, 100.0)


NOISE = noise_shares.plan(40, 30, 8.0, 1e-3, 0.5, 100.0).mechanism.noise_multiplier


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (None, "without the noise share"),
        (Shares(0.0, 5), "without the noise share"),
        (Shares(math.inf, 5), "without the noise share"),
        (Shares(NOISE, 0), "without the noise share"),
        (Shares(0.9 * NOISE, 5), "smaller noise share"),
        (Shares(NOISE, 9), "over 9 honest clients, and of the 10 .* 2 may collude"),
    ],
)
def test_a_node_refuses_less_noise_than_its_settings_ask_for(asked: Shares | None, said: str) -> None:
    with pytest.raises(Refused, match=said):
        noise_shares.hold_to(asked, 8.0, 1e-3, 30, 10, 2)


def test_a_node_accepts_what_was_planned() -> None:
    noise_shares.hold_to(Shares(NOISE, 8), 8.0, 1e-3, 30, 10, 2)
    noise_shares.hold_to(Shares(NOISE, 30), 8.0, 1e-3, 30, None, 2)
    assert accounting.epsilon({Mechanism(1.0, NOISE): 30}, 1e-3) <= 8.0


def test_the_release_divides_by_the_fixed_denominator() -> None:
    assert noise_shares.released(np.array([3.0, -6.0]), 12.0).tolist() == [0.25, -0.5]
    assert noise_shares.released(np.array([3.0]), 12.0).dtype == np.float32
