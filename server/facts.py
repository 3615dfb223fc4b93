"""report.json: everything a run found out, as one plain dict; what scripts read and report.html is drawn from."""

import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from clients import cohort
from clients.task import Hello
from clients.training import Node
from privacy import certificate, dp_sgd
from privacy.plan import History, Plan
from privacy.promise import promise, summed
from scenarios.settings import Settings, knobs
from scenarios.weights import flatten
from server import engine, exposure, gather, select
from server.accounts import Accounts
from server.costs import Cost
from server.state import Row, Score, ServerState, Spent

SCHEMA = 1
_PACKAGES = ("umbel", "flwr", "torch", "opacus", "dp-accounting", "onnx", "onnxruntime", "torch-pruning", "numpy")


def collect(
    node: Node,
    state: ServerState,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    tests: Mapping[str, Plan],
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
            "reason": None if final.accuracy is not None else _untold(settings),
        },
        "reference": {key: value for key, value in compared.items() if key != "seconds"},
        "privacy": _privacy(node, state, roster, plans, tests, accounts, compared),
        "protect": _protect(node, state, plans, len(roster), runtime),
        "bytes": {key: sum(row[f"bytes_{key}"] for row in rows) for key in ("up", "down")},
        "fleet": {
            "profile": settings.fleet.profile,
            "clients": len(roster),
            "deadline": settings.fleet.deadline,
            "simulated_seconds": None if select.secret(settings) else state.clock or None,
            "left_out": _left_out(rows),
            "left_out_file": None,
            "unevaluated": _unevaluated(rows, final),
            "unevaluated_file": None,
            "runtime": runtime,
            "engine": cohort.told(settings, select.cohort_size(len(roster), settings), alone=runtime == "deployment")
            | {"trained": engine.summed(rows)},
        },
        "edge": dict(shipped),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "settings": values,
        "changed": {name: value for name, value in values.items() if value != defaults[name]},
        "seeds": _seeds(settings),
        "seconds": {**seconds, "total": seconds["rounds"] + seconds["references"] + seconds["export"]},
    }


def _privacy(
    node: Node,
    state: ServerState,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    tests: Mapping[str, Plan],
    accounts: Accounts,
    compared: Mapping[str, Any],
) -> dict[str, Any]:
    wanted = node.settings.privacy
    protect = node.settings.protect
    honest = select.honest(len(plans), node.settings) if wanted.by_shares else 0
    made = promise(wanted.unit, wanted.sampling, wanted.bands, honest, protect.mode, protect.trust)
    if not honest:
        made = summed(made, wanted.unit, protect.mode, protect.trust, select.secret(node.settings))
    why_not = None
    if wanted.unit == "none":
        why_not = "no privacy was asked for (privacy.unit=none)"
    elif wanted.noise_seed is not None:
        why_not = (
            "simulation, no guarantee: the noise is seeded (privacy.noise_seed) and can be computed and taken away by "
            "anyone who knows the seed"
        )
    fixed = any(plan.mechanism.population for plan in plans.values())
    accountant = certificate.FIXED_SIZE if fixed else certificate.ACCOUNTANT
    spent = {name: state.clients.get(name, Spent()) for name in plans}
    spendings = [_Spending("", name, plan, spent[name].steps, accounts.cost(name)) for name, plan in plans.items()]
    spendings += [
        _Spending("whole", name, plan.whole, spent[name].whole, accounts.cost(name, 1))
        for name, plan in plans.items()
        if plan.whole
    ]
    spendings += [
        _Spending("tests", name, plan, accounts.evaluations(name, plan.steps), accounts.cost(name, tests=True))
        for name, plan in tests.items()
    ]
    entries: dict[str, dict[str, Any]] = {"": {}, "whole": {}, "tests": {}}
    certified = certificate.certify_all([one.history for one in spendings])
    for one, proof in zip(spendings, certified, strict=True):
        if proof.contradicted:
            why_not = why_not or (
                f"two accountants contradict each other on client {one.client}: claimed {proof.epsilon:.6g}, "
                f"at least {proof.low:.6g} by Opacus' PRV"
            )
        entries[one.kind][one.client] = one.entry(proof) | accounts.total(one.cost)
    clients = [
        {
            "name": name,
            "examples": roster[name].examples,
            **entry,
            "rounds": spent[name].rounds,
            "whole": entries["whole"].get(name),
            "tests": entries["tests"].get(name),
        }
        for name, entry in entries[""].items()
    ]
    epsilons = [entry["epsilon"] for entry in entries[""].values()]
    return {
        "unit": wanted.unit,
        "guarantee": why_not is None,
        "why_not": why_not,
        "epsilon": wanted.epsilon if plans else None,
        "accountant": accountant if plans else None,
        "adjacency": made.adjacency,
        "against": made.against,
        "delta_rule": made.delta_rule if wanted.delta is None or not plans else f"{wanted.delta:g} for every client",
        "clip": (wanted.clip if wanted.by_example else state.clip or wanted.clip) if plans else None,
        "update_clip": (state.clip or wanted.update_clip) if wanted.unit == "both" else None,
        "ledger": accounts.evidence(),
        "clients": clients,
        "clients_file": None,
        "worst_epsilon": max(epsilons, default=None),
        "median_epsilon": statistics.median(epsilons) if epsilons else None,
        "worst_whole_epsilon": max((entry["epsilon"] for entry in entries["whole"].values()), default=None),
        "worst_tests_epsilon": max((entry["epsilon"] for entry in entries["tests"].values()), default=None),
        "not_covered": _not_covered(node, made.not_covered, compared) if plans else [],
    }


def _protect(node: Node, state: ServerState, plans: Mapping[str, Plan], clients: int, runtime: str) -> dict[str, Any]:
    """How updates of the unpruned model travel, on the grid of the last round, and who can learn what of them."""
    settings, size = node.settings, len(flatten(node.template))
    grid = gather.grid(settings, plans, size, state.round, state.clip or settings.privacy.update_norm)
    return gather.told(settings, size, grid, clients, runtime)


class _Spending(NamedTuple):
    """One account of one client in this run: its examples' (or its own, by the unit), its own, its test examples'."""

    kind: str
    client: str
    plan: Plan
    steps: int
    cost: Cost | None

    @property
    def history(self) -> tuple[History, float]:
        return {self.plan.mechanism: self.steps}, self.plan.delta

    def entry(self, proof: certificate.Certificate) -> dict[str, Any]:
        return {
            "epsilon": proof.epsilon,
            "epsilon_low": proof.low,
            "epsilon_prv": proof.prv,
            "epsilon_rdp": dp_sgd.epsilon_rdp(*self.history),
            "delta": self.plan.delta + self.plan.chance,
            "noise_multiplier": self.plan.mechanism.noise_multiplier,
            "sampling_rate": self.plan.mechanism.sampling_rate,
            "population": self.plan.mechanism.population,
            "steps": self.steps,
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
    if node.settings.evaluation.on == "clients" and node.settings.evaluation.epsilon is None:
        whose = "over all clients, exact sums" if node.settings.sums_tests else "that the clients computed, released"
        texts.insert(0, f"test accuracy and loss {whose} without noise")
    if any(value is not None for name, value in compared.items() if name.endswith("accuracy")):
        texts.append("the accuracies of the reference runs, which train on the clients' data without privacy")
    return [*texts, exposure.besides(node.settings)]


def _left_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """{name, reason, times}, most often first: who was skipped, late or rejected."""
    times: Counter[tuple[str, str]] = Counter()
    for row in rows:
        times.update((entry["name"], entry["reason"].split(":")[0]) for entry in [*row["skipped"], *row["rejected"]])
        times.update((name, "late") for name in row["late"])
    return _listed(times)


def _untold(settings: Settings) -> str:
    """Why nobody knows how the final weights do."""
    summed = "no sum of the clients' test results could be read after the last round: fleet.unevaluated says why"
    return summed if settings.sums_tests else "no client evaluated the final weights"


def _unevaluated(rows: Sequence[Row], final: Score) -> list[dict[str, Any]]:
    """{name, reason, times}, most often first: of whom an evaluation, the final one included, heard nothing."""
    times: Counter[tuple[str, str]] = Counter(final.missing.items())
    for row in rows:  # an older Umbel's rows do not say
        times.update((entry["name"], entry["reason"]) for entry in row.get("unevaluated", ()))
    return _listed(times)


def _listed(times: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    ordered = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "reason": reason, "times": count} for (name, reason), count in ordered]
