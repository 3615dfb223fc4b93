"""The planner: which noise reaches a target, what it costs each client, and the nearest target to one out of reach.

It asks the code that a run goes through (settings, `budget.plans`, the accountants, the ledger) and computes no noise
of its own, so a run with the settings of an answer gets the same plans.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from clients.device import draw
from clients.task import Device, Hello
from privacy import accounting, certificate
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios import Scenario
from scenarios.settings import Settings, override
from server import accounts, budget, purses, select
from server import run as job
from server.purses import Purse

_NO_BOUND = 1e5
"""A noise multiplier that no one runs with: where even it does not reach an epsilon, more noise is no way out."""
_MOST_STEPS = 1 << 20


@dataclass(frozen=True)
class Answer:
    """What a plan comes to. Where it is not feasible there is a reason, and `nearest` says what would be."""

    scenario: Scenario
    settings: Settings
    roster: Mapping[str, Hello]
    plans: Mapping[str, Plan]
    """Of every client, as a run makes them; empty where the noise is out of reach."""
    epsilon: float | None
    """What the worst client of the run will have spent, as its report certifies it."""
    held: Mapping[str, Purse] = field(default_factory=dict)
    """What each client's account pays; empty where a run charges no ledger."""
    reason: str = ""
    """Why it is not feasible; empty where it is."""
    nearest: Mapping[str, Any] = field(default_factory=dict)
    """{epsilon, rounds, noise_multiplier}: each alone makes it feasible (the last as privacy.max_noise); None: no value
    of it does."""
    most_rounds: int | None = None
    """The most rounds with this epsilon at privacy.max_noise; beyond a million steps nobody looks."""

    @property
    def feasible(self) -> bool:
        return not self.reason

    @property
    def total(self) -> int:
        """Rounds, recovery included."""
        return self.settings.rounds.number + self.settings.export.recover_rounds

    @property
    def binding(self) -> str:
        """The client whose plan needs the most noise."""
        return max(self.plans, key=lambda name: (self.plans[name].mechanism.noise_multiplier, name))


def answer(scenario: Scenario, settings: Settings, open_epsilon: bool = False, open_rounds: bool = False) -> Answer:
    """The plan of a run of `scenario` with `settings`; what is left open gives way where the rest is out of reach.

    open_epsilon, open_rounds: privacy.epsilon (rounds.number) was not asked for. Nothing is trained, and of the data
    only its sizes are looked at. Raises Refused for what a run would refuse but for its target: settings, ledger.
    """
    if settings.privacy.unit == "none":
        raise Refused(
            f"{scenario.name} has no privacy to plan (privacy.unit=none): --set privacy.unit=example protects single "
            "examples, --set privacy.unit=client whole clients"
        )
    job.check(scenario, settings)
    if settings.privacy.unit == "both" or select.by_turns(settings):
        raise Refused(
            "a plan knows one promise, of which every round costs the same: plan privacy.unit=example and =client one "
            "after the other in place of both, and leave privacy.bands out"
        )
    fleet = roster(scenario, settings)
    job.enough(fleet, settings)
    try:
        plans = budget.plans(fleet, settings)
    except Refused:
        nearest = _nearest(fleet, settings)  # raises it again where the target is not what is wrong
        if open_epsilon and nearest["epsilon"] is not None:
            return answer(scenario, override(settings, f"privacy.epsilon={nearest['epsilon']!r}"))
        if open_rounds and nearest["rounds"]:
            return answer(scenario, override(settings, f"rounds.number={nearest['rounds']}"))
        return Answer(scenario, settings, fleet, {}, None, reason=_out_of_reach(settings, nearest), nearest=nearest)
    histories = [({plan.mechanism: plan.steps}, plan.delta) for plan in plans.values()]
    epsilon = max(one.epsilon for one in certificate.certify_all(histories))
    found = Answer(scenario, settings, fleet, plans, epsilon, most_rounds=_most_rounds(fleet, settings, plans))
    if settings.privacy.noise_seed is not None:
        return found  # promises nothing, so that nothing is charged
    found = replace(found, held=hold(found))
    able, needed = sum(purse.pays for purse in found.held.values()), max(1, settings.rounds.minimum)
    if able >= needed:
        return found
    most = everyone_pays(found, len(found.held)) or everyone_pays(found, needed)
    if open_epsilon and most:
        return answer(scenario, override(settings, f"privacy.epsilon={most!r}"))
    nearest = {"epsilon": most, "rounds": None, "noise_multiplier": None}  # fewer rounds of one epsilon cost the same
    return replace(found, reason=_out_of_money(found, able, needed, most), nearest=nearest)


def roster(scenario: Scenario, settings: Settings) -> dict[str, Hello]:
    """The clients of a simulated fleet by name, from the sizes of their data alone."""
    simulated, fleet = settings.fleet.clock == "simulated", settings.fleet
    return {
        name: Hello(name, size, "", draw(fleet.profile, name, settings.run.seed) if simulated else Device())
        for name, size in sorted(scenario.data(settings).sizes.items())
    }


def hold(found: Answer) -> dict[str, Purse]:
    """Every client's purse in the ledger that a run of this plan would charge."""
    path = accounts.ledger_path(found.scenario, found.settings, "embedded")
    return purses.purses(found.scenario, found.settings, path, found.plans, found.total)


def everyone_pays(found: Answer, needed: int) -> float | None:
    """The largest epsilon, to three digits, at which `needed` clients pay for all rounds; None where there is none."""
    settings, plans, held = found.settings, found.plans, found.held
    for _ in range(5):
        richest = sorted(held.values(), key=lambda purse: (-purse.rounds, -(purse.left or math.inf), purse.client))
        poorest = richest[needed - 1]
        epsilon = purses.affordable(poorest, plans[poorest.client], settings.privacy.max_noise)
        if epsilon is None:
            return None
        settings = override(settings, f"privacy.epsilon={epsilon!r}")
        try:
            plans = budget.plans(found.roster, settings)
        except Refused:
            return None
        held = hold(replace(found, settings=settings, plans=plans))
        if sum(purse.pays for purse in held.values()) >= needed:
            return epsilon
    return None


def _nearest(fleet: Mapping[str, Hello], settings: Settings) -> dict[str, Any]:
    """{epsilon, rounds, noise_multiplier} of the settings that come nearest. Raises Refused where none would work."""
    privacy, recovery = settings.privacy, settings.export.recover_rounds
    total, needed = settings.rounds.number + recovery, None
    loose = override(settings, f"privacy.max_noise={_NO_BOUND!r}")
    plans: Mapping[str, Plan] = {}
    for scale in (1, 1e2, 1e4, 1e6):
        try:
            plans = budget.plans(fleet, override(loose, f"privacy.epsilon={privacy.epsilon * scale!r}"))
        except Refused:
            if scale == 1e6:
                raise
            continue
        if scale == 1:
            needed = _rounded_up(max(plan.mechanism.noise_multiplier for plan in plans.values()))
        break
    distinct = {(_with_noise(plan, privacy.max_noise), plan.steps, plan.delta): plan for plan in plans.values()}
    costs = {key: accounting.epsilon({key[0]: key[1]}, key[2]) for key in distinct}
    worst = max(costs, key=lambda key: costs[key])
    steps = accounting.most_steps(worst[0], privacy.epsilon, worst[2], worst[1])
    rounds = steps // (worst[1] // total) - recovery
    while rounds > 0 and not _works(fleet, override(settings, f"rounds.number={rounds}")):
        rounds -= max(1, rounds // 20)  # another client binds at fewer rounds
    return {"epsilon": _rounded_up(costs[worst]), "rounds": max(0, rounds) or None, "noise_multiplier": needed}


def _with_noise(plan: Plan, noise: float) -> Mechanism:
    """The plan's mechanism with another noise multiplier."""
    return replace(plan.mechanism, noise_multiplier=noise)


def _most_rounds(fleet: Mapping[str, Hello], settings: Settings, plans: Mapping[str, Plan]) -> int:
    total = settings.rounds.number + settings.export.recover_rounds
    plan = max(plans.values(), key=lambda plan: plan.mechanism.noise_multiplier)
    loud = _with_noise(plan, settings.privacy.max_noise)
    steps = accounting.most_steps(loud, settings.privacy.epsilon, plan.delta, max(_MOST_STEPS, plan.steps))
    low, high = settings.rounds.number, steps // (plan.steps // total) - settings.export.recover_rounds
    while low < high and not _works(fleet, override(settings, f"rounds.number={high}")):
        high = max(low, high - max(1, high // 20))
    return max(low, high)


def _works(fleet: Mapping[str, Hello], settings: Settings) -> bool:
    try:
        budget.plans(fleet, settings)
    except Refused:
        return False
    return True


def _out_of_reach(settings: Settings, nearest: Mapping[str, Any]) -> str:
    privacy, recovery = settings.privacy, settings.export.recover_rounds
    ways = [f"epsilon {nearest['epsilon']:g} for these rounds"]
    if nearest["rounds"]:
        ways.append(f"{nearest['rounds']} rounds for this epsilon")
    if nearest["noise_multiplier"]:
        ways.append(f"privacy.max_noise={nearest['noise_multiplier']:g} for both")
    more = f" (and {recovery} of recovery)" if recovery else ""
    return (
        f"epsilon {privacy.epsilon:g} cannot be reached in {settings.rounds.number} rounds{more} with "
        f"privacy.max_noise={privacy.max_noise:g}: the nearest is {', or '.join(ways)}"
    )


def _out_of_money(found: Answer, able: int, needed: int, most: float | None) -> str:
    poor = purses.refused(found.held)
    names = ", ".join(f"{purse.client} {purse.rounds} of them" for purse in poor[:3])
    more = f" and {len(poor) - 3} more" if len(poor) > 3 else ""
    way = f"the nearest is epsilon {most:g}" if most else "what they have left pays for no such run"
    return (
        f"{able} of {len(found.held)} clients can pay for all {found.total} rounds of epsilon "
        f"{found.settings.privacy.epsilon:g}, {needed} are needed ({names}{more}): {way}"
    )


def _rounded_up(value: float) -> float:
    """To four significant digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return float(f"{math.ceil(value / unit) * unit:.4g}")


def local_steps(found: Answer, name: str) -> int:
    """Steps of one round of a client."""
    private = found.settings.privacy.by_example
    return select.local_steps(found.settings.local, found.roster[name].examples, private)
