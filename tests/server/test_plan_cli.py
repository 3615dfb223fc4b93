"""umbel plan and umbel search as their user meets them: keys that scripts rely on, one line for what cannot be."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy.ledger import Account, Ledger, Window
from scenarios import load
from server import units

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


def plan(umbel: Callable[..., Any], *words: str) -> tuple[int, dict[str, Any], str]:
    code, out, err = umbel("plan", "digits", "--json", *words)
    return code, json.loads(out), err


def nulls(value: Any, at: str = "") -> list[str]:
    if isinstance(value, dict):
        return [name for key, inner in value.items() for name in nulls(inner, f"{at}.{key}".lstrip("."))]
    return [at] if value is None else []


def test_the_answer_has_every_key_and_a_reason_for_every_null(umbel: Callable[..., Any], state: Path) -> None:
    code, facts, err = plan(umbel, "--epsilon", "3", "--rounds", "4", "--trials", "10", "--no-curve", *QUICK)
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
    umbel: Callable[..., Any],
) -> None:
    code, facts, err = plan(umbel, "--epsilon", "0.01", "--rounds", "50")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert (facts["feasible"], facts["noise_multiplier"], facts["epsilon"]) == (False, None, None)
    assert facts["noise_multiplier_reason"] == facts["reason"] in err
    nearest = facts["nearest"]["epsilon"]
    code, out, err = umbel("plan", "digits", "--epsilon", "0.01", "--rounds", "50")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"epsilon {nearest:g}" in err
    code, facts, _ = plan(umbel, "--epsilon", str(nearest), "--rounds", "50", "--no-curve")
    assert (code, facts["feasible"]) == (0, True)
    code, facts, _ = plan(umbel, "--rounds", "50", "--no-curve", "--set", "privacy.max_noise=0.5")
    assert (code, facts["rounds"]) == (0, 50)  # no epsilon was asked for, so that it gives way
    assert facts["epsilon"] > 8


def test_the_terminal_shows_the_plan_and_the_page_draws_it(umbel: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    words = ["--epsilon", "6", "--rounds", "3", "--trials", "3", *QUICK]
    code, out, err = umbel("plan", "digits", *words, "--out", str(page))
    assert (code, err) == (0, "")
    for said in ("Noise multiplier", "Clients by size", "Predicted accuracy", "RepeatAndSelect", "charged no ledger"):
        assert said in out
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "charged no ledger" in text


FIXED = "privacy.unit=client privacy.clip=1 privacy.epsilon=60 rounds.fraction=0.5 privacy.sampling=fixed"
TWO = (
    "privacy.unit=both privacy.client_epsilon=20 privacy.update_clip=0.3 evaluation.on=clients evaluation.epsilon=4 "
    "evaluation.every=2"
)


def test_the_page_and_the_terminal_show_the_promise_to_a_client_as_a_whole_and_to_its_test_examples(
    umbel: Callable[..., Any], tmp_path: Path
) -> None:
    page, settings = tmp_path / "plan.html", f"{QUICK[1]} {TWO} rounds.number=3"
    words = ["--no-curve", "--trials", "3", "--set", settings]
    _, facts, _ = plan(umbel, *words)
    code, out, _ = umbel("plan", "digits", *words, "--out", str(page))
    assert code == 0
    text = page.read_text()
    for name, promise in (("Client as a whole", facts["whole"]), ("Test examples", facts["tests"])):
        row = text[text.index(f"<td>{name}</td>") :].partition("</tr>")[0]
        for figure in (units.epsilon(promise["epsilon"]), units.number(promise["noise_multiplier"])):
            assert f">{figure}<" in row
            assert figure in out
    assert [(one["unit"], one["dataset"]) for one in facts["search"]["accounts"]] == [
        ("example", "digits"),
        ("client", "digits"),
        ("example", "digits (test)"),
    ]
    for one in facts["search"]["accounts"]:
        assert f">{units.epsilon(one['repeat_and_select_epsilon'])}<" in text
        assert units.epsilon(one["composition_epsilon"]) in out


def test_the_page_and_the_terminal_name_who_cannot_pay_and_of_which_account(
    umbel: Callable[..., Any], tmp_path: Path, state: Path
) -> None:
    ledger, page = Ledger(state / "simulations" / "digits.ledger"), tmp_path / "plan.html"
    poor = {Account("example", "client-1", "digits (test)"): (1.0, 1e-3)}
    ledger.open(poor | {Account("client", "client-2", "digits"): (2.0, 1e-2)}, Window(30, 1.0))
    words = ["--no-curve", "--set", f"{QUICK[1]} {TWO} rounds.number=3", "--out", str(page)]
    code, out, _ = umbel("plan", "digits", *words)
    assert code == 0
    assert "client-2 cannot pay" in out
    assert "in 30 days left" in " ".join(out.split())
    assert "1 cannot pay for every evaluation; client-1" in " ".join(out.split())
    text = page.read_text()
    assert "<td>client-2</td><td>client, digits</td>" in text
    assert "<td>client-1</td><td>example, digits (test)</td>" in text


def test_of_candidates_with_different_promises_it_says_who_charges_what_and_what_a_winner_cannot_claim(
    umbel: Callable[..., Any], tmp_path: Path
) -> None:
    tried, page = "privacy.unit=example | privacy.unit=both privacy.client_epsilon=20", tmp_path / "plan.html"
    settings = f"{QUICK[1]} privacy.update_clip=0.3 rounds.number=3"
    words = ["--no-curve", "--candidates", tried, "--set", settings, "--out", str(page)]
    code, out, _ = umbel("plan", "digits", *words)
    assert code == 0
    for said in (" ".join(out.split()), page.read_text()):
        assert "charged by 1 of 2 settings" in said
        assert "no claim: a candidate that may win, of privacy.unit=example, promises nothing here" in said


def test_a_search_under_both_says_what_each_account_pays_and_a_secret_one_what_each_may_claim(
    umbel: Callable[..., Any], tmp_path: Path
) -> None:
    tried, settings = "privacy.clip=0.3 | privacy.clip=0.5", f"{QUICK[1]} {TWO} rounds.number=2"
    words = ["digits", "--candidates", tried, "--set", settings, "--out"]
    code, out, _ = umbel("search", *words, str(tmp_path / "s"))
    assert code == 0
    for name in ("Training examples", "Client as a whole", "Test examples"):
        assert re.search(rf"{name} +ε [0-9.]+ by plain composition; over the ledger ε [0-9.]+", " ".join(out.split()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("privacy.search.Repetitions.draw", lambda self, random: 1)
        code, out, _ = umbel("search", *words, str(tmp_path / "w"), "--secret")
    assert code == 0
    for name in ("Training examples", "Client as a whole", "Test examples"):
        assert re.search(rf"{name} +ε [0-9.]+ by RepeatAndSelect", " ".join(out.split()))


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
    "a secret search without a common promise": (
        ["search", "digits", "--secret", "--candidates", "privacy.unit=client privacy.clip=1 | "],
        "promises nothing here",
    ),
    "a secret search of fixed cohorts": (
        [*["search", "digits", "--secret", "--candidates", "rounds.number=3", "--set"], FIXED],
        "fixed number",
    ),
    "a secret search with seeded noise": (
        [*["search", "digits", "--secret", "--candidates", "privacy.noise_seed=1"]],
        "promises nothing",
    ),
    "candidates of two fleets": (
        ["search", "digits", "--candidates", "fleet.clients=4 | fleet.clients=5"],
        "one fleet",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_input_gives_one_line_and_exit_code_2_and_writes_nothing(
    umbel: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    words, named = WRONG[kind]
    code, out, err = umbel(*words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err
    assert list(tmp_path.iterdir()) == []


def test_a_search_ends_with_its_trials_side_by_side_and_the_best_by_name(
    umbel: Callable[..., Any], tmp_path: Path
) -> None:
    tried = "privacy.epsilon=0.1 | privacy.epsilon=8"
    settings = f"{QUICK[1]} rounds.number=2"
    words = ["--candidates", tried, "--set", settings, "--out", str(tmp_path / "s")]
    code, out, _ = umbel("search", "digits", *words)
    assert code == 0
    assert "plain composition" in out
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["1", "2"]
    assert "Best on validation data privacy.epsilon=8 (" in " ".join(out.split())
    code, _, err = umbel("search", "digits", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "not empty" in err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("privacy.search.Repetitions.draw", lambda self, random: 2)
        words = ["--candidates", tried, "--set", settings, "--out", str(tmp_path / "w"), "--secret", "--trials", "7"]
        code, out, err = umbel("search", "digits", *words)
    assert code == 0
    for said in ("RepeatAndSelect", "7 trials on average", "nor how long they took"):
        assert said in " ".join(out.split())
    assert "round" not in err
    assert (tmp_path / "w" / "report.html").exists()
