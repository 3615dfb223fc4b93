"""Local DP: each client clips its own update and noises it before anyone sees it; the client's half and the server's.

Guarantee: whatever the client's data, its clipped update lies within C of the origin, so two of them differ by at most
2C in L2. Gaussian noise of standard deviation z 2C on each entry makes what a round sends one `Mechanism(1.0, z)` step,
replace-the-client's-whole-data adjacency (Balle and Wang 2018, Theorem 8, exact for any epsilon), and n rounds the one
of multiplier z / sqrt(n). It holds against whoever sees what the client sends, the server included. A client pays for
the rounds in which it was asked. Codecs, combiners and server steps come after the noise and cost nothing.

Legend: P is the number of entries of an update, z the noise multiplier in units of the sensitivity 2C.
"""

import numpy as np
from numpy.typing import NDArray
from torch import nn

from privacy import accounting, cohort_noise
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused

_Vector = NDArray[np.float32]


def noised(update: _Vector, clip: float, multiplier: float, random: np.random.Generator) -> _Vector:
    """The client's half: `update` (P,) scaled down to a norm of at most `clip`, plus noise; float32 (P,)."""
    short, _ = cohort_noise.clipped(update, clip)
    return (short + random.normal(0.0, multiplier * 2 * clip, short.shape)).astype(np.float32)


def hold_to(
    clip: float, multiplier: float, wanted_clip: float, epsilon: float, delta: float | None, rounds: int
) -> None:
    """Refuse a task (clip, multiplier) of less privacy than the node's own settings ask for.

    A node does not know how many clients there are: where privacy.delta is unset it checks what any fleet must keep.
    """
    if not 0 < clip <= wanted_clip:
        raise Refused("the task is without the clipping norm that this node's settings ask for")
    allowed = delta or accounting.default_delta(1)
    if not multiplier > 0 or accounting.epsilon({Mechanism(1.0, multiplier): rounds}, allowed) > epsilon:
        raise Refused("the task is without the noise that this node's settings ask for")


def plan(clients: int, rounds: int, epsilon: float, delta: float | None, clip: float, most: float) -> Plan:
    """The one plan that all clients share, calibrated for all of `rounds` rounds that a client may join.

    Raises Refused when delta would allow to publish a client, or when more noise than `most` would be needed.
    """
    delta = cohort_noise.client_delta(delta, clients)
    if (least := accounting.epsilon({Mechanism(1.0, most): rounds}, delta)) > epsilon:
        longest = accounting.most_steps(Mechanism(1.0, most), epsilon, delta, rounds)
        raise Refused(cohort_noise.unreachable(clients, rounds, epsilon, most, least, longest))
    return Plan(Mechanism(1.0, accounting.calibrate(1.0, rounds, epsilon, delta, most)), clip, epsilon, delta, rounds)


def check(model: nn.Module) -> None:
    """Refuse a model whose state noise could make invalid. Any combiner is allowed: it comes after the noise."""
    cohort_noise.check(model, "mean", False)
