"""Canaries in ghost coordinates: what is audited, and what all of an audit's federations of canaries share.

A ghost coordinate is one more weight that a single canary moves, as far as its clipping norm allows and in turn up and
down: noise that repeats itself from round to round would cancel. Legend: k is the number of canaries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from privacy.audit import Included, Scores
from privacy.plan import Plan
from scenarios import Federation, Scenario
from scenarios.seeds import derive
from scenarios.settings import Settings
from server.references import NoJournal

PUSH = 20.0
"""How many clipping norms a canary would like to move its coordinate: a clip ten times too wide must show."""
POST = (
    "server.step=sgd server.rate= server.beta1= server.beta2= server.tau= server.combine=mean server.normalize=false "
    "server.weighting=uniform rounds.average=1 rounds.minimum=0 local.momentum=0 local.proximal=0 "
    "local.weight_decay=0 local.scaffold=false fleet.profile=equal fleet.clock=wall fleet.deadline=0 "
    "protect.max_clients=1000000"
)
"""What is done with an update after its noise cannot add to epsilon, nor can devices: both are left out.

Sums of integers have room for any number of canaries: it makes them wider, and no value another."""

Tick = Callable[[], None]


@dataclass(frozen=True)
class Setup:
    """What is audited: a scenario's settings, with the plans that its claim rests on."""

    scenario: Scenario
    settings: Settings
    sizes: Mapping[str, int]
    """Training examples of each client, by name."""
    plans: Mapping[str, Plan]
    """By client; empty without DP."""
    data: Federation | None
    """None: the data are elsewhere, and the canaries stand alone."""
    states: Path
    """A folder for client states."""
    seed: int
    """Of what the attacker draws."""

    @property
    def rounds(self) -> int:
        """All that the plans allow: training and recovery."""
        return self.settings.rounds.number + self.settings.export.recover_rounds


@dataclass(frozen=True)
class Run:
    """The canaries' scores (k,), and in words what was real and what was left out."""

    scores: Scores
    real: str


Probe = Callable[[Setup, str, Included, Tick], Run]
"""(what is audited, the client whose plan it is, which canaries are in, called once a round) -> what they left."""


class Unrecorded(NoJournal):
    """Canaries are nobody's data: nothing is charged to a ledger, nothing is kept."""

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        return {}


def sign(number: int) -> float:
    """Up in odd rounds, down in even ones."""
    return 1.0 if number % 2 else -1.0


def seeded(settings: Settings, part: int) -> str:
    """Seeded noise must differ between federations of one audit; noise of a real run always does."""
    seed = settings.privacy.noise_seed
    return "" if seed is None else f"privacy.noise_seed={derive(seed, 'canaries', part)}"
