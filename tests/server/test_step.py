"""Server steps against hand-computed values and against Flower's strategies, whose bias correction is taken out."""

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

from privacy.refused import Refused
from scenarios.settings import Server
from server import step

battery = pytest.mark.parametrize("name", step.STEPS)


def run(chosen, updates, start):
    """Weights after each of `updates`, and the last state."""
    state, weights, path = chosen.init(len(start)), start, []
    for update in updates:
        weights, state = chosen.apply(state, weights, update)
        path.append(weights)
    return path, state


def vectors(count, size=60, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=(count, size))).astype(np.float32)


@battery
def test_state_starts_at_zero_and_all_stays_float32(name):
    chosen = step.resolve(Server(step=name))
    state = chosen.init(5)
    assert all((vector == 0).all() and vector.shape == (5,) for vector in state.values())
    (weights,), new = run(chosen, vectors(1, 5), vectors(1, 5, seed=1)[0])
    assert new.keys() == state.keys()
    assert {vector.dtype for vector in (weights, *state.values(), *new.values())} == {np.dtype(np.float32)}


@battery
def test_apply_writes_to_no_input_and_shares_no_memory_with_the_next_round(name):
    chosen = step.resolve(Server(step=name))
    inputs = vectors(5)
    weights, update = inputs[0], inputs[1]
    _, state = chosen.apply(chosen.init(60), weights, update)
    before = inputs.copy(), {key: value.copy() for key, value in state.items()}
    first, second = chosen.apply(state, weights, update), chosen.apply(state, weights, update)
    assert (inputs == before[0]).all()
    assert all((state[key] == before[1][key]).all() for key in state)
    assert first[0].tobytes() == second[0].tobytes()
    assert not any(np.shares_memory(new, old) for new in first[1].values() for old in (weights, update))


@battery
def test_an_update_of_nothing_changes_nothing_at_first(name):
    weights = vectors(1)[0]
    new, _ = step.resolve(Server(step=name)).apply(
        step.resolve(Server(step=name)).init(60), weights, np.zeros(60, np.float32)
    )
    assert (new == weights).all()


@battery
def test_steps_follow_the_update_towards_a_minimum(name):
    chosen = step.resolve(Server(step=name, rate=0.1))
    weights, state, target = vectors(1)[0], chosen.init(60), vectors(1, seed=9)[0]
    start = np.abs(weights - target).max()
    for _ in range(600):
        weights, state = chosen.apply(state, weights, 0.3 * (target - weights))
    assert np.abs(weights - target).max() < 0.2 * start


@battery
def test_a_step_out_of_float32_is_an_overflow_error_and_no_state(name):
    chosen = step.resolve(Server(step=name))
    huge = np.full(60, 3e38, np.float32)
    with pytest.raises(OverflowError, match="float32"):
        run(chosen, [huge] * 3, huge)


@battery
def test_an_update_of_another_length_is_refused_and_never_broadcast(name):
    chosen = step.resolve(Server(step=name))
    with pytest.raises(ValueError, match="shape"):
        chosen.apply(chosen.init(5), vectors(1, 5)[0], np.ones(1, np.float32))


# ---- by hand: weights 1, updates 0.5 and then -1 ----

BY_HAND = {
    "sgd": (Server(step="sgd"), [1.5, 0.5]),
    "sgd at rate 0.5": (Server(step="sgd", rate=0.5), [1.25, 0.75]),
    # m: 0.5, -0.55
    "momentum": (Server(step="momentum"), [1.5, 0.95]),
    # m: 0.25, -0.375; v: 0.125, 0.5625 (root 0.75)
    "adam": (
        Server(step="adam", rate=0.1, beta1=0.5, beta2=0.5, tau=0.25),
        [1 + 0.025 / (0.125**0.5 + 0.25), 1 + 0.025 / (0.125**0.5 + 0.25) - 0.0375],
    ),
    # v: 0 + 0.5 * 0.25 = 0.125; 0.125 + 0.5 * 1 = 0.625
    "yogi": (
        Server(step="yogi", rate=0.1, beta1=0.5, beta2=0.5, tau=0.25),
        [
            1 + 0.025 / (0.125**0.5 + 0.25),
            1 + 0.025 / (0.125**0.5 + 0.25) - 0.0375 / (0.625**0.5 + 0.25),
        ],
    ),
    # v: 0.25, 1.25
    "adagrad": (
        Server(step="adagrad", rate=0.1, beta1=0.5, tau=0.25),
        [1 + 0.025 / 0.75, 1 + 0.025 / 0.75 - 0.0375 / (1.25**0.5 + 0.25)],
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_two_steps_by_hand(case):
    server, expected = BY_HAND[case]
    path, _ = run(step.resolve(server), np.float32([[0.5], [-1]]), np.float32([1]))
    np.testing.assert_allclose(np.concatenate(path), expected, rtol=1e-6)


def test_yogis_second_moment_shrinks_by_the_square_and_not_in_proportion():
    # v = 0.5 * 4 = 2, then the update 1: yogi 2 - 0.5 * 1 = 1.5, adam 0.5 * 2 + 0.5 * 1 = 1.5; and then 0.1 tells
    updates = np.float32([[2], [1], [0.1]])
    moments = {}
    for name in ("yogi", "adam"):
        _, state = run(step.resolve(Server(step=name, beta2=0.5)), updates, np.float32([0]))
        moments[name] = state["v"][0]
    np.testing.assert_allclose([moments["yogi"], moments["adam"]], [1.5 - 0.005, 0.755], rtol=1e-5)


# ---- against Flower ----


class Uncorrected(FedAdam):
    """Flower's FedAdam without its bias correction, which Algorithm 2 does not have."""

    def aggregate_train(self, server_round, replies):
        rate = self.eta
        n = server_round + 1.0
        self.eta = rate * (1 - self.beta_1**n) / np.sqrt(1 - self.beta_2**n)
        try:
            return super().aggregate_train(server_round, replies)
        finally:
            self.eta = rate


def adagrad_with_momentum(beta1):
    strategy = FedAdagrad(eta=0.2, tau=1e-3)
    strategy.beta_1 = beta1  # its constructor takes none
    return strategy


FLOWER = {
    "sgd": (lambda: FedAvg(), Server(step="sgd")),
    "momentum": (
        lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.8),
        Server(step="momentum", rate=0.5, beta1=0.8),
    ),
    "adam": (
        lambda: Uncorrected(eta=0.05, beta_1=0.9, beta_2=0.99, tau=1e-3),
        Server(step="adam", rate=0.05),
    ),
    "yogi": (
        lambda: FedYogi(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-3),
        Server(step="yogi", rate=0.05, beta1=0.8, beta2=0.95, tau=1e-3),
    ),
    "adagrad": (lambda: adagrad_with_momentum(0.9), Server(step="adagrad", tau=1e-3)),
    "adagrad without momentum": (lambda: adagrad_with_momentum(0.0), Server(step="adagrad", beta1=0.0, tau=1e-3)),
}


@pytest.mark.parametrize("case", FLOWER)
def test_ten_rounds_equal_flowers(case):
    make, server = FLOWER[case]
    strategy, start = make(), vectors(1, seed=4)[0]
    updates = vectors(10, seed=5, scale=0.3)
    ours, _ = run(step.resolve(server), updates, start)
    weights = start
    for number, (update, mine) in enumerate(zip(updates, ours, strict=True), 1):
        # what `configure_train` notes down, of a round in which two clients come back with the same weights
        record = ArrayRecord({"w": Array(weights)})
        strategy.current_arrays = record if isinstance(strategy, FedAvgM) else {"w": weights}
        replies = [
            SimpleNamespace(
                content=RecordDict(
                    {
                        "arrays": ArrayRecord({"w": Array(weights + update)}),
                        "metrics": MetricRecord({"num-examples": examples}),
                    }
                ),
                has_error=lambda: False,
            )
            for examples in (3, 5)
        ]
        arrays, _ = strategy.aggregate_train(number, replies)
        weights = arrays["w"].numpy().astype(np.float32)
        np.testing.assert_allclose(mine, weights, rtol=2e-4, atol=2e-5)


# ---- defaults and refusals ----


def test_each_step_selects_its_own_defaults():
    update, start = np.float32([0.5]), np.float32([1])

    def first(name, **values):
        return run(step.resolve(Server(step=name, **values)), [update, update / 4], start)[0][-1][0]

    explicit = {
        "sgd": {"rate": 1},
        "momentum": {"rate": 1, "beta1": 0.9},
        "adam": {"rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
        "yogi": {"rate": 0.01, "beta1": 0.9, "beta2": 0.999, "tau": 1e-8},
        "adagrad": {"rate": 0.2, "beta1": 0.9, "tau": 1e-8},
    }
    assert explicit.keys() == step.STEPS.keys()
    for name, values in explicit.items():
        assert first(name) == first(name, **values)
        for key, value in values.items():
            if key != "tau" or value > 1e-6:
                assert first(name) != first(name, **{key: value * 0.7}), (name, key)


def test_an_unknown_step_is_refused_with_the_known_ones():
    with pytest.raises(Refused, match="sgd, momentum, adam, yogi, adagrad"):
        step.resolve(Server(step="adamw"))


@pytest.mark.parametrize(
    ("name", "knob"), [("sgd", "tau"), ("sgd", "beta1"), ("momentum", "beta2"), ("adagrad", "beta2")]
)
def test_a_value_that_the_step_would_not_look_at_is_refused_with_the_way_out(name, knob):
    with pytest.raises(Refused, match=rf"server\.step={name} has no {knob}: unset it with `server\.{knob}=`"):
        step.resolve(Server(step=name, **{knob: 0.5}))
