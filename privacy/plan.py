"""Plan: one client's privacy, frozen; it hands out the mechanism that is run and the event that is accounted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import dp_accounting as dp

History = Mapping["Mechanism", int]
"""How often each mechanism ran on one client's data; the order does not matter."""


@dataclass(frozen=True, order=True)
class Mechanism:
    """A sample, clipped vectors summed, Gaussian noise added.

    A step of DP-SGD over examples and their gradients, a round over clients and their updates, or one client's update.
    """

    sampling_rate: float
    """Chance of each example (client) to be in the sample; 1: all of them, every step."""
    noise_multiplier: float
    """Standard deviation of the noise in units of the clipping norm C; under local DP of the sensitivity 2C."""
    population: int = 0
    """0: a Poisson sample, add or remove one. n: exactly rate x n of n, replace one (privacy/fixed_size.py)."""

    def __post_init__(self) -> None:
        if self.population and not (0 < self.sampling_rate < 1 and self.population > 1):
            raise ValueError(f"a fixed number cannot be {self.sampling_rate:g} of {self.population}")

    @property
    def event(self) -> "dp.DpEvent":
        """What to account. Add or remove one (Abadi et al. 2016; Mironov et al. 2019); with a population replace one,
        where one vector changes the sum by up to 2C, so noise of z C is z / 2 sensitivities (Wang et al. 2019).
        """
        import dp_accounting as dp  # it takes a second to load, and few who import a plan account for it

        if self.population:
            drawn = round(self.sampling_rate * self.population)
            noise = dp.GaussianDpEvent(self.noise_multiplier / 2)
            return dp.SampledWithoutReplacementDpEvent(self.population, drawn, noise)
        gaussian = dp.GaussianDpEvent(self.noise_multiplier)
        return gaussian if self.sampling_rate == 1 else dp.PoissonSampledDpEvent(self.sampling_rate, gaussian)

    @property
    def figures(self) -> tuple[float, ...]:
        """What identifies it on paper: Mechanism(*figures) is this one. Without a population two numbers, as ever."""
        both = self.sampling_rate, self.noise_multiplier
        return (*both, self.population) if self.population else both


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

    @property
    def parts(self) -> tuple["Plan", ...]:
        """Each promise by itself, in the order of the client's accounts."""
        return (self, self.whole) if self.whole else (self,)
