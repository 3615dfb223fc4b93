"""EmbeddedFleet: every client on this machine, trained one after another or in blocks."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial

from clients import cohort, placement
from clients.roster import meet
from clients.task import Hello, Reply, Task
from clients.training import Node, answer, hello
from clients.workers import Workers
from server import replies


class EmbeddedFleet:
    """The clients of `node`'s federation. A client costs nothing until it is asked."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def hello(self) -> Mapping[str, Hello]:
        settings = self._node.settings
        if settings.fleet.clock == "simulated" and settings.protect.mode == "none":
            return meet(self._node)
        return {name: hello(self._node, name) for name in sorted(self._node.federation.sizes)}  # measured, or with keys

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        """With local.engine=cohort tasks to train go in blocks, each to a process or, of one process, here."""
        local = self._node.settings.local
        if local.engine == "single" or not tasks or tasks[0].kind != "train":
            return placement.watched(map(partial(answer, self._node), tasks))
        blocks = cohort.cut(tasks, local.block)
        answers = self._workers.map(blocks) if self._processes > 1 else map(self._train, blocks)
        return placement.watched(reply for block in answers for reply in block)

    def _train(self, tasks: Sequence[Task]) -> list[Reply]:
        return cohort.answer(self._node, tasks, replies.weigh(self._node.settings))

    @cached_property
    def _processes(self) -> int:
        return placement.processes(self._node.settings)

    @cached_property
    def _workers(self) -> Workers:
        return Workers(self._train, self._processes, lambda line: print(f"umbel: {line}", file=sys.stderr))
