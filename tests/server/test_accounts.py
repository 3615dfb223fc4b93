"""A run's side of the ledger: budgets that outlive runs, clients left out by name, ledgers that went missing."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from privacy import accounting, chain, recompute
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import accounts
from server import run as job
from server.costs import Cost
from server.embedded import EmbeddedFleet
from server.ledger_place import ledger_path
from server.record import RunFolder

BASE = (
    "rounds.number=3 local.batch=0 local.rate=1 export.recover_rounds=0 export.prune=0 reference.no_privacy=false "
    "privacy.unit=example privacy.epsilon=2"
)


def made_examples(seed: int) -> Examples:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
    return Examples(x, (x.sum(1) > 0).long())


def made_scenario(name: str = "made", dataset: str = "", clients: str = "ab") -> Scenario:
    sizes, test = dict.fromkeys(clients, 30), made_examples(1)
    federation = Federation(sizes, lambda client: made_examples(ord(client)), test, test)
    settings = override(Settings(), BASE)
    return Scenario(
        "made", settings, {"net": lambda: nn.Linear(6, 2)}, lambda _: federation, dataset=dataset, name=name
    )


class Quiet:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def status(self, text: str) -> None:
        pass


def run(path: Path, text: str = "", scenario: Scenario | None = None, watch: Quiet | None = None) -> dict[str, Any]:
    """A run, or if its folder is there already, the rest of it."""
    scenario = scenario or made_scenario()
    settings, again = override(scenario.settings, text), path.exists()
    with RunFolder.open(path) if again else RunFolder.create(path, "made", settings) as folder:
        return job.run(job.prepare(scenario, settings, folder, EmbeddedFleet, watch or Quiet()))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_the_total_of_a_client_is_that_of_all_runs_composed(tmp_path: Path) -> None:
    first, second = run(tmp_path / "one"), run(tmp_path / "two", "privacy.epsilon=1")
    before, now = first["privacy"]["clients"][0], second["privacy"]["clients"][0]
    assert before["epsilon_total"] == pytest.approx(before["epsilon"], rel=1e-3)
    both = {Mechanism(1.0, client["noise_multiplier"]): client["steps"] for client in (before, now)}
    assert now["epsilon_total"] == accounting.epsilon(both, before["delta"])
    assert now["epsilon"] < now["epsilon_total"] < before["epsilon"] + now["epsilon"]
    evidence = second["privacy"]["ledger"]
    assert Ledger(Path(evidence["path"])).read() == (evidence["sequence"], evidence["hash"])
    for row in recompute.accounts(recompute.records(Path(evidence["path"]))):
        assert row["epsilon"] == pytest.approx(now["epsilon_total"], rel=5e-3)


def test_scenarios_that_declare_the_same_data_on_real_devices_share_its_account(state: Path) -> None:
    settings = Settings()
    one, other = made_scenario("one", "wards"), made_scenario("other", "wards")
    assert ledger_path(one, settings, "deployment") == ledger_path(other, settings, "deployment")
    assert ledger_path(one, settings, "simulation") == state / "simulations" / "wards-one.ledger"
    assert ledger_path(one, settings, "embedded") == ledger_path(one, settings, "simulation")


def test_a_client_over_its_budget_is_left_out_by_name_and_the_others_go_on(tmp_path: Path) -> None:
    first, watch = run(tmp_path / "one", "privacy.budget=3"), Quiet()
    ledger = Ledger(Path(first["privacy"]["ledger"]["path"]))
    ledger.read()
    spent = first["privacy"]["clients"][0]
    step = Mechanism(1.0, spent["noise_multiplier"])
    ledger.reserve("elsewhere", 1, {Account("example", "a", "made"): (step, 1)})
    while not ledger.over(ask := {Account("example", "a", "made"): (step, 1)}):
        ledger.reserve("elsewhere", 2, ask)
    report = run(tmp_path / "two", "privacy.budget=3 rounds.number=1 privacy.epsilon=1.2", watch=watch)
    assert [entry["name"] for entry in watch.rows[0]["skipped"]] == ["a"]
    assert "of its 3 is left" in watch.rows[0]["skipped"][0]["reason"]
    assert watch.rows[0]["applied"]
    assert report["fleet"]["left_out"] == [{"name": "a", "reason": "ledger", "times": 1}]
    assert [client["steps"] for client in report["privacy"]["clients"]] == [0, 1]
    assert all(client["epsilon_total"] <= 3 for client in report["privacy"]["clients"])


def test_runs_stop_where_too_few_can_pay_and_nobody_has_passed_the_budget(tmp_path: Path) -> None:
    released, why = list[int](), ""
    while not why:
        watch = Quiet()
        try:
            run(tmp_path / f"run-{len(released)}", "privacy.budget=5", watch=watch)
        except job.Stopped as stopped:
            why = str(stopped)
        released.append(len(watch.rows))
    assert re.search(r"the budget is spent: a: epsilon 0\.\d+ of its 5 is left.*; b: epsilon", why)
    assert 2 <= len(released) < 9
    ledger = Ledger(tmp_path / "state" / "simulations" / "made.ledger")
    ledger.read()
    assert all(4 < standing.epsilon <= 5 for standing in ledger.accounts.values())
    assert [sum(standing.history.values()) for standing in ledger.accounts.values()] == [sum(released)] * 2
    last = tmp_path / f"run-{len(released) - 1}"
    with pytest.raises(job.Stopped):  # resumable, and still not payable
        run(last, "privacy.budget=5")
    assert not (last / "report.json").exists()


def test_what_was_reserved_for_a_round_that_does_not_take_place_is_not_spent(tmp_path: Path) -> None:
    first = run(tmp_path / "one", "privacy.budget=3 rounds.number=1")
    path, step = Path(first["privacy"]["ledger"]["path"]), Mechanism(1.0, 0.1)
    ledger = Ledger(path)
    ledger.read()
    names = {name: Account("example", name, "made") for name in "ab"}
    before = dict(ledger.accounts[names["b"]].history)
    steps = {"a": step, "b": Mechanism(1.0, 50.0)}
    fleet = {name: (Cost(names[name], steps[name], 1),) for name in "ab"}
    with RunFolder.open(tmp_path / "one") as folder:
        charged = accounts.Accounts(folder, 2, ledger, "two", fleet)
        with pytest.raises(accounts.Exhausted, match="a: epsilon"):
            charged.reserve(1, {"a": 1, "b": 1})
        least = accounts.Accounts(folder, 1, ledger, "two", fleet)
        assert least.reserve(1, {"a": 1}).keys() == {"a"}, "b could still pay: the run goes on"
    later = Ledger(path)
    later.read()
    assert +later.accounts[names["b"]].history == before


def test_seeded_noise_and_no_privacy_write_nothing(tmp_path: Path, state: Path) -> None:
    for name, text in (("seeded", "privacy.noise_seed=1"), ("open", "privacy.unit=none")):
        report = run(tmp_path / name, text)
        assert report["privacy"]["ledger"]["path"] is None
        assert report["privacy"]["ledger"]["reason"]
        assert all(client["epsilon_total"] is None for client in report["privacy"]["clients"])
    assert not state.exists()


def test_a_resumed_run_refuses_a_ledger_that_is_not_the_one_it_wrote(tmp_path: Path, state: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run/report.json").unlink()
    shutil.copytree(state, tmp_path / "old")
    run(tmp_path / "other")
    shutil.move(state, tmp_path / "moved")
    with pytest.raises(Refused, match="does not go on from what this run wrote"):
        run(tmp_path / "run")
    run(tmp_path / "run", f"run.state={tmp_path / 'moved'}")
    file = tmp_path / "moved/simulations/made.ledger"
    for path in (file, file.with_name("made.ledger.head")):  # rolled back, head and all
        path.unlink()
    (tmp_path / "run/report.json").unlink()
    with pytest.raises(Refused, match="bring that file back"):
        run(tmp_path / "run", f"run.state={tmp_path / 'moved'}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("privacy.budget=5 privacy.unit=none", "privacy.unit=example"),
        ("privacy.budget=5 privacy.noise_seed=1", "promises nothing"),
        ("privacy.budget=4", "opened with a budget of 5"),
        ("run.state=/dev/null/x", "--state"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_one_line_and_leaves_nothing(tmp_path: Path, text: str, words: str) -> None:
    run(tmp_path / "one", "privacy.budget=5 rounds.number=1")
    with pytest.raises(Refused, match=words) as caught:
        run(tmp_path / "run", text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("privacy.window_days=30", "set both or none"),
        ("privacy.window_epsilon=3", "set both or none"),
        ("privacy.window_days=30 privacy.window_epsilon=6 privacy.budget=5", "is more than privacy.budget=5"),
        ("privacy.window_days=30 privacy.window_epsilon=6 privacy.unit=none", "under DP with real noise"),
        ("privacy.window_days=30 privacy.window_epsilon=6 privacy.noise_seed=1", "under DP with real noise"),
    ],
)
def test_a_window_that_cannot_be_kept_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        run(tmp_path / "run", text)
    assert not (tmp_path / "run").exists()


def test_a_client_over_its_window_is_left_out_until_enough_of_it_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, clock = "privacy.window_days=2 privacy.window_epsilon=3", [1_800_000_000.0]
    monkeypatch.setattr(chain.time, "time", lambda: clock[0])
    run(tmp_path / "one", window)
    watch = Quiet()
    with pytest.raises(job.Stopped, match=r"of its 3 in 2 days is left.* before 2027-01-17 \d\d:\d\d UTC"):
        run(tmp_path / "two", window, watch=watch)
    clock[0] += 2.1 * 86_400
    assert run(tmp_path / "two", window)["privacy"]["clients"][0]["steps"] == 3, "and then it goes on"


def test_the_evidence_of_data_changes_with_the_data_and_not_with_the_run(tmp_path: Path, state: Path) -> None:
    run(tmp_path / "one")
    same = made_scenario()
    held = Federation(dict.fromkeys("ab", 30), lambda client: made_examples(7), made_examples(1), made_examples(1))
    for number, (scenario, changes) in enumerate([(same, 0), (replace(same, data=lambda _: held), 1)]):
        with RunFolder.create(tmp_path / f"met-{number}", "made", same.settings) as folder:
            job.prepare(scenario, same.settings, folder, EmbeddedFleet, Quiet())
        ledger = Ledger(state / "simulations" / "made.ledger")
        ledger.read()
        assert [standing.changes for standing in ledger.accounts.values()] == [changes] * 2
        assert [sum(standing.history.values()) for standing in ledger.accounts.values()] == [3, 3], "spending stays"


@pytest.mark.parametrize("text", ["privacy.budget=0", "privacy.budget=-1", "privacy.budget=nan", "privacy.budget=inf"])
def test_a_budget_that_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(Refused, match=r"privacy\.budget"):
        override(Settings(), text)


def test_a_run_remembers_where_its_ledger_lies(tmp_path: Path, state: Path) -> None:
    run(tmp_path / "run")
    start = json.loads((tmp_path / "run/start.json").read_text())["ledger"]
    assert Path(start["path"]).is_relative_to(state)
    assert start["sequence"] == 4, "two accounts, and what their data is"
