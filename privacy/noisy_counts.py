"""Test results under DP: how many of its test examples a client got right, and of how many, noised by the client.

Guarantee: add or remove one test example of a client. The two counts change by at most 1 each, so by at most sqrt(2) in
L2, and `noised` is one Gaussian `Mechanism` step at sampling rate 1 on the client's test examples, whoever sees it.
The mean loss, which one example can move without bound, does not leave the client.
"""

import math

import numpy as np

from privacy import accounting
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused

SENSITIVITY = math.sqrt(2)
ADJACENCY = "add or remove one test example"


def plan(times: int, epsilon: float, delta: float | None, examples: int) -> Plan:
    """`times` noised evaluations for `epsilon`; any epsilon can be reached, with the noise that it takes."""
    delta = delta or accounting.default_delta(examples)
    noise = accounting.calibrate(1.0, times, epsilon, delta, max_noise=1e9)
    return Plan(Mechanism(1.0, noise), SENSITIVITY, epsilon, delta, times)


def hold_to(asked: Mechanism, times: int, epsilon: float, delta: float) -> None:
    """Refuse noise that is less than the node's own settings ask for, over the `times` that they let it be asked.

    Every test example is counted every time, so a mechanism that accounts for a sample would be charged too little.
    """
    if asked.sampling_rate != 1:
        raise Refused(f"the task accounts for {asked.sampling_rate:g} of the test examples, and all are counted")
    if not 0 < asked.noise_multiplier < math.inf or accounting.epsilon({asked: times}, delta) > epsilon:
        raise Refused("the task is with less noise on test results than this node's settings ask for")


def noised(correct: int, examples: int, mechanism: Mechanism, random: np.random.Generator) -> tuple[int, int]:
    """(correct, examples) with noise of multiplier x sqrt(2) on each, to whole numbers; they may be below 0."""
    noise = random.normal(0.0, mechanism.noise_multiplier * SENSITIVITY, 2)
    right, count = np.rint(np.array([correct, examples]) + noise).astype(np.int64)
    return int(right), int(count)


def accuracy(right: int, count: int) -> float | None:
    """The share that sums over clients tell, within [0, 1]; None where noise left nothing to divide by."""
    return min(1.0, max(0.0, right / count)) if count > 0 else None
