"""How well a round's weights do: on the server's test set, or on the clients' own where the server has none."""

import copy
import math
from collections.abc import Callable

from clients.task import Reply, Task
from clients.training import Node, evaluate
from privacy.refused import Refused
from scenarios.weights import fit, load
from server.rounds import Fleet
from server.state import Score, ServerState

NOTHING = Score(None, None)
"""No client evaluated, or nothing finite came of it."""


def scorer(node: Node, fleet: Fleet, names: list[str]) -> Callable[[ServerState], Score]:
    """The function that scores a state's weights, by settings.evaluation.on.

    Raises Refused when the server is to evaluate and the scenario gives it no test set.
    """
    test = node.federation.test
    if node.settings.evaluation.on == "clients":
        return lambda state: _by_clients(fleet, names, state)
    if test is None:
        raise Refused(f"scenario {node.scenario.name} gives the server no test set: set evaluation.on=clients")

    def by_server(state: ServerState) -> Score:
        model = copy.deepcopy(node.template)
        fit(model, state.layout)
        load(model, state.weights)
        loss, correct = evaluate(model, test, node.scenario.loss)
        return Score(loss if math.isfinite(loss) else None, correct / len(test.y))

    return by_server


def _by_clients(fleet: Fleet, names: list[str], state: ServerState) -> Score:
    """Loss and accuracy weighted by test examples, and the worst client's accuracy. Not covered by DP."""
    tasks = [Task("evaluate", state.round, name, state.weights, state.layout) for name in names]
    good = [reply for reply in fleet.ask(tasks) if _sound(reply)]
    total = sum(reply.examples for reply in good)
    if not total:
        return NOTHING
    loss = sum(reply.loss * reply.examples for reply in good) / total
    worst = min(reply.correct / reply.examples for reply in good)
    return Score(loss, sum(reply.correct for reply in good) / total, worst)


def _sound(reply: Reply) -> bool:
    return (
        not reply.reason and reply.examples > 0 and 0 <= reply.correct <= reply.examples and math.isfinite(reply.loss)
    )
