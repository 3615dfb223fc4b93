"""The gate's arithmetic: Renyi divergences as rows over fixed orders; composing adds rows, epsilon is a minimum.

Legend: C clients, O orders.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import lgamma, log, log1p

import numpy as np
from numpy.typing import NDArray

from privacy.plan import History, Mechanism

Array = NDArray[np.float64]

ORDERS = np.array([*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), 320, 384, 512, 768, 1024], dtype=np.float64)
"""(O,) integers: for them the divergence of the sampled Gaussian is a finite sum."""


@lru_cache(maxsize=16_384)
def row(mechanism: Mechanism) -> Array:
    """(O,) Renyi divergence of one step, for adding and for removing one example; read only.

    Mironov, Talwar and Zhang 2019, Section 3.3: log sum_k C(a, k) (1-q)^(a-k) q^k exp((k^2-k) / 2z^2) / (a-1).
    """
    rate, noise = mechanism.sampling_rate, mechanism.noise_multiplier
    found = np.full(len(ORDERS), np.inf)
    if noise and rate == 1:
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


def epsilons(histories: Sequence[History], deltas: Sequence[float]) -> Array:
    """(C,) an upper bound on each client's epsilon at its delta; the time does not depend on how often anything ran.

    Conversion: Canonne, Kamath and Steinke 2020, Proposition 12. Nothing ran: 0. Ran without noise: infinity.
    """
    rows: list[Array] = []
    counts: list[int] = []
    owners: list[int] = []
    for client, history in enumerate(histories):
        for mechanism, count in history.items():
            if count > 0:
                rows.append(row(mechanism))
                counts.append(count)
                owners.append(client)
    found = np.zeros(len(histories))
    if not owners:
        return found
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    spent_CO = np.add.reduceat(np.array(rows) * np.array(counts, dtype=np.float64)[:, None], starts, axis=0)
    ran = np.array(owners)[starts]
    log_delta_C = np.log(np.asarray(deltas, dtype=np.float64)[ran])
    bounds_CO = spent_CO + (np.log1p(-1 / ORDERS) - np.log(ORDERS) / (ORDERS - 1))
    bounds_CO -= log_delta_C[:, None] / (ORDERS - 1)
    found[ran] = np.maximum(bounds_CO.min(axis=1), 0)
    return found
