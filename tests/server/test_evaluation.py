"""Test results as protected sums: what the clients said in the clear, of all together, and of no one of them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clients.task import Hello, Reply, Task
from clients.training import Node, answer
from privacy import exact_counts
from privacy.integers import Grid, Integers
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import run as job
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder
from server.state import ServerState, first_state

NAMES = [f"site-{i}" for i in range(6)]
SIZES = {name: 10 + 9 * i for i, name in enumerate(NAMES)}
BASE = (
    "rounds.number=2 local.batch=8 local.rate=0.5 local.steps=2 protect.max_clients=8 reference.no_privacy=false "
    "export.prune=0 evaluation.on=clients"
)
HIDDEN = ["protect=masked", "protect=encrypted", "protect=encrypted protect.trust=shared"]
Bend = Callable[[Task, Reply], Reply]


@pytest.fixture(autouse=True)
def _no_disk_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash would leave is the matter of other tests."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 50), 5, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())


def held(name: str) -> Examples:
    return examples(f"{name} tests") if name != NAMES[2] else Examples(torch.zeros(0, 5), torch.zeros(0).long())


def made(text: str, client_test: Callable[[str], Examples] = held) -> Scenario:
    net = {"net": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))}
    federation = Federation(SIZES, examples, examples("validation"), examples("test"), client_test)
    return Scenario("made", override(Settings(), f"{BASE} {text}"), net, lambda _: federation, name="made")


@dataclass
class Heard:
    """A fleet whose replies pass through `bend`; it remembers what was asked, and what came back."""

    fleet: EmbeddedFleet
    bend: Bend
    said: list[tuple[Task, Reply]] = field(default_factory=list)

    def hello(self) -> Mapping[str, Hello]:
        return self.fleet.hello()

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task, reply in zip(tasks, self.fleet.ask(tasks), strict=True):
            self.said.append((task, self.bend(task, reply)))
            yield self.said[-1][1]


Begin = Callable[..., tuple[job.Job, Heard]]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """begin(settings, bend, client_test=..., name="run") -> a run that has met its clients, and what is heard of them.

    Of a name that was there before it goes on.
    """
    open_ones: list[RunFolder] = []

    def one(
        text: str,
        bend: Bend = lambda _, reply: reply,
        client_test: Callable[[str], Examples] = held,
        name: str = "run",
    ) -> tuple[job.Job, Heard]:
        scenario, path = made(f"{text} run.state={tmp_path / name}-state", client_test), tmp_path / name
        for folder in open_ones:
            if folder.path == path:
                folder.close()
        again = path.exists()
        folder = RunFolder.open(path) if again else RunFolder.create(path, "made", scenario.settings)
        open_ones.append(folder)
        heard: list[Heard] = []

        def fleet_of(node: Node) -> Heard:
            heard.append(Heard(EmbeddedFleet(node), bend))
            return heard[0]

        return job.prepare(scenario, scenario.settings, folder, fleet_of, Quiet()), heard[0]

    yield one
    for folder in open_ones:
        folder.close()


def start(run: job.Job) -> ServerState:
    return first_state(run.node.template, run.node.settings)


@pytest.mark.parametrize("text", HIDDEN)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_hidden_sum_says_what_the_clients_would_have_said_together(begin: Begin, text: str, bits: int) -> None:
    clear, _ = begin("", name="clear")
    hidden, _ = begin(f"{text} protect.bits={bits}")
    expected, found = clear.score(start(clear)), hidden.score(start(hidden))
    assert expected.missing == {NAMES[2]: "no test examples"}
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert found == (found.loss, expected.accuracy, None, {})


@pytest.mark.parametrize("text", HIDDEN)
def test_no_clients_own_result_reaches_the_server(begin: Begin, text: str) -> None:
    run, heard = begin(text)
    run.score(start(run))
    answers = [reply for task, reply in heard.said if task.kind == "evaluate"]
    assert len(answers) == len(NAMES)
    assert all((reply.examples, reply.correct, reply.loss) == (0, 0, 0.0) and reply.payload for reply in answers)
    assert len({len(reply.payload) for reply in answers}) == 1, "not even who has no test examples"


@pytest.mark.parametrize("text", HIDDEN)
def test_whoever_does_not_answer_is_named_and_the_sum_is_that_of_the_others(begin: Begin, text: str) -> None:
    def gone(task: Task, reply: Reply) -> Reply:
        absent = task.kind == "evaluate" and task.client == NAMES[4]
        return Reply(task.round, task.client, reason="its node is gone") if absent else reply

    clear, _ = begin("", gone, name="clear")
    hidden, _ = begin(text, gone)
    expected, found = clear.score(start(clear)), hidden.score(start(hidden))
    assert found.missing == {NAMES[4]: "its node is gone"}
    assert found.accuracy == expected.accuracy


@pytest.mark.parametrize("text", HIDDEN)
def test_of_fewer_than_half_the_clients_nothing_is_known(begin: Begin, text: str) -> None:
    def gone(task: Task, reply: Reply) -> Reply:
        absent = task.kind == "evaluate" and task.client not in NAMES[:2]
        return Reply(task.round, task.client, reason="its node is gone") if absent else reply

    run, _ = begin(text, gone)
    found = run.score(start(run))
    assert found[:3] == (None, None, None)
    assert found.missing.keys() == set(NAMES)
    assert "sum" in found.missing[NAMES[0]]
    assert found.missing[NAMES[5]] == "its node is gone"


@pytest.mark.parametrize("text", HIDDEN)
def test_a_sum_with_a_lie_in_it_is_no_result(begin: Begin, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = exact_counts.entries

    def lying(grid: Grid, examples: int, correct: int, loss: float) -> Integers:
        return honest(grid, examples, correct + (1000 if examples == SIZES[NAMES[5]] else 0), loss)

    def own(name: str) -> Examples:
        return examples(name)

    run, _ = begin(text, client_test=own)
    monkeypatch.setattr(exact_counts, "entries", lying)
    found = run.score(start(run))
    assert found[:3] == (None, None, None)
    assert "no test results" in found.missing[NAMES[0]]


def test_where_one_clients_loss_is_not_finite_all_have_no_loss_and_an_accuracy(begin: Begin) -> None:
    def far(name: str) -> Examples:
        x, y = examples(name)
        return Examples(x * (torch.inf if name == NAMES[1] else 1.0), y)

    run, _ = begin("protect=masked", client_test=far)
    found = run.score(start(run))
    assert found.loss is None
    assert found.accuracy is not None


@pytest.mark.parametrize("text", HIDDEN)
def test_every_evaluation_is_one_that_nobody_answered_before_whoever_starts_the_server_again(
    begin: Begin, text: str
) -> None:
    run, _ = begin(text)
    state = start(run)
    first = [run.score(state), run.score(state)]
    again, _ = begin(text)
    assert [*first, again.score(state)] == [first[0]] * 3
    assert first[0].accuracy is not None


@pytest.mark.parametrize("text", HIDDEN[:2])
def test_a_whole_run_with_dropouts_reports_what_it_would_without_protection(begin: Begin, text: str) -> None:
    rows = []
    for mode, name in (("protect=none codec=int16", "clear"), (text, "hidden")):
        run, _ = begin(f"{mode} faults.dropout=0.2 run.seed=3", name=name)
        report = job.run(run)
        rows.append([(row["accuracy"], row["rejected"]) for row in run.folder.rows()])
        rows[-1].append(report["final"]["accuracy"])
    assert rows[0] == rows[1]
    assert any(row[1] for row in rows[0][:2]), "nobody dropped out"
    assert report["final"]["worst_client_accuracy"] is None
    assert report["fleet"]["unevaluated"] == []


def test_a_server_that_asks_for_the_results_without_protection_or_with_noise_of_its_own_gets_none(
    begin: Begin,
) -> None:
    run, heard = begin("protect=masked")
    run.score(start(run))
    bare = Task("evaluate", 9, NAMES[0], start(run).weights, start(run).layout)
    assert "without the protection" in answer(run.node, bare).reason
    noised = replace(bare, mechanism=Mechanism(1.0, 1e-9))
    assert "noise on test results" in answer(run.node, noised).reason
    said = {task.client: task for task, _ in heard.said if task.kind == "evaluate"}[NAMES[0]]
    swapped = replace(said, kind="train", steps=1, rate=0.1)
    assert not answer(run.node, swapped).payload


def test_an_update_is_not_hidden_under_the_name_of_the_test_results(begin: Begin) -> None:
    def renamed(task: Task) -> Task:
        assert task.protection
        return replace(task, protection=replace(task.protection, run=f"{task.protection.base}:tests:6"))

    run, heard = begin("protect=encrypted")
    job.run(run)
    trained = [task for task, _ in heard.said if task.kind == "train"][-1]
    again = answer(run.node, renamed(replace(trained, round=trained.round + 1)))
    assert "no place in a sum of test results" in again.reason


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("protect=masked protect.max_clients=5 rounds.fraction=0.8", "set protect.max_clients=6"),
        (
            "protect=encrypted privacy.unit=client privacy.epsilon=20",
            "set evaluation.epsilon, with which clients noise their own, evaluation.on=server, or protect=masked",
        ),
    ],
)
def test_what_cannot_be_summed_is_refused_before_anyone_trains(begin: Begin, text: str, line: str) -> None:
    with pytest.raises(Refused, match=line):
        begin(text)


def test_under_client_level_noise_of_the_server_masks_hide_test_results_that_have_none(begin: Begin) -> None:
    run, _ = begin("protect=masked privacy.unit=client privacy.epsilon=20 privacy.noise_seed=1")
    assert np.isfinite(run.score(start(run)).loss or np.nan)
