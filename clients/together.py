"""Local SGD of a few clients side by side, which share the passes over weights that are larger than a cache.

One after another (clients/fused.py), every client reads and moves large weights of its own in every step. Here they are
never formed: as in clients/gram.py, W_t = a_t W_0 - sum over s < t of c_ts D_s^T A_s, with A_s what went into the layer
in step s and D_s what came back. W_0 is everybody's, so a step reads it twice for all of them. Every other layer is a
client's own and moves as in clients/fused.py. What comes out is the weighted sum of their updates.

Legend: P is the number of weights, N of rows of a batch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from clients import stack
from clients.course import Course, course
from clients.fused import ANCHOR, OUTGROWN, Loss, Pulls, Trainer
from clients.stack import Layer
from scenarios import Examples

MOST = 5
"""Clients side by side: more would read W_0 hardly less often, and keep more of what a batch leaves."""
_OWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, *stack.BETWEEN)
"""Modules that treat a client's batch by itself and draw nothing: their order over clients is of no matter."""


def large(model: nn.Module, rows: int) -> list[nn.Linear]:
    """The layers that clients who meet so many rows a round do better to share; empty where they cannot.

    A row meets half the others on average, twice; a weight of the client's own would be read and moved in every step.
    """
    modules, flat, found = list(stack.chain(model)), False, list[nn.Linear]()
    if not all(type(module) in _OWN and not stack.hooked(module) for module in modules):
        return []
    once = {id(linear) for linear in stack.linear(model)}
    for module in modules:
        if type(module) is nn.Flatten:
            flat = (module.start_dim, module.end_dim) == (1, -1)  # one row an example, from here on
        if type(module) is nn.Linear and flat and id(module) in once:
            inputs, outputs = module.in_features, module.out_features
            if inputs * outputs >= max(OUTGROWN, rows * (inputs + outputs)):
                found.append(module)
    held = {id(parameter) for module in found for parameter in module.parameters()}
    return found if any(id(parameter) not in held for parameter in model.parameters()) else []  # else no model is left


@dataclass(frozen=True)
class Client:
    """One who trains: its examples, the batches of indices into them, and what its update weighs."""

    examples: Examples
    batches: Sequence[Tensor]
    weight: float


class Together:
    """Models for `MOST` clients, but for the layers that they share."""

    def __init__(self, model: nn.Module, shared: Sequence[nn.Linear], pulls: Pulls) -> None:
        """model: taken over, and changed. shared: of it, as `large` says."""
        self._pulls = pulls
        self._layers = [stack.place(model, linear) for linear in shared]
        entries = [entry for entry in model.state_dict(keep_vars=True).values() if entry.is_floating_point()]
        taken = {id(entry) for linear in shared for entry in (linear.weight, linear.bias)}
        ends = list(accumulate(entry.numel() for entry in entries))
        self._own = [
            slice(end - entry.numel(), end) for entry, end in zip(entries, ends, strict=True) if id(entry) not in taken
        ]
        bare = _without(model, {id(linear): _Shared() for linear in shared})
        self._trainers = [Trainer(copy.deepcopy(bare), pulls) for _ in range(MOST)]
        self._parts = [_between(trainer.model) for trainer in self._trainers]

    def add(self, total: Tensor, start: Tensor, clients: Sequence[Client], loss: Loss) -> None:
        """Add the weighted updates of at most `MOST` clients, from the weights `start` (P,) on, to `total` (P,)."""
        steps = [len(client.batches) for client in clients]
        way = course(self._pulls, max(steps))
        sizes = [[len(batch) for batch in client.batches] for client in clients]
        passes = [_Pass(layer, start, way, sizes) for layer in self._layers]
        own = torch.cat([start[part] for part in self._own])
        trainers = self._trainers[: len(clients)]
        xs = [
            trainer.begin(own, client.examples.x, client.examples.y)
            for trainer, client in zip(trainers, clients, strict=True)
        ]
        for t in range(max(steps)):
            live = [k for k in range(len(clients)) if t < steps[k]]
            made = [self._parts[k][0](xs[k][clients[k].batches[t]]) for k in live]
            for i, one in enumerate(passes):
                made = list(_Product.apply(ANCHOR, one, t, live, *made))  # type: ignore[no-untyped-call]
                made = [self._parts[k][i + 1](part) for k, part in zip(live, made, strict=True)]
            losses = [
                loss(part, clients[k].examples.y[clients[k].batches[t]]) for k, part in zip(live, made, strict=True)
            ]
            torch.autograd.backward(torch.stack(losses).sum())
        with torch.no_grad():
            weights = [client.weight for client in clients]
            for one, layer in zip(passes, self._layers, strict=True):
                one.add(*layer.of(total), weights)
            for trainer, weight in zip(trainers, weights, strict=True):
                moved = trainer.update()
                for part, more in zip(
                    self._own, torch.split(moved, [p.stop - p.start for p in self._own]), strict=True
                ):
                    total[part].add_(more, alpha=weight)


class _Pass:
    """One shared layer in a round of some clients."""

    def __init__(self, layer: Layer, start: Tensor, course: Course, sizes: Sequence[Sequence[int]]) -> None:
        """sizes: of each client's batches."""
        self._weight, self._bias = layer.of(start)
        self._course = course
        self._steps = [len(batches) for batches in sizes]
        rows = list(accumulate(map(sum, sizes), initial=0))
        self._ends = [list(accumulate(batches, initial=rows[k])) for k, batches in enumerate(sizes)]
        self._inputs = start.new_empty(rows[-1], layer.inputs)
        self._returned = start.new_full((rows[-1], layer.outputs), torch.nan)  # a sum with what never came is unsound
        self._sizes = [torch.tensor(batches) for batches in sizes]

    def forward(self, t: int, live: Sequence[int], xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs of the step's rows, which are kept, of each client (N, outputs)."""
        whole = torch.cat(list(xs))
        made, kept = nn.functional.linear(whole, self._weight, self._bias), float(self._course.kept[t])
        if kept != 1:
            made.mul_(kept)
        outputs = torch.split(made, [len(x) for x in xs])
        for k, x, output in zip(live, xs, outputs, strict=True):
            before, now = self._rows(k, t)
            self._inputs[now] = x
            if t:
                met = torch.mm(x, self._inputs[before].T)
                if self._bias is not None:
                    met.add_(1)
                output.addmm_(met.mul_(self._scale(k, t)), self._returned[before], alpha=-1)
        return outputs

    def backward(self, t: int, live: Sequence[int], came: Sequence[Tensor]) -> Sequence[Tensor]:
        """What comes back to the inputs of the step's rows of what `came` back to its outputs, which is kept."""
        made, kept = torch.mm(torch.cat(list(came)), self._weight), float(self._course.kept[t])
        if kept != 1:
            made.mul_(kept)
        further = torch.split(made, [len(one) for one in came])
        for k, one, to in zip(live, came, further, strict=True):
            before, now = self._rows(k, t)
            self._returned[now] = one
            if t:
                met = torch.mm(one, self._returned[before].T)
                to.addmm_(met.mul_(self._scale(k, t)), self._inputs[before], alpha=-1)
        return further

    def add(self, weight: Tensor, bias: Tensor | None, times: Sequence[float]) -> None:
        """Add the updates, so weighted, to `weight` (outputs, inputs) and `bias` (outputs,)."""
        ends = list(enumerate(self._steps))
        away = sum(times[k] * (float(self._course.kept[t]) - 1) for k, t in ends)
        scale = torch.cat([self._scale(k, t) * times[k] for k, t in ends])
        came = self._returned * scale[:, None]
        if away:
            weight.add_(self._weight, alpha=away)
        weight.addmm_(came.T, self._inputs, alpha=-1)
        if bias is not None and self._bias is not None:
            if away:
                bias.add_(self._bias, alpha=away)
            bias.sub_(came.sum(0))

    def _rows(self, k: int, t: int) -> tuple[slice, slice]:
        """(those of client k's steps before t, those of step t)."""
        return slice(self._ends[k][0], self._ends[k][t]), slice(self._ends[k][t], self._ends[k][t + 1])

    def _scale(self, k: int, t: int) -> Tensor:
        """c_ts of the rows of client k's steps s < t."""
        weights = torch.as_tensor(self._course.weights[t, :t], dtype=self._weight.dtype)
        return weights.repeat_interleave(self._sizes[k][:t])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, one: _Pass, t: int, live: Sequence[int], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.told = one, t, live
        return tuple(one.forward(t, live, xs))

    @staticmethod
    def backward(ctx: Any, *came: Tensor) -> tuple[Tensor | None, ...]:
        one, t, live = ctx.told
        return None, None, None, None, *one.backward(t, live, came)


class _Shared(nn.Module):
    """Where a layer is that clients share."""


def _without(module: nn.Module, instead: Mapping[int, nn.Module]) -> nn.Module:
    if id(module) in instead:
        return instead[id(module)]
    if type(module) is nn.Sequential:
        return nn.Sequential(*(_without(part, instead) for part in module))
    return module


def _between(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """What acts before, between and behind the shared layers."""
    parts: list[list[nn.Module]] = [[]]
    for module in stack.chain(model):
        if isinstance(module, _Shared):
            parts.append([])
        else:
            parts[-1].append(module)
    return [nn.Sequential(*part) for part in parts]
