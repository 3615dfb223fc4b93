"""How far a target lies: the nearest epsilons, rounds and noise to one out of reach, and the most rounds of one within.

It asks the plans of a run (`budget.plans`), with more noise or a larger epsilon, and has no calibration of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clients.task import Hello
from privacy import accounting
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios.settings import Settings, override
from server import budget, select

_NO_BOUND = 1e5
"""A noise multiplier that no one runs with: where even it does not reach an epsilon, more noise is no way out."""
_MOST_STEPS = 1 << 20


def nearest(fleet: Mapping[str, Hello], settings: Settings) -> dict[str, Any]:
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
    enough = [max(pair) for pair in zip(costs, limits, strict=False)]  # one promise cannot stand in for the other
    return {
        "epsilon": enough[0],
        "client_epsilon": enough[1] if len(enough) > 1 else None,
        "rounds": max(0, rounds) or None,
        "noise_multiplier": needed,
        "ready": None,
    }


def _rounds_of(settings: Settings, steps: int, planned: int) -> int:
    """Rounds, without recovery, that so many steps of an account pay for; all rounds planned take `planned`."""
    total, recovery = settings.rounds.number + settings.export.recover_rounds, settings.export.recover_rounds
    if select.by_turns(settings):
        return steps * settings.privacy.bands - recovery  # a step is one turn
    return steps // (planned // total) - recovery


def _with_noise(plan: Plan, noise: float) -> Mechanism:
    """The plan's mechanism with another noise multiplier."""
    return replace(plan.mechanism, noise_multiplier=noise)


def most_rounds(fleet: Mapping[str, Hello], settings: Settings, plans: Mapping[str, Plan]) -> int:
    """The most rounds that keep the epsilons of these plans at privacy.max_noise."""
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


def _rounded_up(value: float) -> float:
    """To four significant digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return float(f"{math.ceil(value / unit) * unit:.4g}")
