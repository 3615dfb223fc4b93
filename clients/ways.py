"""Ways: how each client of a block is trained, and why; from its task, the model and the settings alone.

gram: in passes that clients share (clients/gram.py). rows: by such matrices, under example-level DP
(clients/private_stack.py). fused: one after another through one model (clients/fused.py). single: one by one, as with
local.engine=single.
"""

from dataclasses import dataclass

from torch import nn

from clients import gram, stack, training
from clients.stack import Stack
from clients.task import Task, Way
from clients.training import Node
from scenarios.settings import Local


@dataclass(frozen=True)
class Ways:
    """The choice for every client of a model."""

    chain: Stack | None
    """The model, where clients can share passes."""
    obstacle: str
    """Why they cannot; empty where they can."""
    local: Local

    @classmethod
    def fitting(cls, node: Node, task: Task) -> "Ways":
        """Of the model that `task` trains, of its shapes; looked at once for all tasks of them."""
        if task.layout not in node.ways:
            node.ways[task.layout] = cls.of(node, training.fitted(node, task))
        found: Ways = node.ways[task.layout]
        return found

    @classmethod
    def of(cls, node: Node, model: nn.Module) -> "Ways":
        """model: of the shapes that are trained, as pruning leaves them."""
        obstacle = stack.obstacle(model)
        if not obstacle and node.settings.local.scaffold:
            obstacle = "local.scaffold corrects the steps of each client by its own variate"
        elif not obstacle and not node.apart:
            obstacle = "the loss weighs the examples of a batch against each other"
        chain = None if obstacle else stack.read(model)
        if chain is not None and chain.functions[0](node.federation.validation.x[:1]).dim() != 2:
            return cls(None, "the first linear layer sees an example as several rows", node.settings.local)
        return cls(chain, obstacle, node.settings.local)

    def at(self, examples: int, steps: int, private: bool, deadline: bool) -> Way:
        """How a client with so many examples takes so many steps. private: under example-level DP.

        deadline: on the wall clock; nobody else's steps end with it.
        """
        if deadline:
            return Way("single", "a deadline on the wall clock")
        if private:
            return Way("single", f"example-level DP, and {self.obstacle}") if self.chain is None else Way("rows")
        if self.chain is None:
            return self.fused(self.obstacle)
        if rows(self.local, examples, steps) > (most := gram.most(self.chain)):
            return self.fused(f"more than {most} examples x epochs a round")
        return Way("gram")

    def fused(self, why: str) -> Way:
        return Way("fused", why, self.local.precision)


def rows(local: Local, examples: int, steps: int) -> int:
    """The examples that a client meets in so many steps, each as often as it meets it."""
    return steps * min(local.batch or examples, examples)
