"""Blocks: many clients of a round trained at once, as training them one by one would, up to rounding.

A round's tasks are cut into blocks that depend on the number of tasks alone. A block is trained on one thread, in
whatever process, and its replies carry either every client's own payload or, where the server wants a mean of floats,
the block's sum: then no single update is encoded, sent or read.

How a client is trained, clients/ways.py says, and every reply carries it: under example-level DP by its rows where the
model is a stack of linear layers (clients/private_stack.py), else through Opacus, one by one; without DP through Gram
matrices where that pays (clients/gram.py), else through one model for all (clients/fused.py).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from clients import answers, groups, placement, reading, training, upload
from clients.answers import Weigh
from clients.task import Reply, Task
from clients.training import Admitted, Node
from clients.workers import Room, Work
from privacy import dp_sgd
from privacy.refused import Refused
from scenarios.settings import Local, Settings

_MOST = 25
"""Clients of a block where local.block leaves it open: with more, what their layers see outgrows the caches."""


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


def answer(node: Node, tasks: Sequence[Task], weigh: Weigh | None = None, room: Room | None = None) -> list[Reply]:
    """One reply a task, in order. weigh: sum the updates, so weighted; None: each reply carries its own payload.

    room: where the sum is to lie.
    """
    with training.one_thread(), placement.exactly(placement.of(node.settings)):
        read = reading.together(node.federation, [task.client for task in tasks])
        begun = [training.guarded(task, partial(_admitted, node, task, read)) for task in tasks]
        replies = {one.client: one for one in begun if isinstance(one, Reply)}
        ready = [one for one in begun if isinstance(one, Admitted)]
        summed = None if weigh is None else answers.Sum(node, weigh, room)
        for group in groups.groups(node, ready):
            made = summed.take(group) if summed else answers.singly(node, group)
            replies |= {one.client: one for one in made}
    inorder = [replies[task.client] for task in tasks]
    return inorder if summed is None else summed.carried(inorder)


def work(node: Node, tasks: Sequence[Task], room: Room | None = None) -> list[Reply]:
    """What a worker makes of a block: at once where it is to train, else one by one; summed where the server sums.

    room: where the sum is to lie.
    """
    if node.settings.local.engine == "single" or tasks[0].kind != "train":
        return [training.answer(node, task) for task in tasks]
    return answer(node, tasks, weigh(node.settings), room)


def forked(node: Node) -> Work:
    """`work` for processes that are forked from here on; what each would load at need is loaded now, once for all."""
    if node.settings.privacy.by_example:
        dp_sgd.load()
    return partial(work, node)


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


def _admitted(node: Node, task: Task, read: reading.Read) -> Admitted:
    check(node.settings.local)  # a device may lack what the server's machine has
    return training.admitted(node, task, read)


def check(local: Local) -> None:
    """Raises Refused for a setting of blocks without blocks, and for a precision that this machine lacks."""
    if local.engine == "single":
        for name, usual in (("block", 0), ("precision", "float32"), ("fallback", "single")):
            if (value := getattr(local, name)) != usual:
                raise Refused(
                    f"local.{name}={value} is for local.engine=cohort: set it too, or leave local.{name}={usual}"
                )
    if local.precision == "bf16" and local.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise Refused("local.precision=bf16 needs a processor with bf16 (AVX-512): this one has float32 alone")


def told(settings: Settings, tasks: int, alone: bool = False) -> dict[str, Any]:
    """How a round of so many tasks is trained, for its row and the report; alone: each on a device of its own."""
    local, whole = settings.local, [Task("train", 0, "", np.zeros(0, np.float32), ())] * tasks
    told = {"name": local.engine, "precision": local.precision, "device": placement.name(settings), "threads": 1}
    if local.engine == "single":
        return told | {"block": 1, "processes": 1, "trained": []}
    largest = max(map(len, cut(whole, 1 if alone else local.block)), default=0)
    count = 1 if alone else placement.processes(settings)
    return told | {"block": largest, "processes": count, "trained": []}
