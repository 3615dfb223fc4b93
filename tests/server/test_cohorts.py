"""privacy.sampling and privacy.bands through whole runs: who is asked, who pays, what a resume goes on with."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients.task import Hello
from clients.training import Node
from privacy import accounting, cohort_noise, dp_sgd, recompute
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import budget, edge, rounds, select
from server import run as job
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

NAMES = [f"site-{i:02}" for i in range(30)]
BASE = (
    "rounds.number=7 local.batch=8 local.rate=0.5 reference.no_privacy=false export.recover_rounds=2 "
    "privacy.unit=client privacy.epsilon=20 privacy.clip=0.2"
)
FIXED = "privacy.sampling=fixed rounds.fraction=0.2"
BANDS = "privacy.bands=3"
SEEDED = "privacy.noise_seed=4"


def examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(12, 5, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())


def made() -> Scenario:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))

    federation = Federation(dict.fromkeys(NAMES, 12), examples, examples("validation"), examples("test"))
    return Scenario("made", override(Settings(), BASE), {"net": net}, lambda _: federation, name="made")


@pytest.fixture(autouse=True)
def _no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edge models take seconds and have tests of their own."""
    monkeypatch.setattr(edge.bundle, "ship", lambda *_, **__: [])


def prepared(folder: RunFolder, text: str, stop_after: int = 99) -> job.Job:
    def stop() -> bool:
        return len(folder.rows()) == stop_after

    return job.prepare(made(), override(made().settings, text), folder, EmbeddedFleet, Quiet(), stop)


def run(path: Path, text: str = "", stop_after: int = 99) -> dict[str, Any]:
    """Begin the run in `path` or go on with it; stops after round `stop_after`."""
    settings = override(made().settings, text)
    with RunFolder.open(path) if path.exists() else RunFolder.create(path, "made", settings) as folder:
        return job.run(prepared(folder, text, stop_after))


def published(path: Path) -> list[Row]:
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]


class Noted(NoJournal):
    """A journal that keeps what it is told, with a fleet in this process."""

    def __init__(self, folder: Path, text: str) -> None:
        self.settings = override(made().settings, text)
        self.node = Node(made(), self.settings, made().data(self.settings), folder)
        self.fleet = EmbeddedFleet(self.node)
        self.roster: Mapping[str, Hello] = self.fleet.hello()
        self.reserved: list[dict[str, int]] = []
        self.states: list[ServerState] = []

    def reserve(self, number: int, steps: Mapping[str, int]) -> Mapping[str, str]:
        self.reserved.append(dict(steps))
        return {}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.states.append(state)

    def federate(self, state: ServerState | None = None) -> list[Row]:
        plans = budget.plans(self.roster, self.settings)
        begin = state or first_state(self.node.template, self.settings)
        found = rounds.rounds(self.fleet, self.roster, plans, begin, self.settings, self, lambda _: Score(1.0, 0.5))
        return [row for _, row in found]


# cohorts of a fixed size


def test_a_secret_cohort_of_a_fixed_size_is_paid_for_by_all_and_named_nowhere(tmp_path: Path) -> None:
    state = tmp_path / "state"
    found = run(tmp_path / "run", f"{FIXED} run.state={state}")
    privacy = found["privacy"]
    assert {(client["steps"], client["rounds"]) for client in privacy["clients"]} == {(9, 9)}
    mechanism = Mechanism(0.2, privacy["clients"][0]["noise_multiplier"], 30)
    assert privacy["worst_epsilon"] == pytest.approx(accounting.epsilon({mechanism: 9}, 1 / 300), rel=1e-6)
    assert privacy["clients"][0]["epsilon_low"] is privacy["clients"][0]["epsilon_rdp"] is None
    assert privacy["adjacency"].startswith("replace all examples of one client")
    assert "without replacement" in privacy["accountant"]
    rows = published(tmp_path / "run")
    assert not any(name in json.dumps(rows) for name in NAMES)
    assert {row["replies"] for row in rows} == {None}
    assert privacy["clients"][0]["delta"] == 1 / 300  # nothing taken off
    (ledger,) = state.rglob("*.ledger")
    accounts = recompute.accounts(recompute.records(ledger))
    assert {round(row["epsilon"], 6) for row in accounts} == {round(privacy["worst_epsilon"], 6)}


def test_every_draw_has_the_size_and_none_comes_from_the_seed_of_the_run(tmp_path: Path) -> None:
    settings = override(made().settings, FIXED)
    first, again = ([select._drawn(NAMES, settings, number) for number in range(20)] for _ in range(2))
    assert {len(cohort) for cohort in first} == {6}
    assert first != again
    seeded = override(settings, SEEDED)
    assert select._drawn(NAMES, seeded, 1) == select._drawn(NAMES, override(seeded, "run.seed=9"), 1)


def test_data_that_was_charged_at_one_adjacency_is_refused_the_other_before_round_one(tmp_path: Path) -> None:
    state = f"run.state={tmp_path / 'state'} rounds.number=1 export.recover_rounds=0 privacy.epsilon=3"
    run(tmp_path / "first", f"rounds.fraction=0.5 rounds.minimum=0 {state}")
    with pytest.raises(Refused, match="cannot be added") as caught:
        run(tmp_path / "second", f"{FIXED} {state}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "second").exists()


# turns, with noise that is correlated


def test_a_client_is_asked_in_its_turn_and_pays_for_that_alone(tmp_path: Path) -> None:
    found = run(tmp_path / "run", f"{BANDS} run.state={tmp_path / 'state'}")
    rows = published(tmp_path / "run")
    asked = [set(row["cohort"]) for row in rows]
    assert all(len(cohort) == 10 for cohort in asked)
    assert all(asked[t].isdisjoint(asked[t + 1] | asked[t + 2]) for t in range(7))
    assert asked[0] == asked[3] == asked[6]
    plan = found["privacy"]["clients"][0]
    assert {client["steps"] for client in found["privacy"]["clients"]} == {3}  # 9 rounds, recovery included
    exact = accounting.epsilon({Mechanism(1.0, plan["noise_multiplier"]): 3}, 1 / 300)
    assert found["privacy"]["worst_epsilon"] == pytest.approx(exact, rel=1e-6)
    assert found["edge"]["recovery"] == "pruned, then 2 federated rounds under the same privacy account"
    assert "who took part" in found["privacy"]["not_covered"][1]
    (ledger,) = (tmp_path / "state").rglob("*.ledger")
    assert all(
        row["epsilon"] == pytest.approx(exact, rel=1e-3) for row in recompute.accounts(recompute.records(ledger))
    )


def test_what_the_rounds_add_is_the_sum_with_the_noise_of_the_matrix(tmp_path: Path, monkeypatch: Any) -> None:
    def replies(self: EmbeddedFleet, tasks: Any) -> Any:
        return (rounds.Reply(task.round, task.client, reason="gone") for task in tasks)

    monkeypatch.setattr(EmbeddedFleet, "ask", replies)
    noted = Noted(tmp_path, f"{BANDS} {SEEDED} rounds.number=6 export.recover_rounds=0")
    noted.federate()
    plan = budget.plans(noted.roster, noted.settings)[NAMES[0]]
    start = first_state(noted.node.template, noted.settings).weights
    weights = np.array([start, *(state.weights for state in noted.states)], np.float64)
    added = np.diff(weights, axis=0) * 10  # by the clients expected, whoever replied
    drawn = [
        cohort_noise.generator(rounds.derive(4, "noise", number)).normal(size=len(start)) for number in range(1, 7)
    ]
    band = [1.0, 0.5, 0.375]
    c = np.zeros((6, 6))
    for i, value in enumerate(band):
        c += np.diag(np.full(6 - i, value / np.linalg.norm(band)), -i)
    assert np.allclose(c @ added, np.array(drawn) * plan.mechanism.noise_multiplier * 0.2, atol=1e-4)


def test_a_stopped_and_resumed_run_goes_on_with_the_noise_it_remembers(tmp_path: Path) -> None:
    text = f"{BANDS} {SEEDED} server.step=momentum"
    run(tmp_path / "whole", text)
    for number in (2, 5, 8):
        with pytest.raises(job.Stopped):
            run(tmp_path / "parts", text, stop_after=number)
    run(tmp_path / "parts", text)
    ends = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]
    with RunFolder.open(tmp_path / "parts") as folder:
        state = folder.committed()
    assert state is not None
    assert state.noise is not None
    assert state.noise.shape == (2, len(state.weights))


def test_a_round_that_was_cut_off_is_paid_for_by_whom_it_asked_and_begins_a_new_block(tmp_path: Path) -> None:
    with pytest.raises(job.Stopped):
        run(tmp_path / "run", BANDS, stop_after=3)
    with RunFolder.open(tmp_path / "run") as folder:  # what a kill in round 4 leaves behind
        cut = prepared(folder, BANDS)
        assert cut.committed is not None
        assert job._with_lost_rounds(cut, cut.committed).noise is not None  # stopped between rounds: it goes on
        whose = select._drawn(NAMES, cut.node.settings, 4)
        assert cut.accounts.reserve(4, dict.fromkeys(whose, 1)) == {}
        assert job._with_lost_rounds(cut, cut.committed).noise is None
    found = run(tmp_path / "run", BANDS)
    spent = {client["name"]: client["steps"] for client in found["privacy"]["clients"]}
    assert set(spent.values()) == {3}  # those of round 4 paid twice for it, and could not pay for their last
    assert published(tmp_path / "run")[6]["reason"] == "fewer than 1 clients could be asked"
    assert [entry["name"] for entry in published(tmp_path / "run")[6]["skipped"]] == whose
    assert found["privacy"]["worst_epsilon"] <= 20


def test_recovery_after_pruning_begins_a_new_block(tmp_path: Path) -> None:
    noted = Noted(tmp_path, BANDS)
    noted.federate()
    pruned = edge.pruned_state(noted.node, noted.states[-1], noted.states[-1].weights, 2)
    assert pruned.noise is None
    assert len(pruned.weights) < len(noted.states[-1].weights)
    noted.federate(pruned)
    assert noted.states[-1].noise is not None
    assert noted.states[-1].noise.shape == (2, len(pruned.weights))


def test_a_round_that_nobody_could_be_asked_in_is_not_released_and_its_row_is_drawn(tmp_path: Path) -> None:
    noted = Noted(tmp_path, BANDS)
    gone = {name: replace(noted.roster[name], examples=0) for name in select._drawn(NAMES, noted.settings, 2)}
    noted.roster = {**noted.roster, **gone}
    rows = noted.federate()
    assert [row["applied"] for row in rows] == [True, False, True, True, False, True, True]
    before, after = noted.states[0], noted.states[1]
    assert np.array_equal(before.weights, after.weights)
    assert before.noise is not None
    assert after.noise is not None
    assert np.array_equal(after.noise[1], before.noise[0])


# no cap


def test_a_large_poisson_draw_of_clients_is_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort_noise, "sample", lambda names, rate, random: list(names))
    settings = override(made().settings, "rounds.fraction=0.2 rounds.minimum=0")
    roster = {name: Hello(name, 12, "") for name in NAMES}
    chosen = select.cohort(NAMES, roster, settings, 1, (4, 4), budget.plans(roster, settings), {})
    assert list(chosen.steps) == NAMES


def test_a_large_poisson_draw_of_examples_is_never_cut() -> None:
    """Every drawn example counts, in however many parts they go through: the expected batch is 10, 40 are drawn."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2), torch.randn(40, 5)
    private = dp_sgd.PrivateGradient(
        model, nn.functional.cross_entropy, Mechanism(0.25, 1e-9), 1e6, torch.Generator().manual_seed(1)
    )
    private.batches(40, 1)
    private._chunk = 7
    y = (x.sum(1) > 0).long()
    private.step(x, y)
    found = model.weight.grad
    private.close()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    assert found is not None
    assert model.weight.grad is not None
    assert torch.allclose(found, model.weight.grad / 10, atol=0.01)


# what does not fit


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("privacy.unit=example privacy.sampling=fixed", "sampling=fixed is for privacy.unit=client, not example"),
        ("privacy.unit=local privacy.sampling=fixed", "sampling=fixed is for privacy.unit=client, not local"),
        ("privacy.sampling=fixed", "set rounds.fraction below 1"),
        ("privacy.sampling=fixed rounds.fraction=0.99", "a round asks 30 of 30"),
        ("privacy.sampling=fixed rounds.fraction=0.2 rounds.minimum=7", "more than the 6 clients a round asks"),
        ("privacy.unit=local privacy.bands=2", "bands is for privacy.unit=client, not local"),
        ("privacy.unit=none privacy.bands=2", "bands is for privacy.unit=client, not none"),
        ("privacy.bands=3 rounds.fraction=0.5", "set rounds.fraction=1"),
        ("privacy.bands=3 privacy.sampling=fixed rounds.fraction=0.5", "set rounds.fraction=1"),
        ("privacy.bands=3 privacy.adapt=true", "set privacy.adapt=false or privacy.bands=1"),
        ("privacy.bands=3 server.combine=median", "median is no sum"),
        ("privacy.bands=31 rounds.minimum=0", "30 clients into more groups"),
        ("privacy.bands=3 rounds.minimum=11", "more than the 10 clients a round asks"),
        ("privacy.bands=3 privacy.delta=0.04", "publish one of 30 clients"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_round_one(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(Refused, match=line) as caught:
        run(tmp_path / "run", text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
