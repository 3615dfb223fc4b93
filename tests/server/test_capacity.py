"""More processes than this machine's memory holds: refused before round 1, in one line that says how many would fit."""

import os
import re
from pathlib import Path

import pytest

from clients import memory
from clients.task import Task
from clients.training import Node
from privacy.refused import Refused
from scenarios import load
from scenarios.settings import override
from server import capacity, engine
from server.embedded import EmbeddedFleet
from server.state import first_state

MIB = 1 << 20


def check(folder: Path, text: str) -> None:
    digits = load("digits")
    settings = override(digits.settings, f"local.engine=cohort {text}")
    node = Node(digits, settings, digits.data(settings), folder)
    capacity.check(node, EmbeddedFleet(node).hello())


def one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that one process is taken to need."""
    taken = list[int]()
    whole = memory.need
    monkeypatch.setattr(memory, "need", lambda *told: taken.append(whole(*told)) or taken[-1])
    monkeypatch.setattr(memory, "available", lambda: 1 << 60)
    check(folder, "run.processes=4 local.block=5")
    monkeypatch.undo()
    return max(taken)


@pytest.mark.parametrize("fit", [1, 2, 3])
def test_more_processes_than_fit_are_refused_with_how_many_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: int
) -> None:
    each = one(tmp_path, monkeypatch)
    monkeypatch.setattr(memory, "available", lambda: fit * each + each // 2)
    with pytest.raises(Refused, match=f"^4 processes .* set run.processes={fit}, or a smaller local.block$") as caught:
        check(tmp_path, "run.processes=4 local.block=5")
    assert "\n" not in str(caught.value)
    check(tmp_path, f"run.processes={fit} local.block=5")


@pytest.mark.parametrize(
    "text",
    [
        "run.processes=1",
        "run.processes=4 local.block=20",  # one block: no second process is started
        "run.processes=4 local.block=5 local.engine=single local.block=0",
    ],
)
def test_one_process_is_the_runs_own_and_never_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(memory, "available", lambda: MIB)
    check(tmp_path, text)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("text", ["local.batch=10 local.steps=5", "local.batch=10 local.steps=100"])  # gram, fused
def test_a_process_takes_for_itself_no_more_than_it_is_taken_to_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    digits = load("digits")
    settings = override(digits.settings, f"local.engine=cohort run.processes=2 privacy.unit=none {text}")
    node = Node(digits, settings, digits.data(settings), tmp_path)
    fleet = EmbeddedFleet(node)
    first = first_state(node.template, settings)
    steps = settings.local.steps
    tasks = [Task("train", 1, name, first.weights, first.layout, 0.1, steps) for name in fleet.hello()]
    assert not [reply.reason for reply in fleet.ask(tasks) if reply.reason]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    rollups = [Path(f"/proc/{child}/smaps_rollup").read_text() for child in children]
    taken = [1024 * sum(map(int, re.findall(r"Private_\w+: +(\d+)", rollup))) for rollup in rollups]
    assert len(taken) >= 2
    needed = max(memory.need(node, way, 10, *most, 0) for way, *most, _ in engine.kinds(node, fleet.hello()))
    assert max(taken) < needed


def test_where_the_memory_is_not_known_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: None)
    check(tmp_path, "run.processes=4 local.block=5")
