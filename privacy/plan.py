"""Plan: one client's privacy, frozen; it hands out the mechanism that is run and the event that is accounted."""

from collections.abc import Mapping
from dataclasses import dataclass

import dp_accounting as dp

History = Mapping["Mechanism", int]
"""How often each mechanism ran on one client's data; the order does not matter."""


@dataclass(frozen=True, order=True)
class Mechanism:
    """One step of DP-SGD: a Poisson sample of the data, clipped gradients summed, Gaussian noise added."""

    sampling_rate: float
    """Chance of each example to be in the step's batch; 1: all data, every step."""
    noise_multiplier: float
    """Standard deviation of the noise in units of the clipping norm."""

    @property
    def event(self) -> dp.DpEvent:
        """What to account: add-or-remove-one adjacency (Abadi et al. 2016; Mironov et al. 2019)."""
        gaussian = dp.GaussianDpEvent(self.noise_multiplier)
        return gaussian if self.sampling_rate == 1 else dp.PoissonSampledDpEvent(self.sampling_rate, gaussian)


@dataclass(frozen=True)
class Plan:
    """Example-level privacy of one client for a whole run."""

    mechanism: Mechanism
    clip: float
    """Clipping norm of one example's gradient."""
    epsilon: float
    delta: float
    steps: int
    """The most steps that keep epsilon within budget; a step more is refused."""
