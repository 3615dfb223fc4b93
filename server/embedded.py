"""EmbeddedFleet: every client in this process, trained one after another."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from clients.task import Hello, Reply, Task
from clients.training import Node, answer, hello


class EmbeddedFleet:
    """The clients of `node`'s federation. A client costs nothing until it is asked."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def hello(self) -> Mapping[str, Hello]:
        return {name: hello(self._node, name) for name in sorted(self._node.federation.sizes)}

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        return map(partial(answer, self._node), tasks)
