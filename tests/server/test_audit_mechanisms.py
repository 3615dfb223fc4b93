"""The audit of our own mechanisms: sampling 1, 10 rounds, 5000 canaries; correct code passes, injected bugs fail."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from opacus import optimizers

from clients import codecs
from privacy import accounting, audit, cohort_noise, dp_sgd, key_stream
from privacy.key_stream import Gaussian
from privacy.plan import Mechanism, Plan
from scenarios import load
from scenarios.seeds import derive
from scenarios.settings import override
from server import canaries, combine, probes, rounds

UNITS = ("client", "example")
NOISES = (0.3, 1.0, 3.0)
DELTA = 1e-5
SHORT = "rounds.number=10 export.recover_rounds=0"
Patch = pytest.MonkeyPatch


def audited(
    states: Path, unit: str, noise: float, seed: int, change: str = "", rate: float = 1.0, seeded: bool = True
) -> tuple[audit.Verdict, float]:
    """(what 5000 canaries say, the epsilon that is claimed) of a mechanism by itself."""
    scenario, known = load("digits"), f"privacy.noise_seed={seed}" if seeded else ""
    settings = override(scenario.settings, f"privacy.unit={unit} {SHORT} {known} {change}")
    names = [f"client-{i:02}" for i in range(20)]
    mechanism = Mechanism(rate, noise)
    claimed = accounting.epsilon({mechanism: 10}, DELTA)
    plan = Plan(mechanism, settings.privacy.clip, claimed, DELTA, 10)
    setup = canaries.Setup(scenario, settings, dict.fromkeys(names, 50), dict.fromkeys(names, plan), None, states, seed)
    included = np.random.default_rng(derive(seed, "coins")).random(5000) < 0.5
    run = probes.PROBES[unit][unit](setup, names[0], included, lambda: None)
    return audit.verdict(run.scores, included, claimed, DELTA), claimed


# correct code


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("noise", NOISES)
def test_correct_code_passes_with_an_estimate_near_the_claim(unit: str, noise: float, tmp_path: Path) -> None:
    said, claimed = audited(tmp_path, unit, noise, seed=1)
    assert claimed == pytest.approx(accounting.gaussian(math.sqrt(10) / noise, DELTA), rel=1e-6)
    assert said.passed
    assert said.lower_bound <= claimed
    assert said.estimate == pytest.approx(claimed, rel=0.2)


@pytest.mark.slow
def test_a_hundred_seeds_pass_and_95_estimates_are_within_a_fifth(tmp_path: Path) -> None:
    seeds = [("client" if seed % 3 == 0 else "example", NOISES[seed // 3 % 3], seed) for seed in range(100)]
    said = [audited(tmp_path, *each) for each in seeds]
    assert all(one.lower_bound <= claimed and one.passed for one, claimed in said)
    assert sum(abs(one.estimate / claimed - 1) <= 0.2 for one, claimed in said) >= 95


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["float16", "qsgd8", "topk:0.3", "int16", "int6", "shared-topk:0.3:int9"])
def test_a_codec_between_clip_and_sum_changes_nothing(codec: str, tmp_path: Path) -> None:
    said, claimed = audited(tmp_path, "client", 1.0, 2, f"codec={codec}")
    assert said.passed
    assert said.estimate == pytest.approx(claimed, rel=0.2)


def test_adaptive_clipping_keeps_its_claim_though_the_norm_moves(tmp_path: Path) -> None:
    said, claimed = audited(tmp_path, "client", 1.0, 2, "privacy.adapt=true")
    assert said.passed
    assert 0.8 * claimed < said.estimate < claimed * 1.05  # the votes' share of the noise shows in no canary


@pytest.mark.parametrize("unit", UNITS)
def test_under_sampling_the_canaries_see_less_than_is_claimed_but_not_nothing(unit: str, tmp_path: Path) -> None:
    said, claimed = audited(tmp_path, unit, 1.0, 3, "rounds.fraction=0.3", rate=0.3)
    whole, _ = audited(tmp_path, unit, 1.0, 3)
    assert said.passed
    assert 0.3 * claimed < said.estimate < claimed
    assert said.estimate < whole.estimate / 2


# the five bugs, and a sixth, each injected into the code that the audit calls


def noise_halved(patch: Patch, unit: str) -> None:
    patch.setattr(cohort_noise.CohortNoise, "update_multiplier", property(lambda self: self.multiplier / 2))
    _optimizer(patch, lambda made: {**made, "noise_multiplier": made["noise_multiplier"] / 2})


def noise_forgotten(patch: Patch, unit: str) -> None:
    patch.setattr(cohort_noise.CohortNoise, "update_multiplier", 0.0)
    _optimizer(patch, lambda made: {**made, "noise_multiplier": 0.0})


def clip_ten_times_too_wide(patch: Patch, unit: str) -> None:
    right = cohort_noise.clipped
    patch.setattr(cohort_noise, "clipped", lambda update, clip: right(update, 10 * clip))

    class Wide(optimizers.DPOptimizer):
        def clip_and_accumulate(self) -> None:
            self.max_grad_norm *= 10
            super().clip_and_accumulate()
            self.max_grad_norm /= 10

    patch.setattr(optimizers, "DPOptimizer", Wide)


def counted_twice(patch: Patch, unit: str) -> None:
    total, batches = combine.total, dp_sgd.PrivateGradient.batches

    def twice(contributions: Iterable[combine.Contribution], size: int) -> Any:
        return total((one for one in contributions for _ in range(2)), size)

    patch.setattr(combine, "total", twice)
    patch.setattr(dp_sgd.PrivateGradient, "batches", lambda self, n, s: (b + b for b in batches(self, n, s)))


def noise_divided_twice(patch: Patch, unit: str) -> None:
    def release(self: Any, total: Any, votes: float, clip: float, random: Any, norm: float) -> Any:
        noise = random.normal(0.0, self.update_multiplier * norm, total.shape)
        return ((total + noise / self.expected) / self.expected).astype(np.float32), clip

    class Twice(optimizers.DPOptimizer):
        def add_noise(self) -> None:
            right = self.noise_multiplier
            self.noise_multiplier = right / self.expected_batch_size
            super().add_noise()
            self.noise_multiplier = right

    patch.setattr(cohort_noise.CohortNoise, "release", release)
    patch.setattr(optimizers, "DPOptimizer", Twice)


def noise_repeated(patch: Patch, unit: str) -> None:
    right = dp_sgd.noise_generator
    patch.setattr(rounds, "_random", lambda settings, number: cohort_noise.generator(7))
    patch.setattr(dp_sgd, "noise_generator", lambda seed: right(7))


BUGS: dict[str, Callable[[Patch, str], None]] = {
    bug.__name__: bug
    for bug in (
        noise_halved,
        noise_forgotten,
        clip_ten_times_too_wide,
        counted_twice,
        noise_divided_twice,
        noise_repeated,
    )
}


def _optimizer(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    right = optimizers.DPOptimizer
    patch.setattr(optimizers, "DPOptimizer", lambda inner, **made: right(inner, **change(made)))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_fails_the_claim(bug: str, unit: str, tmp_path: Path, monkeypatch: Patch) -> None:
    BUGS[bug](monkeypatch, unit)
    said, claimed = audited(tmp_path, unit, 3.0, seed=5)
    assert not said.passed, f"{bug}: {said}"
    assert said.estimate > 1.5 * claimed or said.lower_bound > claimed


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_fails_whatever_the_seed_and_the_noise(bug: str, unit: str, tmp_path: Path, monkeypatch: Patch) -> None:
    BUGS[bug](monkeypatch, unit)
    assert not any(audited(tmp_path, unit, NOISES[seed], 100 + seed)[0].passed for seed in range(2))


def as_they_come(patch: Patch) -> None:
    """No bug."""


def stream_halved(patch: Patch) -> None:
    right = Gaussian.add
    patch.setattr(Gaussian, "add", lambda self, to, deviation, stream: right(self, to, deviation / 2, stream))


def stream_repeated(patch: Patch) -> None:
    patch.setattr(key_stream, "os", SimpleNamespace(urandom=bytes))


@pytest.mark.parametrize(("bug", "passes"), [(as_they_come, True), (stream_halved, False), (stream_repeated, False)])
def test_noise_of_a_key_stream_is_audited_like_that_of_a_seed(
    bug: Callable[[Patch], None], passes: bool, tmp_path: Path, monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    said, claimed = audited(tmp_path, "example", 3.0, seed=5, seeded=False)
    assert said.passed is passes
    assert (said.estimate > 1.5 * claimed or said.lower_bound > claimed) is not passes


def test_the_audit_goes_through_the_codec_of_the_settings(tmp_path: Path, monkeypatch: Patch) -> None:
    """A codec that sends twice what it was given is caught by the server's clip; without that clip by the audit."""
    right = codecs._unpack_float32
    monkeypatch.setattr(codecs, "_unpack_float32", lambda payload, size: 2 * right(payload, size))
    assert audited(tmp_path, "client", 3.0, 6)[0].passed
    clip = cohort_noise.clipped
    monkeypatch.setattr(rounds.cohort_noise, "clipped", lambda update, norm: clip(update, 2 * norm))
    assert not audited(tmp_path, "client", 3.0, 6)[0].passed
