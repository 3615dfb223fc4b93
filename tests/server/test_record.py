"""The run folder: whatever a crash leaves behind, the last committed round comes back whole, or is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.refused import Refused
from scenarios.numbered import Numbered
from scenarios.settings import Settings
from server import record
from server.record import RunFolder
from server.spendings import Spendings
from server.spent_file import SpentFile
from server.state import ServerState, Spent


def made_state(number: int) -> ServerState:
    return ServerState(
        weights=np.arange(6, dtype=np.float32) * number,
        layout=(("weight", (2, 3)),),
        step={"m": np.full(6, number, np.float32)},
        until=9,
        round=number,
        phase="recover",
        clients={"a": Spent(3 * number, number, number)},
        average=np.full(6, 0.1 * number),
        averaged=1,
        clock=2.5 * number,
        control=np.full(6, -number, np.float32),
    )


def same(one: ServerState, other: ServerState) -> bool:
    arrays = zip(
        [one.weights, one.average, one.control, *one.step.values()],
        [other.weights, other.average, other.control, *other.step.values()],
        strict=True,
    )
    rest = ("layout", "until", "round", "phase", "clients", "averaged", "clock")
    return all(np.array_equal(a, b) for a, b in arrays) and all(getattr(one, k) == getattr(other, k) for k in rest)  # type: ignore[arg-type]


def row(number: int) -> dict[str, object]:
    return {"round": number, "accuracy": 0.1 + 0.2}


def committed_run(path: Path, rounds: int) -> Path:
    folder = RunFolder.create(path, "digits", Settings())
    for number in range(1, rounds + 1):
        folder.commit(made_state(number), row(number))
    folder.close()
    return path


def test_what_was_committed_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = RunFolder.open(committed_run(tmp_path / "run", 3))
    found = folder.committed()
    assert found is not None
    assert same(found, made_state(3))
    assert folder.rows() == [row(1), row(2), row(3)]
    assert folder.settings() == ("digits", Settings())


def numbered(number: int, spent: Sequence[int]) -> ServerState:
    clients = Spendings(Numbered(20)).after(number, np.array(spent), np.full(len(spent), 2), 1, np.array(spent[:1]))
    return replace(made_state(number), clients=clients)


def test_a_small_fleet_of_numbers_comes_back_with_all_that_it_spent(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "digits", Settings()) as folder:
        folder.commit(numbered(1, [3, 17]), row(1))
    with RunFolder.open(tmp_path / "run") as folder:
        found = folder.committed()
    assert found is not None
    assert dict(found.clients) == {"client-03": Spent(2, 1, 1, 1), "client-17": Spent(2, 1, 0, 1)}
    assert not (tmp_path / "run/fleet").exists()


def test_a_checkpoint_of_clients_that_its_fleet_has_not_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder.create(tmp_path / "run", "digits", Settings()) as folder:
        folder.commit(numbered(1, [3, 17]), row(1))
    monkeypatch.setattr(record, "Numbered", lambda number, digits: Numbered(number - 5, digits))
    with RunFolder.open(tmp_path / "run") as folder, pytest.raises(Refused, match="is damaged"):
        folder.committed()


@pytest.mark.parametrize(
    "places",
    [[-1, 2], [2], [0, 1, 2], [[0, 1]], [True, False], [0.0, 1.0]],
    ids=["below 0", "fewer", "more", "", "", ""],
)
def test_rows_that_are_not_one_each_of_a_fleets_clients_are_damaged(tmp_path: Path, places: list[Any]) -> None:
    rows = Spendings(Numbered(5)).after(1, np.array([0, 1]), np.full(2, 2), 1, np.array([0])).rows[:2]
    held = {"spent/places": np.array(places), "spent/rows": rows.view(np.uint8).reshape(2, -1)}
    with pytest.raises(ValueError, match="other rows"):
        SpentFile(tmp_path / "spent.npy").read(Numbered(5), held)


def test_a_run_without_a_round_has_nothing_committed(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path / "run", "digits", Settings()).committed() is None


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test may catch it."""


def test_a_crash_at_any_step_of_a_commit_leaves_this_round_or_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for step in range(1, 30):
        path = committed_run(tmp_path / str(step), 2)
        folder = RunFolder.open(path)
        left = step

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                nonlocal left
                left -= 1
                if not left:
                    raise Killed
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(record.os, "fsync", dying(record.os.fsync))
            patch.setattr(Path, "open", dying(Path.open))
            patch.setattr(Path, "replace", dying(Path.replace))
            try:
                folder.commit(made_state(3), row(3))
                survived = True
            except Killed:
                survived = False
        folder.close()
        again = RunFolder.open(path)
        found = again.committed()
        assert found is not None
        assert same(found, made_state(found.round))
        assert again.rows() == [row(n) for n in range(1, found.round + 1)]
        seen.add(found.round)
        if survived:
            break
    assert seen == {2, 3}


def test_a_line_that_a_crash_cut_off_is_written_again(tmp_path: Path) -> None:
    path = committed_run(tmp_path / "run", 3)
    lines = (path / "rounds.jsonl").read_bytes()
    for cut in range(len(lines) - len(lines.splitlines()[-1]) - 1, len(lines)):
        (path / "rounds.jsonl").write_bytes(lines[:cut])
        folder = RunFolder.open(path)
        folder.committed()
        assert (path / "rounds.jsonl").read_bytes() == lines
        folder.close()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_checkpoint_is_refused_in_one_line(tmp_path: Path, share: float) -> None:
    path = committed_run(tmp_path / "run", 3)
    whole = (path / "checkpoint.safetensors").read_bytes()
    (path / "checkpoint.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(Refused, match="damaged") as caught:
        RunFolder.open(path).committed()
    assert "\n" not in str(caught.value)


def test_rounds_that_do_not_fit_the_checkpoint_are_refused(tmp_path: Path) -> None:
    path = committed_run(tmp_path / "run", 3)
    (path / "rounds.jsonl").write_text("")
    with pytest.raises(Refused, match="does not match"):
        RunFolder.open(path).committed()


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Refused, match="not empty"):
        RunFolder.create(tmp_path, "digits", Settings())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits", Settings())
    with pytest.raises(Refused, match="held by another process"):
        RunFolder.open(tmp_path / "run")
    folder.close()
    RunFolder.open(tmp_path / "run").close()


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no run folder"):
        RunFolder.open(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()  # stands for a folder of someone else's, which root could write to all the same
    (tmp_path / "settings.toml").touch()
    with pytest.raises(Refused, match="cannot be written to") as caught:
        RunFolder.open(tmp_path)
    assert "\n" not in str(caught.value)
