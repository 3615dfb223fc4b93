"""Local DP: the sentence of its docstring, its noise both ways, its plan against the closed form, a node's refusals."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from dp_accounting import gaussian_mechanism
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from privacy import accounting, local_noise
from privacy.cohort_noise import generator
from privacy.plan import Mechanism
from privacy.refused import Refused

P, CLIP = 20_000, 0.7
Noised = Callable[..., NDArray[np.float32]]


def update(seed: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).normal(size=P)).astype(np.float32)


# the docstring's sentence: two data sets of a client move what it sends by at most 2C under noise of z 2C


def moved(by: Noised) -> float:
    """The furthest that another data set of the client moves what it sends, the noise being the same, in units of C."""
    pairs = [(update(seed), sign * update(seed, 5.0)) for seed in range(3) for sign in (-1, 1)]
    sent = [[by(one, CLIP, 1.0, generator(9)).astype(np.float64) for one in pair] for pair in pairs]
    return max(float(np.linalg.norm(one - other)) / CLIP for one, other in sent)


def test_another_data_set_moves_what_is_sent_by_at_most_twice_the_norm_and_almost_by_it() -> None:
    assert 1.999 < moved(local_noise.noised) <= 2.001  # float32 rounds each sum of signal and noise
    assert moved(lambda one, clip, *rest: local_noise.noised(one, 10 * clip, *rest)) > 15


def noise_fits(by: Noised, multiplier: float) -> bool:
    """Whether `by` adds Gaussian noise of multiplier x 2C to every entry."""
    added = by(np.zeros(P, np.float32), CLIP, multiplier, generator(3)) / (multiplier * 2 * CLIP)
    return bool(stats.kstest(added, "norm").pvalue > 0.01)


def test_the_noise_is_z_times_twice_the_norm_and_not_z_times_the_norm() -> None:
    assert noise_fits(local_noise.noised, 1.3)
    for factor in (0.5, 0.95, 1.05):
        assert not noise_fits(lambda one, clip, z, random, f=factor: local_noise.noised(one, clip, f * z, random), 1.3)


def test_noise_never_repeats_without_a_seed() -> None:
    zero = np.zeros(P, np.float32)
    first, second = (local_noise.noised(zero, CLIP, 1.0, generator(None)).astype(np.float64) for _ in range(2))
    assert abs(first @ second) / np.linalg.norm(first) / np.linalg.norm(second) < 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_sent_as_noise_alone(bad: float) -> None:
    broken = update(1)
    broken[5] = bad
    sent = local_noise.noised(broken, CLIP, 1.0, generator(4))
    assert np.array_equal(sent, local_noise.noised(np.zeros(P, np.float32), CLIP, 1.0, generator(4)))


# the plan


@given(st.floats(0.2, 60), st.integers(1, 300), st.integers(2, 100_000))
def test_the_plan_is_the_analytic_gaussian_for_every_round_a_client_may_join(
    epsilon: float, rounds: int, clients: int
) -> None:
    made = local_noise.plan(clients, rounds, epsilon, None, CLIP, 1e6)
    assert made.delta == 1 / (10 * clients)
    assert (made.steps, made.mechanism.sampling_rate) == (rounds, 1.0)
    exact = gaussian_mechanism.get_epsilon_gaussian(made.mechanism.noise_multiplier / math.sqrt(rounds), made.delta)
    assert 0.995 * epsilon < exact <= epsilon
    assert accounting.epsilon({made.mechanism: rounds + 1}, made.delta) > exact


def test_a_delta_that_allows_to_publish_a_client_or_an_epsilon_out_of_reach_is_refused_in_one_line() -> None:
    with pytest.raises(Refused, match=r"delta=0\.05 .*publish one of 20 clients"):
        local_noise.plan(20, 5, 8.0, 0.05, CLIP, 100.0)
    with pytest.raises(Refused, match=r"smallest epsilon .* most rounds for this epsilon are \d") as caught:
        local_noise.plan(20, 50, 1.0, None, CLIP, 5.0)
    assert "\n" not in str(caught.value)


def test_a_running_statistic_is_refused_as_noise_could_make_it_negative() -> None:
    with pytest.raises(Refused, match="GroupNorm"):
        local_noise.check(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    local_noise.check(nn.Linear(2, 2))


# a node holds the server to its own settings


def test_a_node_refuses_less_clipping_or_noise_than_its_settings_ask_for() -> None:
    made = local_noise.plan(20, 50, 8.0, None, CLIP, 100.0)
    z, wanted = made.mechanism.noise_multiplier, (CLIP, 8.0, None, 50)
    local_noise.hold_to(CLIP, z, *wanted)
    for clip in (0.0, 1.01 * CLIP):
        with pytest.raises(Refused, match="clipping norm"):
            local_noise.hold_to(clip, z, *wanted)
    for noise in (0.0, z / 3):
        with pytest.raises(Refused, match="without the noise"):
            local_noise.hold_to(CLIP, noise, *wanted)


def test_with_a_delta_in_its_settings_a_node_holds_the_server_to_the_very_noise() -> None:
    z = accounting.calibrate(1.0, 50, 8.0, 1e-3, 100.0)
    local_noise.hold_to(CLIP, z, CLIP, 8.0, 1e-3, 50)
    with pytest.raises(Refused, match="without the noise"):
        local_noise.hold_to(CLIP, 0.99 * z, CLIP, 8.0, 1e-3, 50)
    assert accounting.epsilon({Mechanism(1.0, 0.99 * z): 50}, 1e-3) > 8
