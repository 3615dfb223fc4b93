"""EmbeddedFleet: every client on this machine, trained one after another or in blocks."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial

from clients import cohort, placement
from clients.roster import meet
from clients.task import Hello, Reply, Task
from clients.training import Node, answer, hello
from clients.workers import Workers


class EmbeddedFleet:
    """The clients of `node`'s federation. A client costs nothing until it is asked."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def hello(self) -> Mapping[str, Hello]:
        return met(self._node)

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        """With local.engine=cohort tasks to train go in blocks, each to a process or, of one process, here."""
        local = self._node.settings.local
        if local.engine == "single" or not tasks or tasks[0].kind != "train":
            return placement.watched(map(partial(answer, self._node), tasks))
        blocks = cohort.cut(tasks, local.block)
        answers = self._workers.map(blocks) if self._processes > 1 else map(partial(cohort.work, self._node), blocks)
        return placement.watched(reply for block in answers for reply in block)

    @cached_property
    def _processes(self) -> int:
        return placement.processes(self._node.settings)

    @cached_property
    def _workers(self) -> Workers:
        said = partial(print, file=sys.stderr)
        return Workers(cohort.forked(self._node), self._processes, lambda line: said(f"umbel: {line}"))


def met(node: Node) -> Mapping[str, Hello]:
    """What the clients that this machine plays say before round 1."""
    settings = node.settings
    if settings.fleet.clock == "simulated" and settings.protect.mode == "none":
        return meet(node)
    return {name: hello(node, name) for name in sorted(node.federation.sizes)}  # measured, or with keys
