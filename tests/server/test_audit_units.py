"""The audit of local noise, fixed-size cohorts, turns and two promises: correct code passes, injected bugs fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opacus import optimizers

from privacy import accounting, audit, cohort_noise, local_noise, matrix_noise
from privacy.plan import Mechanism, Plan
from scenarios import load
from scenarios.settings import Settings, override
from server import audit as auditor
from server import canaries, probes, select
from server.canary_clients import _by_turns

Patch = pytest.MonkeyPatch
ROUNDS, DELTA, CANARIES = 10, 1e-5, 1500
NAMES = tuple(f"client-{i:02}" for i in range(20))
CHANGES = {
    "local": "privacy.unit=local",
    "fixed": "privacy.unit=client privacy.sampling=fixed rounds.fraction=0.9",
    "bands": "privacy.unit=client privacy.bands=3",
    "both": "privacy.unit=both privacy.update_clip=0.6",
}


class _Silent:
    def start(self, text: str, total: int) -> Callable[[], None]:
        return lambda: None


def settings_of(kind: str, seed: int, change: str = "") -> Settings:
    rounds = f"rounds.number={ROUNDS} export.recover_rounds=0 privacy.noise_seed={seed}"
    return override(load("digits").settings, f"{CHANGES[kind]} {rounds} {change}")


def plan_of(kind: str, noise: float, settings: Settings, rate: float = 0.9) -> Plan:
    """A plan of this noise for all rounds, the epsilon that it comes to, claimed as a run would."""
    mechanism = Mechanism(rate, noise, len(NAMES)) if kind == "fixed" else Mechanism(1.0, noise)
    steps = -(-ROUNDS // 3) if kind == "bands" else ROUNDS
    claimed = accounting.epsilon({mechanism: steps}, DELTA)
    whole = Plan(mechanism, settings.privacy.update_norm, claimed, DELTA, ROUNDS) if kind == "both" else None
    return Plan(mechanism, settings.privacy.clip, claimed, DELTA, steps, whole=whole)


def audited(states: Path, kind: str, noise: float, seed: int, change: str = "", rate: float = 0.9) -> dict[str, Any]:
    """What `umbel audit` finds of a mechanism by itself."""
    settings = settings_of(kind, seed, change)
    plans = dict.fromkeys(NAMES, plan_of(kind, noise, settings, rate))
    setup = canaries.Setup(load("digits"), settings, dict.fromkeys(NAMES, 50), plans, None, states, seed)
    return auditor._canaries(setup, CANARIES, _Silent())


# correct code


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", CHANGES)
def test_correct_code_passes_with_an_estimate_near_the_claim(kind: str, seed: int, tmp_path: Path) -> None:
    found = audited(tmp_path, kind, (1.0, 3.0, 6.0)[seed - 1], seed)
    for half in (found, *(found["halves"] or {}).values()):
        claimed, estimate = half["claimed_epsilon"], half["estimate"]
        assert half["verdict"] == "pass", half
        assert half["lower_bound"] <= claimed
        if kind == "fixed":  # the claim rests on the worst output and on a bound, the estimate on the typical one
            assert 0.4 * claimed < estimate < 1.2 * claimed
            assert "optimistic" in half["reason"]
        else:
            assert estimate == pytest.approx(claimed, rel=0.25)


def test_of_two_promises_the_worse_stands_first_and_each_keeps_its_own_claim(tmp_path: Path) -> None:
    settings = settings_of("both", 4)
    plan = plan_of("both", 3.0, settings)
    assert plan.whole is not None
    looser = Plan(Mechanism(1.0, 1.0), plan.whole.clip, 17.86, 1e-4, ROUNDS)
    plans = dict.fromkeys(NAMES, Plan(plan.mechanism, plan.clip, plan.epsilon, DELTA, ROUNDS, whole=looser))
    setup = canaries.Setup(load("digits"), settings, dict.fromkeys(NAMES, 50), plans, None, tmp_path, 4)
    found = auditor._canaries(setup, CANARIES, _Silent())
    example, client = found["halves"]["example"], found["halves"]["client"]
    assert (example["delta"], client["delta"]) == (DELTA, 1e-4)
    assert example["claimed_epsilon"] == pytest.approx(accounting.epsilon({plan.mechanism: ROUNDS}, DELTA))
    assert client["claimed_epsilon"] == pytest.approx(accounting.epsilon({looser.mechanism: ROUNDS}, 1e-4))
    assert (example["client"], client["client"]) == ("client-00", None)
    ratio = {name: half["estimate"] / half["claimed_epsilon"] for name, half in found["halves"].items()}
    assert found["estimate"] == found["halves"][max(ratio, key=lambda name: ratio[name])]["estimate"]
    assert (found["unit"], found["verdict"]) == ("both", "pass")


def test_a_fixed_cohort_is_drawn_by_the_real_draw_at_the_real_share(tmp_path: Path, monkeypatch: Patch) -> None:
    drawn: list[tuple[int, int]] = []
    right = select.fixed_size.draw

    def seen(names: Any, size: int, random: Any) -> list[str]:
        drawn.append((len(names), size))
        return right(names, size, random)

    monkeypatch.setattr(select.fixed_size, "draw", seen)
    audited(tmp_path, "fixed", 3.0, 5, "rounds.fraction=0.13", 0.15)  # of 20 clients 3 are drawn
    assert len(drawn) == ROUNDS * CANARIES // 500
    assert all(20 * size == 3 * names for names, size in drawn)


def test_what_turns_leave_is_read_through_the_matrix(tmp_path: Path) -> None:
    """A sum of increments without C sees less: the noise of a round is in the next ones, too."""
    random, bands, count = np.random.default_rng(0), 4, 40
    noise = matrix_noise.BandedNoise(1.0, bands, 1.0)
    moved, earlier = [], None
    for _ in range(count):
        update, earlier = noise.release(np.zeros(4000), 1.0, random, earlier)
        moved.append(update.astype(np.float64))
    turns = np.zeros((count, 4000))
    turns[::bands] = np.where(np.arange(count // bands) % 2, -1.0, 1.0)[:, None]
    scores = _by_turns(np.array(moved), turns, bands)
    assert scores.std() == pytest.approx((count / bands) ** -0.5, rel=0.05)
    assert np.allclose(_by_turns(turns, turns, bands), 1)
    assert (np.array(moved) * turns).sum(0).std() / (count / bands) > 1.1 * scores.std()


def test_the_evidence_of_replace_one_is_the_log_ratio_of_its_two_densities() -> None:
    at, q, z = np.linspace(-4, 4, 33), 0.3, 0.9

    def density(push: float) -> np.ndarray:
        return (1 - q) * np.exp(-(at**2) / (2 * z**2)) + q * np.exp(-((at - push) ** 2) / (2 * z**2))

    truth = np.log(density(1) / density(-1))
    assert np.allclose(audit.evidence(at, Mechanism(q, z, 10), 1), truth)


# bugs, injected into the code that the audit calls


def _noise(patch: Patch, factor: float) -> None:
    noised, release = local_noise.noised, matrix_noise.BandedNoise.release
    patch.setattr(local_noise, "noised", lambda update, clip, z, random: noised(update, clip, z * factor, random))
    patch.setattr(cohort_noise.CohortNoise, "update_multiplier", property(lambda self: self.multiplier * factor))

    def banded(self: Any, total: Any, clip: float, random: Any, earlier: Any) -> Any:
        wrong = matrix_noise.BandedNoise(self.multiplier * factor, self.bands, self.expected)
        return release(wrong, total, clip, random, earlier)

    patch.setattr(matrix_noise.BandedNoise, "release", banded)


def halved(patch: Patch) -> None:
    _noise(patch, 0.5)


def forgotten(patch: Patch) -> None:
    _noise(patch, 0.0)


def clip_ten_times_too_wide(patch: Patch) -> None:
    right = cohort_noise.clipped
    patch.setattr(cohort_noise, "clipped", lambda update, clip: right(update, 10 * clip))


BUGS = (halved, forgotten, clip_ten_times_too_wide)


@pytest.mark.parametrize("kind", ["local", "fixed", "bands"])
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_fails_the_claim(bug: Callable[[Patch], None], kind: str, tmp_path: Path, monkeypatch: Patch) -> None:
    bug(monkeypatch)
    assert audited(tmp_path, kind, 3.0, seed=7)["verdict"] == "fail"


@pytest.mark.parametrize("bug", BUGS)
def test_under_both_a_bug_of_the_server_s_half_fails_it(
    bug: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    found = audited(tmp_path, "both", 3.0, seed=8)
    assert (found["verdict"], found["halves"]["client"]["verdict"]) == ("fail", "fail")
    assert found["halves"]["example"]["verdict"] == "pass"
    assert found["reason"].startswith("client: ")
    assert found["estimate"] == found["halves"]["client"]["estimate"]


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_under_both_a_bug_of_the_examples_half_fails_it(factor: float, tmp_path: Path, monkeypatch: Patch) -> None:
    right = optimizers.DPOptimizer
    monkeypatch.setattr(
        optimizers,
        "DPOptimizer",
        lambda inner, **made: right(inner, **{**made, "noise_multiplier": made["noise_multiplier"] * factor}),
    )
    found = audited(tmp_path, "both", 3.0, seed=9)
    assert (found["verdict"], found["halves"]["example"]["verdict"]) == ("fail", "fail")
    assert found["halves"]["client"]["verdict"] == "pass"
    assert found["reason"].startswith("example: ")


def test_local_noise_that_repeats_itself_fails_the_claim(tmp_path: Path, monkeypatch: Patch) -> None:
    right = local_noise.noised
    monkeypatch.setattr(
        local_noise, "noised", lambda update, clip, z, _: right(update, clip, z, np.random.default_rng(7))
    )
    assert audited(tmp_path, "local", 3.0, seed=10)["verdict"] == "fail"


def test_every_unit_of_the_settings_has_its_probes() -> None:
    kinds = Settings.model_json_schema()["$defs"]["Privacy"]["properties"]["unit"]["enum"]
    assert sorted(probes.PROBES) == sorted(kinds)
