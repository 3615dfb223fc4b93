"""Membership inference (LiRA): can a reader of the final model tell whether an example, or a client, was in its data?

Legend: S is the number of shadow federations, M the number of targets.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from clients.task import Hello
from clients.training import Node
from privacy.audit import Included, Scores, ranking
from scenarios import Examples, Federation
from scenarios.seeds import derive
from scenarios.settings import Settings, override
from scenarios.weights import load
from server.canaries import Setup, Tick, Unrecorded
from server.embedded import EmbeddedFleet
from server.rounds import rounds
from server.score import NOTHING
from server.state import final_weights, first_state

_TARGETS = 200
_DEVICES = "fleet.profile=equal fleet.clock=wall fleet.deadline=0 export.recover_rounds=0"
_LEAST_LOSS = 1e-7


def membership(setup: Setup, shadows: int, tick: Tick) -> tuple[dict[str, object] | None, str | None]:
    """({auc, tpr_at_1pct_fpr, shadows, targets, unit, without_privacy}, None), or (None, why it cannot be done).

    Trains `shadows` federations with the real rounds on the real data, each target in one half of them, and as many
    again without privacy (Carlini et al. 2022, Algorithm 1, one variance for all targets as shadows are few).
    """
    if setup.data is None:
        return None, "the training data are not on this machine"
    targets = _Targets(setup)
    drawn = np.random.default_rng(derive(setup.seed, "audit", "shadows"))
    order = np.argsort(drawn.random((shadows, targets.count)), axis=0)
    included_SM = order < shadows // 2
    private = _attack(setup, override(setup.settings, _DEVICES), targets, included_SM, tick)
    found = {"shadows": shadows, "targets": targets.count, "unit": targets.unit, **private}
    if setup.settings.privacy.unit == "none":
        return {**found, "without_privacy": private}, None
    bare = f"{_DEVICES} privacy.unit=none privacy.budget= privacy.adapt=false {setup.settings.reference.no_privacy_set}"
    free = _attack(replace(setup, plans={}), override(setup.settings, bare), targets, included_SM, tick)
    return {**found, "without_privacy": free}, None


class _Targets:
    """Whose membership is asked: clients under client-level or local DP, else examples, half of a client's at most."""

    def __init__(self, setup: Setup) -> None:
        assert setup.data is not None
        self._data, names = setup.data, sorted(name for name, size in setup.sizes.items() if size)
        self.unit = "client" if setup.settings.privacy.unit in ("client", "local") else "example"
        self._places: list[tuple[str, int]] = []
        if self.unit == "client":
            self._clients, self.count = names, len(names)
        else:
            random = np.random.default_rng(derive(setup.seed, "audit", "targets"))
            spots = [(n, int(i)) for n in names for i in random.permutation(setup.sizes[n])[: setup.sizes[n] // 2]]
            chosen = sorted(random.permutation(len(spots))[:_TARGETS].tolist())
            self._places = [spots[i] for i in chosen]
            self.count = len(self._places)

    def federation(self, included: Included) -> Federation:
        """The scenario's data with those targets alone that are `included` (M,)."""
        if self.unit == "client":
            held = dict(zip(self._clients, included, strict=True))
            return replace(self._data, sizes={n: s if held.get(n) else 0 for n, s in self._data.sizes.items()})
        out: dict[str, list[int]] = {}
        for (name, i), there in zip(self._places, included, strict=True):
            if not there:
                out.setdefault(name, []).append(i)
        sizes = {name: size - len(out.get(name, ())) for name, size in self._data.sizes.items()}
        return replace(self._data, sizes=sizes, client=lambda name: _without(self._data.client(name), out.get(name)))

    def confidence(self, model: nn.Module, node: Node) -> Scores:
        """log(p / (1 - p)) of each target's label (M,); of a client the mean over its examples."""
        model.eval()
        data = {
            n: self._data.client(n) for n in (self._clients if self.unit == "client" else {n for n, _ in self._places})
        }
        if self.unit == "client":
            return np.array(
                [np.mean([_logit(node, model, data[n], i) for i in range(len(data[n].y))]) for n in self._clients]
            )
        return np.array([_logit(node, model, data[n], i) for n, i in self._places])


def _attack(
    setup: Setup, settings: Settings, targets: _Targets, included_SM: Included, tick: Tick
) -> Mapping[str, float]:
    confidence_SM = np.array([_shadow(setup, settings, targets, row, s, tick) for s, row in enumerate(included_SM)])
    scores_SM = likelihood_ratios(confidence_SM, included_SM)
    auc, found = ranking(scores_SM[included_SM], scores_SM[~included_SM])
    return {"auc": auc, "tpr_at_1pct_fpr": found}


def _shadow(setup: Setup, settings: Settings, targets: _Targets, included: Included, number: int, tick: Tick) -> Scores:
    """The confidence of one shadow federation in each target (M,)."""
    seed = settings.privacy.noise_seed
    if seed is not None:
        settings = override(settings, f"privacy.noise_seed={derive(seed, 'shadow', number)}")
    node = Node(
        setup.scenario, settings, targets.federation(included), setup.states / f"{settings.privacy.unit}-{number}"
    )
    roster = {name: Hello(name, size, "") for name, size in sorted(node.federation.sizes.items())}
    first = first_state(node.template, settings)
    *_, (last, _) = rounds(EmbeddedFleet(node), roster, setup.plans, first, settings, Unrecorded(), lambda _: NOTHING)
    model = copy.deepcopy(node.template)
    load(model, final_weights(last))
    tick()
    return targets.confidence(model, node)


def likelihood_ratios(confidence_SM: NDArray[np.float64], included_SM: Included) -> Scores:
    """(S, M): how much likelier a shadow's confidence in a target is if the target was in, from the other shadows.

    Each mean is over the other shadows alone, and its own error is part of the variance: without that, the smaller
    group would look the farther one. The normalizers of the two laws are left out: they differ by the size of the
    groups alone, and would decide for targets that hardly vary. Every target must be in two shadows and out of two.
    """
    squares, residuals = [], np.zeros_like(confidence_SM)
    for group in (included_SM, ~included_SM):
        count, total = group.sum(0) - group, (confidence_SM * group).sum(0)
        apart = (confidence_SM - (total - confidence_SM * group) / count) / np.sqrt(1 + 1 / count)
        residuals += apart * group
        squares.append(apart**2)
    variance = max(float((residuals**2).mean()), 1e-12)
    return np.asarray((squares[1] - squares[0]) / (2 * variance))


def _logit(node: Node, model: nn.Module, examples: Examples, i: int) -> float:
    with torch.no_grad():
        loss = float(node.scenario.loss(model(examples.x[i : i + 1]), examples.y[i : i + 1]))
    loss = min(max(loss, _LEAST_LOSS), 50.0) if loss == loss else 50.0
    return float(-loss - np.log(-np.expm1(-loss)))


def _without(examples: Examples, out: list[int] | None) -> Examples:
    if not out:
        return examples
    kept = torch.ones(len(examples.y), dtype=torch.bool)
    kept[out] = False
    return Examples(examples.x[kept], examples.y[kept])
