"""How well a round's weights do: on the server's test set, or on the clients' own where the server has none."""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from clients import placement
from clients.task import Reply, Task
from clients.training import Node, evaluate
from privacy import noisy_counts
from privacy.plan import Plan
from privacy.refused import Refused
from scenarios.weights import fit, load
from server import select
from server.evaluation import SummedTests
from server.rounds import Fleet
from server.state import Score, ServerState


class MetricsJournal(Protocol):
    """What charges noised test results to the clients' test examples; see server.accounts."""

    def reserve_tests(self, number: int, names: Collection[str]) -> Mapping[str, str]:
        """Who cannot pay for an evaluation after round `number` -> why; all others of `names` are charged for it."""

    def charged(self, task: Task) -> Task:
        """The task with its reservation."""

    def heard(self, reply: Reply) -> None:
        """What a device says of its own ledger is kept."""


NOTHING = Score(None, None)
"""Nobody evaluated."""


def check(node: Node) -> None:
    """Raises Refused when the server is to evaluate and the scenario gives it no test set."""
    if node.settings.evaluation.on == "server" and node.federation.test is None:
        raise Refused(f"scenario {node.scenario.name} gives the server no test set: set evaluation.on=clients")


def scorer(
    node: Node,
    fleet: Fleet,
    names: Sequence[str],
    tests: Mapping[str, Plan] = MappingProxyType({}),
    journal: "MetricsJournal | None" = None,
    summed: SummedTests | None = None,
) -> Callable[[ServerState], Score]:
    """The function that scores a state's weights, by settings.evaluation.on.

    tests: the plans of clients that noise what they say. journal: where that is charged; None: nowhere. summed: what
    reads the sum alone of what they say; None: each is read by itself.
    """
    test, hidden = node.federation.test, select.secret(node.settings)
    if node.settings.evaluation.on == "clients":
        if node.settings.evaluation.epsilon is not None:
            return lambda state: _by_noised_clients(fleet, tests, journal, state, hidden)
        if summed is not None:
            return lambda state: _by_sum(fleet, summed, state, hidden)
        return lambda state: _by_clients(fleet, select.evaluated(names, node.settings, state.round), state, hidden)
    assert test is not None

    def by_server(state: ServerState) -> Score:
        model = copy.deepcopy(node.template)
        fit(model, state.layout)
        load(model, state.weights)
        model = placement.moved(model, placement.of(node.settings))
        loss, correct = evaluate(model, test, node.scenario.loss)
        return Score(loss if math.isfinite(loss) else None, correct / len(test.y))

    return by_server


def _by_clients(fleet: Fleet, names: Sequence[str], state: ServerState, hidden: bool) -> Score:
    """Loss and accuracy weighted by test examples, and the worst client's accuracy. Not covered by DP.

    hidden: draws are secret, and why a reply is no good may hang on them (a device's ledger that was rolled back).
    """
    tasks = [Task("evaluate", state.round, name, state.weights, state.layout) for name in names]
    good, missing = list[Reply](), dict[str, str]()
    for task, reply in zip(tasks, fleet.ask(tasks), strict=True):
        if _sound(reply):
            good.append(reply)
        elif not hidden:
            none = "no test examples" if not reply.examples else "answered what cannot be a test result"
            missing[task.client] = reply.reason or none
    total = sum(reply.examples for reply in good)
    if not total:
        return NOTHING._replace(missing=missing)
    loss = sum(reply.loss * reply.examples for reply in good) / total
    worst = min(reply.correct / reply.examples for reply in good)
    return Score(loss, sum(reply.correct for reply in good) / total, worst, missing)


def _by_sum(fleet: Fleet, summed: SummedTests, state: ServerState, hidden: bool) -> Score:
    """What `_by_clients` says, but for the worst client, which nobody knows."""
    score = summed(fleet, state)
    return score._replace(missing={}) if hidden else score


def _by_noised_clients(
    fleet: Fleet, tests: Mapping[str, Plan], journal: "MetricsJournal | None", state: ServerState, hidden: bool
) -> Score:
    """Accuracy from counts that are noised one by one and summed; neither a loss nor a worst client is known.

    hidden: as above. Whom the server's ledger refuses is named all the same: evaluations are charged to everyone alike.
    """
    missing = {} if journal is None else dict(journal.reserve_tests(state.round, sorted(tests)))
    tasks = [
        Task("evaluate", state.round, name, state.weights, state.layout, mechanism=tests[name].mechanism)
        for name in sorted(tests)
        if name not in missing
    ]
    tasks, good = tasks if journal is None else [journal.charged(task) for task in tasks], list[Reply]()
    for task, reply in zip(tasks, fleet.ask(tasks), strict=True):
        if journal is not None:
            journal.heard(reply)
        if not reply.reason:
            good.append(reply)
        elif not hidden:
            missing[task.client] = reply.reason
    share = noisy_counts.accuracy(sum(reply.correct for reply in good), sum(reply.examples for reply in good))
    return Score(None, share, missing=missing)


def _sound(reply: Reply) -> bool:
    return (
        not reply.reason and reply.examples > 0 and 0 <= reply.correct <= reply.examples and math.isfinite(reply.loss)
    )
