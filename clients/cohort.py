"""Blocks: many clients of a round trained at once, as training them one by one would, up to rounding.

A round's tasks are cut into blocks that depend on the number of tasks alone. A block is trained on one thread, in
whatever process, and its replies carry either every client's own payload or, where the server wants a mean of floats,
the block's sum: then no single update is encoded, sent or read.

How a client is trained, clients/ways.py says, and every reply carries it: under example-level DP by its rows where the
model is a stack of linear layers (clients/private_stack.py), else through Opacus, one by one; without DP through Gram
matrices where that pays (clients/gram.py), else through one model for all (clients/fused.py).

Legend: P is the number of weights; K clients, R rows, B and T as in clients/gram.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients import fused, gram, private_stack, sgd, stack, training, upload, workers
from clients.codecs import CodecError
from clients.task import Reply, Summand, Task, Way
from clients.training import Admitted, Node
from clients.ways import Ways, rows
from privacy import dp_sgd
from privacy.refused import Refused
from scenarios.seeds import derive
from scenarios.settings import Local, Settings
from scenarios.weights import Vector

Weigh = Callable[[int], float]
"""Examples of a client -> what its update weighs in a sum."""

_MOST = 25
"""Clients of a block where local.block leaves it open: with more, what their layers see outgrows the caches."""
_WASTE = 2
"""Clients share one pass where the longest of them has at most so many times the rows of the shortest."""


def cut(tasks: Sequence[Task], size: int) -> list[Sequence[Task]]:
    """The blocks of `tasks`, in order: of `size` each or, for 0, an even number of them, of nearly equal size.

    Even, so that two processes have as much to do; nothing of the machine changes a block.
    """
    if not tasks:
        return []
    count = -(-len(tasks) // size) if size else min(len(tasks), 2 * -(-len(tasks) // (2 * _MOST)))
    if size:
        return [tasks[at : at + size] for at in range(0, len(tasks), size)]
    ends = [len(tasks) * i // count for i in range(count + 1)]
    return [tasks[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def answer(node: Node, tasks: Sequence[Task], weigh: Weigh | None = None) -> list[Reply]:
    """One reply a task, in order. weigh: sum the updates, so weighted; None: each reply carries its own payload."""
    with training.one_thread():
        begun = [training.guarded(task, partial(_admitted, node, task)) for task in tasks]
        replies = {one.client: one for one in begun if isinstance(one, Reply)}
        ready = [one for one in begun if isinstance(one, Admitted)]
        summed = None if weigh is None else _Sum(node, weigh)
        for group in _groups(node, ready):
            made = summed.take(group) if summed else _singly(node, group)
            replies |= {one.client: one if one.reason else replace(one, way=group.way) for one in made}
    inorder = [replies[task.client] for task in tasks]
    return inorder if summed is None else summed.carried(inorder)


def work(node: Node, tasks: Sequence[Task]) -> list[Reply]:
    """What a worker makes of a block: at once where it is to train, else one by one; summed where the server sums."""
    if node.settings.local.engine == "single" or tasks[0].kind != "train":
        return [training.answer(node, task) for task in tasks]
    return answer(node, tasks, weigh(node.settings))


def weigh(settings: Settings) -> Weigh | None:
    """What a client of so many examples weighs in a sum of floats; None where the server looks at single updates."""
    sums = settings.server.combine == "mean" and not settings.server.normalize and not settings.local.scaffold
    if not sums or settings.codec != "float32" or upload.bits(settings) is not None:
        return None
    alike = settings.privacy.by_client or settings.server.weighting == "uniform"
    return lambda examples: 1.0 if alike else float(examples)


def alone(node: Node, task: Task) -> Reply:
    """A task by itself, as a device gets it; with local.engine=cohort what a block makes of it, to rounding."""
    if node.settings.local.engine == "single" or task.kind != "train":
        return training.answer(node, task)
    return answer(node, [task])[0]


def _admitted(node: Node, task: Task) -> Admitted:
    check(node.settings.local)  # a device may lack what the server's machine has
    return training.admitted(node, task)


def check(local: Local) -> None:
    """Raises Refused for a setting of blocks without blocks, and for a precision that this machine lacks."""
    if local.engine == "single":
        for name, usual in (("block", 0), ("precision", "float32"), ("fallback", "single")):
            if (value := getattr(local, name)) != usual:
                raise Refused(
                    f"local.{name}={value} is for local.engine=cohort: set it too, or leave local.{name}={usual}"
                )
    if local.precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Refused("local.precision=bf16 needs a processor with bf16 (AVX-512): this one has float32 alone")


def told(settings: Settings, tasks: int, alone: bool = False) -> dict[str, Any]:
    """How a round of so many tasks is trained, for its row and the report; alone: each on a device of its own."""
    local, whole = settings.local, [Task("train", 0, "", np.zeros(0, np.float32), ())] * tasks
    if local.engine == "single":
        return {"name": "single", "block": 1, "precision": "float32", "threads": 1, "processes": 1, "trained": []}
    largest = max(map(len, cut(whole, 1 if alone else local.block)), default=0)
    count = 1 if alone else workers.available(settings.run.processes)
    how = {"name": "cohort", "block": largest, "precision": local.precision, "threads": 1, "processes": count}
    return how | {"trained": []}


@dataclass(frozen=True)
class _Group:
    """Clients of a block that were trained alike."""

    way: Way
    members: Sequence[Admitted]
    updates: Sequence[Callable[[], tuple[Tensor, int]]]
    """What gives (the update (P,), the steps taken) of each; called in order, the next may overwrite it."""
    total: Callable[[Sequence[float]], Tensor] | None = None
    """(P,) the sum of weights times updates, where that is cheaper than they are; every step was taken."""


def _singly(node: Node, group: _Group) -> Iterator[Reply]:
    """Every client's own payload."""
    for mine, made in zip(group.members, group.updates, strict=True):
        yield training.guarded(mine.task, partial(_one, node, mine, made))


def _one(node: Node, mine: Admitted, made: Callable[[], tuple[Tensor, int]]) -> Reply:
    update, steps = made()
    return training.finished(node, mine, _vector(update), steps)


class _Sum:
    """The weighted sum of a block's updates; who has none to add is named in a reply of its own."""

    def __init__(self, node: Node, weigh: Weigh) -> None:
        self._node, self._weigh, self._weight = node, weigh, 0.0
        self._bytes = cache(partial(upload.size, node.settings))
        self._total: Tensor | None = None

    def take(self, group: _Group) -> list[Reply]:
        """The replies of `group`, whose updates are in the sum from here on."""
        clipped = any(mine.task.update_clip for mine in group.members)
        if group.total is not None and not clipped:
            weights = [self._weigh(len(mine.examples.y)) for mine in group.members]
            total = group.total(weights)
            if total.isfinite().all():
                self._add(total, 1.0, sum(weights))
                return [self._reply(mine, mine.task.steps, True) for mine in group.members]
        return [
            training.guarded(mine.task, partial(self._take, mine, made))
            for mine, made in zip(group.members, group.updates, strict=True)
        ]

    def _take(self, mine: Admitted, made: Callable[[], tuple[Tensor, int]]) -> Reply:
        whole, steps = made()
        if not steps:
            return training.finished(self._node, mine, _vector(whole), steps)
        update, within = training.protected(_vector(whole), mine.task, self._node.settings)
        if not np.isfinite(update).all():
            raise CodecError(f"an update must be finite: {np.count_nonzero(~np.isfinite(update))} entries are not")
        weight = self._weigh(len(mine.examples.y))
        self._add(torch.from_numpy(update), weight, weight)
        return self._reply(mine, steps, within)

    def _add(self, update: Tensor, times: float, weight: float) -> None:
        if self._total is None:
            self._total = torch.zeros(update.shape, dtype=torch.float64)
        self._total.add_(update, alpha=times)
        self._weight += weight

    def _reply(self, mine: Admitted, steps: int, within: bool) -> Reply:
        task, count = mine.task, len(mine.examples.y)
        summand = Summand(self._bytes(len(task.weights)), self._weigh(count))
        return Reply(task.round, task.client, b"", count, steps, within=within, summand=summand)

    def carried(self, replies: list[Reply]) -> list[Reply]:
        """`replies`, the last good one of which carries the sum."""
        for i in reversed(range(len(replies))):
            if (summand := replies[i].summand) is not None:
                assert self._total is not None
                replies[i] = replace(
                    replies[i], summand=replace(summand, total=self._total.numpy(), whole=self._weight)
                )
                break
        return replies


def _vector(update: Tensor) -> Vector:
    return update.numpy().astype(np.float32, copy=False)


def _groups(node: Node, ready: Sequence[Admitted]) -> Iterator[_Group]:
    """The clients of a block, those together that can be trained together."""
    if not ready:
        return
    model = training.fitted(node, ready[0].task)
    ways = Ways.of(node, model)
    chain, private, short, long = ways.chain, list[Admitted](), list[Admitted](), dict[Way, list[Admitted]]()
    for mine in ready:
        task = mine.task
        way = ways.at(len(mine.examples.y), task.steps, task.mechanism is not None, task.deadline > 0)
        if way.name == "single":
            yield _Group(way, [mine], [partial(_by_itself, node, mine)])
        elif way.name == "rows":
            private.append(mine)
        elif way.name == "gram":
            short.append(mine)
        else:
            long.setdefault(way, []).append(mine)
    if private:
        assert chain is not None
        yield from _private(node, chain, private)
    for part in _alike(node, short):
        assert chain is not None
        try:
            made = gram.train(
                chain, _start(part[0]), _batches(node, part), node.scenario.loss, _pulls(node, part[0].task)
            )
        except Exception:  # of one of them, who is told when trained by itself
            long.setdefault(ways.fused("a client beside it failed"), []).extend(part)
            continue
        updates = [partial(_of, made, k, mine.task.steps) for k, mine in enumerate(part)]
        yield _Group(Way("gram"), part, updates, made.total)
    if long:
        trainer = fused.Trainer(model, _pulls(node, ready[0].task), node.settings.local.precision == "bf16")
        for way, part in long.items():
            yield _Group(way, part, [partial(_by_fused, node, trainer, mine) for mine in part])


def _by_itself(node: Node, mine: Admitted) -> tuple[Tensor, int]:
    """As with local.engine=single."""
    update, steps = training.trained(node, mine)
    return torch.from_numpy(update), steps


def _private(node: Node, chain: stack.Stack, members: Sequence[Admitted]) -> Iterator[_Group]:
    """Under example-level DP, some at a time."""
    size = private_stack.together(chain)
    for part in (members[at : at + size] for at in range(0, len(members), size)):
        try:
            made = _by_rows(node, chain, part)
        except Exception:  # of one of them, who is told when trained by itself
            yield _Group(Way("rows"), part, [partial(_private_alone, node, chain, mine) for mine in part])
            continue
        yield _Group(
            Way("rows"),
            part,
            [partial(_taken, update, mine.task.steps) for update, mine in zip(made, part, strict=True)],
        )


def _by_rows(node: Node, chain: stack.Stack, members: Sequence[Admitted]) -> list[Tensor]:
    seed, clients = node.settings.privacy.noise_seed, list[private_stack.Private]()
    for mine in members:
        task = mine.task
        assert task.mechanism is not None
        random = dp_sgd.noise_generator(None if seed is None else derive(seed, "noise", task.round, task.client))
        clients.append(private_stack.Private(*mine.examples, task.steps, task.mechanism, random))
    first = members[0]
    told = node.scenario.loss, _pulls(node, first.task), first.task.clip
    return private_stack.train(chain, _start(first), clients, *told)


def _private_alone(node: Node, chain: stack.Stack, mine: Admitted) -> tuple[Tensor, int]:
    return _by_rows(node, chain, [mine])[0], mine.task.steps


def _taken(update: Tensor, steps: int) -> tuple[Tensor, int]:
    return update, steps


def _by_fused(node: Node, trainer: fused.Trainer, mine: Admitted) -> tuple[Tensor, int]:
    batches = sgd.shuffled(len(mine.examples.y), mine.task, node.settings)
    correction = None if mine.correction is None else torch.from_numpy(mine.correction)
    with training.drawing(node.settings, mine.task):
        return trainer.train(_start(mine), *mine.examples, batches, node.scenario.loss, correction)


def _of(made: gram.Trained, k: int, steps: int) -> tuple[Tensor, int]:
    return made.update(k), steps


def _start(mine: Admitted) -> Tensor:
    return torch.from_numpy(mine.task.weights)


def _pulls(node: Node, task: Task) -> fused.Pulls:
    local = node.settings.local
    return fused.Pulls.of(task.rate, local.proximal, local.weight_decay, local.momentum)


def _rows(node: Node, mine: Admitted) -> int:
    """R: the examples that a client's steps train on, were all batches full."""
    return rows(node.settings.local, len(mine.examples.y), mine.task.steps)


def _alike(node: Node, members: Sequence[Admitted]) -> Iterator[Sequence[Admitted]]:
    """`members` in parts of not too different rows, in their order: what is shorter is filled up."""
    left = list(members)
    while left:
        least = min(_rows(node, mine) for mine in left)
        yield [mine for mine in left if _rows(node, mine) <= _WASTE * least]
        left = [mine for mine in left if _rows(node, mine) > _WASTE * least]


def _batches(node: Node, members: Sequence[Admitted]) -> gram.Batches:
    cuts = [list(sgd.shuffled(len(mine.examples.y), mine.task, node.settings)) for mine in members]
    sizes = [[batch.shape[0] for batch in batches] for batches in cuts]
    T, B = max(map(len, sizes)), max(map(max, sizes))
    full = all(len(steps) == T and min(steps) == B for steps in sizes)
    x, y = members[0].examples
    make = torch.Tensor.new_empty if full else torch.Tensor.new_zeros
    x_KRX, y_KR = make(x, (len(members), T * B, *x.shape[1:])), make(y, (len(members), T * B))
    live_KTB = torch.zeros(len(members), T, B, dtype=torch.bool)
    for k, (mine, batches) in enumerate(zip(members, cuts, strict=True)):
        drawn = torch.cat(batches)
        if full:
            torch.index_select(mine.examples.x, 0, drawn, out=x_KRX[k])
            torch.index_select(mine.examples.y, 0, drawn, out=y_KR[k])
            continue
        for t, size in enumerate(sizes[k]):
            live_KTB[k, t, :size] = True
        rows = live_KTB[k].flatten().nonzero()[:, 0]
        x_KRX[k].index_copy_(0, rows, mine.examples.x[drawn])
        y_KR[k].index_copy_(0, rows, mine.examples.y[drawn])
    return gram.Batches(x_KRX, y_KR, None if full else live_KTB, tuple(map(len, sizes)), B)
