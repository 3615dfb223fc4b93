"""From final weights to model.onnx: prune, recover in federated rounds under the same account, export and choose."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from clients.task import Hello
from clients.training import Node
from edge_export import bundle
from edge_export.prune import prune
from privacy.plan import Plan
from privacy.refused import Refused
from scenarios.settings import Settings
from scenarios.weights import Vector, fit, flatten, layout, load
from server import select, step
from server.spendings import without_updates
from server.state import ServerState, Spent


def pruned_state(node: Node, state: ServerState, final: Vector, number: int) -> ServerState:
    """`state` at the start of `number` recovery rounds: the final weights (P,) with their channels pruned.

    Raises Refused, with the reason, when the model has nothing to prune.
    """
    if reason := node.scenario.skipped.get("pruned"):
        raise Refused(reason)
    settings = node.settings
    if not settings.export.prune:
        raise Refused("export.prune is 0")
    model, _ = prune(unpruned(node, final), node.federation.validation.x[:1], settings.export.prune)
    weights = flatten(model)
    return replace(
        state,
        phase="recover",
        weights=weights,
        layout=layout(model),
        step=step.resolve(settings.server).init(len(weights)),
        until=state.round + number,
        control=None if state.control is None else np.zeros_like(weights),  # as in round 1
        noise=None,  # of as many entries as the unpruned weights: a new block begins (privacy/matrix_noise.py)
        pace=None,
        clients=without_updates(state.clients),  # client states are of another model
    )


def affordable(
    roster: Mapping[str, Hello], plans: Mapping[str, Plan], spent: Mapping[str, Spent], settings: Settings
) -> bool:
    """Whether enough clients (rounds.minimum) can pay for one more round; always without DP."""
    able = select.able(roster, plans, spent, settings)
    return not plans or int(able.sum()) >= max(1, settings.rounds.minimum)


def ship(
    node: Node, folder: Path, final: Vector, recovered: ServerState | None, recovery: str, status: Callable[[str], None]
) -> dict[str, Any]:
    """Export, check, measure and choose; returns the `edge` part of report.json."""
    candidates = {"unpruned": unpruned(node, final)}
    if recovered is not None:
        model = copy.deepcopy(node.template)
        fit(model, recovered.layout)
        load(model, recovered.weights)
        candidates["pruned"] = model
    variants = bundle.ship(
        folder,
        candidates,
        validation=node.federation.validation,
        test=node.federation.test,
        tolerance=node.settings.export.tolerance,
        classes=node.scenario.classes,
        skipped={} if recovered is not None else {"pruned": recovery},
        progress=status,
    )
    chosen = next((variant for variant in variants if variant.chosen), None)
    return {
        "accuracy": chosen.accuracy if chosen else None,
        "recovery": recovery,
        "rule": f"of the variants that lose at most {node.settings.export.tolerance * 100:.1f} % of the unpruned fp32 "
        "model's validation accuracy the fastest, and of those as fast within measurement noise the smallest file",
        "variants": [asdict(variant) for variant in variants],
    }


def unpruned(node: Node, final: Vector) -> nn.Module:
    """The scenario's model with the final weights (P,)."""
    model = copy.deepcopy(node.template)
    load(model, final)
    return model
