"""Answers: what a block's groups make of its tasks, every client's own payload or the weighted sum of their updates.

Legend: P is the number of weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients import leaving, placement, training, upload
from clients.codecs import CodecError
from clients.groups import Group
from clients.task import Reply, Summand, Way
from clients.training import Admitted, Node
from scenarios.weights import Vector

Weigh = Callable[[int], float]
"""Examples of a client -> what its update weighs in a sum."""
_PART = 1 << 15
"""Entries that are added at once: torch makes a copy of them in float64, which is to stay in a core's cache."""


def singly(node: Node, group: Group) -> Iterator[Reply]:
    """Every client's own payload."""
    updates = leaving.updates(group.updates) if group.away else group.updates
    for mine, made in zip(group.members, updates, strict=True):
        yield training.guarded(mine.task, partial(_one, node, mine, made, group.way))


def _one(node: Node, mine: Admitted, made: Callable[[], tuple[Tensor, int]], way: Way) -> Reply:
    update, steps = made()
    reply = training.finished(node, mine, _vector(update), steps)
    return reply if reply.reason else replace(reply, way=way)


class Sum:
    """The weighted sum of a block's updates; who has none to add is named in a reply of its own."""

    def __init__(self, node: Node, weigh: Weigh, room: NDArray[np.float64] | None = None) -> None:
        """room: (P,) where the sum is to lie; None: in memory of its own."""
        self._node, self._weigh, self._weight, self._room = node, weigh, 0.0, room
        self._summand = cache(partial(_summand, node, weigh))
        self._total: NDArray[np.float64] | None = None

    def take(self, group: Group) -> list[Reply]:
        """The replies of `group`, whose updates are in the sum from here on."""
        clipped = any(mine.task.update_clip for mine in group.members)
        if group.total is not None and not clipped:
            weights = [self._weigh(mine.count) for mine in group.members]
            made = group.total(weights)
            if made is not None and np.isfinite(total := placement.fetched(made)).all():
                self._add(torch.from_numpy(total), 1.0, sum(weights))
                return [self._reply(mine, group.way, mine.task.steps, True) for mine in group.members]
        updates = group.updates
        if group.away:
            if not any(mine.task.update_noise for mine in group.members):
                return self._take_there(group)
            updates = leaving.updates(updates)
        return [
            training.guarded(mine.task, partial(self._take, mine, group.way, made))
            for mine, made in zip(group.members, updates, strict=True)
        ]

    def _take_there(self, group: Group) -> list[Reply]:
        """As `take`, of updates that are clipped and summed where they lie."""
        weights = [self._weigh(mine.count) for mine in group.members]
        total, parts = leaving.total(group.updates, weights, group.members[0].task.update_clip)
        if total is not None:
            counted = sum(w for w, part in zip(weights, parts, strict=True) if _counts(part))
            self._add(torch.from_numpy(total), 1.0, counted)
        return [
            training.guarded(mine.task, partial(self._told, mine, group.way, part))
            for mine, part in zip(group.members, parts, strict=True)
        ]

    def _told(self, mine: Admitted, way: Way, part: leaving.Part | Exception) -> Reply:
        if isinstance(part, Exception):
            raise part
        if part.unsound:
            raise _not_finite(part.unsound)
        return self._reply(mine, way, part.steps, part.within)

    def _take(self, mine: Admitted, way: Way, made: Callable[[], tuple[Tensor, int]]) -> Reply:
        whole, steps = made()
        if not steps:
            return training.finished(self._node, mine, _vector(whole), steps)
        update, within = training.protected(_vector(whole), mine.task, self._node.settings)
        if not np.isfinite(update).all():
            raise _not_finite(int(np.count_nonzero(~np.isfinite(update))))
        weight = self._weigh(mine.count)
        self._add(torch.from_numpy(update), weight, weight)
        return self._reply(mine, way, steps, within)

    def _add(self, update: Tensor, times: float, weight: float) -> None:
        if self._total is None:
            self._total = np.empty(len(update)) if self._room is None else self._room
            self._total.fill(0)
        for part, more in zip(
            torch.split(torch.from_numpy(self._total), _PART), torch.split(update, _PART), strict=True
        ):
            part.add_(more, alpha=times)
        self._weight += weight

    def _reply(self, mine: Admitted, way: Way, steps: int, within: bool) -> Reply:
        task, count = mine.task, mine.count
        summand = self._summand(len(task.weights), count)
        return Reply(task.round, task.client, b"", count, steps, within=within, summand=summand, way=way)

    def carried(self, replies: list[Reply]) -> list[Reply]:
        """`replies`, the last good one of which carries the sum."""
        for i in reversed(range(len(replies))):
            if (summand := replies[i].summand) is not None:
                assert self._total is not None
                replies[i] = replace(replies[i], summand=replace(summand, total=self._total, whole=self._weight))
                break
        return replies


def _summand(node: Node, weigh: Weigh, entries: int, examples: int) -> Summand:
    return Summand(upload.size(node.settings, entries), weigh(examples))


def _counts(part: leaving.Part | Exception) -> bool:
    return isinstance(part, leaving.Part) and not part.unsound


def _not_finite(entries: int) -> CodecError:
    return CodecError(f"an update must be finite: {entries} entries are not")


def _vector(update: Tensor) -> Vector:
    return update.numpy().astype(np.float32, copy=False)
