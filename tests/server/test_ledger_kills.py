"""A round cut off at any bytecode of the ledger and of the commit: no release is forgotten, at most one counted twice.

A kill takes the process and leaves the files as they are at that moment. So one traced run looks at its own files
before every bytecode of the code that writes, and before every line of the round around it; each state that it finds
is what some kill leaves, and a process that comes later must find its way in it. That a SIGKILL really leaves these
states is tried at each moment at which they change.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from clients.task import Hello, Reply, Task
from privacy import book, chain, durable, ledger, shared_records, standing
from privacy.chain import Head
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism, Plan
from scenarios.settings import Settings, override
from server import accounts, record, rounds
from server.accounts import Accounts, Late
from server.costs import Cost
from server.record import RunFolder
from server.state import Score, ServerState

NAMES, ROUNDS, ASKED, TAKEN = ("a", "b"), 2, 10, {"a": 4, "b": 10}
STEP = Mechanism(1.0, 10.0)
BY_BYTECODE = {module.__file__ for module in (chain, durable, ledger, book, standing, accounts, record)}
BY_LINE = {rounds.__file__}
CUT = "fleet.clock=wall fleet.deadline=9"  # who takes fewer steps than asked was cut by it
SETTINGS = override(Settings(), f"privacy.unit=example rounds.number={ROUNDS} local.steps={ASKED} {CUT}")
PLAN = Plan(STEP, 1.0, 1e6, 1e-3, 1000)
KNOWN = {name: Account("example", name, "made") for name in NAMES}


@dataclass
class Told:
    """A fleet whose training is stubbed: what leaves it stands in the file `told` from that moment on."""

    file: Path

    def hello(self) -> Mapping[str, Hello]:
        return {name: Hello(name, 20, "d") for name in NAMES}

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task in tasks:
            with self.file.open("ab", buffering=0) as file:
                file.write(f"{task.client}\n".encode())
            payload = np.zeros(len(task.weights), "<f4").tobytes()
            yield Reply(task.round, task.client, payload, 20, TAKEN[task.client], head=Head(task.round, "5e" * 32))


def work(home: Path, late: bool) -> None:
    """What a run does, round by round. late: accounts are opened by the round that charges them first."""
    with RunFolder.create(home / "run", "made", SETTINGS) as folder:
        book = Ledger(home / "l.ledger")
        if not late:
            book.open(dict.fromkeys(KNOWN.values(), (None, 1e-3)), data=dict.fromkeys(KNOWN.values(), "d"))
        asks = {name: (Cost(KNOWN[name], STEP, ASKED, delta=1e-3),) for name in NAMES}
        journal = Accounts(folder, 1, book, "run", asks, late=Late(None, None, lambda _: "d") if late else None)
        fleet = Told(home / "told")
        state = ServerState(np.zeros(3, np.float32), (("w", (3,)),), {}, ROUNDS)
        plans = dict.fromkeys(NAMES, PLAN)
        for _ in rounds.rounds(fleet, fleet.hello(), plans, state, SETTINGS, journal, lambda _: Score(None, None)):
            pass
        book.reserve("run", ROUNDS + 1, dict.fromkeys(KNOWN.values(), (STEP, ASKED)))
        book.void("run", ROUNDS + 1, KNOWN.values())


@dataclass
class Watch:
    """Counts the events; keeps the files of `home` where they differ from those of the event before, or kills."""

    home: Path
    late: bool
    kill: int = 0
    events: int = 0
    states: list[tuple[int, dict[str, bytes]]] = field(default_factory=list)

    def __call__(self, frame: FrameType, kind: str, _: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in BY_BYTECODE | BY_LINE:
            return None
        frame.f_trace_opcodes = frame.f_code.co_filename in BY_BYTECODE
        if kind == ("opcode" if frame.f_trace_opcodes else "line"):
            self.events += 1
            if self.events == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if not self.kill:
                found = files(self.home)
                if not self.states or found != self.states[-1][1]:
                    self.states.append((self.events, found))
        return self


def files(home: Path) -> dict[str, bytes]:
    found = {}
    for folder, _, names in os.walk(home):
        for name in names:
            path = f"{folder}/{name}"
            with open(path, "rb") as file:  # noqa: PTH123  # some ten thousand times
                found[os.path.relpath(path, home)] = file.read()
    return found


def traced(watch: Watch) -> None:
    sys.settrace(watch)
    try:
        work(watch.home, watch.late)
    finally:
        sys.settrace(None)


def check(home: Path, where: str) -> None:
    """What a process that comes later finds in `home`; and it goes on."""
    told = (home / "told").read_text() if (home / "told").exists() else ""
    released = {name: told.count(name) * TAKEN[name] for name in NAMES}
    book = Ledger(home / "l.ledger")
    book.read()
    spent = {name: sum(book.accounts[KNOWN[name]].history.values()) if book.accounts else 0 for name in NAMES}
    for name in NAMES:
        assert released[name] <= spent[name] <= released[name] + ASKED, f"{where}: {released} left, {spent} is written"
    if (home / "run" / "settings.toml").exists():
        with RunFolder.open(home / "run") as folder:
            state, head = folder.committed(), folder.ledger_head()
            counted = dict.fromkeys(NAMES, 0)
            if state is not None:
                counted = {name: state.clients[name].steps for name in NAMES}
                assert head is not None
                assert book.holds(head)
            again = Accounts(folder, 1, book, "run", {name: (Cost(KNOWN[name], STEP, ASKED),) for name in NAMES})
            lost = again.unanswered(state.round if state else 0)
            for name in NAMES:
                assert counted[name] + lost.get(name, (0, 0))[0] >= released[name], (
                    f"{where}: the run forgets a release of {name}"
                )
    book.open(dict.fromkeys(KNOWN.values(), (None, 1e-3)))
    book.reserve("later", 9, {KNOWN["a"]: (STEP, 1)})
    later = Ledger(home / "l.ledger")
    later.read()
    assert sum(later.accounts[KNOWN["a"]].history.values()) == spent["a"] + 1


@pytest.fixture(params=[False, True], ids=["opened before, single records", "opened late, shared records"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if late := bool(request.param):
        monkeypatch.setattr(shared_records, "ALONE", 0)
    return late


@pytest.mark.slow
def test_killed_at_any_bytecode_no_release_is_forgotten_and_at_most_one_counts_twice(
    tmp_path: Path, late: bool
) -> None:
    watch = Watch(tmp_path / "whole", late)
    watch.home.mkdir()
    traced(watch)
    assert watch.events > 10_000
    assert len(watch.states) > 40
    for event, content in watch.states:
        home = tmp_path / f"state-{event}"
        for name, data in content.items():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(data)
        check(home, f"event {event}")
    print(watch.events, "events,", len(watch.states), "states")


@pytest.mark.slow
def test_sigkill_wherever_the_files_change_leaves_such_a_state(tmp_path: Path, late: bool) -> None:
    watch = Watch(tmp_path / "whole", late)
    watch.home.mkdir()
    traced(watch)
    for event, _ in watch.states:
        home = tmp_path / f"killed-{event}"
        home.mkdir()
        if (child := os.fork()) == 0:
            try:
                traced(Watch(home, late, event))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        check(home, f"killed at event {event}")
