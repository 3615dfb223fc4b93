"""What came back in a round: checked one by one, read, and where it is of no use named in the round's row."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from clients import upload
from clients.roster import size
from clients.task import Hello, Reply, Task
from privacy import cohort_noise
from scenarios.settings import Settings
from server import combine, engine
from server.state import Row

Read = TypeVar("Read")


class _Asked(Protocol):
    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]: ...


class _Hears(Protocol):
    def heard(self, reply: Reply) -> None: ...


def counted(fleet: _Asked, row: Row, tasks: Sequence[Task]) -> Iterator[Reply]:
    """The fleet's replies, their bytes counted; those of what the protocol that hides updates says, too."""
    row["bytes_down"] += sum(len(task.protection.request) for task in tasks if task.protection)
    for reply in fleet.ask(tasks):
        row["bytes_up"] += reply.summand.bytes if reply.summand else len(reply.payload)
        engine.tally(row["engine"]["trained"], reply.way)
        yield reply


def good(
    replies: Iterable[Reply],
    read: Callable[[Task, Reply], Read],
    tasks: Sequence[Task],
    roster: Mapping[str, Hello],
    journal: _Hears,
    row: Row,
    accepted: dict[str, int],
) -> Iterator[Read]:
    """The replies that can be used, read; the others are named in `row`. Fills `accepted`: client -> steps taken."""
    for task, reply in zip(tasks, replies, strict=True):
        journal.heard(reply)
        try:
            if reply.late:
                row["late"].append(task.client)
                continue
            if reply.reason:
                raise ValueError(reply.reason)
            check(task, reply, size(roster, task.client))
            one = read(task, reply)
        except ValueError as error:
            row["rejected"].append({"name": task.client, "reason": str(error)})
            continue
        row["replies"] += 1
        accepted[task.client] = reply.steps
        yield one


def check(task: Task, reply: Reply, examples: int) -> None:
    """Raises ValueError for what a client that had so many examples at first cannot answer to `task`."""
    if (reply.round, reply.client) != (task.round, task.client):
        raise ValueError(f"answered for round {reply.round} of {reply.client!r}"[:200])
    least = 1 if task.deadline else task.steps  # nothing else stops a client early
    if not least <= reply.steps <= task.steps:
        raise ValueError(f"took {reply.steps} steps where {task.steps} were asked")
    if reply.examples != examples:
        raise ValueError(f"trained on {reply.examples} examples, had {examples} at first")


def summand(settings: Settings) -> Callable[[Task, Reply], combine.Part]:
    """How a reply is read whose update is in the sum of its block, or comes by itself."""
    single = reader(settings)

    def read(task: Task, reply: Reply) -> combine.Part:
        if reply.summand is not None:
            return combine.Part(reply.summand.weight, reply.within, reply.summand.total, reply.summand.whole)
        one = single(task, reply)
        heavy = 1.0 if settings.privacy.by_client else one.weight
        return combine.Part(heavy, one.within, one.update.astype(np.float64) * heavy, heavy)

    return read


def reader(settings: Settings) -> Callable[[Task, Reply], combine.Contribution]:
    """How a reply whose update travelled as floats is read."""

    def read(task: Task, reply: Reply) -> combine.Contribution:
        update = upload.decode(reply.payload, task, settings)
        if task.update_clip and not task.update_noise:  # noised by its client it is long, and may be
            update, _ = cohort_noise.clipped(update, task.update_clip)
        steps = combine.plain_steps(reply.steps, settings.local.momentum)
        return combine.Contribution(update, weight(reply.examples, settings), steps, reply.within)

    return read


def weight(examples: int, settings: Settings) -> float:
    """What a client with so many examples weighs in the mean."""
    return float(examples) if settings.server.weighting == "examples" else 1.0
