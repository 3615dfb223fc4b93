"""privacy.unit=client through whole rounds and runs: who pays, what is published, what a bad client can do."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients import codecs
from clients.task import Hello, Reply, Task
from clients.training import Node, answer
from privacy import accounting, cohort_noise
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.seeds import derive
from scenarios.settings import Settings, override
from server import budget, rounds
from server import run as job
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

NAMES = [f"site-{i:02}" for i in range(30)]
SIZES = {name: 5 + i for i, name in enumerate(NAMES)}
BASE = (
    "rounds.number=3 local.batch=8 local.rate=0.5 reference.no_privacy=false export.recover_rounds=1 "
    "privacy.unit=client privacy.epsilon=20 privacy.clip=0.2"
)
SECRET = "rounds.fraction=0.5 rounds.minimum=0"
SEEDED = "privacy.noise_seed=4"
Bend = Callable[[Task, Reply], Reply]


def made_examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 50), 5, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))


def made() -> Scenario:
    federation = Federation(SIZES, made_examples, made_examples("validation"), made_examples("test"))
    return Scenario("made", override(Settings(), BASE), {"net": net}, lambda _: federation, name="made")


@dataclass
class Seen(NoJournal):
    """A journal and a fleet that remember what they were told, with replies passed through `bend`."""

    fleet: EmbeddedFleet
    bend: Bend
    asked: list[list[str]] = field(default_factory=list)
    tasks: list[list[Task]] = field(default_factory=list)
    reserved: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    def hello(self) -> Mapping[str, Hello]:
        return self.fleet.hello()

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        self.asked.append([task.client for task in tasks])
        self.tasks.append(list(tasks))
        for task, reply in zip(tasks, self.fleet.ask(tasks), strict=True):
            self.replies.append(self.bend(task, reply))
            yield self.replies[-1]

    def reserve(self, number: int, steps: Mapping[str, int]) -> Mapping[str, str]:
        self.reserved.append((number, dict(steps)))
        return {}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.rows.append(row)


def federate(
    folder: Path, text: str = "", bend: Bend = lambda _, reply: reply, state: ServerState | None = None
) -> tuple[ServerState, Seen]:
    scenario = made()
    settings = override(scenario.settings, text)
    node = Node(scenario, settings, scenario.data(settings), folder)
    seen = Seen(EmbeddedFleet(node), bend)
    roster = seen.hello()
    plans = budget.plans(roster, settings)
    begin = state or first_state(node.template, settings)
    *_, (last, _) = rounds.rounds(seen, roster, plans, begin, settings, seen, lambda _: Score(1.0, 0.5))
    return last, seen


def lost(task: Task, _: Reply) -> Reply:
    return Reply(task.round, task.client, reason="gone")


def start_weights() -> np.ndarray:
    settings = made().settings
    return first_state(Node(made(), settings, made().data(settings), Path()).template, settings).weights


def applied_update(folder: Path, text: str = "", bend: Bend = lambda _, reply: reply) -> np.ndarray:
    """What one round adds to the weights."""
    state, _ = federate(folder, f"rounds.number=1 export.recover_rounds=0 {SEEDED} {text}", bend)
    return state.weights - start_weights()


# who pays, and what for


def test_every_client_pays_for_every_round_drawn_or_not(tmp_path: Path) -> None:
    state, seen = federate(tmp_path, SECRET)
    assert any(len(asked) < 30 for asked in seen.asked)
    assert seen.reserved == [(number, dict.fromkeys(NAMES, 1)) for number in (1, 2, 3)]
    assert {(one.steps, one.rounds) for one in state.clients.values()} == {(3, 3)}
    assert sorted(state.clients) == NAMES
    plan = budget.plans(seen.hello(), override(made().settings, SECRET))[NAMES[0]]
    assert plan.steps == 4
    assert [row["epsilon"] for row in seen.rows] == [
        accounting.epsilon({plan.mechanism: number}, plan.delta) for number in (1, 2, 3)
    ]


def test_a_draw_of_nobody_is_paid_for_and_releases_noise_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort_noise, "sample", lambda names, rate, random: [])
    state, seen = federate(tmp_path, SECRET)
    assert seen.asked == [[], [], []]
    assert all(row["applied"] for row in seen.rows)
    assert not np.array_equal(state.weights, start_weights())
    assert {one.steps for one in state.clients.values()} == {3}


def test_a_draw_that_falls_short_is_paid_for_and_not_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort_noise, "sample", lambda names, rate, random: list(names[:2]))
    text = "rounds.fraction=0.9 rounds.minimum=3"  # so improbable that a draw of two must be made
    state, seen = federate(tmp_path, text)
    assert [row["applied"] for row in seen.rows] == [False] * 3
    assert {row["reason"] for row in seen.rows} == {"fewer than 3 clients were drawn"}
    assert np.array_equal(state.weights, start_weights())
    assert {one.steps for one in state.clients.values()} == {3}


def test_without_budget_nobody_is_asked_and_nothing_is_paid(tmp_path: Path) -> None:
    state, _ = federate(tmp_path, "rounds.number=4 export.recover_rounds=0")
    after, seen = federate(tmp_path, "rounds.number=4 export.recover_rounds=0", state=replace(state, until=5))
    assert seen.asked == [[]]
    assert seen.reserved == []
    assert "budget" in seen.rows[0]["reason"]
    assert not seen.rows[0]["applied"]
    assert np.array_equal(after.weights, state.weights)
    assert after.clients == state.clients


def test_replies_that_are_missing_cost_neither_the_round_nor_the_guarantee(tmp_path: Path) -> None:
    none = applied_update(tmp_path / "a", "rounds.minimum=10", lost)
    settings = override(made().settings, f"rounds.number=1 export.recover_rounds=0 {SEEDED}")
    plan = budget.plans({n: Hello(n, SIZES[n], "") for n in NAMES}, settings)[NAMES[0]]
    noise = cohort_noise.generator(derive(4, "noise", 1)).normal(size=len(none))
    assert np.allclose(none, noise * plan.mechanism.noise_multiplier * 0.2 / 30, atol=1e-6)


# what the server adds up


def test_the_update_is_the_clipped_sum_with_noise_over_the_cohort_expected(tmp_path: Path) -> None:
    whole = applied_update(tmp_path / "a")
    noise = applied_update(tmp_path / "b", bend=lost)
    _, seen = federate(tmp_path / "c", "rounds.number=1 export.recover_rounds=0 " + SEEDED)
    vectors = np.array([np.frombuffer(reply.payload, "<f4") for reply in seen.replies])
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    assert (lengths <= 0.2).all()
    assert (lengths > 0.19).sum() > 5  # the clip was at work
    assert np.allclose(whole - noise, vectors.sum(0) / 30, atol=1e-6)


@pytest.mark.parametrize("codec", ["float32", "float16", "qsgd8", "topk:0.3"])
def test_whatever_one_client_sends_moves_the_weights_by_at_most_the_norm(tmp_path: Path, codec: str) -> None:
    size = len(start_weights())

    def shout(task: Task, reply: Reply) -> Reply:
        if task.client != NAMES[3]:
            return reply
        huge = np.full(size, 1e4, np.float32)
        return replace(reply, payload=codecs.resolve(codec).encode(huge, None, 0)[0], steps=1, within=True)

    def without(task: Task, reply: Reply) -> Reply:
        return lost(task, reply) if task.client == NAMES[3] else reply

    loud = applied_update(tmp_path / "a", f"codec={codec}", shout)
    absent = applied_update(tmp_path / "b", f"codec={codec}", without)
    assert np.linalg.norm(loud - absent) == pytest.approx(0.2 / 30, rel=1e-3)


def test_a_client_does_not_send_more_than_the_norm(tmp_path: Path) -> None:
    _, seen = federate(tmp_path, "local.rate=5 privacy.clip=0.01")
    for task, reply in zip(chain(*seen.tasks), seen.replies, strict=True):
        assert task.update_clip == 0.01
        assert task.mechanism is None
        assert np.linalg.norm(np.frombuffer(reply.payload, "<f4").astype(np.float64)) <= 0.01
        assert not reply.within


def test_a_node_refuses_a_task_without_the_norm_of_its_settings(tmp_path: Path) -> None:
    settings = made().settings
    node = Node(made(), settings, made().data(settings), tmp_path)
    _, seen = federate(tmp_path / "a", "rounds.number=1")
    for norm in (0.0, 5.0):
        assert "norm" in answer(node, replace(seen.tasks[0][0], update_clip=norm)).reason
    assert not answer(node, seen.tasks[0][0]).reason
    adapting = replace(node, settings=override(settings, "privacy.adapt=true"))
    assert not answer(adapting, replace(seen.tasks[0][0], update_clip=5.0)).reason
    assert "norm" in answer(adapting, replace(seen.tasks[0][0], update_clip=0.0)).reason


# what is published


def test_published_rows_name_nobody_where_the_draw_is_secret(tmp_path: Path) -> None:
    _, seen = federate(tmp_path, SECRET + " fleet.deadline=9", lambda t, r: lost(t, r) if t.client in NAMES[:20] else r)
    assert not any(name in json.dumps(seen.rows) for name in NAMES)
    told = ("cohort", "replies", "rejected", "late", "skipped", "simulated_seconds", "bytes_up", "bytes_down", "reason")
    assert len({json.dumps([row[key] for key in told]) for row in seen.rows}) == 1
    assert seen.rows[0]["replies"] is None
    assert seen.rows[0]["bytes_up"] == 15 * 4 * len(start_weights())


def test_published_rows_name_everyone_where_everyone_is_asked(tmp_path: Path) -> None:
    _, seen = federate(tmp_path, bend=lambda t, r: lost(t, r) if t.client == NAMES[0] else r)
    assert seen.rows[0]["cohort"] == NAMES
    assert [entry["name"] for entry in seen.rows[0]["rejected"]] == NAMES[:1]


def test_the_cohort_never_comes_from_the_seed_of_the_run(tmp_path: Path) -> None:
    first, again = (federate(tmp_path / name, SECRET)[1].asked for name in "ab")
    assert first != again
    seeded = [federate(tmp_path / name, f"{SECRET} {SEEDED}") for name in "cd"]
    assert seeded[0][1].asked == seeded[1][1].asked
    assert np.array_equal(seeded[0][0].weights, seeded[1][0].weights)
    other = federate(tmp_path / "e", f"{SECRET} {SEEDED} run.seed=9")[1].asked
    assert other == seeded[0][1].asked


# adaptive clipping


def test_adaptive_clipping_moves_the_norm_that_the_next_round_sends(tmp_path: Path) -> None:
    text = "privacy.adapt=true privacy.clip=0.001 rounds.number=12"
    state, seen = federate(tmp_path, text)
    norms = [{task.update_clip for task in tasks} for tasks in seen.tasks]
    assert all(len(norm) == 1 for norm in norms)
    sent = [norm.pop() for norm in norms]
    assert sent[0] == 0.001
    assert state.clip > sent[-1] > 0.0015
    assert federate(tmp_path, "privacy.clip=0.001")[0].clip == 0.001


# whole runs


def run(path: Path, text: str = "", stop_after: int = 99) -> dict[str, Any]:
    """Begin the run in `path` or go on with it; stops after round `stop_after`."""
    again, settings = path.exists(), override(made().settings, text)
    with RunFolder.open(path) if again else RunFolder.create(path, "made", settings) as folder:

        def stop() -> bool:
            return len(folder.rows()) == stop_after

        return job.run(job.prepare(made(), settings, folder, EmbeddedFleet, Quiet(), stop))


def cut_off_in_round_3(path: Path, text: str) -> None:
    """What a kill in that round leaves behind: reservations without an outcome."""
    with RunFolder.open(path) as folder:
        prepared = job.prepare(made(), override(made().settings, text), folder, EmbeddedFleet, Quiet())
        assert prepared.accounts.reserve(3, dict.fromkeys(NAMES, 1)) == {}


def test_a_budget_over_runs_ends_a_federation_whose_clients_all_pay_alike(tmp_path: Path) -> None:
    budget_of_two = f"{SECRET} privacy.budget=24 run.state={tmp_path / 'state'}"
    first = run(tmp_path / "first", budget_of_two)
    totals = {client["epsilon_total"] for client in first["privacy"]["clients"]}
    assert len(totals) == 1
    assert totals.pop() == pytest.approx(first["privacy"]["worst_epsilon"], rel=1e-3)
    with pytest.raises(job.Stopped, match="the budget is spent: site-00"):
        run(tmp_path / "second", budget_of_two)


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    text = f"{SECRET} {SEEDED} privacy.adapt=true server.step=momentum codec=topk:0.3"
    whole = run(tmp_path / "whole", text)
    for number in (1, 2):
        with pytest.raises(job.Stopped):
            run(tmp_path / "parts", text, stop_after=number)
    cut_off_in_round_3(tmp_path / "parts", text)
    parts = run(tmp_path / "parts", text)
    names = ("weights.safetensors", "edge/pruned-fp32.onnx")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "parts" / n).read_bytes() for n in names)
    assert parts["privacy"] == whole["privacy"]
    assert parts["privacy"]["clip"] != 0.2
    assert not parts["privacy"]["guarantee"]


def test_with_real_noise_a_round_that_was_cut_off_counts_as_spent_for_all(tmp_path: Path) -> None:
    with pytest.raises(job.Stopped):
        run(tmp_path / "run", SECRET, stop_after=2)
    cut_off_in_round_3(tmp_path / "run", SECRET)
    found = run(tmp_path / "run", SECRET)
    assert {client["steps"] for client in found["privacy"]["clients"]} == {4}
    assert found["privacy"]["worst_epsilon"] <= 20
    rows = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert [row["applied"] for row in rows] == [True, True, True]
    assert found["edge"]["recovery"] == "pruned without recovery: no privacy budget is left"


def test_the_report_says_what_is_promised_against_whom_and_one_account_stands_for_all(tmp_path: Path) -> None:
    found = run(tmp_path / "run", SECRET)
    privacy, html = found["privacy"], (tmp_path / "run/report.html").read_text()
    assert privacy["unit"] == "client"
    assert privacy["guarantee"]
    assert "one client" in privacy["adjacency"]
    assert "not the server" in privacy["against"]
    assert "not the server" in html
    assert privacy["not_covered"][0].startswith("the server")
    assert privacy["delta_rule"] == "1 / (10 x the number of clients)"
    accounts = [{key: value for key, value in c.items() if key not in ("name", "examples")} for c in privacy["clients"]]
    assert len(accounts) == 30
    assert all(account == accounts[0] for account in accounts)
    assert accounts[0]["delta"] == pytest.approx(1 / 300)
    assert accounts[0]["sampling_rate"] == 0.5
    assert 19.9 < accounts[0]["epsilon"] <= 20
    assert accounts[0]["epsilon_rdp"] > accounts[0]["epsilon"]
    assert found["fleet"]["left_out"] == []
    assert "cohorts from the entropy of the operating system" in found["seeds"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("server.combine=median", "median is no sum"),
        ("server.combine=krum", "krum is no sum"),
        ("server.normalize=true", "FedNova"),
        ("privacy.delta=0.04", "publish one of 30 clients"),
        ("rounds.fraction=0.05", "rounds.minimum=1 of 30 clients"),
        ("privacy.epsilon=0.001", "smallest epsilon"),
        ("privacy.unit=example privacy.adapt=true", "privacy.adapt is for privacy.unit=client"),
    ],
)
def test_what_cannot_be_promised_is_refused_before_round_one(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(Refused, match=line) as caught:
        run(tmp_path / "run", text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
