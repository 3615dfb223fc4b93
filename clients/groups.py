"""Groups: the clients of a block that are trained together, each by the way that clients/ways.py chooses.

Legend: P is the number of weights; K clients, R rows, B and T as in clients/gram.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clients import fused, gram, placement, private_stack, sgd, stack, together, training
from clients.reading import Held
from clients.task import Task, Way
from clients.training import Admitted, Node
from clients.ways import Ways, rows
from privacy import on_device
from scenarios import Examples
from scenarios.seeds import derive

_WASTE = 2
"""Clients share one pass where the longest of them has at most so many times the rows of the shortest."""


@dataclass(frozen=True)
class Group:
    """Clients of a block that were trained alike."""

    way: Way
    members: Sequence[Admitted]
    updates: Sequence[Callable[[], tuple[Tensor, int]]]
    """What gives (the update (P,), the steps taken) of each; called in order, the next may overwrite it."""
    total: Callable[[Sequence[float]], Tensor | None] | None = None
    """(P,) the sum of weights times updates, where that is cheaper than they are; every step was taken.

    None: a client failed, who is told when asked for its update.
    """
    away: bool = False
    """Whether the updates lie on a device: then they, or their sum, leave it together."""


def groups(node: Node, ready: Sequence[Admitted]) -> Iterator[Group]:
    """The clients of a block, those together that can be trained together."""
    if not ready:
        return
    there, first = placement.of(node.settings), ready[0].task
    (start,) = placement.sent(there, torch.from_numpy(first.weights))  # all tasks of a block have the same
    away = not start.is_cpu
    ways = Ways.fitting(node, first)
    chain, private, short, long = ways.chain, list[Admitted](), list[Admitted](), dict[Way, list[Admitted]]()
    for mine in ready:
        task = mine.task
        way = ways.at(mine.count, task.steps, task.mechanism is not None, task.deadline > 0)
        if way.name == "single":
            yield Group(way, [mine], [partial(_by_itself, node, mine)])
        elif way.name == "rows":
            private.append(mine)
        elif way.name == "gram":
            short.append(mine)
        else:
            long.setdefault(way, []).append(mine)
    if private:
        assert chain is not None
        yield from _private(node, chain, start, private)
    for part in _alike(node, short):
        assert chain is not None
        try:
            made = gram.train(chain, start, _batches(node, part, there), node.scenario.loss, _pulls(node, part[0].task))
        except torch.AcceleratorError:
            raise
        except Exception:  # of one of them, who is told when trained by itself
            long.setdefault(ways.fused("a client beside it failed"), []).extend(part)
            continue
        updates = [partial(_of, made, k, mine.task.steps) for k, mine in enumerate(part)]
        yield Group(Way("gram"), part, updates, made.total, away)
    if long:
        local, pulls, model = node.settings.local, _pulls(node, first), training.fitted(node, first)
        model = placement.moved(model, there)
        trainer = fused.Trainer(model, pulls, local.precision == "bf16")
        plain = not (away or local.scaffold or local.precision == "bf16")
        for way, part in long.items():
            shared = together.large(model, max(_rows(node, mine) for mine in part)) if plain else []
            total = partial(_side_by_side, node, model, shared, start, part, pulls) if shared else None
            yield Group(way, part, [partial(_by_fused, node, trainer, start, mine) for mine in part], total, away)


def _by_itself(node: Node, mine: Admitted) -> tuple[Tensor, int]:
    """As with local.engine=single."""
    update, steps = training.trained(node, mine)
    return torch.from_numpy(update), steps


def _private(node: Node, chain: stack.Stack, start: Tensor, members: Sequence[Admitted]) -> Iterator[Group]:
    """Under example-level DP, some at a time; on a device all, as it has no caches that they could outgrow."""
    away = not start.is_cpu
    size = len(members) if away else private_stack.together(chain)
    for part in (members[at : at + size] for at in range(0, len(members), size)):
        try:
            made = _by_rows(node, chain, start, part)
        except torch.AcceleratorError:
            raise
        except Exception:  # of one of them, who is told when trained by itself
            alone = [partial(_private_alone, node, chain, start, mine) for mine in part]
            yield Group(Way("rows"), part, alone, away=away)
            continue
        taken = [partial(_taken, update, mine.task.steps) for update, mine in zip(made, part, strict=True)]
        yield Group(Way("rows"), part, taken, away=away)


def _by_rows(node: Node, chain: stack.Stack, start: Tensor, members: Sequence[Admitted]) -> list[Tensor]:
    seed, clients = node.settings.privacy.noise_seed, list[private_stack.Private]()
    for mine in members:
        task = mine.task
        assert task.mechanism is not None
        own = None if seed is None else derive(seed, "noise", task.round, task.client)
        noise, draws = on_device.generators(own, start.device)
        x, y = placement.sent(start.device, *mine.examples)
        clients.append(private_stack.Private(x, y, task.steps, task.mechanism, noise, draws))
    first = members[0]
    return private_stack.train(chain, start, clients, node.scenario.loss, _pulls(node, first.task), first.task.clip)


def _private_alone(node: Node, chain: stack.Stack, start: Tensor, mine: Admitted) -> tuple[Tensor, int]:
    return _by_rows(node, chain, start, [mine])[0], mine.task.steps


def _taken(update: Tensor, steps: int) -> tuple[Tensor, int]:
    return update, steps


def _by_fused(node: Node, trainer: fused.Trainer, start: Tensor, mine: Admitted) -> tuple[Tensor, int]:
    there = start.device
    batches = placement.indices(sgd.shuffled(mine.count, mine.task, node.settings), there)
    (correction,) = (None,) if mine.correction is None else placement.sent(there, torch.from_numpy(mine.correction))
    x, y = placement.sent(there, *mine.examples)
    with training.drawing(node.settings, mine.task):
        return trainer.train(start, x, y, batches, node.scenario.loss, correction)


def _side_by_side(
    node: Node,
    model: nn.Module,
    shared: Sequence[nn.Linear],
    start: Tensor,
    members: Sequence[Admitted],
    pulls: fused.Pulls,
    weights: Sequence[float],
) -> Tensor | None:
    """The weighted sum (P,) of the members' updates; None: one of them failed."""
    made, total = together.Together(model, shared, pulls), torch.zeros_like(start)
    clients = [
        together.Client(mine.examples, list(sgd.shuffled(mine.count, mine.task, node.settings)), weight)
        for mine, weight in zip(members, weights, strict=True)
    ]
    try:
        for at in range(0, len(clients), together.MOST):
            made.add(total, start, clients[at : at + together.MOST], node.scenario.loss)
    except Exception:
        return None
    return total


def _of(made: gram.Trained, k: int, steps: int) -> tuple[Tensor, int]:
    return made.update(k), steps


def _pulls(node: Node, task: Task) -> fused.Pulls:
    local = node.settings.local
    return fused.Pulls.of(task.rate, local.proximal, local.weight_decay, local.momentum)


def _rows(node: Node, mine: Admitted) -> int:
    """R: the examples that a client's steps train on, were all batches full."""
    return rows(node.settings.local, mine.count, mine.task.steps)


def _alike(node: Node, members: Sequence[Admitted]) -> Iterator[Sequence[Admitted]]:
    """`members` in parts of not too different rows, in their order: what is shorter is filled up."""
    left = [(_rows(node, mine), mine) for mine in members]
    while left:
        most = _WASTE * min(count for count, _ in left)
        yield [mine for count, mine in left if count <= most]
        left = [(count, mine) for count, mine in left if count > most]


def _batches(node: Node, members: Sequence[Admitted], there: torch.device) -> gram.Batches:
    cuts = [list(sgd.shuffled(mine.count, mine.task, node.settings)) for mine in members]
    sizes = [[batch.shape[0] for batch in batches] for batches in cuts]
    K, T, B = len(members), max(map(len, sizes)), max(map(max, sizes))
    full = all(len(steps) == T and min(steps) == B for steps in sizes)
    (x, y), begins = _whole([mine.held for mine in members])
    drawn = torch.cat([batch for batches in cuts for batch in batches])
    drawn += torch.from_numpy(np.repeat(begins, [sum(steps) for steps in sizes]))
    x, y, live_KTB = x.index_select(0, drawn), y.index_select(0, drawn), None
    if not full:
        sizes_KT = torch.tensor([steps + [0] * (T - len(steps)) for steps in sizes])
        live_KTB = torch.arange(B) < sizes_KT[:, :, None]
        rows = live_KTB.flatten().nonzero()[:, 0]
        x, y = (part.new_zeros(K * T * B, *part.shape[1:]).index_copy_(0, rows, part) for part in (x, y))
        (live_KTB,) = placement.sent(there, live_KTB)
    x_KRX, y_KR = placement.sent(there, x.view(K, T * B, *x.shape[1:]), y.view(K, T * B))
    return gram.Batches(x_KRX, y_KR, live_KTB, tuple(map(len, sizes)), B)


def _whole(held: Sequence[Held]) -> tuple[Examples, NDArray[np.int64]]:
    """(the examples of all, the row with which each one's begin)."""
    if all(one.whole is held[0].whole for one in held):
        return held[0].whole, np.array([one.first for one in held])
    x, y = (torch.cat(parts) for parts in zip(*(one.examples for one in held), strict=True))
    return Examples(x, y), np.cumsum([0, *(one.count for one in held[:-1])])
