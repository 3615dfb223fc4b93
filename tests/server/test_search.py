"""A search: every trial is a run that is charged, and a secret one leaves the winner and nothing that counts trials."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clients.task import Device, Hello
from privacy import accounting
from privacy.ledger import Account, Ledger
from privacy.refused import Refused
from privacy.search import Repetitions, best_of
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import run as job
from server import search
from server.ledger_place import ledger_path
from server.planner import answer
from server.search_costs import Sought, candidates

BASE = (
    "rounds.number=3 local.batch=0 local.rate=1 export.recover_rounds=0 export.prune=0 privacy.unit=example "
    f"privacy.epsilon=2 privacy.clip=1 {search.ALONE}"
)
CANDIDATES = "local.rate=1e-9 | local.rate=1 rounds.number=4"
"""The first learns nothing, the second does."""


def examples(seed: int, size: int = 40) -> Examples:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
    return Examples(x, (x.sum(1) > 0).long())


def made(text: str = "") -> tuple[Scenario, list[Settings]]:
    test = examples(1, 300)
    fleet = Federation(dict.fromkeys("ab", 400), lambda name: examples(ord(name), 400), test, test, lambda _: test)
    born = override(Settings(), BASE)
    scenario = Scenario("made", born, {"net": lambda: nn.Linear(6, 2)}, lambda _: fleet, name="made")
    return scenario, candidates(override(born, text), CANDIDATES)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def ledger(scenario: Scenario, settings: Settings) -> Ledger:
    opened = Ledger(ledger_path(scenario, settings, "embedded"), keep=True)
    opened.read()
    return opened


def drawing(patch: pytest.MonkeyPatch, trials: int) -> None:
    patch.setattr(Repetitions, "draw", lambda self, random: trials)


def test_the_trials_of_a_search_that_shows_them_are_runs_whose_cost_is_their_composition(tmp_path: Path) -> None:
    scenario, tried = made()
    done = list(search.shown(scenario, "made", tried, 3, tmp_path / "search", quiet=True))
    assert [trial.candidate for trial in done] == [0, 1, 0]
    assert done[1].validation > max(done[0].validation, done[2].validation)
    reports = [json.loads((trial.folder / "report.json").read_text()) for trial in done]
    assert [report["settings"]["local.rate"] for report in reports] == [1e-9, 1, 1e-9]
    sought = Sought(3, "poisson", [answer(scenario, one) for one in tried])
    last = reports[-1]["privacy"]["clients"][0]
    (cost,) = sought.costs
    assert last["epsilon_total"] == pytest.approx(cost.composition, rel=5e-3)
    assert last["epsilon_total"] > last["epsilon"]


def test_a_secret_search_keeps_the_winner_alone_and_charges_every_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing(monkeypatch, 4)
    scenario, tried = made()
    scores: list[float] = []
    real = search._run

    def watched(*of: Any) -> float:
        scores.append(real(*of))
        return scores[-1]

    monkeypatch.setattr(search, "_run", watched)
    best = search.secret(scenario, "made", tried, Repetitions(4), tmp_path / "runs" / "winner")
    assert best is not None
    assert len(scores) == 4
    assert best.validation == max(scores)
    assert best.candidate == 1 or len(set(scores)) == 1  # four coins may all fall on the first
    assert best.folder == tmp_path / "runs" / "winner"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["winner"]
    opened = ledger(scenario, tried[0])
    assert opened.records is not None
    assert len({record["run"] for record in opened.records if record["kind"] == "RESERVE"}) == 4
    steps = sum(opened.accounts[Account("example", "a", "made")].history.values())
    assert 4 * 3 <= steps <= 4 * 4
    report = json.loads((best.folder / "report.json").read_text())
    assert report["settings"]["local.rate"] == (1e-9, 1)[best.candidate]
    published = report["privacy"]
    assert {client["epsilon_total"] for client in published["clients"]} == {None}
    assert (published["ledger"]["sequence"], published["ledger"]["hash"]) == (None, None)
    assert published["ledger"]["reason"] == search.UNTOLD
    head = opened.chain.head
    page = (best.folder / "report.html").read_text()
    assert head.digest not in page + json.dumps(report)


def test_each_trial_of_a_secret_search_takes_a_random_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing(monkeypatch, 400)
    scenario, tried = made()
    seen: Counter[float] = Counter()

    def counted(scenario: Scenario, reference: str, settings: Settings, path: Path, *_: Any) -> float:
        seen[settings.local.rate] += 1
        path.mkdir(parents=True)
        return 0.5

    monkeypatch.setattr(search, "_run", counted)
    monkeypatch.setattr(search, "_withhold", lambda folder: None)
    search.secret(scenario, "made", tried, Repetitions(400), tmp_path / "winner")
    assert seen.total() == 400
    assert 140 < seen[1] < 260  # 6 deviations of a fair coin


def test_no_trial_trains_nothing_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing(monkeypatch, 0)
    scenario, tried = made()
    assert search.secret(scenario, "made", tried, Repetitions(2), tmp_path / "winner") is None
    assert list(tmp_path.iterdir()) == []


def test_a_secret_search_that_runs_out_of_budget_keeps_nothing_and_what_was_spent_stays_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing(monkeypatch, 9)
    scenario, tried = made("privacy.budget=3")
    with pytest.raises(job.Stopped):
        search.secret(scenario, "made", tried, Repetitions(9), tmp_path / "winner")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    spent = ledger(scenario, tried[0]).accounts[Account("example", "a", "made")].epsilon
    assert 1.99 < spent <= 2, "a trial that could not be paid in full does not begin"


BOTH = "privacy.unit=both privacy.client_epsilon=20 privacy.update_clip=0.3"
NOISED = "evaluation.on=clients evaluation.epsilon=4 evaluation.every=2"
KINDS = [("example", "made"), ("client", "made"), ("example", "made (test)")]


def sought(trials: float, text: str, tried: str = CANDIDATES) -> Sought:
    scenario, _ = made(text)
    return Sought(trials, "poisson", [answer(scenario, one) for one in of(text, tried)])


def of(text: str, tried: str = CANDIDATES) -> list[Settings]:
    return candidates(override(made()[0].settings, text), tried)


def test_each_account_has_a_cost_of_its_own_from_its_own_mechanism() -> None:
    text = f"{BOTH} {NOISED}"
    costs = sought(5, text).costs
    assert [(cost.unit, cost.dataset) for cost in costs] == KINDS
    scenario, _ = made(text)
    answers = [answer(scenario, one) for one in of(text)]
    shares = [[one.plans["a"] for one in answers], [one.plans["a"].whole for one in answers]]
    shares.append([one.tests["a"] for one in answers])
    for cost, plans in zip(costs, shares, strict=True):
        histories = [{plan.mechanism: plan.steps} for plan in plans if plan]
        assert cost.selection == best_of(histories, plans[0].delta, Repetitions(5))
        dearer = max(accounting.epsilon(history, plans[0].delta) for history in histories)
        assert dearer < cost.selection < cost.composition
        assert (cost.candidates, cost.reason) == (2, "")


def test_a_search_that_shows_its_trials_costs_every_account_what_the_ledger_adds_up(tmp_path: Path) -> None:
    scenario, _ = made()
    tried = of(f"{BOTH} {NOISED}")
    done = list(search.shown(scenario, "made", tried, 2, tmp_path / "search", quiet=True))
    last = json.loads((done[-1].folder / "report.json").read_text())["privacy"]["clients"][0]
    totals = [part["epsilon_total"] for part in (last, last["whole"], last["tests"])]
    for cost, total in zip(sought(2, f"{BOTH} {NOISED}").costs, totals, strict=True):
        assert total == pytest.approx(cost.composition, rel=5e-3), cost.name


def test_a_secret_search_under_both_keeps_the_sums_of_every_account_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing(monkeypatch, 2)
    scenario, _ = made()
    best = search.secret(scenario, "made", of(f"{BOTH} {NOISED}"), Repetitions(2), tmp_path / "winner")
    assert best is not None
    published = json.loads((best.folder / "report.json").read_text())["privacy"]
    parts = [part for client in published["clients"] for part in (client, client["whole"], client["tests"])]
    assert {(part["epsilon_total"], part["epsilon"] is None) for part in parts} == {(None, False)}
    spent = ledger(scenario, scenario.settings).accounts
    assert {(account.unit, account.dataset) for account in spent} == set(KINDS)
    for account, standing in spent.items():
        if account.unit == "client":
            assert 6 <= sum(standing.history.values()) <= 8, "two trials of 3 or 4 rounds"


def test_candidates_of_different_units_charge_each_their_own_and_the_winner_claims_what_all_of_them_promise() -> None:
    examples, whole = sought(4, "", f"privacy.unit=example | {BOTH}").costs
    assert (examples.candidates, examples.reason) == (2, "")
    assert examples.selection < examples.composition
    assert whole.candidates == 1
    assert "privacy.unit=example" in whole.reason
    assert whole.selection == float("inf")
    assert whole.composition == pytest.approx(sought(2, BOTH, "").costs[1].composition), "two of four trials charge it"
    for one in sought(4, "", "privacy.unit=example | privacy.unit=client").costs:
        assert one.reason, "neither promise is made by every candidate"


def test_test_examples_that_a_candidate_leaves_alone_cost_nothing_there_and_those_it_publishes_leave_no_claim() -> None:
    _, tests = sought(4, "", f"{NOISED} | evaluation.on=server").costs
    assert tests.reason == ""
    assert tests.selection == pytest.approx(sought(4, NOISED, "").costs[1].selection)
    _, tests = sought(4, "", f"{NOISED} | evaluation.on=clients").costs
    assert "evaluation.epsilon" in tests.reason
    assert tests.selection == float("inf")


def test_cohorts_of_a_fixed_size_are_composed_and_leave_the_winner_no_claim() -> None:
    fleet = "privacy.unit=client rounds.fraction=0.5 privacy.sampling=fixed privacy.epsilon=40 privacy.delta=0.05"
    (cost,) = sought(2, fleet, "").costs
    assert "fixed number" in cost.reason
    assert cost.composition > 40


def test_candidates_that_split_the_data_differently_are_refused() -> None:
    scenario, tried = made()
    other = dataclasses.replace(answer(scenario, tried[1]), roster={"a": Hello("a", 7, "", Device())})
    with pytest.raises(Refused, match="one fleet"):
        Sought(2, "poisson", [answer(scenario, tried[0]), other])


def test_a_secret_search_with_seeded_noise_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    scenario, tried = made("privacy.noise_seed=1")
    with pytest.raises(Refused, match="noise_seed"):
        search.secret(scenario, "made", tried, Repetitions(2), tmp_path / "winner")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", ["made", "made (test)"])
def test_a_secret_search_is_refused_where_the_ledger_would_leave_a_client_out_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    drawing(monkeypatch, 1)
    scenario, _ = made()
    poor = Account("example", "a", dataset)
    opened = Ledger(ledger_path(scenario, scenario.settings, "embedded"))
    opened.open({poor: (1.0, 1 / 4000)})
    with pytest.raises(Refused, match=re.escape(f"client a (example, {dataset})")):
        search.secret(scenario, "made", of(NOISED), Repetitions(1), tmp_path / "winner")
    assert not ledger(scenario, scenario.settings).accounts[poor].history
