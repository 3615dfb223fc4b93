"""Client-level DP: the sentence of its docstring, its noise both ways, its account against other accountants."""

import math
import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant
from scipy import stats
from torch import nn

from privacy import accounting, cohort_noise, dp_sgd
from privacy.cohort_noise import CohortNoise, clipped, generator, sample
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios.settings import Server
from server import combine

Clip = Callable[[NDArray[np.float32], float], tuple[NDArray[np.float32], bool]]
P = 40


def updates(clients: int, seed: int, scale: float = 3.0) -> list[NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return [(random.normal(size=P) * scale * random.lognormal()).astype(np.float32) for _ in range(clients)]


def total(vectors: list[NDArray[np.float32]], clip: float, by: Clip = clipped) -> NDArray[np.float64]:
    parts = [by(vector, clip) for vector in vectors]
    return combine.total([combine.Contribution(part, 1.0, 1, within) for part, within in parts], P).total


# the docstring's sentence: one client more or less moves the sum by at most C


def moved(by: Clip, twice: bool = False) -> float:
    """The furthest that one client moves the sum of a fleet, in units of C, over fleets and clients."""
    furthest = 0.0
    for seed in range(20):
        fleet = updates(8, seed)
        for i in range(8):
            without = fleet[:i] + fleet[i + 1 :]
            whole = [*fleet, fleet[i]] if twice else fleet
            furthest = max(furthest, float(np.linalg.norm(total(whole, 0.7, by) - total(without, 0.7, by))) / 0.7)
    return furthest


def test_one_client_moves_the_sum_by_at_most_the_norm_and_almost_by_it() -> None:
    assert 0.999 < moved(clipped) <= 1


def test_a_clip_that_is_ten_times_too_wide_and_a_client_counted_twice_are_seen() -> None:
    assert moved(lambda vector, clip: clipped(vector, 10 * clip)) > 5
    assert moved(clipped, twice=True) > 1.9


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30),
    st.floats(1e-3, 1e3),
)
def test_no_update_is_longer_than_the_norm_afterwards_and_a_short_one_is_untouched(
    values: list[float], clip: float
) -> None:
    update = np.array(values, np.float32)
    after, within = clipped(update, clip)
    assert after.dtype == np.float32
    assert np.linalg.norm(after.astype(np.float64)) <= clip
    assert within == (np.linalg.norm(update.astype(np.float64)) <= clip)
    assert np.array_equal(after, update) or not within
    again, was = clipped(after, clip)
    assert was
    assert np.array_equal(again, after)


def test_weights_and_steps_that_a_client_names_do_not_change_what_it_adds() -> None:
    fleet = updates(3, 1)
    named = [
        combine.Contribution(clipped(u, 1.0)[0], w, s) for u, w, s in zip(fleet, (1, 50, 1e9), (1, 9, 700), strict=True)
    ]
    assert np.array_equal(combine.total(named, P).total, total(fleet, 1.0))
    assert not np.allclose(combine.mean(named, Server()), total(fleet, 1.0) / 3)  # it would in the plain mean


# the noise: the right deviation passes, ten per cent beside it fails


def noise_fits(noise: CohortNoise, clip: float, claimed: float, norm: float | None = None) -> bool:
    """Whether what `release` adds to the sum has the deviation `claimed`: chi-squared, two-sided, at 1e-4."""
    size = 20_000
    update, _ = noise.release(np.zeros(size), 0.0, clip, generator(11), norm)
    statistic = float(((update.astype(np.float64) * noise.expected / claimed) ** 2).sum())
    return 1e-4 < float(stats.chi2.cdf(statistic, size)) < 1 - 1e-4


@pytest.mark.parametrize(("z", "clip", "expected"), [(1.0, 1.0, 10.0), (0.4, 0.05, 3.5), (7.0, 20.0, 400.0)])
def test_the_sum_gets_noise_of_deviation_z_times_the_norm_and_no_other(z: float, clip: float, expected: float) -> None:
    noise = CohortNoise(z, expected)
    assert noise_fits(noise, clip, z * clip)
    assert not noise_fits(noise, clip, 0.9 * z * clip)
    assert not noise_fits(noise, clip, 1.1 * z * clip)
    assert noise_fits(noise, clip, 1.3 * z * clip, norm=1.3 * clip)  # of an update that rounding lengthened


def test_the_denominator_is_the_cohort_expected_whatever_number_replied() -> None:
    ones = [np.full(P, 0.1, np.float32)] * 3
    update, _ = CohortNoise(1e-9, 12.0).release(total(ones, 10.0), 0.0, 1e-9, generator(0))
    assert np.allclose(update, 0.3 / 12)


def test_nobody_replied_is_noise_alone() -> None:
    summed = combine.total([], P)
    update, _ = CohortNoise(1.0, 4.0).release(summed.total, summed.votes, 1.0, generator(None))
    assert summed.votes == 0
    assert summed.mean is None
    assert 0 < float(np.linalg.norm(update)) < 10


def test_noise_and_draws_come_from_the_operating_system_and_differ_in_forked_workers() -> None:
    np.random.seed(0)  # what a careless program does
    first = generator(None).normal(size=8)
    np.random.seed(0)
    assert not np.array_equal(first, generator(None).normal(size=8))
    assert np.array_equal(generator(5).normal(size=8), generator(5).normal(size=8))
    drawn = {first.tobytes()}
    for _ in range(2):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.write(write, generator(None).normal(size=8).tobytes())
            os._exit(0)
        os.waitpid(child, 0)
        drawn.add(os.read(read, 64))
    assert len(drawn) == 3


# the draw


def own_coins(draws: list[list[str]], rate: float) -> bool:
    """Whether 2000 draws of 50 clients came of a coin each: mean and variance of the sizes, two clients together."""
    sizes, variance = np.array([len(draw) for draw in draws]), 50 * rate * (1 - rate)
    together, both = sum("c0" in draw and "c1" in draw for draw in draws) / len(draws), rate * rate
    return bool(
        abs(sizes.mean() - 50 * rate) < 4 * math.sqrt(variance / len(draws))
        and abs(sizes.var() / variance - 1) < 0.15  # a fixed size would have none
        and abs(together - both) < 4 * math.sqrt(both * (1 - both) / len(draws))
    )


def test_each_client_is_drawn_by_a_coin_of_its_own_and_the_test_would_see_another_draw() -> None:
    names, random = [f"c{i}" for i in range(50)], np.random.default_rng(3)
    draws = [sample(names, 0.3, random) for _ in range(2000)]
    assert all(draw == sorted(draw, key=names.index) for draw in draws)
    assert own_coins(draws, 0.3)
    assert not own_coins(draws, 0.27)
    assert not own_coins([list(random.choice(names, 15, replace=False)) for _ in range(2000)], 0.3)
    assert not own_coins([sorted({*draw, "c1"} if "c0" in draw else {*draw} - {"c1"}) for draw in draws], 0.3)


# the plan


def test_the_plan_spends_the_budget_and_other_accountants_agree() -> None:
    made = cohort_noise.plan(200, 0.1, 60, 1, 4.0, None, 0.5, 100.0)
    history = {made.mechanism: 60}
    assert made.mechanism.sampling_rate == 0.1
    assert made.delta + made.chance == pytest.approx(1 / 2000)
    claimed = accounting.epsilon(history, made.delta)
    assert 3.98 < claimed <= 4
    assert accounting.epsilon({made.mechanism: 61}, made.delta) > 3.98
    prv = PRVAccountant()
    prv.history = [(made.mechanism.noise_multiplier, 0.1, 60)]
    assert claimed < dp_sgd.epsilon_rdp(history, made.delta)
    assert claimed <= prv.get_epsilon(made.delta) * 1.001  # Opacus returns the upper end of its interval
    assert claimed >= prv.get_epsilon(made.delta) - 0.03


def test_ten_thousand_clients_pay_the_amplified_event_of_the_published_setting() -> None:
    """N=1e4, a cohort of 100, z=1, 1000 rounds: 1.83; only the rounds joined would claim 0.38."""
    every_round = accounting.epsilon({Mechanism(0.01, 1.0): 1000}, 1e-5)
    assert every_round == pytest.approx(1.8282, rel=0.005)
    assert accounting.epsilon({Mechanism(0.01, 1.0): 10}, 1e-5) < 0.5


def test_asking_everyone_is_not_amplified() -> None:
    made = cohort_noise.plan(50, 1.0, 10, 1, 4.0, None, 0.5, 100.0)
    assert made.mechanism.sampling_rate == 1
    assert made.chance == 0
    half = cohort_noise.plan(50, 0.5, 10, 1, 4.0, None, 0.5, 100.0)
    assert half.mechanism.noise_multiplier < made.mechanism.noise_multiplier


def test_a_client_drawn_so_rarely_that_delta_would_cover_it_is_noised_all_the_same() -> None:
    made = cohort_noise.plan(30, 0.0001, 4, 0, 20.0, None, 1.0, 100.0)  # drawn ever: 4e-4, delta: 3e-3
    assert made.mechanism.noise_multiplier >= 0.1


@pytest.mark.parametrize(("least", "clients", "rate"), [(1, 19, 0.5), (3, 40, 0.2), (20, 9, 0.5), (60, 10_000, 0.01)])
def test_the_chance_of_a_draw_that_falls_short_is_the_binomial_one(least: int, clients: int, rate: float) -> None:
    chance = cohort_noise._chance_below(least, clients, rate)
    assert chance == pytest.approx(float(stats.binom.cdf(least - 1, clients, rate)), rel=1e-6)


def test_the_chance_of_a_short_draw_is_taken_off_delta() -> None:
    made = cohort_noise.plan(20, 0.5, 50, 1, 8.0, None, 1.0, 100.0)
    assert made.chance == pytest.approx(50 * 0.5**19)
    assert made.delta == pytest.approx(0.005 - made.chance)
    assert cohort_noise.plan(20, 0.5, 50, 0, 8.0, None, 1.0, 100.0).chance == 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"rate": 0.2},
            r"rounds\.minimum=1 of 20 clients .* more than a tenth of delta=0\.005: raise rounds\.fraction",
        ),
        ({"delta": 0.05}, r"delta=0\.05 .*set it below 0\.05"),
        ({"delta": 0.5}, "publish one of 20 clients"),
        ({"epsilon": 0.01}, "smallest epsilon for these rounds is .* most rounds for this epsilon are 5"),
    ],
)
def test_a_plan_that_cannot_hold_is_refused_in_one_line(change: dict[str, float], line: str) -> None:
    given: dict[str, float | None] = {"rate": 1.0, "epsilon": 8.0, "delta": None} | change
    with pytest.raises(Refused, match=line) as caught:
        cohort_noise.plan(20, given["rate"] or 0, 50, 1, given["epsilon"] or 0, given["delta"], 1.0, 100.0)
    assert "\n" not in str(caught.value)


def test_what_is_no_noised_sum_is_refused_with_the_reason() -> None:
    for combiner in ("median", "trimmed", "krum", "multikrum"):
        with pytest.raises(Refused, match=f"{combiner} is no sum"):
            cohort_noise.check(nn.Linear(2, 2), combiner, False)
    with pytest.raises(Refused, match="FedNova"):
        cohort_noise.check(nn.Linear(2, 2), "mean", True)
    with pytest.raises(Refused, match="GroupNorm"):
        cohort_noise.check(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "mean", False)
    cohort_noise.check(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)), "mean", False)


# adaptive clipping


def adapted(start: float, seed: int, z: float, deviation: float, by: CohortNoise | None = None) -> float:
    """The norm after 60 rounds of 40 clients whose updates have lengths of median 1 (log-normal)."""
    random = np.random.default_rng(seed)
    noise, clip = by or CohortNoise(z, 40.0, 0.5, 0.2), start
    for _ in range(60):
        within = np.exp(deviation * random.normal(size=40)) <= clip
        _, clip = noise.release(np.zeros(1), float(within.sum()) - 20.0, clip, random)
    return clip


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize(("z", "deviation"), [(1.0, 0.5), (1.0, 0.3), (2.0, 0.5)])
def test_the_norm_comes_within_ten_per_cent_of_the_true_quantile_in_sixty_rounds(
    start: float, z: float, deviation: float
) -> None:
    ends = np.array([adapted(start, seed, z, deviation) for seed in range(200)])
    assert np.mean(np.abs(ends - 1) <= 0.1) >= 0.95


def test_a_sign_turned_round_is_seen_to_run_away() -> None:
    class Turned(CohortNoise):
        def release(self, total, votes, clip, random):  # type: ignore[no-untyped-def]
            return super().release(total, -votes, clip, random)

    ends = [adapted(start, 0, 1.0, 0.5, Turned(1.0, 40.0, 0.5, 0.2)) for start in (0.9, 1.1)]
    assert all(abs(end - 1) > 0.5 for end in ends)


@pytest.mark.parametrize(("z", "expected"), [(1.0, 40.0), (4.0, 40.0), (0.3, 1000.0), (9.0, 5.0)])
def test_updates_and_votes_together_cost_what_is_accounted(z: float, expected: float) -> None:
    """Composed as two mechanisms by the accountant they are the one of multiplier z; the votes are not free."""
    noise = CohortNoise(z, expected, 0.5, 0.2)
    apart = {Mechanism(1.0, noise.update_multiplier): 10, Mechanism(1.0, 2 * noise.vote_deviation): 10}
    assert accounting.epsilon(apart, 1e-3) == pytest.approx(accounting.epsilon({Mechanism(1.0, z): 10}, 1e-3), rel=1e-3)
    assert noise.update_multiplier > z
    assert CohortNoise(z, expected).update_multiplier == z


def test_the_noise_is_that_of_the_norm_which_clipped_not_of_the_next() -> None:
    noise = CohortNoise(1.0, 40.0, 0.5, 0.2)
    _, next_clip = noise.release(np.zeros(20_000), 20.0, 2.0, generator(11))
    assert next_clip < 1.85
    assert noise_fits(noise, 2.0, noise.update_multiplier * 2.0)
    assert not noise_fits(noise, 2.0, noise.update_multiplier * next_clip)
    assert not noise_fits(noise, 2.0, 1.0 * 2.0 / 1.1)
