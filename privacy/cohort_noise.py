"""Client-level DP: each client's whole update clipped, the sum noised; the client's half and the server's in one file.

Guarantee: take two fleets that differ in whether one client's update is there. The sums of their updates, each through
`clipped`, differ by at most the clipping norm C in L2, so `CohortNoise.release` on such a sum is a `Mechanism` step of
its noise multiplier. Where `sample` drew the cohort, in secret, the step is amplified by the rate (McMahan et al. 2018;
Mironov et al. 2019), and *every* client pays for it, drawn or not: who was drawn is part of the secret.
It holds for whoever sees what is released, not against the server, which sees each clipped update without noise.

Legend: P is the number of entries of an update, z the noise multiplier, m the cohort expected.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privacy import accounting
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused

if TYPE_CHECKING:  # a model is looked at and never made here
    from torch import nn

_LEAST_NOISE = 0.1
"""Where a client is drawn so rarely that delta alone would cover it without noise, there is noise all the same."""
_Vector = NDArray[np.float32]


def clipped(update: _Vector, clip: float) -> tuple[_Vector, bool]:
    """(update (P,), scaled down to an L2 norm of at most `clip`, after rounding too; whether it was that short before).

    Done by the client, and again by the server, which trusts no client. An update that is not finite counts as zero: a
    reply that failed instead would tell of the data.
    """
    if not np.isfinite(update).all():
        return np.zeros_like(update), True
    wide = update.astype(np.float64)  # in float32 the factor of a huge update would lose its digits
    norm = float(np.linalg.norm(wide))
    if norm <= clip:
        return update, True
    return (wide * (clip / norm * (1 - 1e-6))).astype(np.float32), False  # rounding adds up to 2^-24


def generator(seed: int | None) -> np.random.Generator:
    """A new generator from the operating system's entropy; from `seed` only where no guarantee is claimed."""
    return np.random.default_rng(secrets.randbits(256) if seed is None else seed)


def sample(names: Sequence[str], rate: float, random: np.random.Generator) -> list[str]:
    """A Poisson sample: each of `names`, in their order, with a coin of its own; it may be empty."""
    return [names[i] for i in np.flatnonzero(random.random(len(names)) < rate).tolist()]


@dataclass(frozen=True)
class CohortNoise:
    """The server's half: what one round adds to the sum, and where it clips next."""

    multiplier: float
    """z, of all that a round releases together."""
    expected: float
    """m: sampling rate x clients. The fixed denominator, whatever number replied: that number is a secret."""
    quantile: float = 0.5
    """The share of updates that adaptive clipping wants within the norm."""
    adapt_rate: float = 0.0
    """Its step; 0: the norm stays."""

    @property
    def vote_deviation(self) -> float:
        """Noise on the sum of votes: m / 20 (Andrew et al. 2021, section 3.1), or z where the cohort is small."""
        return max(self.expected / 20, self.multiplier)

    @property
    def update_multiplier(self) -> float:
        """Noise on the sum of updates, in units of C. A vote has sensitivity 1/2; together they are one release of z.

        z^-2 = update_multiplier^-2 + (2 x vote_deviation)^-2 (Andrew et al. 2021, theorem 1).
        """
        if not self.adapt_rate:
            return self.multiplier
        return float((self.multiplier**-2 - (2 * self.vote_deviation) ** -2) ** -0.5)

    def release(
        self,
        total: NDArray[np.float64],
        votes: float,
        clip: float,
        random: np.random.Generator,
        norm: float | None = None,
    ) -> tuple[_Vector, float]:
        """(the round's update (P,), the norm of the next round), from sums over the clients that replied.

        total: sum (P,) of updates clipped at `clip`. votes: sum of +1/2 for every client that was within it and -1/2
        for every other. norm: how long an update may be where it was changed after `clip`, as rounding does; unset:
        `clip`. The noise is that of the norm which clipped, not of the next.
        """
        return self.settled(*self.noised(total, votes, norm or clip, random), clip)

    def noised(
        self, total: NDArray[np.float64], votes: float, norm: float, random: np.random.Generator
    ) -> tuple[NDArray[np.float64], float]:
        """`total` (P,) and `votes` with the noise of a round on them: from here on everybody may know them."""
        noisy = total + random.normal(0.0, self.update_multiplier * norm, total.shape)
        return noisy, votes + random.normal(0.0, self.vote_deviation) if self.adapt_rate else 0.0

    def check(self, noisy: NDArray[np.float64], votes: float, norm: float, clients: int) -> None:
        """Raise ValueError for what `noised` makes of no sum over `clients`: 40 deviations off, or no number."""
        spread = 40 * self.update_multiplier * norm, 40 * self.vote_deviation
        if not (np.abs(noisy) <= clients * norm + spread[0]).all() or not abs(votes) <= clients / 2 + spread[1]:
            raise ValueError(f"what is no sum over {clients} clients with its noise")

    def settled(self, noisy: NDArray[np.float64], votes: float, clip: float) -> tuple[_Vector, float]:
        """(the round's update (P,), the norm of the next round), from what `noised` made.

        The norm moves geometrically towards the wanted quantile of the updates' lengths (Andrew et al. 2021,
        Algorithm 1).
        """
        if self.adapt_rate:
            within = 0.5 + votes / self.expected
            clip *= math.exp(-self.adapt_rate * (within - self.quantile))
        return (noisy / self.expected).astype(np.float32), clip


def plan(
    clients: int,
    rate: float,
    rounds: int,
    minimum: int,
    epsilon: float,
    delta: float | None,
    clip: float,
    most: float,
    fixed: bool = False,
    setting: str = "privacy.epsilon",
    floor: str = "rounds.minimum",
) -> Plan:
    """The one plan that all clients share: each of `rounds` rounds is a step of it, drawn or not.

    A draw of fewer than `minimum` clients is not released, which tells something about who was drawn: the chance that
    it happens in any round is taken off delta. `fixed`: every draw is of exactly rate x clients, so there is none.
    setting, floor: the names of what set `epsilon` and `minimum`.
    Raises Refused when that chance is above a tenth of delta, when delta is so large that it allows to publish a
    client, or when more noise than `most` would be needed.
    """
    delta = client_delta(delta, clients)
    chance = rounds * _chance_below(minimum, clients - 1, rate) if rate < 1 and not fixed else 0.0
    population = clients if fixed else 0
    if chance > delta / 10:
        raise Refused(
            f"a draw falls below {floor}={minimum} of {clients} clients with a chance of {chance:.2g} in "
            f"{rounds} rounds, more than a tenth of delta={delta:g}: raise rounds.fraction={rate:g}, "
            + ("or set rounds.minimum=0" if floor == "rounds.minimum" else "or set privacy.sampling=fixed")
        )
    left = delta - chance
    with np.errstate(over="ignore"):  # dp-accounting divides by what is left of a mass next to 0
        noise, least, longest = _calibrate(rate, rounds, epsilon, left, most, population)
    if noise is None:
        raise Refused(unreachable(clients, rounds, epsilon, most, least, longest, setting))
    return Plan(Mechanism(rate, noise, population), clip, epsilon, left, rounds, chance)


def client_delta(delta: float | None, clients: int) -> float:
    """`delta`, or the rule's; raises Refused for one that is so large that it allows to publish a client."""
    if delta is not None and delta >= 1 / clients:
        raise Refused(
            f"privacy.delta={delta:g} lets a mechanism publish one of {clients} clients outright: set it below "
            f"{1 / clients:.3g}, or unset it for {accounting.default_delta(clients):.3g}"
        )
    return delta or accounting.default_delta(clients)


def unreachable(
    clients: int,
    rounds: int,
    epsilon: float,
    most: float,
    least: float,
    longest: int,
    setting: str = "privacy.epsilon",
) -> str:
    """Why a plan is refused, and what would work: the smallest epsilon, the most rounds."""
    return (
        f"{setting}={epsilon:g} cannot be reached for {clients} clients in {rounds} rounds, recovery "
        f"included, with privacy.max_noise={most:g}: the smallest epsilon for these rounds is {least:.4g}, the "
        f"most rounds for this epsilon are {longest}"
    )


def _calibrate(
    rate: float, rounds: int, epsilon: float, delta: float, most: float, population: int
) -> tuple[float | None, float, int]:
    """(the noise multiplier, None where it is above `most`; the smallest epsilon with `most`; the most rounds)."""
    noisiest = Mechanism(rate, most, population)
    if (least := accounting.epsilon({noisiest: rounds}, delta)) > epsilon:
        return None, least, accounting.most_steps(noisiest, epsilon, delta, rounds)
    if accounting.epsilon({Mechanism(rate, _LEAST_NOISE, population): rounds}, delta) <= epsilon:
        return _LEAST_NOISE, least, rounds
    return accounting.calibrate(rate, rounds, epsilon, delta, most, population), least, rounds


def check(model: "nn.Module", combine: str, normalize: bool) -> None:
    """Refuse what cannot be a noised sum, with the reason."""
    if normalize:
        raise Refused(
            "server.normalize=true (FedNova) scales each update by its steps after it was clipped, so no norm bounds "
            "what one client adds: set server.normalize=false under privacy.unit=client"
        )
    if combine != "mean":
        raise Refused(
            f"server.combine={combine} is no sum: one client can change which others count, so noise made for a sum "
            "does not cover it: set server.combine=mean under privacy.unit=client"
        )
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            raise Refused(
                f"{name!r} is a running statistic that travels with the update: noise could make a variance negative: "
                "use nn.GroupNorm in place of batch norm, or privacy.unit=none"
            )


def _chance_below(least: int, clients: int, rate: float) -> float:
    """P(Binomial(clients, rate) < least), summed in logarithms."""
    terms = (
        math.lgamma(clients + 1)
        - math.lgamma(k + 1)
        - math.lgamma(clients - k + 1)
        + k * math.log(rate)
        + (clients - k) * math.log1p(-rate)
        for k in range(min(least, clients + 1))
    )
    return min(1.0, math.fsum(map(math.exp, terms)))
