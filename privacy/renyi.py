"""The gate's arithmetic: Renyi divergences as rows over fixed orders; composing adds rows, epsilon is a minimum.

Legend: C clients, O orders.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import lgamma, log, log1p

import numpy as np
from numpy.typing import NDArray

from privacy import fixed_size
from privacy.plan import History, Mechanism

Array = NDArray[np.float64]

ORDERS = np.array([*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), 320, 384, 512, 768, 1024], dtype=np.float64)
"""(O,) integers: for them the divergence of the sampled Gaussian is a finite sum."""


@lru_cache(maxsize=16_384)
def row(mechanism: Mechanism) -> Array:
    """(O,) Renyi divergence of one step, for adding and for removing one example, or for replacing one; read only.

    Mironov, Talwar and Zhang 2019, Section 3.3: log sum_k C(a, k) (1-q)^(a-k) q^k exp((k^2-k) / 2z^2) / (a-1).
    Of a fixed size: privacy/fixed_size.py.
    """
    rate, noise = mechanism.sampling_rate, mechanism.noise_multiplier
    found = np.full(len(ORDERS), np.inf)
    if noise and mechanism.population:
        found = fixed_size.divergences(rate, noise, ORDERS)
    elif noise and rate == 1:
        found = ORDERS / (2 * noise**2)
    elif noise:
        for i, order in enumerate(int(a) for a in ORDERS):
            k = np.arange(order + 1)
            terms = _log_binomials(order) + (order - k) * log1p(-rate) + k * log(rate) + (k**2 - k) / (2 * noise**2)
            top = terms.max()
            found[i] = (top + np.log(np.exp(terms - top).sum())) / (order - 1)
    found.flags.writeable = False
    return found


@lru_cache(maxsize=256)
def _log_binomials(order: int) -> Array:
    return np.array([lgamma(order + 1) - lgamma(k + 1) - lgamma(order - k + 1) for k in range(order + 1)])


def spent(histories: Sequence[History]) -> Array:
    """(C, O) what each client's history amounts to; the time does not depend on how often anything ran."""
    rows: list[Array] = []
    counts: list[float] = []
    owners: list[int] = []
    for client, history in enumerate(histories):
        for mechanism, count in history.items():
            if count > 0:
                rows.append(row(mechanism))
                counts.append(count)
                owners.append(client)
    total = np.zeros((len(histories), len(ORDERS)))
    if owners:
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        total[np.array(owners)[starts]] = np.add.reduceat(np.array(rows) * np.array(counts)[:, None], starts, axis=0)
    return total


def after(spent_CO: Array, mechanisms: Sequence[Mechanism], steps: Sequence[int]) -> Array:
    """(C, O) one round later: client c runs `steps[c]` >= 1 of `mechanisms[c]`. A round costs the same however long."""
    rows_CO: Array = np.array([row(mechanism) for mechanism in mechanisms])
    return spent_CO + rows_CO * np.array(steps, dtype=np.float64)[:, None]


def bounds(spent_CO: Array, deltas: Sequence[float]) -> Array:
    """(C,) an upper bound on each client's epsilon at its delta (Canonne, Kamath and Steinke 2020, Proposition 12)."""
    log_delta_C = np.log(np.asarray(deltas, dtype=np.float64))
    per_order = np.log1p(-1 / ORDERS) - np.log(ORDERS) / (ORDERS - 1)
    found: Array = (spent_CO + per_order - log_delta_C[:, None] / (ORDERS - 1)).min(axis=1)
    return np.where(spent_CO[:, 0] > 0, np.maximum(found, 0), 0)


def epsilons(histories: Sequence[History], deltas: Sequence[float]) -> Array:
    """(C,) the same of histories. Nothing ran: 0. Ran without noise: infinity."""
    return bounds(spent(histories), deltas)
