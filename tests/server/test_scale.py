"""A fleet of any size: what it costs hangs on the cohort, and what comes of it is what a small fleet's files say."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clients import roster
from clients.task import Hello
from edge_export import bundle
from privacy import accounting, shared_records
from privacy.ledger import Account, Head, Ledger
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.numbered import ByName, Listed, Numbered
from scenarios.settings import Settings, override
from server import client_rows, console, results, select, spent_file, units, verify
from server import run as job
from server.embedded import EmbeddedFleet
from server.record import RunFolder
from server.report import MOST_CLIENTS
from server.rounds import rounds
from server.rows import worst_epsilon
from server.score import NOTHING
from server.spendings import Spendings
from server.state import Row, ServerState, Spent, first_state

HOUSE = Path(__file__).resolve().parents[2]
BASE = "rounds.number=6 rounds.fraction=0.3 local.batch=4 local.rate=0.5 export.prune=0 reference.no_privacy=false"
SIZES = [5 + at % 3 for at in range(20)]


class Quiet:
    def row(self, row: Row) -> None:
        pass

    def status(self, text: str) -> None:
        pass


def examples(name: str, shift: float = 0.0) -> Examples:
    at = int(name[7:]) if name.startswith("client-") else 99
    generator = torch.Generator().manual_seed(at)
    x = torch.randn(SIZES[at] if at < len(SIZES) else 30, 3, generator=generator) + shift
    return Examples(x, (x.sum(1) > 0).long())


def made(shift: float = 0.0) -> Scenario:
    held = Federation(
        ByName(Numbered(len(SIZES)), SIZES.__getitem__),
        lambda name: examples(name, shift * (name == "client-07")),
        examples("validation"),
        examples("test"),
    )
    net = {"net": lambda: nn.Sequential(nn.Linear(3, 2))}
    return Scenario("made", override(Settings(), BASE), net, lambda _: held, name="made")


def federated(path: Path, text: str = "", until: int = 99, scenario: Scenario | None = None) -> ServerState:
    """Begin the run in `path` or go on with it until it has so many rounds; the committed state."""
    scenario = scenario or made()
    settings = override(scenario.settings, f"run.state={path.parent / path.name}-state {text}")
    with RunFolder.open(path) if path.exists() else RunFolder.create(path, "made", settings) as folder:

        def stop() -> bool:
            return len(folder.rows()) >= until

        prepared = job.prepare(scenario, settings, folder, EmbeddedFleet, Quiet(), stop)
        with suppress(job.Stopped):
            job.run(prepared)
        state = folder.committed()
        assert state is not None
        return state


def committed_rows(path: Path) -> list[Row]:
    found = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in found]


@pytest.fixture
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty clients are a large fleet."""
    monkeypatch.setattr(spent_file, "LISTED", 10)


@pytest.fixture(autouse=True)
def _no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edge models take seconds and have tests of their own."""
    monkeypatch.setattr(bundle, "ship", lambda *_, **__: [])


@given(number=st.integers(1, 2000), digits=st.integers(0, 6), data=st.data())
def test_numbered_names_are_the_names_that_a_list_would_hold(number: int, digits: int, data: st.DataObject) -> None:
    names = Numbered(number, digits)
    listed = Listed(names)
    assert list(names) == list(listed)
    at = data.draw(st.integers(0, number - 1))
    assert names[at] == listed[at]
    assert names.place(names[at]) == listed.place(names[at]) == at


@pytest.mark.parametrize(
    "stranger", ["client-20", "client-1", "client-007", "client--1", "client-", "client-٣٣", "site-01"]
)
def test_a_name_that_is_not_of_the_fleet_has_no_place(stranger: str) -> None:
    assert stranger not in Numbered(20)
    with pytest.raises(KeyError):
        Numbered(20).place(stranger)


@given(st.lists(st.lists(st.integers(0, 8), unique=True, max_size=6), max_size=6))
def test_every_value_of_what_clients_spent_stays_what_it_was(cohorts: list[list[int]]) -> None:
    spent, plain = Spendings(Numbered(9)), dict[str, Spent]()
    values = [(spent, plain)]
    for number, cohort in enumerate(cohorts, 1):
        paid, joined = np.array(cohort, np.int64), np.array(cohort[::2], np.int64)
        spent, plain = spent.after(number, paid, 2 + paid, 1, joined), dict(plain)
        for at in cohort:
            old = plain.get(f"client-{at}", Spent())
            last = number if at in cohort[::2] else old.last
            plain[f"client-{at}"] = Spent(old.steps + 2 + at, old.rounds + 1, last, old.whole + 1)
        values.append((spent, plain))
    for (value, expected), (older, _) in zip(values, [values[0], *values], strict=False):
        assert dict(value) == expected
        differ = np.flatnonzero(older.rows != value.rows)
        assert set(differ) <= set(value.changed(older).tolist())


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "fleet.profile=edge fleet.deadline=0.01",
        "privacy.unit=example privacy.noise_seed=3",
        "privacy.unit=client privacy.epsilon=50 privacy.noise_seed=3 rounds.minimum=0",
    ],
)
def test_a_large_fleet_goes_through_the_rounds_of_a_listed_one(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = federated(tmp_path / "large", text)
    monkeypatch.setattr(spent_file, "LISTED", 10_000)
    listed = federated(tmp_path / "listed", text)
    assert (large.weights == listed.weights).all()
    assert committed_rows(tmp_path / "large") == committed_rows(tmp_path / "listed")
    assert dict(large.clients) == dict(listed.clients)
    assert (tmp_path / "large" / "fleet").is_dir()
    assert not (tmp_path / "listed" / "fleet").exists()


@pytest.mark.usefixtures("_large")
def test_a_large_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = federated(tmp_path / "whole")
    for number in (1, 3, 99):
        state = federated(tmp_path / "parts", until=number)
    assert (state.weights == whole.weights).all()
    assert dict(state.clients) == dict(whole.clients)


@pytest.mark.usefixtures("_large")
def test_rows_that_a_crash_kept_from_their_file_come_from_the_checkpoint(tmp_path: Path) -> None:
    federated(tmp_path / "run", until=2)
    before = (tmp_path / "run/fleet/spent.npy").read_bytes()
    state = federated(tmp_path / "run", until=3)
    torn = (tmp_path / "run/fleet/spent.npy").read_bytes()
    half = len(before) // 2
    (tmp_path / "run/fleet/spent.npy").write_bytes(before[:half] + torn[half:])
    with RunFolder.open(tmp_path / "run") as folder:
        again = folder.committed()
    assert again is not None
    assert dict(again.clients) == dict(state.clients)
    assert (tmp_path / "run/fleet/spent.npy").read_bytes() == torn


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("file", ["fleet/spent.npy", "fleet/digests.npy", "fleet/plans.npy"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_damaged_array_of_a_run_is_refused_by_its_name(file: str, how: str, tmp_path: Path) -> None:
    federated(tmp_path / "run", until=2)
    path = tmp_path / "run" / file
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:40])
    with pytest.raises(Refused, match=r"checkpoint|digests|plans"):
        federated(tmp_path / "run")


@pytest.mark.usefixtures("_large")
def test_a_large_run_notices_whose_data_have_changed(tmp_path: Path) -> None:
    federated(tmp_path / "run", until=2)
    with pytest.raises(Refused, match="data of client client-07"):
        federated(tmp_path / "run", scenario=made(shift=1.0))


class Counted(roster.Roster):
    """A roster that counts whom it was asked for."""

    asked = 0

    def value(self, at: int) -> Hello:
        self.asked += 1
        return super().value(at)


def touched(path: Path, clients: int) -> dict[str, int]:
    """What three rounds of 50 of `clients` look at and write."""
    read = Counter[str]()

    def data(name: str) -> Examples:
        read[name] += 1
        return Examples(torch.ones(1, 3), torch.zeros(1, dtype=torch.int64))

    held = Federation(ByName(Numbered(clients), lambda at: 1), data, data("validation"), data("test"))
    net = {"net": lambda: nn.Linear(3, 2)}
    text = f"export.prune=0 rounds.number=3 rounds.fraction={50 / clients!r} local.batch=0"
    scenario = Scenario("made", override(Settings(), text), net, lambda _: held, name="made")
    with RunFolder.create(path, "made", scenario.settings) as folder:
        met = job.prepare(scenario, scenario.settings, folder, EmbeddedFleet, Quiet())
        assert isinstance(met.roster, roster.Roster)
        counted = Counted(met.roster.names, met.roster.examples, met.roster.digests, met.roster.able)
        state = first_state(met.node.template, scenario.settings)
        read.clear()
        *_, (_, row) = rounds(met.fleet, counted, {}, state, scenario.settings, met.accounts, lambda _: NOTHING)
    assert row["replies"] == 50
    size = (path / "checkpoint.safetensors").stat().st_size
    return {"hellos": counted.asked, "data": read.total(), "bytes, to the nearest kB": round(size, -3)}


def test_a_round_touches_only_its_cohort(tmp_path: Path) -> None:
    """Three times the fleet, the same cohort: as many clients looked at, as much written."""
    small, large = touched(tmp_path / "small", 20_000), touched(tmp_path / "large", 60_000)
    assert small == large
    assert large["data"] == 3 * 50


@given(
    data=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 4)), min_size=1, max_size=12),
    unit=st.sampled_from(["example", "both", "client"]),
)
def test_who_can_pay_and_what_was_spent_are_what_each_client_would_answer(
    data: list[tuple[int, int, int]], unit: str
) -> None:
    """data: examples, steps and rounds as a whole that each client has spent."""
    settings = override(Settings(), f"privacy.unit={unit} local.batch=1 rounds.number=3 privacy.epsilon=30")
    names = Numbered(len(data))
    met = {name: Hello(name, examples, "") for name, (examples, _, _) in zip(names, data, strict=True)}
    mechanism = Mechanism(1.0, 9.0)
    both = Plan(mechanism, 1.0, 9.0, 1e-5, 3) if unit == "both" else None
    kinds = [Plan(mechanism, 1.0, 9.0, 1e-5, 20 + size, whole=both) for size in range(4)]
    plans = {name: kinds[hello.examples] for name, hello in met.items() if hello.examples}
    spent = {name: Spent(steps, 1, 0, whole) for name, (_, steps, whole) in zip(names, data, strict=True)}
    costs = {name: select.round_steps(settings, met[name].examples) for name in plans}
    truth = [select.can_pay(plan, spent[name], costs[name]) for name, plan in plans.items()]
    assert select.able(met, plans, spent, settings).tolist() == truth
    epsilons = [accounting.epsilon({mechanism: spent[name].steps}, 1e-5) for name in plans]
    state = ServerState(np.zeros(1, np.float32), (), {}, 1, clients=spent)
    assert worst_epsilon(state, plans) == max(epsilons, default=None)


def test_the_ledgers_gate_lets_through_whom_it_would_let_through_alone(tmp_path: Path) -> None:
    ledger, random = Ledger(tmp_path / "a.ledger"), np.random.default_rng(5)
    accounts = [Account("example", f"client-{at:03}", "data") for at in range(60)]
    mechanism = Mechanism(0.03, 1.1)
    ledger.open(dict.fromkeys(accounts, (1.3, 1e-5)))
    ledger.reserve("before", 1, {account: (mechanism, int(random.integers(1, 60))) for account in accounts})
    asks = {account: (mechanism, int(random.integers(1, 30))) for account in accounts}
    alone = {
        account
        for account, (_, steps) in asks.items()
        if accounting.epsilon({mechanism: ledger.accounts[account].history[mechanism] + steps}, 1e-5) > 1.3
    }
    assert 5 < len(alone) < 55
    assert ledger.over(asks).keys() == alone
    assert ledger.reserve("run", 1, asks).keys() == alone


def ledger_of(path: Path) -> Ledger:
    """The ledger of the run in `path`."""
    found = Ledger(path.parent / f"{path.name}-state" / "simulations" / "made.ledger")
    found.read()
    return found


def account(name: str, unit: str = "example") -> Account:
    return Account(unit, name, "made")


@pytest.mark.parametrize(
    "text",
    [
        "privacy.unit=example",
        "privacy.unit=example evaluation.epsilon=3",
        "privacy.unit=client privacy.epsilon=50 rounds.minimum=0",
        "privacy.unit=both privacy.client_epsilon=40 rounds.minimum=0",
    ],
)
@pytest.mark.parametrize("alone", [100, 0])
def test_a_large_fleet_is_charged_what_a_listed_one_is(
    text: str, alone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where everyone is asked, so that no secret draw differs."""
    monkeypatch.setattr(shared_records, "ALONE", alone)
    text += " rounds.number=2 rounds.fraction=1 evaluation.every=1 privacy.budget=60"
    text += " evaluation.on=clients" if "evaluation.epsilon" in text else ""
    federated(tmp_path / "listed", text, until=2)
    monkeypatch.setattr(spent_file, "LISTED", 10)
    federated(tmp_path / "large", text, until=2)
    large, listed = ledger_of(tmp_path / "large").accounts, ledger_of(tmp_path / "listed").accounts
    assert large.keys() == listed.keys()
    for one, standing in listed.items():
        assert (large[one].history, large[one].budget, large[one].delta) == (
            standing.history,
            standing.budget,
            standing.delta,
        )
        assert bool(large[one].digest) == bool(standing.digest)


@pytest.mark.usefixtures("_large")
def test_an_account_is_opened_by_the_round_that_charges_it_first(tmp_path: Path) -> None:
    path = tmp_path / "run"
    federated(path, "privacy.unit=example privacy.budget=60 rounds.fraction=0.2", until=1)
    rows = committed_rows(path)
    first = {*rows[0]["cohort"], "client-00"}  # the first is opened with the run, whose start names the ledger's head
    assert {one.client for one in ledger_of(path).accounts} == first
    told = json.loads((path / "start.json").read_text())["ledger"]
    assert told["sequence"] > 0
    assert ledger_of(path).holds(Head(told["sequence"], told["hash"]))
    federated(path, "privacy.unit=example privacy.budget=60 rounds.fraction=0.2")
    charged = {name for row in committed_rows(path) for name in row["cohort"]}
    found = ledger_of(path)
    assert {one.client for one in found.accounts} == {*charged, "client-00"} < {*Numbered(len(SIZES))}
    assert {one.client for one, standing in found.accounts.items() if +standing.history} == charged
    assert {len(standing.digest) for one, standing in found.accounts.items()} == {64}
    clients = json.loads((path / "report.json").read_text())["privacy"]["clients"]
    assert {row["name"]: row["epsilon_total"] for row in clients if row["name"] not in charged} == dict.fromkeys(
        {*Numbered(len(SIZES))} - charged, 0.0
    )
    assert verify.check(path / "report.json").wrong == []


@pytest.mark.usefixtures("_large")
def test_a_budget_that_was_opened_otherwise_is_refused_before_anyone_trains(tmp_path: Path) -> None:
    text = "privacy.unit=example rounds.fraction=0.2"
    federated(tmp_path / "run", f"{text} privacy.budget=60", until=1)
    shutil.copytree(tmp_path / "run-state", tmp_path / "other-state")
    with pytest.raises(Refused, match="opened with a budget of 60"):
        federated(tmp_path / "other", f"{text} privacy.budget=50")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("_large")
def test_a_budget_that_another_run_gave_meanwhile_is_refused_by_the_round_that_meets_it(tmp_path: Path) -> None:
    text = "privacy.unit=example rounds.fraction=1 privacy.budget=60"
    path, scenario = tmp_path / "run", made()
    settings = override(scenario.settings, f"run.state={tmp_path / 'run-state'} {text}")
    with RunFolder.create(path, "made", settings) as folder:
        prepared = job.prepare(scenario, settings, folder, EmbeddedFleet, Quiet())
        ledger_of(path).open({account("client-03"): (5.0, 1e-3)})
        with pytest.raises(Refused, match="client-03 on made was opened with a budget of 5"):
            job.run(prepared)
    assert not any(+standing.history for standing in ledger_of(path).accounts.values())


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("text", ["privacy.unit=example", "privacy.unit=client privacy.epsilon=50 rounds.minimum=0"])
def test_a_round_of_a_large_fleet_that_was_cut_off_counts_as_spent(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    federated(path, text, until=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            federated(path, text)
    state = federated(path, text)
    unit = "client" if "unit=client" in text else "example"
    counted = {name: spent.steps for name, spent in state.clients.items()}
    ledger = {one.client: sum(standing.history.values()) for one, standing in ledger_of(path).accounts.items()}
    assert {name: steps for name, steps in ledger.items() if steps} == counted
    assert {one.unit for one in ledger_of(path).accounts} == {unit}
    assert verify.check(path / "report.json").wrong == []


@pytest.mark.parametrize(
    "text", ["privacy.unit=example", "privacy.unit=both privacy.client_epsilon=40 rounds.minimum=0"]
)
def test_the_rows_of_many_clients_stand_beside_the_report_which_covers_them(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_rows, "LISTED", 10)
    federated(tmp_path / "run", text)
    path = tmp_path / "run" / "report.json"
    report = json.loads(path.read_text())
    assert report["privacy"]["clients"] == []
    assert report["privacy"]["clients_file"]["rows"] == len(SIZES)
    rows = [json.loads(line) for line in (tmp_path / "run/clients.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == list(Numbered(len(SIZES)))
    assert report["privacy"]["worst_epsilon"] == max(row["epsilon"] for row in rows)
    assert 'href="clients.jsonl"' in (tmp_path / "run/report.html").read_text() or len(SIZES) <= MOST_CLIENTS
    assert verify.check(path).wrong == []
    rows[3]["epsilon"] *= 0.5
    (tmp_path / "run/clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any("clients.jsonl is not the file" in line for line in verify.check(path).wrong)


def test_who_was_left_out_of_a_large_fleet_stands_beside_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its clients have no test data: nobody is evaluated."""
    text = "faults.dropout=0.5 evaluation.on=clients"
    federated(tmp_path / "listed", text)
    monkeypatch.setattr(client_rows, "LISTED", 5)
    path = tmp_path / "run"
    federated(path, text)
    listed = json.loads((tmp_path / "listed/report.json").read_text())["fleet"]
    report = json.loads((path / "report.json").read_text())
    assert report["fleet"]["left_out"] == report["fleet"]["unevaluated"] == []
    found = client_rows.whole(report, path)["fleet"]
    assert len(found["left_out"]) > 5
    assert len(found["unevaluated"]) == len(SIZES)
    assert {**found, "profile": ""} == {**listed, "profile": ""}
    assert verify.check(path / "report.json").wrong == []
    page = (path / "report.html").read_text()
    assert all(entry["name"] in page for entry in found["unevaluated"])
    console.summary(results.load(path), path)
    assert "left_out.jsonl" in capsys.readouterr().out
    (path / "left_out.jsonl").unlink()
    assert any("left_out.jsonl does not read" in line for line in verify.check(path / "report.json").wrong)


def test_a_part_of_the_clients_can_be_asked_for_test_results(tmp_path: Path) -> None:
    """They have none, so that whoever is asked is named."""
    federated(tmp_path / "run", "evaluation.on=clients evaluation.fraction=0.25", until=3)
    asked = [[entry["name"] for entry in row["unevaluated"]] for row in committed_rows(tmp_path / "run")]
    assert [len(names) for names in asked] == [5] * 3
    assert asked[0] != asked[1]
    federated(tmp_path / "again", "evaluation.on=clients evaluation.fraction=0.25", until=3)
    assert committed_rows(tmp_path / "again") == committed_rows(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "evaluation.on=clients privacy.unit=example evaluation.epsilon=3"])
def test_a_part_of_the_clients_is_not_asked_where_all_are_charged_or_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"evaluation\.fraction=0\.5 asks some clients"):
        federated(tmp_path / "run", f"{text} evaluation.fraction=0.5")


def test_what_evaluation_took_is_a_share_of_the_runs_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    federated(path)
    report = results.load(path)
    rows = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    assert all(0 < row["seconds_evaluation"] < row["seconds"] for row in rows)
    assert sum(row["seconds_evaluation"] for row in rows) < report["seconds"]["evaluation"] < report["seconds"]["total"]
    share = results.evaluation_share(report)
    console.summary(report, path)
    assert f"{units.percent(share)} of it" in capsys.readouterr().out
    assert results.evaluation_share({"seconds": {"total": 3.0}}) is None, "an older Umbel does not say"


def peak(clients: int, number: int = 3, text: str = "") -> float:
    """Bytes that a process takes at its peak for a run of the no-op benchmark, beyond what it took before."""
    words = ["benchmarks/fleet.py", "--one", str(clients), "--rounds", str(number), "--set", text]
    done = subprocess.run([sys.executable, *words], cwd=HOUSE, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["bytes_a_client"]) * clients


def test_a_registered_client_takes_64_bytes_at_most() -> None:
    """1,000 asked of 10,001 to 1,000,000: the slope between them, all that the run allocates at any moment."""
    small, middle, large = (peak(clients) for clients in (10_001, 100_000, 1_000_000))
    assert (middle - small) / 90_000 < 64
    assert (large - middle) / 900_000 < 64


def test_memory_is_flat_over_the_rounds() -> None:
    few, many = (peak(20_000, number) for number in (3, 30))
    assert many - few < 4e6


def test_a_registered_client_has_no_account_before_its_first_charge() -> None:
    """Under example-level DP; an account of its own from the start took 2.7 kB."""
    small, large = (peak(clients, 2, "privacy.unit=example") for clients in (10_001, 100_000))
    assert (large - small) / 90_000 < 250


@pytest.mark.slow
def test_a_registered_client_of_a_million_takes_128_bytes_at_most_under_dp() -> None:
    small, large = (peak(clients, 3, "privacy.unit=example") for clients in (100_000, 1_000_000))
    assert (large - small) / 900_000 < 128


@pytest.mark.slow
def test_a_client_that_pays_in_every_round_takes_two_kilobytes() -> None:
    """Under client-level DP, where all pay; it took 5 kB."""
    text = "privacy.unit=client privacy.epsilon=50 rounds.minimum=0"
    small, large = (peak(clients, 2, text) for clients in (10_001, 50_000))
    assert (large - small) / 40_000 < 2_200
