"""umbel audit as a command: what it prints, refuses and leaves behind; and the two attacks on real data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from privacy import cohort_noise, ghost
from scenarios import Scenario, load
from scenarios.settings import override
from server import audit, membership, probes
from server.record import RunFolder

SCENARIO = '''"""Digits, few of them, quick to train."""
from dataclasses import replace
from torch import nn
from scenarios.digits import SCENARIO as digits
from scenarios.settings import override

def rectified():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

SCENARIO = replace(
    digits,
    settings=override(
        digits.settings,
        "rounds.number=4 rounds.average=1 fleet.clients=6 partition=iid local.batch=0 local.rate=1 local.decay=0 "
        "export.recover_rounds=0 export.prune=0 reference.central_epochs=0 reference.no_privacy=false",
    ),
    models={**digits.models, "rectified": rectified},
)
'''
STABLE = {
    "claimed_epsilon", "delta", "estimate", "lower_bound", "confidence", "verdict", "reason", "method", "canaries",
    "rounds", "sampling_rate", "noise_multiplier", "seed", "seconds", "histogram", "membership", "membership_reason",
    "inversion", "inversion_reason",
}  # fmt: skip


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with quick.py in it and a state folder of its own, to work in."""
    (tmp_path / "quick.py").write_text(SCENARIO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    return tmp_path


def audited(umbel: Callable[..., Any], *words: str, code: int = 0) -> dict[str, Any]:
    said = umbel("audit", *words, "--json")
    assert said.code == code
    return dict(json.loads(said.out))


# what it says


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_scenario_under_dp_passes_with_every_stable_key(unit: str, house: Path, umbel: Callable[..., Any]) -> None:
    found = audited(umbel, "quick.py", "--set", f"privacy.unit={unit}", "--canaries", "2000", "--out", "kept.json")
    assert found.keys() >= STABLE
    assert json.loads(Path("kept.json").read_text()) == found
    assert found["verdict"] == "pass"
    assert 0 <= found["lower_bound"] <= found["claimed_epsilon"] <= 8
    assert found["estimate"] == pytest.approx(found["claimed_epsilon"], rel=0.2)
    assert (found["confidence"], found["canaries"], found["rounds"]) == (0.95, 2000, 4)
    assert sum(found["histogram"]["in"]) + sum(found["histogram"]["out"]) == 2000
    assert found["membership"] is None
    assert "--attacks" in found["membership_reason"]


def test_sampling_is_told_and_never_held_to_the_estimate_alone(house: Path, umbel: Callable[..., Any]) -> None:
    change = "privacy.unit=client rounds.fraction=0.5 rounds.minimum=0 server.step=momentum"
    found = audited(umbel, "quick.py", "--set", change, "--canaries", "2000")
    assert found["verdict"] == "pass"
    assert found["sampling_rate"] == 0.5
    assert "optimistic" in found["reason"]
    assert found["estimate"] < found["claimed_epsilon"]


def test_without_dp_there_is_no_claim_to_fail(house: Path, umbel: Callable[..., Any]) -> None:
    found = audited(umbel, "quick.py", "--set", "privacy.unit=none", "--canaries", "200")
    assert (found["claimed_epsilon"], found["estimate"], found["verdict"]) == (None, None, "none")
    assert "tell all" in found["reason"]


def test_a_broken_mechanism_fails_with_exit_code_1(
    house: Path, umbel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort_noise.CohortNoise, "update_multiplier", 0.0)
    found = audited(umbel, "quick.py", "--set", "privacy.unit=client", "--canaries", "500", code=1)
    assert found["verdict"] == "fail"
    assert found["estimate"] is None
    assert "without noise" in found["reason"]


def test_people_get_a_table_and_scripts_a_word(house: Path, umbel: Callable[..., Any]) -> None:
    said = umbel("audit", "quick.py", "--canaries", "500")
    assert said.code == 0
    for words in ("Claimed", "Estimate", "Lower bound", "overlap", "pass:", "not that there is nothing"):
        assert words in said.out
    assert "canaries" in said.err
    said = umbel("audit", "quick.py", "--canaries", "500", "--quiet")
    assert said.code == 0
    assert (said.out, said.err) == ("pass\n", "")


def test_equal_seeds_and_seeded_noise_give_equal_audits(house: Path, umbel: Callable[..., Any]) -> None:
    words = ("quick.py", "--set", "privacy.unit=client privacy.noise_seed=3", "--canaries", "500", "--seed")
    first, again, other = (audited(umbel, *words, seed) for seed in ("4", "4", "5"))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["estimate"] != other["estimate"]
    real = [audited(umbel, "quick.py", "--canaries", "500", "--set", "privacy.unit=client") for _ in range(2)]
    assert real[0]["estimate"] != real[1]["estimate"]


# what it spends and leaves behind


def test_no_ledger_is_opened_and_nothing_is_spent(house: Path, umbel: Callable[..., Any]) -> None:
    audited(umbel, "quick.py", "--set", "privacy.budget=8", "--canaries", "200", "--attacks", "canaries,inversion")
    assert not (house / "state").exists()
    assert sorted(path.name for path in house.iterdir()) == ["quick.py"]


def test_a_run_s_own_plans_are_audited_and_the_result_joins_its_folder(house: Path, umbel: Callable[..., Any]) -> None:
    assert umbel("run", "quick.py", "--set", "privacy.unit=client rounds.number=2", "--out", "run", "--quiet").code == 0
    spent = {path: path.read_bytes() for path in (house / "state").rglob("*") if path.is_file()}
    drawn = Path("run/report.html").stat().st_ino
    found = audited(umbel, "run", "--canaries", "500", "--seed", "9")
    assert json.loads(Path("run/audit.json").read_text()) == found
    plan = json.loads(Path("run/start.json").read_text())["plans"]["client-0"]
    assert found["noise_multiplier"] == plan["mechanism"]["noise_multiplier"]
    worst = json.loads(Path("run/report.json").read_text())["privacy"]["worst_epsilon"]
    assert found["claimed_epsilon"] == pytest.approx(worst, rel=1e-3)
    assert found["seed"] == 9
    assert Path("run/report.html").stat().st_ino != drawn
    assert not list(Path("run").glob("*.partial"))
    assert spent == {path: path.read_bytes() for path in (house / "state").rglob("*") if path.is_file()}


def test_an_audit_that_is_cut_off_leaves_the_old_result(
    house: Path, umbel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = override(load("quick.py").settings, "privacy.unit=client")
    RunFolder.create(Path("run"), "quick.py", settings).close()
    audited(umbel, "run", "--canaries", "200")
    before = Path("run/audit.json").read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(probes.PROBES, "client", {"client": interrupted})
    assert umbel("audit", "run", "--canaries", "200", "--quiet").code == 3
    assert Path("run/audit.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "no scenario 'nothing'"),
        (["quick.py", "--attacks", "luck"], "no attack 'luck'"),
        (["quick.py", "--attacks", ","], "no attack was named"),
        (["quick.py", "--canaries", "3"], "--canaries 3"),
        (["quick.py", "--shadows", "2"], "--shadows 2"),
        (["quick.py", "--set", "privacy.epsilon=-1"], "privacy.epsilon"),
        (["quick.py", "--set", "privacy.unit=client privacy.delta=0.9"], "privacy.delta"),
        (["quick.py", "--out", "no/such/folder.json"], "--out"),
        (["empty"], "no run folder"),
        (["run", "--set", "privacy.epsilon=3"], "--set"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], says: str, house: Path, umbel: Callable[..., Any]
) -> None:
    (house / "empty").mkdir()
    RunFolder.create(Path("run"), "quick.py", load("quick.py").settings).close()
    said = umbel("audit", *words)
    assert said.code == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert says in said.err
    assert not (house / "run" / "audit.json").exists()


# membership


def test_the_likelihood_ratio_is_that_of_normal_laws_of_the_other_shadows() -> None:
    random = np.random.default_rng(0)
    included = np.argsort(random.random((8, 5)), axis=0) < 4
    confidence = random.normal(size=(8, 5)) * 0.05 + 0.1 * included

    def law(s: int, m: int, there: bool) -> tuple[float, float]:
        """Mean, and what its error adds to the variance, of the shadows but s that have target m in, or not."""
        others = [confidence[i, m] for i in range(8) if i != s and included[i, m] == there]
        return float(np.mean(others)), 1 + 1 / len(others)

    spots = [(s, m) for s in range(8) for m in range(5)]
    own = [
        (confidence[s, m] - law(s, m, bool(included[s, m]))[0], law(s, m, bool(included[s, m]))[1]) for s, m in spots
    ]
    variance = np.mean([apart**2 / more for apart, more in own])
    slow = np.zeros((8, 5))
    for s, m in spots:
        for there, sign in ((True, 1), (False, -1)):
            mean, more = law(s, m, there)
            law_sm = stats.norm(mean, np.sqrt(variance * more))
            slow[s, m] += sign * (law_sm.logpdf(confidence[s, m]) - law_sm.logpdf(mean))
    assert np.allclose(membership.likelihood_ratios(confidence, included), slow)
    assert np.allclose(membership.likelihood_ratios(100 * confidence, included), slow)


def test_where_nothing_leaks_the_ratio_guesses_and_where_all_leaks_it_knows() -> None:
    random = np.random.default_rng(1)
    included = np.argsort(random.random((16, 300)), axis=0) < 8
    for shift, low, high in ((0.0, 0.47, 0.53), (8.0, 0.999, 1.0)):
        confidence = random.lognormal(0, 2, 300) * (random.normal(size=included.shape) + shift * included)
        scores = membership.likelihood_ratios(confidence, included)
        auc, _ = audit.audit.ranking(scores[included], scores[~included])
        assert low <= auc <= high


def test_membership_is_found_without_privacy_and_less_with_it(house: Path, umbel: Callable[..., Any]) -> None:
    change = "privacy.unit=client privacy.epsilon=1 rounds.number=3 fleet.clients=10 partition=dirichlet:0.1"
    words = ("quick.py", "--set", change, "--canaries", "200", "--attacks", "membership", "--shadows", "10")
    found = audited(umbel, *words)
    attack = found["membership"]
    assert (attack["shadows"], attack["targets"], attack["unit"]) == (10, 10, "client")
    assert attack["without_privacy"]["auc"] > 0.7 > attack["auc"] - 0.1
    assert attack["without_privacy"]["auc"] > attack["auc"]
    assert found["verdict"] == "none"
    assert found["estimate"] is None


# inversion


def test_an_example_is_rebuilt_without_privacy_and_not_with_noise(
    house: Path, umbel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_REBUILT", 3)
    for unit in ("example", "client"):
        said = umbel("audit", "quick.py", "--set", f"privacy.unit={unit}", "--attacks", "inversion", "--json")
        assert said.code == 0
        assert "itself a release" in said.err
        attack = json.loads(said.out)["inversion"]
        assert attack["without_privacy"]["analytic_mse"] < 1e-8
        assert attack["without_privacy"]["dlg_mse"] < attack["class_mean_mse"] / 10
        assert attack["without_privacy"]["labels_right"] == 1
        assert attack["mse"] > attack["class_mean_mse"]
        assert "no evidence of privacy" in attack["note"]


def test_what_a_model_does_not_allow_is_null_with_the_reason(house: Path, umbel: Callable[..., Any]) -> None:
    found = audited(umbel, "quick.py", "--set", "model=rectified", "--attacks", "inversion")
    assert found["inversion"] is None
    assert "ReLU" in found["inversion_reason"]


def test_data_that_are_elsewhere_leave_the_canaries_alone(house: Path, umbel: Callable[..., Any]) -> None:
    assert umbel("run", "quick.py", "--set", "rounds.number=1 fleet.clients=2", "--out", "run", "--quiet").code == 0
    gone = SCENARIO + (
        "\nfrom privacy.refused import Refused\n"
        "def gone(settings):\n    raise Refused('the data are elsewhere')\n"
        "SCENARIO = replace(SCENARIO, data=gone)\n"
    )
    (house / "quick.py").write_text(gone)
    found = audited(umbel, "run", "--canaries", "1000", "--attacks", "canaries,membership,inversion")
    assert found["verdict"] == "pass"
    assert "model" in found["real"].partition("left out")[2]
    assert found["membership_reason"] == found["inversion_reason"] == "the training data are not on this machine"


# the ghost model


def test_a_canary_s_gradient_is_its_own_weight_s_alone_and_others_train_as_before() -> None:
    scenario: Scenario = load("digits")
    base = nn.Linear(64, 10)
    extended = ghost.Ghost(base, (64,), 5)
    loss = ghost.ghost_loss(scenario.loss, 3.0)
    x, y = torch.randn(4, 64), torch.tensor([1, 2, 3, 0])
    mixed = torch.cat([torch.cat([x, torch.zeros(4, 1)], 1), torch.cat([torch.zeros(1, 64), torch.tensor([[2.0]])], 1)])
    loss(extended(mixed), torch.cat([y, torch.tensor([0])])).backward()
    assert extended.ghost.weight.grad is not None
    assert extended.ghost.weight.grad.tolist() == [[0, pytest.approx(3 / 5), 0, 0, 0]]
    found = base.weight.grad
    assert found is not None
    (slow,) = torch.autograd.grad(scenario.loss(base(x), y), [base.weight])
    assert torch.allclose(found, slow * 4 / 5, atol=1e-7)
