"""Roster: the clients of a simulated fleet as rows of arrays; what one of them says is put together when it is read."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clients import device
from clients.task import Device, Hello
from clients.training import Node, fingerprint
from privacy import durable
from scenarios.numbered import ByName, Names, named

Sizes = NDArray[np.int32]
"""(C,) training examples of the clients, in the order of their names."""

_DEVICES = 4096


class Digests(Protocol):
    """(C, 32): of each client's training data."""

    def __getitem__(self, at: int) -> Any: ...


class Roster(ByName[Hello]):
    """Every client's Hello, by name: 4 bytes a client, and its digest."""

    def __init__(self, names: Names, examples: Sizes, digests: Digests, able: Callable[[str], Device]) -> None:
        """able: a client's device, by its name."""
        self.names, self.examples, self.digests, self.able = names, examples, digests, able

    def value(self, at: int) -> Hello:
        name = self.names[at]
        return Hello(name, int(self.examples[at]), bytes(self.digests[at]).hex(), self.able(name))


def meet(node: Node) -> Roster:
    """The roster of a simulated fleet without keys: each client's data is looked at once."""
    federation, names = node.federation, named(node.federation.sizes)
    examples, digests = np.empty(len(names), np.int32), np.empty((len(names), 32), np.uint8)
    key = durable.secret(node.states / "key")
    for at, name in enumerate(names):
        held = federation.client(name)
        examples[at], digests[at] = len(held.y), np.frombuffer(fingerprint(key, held), np.uint8)
    drawn = partial(device.draw, node.settings.fleet.profile, seed=node.settings.run.seed)
    return Roster(names, examples, digests, lru_cache(maxsize=_DEVICES)(drawn))


def size(roster: Mapping[str, Hello], name: str) -> int:
    """The training examples of one client, without the rest that it says, whose digest may lie on disk."""
    return int(roster.examples[roster.names.place(name)]) if isinstance(roster, Roster) else roster[name].examples


def ability(roster: Mapping[str, Hello], name: str) -> Device:
    """The device of one client."""
    return roster.able(name) if isinstance(roster, Roster) else roster[name].device


def examples(roster: Mapping[str, Hello]) -> Sizes:
    """The training examples of every client."""
    if isinstance(roster, Roster):
        return roster.examples
    return np.array([roster[name].examples for name in named(roster)], np.int32)
