"""Reading: the examples of a block's clients, at once where the scenario can give them so, else each by itself.

Legend: N is the number of a client's examples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scenarios import Examples, Federation, Gathered


@dataclass(frozen=True)
class Held:
    """One client's examples, as rows of what was read with them."""

    whole: Examples
    first: int
    """The row with which they begin."""
    count: int
    """N."""

    @property
    def examples(self) -> Examples:
        """(N, ...) and (N,): views."""
        x, y = self.whole
        if self.count == len(y):
            return self.whole
        return Examples(x[self.first : self.first + self.count], y[self.first : self.first + self.count])


Read = Callable[[str], Held]
"""A client's name -> its examples; raises where they cannot be read."""


def alone(federation: Federation, client: str) -> Held:
    """The examples of one client."""
    examples = federation.client(client)
    return Held(examples, 0, len(examples.y))


def together(federation: Federation, clients: Sequence[str]) -> Read:
    """The examples of each of `clients`, read with those of the others where that can be.

    Where one of them cannot be read, or is not as large as the federation says, each is read by itself: then it costs
    that client alone.
    """
    held = dict[str, Held]()
    if isinstance(federation.client, Gathered) and len(clients) > 1:
        try:
            sizes = [federation.sizes[client] for client in clients]
            whole = federation.client.several(clients)
        except Exception:  # of one of them, who is told when read by itself
            sizes, whole = [], None
        if whole is not None and len(whole.x) == len(whole.y) == sum(sizes):
            first = 0
            for client, size in zip(clients, sizes, strict=True):
                held[client] = Held(whole, first, size)
                first += size
    return lambda client: held.get(client) or alone(federation, client)
