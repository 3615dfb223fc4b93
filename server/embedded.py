"""EmbeddedFleet: every client in this process, trained one after another."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from clients.roster import meet
from clients.task import Hello, Reply, Task
from clients.training import Node, answer, hello


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
        return map(partial(answer, self._node), tasks)
