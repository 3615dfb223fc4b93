"""Course: where SGD has got to before each step, in terms of the weights at first and what came back in every step."""

from functools import lru_cache

import numpy as np

from clients.fused import Pulls


class Course:
    """Where SGD has got to before each step: W_t = kept[t] W_0 - sum over s < t of weights[t, s] D_s^T A_s."""

    def __init__(self, pulls: Pulls, steps: int) -> None:
        """The u of `Pulls` is velocity[0] W_0 - sum over s of velocity[1 + s] D_s^T A_s, so both take one recursion."""
        table, velocity = np.zeros((steps + 1, steps + 1)), np.zeros(steps + 1)
        table[0, 0] = 1.0
        for t in range(steps):
            velocity = pulls.momentum * velocity - (1 - pulls.keep) * table[t]
            velocity[0] += pulls.back
            velocity[1 + t] += pulls.rate
            table[t + 1] = table[t] + velocity
        self.kept = table[:, 0]
        """a_t, (T + 1,)."""
        self.weights = table[:, 1:]
        """c_ts, (T + 1, T); zero where s >= t."""
        self.even = pulls.keep == 1 and not pulls.momentum
        """Whether every c_ts is the rate where it is not zero."""


@lru_cache(maxsize=8)
def course(pulls: Pulls, steps: int) -> Course:
    """The course of so many steps, which all blocks of a round have in common."""
    return Course(pulls, steps)
