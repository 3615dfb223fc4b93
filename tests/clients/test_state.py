"""What a client carries from round to round: it goes on from the committed round, and from nothing that is damaged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from clients import state
from clients.state import ClientState
from clients.task import Task
from privacy.refused import Refused

TASK = Task("train", 3, "a", np.zeros(5, np.float32), (("w", (5,)),), state_round=2)
NEXT = replace(TASK, round=4, state_round=3)
VECTOR = np.arange(5, dtype=np.float32)
STATES = {
    "a residual": ClientState(residual=VECTOR),
    "a control variate": ClientState(control=-VECTOR),
    "both": ClientState(VECTOR, -VECTOR),
}


def kept(states: Path) -> list[str]:
    return sorted(path.name for path in states.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", STATES)
def test_what_was_saved_comes_back_to_the_bit_each_part_as_what_it_was(tmp_path: Path, name: str) -> None:
    state.save(tmp_path, TASK, STATES[name])
    found = state.load(tmp_path, NEXT)
    for part in ("residual", "control"):
        assert np.array_equal(getattr(found, part), getattr(STATES[name], part))


def test_a_state_of_a_round_that_was_not_committed_is_not_gone_on_from(tmp_path: Path) -> None:
    state.save(tmp_path, replace(TASK, round=2, state_round=0), ClientState(VECTOR))
    state.save(tmp_path, TASK, ClientState(-VECTOR))
    assert np.array_equal(state.load(tmp_path, TASK).residual, VECTOR)
    assert state.load(tmp_path, replace(TASK, state_round=0)) == ClientState()
    assert state.load(tmp_path, replace(TASK, state_round=1)) == ClientState()
    assert state.load(tmp_path, replace(TASK, client="b")) == ClientState()


def test_only_the_committed_round_and_what_came_after_it_stay_on_disk(tmp_path: Path) -> None:
    for number, last in ((1, 0), (2, 1), (3, 2), (4, 2)):  # round 3 was not committed
        state.save(tmp_path, replace(TASK, round=number, state_round=last), ClientState(VECTOR))
    assert kept(tmp_path) == ["2.safetensors", "3.safetensors", "4.safetensors"]


def test_nothing_to_keep_leaves_no_file(tmp_path: Path) -> None:
    state.save(tmp_path, TASK, ClientState())
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [np.zeros(6, np.float32), np.zeros((5, 1), np.float32), np.zeros(5)],
    ids=["longer", "other shape", "wider"],
)
def test_a_state_of_another_model_is_none(tmp_path: Path, other: np.ndarray) -> None:  # type: ignore[type-arg]
    state.save(tmp_path, TASK, ClientState(other, VECTOR))
    found = state.load(tmp_path, NEXT)
    assert found.residual is None
    assert np.array_equal(found.control, VECTOR)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", save({"residual": VECTOR})[:-1], b"\xff" * 64])
def test_a_damaged_file_is_refused_in_words_that_name_no_path(tmp_path: Path, content: bytes) -> None:
    state.save(tmp_path, TASK, ClientState(VECTOR))
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(content)
    with pytest.raises(Refused, match="its state of round 3 is damaged") as caught:
        state.load(tmp_path, NEXT)
    assert str(tmp_path) not in str(caught.value)


def test_a_state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    state.save(tmp_path, TASK, ClientState(control=np.full(5, np.inf, np.float32)))
    with pytest.raises(Refused, match="not finite"):
        state.load(tmp_path, NEXT)


def test_a_name_from_the_network_is_no_path(tmp_path: Path) -> None:
    state.save(tmp_path / "states", replace(TASK, client="../../out"), ClientState(VECTOR))
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
