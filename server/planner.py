"""The planner: which noise reaches a target, what it costs each client, and the nearest target to one out of reach.

It asks the code that a run goes through (settings, `budget.plans`, the accountants, the ledger) and computes no noise
of its own, so a run with the settings of an answer gets the same plans.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
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
from server.purses import Held, Purse

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
    """{epsilon, client_epsilon, rounds, noise_multiplier}: each alone makes it feasible, the last as privacy.max_noise;
    None: no value of it does."""
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
    try:
        plans = budget.plans(fleet, settings)
    except Refused:
        nearest = _nearest(fleet, settings)  # raises it again where the target is not what is wrong
        if open_epsilon and nearest["epsilon"] is not None:
            return answer(scenario, override(settings, f"privacy.epsilon={nearest['epsilon']!r}"))
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
        most_rounds=_most_rounds(fleet, settings, plans),
    )
    if settings.privacy.noise_seed is not None:
        return found  # promises nothing, so that nothing is charged
    found = hold(found)
    able, needed = len(purses.able(found.held)), max(1, settings.rounds.minimum)
    if able >= needed:
        return found
    most = everyone_pays(found, len(found.held)) or everyone_pays(found, needed)
    if open_epsilon and most:
        return answer(scenario, override(settings, f"privacy.epsilon={most!r}"))
    # fewer rounds of one epsilon cost the same
    nearest = {"epsilon": most, "client_epsilon": None, "rounds": None, "noise_multiplier": None}
    return replace(found, reason=_out_of_money(found, able, needed, most), nearest=nearest)


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
    path = accounts.ledger_path(scenario, settings, "embedded")
    asks = accounts.costs(scenario, settings, found.roster, found.plans)
    tests = accounts.test_costs(scenario, found.tests)
    charges = [pair for name, paid in asks.items() for pair in zip(paid, found.plans[name].parts, strict=True)]
    charges += [(cost, found.tests[name]) for name, cost in tests.items()]
    known = purses.purses(path, settings.privacy.budget, charges)
    held = {name: tuple(known[cost.account] for cost in paid) for name, paid in asks.items()}
    return replace(found, held=held, examined={name: known[cost.account] for name, cost in tests.items()})


def everyone_pays(found: Answer, needed: int) -> float | None:
    """The largest privacy.epsilon, to three digits, at which `needed` clients pay for all rounds; None: there is none.

    Where privacy.client_epsilon is set, a client as a whole that cannot pay is beyond the reach of privacy.epsilon.
    """
    settings = found.settings
    governed = 1 if settings.privacy.client_epsilon else 2
    for _ in range(5):
        able = [owned for owned in found.held.values() if all(purse.pays for purse in owned[governed:])]
        if len(able) < needed:
            return None
        poorest = sorted((_wealth(owned[:governed]) for owned in able), reverse=True)[needed - 1][-1]
        parts = found.plans[poorest].parts[:governed]
        pays = [
            purses.affordable(purse, part, settings.privacy.max_noise)
            for purse, part in zip(found.held[poorest], parts, strict=False)
        ]
        if None in pays:
            return None
        epsilon = min(one for one in pays if one is not None)
        settings = override(settings, f"privacy.epsilon={epsilon!r}")
        try:
            found = hold(replace(found, settings=settings, plans=budget.plans(found.roster, settings)))
        except Refused:
            return None
        if len(purses.able(found.held)) >= needed:
            return epsilon
    return None


def _wealth(owned: Sequence[Purse]) -> tuple[int, float, str]:
    """How far a client's poorest account reaches; by name where two reach as far."""
    reach = min((purse.rounds, math.inf if purse.left is None else purse.left) for purse in owned)
    return *reach, owned[0].client


def _nearest(fleet: Mapping[str, Hello], settings: Settings) -> dict[str, Any]:
    """What Answer.nearest says of the settings that come nearest. Raises Refused where none would work."""
    privacy, needed = settings.privacy, None
    loose = override(settings, f"privacy.max_noise={_NO_BOUND!r}")
    plans: Mapping[str, Plan] = {}
    for scale in (1, 1e2, 1e4, 1e6):
        second = f" privacy.client_epsilon={privacy.client_epsilon * scale!r}" if privacy.client_epsilon else ""
        try:
            plans = budget.plans(fleet, override(loose, f"privacy.epsilon={privacy.epsilon * scale!r}{second}"))
        except Refused:
            if scale == 1e6:
                raise
            continue
        if scale == 1:
            needed = _rounded_up(max(p.mechanism.noise_multiplier for plan in plans.values() for p in plan.parts))
        break
    limits = privacy.epsilon, privacy.client_epsilon or privacy.epsilon
    costs, reach = [], []
    for kind, limit in zip(zip(*(plan.parts for plan in plans.values()), strict=True), limits, strict=False):
        distinct = {(_with_noise(plan, privacy.max_noise), plan.steps, plan.delta) for plan in kind}
        known = {key: accounting.epsilon({key[0]: key[1]}, key[2]) for key in distinct}
        worst = max(known, key=lambda key: (known[key], key))
        costs.append(_rounded_up(known[worst]))
        steps = accounting.most_steps(worst[0], limit, worst[2], worst[1])
        reach.append(_rounds_of(settings, steps, worst[1]))
    rounds = min(reach)
    while rounds > 0 and not _works(fleet, override(settings, f"rounds.number={rounds}")):
        rounds -= max(1, rounds // 20)  # another client binds at fewer rounds
    ways: dict[str, Any] = {"epsilon": max(costs), "client_epsilon": None}
    if len(costs) == 2:  # each promise has its epsilon, and one cannot stand in for the other
        ways["client_epsilon"] = costs[1] if costs[0] <= limits[0] else None
        if privacy.client_epsilon:
            ways["epsilon"] = costs[0] if costs[1] <= limits[1] else None
    return {**ways, "rounds": max(0, rounds) or None, "noise_multiplier": needed}


def _rounds_of(settings: Settings, steps: int, planned: int) -> int:
    """Rounds, without recovery, that so many steps of an account pay for; all rounds planned take `planned`."""
    total, recovery = settings.rounds.number + settings.export.recover_rounds, settings.export.recover_rounds
    if select.by_turns(settings):
        return steps * settings.privacy.bands - recovery  # a step is one turn
    return steps // (planned // total) - recovery


def _with_noise(plan: Plan, noise: float) -> Mechanism:
    """The plan's mechanism with another noise multiplier."""
    return replace(plan.mechanism, noise_multiplier=noise)


def _most_rounds(fleet: Mapping[str, Hello], settings: Settings, plans: Mapping[str, Plan]) -> int:
    reach = []
    for kind in zip(*(plan.parts for plan in plans.values()), strict=True):
        plan = max(kind, key=lambda plan: plan.mechanism.noise_multiplier)
        loud = _with_noise(plan, settings.privacy.max_noise)
        steps = accounting.most_steps(loud, plan.epsilon, plan.delta, max(_MOST_STEPS, plan.steps))
        reach.append(_rounds_of(settings, steps, plan.steps))
    low, high = settings.rounds.number, min(reach)
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
    named = {"epsilon": "epsilon", "client_epsilon": "privacy.client_epsilon"}
    ways = [f"{what} {nearest[key]:g} for these rounds" for key, what in named.items() if nearest[key]]
    if nearest["rounds"]:
        ways.append(f"{nearest['rounds']} rounds for this epsilon")
    if nearest["noise_multiplier"]:
        ways.append(f"privacy.max_noise={nearest['noise_multiplier']:g} for both")
    more = f" (and {recovery} of recovery)" if recovery else ""
    second = f" with privacy.client_epsilon={privacy.client_epsilon:g}" if privacy.client_epsilon else ""
    return (
        f"epsilon {privacy.epsilon:g}{second} cannot be reached in {settings.rounds.number} rounds{more} with "
        f"privacy.max_noise={privacy.max_noise:g}: the nearest is {', or '.join(ways) or 'none of one setting alone'}"
    )


def _out_of_money(found: Answer, able: int, needed: int, most: float | None) -> str:
    poor = purses.refused(found.held)
    named = [f"{purse.client}{whose(found, purse)} {purse.rounds} of them" for purse in poor[:3]]
    more = f" and {len(poor) - 3} more" if len(poor) > 3 else ""
    way = f"the nearest is epsilon {most:g}" if most else "what they have left pays for no such run"
    rounds = f"{poor[0].of} of its turns" if select.by_turns(found.settings) else f"{found.total} rounds"
    return (
        f"{able} of {len(found.held)} clients can pay for all {rounds} of epsilon "
        f"{found.settings.privacy.epsilon:g}, {needed} are needed ({', '.join(named)}{more}): {way}"
    )


def whose(found: Answer, purse: Purse) -> str:
    """Which account of a client a purse is, where it has two: " (client, made)"."""
    return f" ({purse.account.unit}, {purse.account.dataset})" if found.settings.privacy.unit == "both" else ""


def _rounded_up(value: float) -> float:
    """To four significant digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return float(f"{math.ceil(value / unit) * unit:.4g}")


def local_steps(found: Answer, name: str) -> int:
    """Steps of one round of a client."""
    private = found.settings.privacy.by_example
    return select.local_steps(found.settings.local, found.roster[name].examples, private)
