"""Cohorts of a fixed size, drawn in secret without replacement: the draw, and what a round costs.

Guarantee: take two fleets of n clients that differ in the data of one. The clipped sums of a cohort of k differ by at
most 2C, one update being exchanged for another, so noise of z C is z / 2 sensitivities, and with the draw unknown a
round is a `Mechanism(k / n, z, n)` step, replace-one adjacency. *Every* client pays for it, drawn or not. The size is
public and never short, so nothing is taken off delta. Clients that join or leave are not covered.

**The bound** (Wang, Balle and Kasiviswanathan 2019, Theorem 9, and Theorem 27 for Gaussians). With sigma = z / 2,
q = k / n and D(a) = a / (2 sigma^2) the divergence without sampling, for whole orders a >= 2

    (a - 1) D'(a) <= log(1 + sum_(j = 2)^a C(a, j) q^j t_j)
    t_j = min(2 exp((j - 1) D(j)), 4 sqrt(B(2 floor(j / 2)) B(2 ceil(j / 2))))

with B(l) = E|L - 1|^l of the likelihood ratio L of two Gaussians one sensitivity apart; its factor 4 comes of the four
orders in which the densities of a cohort's three versions can lie, the root of Cauchy and Schwarz. For even l it is an
integral of an analytic function, taken here by the trapezoidal rule, which converges geometrically; dp-accounting
takes finite differences, which cancel at high orders (decisions/010). Where D(a) itself is less than D'(a),
`accounting` takes the epsilon of that.

dp-accounting's Renyi accountant takes a noise multiplier in units of the sensitivity at the adjacency it is asked for,
here 2C; its PLD accountant would double a Gaussian's sensitivity itself at replace-one.

Legend: O orders, J = 2 ... the largest order.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import lgamma, log

import numpy as np
from numpy.typing import NDArray

from privacy.refused import Refused

Array = NDArray[np.float64]

_GRID = np.arange(-16.0, 48.0, 1 / 32)
_ROUNDING = 1e-9
"""What the sums may be off by, relative, generously; the bound is raised by it."""


def draw(names: Sequence[str], size: int, random: np.random.Generator) -> list[str]:
    """Exactly `size` of `names`, in their order; every such choice is equally likely."""
    return [names[i] for i in sorted(random.choice(len(names), size, replace=False))]


def rate(clients: int, size: int) -> float:
    """q = size / clients. Raises Refused where that samples nothing, as with everyone in the cohort."""
    if not 0 < size < clients:
        raise Refused(
            f"privacy.sampling=fixed draws a part of the clients, but a round asks {size} of {clients}: lower "
            "rounds.fraction, or set privacy.sampling=poisson"
        )
    return size / clients


def divergences(sampling_rate: float, noise_multiplier: float, orders: Array) -> Array:
    """(O,) Renyi divergence of one round at whole `orders` >= 2, ascending, replace-one; noise in units of C."""
    sigma, last = noise_multiplier / 2, int(orders[-1])
    j_J = np.arange(2, last + 1)
    log_terms_J = _log_moments(sigma, last) + j_J * log(sampling_rate)
    log_factorials = np.array([lgamma(i + 1) for i in range(last + 1)])
    found = np.empty(len(orders))
    for i, order in enumerate(int(a) for a in orders):
        j = j_J[: order - 1]
        terms = log_terms_J[: order - 1] + log_factorials[order] - log_factorials[j] - log_factorials[order - j]
        top = max(0.0, float(terms.max()))
        if top > 30:  # the 1 does not count
            total = top + log(np.exp(terms - top).sum() + np.exp(-top))
        else:
            total = float(np.log1p(np.exp(terms).sum()))
        found[i] = total * (1 + _ROUNDING) / (order - 1)
    return found


@lru_cache(maxsize=256)
def _log_moments(sigma: float, last: int) -> Array:
    """(J,) log t_j of the module docstring, for j = 2 ... last."""
    j = np.arange(2, last + 1, dtype=np.float64)
    plain = log(2) + j * (j - 1) / (2 * sigma**2)
    # where the Gaussians lie far apart, 2 exp(...) is the smaller anyway, and its integral would leave the grid
    reach = min(last + 1, max(2, int(30 * sigma)))  # the integrand peaks near order / sigma
    even = np.arange(2, reach + 2, 2)
    loss = _GRID / sigma - 1 / (2 * sigma**2)  # log L at a draw of the standard normal
    with np.errstate(divide="ignore"):
        excess = np.where(loss > 40, loss, np.log(np.abs(np.expm1(np.minimum(loss, 40)))))  # log |L - 1|
    exponents = even[:, None] * excess[None, :] - _GRID**2 / 2
    top = exponents.max(axis=1)
    logs = top + np.log(np.exp(exponents - top[:, None]).sum(axis=1) / 32 / np.sqrt(2 * np.pi))
    moments = dict(zip(even.tolist(), logs.tolist(), strict=True))
    for i, order in enumerate(range(2, last + 1)):
        low, high = 2 * (order // 2), 2 * ((order + 1) // 2)
        if high in moments:
            plain[i] = min(plain[i], log(4) + (moments[low] + moments[high]) / 2)
    return plain
