"""Memory: what a process that trains blocks takes of it, and how much of it this machine has left.

Legend: P is the number of weights.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from clients import private_stack
from clients.stack import read
from clients.task import Way
from clients.together import MOST, large
from clients.training import Node
from clients.ways import rows

_PROCESS = 24 << 20
"""What a forked process writes of the pages that it shares with its parent, and of torch's own: measured."""
_OWN = 40
"""Bytes a weight: the round's weights, the model, an update and a gradient in 4 bytes, three sums in 8."""
_SAMPLES = 1 << 26
"""Gradients of single examples that Opacus holds at once, at most (privacy/dp_sgd.py)."""


def need(node: Node, way: Way, block: int, examples: int, steps: int, payload: int, together: int | None = None) -> int:
    """About how many bytes a process takes for itself, for blocks of clients that have at most so many examples.

    payload: bytes of the update that each of them leaves until the block is done; 0: their sum is made in its place.
    together: how many examples a block has at most; None: so many times its clients.
    """
    held = block * examples if together is None else together
    local, model = node.settings.local, node.template
    weights: int = sum(entry.numel() for entry in model.state_dict().values())
    batch, count = min(local.batch or examples, examples), rows(local, examples, steps)
    if node.settings.privacy.by_example:
        batch = min(examples, batch + math.ceil(3 * batch**0.5))  # a Poisson sample's size varies
    one: int = sum(part[:1].numel() * part.element_size() for part in node.federation.validation)
    taken = _PROCESS + _OWN * weights + held * one + block * payload
    if local.momentum:
        taken += 4 * weights
    if way.name in ("gram", "rows"):
        chain = read(model)
        assert chain is not None
        wide = sum(layer.inputs + layer.outputs for layer in chain.layers)
        if way.name == "rows":  # of those trained together: weights, examples, a sample and what comes back of it
            some = min(block, private_stack.together(chain))
            own = 4 * weights * (2 if local.momentum else 1)
            return taken + 4 * weights + some * (own + 4 * 3 * batch * wide) + min(held, some * examples) * one
        beside = chain.layers[0].inputs + chain.layers[0].outputs + max(layer.outputs for layer in chain.layers)
        return taken + 4 * block * count * (wide + beside + 2 * count)
    if way.name == "single" and node.settings.privacy.by_example:
        batch = min(batch, max(1, _SAMPLES // weights))
        taken += 2 * 4 * batch * weights
    left = 3 * _saved(node, batch)
    if way.name == "fused" and not payload and (shared := large(model, count)):
        side = min(block, MOST)  # each with what a batch leaves but for shared weights, and all that their layers see
        apart = _saved(node, batch) - sum(4 * layer.in_features * layer.out_features for layer in shared)
        seen = sum(layer.in_features + layer.out_features for layer in shared)
        left = max(left, (1 + side) * apart + 4 * side * count * seen)  # one after another where one fails
    return taken + left


def _saved(node: Node, batch: int) -> int:
    """Bytes that a forward pass of so many examples keeps for the way back."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model, (x, y) = copy.deepcopy(node.template).eval(), node.federation.validation
    some = torch.arange(batch) % len(y)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        node.scenario.loss(model(x[some]), y[some])
    return sum(kept.values())


def available() -> int | None:
    """Bytes that this process and its children may still take, by the machine and its control groups; None: unknown."""
    return min([*_machine(), *_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))], default=None)


def _machine() -> Iterator[int]:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10


def _groups(mount: Path, groups: Path) -> Iterator[int]:
    """What is left below the limit of each group that this process is in, of both versions; cached files are left."""
    for line in _lines(groups):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mount / controllers
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        inner = top / path.strip().lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(top):
                break
            limit, used = (_lines(folder / name) for name in names[:2])
            cached = [line.split()[1] for line in _lines(folder / "memory.stat") if line.split()[0] == names[2]]
            if limit and used and limit[0].isdigit():
                yield max(0, int(limit[0]) - int(used[0]) + sum(map(int, cached)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
