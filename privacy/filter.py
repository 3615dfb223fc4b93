"""The Renyi filter: what may be claimed where the next step, or the end, was chosen by what earlier ones released.

Privacy loss distributions compose steps that were fixed beforehand. Chosen steps need a filter: one order, fixed before
the first release, and a bound on the divergences at that order added up, which no choice can pass.
"""

import math
from typing import NamedTuple

import numpy as np

from privacy import renyi
from privacy.plan import History
from privacy.refused import Refused


class Filtered(NamedTuple):
    """A claim that survives adaptive choices."""

    epsilon: float
    order: int
    divergence: float
    """The bound on what all steps together add up to at `order`."""


def order_for(budget: float, delta: float) -> int:
    """The Renyi order of a filter for (budget, delta): a function of these two alone, so that no data can move it.

    The order at which Gaussian steps that reach the budget convert best. With L = log(1/delta) and divergence c a at
    order a, epsilon = c a + L / (a - 1) is least at a = 1 + sqrt(L / c), where it is c + 2 sqrt(c L); the budget gives
    sqrt(c) = sqrt(L + budget) - sqrt(L). Rounded to the nearest order that `renyi` computes. Raises Refused for a
    budget that is not above 0 or a delta outside (0, 1).
    """
    if not (budget > 0 and 0 < delta < 1):
        raise Refused(f"a filter needs a budget above 0 and a delta between 0 and 1, not {budget:g} and {delta:g}")
    if math.isinf(budget):
        return int(renyi.ORDERS[0])
    length = math.sqrt(math.log(1 / delta))
    best = 1 + length / (math.sqrt(length**2 + budget) - length)
    return int(renyi.ORDERS[np.abs(np.log(renyi.ORDERS / best)).argmin()])


def filtered(most: History, budget: float, delta: float) -> Filtered:
    """Epsilon at delta of any steps whose divergences at `order_for(budget, delta)` add up to at most `most`'s.

    Guarantee: whatever rule chooses each mechanism, its data being the same, and when to stop, by all that was released
    so far, if it can never pass that sum, all that is released is (epsilon, delta)-DP.

    Proof sketch (Feldman and Zrnic 2021, Theorem 3.1): fix the order a. Let r_t be step t's divergence at a, a function
    of what was released before t, and let M_t be the a-th power of the likelihood ratio of the first t releases times
    exp(-(a - 1) (r_1 + ... + r_t)). Given the first t - 1 releases r_t is a number and step t's ratio has an a-th
    moment of at most exp((a - 1) r_t), so M_t is a supermartingale from 1: E[M_T] <= 1. As the r_t add up to at most B,
    the a-th moment of the whole ratio is at most exp((a - 1) B): divergence B at order a, as if all had been fixed. One
    order gives one bound on one moment; the best of many orders, picked at the end, would use sums that no rule kept.
    The conversion is Canonne, Kamath and Steinke 2020, Proposition 12, as in `renyi.bounds`.
    Nothing may run: 0. Without noise: infinity.
    """
    order = order_for(budget, delta)
    at = int(np.flatnonzero(order == renyi.ORDERS)[0])
    total = float(renyi.spent([most])[0, at])
    if total == 0:
        return Filtered(0.0, order, 0.0)
    converted = total + math.log1p(-1 / order) - (math.log(order) + math.log(delta)) / (order - 1)
    return Filtered(max(0.0, converted), order, total)
