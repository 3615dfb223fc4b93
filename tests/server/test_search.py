"""A search: every trial is a run that is charged, and a secret one leaves the winner and nothing that counts trials."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from privacy.ledger import Account, Ledger
from privacy.search import Repetitions
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import accounts, search
from server import run as job
from server.plan_facts import Sought, candidates
from server.planner import answer

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
    fleet = Federation(dict.fromkeys("ab", 400), lambda name: examples(ord(name), 400), test, test)
    born = override(Settings(), BASE)
    scenario = Scenario("made", born, {"net": lambda: nn.Linear(6, 2)}, lambda _: fleet, name="made")
    return scenario, candidates(override(born, text), CANDIDATES)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def ledger(scenario: Scenario, settings: Settings) -> Ledger:
    opened = Ledger(accounts.ledger_path(scenario, settings, "embedded"), keep=True)
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
    assert last["epsilon_total"] == pytest.approx(sought.composition, rel=5e-3)
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
    assert 2 < spent <= 3
