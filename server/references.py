"""What the run is measured against: one model trained on all data at once, and the same federation without privacy."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clients import upload
from clients.sgd import train
from clients.task import Reply, Task
from clients.training import Node, evaluate
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario, build_model
from scenarios.settings import Local, Settings, override
from scenarios.weights import flatten, layout
from server.embedded import EmbeddedFleet
from server.rounds import rounds
from server.score import NOTHING, scorer
from server.state import Row, ServerState, final_weights, first_state


class NoJournal:
    """A federation whose rounds nobody needs to resume."""

    def reserve(self, number: int, steps: Any) -> dict[str, str]:
        raise Refused("a reference federation has no privacy account: its settings must say privacy.unit=none")

    def charged(self, task: Task) -> Task:
        return task

    def heard(self, reply: Reply) -> None:
        """No device keeps a ledger for it."""

    def commit(self, state: ServerState, row: Row, taken: Any) -> None:
        """Nothing is kept."""


def references(node: Node, runtime: str, status: Callable[[str], None]) -> dict[str, Any]:
    """{central_accuracy, central_reason, no_privacy_accuracy, no_privacy_reason}: an accuracy, or why there is none."""
    scenario, settings, federation = node.scenario, node.settings, node.federation
    deployed = "the server of a deployment sees no client's data" if runtime == "deployment" else ""
    untested = "" if federation.test is not None else "the server has no test set"
    central = deployed or untested or scenario.skipped.get("central", "")
    if not central and not settings.reference.central_epochs:
        central = "reference.central_epochs is 0"
    free = deployed or scenario.skipped.get("no_privacy", "")
    if not free and settings.privacy.unit == "none":
        free = "the run itself has no privacy"
    if not free and not settings.reference.no_privacy:
        free = "reference.no_privacy is false"
    if not central:
        status("training the central reference")
    central_accuracy = None if central else central_reference(scenario, settings, federation)
    if not free:
        status("running the same federation without privacy")
    free_accuracy = None if free else no_privacy_reference(scenario, settings, federation)
    return {
        "central_accuracy": central_accuracy,
        "central_reason": central or None,
        "no_privacy_accuracy": free_accuracy,
        "no_privacy_reason": free or None,
    }


def central_reference(scenario: Scenario, settings: Settings, federation: Federation) -> float:
    """Test accuracy of the same model trained by plain SGD on all clients' examples in one place."""
    assert federation.test is not None
    parts = [federation.client(name) for name in sorted(federation.sizes)]
    pooled = Examples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    model, chosen = build_model(scenario, settings), settings.reference
    steps = chosen.central_epochs * -(-len(pooled.y) // chosen.central_batch)
    task = Task("train", 1, "central", flatten(model), layout(model), rate=chosen.central_rate, steps=steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.run.seed)
        train(model, pooled, scenario.loss, task, Local(batch=chosen.central_batch), settings)
    return evaluate(model, federation.test, scenario.loss)[1] / len(federation.test.y)


def no_privacy_reference(scenario: Scenario, settings: Settings, federation: Federation) -> float | None:
    """Final accuracy of the same federation, seed and settings, without privacy and with reference.no_privacy_set."""
    settings = override(upload.in_the_clear(settings), f"privacy.unit=none {settings.reference.no_privacy_set}")
    with tempfile.TemporaryDirectory(prefix="umbel-reference-") as states:
        node = Node(scenario, settings, federation, Path(states))
        fleet = EmbeddedFleet(node)
        score, state = scorer(node, fleet, sorted(federation.sizes)), first_state(node.template, settings)
        *_, (last, _) = rounds(fleet, fleet.hello(), {}, state, settings, NoJournal(), lambda _: NOTHING)
        return score(replace(last, weights=final_weights(last))).accuracy
