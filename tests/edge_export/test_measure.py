"""Latencies are compared fairly: models take turns, and a difference within noise is none."""

from collections import Counter
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest

from edge_export import measure


class _Clock:
    """Time that passes only when a model runs: `pace` microseconds a call, as if the machine slowed down at times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0, []
        monkeypatch.setattr(measure.time, "perf_counter_ns", lambda: self.now)

    def session(self, name: str, microseconds: float):
        def run(outputs, feed):
            assert outputs is None
            assert feed["input"].shape == (1, 4)
            self.calls.append(name)
            slow = 3 if (self.now // 50_000_000) % 2 else 1
            self.now += int(1000 * microseconds * slow)

        return SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="input")], run=run)


@pytest.fixture
def clock(monkeypatch):
    return _Clock(monkeypatch)


X = np.zeros((1, 4), np.float32)


def test_models_take_turns_each_time_another_one_first(clock):
    sessions = {name: clock.session(name, 100) for name in "abc"}
    turns = measure.latencies(sessions, X)
    assert {name: values.shape for name, values in turns.items()} == dict.fromkeys("abc", (measure.TURNS,))
    order = [name for name, _ in groupby(clock.calls[9:])]  # after three warming calls of each
    firsts = Counter(clock.calls[9:][i] for i in range(0, len(clock.calls) - 9, 3 * 20))
    assert firsts == dict.fromkeys("abc", measure.TURNS // 3)
    assert order[:6] == ["a", "b", "c", "b", "c", "a"]


def test_a_slow_phase_of_the_machine_hits_all_models_alike(clock):
    turns = measure.latencies({"a": clock.session("a", 100), "b": clock.session("b", 120)}, X)
    assert measure.p50(turns["b"]) / measure.p50(turns["a"]) == pytest.approx(1.2, rel=0.01)
    assert measure.slower(turns["b"], turns["a"])
    assert not measure.slower(turns["a"], turns["b"])


def test_a_slow_model_is_called_less_often_than_a_fast_one(clock):
    measure.latencies({"fast": clock.session("fast", 5), "slow": clock.session("slow", 50_000)}, X)
    calls = Counter(clock.calls)
    assert (calls["fast"], calls["slow"]) == (3 + 100 * measure.TURNS, 3 + 3 * measure.TURNS)


@pytest.mark.parametrize(
    ("factor", "share", "slower"),
    [(1.5, 1.0, True), (1.04, 1.0, False), (1.5, 0.95, True), (1.5, 0.8, False), (1.0, 0.0, False)],
)
def test_slower_takes_five_per_cent_in_the_median_and_nine_turns_in_ten(factor, share, slower):
    than = np.full(100, 10.0)
    turns = np.where(np.arange(100) < 100 * share, 10.0 * factor, 9.0)
    assert measure.slower(turns, than) is slower


def test_noise_around_one_mean_makes_neither_slower():
    noise = np.random.default_rng(0)
    for _ in range(50):
        one, other = noise.lognormal(0, 0.2, (2, measure.TURNS))
        assert not measure.slower(one, other)


def test_loading_and_running_take_time(exported):
    _, x, graph = exported("mlp")
    data = graph.SerializeToString()
    assert measure.load_ms(data) > 0
    assert (measure.latencies({"mlp": measure.open_model(data)}, x[:1].numpy())["mlp"] > 0).all()
