"""DP-FTRL for fleets that cannot sample in secret: noise correlated over the rounds by a banded matrix.

Round t releases G_t + (C^-1 Z)_t: G_t (P,) the sum of updates clipped at one norm c, Z independent N(0, (z c)^2), C
lower triangular, Toeplitz, with b bands: the first b coefficients of (1 - x)^(-1/2), scaled so that no column is
longer than 1 (Choquette-Choo et al. 2023; McKenna 2024). What earlier noise added is in part taken away again, so
that the noise in the *sum* of the rounds, which is what the weights are made of, is less than that of independent
noise.

Guarantee: a client that takes part at most once in any b consecutive rounds, and k times in all, pays for exactly k
`Mechanism(1.0, z)` steps, add-or-remove adjacency, whoever knows who took part; no amplification is claimed. It holds
for adaptive rounds, against readers and other clients, not against the server, which adds the noise.

**Proof.** To release the above is to release Y_t = sum_i c_i G_(t-i) + Z_t for t = 1, 2, ..., as C is invertible.
Given Y_1 ... Y_(t-1), whatever they made the clients do, the mean of Y_t differs for neighbours by sum_i c_i u_(t-i),
u_s being what the client adds in round s: of at most c in length, and zero unless it took part. Its rounds being b
apart and C having b bands, at most one u counts in each row. So Y_t is a Gaussian mechanism of multiplier z / c_i, i
rounds after it took part, and an adaptive composition of Gaussians is the one of z (sum of c_i^2)^(-1/2) (Dong, Roth
and Su 2022, Corollary 3.3; Denisov et al. 2022, Theorem 2.1): each participation adds the squared length of a column,
at most 1.

**Blocks.** A new block, in which nothing is carried over, has rows of its own: a column in one does not reach into
the next, and is at most 1 long. Recovery after pruning begins one, as the weights have fewer entries then. A round
that was cut off after its reservation begins one, too. It may have been released, as the last row of its block;
repeated within that block, the row would tell twice of those who took part up to b - 1 rounds *before*, and they are
not asked to pay. In a new block it tells again only of those whom it asks: the first entry of their column in the old
block, one column in the new, so one more participation each covers them, and that is what the ledger has reserved. A
round in which nobody could be asked is not released, and its row is drawn all the same.

Legend: P entries of an update, b bands, T rounds of a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy import accounting, cohort_noise
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused

Array = NDArray[np.float64]


def coefficients(bands: int) -> Array:
    """(b,) the first column of C, of length 1: a_0 = 1, a_i = a_(i-1) (2i - 1) / (2i), the series of (1 - x)^(-1/2).

    They fall, so C^-1 is bounded however many rounds there are (Enestroem and Kakeya: no root within the unit circle).
    """
    series = np.cumprod([1.0, *((2 * i - 1) / (2 * i) for i in range(1, bands))])
    made: Array = series / np.linalg.norm(series) * (1 - 1e-12)
    return made


def turns(names: Sequence[str], bands: int, number: int, random: np.random.Generator) -> list[str]:
    """Whose turn round `number` is, in the order of `names`: `random` deals b groups, each asked every b rounds.

    random: the same in every round; it may be public.
    """
    dealt = random.permutation(len(names))
    return [names[i] for i in np.flatnonzero(dealt % bands == number % bands).tolist()]


@dataclass(frozen=True)
class BandedNoise:
    """The server's half: what each round adds to the sum, and what the next rounds have to remember of it."""

    multiplier: float
    """z."""
    bands: int
    expected: float
    """Clients / b: the fixed denominator."""

    def correlated(self, independent: Array, earlier: Array | None) -> tuple[Array, Array]:
        """((C^-1 Z)_t (P,), what the next round needs), from Z_t (P,).

        earlier: (b - 1, P), the newest first, as it was handed out by the round before; None begins a block.
        """
        band = coefficients(self.bands)
        if earlier is None:
            earlier = np.zeros((self.bands - 1, len(independent)))
        noise = (independent - band[1:] @ earlier) / band[0]
        return noise, np.concatenate([noise[None], earlier])[: self.bands - 1]

    def release(
        self, total: Array, clip: float, random: np.random.Generator, earlier: Array | None
    ) -> tuple[NDArray[np.float32], Array]:
        """(the round's update (P,), what the next round needs), from the sum (P,) of updates clipped at `clip`."""
        noise, earlier = self.correlated(random.normal(0.0, self.multiplier * clip, total.shape), earlier)
        return ((total + noise) / self.expected).astype(np.float32), earlier


def plan(clients: int, bands: int, rounds: int, epsilon: float, delta: float | None, clip: float, most: float) -> Plan:
    """The one plan that all clients share, for the ceil(rounds / b) rounds that may be a client's turn.

    Raises Refused for a delta that allows to publish a client, and when more noise than `most` would be needed.
    """
    delta, times = cohort_noise.client_delta(delta, clients), math.ceil(rounds / bands)
    if (least := accounting.epsilon({Mechanism(1.0, most): times}, delta)) > epsilon:
        longest = bands * accounting.most_steps(Mechanism(1.0, most), epsilon, delta, times)
        raise Refused(cohort_noise.unreachable(clients, rounds, epsilon, most, least, longest))
    return Plan(Mechanism(1.0, accounting.calibrate(1.0, times, epsilon, delta, most)), clip, epsilon, delta, times)
