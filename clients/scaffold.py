"""SCAFFOLD, both halves: control variates against the drift of clients whose data differ.

Karimireddy et al. 2020, Algorithm 1, option II. Legend: P is the number of weights; c the server's control variate, c_i
that of client i, (P,) float32 in units of a gradient, zeros before round 1; dy_i the update of client i *as the server
decodes it*, K_i its local steps, eta the round's local rate. A local step goes along gradient + (c - c_i), and

    c_i+ = c_i - c - dy_i / (K_i eta)            c+ = c + sum over who replied of p_i (c_i+ - c_i)

p_i is the client's share in the mean of the whole fleet: 1 / N where all weigh the same, as in the paper. With another
share than the mean's, c would pull towards the optimum of another objective.

Both halves compute c_i+ - c_i from the same bytes, so that nothing more is sent up, and a codec that loses something
cannot part them. Down travels c beside the weights. What a codec left out is not in c_i either, so that the next local
steps go there again: that is error feedback already, and with a residual on top, which counts it twice, rounds diverge.

Privacy: c and c_i are functions of updates that were sent before, and of nothing else of the data. Under example-level
DP that is post-processing: they cost nothing, are added after clip and noise, and stay whole.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from clients.task import Task
from privacy.refused import Refused
from scenarios.weights import Vector


def change(control: Vector, update: Vector, steps: float, rate: float) -> NDArray[np.float64]:
    """c_i+ - c_i, (P,), of a client that was sent c = `control` and answered with `update` (P,), decoded."""
    with np.errstate(over="ignore"):  # both halves look at what comes of it
        return -control.astype(np.float64) - update.astype(np.float64) / (steps * rate)


# ---- the client's half ----


def correction(task: Task, own: Vector | None) -> Vector:
    """c - c_i, (P,): what every local step of `task` adds to its gradient. own: c_i; None: none was kept.

    Raises Refused where the client has lost its c_i: c still holds it, and would pull all clients aside for good.
    """
    if task.control is None:
        raise Refused("the task is without the control variate that this node's settings ask for")
    if not task.rate > 0:
        raise Refused("the task is without a learning rate, which local.scaffold divides by")
    if own is None and task.state_round:
        raise Refused(f"its control variate of round {task.state_round} is gone: it can go on in a new run only")
    return task.control.copy() if own is None else task.control - own


def advanced(task: Task, own: Vector | None, update: Vector, steps: int) -> Vector:
    """c_i+, (P,). update: (P,) as the server decodes it. Raises Refused where it is not finite."""
    assert task.control is not None
    after = change(task.control, update, steps, task.rate) + (0.0 if own is None else own)
    return _float32(after, Refused)


# ---- the server's half ----


class Sent(Protocol):
    """What the server made of one client's good reply."""

    @property
    def update(self) -> Vector: ...
    @property
    def weight(self) -> float: ...
    @property
    def steps(self) -> float: ...


One = TypeVar("One", bound=Sent)


class Tally:
    """c+ of one round, summed while the replies pass through on their way to the combiner: O(P) memory."""

    def __init__(self, control: Vector, rate: float, whole: float) -> None:
        """control: c as it was sent. rate: eta. whole: what all clients of the fleet weigh together."""
        self._control, self._rate, self._whole = control, rate, whole
        self._sum = np.zeros(len(control))

    def through(self, replies: Iterable[One]) -> Iterator[One]:
        """The same `replies`, counted."""
        for one in replies:
            moved = change(self._control, one.update, one.steps, self._rate)
            with np.errstate(invalid="ignore"):  # looked at in `advanced`
                self._sum += moved * (one.weight / self._whole)
            yield one

    def advanced(self) -> Vector:
        """c+, (P,). Raises OverflowError where it is not finite."""
        return _float32(self._control + self._sum, OverflowError)


def _float32(values: NDArray[np.float64], error: type[Exception]) -> Vector:
    with np.errstate(over="ignore"):  # looked at in the next line
        rounded = values.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise error("the control variate is no longer finite: lower local.rate")
    return rounded
