"""Rounds under pairwise masks: the weights of the same integers in the clear, whoever drops or garbles, and when."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients import upload
from clients.task import Hello, Reply, Task
from clients.training import Node
from privacy import neighbours
from privacy.frames import HEADER, NAME, Stage
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import budget, gather, rounds
from server.embedded import EmbeddedFleet
from server.masked import Masked
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

NAMES = [f"site-{i}" for i in range(6)]
BASE = "rounds.number=2 local.batch=8 local.rate=0.5 local.steps=3 protect.max_clients=6"
CLIENT = "privacy.unit=client privacy.epsilon=20 privacy.clip=0.2 privacy.noise_seed=4"
ALL = [Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.SIGN, Stage.UNMASK]
AFTER = [Stage.SIGN, Stage.UNMASK]
"""Stages at which a client's vector is in the sum already."""


@pytest.fixture(autouse=True)
def _no_disk_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash would leave is the matter of other tests."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def node(settings: Settings, folder: Path, names: Sequence[str] = NAMES) -> Node:
    sizes = {name: 10 + 9 * i for i, name in enumerate(names)}

    def examples(name: str) -> Examples:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        x = torch.randn(sizes.get(name, 50), 5, generator=generator)
        return Examples(x, (x.sum(1) > 0).long())

    federation = Federation(sizes, examples, examples("validation"), examples("test"))
    net = {"net": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))}
    return Node(Scenario("made", settings, net, lambda _: federation, name="made"), settings, federation, folder)


def stage_of(task: Task) -> Stage | None:
    """What the server asks of a client, None where nothing is protected."""
    return Stage(task.protection.request[HEADER - NAME - 1]) if task.protection else None


Bend = Callable[[Task, Reply], Reply]


@dataclass
class Heard(NoJournal):
    """A journal and a fleet that remember, with replies passed through `bend`."""

    fleet: EmbeddedFleet
    bend: Bend
    asked: list[Task] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def hello(self) -> Mapping[str, Hello]:
        return self.fleet.hello()

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        self.asked += tasks
        return map(self.bend, tasks, self.fleet.ask(tasks))

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        return {}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.rows.append(row)


def federate(
    folder: Path,
    text: str,
    bend: Bend = lambda _, reply: reply,
    names: Sequence[str] = NAMES,
    told: Callable[[str], None] = lambda text: None,
) -> tuple[list[ServerState], Heard]:
    """The state after each round, and what was asked and committed."""
    settings = override(Settings(), f"{BASE} {text}")
    here = node(settings, folder, names)
    heard = Heard(EmbeddedFleet(here), bend)
    roster = heard.hello()
    plans, begin = (
        budget.plans(roster, settings),
        replace(first_state(here.template, settings), until=settings.rounds.number),
    )
    gathered = Masked("r", 1, 3, told) if settings.protect.mode == "masked" else gather.clear
    ran = rounds.rounds(heard, roster, plans, begin, settings, heard, lambda _: Score(1.0, 0.5), gathered)
    return [after for after, _ in ran], heard


def assert_same(one: Sequence[ServerState], other: Sequence[ServerState]) -> None:
    """Equal weights, to the bit, after every round."""
    assert [state.weights.tobytes() for state in one] == [state.weights.tobytes() for state in other]
    assert one[0].weights.any()


def rejected(heard: Heard) -> list[dict[str, str]]:
    return [{entry["name"]: entry["reason"] for entry in row["rejected"]} for row in heard.rows]


# ---- equal to the bit ----


@pytest.mark.parametrize(
    "text",
    [
        "",
        "server.weighting=uniform server.step=adam",
        "rounds.fraction=0.7 faults.dropout=0.2 run.seed=3",
        "privacy.unit=example privacy.noise_seed=1 faults.dropout=0.2 run.seed=3",
        CLIENT,
        f"{CLIENT} privacy.adapt=true faults.dropout=0.2 run.seed=3",
        f"{CLIENT} rounds.fraction=0.9 privacy.sampling=fixed",
        "privacy.unit=both privacy.client_epsilon=20 privacy.noise_seed=1",
        "privacy.unit=local privacy.epsilon=50 privacy.noise_seed=1 privacy.clip=0.2",
        "protect.range=0.5",
        "codec=shared-topk:0.2:int16 faults.dropout=0.2 run.seed=3",
        f"{CLIENT} codec=shared-topk:0.2:int16 privacy.adapt=true faults.dropout=0.2 run.seed=3",
    ],
)
def test_the_weights_are_those_of_the_same_integers_in_the_clear(tmp_path: Path, text: str) -> None:
    clear, seen = federate(tmp_path / "a", f"codec=int16 {text}")
    masked, heard = federate(tmp_path / "b", f"protect=masked {text}")
    assert_same(masked, clear)
    assert rejected(heard) == rejected(seen)
    assert bool(sum(map(len, rejected(heard)))) == ("dropout" in text)
    assert [row["reason"] for row in heard.rows] == [None, None]
    assert all(row["applied"] for row in heard.rows)


@pytest.mark.parametrize("bits", [2, 9, 24])
def test_so_are_they_at_few_bits_and_at_many(tmp_path: Path, bits: int) -> None:
    clear, _ = federate(tmp_path / "a", f"{CLIENT} codec=int{bits}")
    masked, _ = federate(tmp_path / "b", f"{CLIENT} protect=masked protect.bits={bits}")
    assert_same(masked, clear)


def test_so_are_they_over_a_graph_that_the_clients_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, text = [f"site-{i:02}" for i in range(18)], "protect.max_clients=18 faults.dropout=0.1"
    clear, _ = federate(tmp_path / "a", f"codec=int16 {text}", names=names)
    monkeypatch.setattr(neighbours, "_ALL", 0)  # else they would all be neighbours of all
    neighbours.degree.cache_clear()
    try:
        masked, heard = federate(tmp_path / "b", f"protect=masked {text}", names=names)
    finally:
        neighbours.degree.cache_clear()
    assert Stage.REVEAL in {stage_of(task) for task in heard.asked}
    assert_same(masked, clear)


# ---- who drops, and who garbles ----


def absent(name: str, stage: Stage, task: Task, reply: Reply) -> Reply:
    """`name` is gone in round 1 from `stage` on; in the clear, where it is before its vector has left."""
    at = stage_of(task)
    gone = stage not in AFTER if at is None else at >= stage
    away = task.client == name and task.round == 1 and gone
    return Reply(task.round, task.client, reason="its node is gone") if away else reply


@pytest.mark.parametrize("stage", ALL)
def test_a_client_that_drops_costs_its_own_vector_or_nothing(tmp_path: Path, stage: Stage) -> None:
    bend = partial(absent, NAMES[2], stage)
    clear, _ = federate(tmp_path / "a", "codec=int16", bend)
    masked, heard = federate(tmp_path / "b", "protect=masked", bend)
    assert_same(masked, clear)
    assert rejected(heard) == [{} if stage in AFTER else {NAMES[2]: "its node is gone"}, {}]
    asked = Counter(task.client for task in heard.asked if task.round == 1)
    assert asked[NAMES[2]] == ALL.index(stage) + 1, "a node that is gone is waited for once"
    assert asked[NAMES[3]] == len(ALL)


def test_a_client_that_is_late_at_any_stage_is_late(tmp_path: Path) -> None:
    def slow(task: Task, reply: Reply) -> Reply:
        late = (task.client, stage_of(task)) in ((NAMES[0], Stage.ADVERTISE), (NAMES[1], Stage.MASK))
        return Reply(task.round, task.client, reason="no reply in time", late=True) if late else reply

    _, heard = federate(tmp_path, "protect=masked", slow)
    assert [row["late"] for row in heard.rows] == [NAMES[:2], NAMES[:2]]
    assert rejected(heard) == [{}, {}]
    assert all(row["applied"] for row in heard.rows)


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "a byte less": lambda data: data[:-1],
    "bytes without end": lambda data: data + bytes(50_000),
    "zeros": lambda data: bytes(len(data)),
    "another body": lambda data: data[:HEADER] + bytes(len(data) - HEADER),
    "a flipped bit in the body": lambda data: data[: HEADER + 9] + bytes([data[HEADER + 9] ^ 1]) + data[HEADER + 10 :],
    "another name": lambda data: data[: HEADER - NAME] + b"site-3".ljust(NAME, b"\0") + data[HEADER:],
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_client_that_answers_garbage_at_any_stage_is_named_and_costs_nobody_else_anything(
    tmp_path: Path, garbage: str
) -> None:
    """A stage a round."""

    def bad(task: Task, reply: Reply) -> Reply:
        due = task.client == NAMES[2] and stage_of(task) is ALL[task.round - 1]
        return replace(reply, payload=GARBAGE[garbage](reply.payload)) if due else reply

    def gone(task: Task, reply: Reply) -> Reply:
        return absent(NAMES[2], ALL[task.round - 1], replace(task, round=1), reply)

    clear, _ = federate(tmp_path / "a", "codec=int16 rounds.number=5", gone)
    masked, heard = federate(tmp_path / "b", "protect=masked rounds.number=5", bad)
    assert_same(masked, clear)
    assert [list(named) for named in rejected(heard)] == [[NAMES[2]]] * 3 + [[]] * 2
    assert all(reason.startswith(f"{NAMES[2]}: ") for named in rejected(heard) for reason in named.values())


@pytest.mark.parametrize("stage", ALL)
def test_with_too_few_left_the_round_is_lost_with_its_reason_and_the_run_goes_on(tmp_path: Path, stage: Stage) -> None:
    def few(task: Task, reply: Reply) -> Reply:
        for name in NAMES[2:]:
            reply = absent(name, stage, task, reply)
        return reply

    masked, heard = federate(tmp_path, "protect=masked", few)
    assert [row["applied"] for row in heard.rows] == [False, True]
    reason = str(heard.rows[0]["reason"])
    assert reason.startswith("no masked sum: attempt 1 of round 1: ")
    assert ("site-2: its node is gone" in reason) == (stage in AFTER)
    start = first_state(node(override(Settings(), BASE), tmp_path).template, Settings()).weights
    assert (masked[0].weights == start).all()
    assert (masked[1].weights != start).any()
    assert masked[0].clients[NAMES[0]].rounds == 1


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        (-2, 3, "weights add up to"),
        (-2, 2**18, "weights add up to"),
        (-1, 200, "one of them lied"),
        (0, 2**18, "one of them lied"),
    ],
)
def test_a_sum_that_no_honest_clients_make_loses_the_round_and_no_more(
    tmp_path: Path, place: int, value: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = upload.integers

    def lying(*words: Any) -> np.ndarray:
        entries, task = honest(*words), words[3]
        if (task.client, task.round) == (NAMES[4], 1):
            entries[place] = value
        return entries

    monkeypatch.setattr(upload, "integers", lying)
    _, heard = federate(tmp_path, f"{CLIENT} protect=masked", lambda _, reply: reply)
    assert [row["applied"] for row in heard.rows] == [False, True]
    assert why in heard.rows[0]["reason"]


# ---- what shows, and what is refused ----


def test_under_a_secret_draw_neither_a_row_nor_what_is_told_shows_whether_the_sum_was_opened(tmp_path: Path) -> None:
    text, told = f"{CLIENT} rounds.fraction=0.97 rounds.minimum=0 faults.dropout=0.6", []
    rows = []
    for seed in range(4, 12):
        _, heard = federate(tmp_path / str(seed), f"protect=masked {text} privacy.noise_seed={seed}", told=told.append)
        opened = {task.round for task in heard.asked if stage_of(task) is Stage.UNMASK}
        rows += [(row["round"] in opened, row) for row in heard.rows]
    assert {was for was, _ in rows} == {True, False}
    shown = [
        {k: v for k, v in row.items() if k not in ("round", "seconds", "seconds_evaluation", "epsilon")}
        for _, row in rows
    ]
    assert all(one == shown[0] for one in shown)
    assert shown[0]["applied"]
    assert {line.partition(", round ")[0] for line in told} == {
        "clients show their keys",
        "clients share out what opens their masks",
        "clients train and mask",
        "clients sign whose updates are in the sum",
        "clients take the masks off the sum",
    }


@pytest.mark.parametrize("least", [1, 2])
def test_a_sum_of_fewer_than_three_is_refused_before_anyone_is_asked(least: int) -> None:
    with pytest.raises(Refused, match=f"setting protect.minimum={least} .* greater than or equal to 3"):
        override(Settings(), f"protect=masked protect.minimum={least}")
