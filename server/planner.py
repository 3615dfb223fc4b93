"""The planner: which noise reaches a target, what it costs each client, and the nearest target to one out of reach.

It asks the code that a run goes through (settings, `budget.plans`, the accountants, the ledger) and computes no noise
of its own, so a run with the settings of an answer gets the same plans.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clients import steps
from clients.device import draw
from clients.task import Device, Hello
from clients.training import Node
from privacy import certificate
from privacy.plan import Plan
from privacy.refused import Refused
from scenarios import Scenario
from scenarios.settings import Settings, override
from server import accounts, budget, engine, purses, reach, select, units
from server import run as job
from server.costs import round_costs, test_costs
from server.ledger_place import ledger_path
from server.purses import Held, Purse


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
    whole: float | None = None
    """The same of the clients as a whole, where they have a promise of their own."""
    tests: Mapping[str, Plan] = field(default_factory=dict)
    """Of every client's test examples, where what is said of them is noised."""
    held: Held = field(default_factory=dict)
    """What each client's accounts pay; empty where a run charges no ledger."""
    examined: Mapping[str, Purse] = field(default_factory=dict)
    """What the accounts of their test examples pay; who cannot is not asked to evaluate, and goes on training."""
    reason: str = ""
    """Why it is not feasible; empty where it is."""
    nearest: Mapping[str, Any] = field(default_factory=dict)
    """{epsilon, client_epsilon, rounds, noise_multiplier, ready}: each alone makes it feasible, but for the epsilons of
    privacy.unit=both, which go together. noise_multiplier: as privacy.max_noise. ready: seconds since 1970 from which
    enough windows of time have passed. None: no value of it does."""
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
    fleet = roster(scenario, settings)
    job.enough(fleet, settings)
    if settings.local.engine == "cohort":
        engine.check(Node(scenario, settings, scenario.data(settings), Path()), fleet)
    try:
        plans = budget.plans(fleet, settings)
    except Refused:
        nearest = reach.nearest(fleet, settings)  # raises it again where the target is not what is wrong
        pair = nearest["epsilon"], nearest["client_epsilon"]
        if open_epsilon and settings.privacy.client_epsilon in (None, pair[1]):
            return answer(scenario, at(settings, *pair))
        if open_rounds and nearest["rounds"]:
            return answer(scenario, override(settings, f"rounds.number={nearest['rounds']}"))
        return Answer(scenario, settings, fleet, {}, None, reason=_out_of_reach(settings, nearest), nearest=nearest)
    found = Answer(
        scenario,
        settings,
        fleet,
        plans,
        certified(plans.values()),
        certified(plan.whole for plan in plans.values() if plan.whole),
        budget.test_plans(fleet, settings),
        most_rounds=reach.most_rounds(fleet, settings, plans),
    )
    if settings.privacy.noise_seed is not None:
        return found  # promises nothing, so that nothing is charged
    found = hold(found)
    able, needed = len(purses.able(found.held)), max(1, settings.rounds.minimum)
    if able >= needed:
        return found
    most = everyone_pays(found, len(found.held)) or everyone_pays(found, needed)
    if open_epsilon and most and settings.privacy.client_epsilon in (None, most[1]):
        return answer(scenario, at(settings, *most))
    # fewer rounds of one epsilon cost the same
    nearest = dict.fromkeys(("rounds", "noise_multiplier")) | {"ready": _ready(found, needed)}
    nearest = dict(zip(("epsilon", "client_epsilon"), most or (None, None), strict=True)) | nearest
    return replace(found, reason=_out_of_money(found, able, needed, nearest), nearest=nearest)


def at(settings: Settings, epsilon: float, client_epsilon: float | None) -> Settings:
    """The settings with other epsilons; None leaves that of a client as a whole as it is."""
    second = "" if client_epsilon is None else f" privacy.client_epsilon={client_epsilon!r}"
    return override(settings, f"privacy.epsilon={epsilon!r}{second}")


def certified(plans: Iterable[Plan]) -> float | None:
    """The largest epsilon of these plans, as a report certifies it; None of no plans."""
    proofs = certificate.certify_all([({plan.mechanism: plan.steps}, plan.delta) for plan in plans])
    return max((proof.epsilon for proof in proofs), default=None)


def roster(scenario: Scenario, settings: Settings) -> dict[str, Hello]:
    """The clients of a simulated fleet by name, from the sizes of their data alone."""
    simulated, fleet = settings.fleet.clock == "simulated", settings.fleet
    return {
        name: Hello(name, size, "", draw(fleet.profile, name, settings.run.seed) if simulated else Device())
        for name, size in sorted(scenario.data(settings).sizes.items())
    }


def hold(found: Answer) -> Answer:
    """With every client's purses in the ledger that a run of this plan would charge."""
    scenario, settings = found.scenario, found.settings
    path = ledger_path(scenario, settings, "embedded")
    asks = round_costs(scenario, settings, found.roster, found.plans)
    tests = test_costs(scenario, found.tests)
    charges = [pair for name, paid in asks.items() for pair in zip(paid, found.plans[name].parts, strict=True)]
    charges += [(cost, found.tests[name]) for name, cost in tests.items()]
    known = purses.purses(path, settings.privacy.budget, accounts.window(settings), charges)
    held = {name: tuple(known[cost.account] for cost in paid) for name, paid in asks.items()}
    return replace(found, held=held, examined={name: known[cost.account] for name, cost in tests.items()})


def short(scenario: Scenario, settings: Settings) -> list[Purse]:
    """The accounts, those of test examples too, that could not pay now for all of a run; none without a ledger."""
    if settings.privacy.noise_seed is not None:
        return []
    fleet = roster(scenario, settings)
    tests = budget.test_plans(fleet, settings)
    found = hold(Answer(scenario, settings, fleet, budget.plans(fleet, settings), None, tests=tests))
    return purses.refused({**found.held, "": tuple(found.examined.values())})


def everyone_pays(found: Answer, needed: int) -> tuple[float, float | None] | None:
    """The largest (privacy.epsilon, privacy.client_epsilon), to three digits and at most those of the plan, at which
    `needed` clients pay for all rounds. The second is None but under privacy.unit=both; None: there are none."""
    for _ in range(5):
        richest = sorted(found.held.values(), key=_wealth, reverse=True)[:needed]
        pays: list[float | None] = []
        for kind in zip(*richest, strict=True):
            purse = min(kind, key=lambda purse: _wealth([purse]))
            part = found.plans[purse.client].parts[len(pays)]
            pays.append(purses.affordable(purse, part, found.settings.privacy.max_noise))
        if len(richest) < needed or None in pays:
            return None
        pair = pays[0] or 0.0, pays[1] if len(pays) > 1 else None
        settings = at(found.settings, *pair)
        try:
            found = hold(replace(found, settings=settings, plans=budget.plans(found.roster, settings)))
        except Refused:
            return None
        if len(purses.able(found.held)) >= needed:
            return pair
    return None


def _wealth(owned: Sequence[Purse]) -> tuple[int, float, str]:
    """How far a client's poorest account reaches; by name where two reach as far."""
    return *min((purse.rounds, purse.least_left) for purse in owned), owned[0].client


def _ready(found: Answer, needed: int) -> float | None:
    """When `needed` clients can pay for all rounds, as their windows pass and nothing else is spent; None: never."""
    waits = [[purse.ready for purse in owned] for owned in found.held.values()]
    known = sorted(max(one for one in wait if one is not None) for wait in waits if None not in wait)
    return known[needed - 1] if len(known) >= needed else None


def _out_of_reach(settings: Settings, nearest: Mapping[str, Any]) -> str:
    privacy, recovery = settings.privacy, settings.export.recover_rounds
    ways = [f"{_epsilons(nearest)} for these rounds"]
    if nearest["rounds"]:
        ways.append(f"{nearest['rounds']} rounds for this epsilon")
    if nearest["noise_multiplier"]:
        ways.append(f"privacy.max_noise={nearest['noise_multiplier']:g} for both")
    more = f" (and {recovery} of recovery)" if recovery else ""
    second = f" with privacy.client_epsilon={privacy.client_epsilon:g}" if privacy.client_epsilon else ""
    return (
        f"epsilon {privacy.epsilon:g}{second} cannot be reached in {settings.rounds.number} rounds{more} with "
        f"privacy.max_noise={privacy.max_noise:g}: the nearest is {', or '.join(ways)}"
    )


def _epsilons(nearest: Mapping[str, Any]) -> str:
    second = nearest["client_epsilon"]
    return f"epsilon {nearest['epsilon']:g}" + (f" with privacy.client_epsilon={second:g}" if second else "")


def _out_of_money(found: Answer, able: int, needed: int, nearest: Mapping[str, Any]) -> str:
    poor = purses.refused(found.held)
    named = [f"{purse.client}{whose(found, purse)} {purse.rounds} of them" for purse in poor[:3]]
    more = f" and {len(poor) - 3} more" if len(poor) > 3 else ""
    ways = [_epsilons(nearest)] if nearest["epsilon"] else []
    if nearest["ready"]:  # a window of time passes
        ways.append(f"the same from {units.moment(nearest['ready'])} on")
    way = f"the nearest is {', or '.join(ways)}" if ways else "what they have left pays for no such run"
    rounds = f"{poor[0].of} of its turns" if select.by_turns(found.settings) else f"{found.total} rounds"
    second = found.settings.privacy.client_epsilon
    also = f" with privacy.client_epsilon={second:g}" if second else ""
    return (
        f"{able} of {len(found.held)} clients can pay for all {rounds} of epsilon "
        f"{found.settings.privacy.epsilon:g}{also}, {needed} are needed ({', '.join(named)}{more}): {way}"
    )


def whose(found: Answer, purse: Purse) -> str:
    """Which account of a client a purse is, where it has two: " (client, made)"."""
    return f" ({purse.account.unit}, {purse.account.dataset})" if found.settings.privacy.unit == "both" else ""


def local_steps(found: Answer, name: str) -> int:
    """Steps of one round of a client."""
    private = found.settings.privacy.by_example
    return steps.local_steps(found.settings.local, found.roster[name].examples, private)
