"""What a federation knows between rounds: frozen values, saved with every commit.

Legend: P is the number of weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from clients.coordinates import Pace
from scenarios.settings import Settings
from scenarios.weights import Layout, Vector, flatten, layout
from server import step

Row = dict[str, Any]
"""One line of rounds.jsonl."""


class Score(NamedTuple):
    loss: float | None
    accuracy: float | None
    worst: float | None = None
    """Accuracy of the worst client, where clients evaluate."""
    missing: Mapping[str, str] = MappingProxyType({})
    """Where clients evaluate: of whom nothing came -> why."""


@dataclass(frozen=True)
class Spent:
    """One client so far."""

    steps: int = 0
    """Steps that may have been released, lost rounds included."""
    rounds: int = 0
    last: int = 0
    """The last round its update was part of."""
    whole: int = 0
    """Under `both`: rounds that the client as a whole has paid for, lost rounds included."""


@dataclass(frozen=True)
class ServerState:
    """Everything that a round changes; what `commit` saves."""

    weights: Vector
    layout: Layout
    step: step.State
    until: int
    """The last round of the phase."""
    round: int = 0
    phase: str = "train"
    """train, or recover after pruning."""
    clients: Mapping[str, Spent] = field(default_factory=dict)
    average: NDArray[np.float64] | None = None
    """Sum (P,) of the weights after the last rounds of the phase `train`."""
    averaged: int = 0
    clock: float = 0.0
    """Seconds on the simulated clock."""
    clip: float = 0.0
    """Clipping norm of the next round's updates, which adaptive clipping moves; 0: as in the settings."""
    control: Vector | None = None
    """(P,) the server's control variate (clients/scaffold.py); None: without."""
    noise: NDArray[np.float64] | None = None
    """(privacy.bands - 1, P) noise of the last rounds, the newest first (privacy/matrix_noise.py); None: none yet."""

    pace: Pace | None = None
    """Of shared coordinates: how fast each moves (clients/coordinates.py); None: nothing was applied yet."""

    @property
    def download(self) -> int:
        """Bytes of weights and control variate, which travel to each client."""
        return self.weights.nbytes + (0 if self.control is None else self.control.nbytes)


def first_state(model: nn.Module, settings: Settings) -> ServerState:
    """Before round 1."""
    weights = flatten(model)
    first = step.resolve(settings.server).init(len(weights))
    control = np.zeros_like(weights) if settings.local.scaffold else None
    return ServerState(weights, layout(model), first, settings.rounds.number, control=control)


def final_weights(state: ServerState) -> Vector:
    """(P,): the mean of the last rounds' weights, of the unpruned model."""
    if state.average is None:
        return state.weights
    return (state.average / state.averaged).astype(np.float32)
