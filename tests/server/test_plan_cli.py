"""umbel plan and umbel search as their user meets them: keys that scripts rely on, one line for what cannot be."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scenarios import load
from server import cli

KEYS = (
    "noise_multiplier clip cohort rounds epsilon delta predicted_accuracy feasible nearest unit local_steps "
    "sampling_rate clients per_size spent curve search command"
)
QUICK = ["--set", "fleet.clients=5 rounds.average=1 export.recover_rounds=0 export.prune=0"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


def umbel(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `umbel WORDS`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["umbel", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code, out, err = umbel(capsys, "plan", "digits", "--json", *words)
    return code, json.loads(out), err


def nulls(value: Any, at: str = "") -> list[str]:
    if isinstance(value, dict):
        return [name for key, inner in value.items() for name in nulls(inner, f"{at}.{key}".lstrip("."))]
    return [at] if value is None else []


def test_the_answer_has_every_key_and_a_reason_for_every_null(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    code, facts, err = plan(capsys, "--epsilon", "3", "--rounds", "4", "--trials", "10", "--no-curve", *QUICK)
    assert (code, err) == (0, "")
    assert set(KEYS.split()) <= facts.keys()
    assert facts["feasible"]
    assert facts["clip"] == load("digits").settings.privacy.clip
    assert (facts["cohort"], facts["rounds"], facts["local_steps"], facts["sampling_rate"]) == (5, 4, 1, 1)
    assert facts["clients"]["count"] == 5
    assert sum(row["clients"] for row in facts["per_size"]) == 5
    sought = facts["search"]
    assert facts["epsilon"] < sought["repeat_and_select_epsilon"] < sought["composition_epsilon"]
    assert not state.exists()
    for name in nulls(facts):
        section, _, key = name.rpartition(".")
        inside = facts[section] if section else facts
        told = {f"{key}_reason", "reason"} & inside.keys() or key.startswith(("reason", "curve_", "predicted_"))
        assert told or key.endswith("_reason") or name in ("nearest", "spent.affordable_epsilon"), name


def test_an_impossible_target_is_an_answer_with_the_nearest_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, facts, err = plan(capsys, "--epsilon", "0.01", "--rounds", "50")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert (facts["feasible"], facts["noise_multiplier"], facts["epsilon"]) == (False, None, None)
    assert facts["noise_multiplier_reason"] == facts["reason"] in err
    nearest = facts["nearest"]["epsilon"]
    code, out, err = umbel(capsys, "plan", "digits", "--epsilon", "0.01", "--rounds", "50")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"epsilon {nearest:g}" in err
    code, facts, _ = plan(capsys, "--epsilon", str(nearest), "--rounds", "50", "--no-curve")
    assert (code, facts["feasible"]) == (0, True)
    code, facts, _ = plan(capsys, "--rounds", "50", "--no-curve", "--set", "privacy.max_noise=0.5")
    assert (code, facts["rounds"]) == (0, 50)  # no epsilon was asked for, so that it gives way
    assert facts["epsilon"] > 8


def test_the_terminal_shows_the_plan_and_the_page_draws_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    words = ["--epsilon", "6", "--rounds", "3", "--trials", "3", *QUICK]
    code, out, err = umbel(capsys, "plan", "digits", *words, "--out", str(page))
    assert (code, err) == (0, "")
    for said in ("Noise multiplier", "Clients by size", "Predicted accuracy", "RepeatAndSelect", "charged no ledger"):
        assert said in out
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "charged no ledger" in text


WRONG = {
    "no unit": (["plan", "digits", "--set", "privacy.unit=none"], "privacy.unit=example"),
    "misspelt setting": (["plan", "digits", "--set", "privacy.epsilo=1"], "privacy.epsilon"),
    "epsilon of zero": (["plan", "digits", "--epsilon", "0"], "privacy.epsilon"),
    "negative epsilon": (["plan", "digits", "--epsilon", "-1"], "privacy.epsilon"),
    "epsilon that is no number": (["plan", "digits", "--epsilon", "nan"], "privacy.epsilon"),
    "delta of one": (["plan", "digits", "--delta", "1"], "privacy.delta"),
    "no rounds": (["plan", "digits", "--rounds", "0"], "rounds.number"),
    "a cohort above all": (["plan", "digits", "--cohort", "1.5"], "rounds.fraction"),
    "less than a trial": (["plan", "digits", "--trials", "0.5", "--no-curve"], "1 trial or more"),
    "unknown law": (["plan", "digits", "--trials", "5", "--distribution", "fair", "--no-curve"], "poisson"),
    "candidate out of reach": (["search", "digits", "--candidates", "privacy.epsilon=0.01 | "], "out of reach"),
    "half a trial": (["search", "digits", "--candidates", "privacy.clip=1", "--trials", "1.5"], "--secret"),
    "no candidates": (["search", "digits"], "--candidates"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_input_gives_one_line_and_exit_code_2_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    words, named = WRONG[kind]
    code, out, err = umbel(capsys, *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err
    assert list(tmp_path.iterdir()) == []


def test_a_search_ends_with_its_trials_side_by_side_and_the_best_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tried = "privacy.epsilon=0.1 | privacy.epsilon=8"
    settings = f"{QUICK[1]} rounds.number=2"
    words = ["--candidates", tried, "--set", settings, "--out", str(tmp_path / "s")]
    code, out, _ = umbel(capsys, "search", "digits", *words)
    assert code == 0
    assert "plain composition" in out
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["1", "2"]
    assert "Best on validation data privacy.epsilon=8 (" in " ".join(out.split())
    code, _, err = umbel(capsys, "search", "digits", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "not empty" in err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("privacy.search.Repetitions.draw", lambda self, random: 2)
        words = ["--candidates", tried, "--set", settings, "--out", str(tmp_path / "w"), "--secret", "--trials", "7"]
        code, out, err = umbel(capsys, "search", "digits", *words)
    assert code == 0
    for said in ("RepeatAndSelect", "7 trials on average", "nor how long they took"):
        assert said in " ".join(out.split())
    assert "round" not in err
    assert (tmp_path / "w" / "report.html").exists()
