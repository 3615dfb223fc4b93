"""How a round comes to the sum of its updates: from floats read one by one, or from integers summed as they come.

A way of protecting updates is one more function of the kind `Gather` (server/masked.py); `server.run` chooses.

Legend: P is the number of entries of an update.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from clients import upload
from clients.task import Hello, Reply, Task
from privacy import lengths, roster
from privacy.integers import Grid, Integers
from privacy.noise_shares import Shares
from privacy.plan import Plan
from scenarios.settings import Settings
from server import exposure, select
from server.combine import Summed

Read = TypeVar("Read")


class Ask(Protocol):
    """`Fleet.ask`: one reply a task, in the tasks' order."""

    def __call__(self, tasks: Sequence[Task]) -> Iterator[Reply]: ...


class Good(Protocol):
    """What of replies, in the order of the round's tasks, can be used; the others are named in the round's row."""

    def __call__(self, replies: Iterable[Reply], read: Callable[[Task, Reply], Read]) -> Iterator[Read]:
        """What `read` makes of each good reply; its ValueError costs that client its update, and nothing else."""


Gather = Callable[[Ask, Sequence[Task], Grid, Good, Mapping[str, Hello]], Summed]
"""(ask, the round's tasks, its grid, what is a good reply, who is there) -> the sum over the good ones.

One accumulator of P + 2 integers, whatever the number of clients.
"""


def clear(ask: Ask, tasks: Sequence[Task], grid: Grid, good: Good, roster: Mapping[str, Hello]) -> Summed:
    """Integers that the server reads: what masked and encrypted sums are held against."""

    def read(task: Task, reply: Reply) -> Integers:
        return upload.unpack(reply.payload, upload.weight(task, reply.examples), grid)

    total, count = np.zeros(grid.entries, np.uint64), 0
    for entries in good(ask(tasks), read):
        total += entries
        count += 1
    return summed(total, count, grid)


def summed(total: Integers, count: int, grid: Grid) -> Summed:
    """What the sum (P + 2,) of the entries of `count` clients says. Raises ValueError for what can be no such sum."""
    if not count:
        return Summed(np.zeros(grid.size), 0.0, 0.0)
    return Summed(*grid.read(total, count))


def grid(settings: Settings, plans: Mapping[str, Plan], size: int, number: int, clip: float) -> Grid | None:
    """The grid that every task of round `number` makes for updates (P,); None where they travel as floats.

    clip: of the round's updates, where they are clipped.
    """
    wanted = settings.privacy
    noise = next(iter(plans.values())).mechanism.noise_multiplier if wanted.unit == "local" else 0.0  # all share it
    held = clip if wanted.by_client or wanted.unit == "local" else 0.0
    return upload.grid(settings, size, number, held, noise, shares(settings, plans))


def shares(settings: Settings, plans: Mapping[str, Plan]) -> Shares | None:
    """What noise every client adds a share of; None where it does not."""
    if not settings.privacy.by_shares:
        return None
    return Shares(next(iter(plans.values())).mechanism.noise_multiplier, select.honest(len(plans), settings))


def sent(settings: Settings, size: int, clients: int, grid: Grid | None = None) -> int:
    """Bytes that one client sends in a round for its update (P,), every stage of a masked sum among them.

    clients: of the fleet; the number of neighbours is that of the cohort expected, of whom nobody drops. grid: of any
    round, where clients add noise to their integers.
    """
    if settings.protect.mode == "masked":
        drawn, rules = select.cohort_size(clients, settings), exposure.rules(settings, size, clients, grid)
        return sum(lengths.sent(drawn, rules).values())
    return upload.size(settings, size, grid)


def told(settings: Settings, size: int, grid: Grid | None, clients: int, runtime: str) -> dict[str, Any]:
    """What the report says of how updates (P,) travel, and of who can learn what of them; clients: of the fleet."""
    mode, degree = settings.protect.mode, None
    if mode == "masked":
        degree = roster.degree(select.cohort_size(clients, settings), exposure.rules(settings, size, clients))
    encryption = upload.encryption(settings, size, grid) if mode == "encrypted" else None
    return {
        "mode": mode,
        "trust": encryption.trust if encryption else None,
        "parameters": str(encryption) if encryption else None,
        "security_bits": encryption.security_bits if encryption else None,
        "values": size,
        "values_sent": upload.values(settings, size),
        "bits": grid.bits if grid else None,
        "range": grid.limit if grid else None,
        "rotated": grid.rotation is not None if grid else None,
        "norm": grid.norm if grid and grid.clip else None,
        "max_clients": grid.clients if grid else None,
        "minimum": select.least_summed(clients, settings) if mode != "none" or settings.privacy.by_shares else None,
        "neighbours": degree.neighbours if degree else None,
        "threshold": degree.threshold if degree else None,
        "quorum": degree.quorum if degree else None,
        "upload_bytes_per_client": sent(settings, size, clients, grid),
        "who_learns": exposure.who_learns(settings, size, clients, runtime),
    }
