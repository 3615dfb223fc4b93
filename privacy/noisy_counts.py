"""Test results under DP: how many of its test examples a client got right, and of how many, noised by the client.

Guarantee: add or remove one test example of a client. The two counts change by at most 1 each, so by at most sqrt(2) in
L2, and `noised` is one Gaussian `Mechanism` step at sampling rate 1 on the client's test examples, whoever sees it.
The mean loss, which one example can move without bound, does not leave the client.
"""

import math

import numpy as np

from privacy import accounting
from privacy.plan import Mechanism, Plan

SENSITIVITY = math.sqrt(2)
ADJACENCY = "add or remove one test example"


def plan(times: int, epsilon: float, delta: float | None, examples: int) -> Plan:
    """`times` noised evaluations for `epsilon`; any epsilon can be reached, with the noise that it takes."""
    delta = delta or accounting.default_delta(examples)
    noise = accounting.calibrate(1.0, times, epsilon, delta, max_noise=1e9)
    return Plan(Mechanism(1.0, noise), SENSITIVITY, epsilon, delta, times)


def noised(correct: int, examples: int, mechanism: Mechanism, random: np.random.Generator) -> tuple[int, int]:
    """(correct, examples) with noise of multiplier x sqrt(2) on each, to whole numbers; they may be below 0."""
    noise = random.normal(0.0, mechanism.noise_multiplier * SENSITIVITY, 2)
    right, count = np.rint(np.array([correct, examples]) + noise).astype(np.int64)
    return int(right), int(count)


def accuracy(right: int, count: int) -> float | None:
    """The share that sums over clients tell, within [0, 1]; None where noise left nothing to divide by."""
    return min(1.0, max(0.0, right / count)) if count > 0 else None
