"""A plan as `umbel plan --json` prints it: every key in every answer, null with a reason where it has no meaning."""

import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from privacy import certificate
from privacy.plan import Plan
from scenarios.settings import knobs
from server import planner, select, units
from server.forecast import Forecast
from server.ledger_place import ledger_path
from server.planner import Answer
from server.purses import Purse, middle, refused
from server.search_costs import Sought

Facts = dict[str, Any]
_ALWAYS = ("privacy.epsilon", "rounds.number")


def collect(reference: str, found: Answer, foreseen: Forecast | str, sought: Sought | str) -> Facts:
    """All that is known of a plan. reference: what the user calls the scenario. A forecast, a search, or why none."""
    settings, privacy = found.settings, found.settings.privacy
    plan = found.plans[found.binding] if found.plans else None
    why = None if plan else found.reason
    sizes = [client.examples for client in found.roster.values()]
    typical = found.binding if plan else max(found.roster, key=lambda name: found.roster[name].examples)
    return {
        "scenario": found.scenario.name,
        "feasible": found.feasible,
        "reason": found.reason or None,
        "nearest": _nearest(found),
        "target": {"epsilon": privacy.epsilon, "rounds": settings.rounds.number, "max_noise": privacy.max_noise},
        "unit": privacy.unit,
        "client": typical,
        "noise_multiplier": plan.mechanism.noise_multiplier if plan else None,
        "noise_multiplier_reason": why,
        "clip": privacy.clip,
        "cohort": select.cohort_size(len(sizes), settings),
        "rounds": settings.rounds.number,
        "recover_rounds": settings.export.recover_rounds,
        "most_rounds": found.most_rounds,
        "local_steps": planner.local_steps(found, typical),
        "steps": plan.steps if plan else None,
        "sampling_rate": plan.mechanism.sampling_rate if plan else None,
        "epsilon": found.epsilon,
        "epsilon_reason": why,
        "delta": plan.delta + plan.chance if plan else None,
        "whole": _whole(found),
        "whole_reason": why or (None if plan and plan.whole else "a client has one promise (privacy.unit=both: two)"),
        "tests": _tests(found),
        "tests_reason": why or (None if found.tests else "test results are not noised (evaluation.epsilon is not set)"),
        "clients": {"count": len(sizes), **{f"examples_{key}": size for key, size in middle(sizes).items()}},
        "per_size": list(_per_size(found)),
        "spent": _spent(found),
        **_curve(foreseen),
        **_search(sought),
        "command": command(reference, found) if found.feasible else None,
        "command_reason": found.reason or None,
    }


def _nearest(found: Answer) -> Facts | None:
    ready = found.nearest.get("ready")
    return {**found.nearest, "ready": units.moment(ready) if ready else None} if found.nearest else None


def command(reference: str, found: Answer) -> str:
    """The `umbel run` that this plan is of."""
    wanted, born = found.settings, {name: value for name, value, _ in knobs(found.scenario.settings)}
    words = [
        f"{name}={'' if value is None else shlex.quote(_written(value))}"
        for name, value, _ in knobs(wanted)
        if not name.startswith("run.") and (value != born[name] or name in _ALWAYS)
    ]
    flags = {"--seed": str(wanted.run.seed or ""), "--data": wanted.run.data, "--state": wanted.run.state}
    given = [word for flag, value in flags.items() if value for word in (flag, value)]
    return f'umbel run {shlex.join([reference, *given])} --set "{" ".join(words)}"'


def _written(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _whole(found: Answer) -> Facts | None:
    """The promise to each client as a whole, which all share, beside that to its examples."""
    plan = found.plans[found.binding].whole if found.plans else None
    if plan is None:
        return None
    return _promise(plan, found.whole, [owned[1] for owned in found.held.values()])


def _tests(found: Answer) -> Facts | None:
    """The promise to the client's test examples whose noise is largest; who cannot pay is not asked to evaluate."""
    if not found.plans or not found.tests:
        return None
    plan = max(found.tests.values(), key=lambda plan: plan.mechanism.noise_multiplier)
    held = list(found.examined.values())
    return {
        **_promise(plan, planner.certified(found.tests.values()), held),
        "evaluations": plan.steps,
        "refused": [_short(found, purse) for purse in held if not purse.pays],
    }


def _promise(plan: Plan, epsilon: float | None, held: Sequence[Purse]) -> Facts:
    return {
        "noise_multiplier": plan.mechanism.noise_multiplier,
        "clip": plan.clip,
        "epsilon": epsilon,
        "delta": plan.delta + plan.chance,
        "sampling_rate": plan.mechanism.sampling_rate,
        "spent": max((purse.spent for purse in held), default=None),
        "epsilon_total": max((purse.after for purse in held), default=None),
        "reason": None if held else "a run with privacy.noise_seed promises nothing and charges no ledger",
    }


def _short(found: Answer, purse: Purse) -> Facts:
    """What an account that cannot pay for every round has."""
    return {
        "client": purse.client,
        "unit": purse.account.unit,
        "dataset": purse.account.dataset,
        "examples": found.roster[purse.client].examples,
        "spent": purse.spent,
        "budget": purse.budget,
        "left": purse.left,
        "window": None
        if purse.window is None
        else {"days": purse.window.days, "epsilon": purse.window.epsilon, "left": purse.window_left},
        "ready": units.moment(purse.ready) if purse.ready else None,
        "rounds": purse.rounds,
        "of": purse.of,
    }


def _per_size(found: Answer) -> list[Facts]:
    """One row for each size of a client, smallest first; of clients of one size that differ, the costliest."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, client in found.roster.items():
        groups[client.examples].append(name)
    first = {size: names[0] for size, names in groups.items() if names[0] in found.plans}
    plans = [found.plans[name] for name in first.values()]
    costs = certificate.certify_all([({plan.mechanism: plan.steps}, plan.delta) for plan in plans])
    epsilon = dict(zip(first, (cost.epsilon for cost in costs), strict=True))
    rows = []
    for size, names in sorted(groups.items()):
        plan = found.plans.get(names[0])
        held = [found.held[name][0] for name in names if name in found.held]
        rows.append(
            {
                "examples": size,
                "clients": len(names),
                "local_steps": planner.local_steps(found, names[0]) if size else 0,
                "sampling_rate": plan.mechanism.sampling_rate if plan else None,
                "noise_multiplier": plan.mechanism.noise_multiplier if plan else None,
                "delta": plan.delta + plan.chance if plan else None,
                "epsilon": epsilon.get(size),
                "spent": max((purse.spent for purse in held), default=None),
                "epsilon_total": max((purse.after for purse in held), default=None),
            }
        )
    return rows


def _spent(found: Answer) -> Facts:
    """What the clients spent so far, what they will have spent, and who cannot pay for every round."""
    if not found.held:
        reason = found.reason or "a run with privacy.noise_seed promises nothing and charges no ledger"
        empty = dict.fromkeys(("min", "median", "max"))
        return {
            **empty,
            "epsilon_total": None,
            "refused": [],
            "affordable_epsilon": None,
            "affordable_client_epsilon": None,
            "ledger": None,
            "reason": reason,
        }
    held = [owned[0] for owned in found.held.values()]
    cannot = refused(found.held)
    most = planner.everyone_pays(found, len(held)) if cannot else None
    return {
        **middle([purse.spent for purse in held]),
        "epsilon_total": middle([purse.after for purse in held]),
        "refused": [_short(found, purse) for purse in cannot],
        **dict(zip(("affordable_epsilon", "affordable_client_epsilon"), most or (None, None), strict=True)),
        "ledger": str(ledger_path(found.scenario, found.settings, "embedded")),
        "reason": None,
    }


def _curve(foreseen: Forecast | str) -> Facts:
    if isinstance(foreseen, str):
        none = dict.fromkeys(("predicted_accuracy", "predicted_spread", "curve_rounds", "curve_cost_epsilon"))
        none |= dict.fromkeys(("curve_cost_whole_epsilon", "curve_cost_tests_epsilon"))
        return {**none, "predicted_accuracy_reason": foreseen, "curve": [], "curve_reason": foreseen}
    return {
        "predicted_accuracy": foreseen.accuracy,
        "predicted_spread": foreseen.spread,
        "predicted_accuracy_reason": foreseen.reason or None,
        "curve": [
            {"epsilon": point.epsilon, "accuracy": point.accuracy, "spread": point.spread} for point in foreseen.points
        ],
        "curve_rounds": foreseen.rounds,
        "curve_cost_epsilon": foreseen.cost,
        "curve_cost_whole_epsilon": foreseen.whole,
        "curve_cost_tests_epsilon": foreseen.tests,
        "curve_reason": foreseen.reason or None,
    }


def _search(sought: Sought | str) -> Facts:
    if isinstance(sought, str):
        return {"search": None, "search_reason": sought}
    return {
        "search": {
            "trials": sought.trials,
            "candidates": sought.count,
            "distribution": sought.distribution,
            "composition_epsilon": _finite(sought.costs[0].composition),
            "repeat_and_select_epsilon": _finite(sought.costs[0].selection),
            "accounts": [
                {
                    "unit": one.unit,
                    "dataset": one.dataset,
                    "candidates": one.candidates,
                    "composition_epsilon": _finite(one.composition),
                    "repeat_and_select_epsilon": _finite(one.selection),
                    "reason": one.reason or None,
                }
                for one in sought.costs
            ],
        },
        "search_reason": None,
    }


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
