"""How many steps a client takes in a round, and the chance of an example to be in one: by the settings and its data."""

import math

from scenarios.settings import Local


def local_steps(local: Local, examples: int, private: bool) -> int:
    """Steps a round. Under DP an epoch is 1/q Poisson samples; else it is every example once."""
    if local.steps:
        return local.steps
    if private:
        return math.ceil(local.epochs / sampling_rate(local, examples) - 1e-9)
    return local.epochs * math.ceil(examples / (local.batch or examples))


def sampling_rate(local: Local, examples: int) -> float:
    """q: the chance of an example to be in a step's batch; all of them where the batch is the whole data."""
    return min(1.0, local.batch / examples) if local.batch else 1.0
