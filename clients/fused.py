"""Local SGD of clients one after another through one model, whose weights move as soon as their gradient is known.

The same steps as clients/sgd.py, to rounding, and cheaper: the model is built once a block, a weight moves while its
gradient is still in the cache, and the gradient of a linear layer is added to its weight without being stored. Layers
see images channels last, which convolutions and pooling on a CPU are fastest with, and a ReLU in front of a pooling of
maxima acts behind it: the same values and gradients of a fourth of the entries.

Legend: P is the number of entries of a model's state, N of examples.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clients import placement, stack

Loss = Callable[[Tensor, Tensor], Tensor]
Along = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pulls:
    """How weights move beside the gradient: w <- keep w + back w_0 - rate g.

    With momentum: u <- momentum u - (1 - keep) w + back w_0 - rate g, from 0 in every round, and w <- w + u.
    """

    rate: float
    keep: float = 1.0
    back: float = 0.0
    momentum: float = 0.0

    @classmethod
    def of(cls, rate: float, proximal: float, weight_decay: float, momentum: float = 0.0) -> "Pulls":
        """Of SGD whose gradient gets proximal (w - w_0) + weight_decay w added."""
        return cls(rate, 1 - rate * (proximal + weight_decay), rate * proximal, momentum)

    def moved(self, w: Tensor, start: Tensor, u: Tensor | None) -> Tensor:
        """What -rate times the gradient is to be added to, all else being in it: `w`, or of momentum `u`.

        start: w_0. u: None without momentum; with it, it is for the caller to add it to w afterwards.
        """
        if u is not None:
            u.mul_(self.momentum)
            if self.keep != 1:
                u.sub_(w, alpha=1 - self.keep)
        elif self.keep != 1:
            w.mul_(self.keep)
        to = w if u is None else u
        return to.add_(start, alpha=self.back) if self.back else to


class Trainer:
    """One model for all clients of a block."""

    def __init__(self, model: nn.Module, pulls: Pulls, bf16: bool = False) -> None:
        """model: taken over, and changed."""
        self._pulls, self._bf16 = pulls, bf16
        self._images = any(isinstance(module, nn.Conv2d) for module in model.modules())
        if self._images:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        state = model.state_dict(keep_vars=True)
        self._entries = [entry for entry in state.values() if entry.is_floating_point()]
        self._counters = [(entry, entry.clone()) for entry in state.values() if not entry.is_floating_point()]
        self._starts: list[Tensor] = []
        self._velocities = [torch.zeros_like(entry) for entry in self._entries] if pulls.momentum else []
        self._corrections: dict[int, Tensor] = {}
        fused = {id(linear): _Fused(linear, self._move, pulls.rate) for linear in stack.linear(model)}
        self.model = _with(model, fused)
        self._update: Tensor | None = None
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._step)  # type: ignore[no-untyped-call]
        self._places = {id(entry): i for i, entry in enumerate(self._entries)}

    def train(
        self,
        start: Tensor,
        x: Tensor,
        y: Tensor,
        batches: Iterable[Tensor],
        loss: Loss,
        correction: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """(the update (P,) from the weights `start` (P,), the steps taken: one a batch of indices into x and y).

        correction: (P,) added to every gradient. The next call overwrites the update.
        """
        x, steps = self.begin(start, x, y, correction), 0
        for batch in batches:
            with self._precision():
                outputs = self.model(x[batch])
            torch.autograd.backward(loss(outputs.to(start.dtype), y[batch]))
            steps += 1
        return self.update(), steps

    def begin(self, start: Tensor, x: Tensor, y: Tensor, correction: Tensor | None = None) -> Tensor:
        """The model at the weights `start` (P,), for examples x and y; returns x as the model is fastest with it."""
        placement.agree(start, x, y, self._entries[0].device)
        self._starts = self._views(start)
        self._corrections = {} if correction is None else dict(enumerate(self._views(correction)))
        if self._images and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for entry, first in zip(self._entries, self._starts, strict=True):
                entry.copy_(first)
            for counter, first in self._counters:
                counter.copy_(first)
            for velocity in self._velocities:
                velocity.zero_()
        self.model.train()
        return x

    def update(self) -> Tensor:
        """The update (P,) from where the model began to where it is now; the next call overwrites it."""
        if self._update is None:
            self._update = torch.cat([torch.empty_like(start).flatten() for start in self._starts])
        with torch.no_grad():
            for entry, first, part in zip(self._entries, self._starts, self._views(self._update), strict=True):
                torch.sub(entry, first, out=part)
        return self._update

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat` (P,), each of its entry's shape."""
        parts = torch.split(flat, [entry.numel() for entry in self._entries])
        return [part.view(entry.shape) for part, entry in zip(parts, self._entries, strict=True)]

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._entries[0].device.type, torch.bfloat16) if self._bf16 else nullcontext()

    def _step(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        with torch.no_grad():
            self._move(parameter, lambda to: to.sub_(gradient, alpha=self._pulls.rate))

    def _move(self, entry: Tensor, along: Along) -> None:
        """One step of `entry`; `along` adds -rate times its gradient."""
        i = self._places[id(entry)]
        velocity = self._velocities[i] if self._velocities else None
        to = self._pulls.moved(entry, self._starts[i], velocity)
        if i in self._corrections:
            to.sub_(self._corrections[i], alpha=self._pulls.rate)
        along(to)
        if velocity is not None:
            entry.add_(velocity)


class _Fused(nn.Module):
    """A linear layer whose backward pass moves its own weights, which are no parameters of it: none has a gradient."""

    def __init__(self, linear: nn.Linear, move: Callable[[Tensor, Along], None], rate: float) -> None:
        super().__init__()
        self.kept = (linear.weight, linear.bias)
        self.move, self.rate = move, rate

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self, ANCHOR)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    """The gradient of a weight is what came back to the outputs times the inputs: added to it, never stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Fused, anchor: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        weight, bias = layer.kept
        if weight.numel() < OUTGROWN or x.dim() != 2 or x.dtype != weight.dtype:
            return nn.functional.linear(x, weight, bias)
        made = weight @ x.T if bias is None else torch.addmm(bias[:, None], weight, x.T)
        return made.T

    @staticmethod
    def backward(ctx: Any, *back: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), (weight, bias) = ctx.saved_tensors, ctx.layer.kept
        further = back[0] @ weight.to(back[0].dtype) if ctx.needs_input_grad[0] else None
        rows = back[0].reshape(-1, weight.shape[0]).to(weight.dtype)
        into, rate = x.reshape(-1, weight.shape[1]).to(weight.dtype), ctx.layer.rate
        ctx.layer.move(weight, lambda to: to.addmm_(rows.T, into, alpha=-rate))
        if bias is not None:
            ctx.layer.move(bias, lambda to: to.sub_(rows.sum(0), alpha=rate))
        return (None if further is None else further.to(x.dtype)), None, None


OUTGROWN = 1 << 19
"""Entries of a weight that is read faster in its own order: from 2 MB on, it is no longer in a core's cache."""
ANCHOR = torch.zeros((), requires_grad=True)
"""An input that asks for a backward pass where the examples do not."""


def _with(module: nn.Module, fused: Mapping[int, nn.Module]) -> nn.Module:
    """`module`, a chain, with its linear layers replaced, and pooling of maxima in front of a ReLU."""
    if id(module) in fused:
        return fused[id(module)]
    if type(module) is nn.Sequential:
        parts = [_with(part, fused) for part in module]
        for i in range(len(parts) - 1):
            one, two = parts[i : i + 2]
            if type(one) is nn.ReLU and type(two) is nn.MaxPool2d and not stack.hooked(one) and not stack.hooked(two):
                parts[i : i + 2] = [two, one]
        return nn.Sequential(*parts)
    return module
