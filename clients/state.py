"""What a client carries from round to round, on its own disk: one file a round, of the last rounds alone."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as read
from safetensors.numpy import save as written

from clients.task import Task
from privacy.durable import write_atomic
from privacy.refused import Refused
from scenarios.weights import Vector


@dataclass(frozen=True)
class ClientState:
    """Legend: P is the number of weights of the task that it came from."""

    residual: Vector | None = None
    """(P,) float32: what error feedback has not sent yet (clients/codecs.py)."""
    control: Vector | None = None
    """(P,) float32: the client's control variate (clients/scaffold.py)."""


def load(states: Path, task: Task) -> ClientState:
    """The state of the last round that was committed with this client in it; a later one never happened.

    Empty where there is none, or where it is of another model. Raises Refused where its file is damaged.
    """
    if not task.state_round or not (path := _file(states, task.client, task.state_round)).exists():
        return ClientState()
    try:
        tensors = read(path.read_bytes())
    except (SafetensorError, KeyError, ValueError):  # KeyError: a dtype that numpy has not
        raise Refused(f"its state of round {task.state_round} is damaged") from None
    fits = {name: v for name, v in tensors.items() if v.shape == task.weights.shape and v.dtype == np.float32}
    if not all(np.isfinite(value).all() for value in fits.values()):
        raise Refused(f"its state of round {task.state_round} is damaged: it is not finite")
    return ClientState(fits.get("residual"), fits.get("control"))


def save(states: Path, task: Task, state: ClientState) -> None:
    """Keep what `task` left behind, durably, under its round; files before the last committed round go."""
    tensors = {name: value for name, value in vars(state).items() if value is not None}
    if not tensors:
        return
    path = _file(states, task.client, task.round)
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob("*.safetensors"):
        if old.stem.isdigit() and int(old.stem) < task.state_round:
            old.unlink()
    write_atomic(path, written(tensors))


def _file(states: Path, client: str, round_number: int) -> Path:
    folder = hashlib.sha256(client.encode()).hexdigest()[:16]  # a name from the network is no path
    return states / folder / f"{round_number}.safetensors"
