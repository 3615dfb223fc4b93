"""A server that dies in a masked round: the next start tries the round again, or loses it with a reason and goes on."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clients.task import Hello, Reply, Task
from privacy.frames import HEADER, NAME, Stage
from privacy.refused import Refused
from server.embedded import EmbeddedFleet
from server.record import RunFolder
from server.run import Stopped

MASKED = "privacy.unit=none rounds.number=6 protect=masked"
CLEAR = "privacy.unit=none rounds.number=6 codec=int16"
RunReal = Callable[..., dict[str, Any]]
Ask = Callable[[EmbeddedFleet, Sequence[Task]], Iterator[Reply]]


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@pytest.fixture(autouse=True)
def _no_disk_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies loses nothing that it has written."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@contextmanager
def fleet(ask: Callable[[Ask, EmbeddedFleet, Sequence[Task]], Iterator[Reply]]) -> Iterator[None]:
    """Every fleet asks through `ask`, which gets the honest way as its first word."""
    honest = EmbeddedFleet.ask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddedFleet, "ask", lambda self, tasks: ask(honest, self, tasks))
        yield


def go(run_real: RunReal, path: Path, text: str, rounds: int) -> list[dict[str, Any]]:
    """Go on to the end of round `rounds`; the rows so far."""
    with pytest.raises(Stopped):
        run_real(path, text, rounds)
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]


def weights(path: Path) -> bytes:
    with RunFolder.open(path) as folder:
        state = folder.committed()
    assert state is not None
    return state.weights.tobytes()


def attempt(path: Path) -> int:
    return int(json.loads((path / "protect.json").read_text())["attempt"])


def killed(run_real: RunReal, path: Path, stage: Stage, answered: int) -> None:
    """A run that dies in round 2 when so many have answered at `stage`; the last of them is not heard any more."""

    def dies(honest: Ask, self: EmbeddedFleet, tasks: Sequence[Task]) -> Iterator[Reply]:
        for count, (task, reply) in enumerate(zip(tasks, honest(self, tasks), strict=True), start=1):
            assert task.protection is not None
            if (task.round, task.protection.request[HEADER - NAME - 1], count) == (2, stage, answered):
                raise Killed
            yield reply

    with fleet(dies), pytest.raises(Killed):
        run_real(path, MASKED, 3)


@pytest.fixture(scope="module")
def undisturbed(run_real: RunReal, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights after round 3 of the same integers in the clear."""
    path = tmp_path_factory.mktemp("whole") / "run"
    go(run_real, path, CLEAR, 3)
    return weights(path)


@pytest.mark.parametrize(
    ("stage", "answered"),
    [(Stage.ADVERTISE, 1), (Stage.SHARE, 1), (Stage.MASK, 1), (Stage.MASK, 6), (Stage.SIGN, 1), (Stage.SIGN, 6)],
)
def test_a_round_that_nobody_has_unmasked_is_tried_again_to_the_same_bits(
    run_real: RunReal, tmp_path: Path, undisturbed: bytes, stage: Stage, answered: int
) -> None:
    killed(run_real, tmp_path / "run", stage, answered)
    assert attempt(tmp_path / "run") == 1
    rows = go(run_real, tmp_path / "run", MASKED, 3)
    assert attempt(tmp_path / "run") == 2
    assert [(row["round"], row["applied"], row["rejected"]) for row in rows] == [(n, True, []) for n in (1, 2, 3)]
    assert weights(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("answered", [1, 2])
def test_who_has_unmasked_stays_out_of_the_round_that_is_tried_again(
    run_real: RunReal, tmp_path: Path, answered: int
) -> None:
    killed(run_real, tmp_path / "run", Stage.UNMASK, answered)
    rows = go(run_real, tmp_path / "run", MASKED, 3)
    out = [f"site-{i:02}" for i in range(answered)]
    assert [entry["name"] for entry in rows[1]["rejected"]] == out
    assert {entry["reason"] for entry in rows[1]["rejected"]} == {"round 2 is closed here"}

    def without(honest: Ask, self: EmbeddedFleet, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task, reply in zip(tasks, honest(self, tasks), strict=True):
            yield Reply(2, task.client, reason="out") if task.round == 2 and task.client in out else reply

    with fleet(without):
        go(run_real, tmp_path / "whole", CLEAR, 3)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("answered", [4, 6])
def test_a_round_that_too_many_have_unmasked_is_lost_with_its_reason_and_the_run_goes_on(
    run_real: RunReal, tmp_path: Path, answered: int
) -> None:
    killed(run_real, tmp_path / "run", Stage.UNMASK, answered)
    before = weights(tmp_path / "run")
    rows = go(run_real, tmp_path / "run", MASKED, 2)
    assert weights(tmp_path / "run") == before
    left = 6 - answered
    lost = f"no masked sum: attempt 2 of round 2: {left} clients take part, 3 are the minimum"
    assert (rows[1]["applied"], rows[1]["reason"]) == (False, lost)
    rows = go(run_real, tmp_path / "run", MASKED, 3)
    assert (rows[2]["applied"], rows[2]["rejected"]) == (True, [])
    assert attempt(tmp_path / "run") == 3


def test_a_run_folder_that_was_copied_back_loses_the_rounds_that_its_clients_have_seen_and_goes_on(
    run_real: RunReal, tmp_path: Path
) -> None:
    run, backup = tmp_path / "run", tmp_path / "backup"
    go(run_real, run, MASKED, 1)
    shutil.copytree(run, backup)
    go(run_real, run, MASKED, 3)
    shutil.copytree(run / "clients", backup / "clients", dirs_exist_ok=True)  # as on devices: they were not set back
    rows = go(run_real, backup, MASKED, 4)
    assert [row["applied"] for row in rows] == [True, False, False, True]
    said = [{entry["reason"] for entry in row["rejected"]} for row in rows]
    assert said[1] == {"attempt 2 of round 2 is over: attempt 2 of round 3 is the latest here"}
    assert said[2] == {"round 3 is closed here"}
    assert said[3] == set()


def test_a_client_that_comes_back_with_another_key_is_refused_in_one_line(
    run_real: RunReal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(run_real, tmp_path / "run", MASKED, 1)
    honest = EmbeddedFleet.hello

    def other(self: EmbeddedFleet) -> Mapping[str, Hello]:
        return {name: replace(hello, identity="5e" * 32) for name, hello in honest(self).items()}

    monkeypatch.setattr(EmbeddedFleet, "hello", other)
    with pytest.raises(Refused, match=r"^client site-00 signs with another key than when the run began: .*[^\n]$"):
        run_real(tmp_path / "run", MASKED)
    monkeypatch.undo()
    assert go(run_real, tmp_path / "run", MASKED, 2)[1]["applied"]
