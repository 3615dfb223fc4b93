"""Plan: one client's privacy, frozen; it hands out the mechanism that is run and the event that is accounted."""

from collections.abc import Mapping
from dataclasses import dataclass

import dp_accounting as dp

History = Mapping["Mechanism", int]
"""How often each mechanism ran on one client's data; the order does not matter."""


@dataclass(frozen=True, order=True)
class Mechanism:
    """A Poisson sample, clipped vectors summed, Gaussian noise added.

    A step of DP-SGD over examples and their gradients, or a round over clients and their updates.
    """

    sampling_rate: float
    """Chance of each example (client) to be in the sample; 1: all of them, every step."""
    noise_multiplier: float
    """Standard deviation of the noise in units of the clipping norm."""

    @property
    def event(self) -> dp.DpEvent:
        """What to account: add-or-remove-one adjacency (Abadi et al. 2016; Mironov et al. 2019)."""
        gaussian = dp.GaussianDpEvent(self.noise_multiplier)
        return gaussian if self.sampling_rate == 1 else dp.PoissonSampledDpEvent(self.sampling_rate, gaussian)


@dataclass(frozen=True)
class Plan:
    """Privacy of one client for a whole run: of its examples, or of the client as a whole."""

    mechanism: Mechanism
    clip: float
    """Clipping norm of one example's gradient, or of a client's whole update."""
    epsilon: float
    delta: float
    """What the steps are accounted at."""
    steps: int
    """The most steps that keep epsilon within budget; a step more is refused. Under client-level DP: rounds."""
    chance: float = 0.0
    """Delta spent beside the steps: the chance that a draw of clients falls short (privacy/cohort_noise.py)."""
    whole: "Plan | None" = None
    """Where the client has a promise for each example and one for itself: the second, which all clients share."""
