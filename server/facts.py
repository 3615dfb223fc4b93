"""report.json: everything a run found out, as one plain dict; what scripts read and report.html is drawn from."""

import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from clients.task import Hello
from clients.training import Node
from privacy import certificate, dp_sgd
from privacy.plan import Plan
from privacy.promise import promise
from scenarios.settings import Settings, knobs
from server import select
from server.accounts import Accounts
from server.state import Row, Score, ServerState, Spent

SCHEMA = 1
_PACKAGES = ("umbel", "flwr", "torch", "opacus", "dp-accounting", "onnx", "onnxruntime", "torch-pruning", "numpy")


def collect(
    node: Node,
    state: ServerState,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    accounts: Accounts,
    rows: Sequence[Row],
    final: Score,
    compared: Mapping[str, Any],
    shipped: Mapping[str, Any],
    seconds: Mapping[str, float],
    runtime: str,
) -> dict[str, Any]:
    """The whole of report.json; the keys that scripts rely on are listed in docs/runs.md."""
    settings, scenario = node.settings, node.scenario
    trained = [row for row in rows if row["phase"] == "train"]
    defaults = {name: value for name, value, _ in knobs(scenario.settings)}
    values = {name: value for name, value, _ in knobs(settings)}
    return {
        "schema": SCHEMA,
        "umbel_version": version("umbel"),
        "status": "done",
        "scenario": scenario.name,
        "summary": scenario.summary,
        "model": settings.model or next(iter(scenario.models)),
        "seed": settings.run.seed,
        "rounds": len(trained),
        "parameters": sum(p.numel() for p in node.template.parameters()),
        "final": {
            "accuracy": final.accuracy,
            "loss": final.loss,
            "worst_client_accuracy": final.worst,
            "evaluated_by": settings.evaluation.on,
            "reason": None if final.accuracy is not None else "no client evaluated the final weights",
        },
        "reference": {key: value for key, value in compared.items() if key != "seconds"},
        "privacy": _privacy(node, state, roster, plans, accounts, compared),
        "bytes": {key: sum(row[f"bytes_{key}"] for row in rows) for key in ("up", "down")},
        "fleet": {
            "profile": settings.fleet.profile,
            "clients": len(roster),
            "deadline": settings.fleet.deadline,
            "simulated_seconds": None if select.secret(settings) else state.clock or None,
            "left_out": _left_out(rows),
            "runtime": runtime,
        },
        "edge": dict(shipped),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "settings": values,
        "changed": {name: value for name, value in values.items() if value != defaults[name]},
        "seeds": _seeds(settings),
        "seconds": {**seconds, "total": sum(seconds.values())},
    }


def _privacy(
    node: Node,
    state: ServerState,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    accounts: Accounts,
    compared: Mapping[str, Any],
) -> dict[str, Any]:
    wanted = node.settings.privacy
    made = promise(wanted.unit, wanted.sampling, wanted.bands)
    why_not = None
    if wanted.unit == "none":
        why_not = "no privacy was asked for (privacy.unit=none)"
    elif wanted.noise_seed is not None:
        why_not = (
            "the noise is seeded (privacy.noise_seed) and can be computed and taken away by anyone who knows the seed"
        )
    fixed = any(plan.mechanism.population for plan in plans.values())
    accountant = certificate.FIXED_SIZE if fixed else certificate.ACCOUNTANT
    spent = {name: state.clients.get(name, Spent()) for name in plans}
    histories = [({plan.mechanism: spent[name].steps}, plan.delta) for name, plan in plans.items()]
    clients, epsilons = [], []
    for (name, plan), history, certified in zip(
        plans.items(), histories, certificate.certify_all(histories), strict=True
    ):
        if certified.contradicted:
            why_not = why_not or (
                f"two accountants contradict each other on client {name}: claimed {certified.epsilon:.6g}, "
                f"at least {certified.low:.6g} by Opacus' PRV"
            )
        epsilons.append(certified.epsilon)
        clients.append(
            {
                "name": name,
                "examples": roster[name].examples,
                "epsilon": certified.epsilon,
                "epsilon_low": certified.low,
                "epsilon_prv": certified.prv,
                "epsilon_rdp": dp_sgd.epsilon_rdp(*history),
                "delta": plan.delta + plan.chance,
                **accounts.total(name),
                "noise_multiplier": plan.mechanism.noise_multiplier,
                "sampling_rate": plan.mechanism.sampling_rate,
                "steps": spent[name].steps,
                "rounds": spent[name].rounds,
            }
        )
    return {
        "unit": wanted.unit,
        "guarantee": why_not is None,
        "why_not": why_not,
        "epsilon": wanted.epsilon if plans else None,
        "accountant": accountant if plans else None,
        "adjacency": made.adjacency,
        "against": made.against,
        "delta_rule": made.delta_rule if wanted.delta is None or not plans else f"{wanted.delta:g} for every client",
        "clip": (state.clip or wanted.clip) if plans else None,
        "ledger": accounts.evidence(),
        "clients": clients,
        "worst_epsilon": max(epsilons, default=None),
        "median_epsilon": statistics.median(epsilons) if epsilons else None,
        "not_covered": _not_covered(node, made.not_covered, compared) if plans else [],
    }


def _seeds(settings: Settings) -> str:
    secret, seeded = select.secret(settings), settings.privacy.noise_seed is not None
    return (
        f"split, partition, initialization, {'' if secret else 'cohorts, '}batches and devices come from run.seed; "
        f"privacy noise {'and secret cohorts ' if secret else ''}"
        f"{'from privacy.noise_seed' if seeded else 'from the entropy of the operating system, never from a seed'}"
    )


def _not_covered(node: Node, promised: Sequence[str], compared: Mapping[str, Any]) -> list[str]:
    texts = list(promised)
    if node.settings.evaluation.on == "clients":
        texts.insert(0, "test accuracy and loss that the clients computed, released without noise")
    if any(value is not None for name, value in compared.items() if name.endswith("accuracy")):
        texts.append("the accuracies of the reference runs, which train on the clients' data without privacy")
    return texts


def _left_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """{name, reason, times}, most often first: who was skipped, late or rejected."""
    times: Counter[tuple[str, str]] = Counter()
    for row in rows:
        times.update((entry["name"], entry["reason"].split(":")[0]) for entry in [*row["skipped"], *row["rejected"]])
        times.update((name, "late") for name in row["late"])
    ordered = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "reason": reason, "times": count} for (name, reason), count in ordered]
