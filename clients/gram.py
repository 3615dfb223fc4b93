"""Local SGD of a block of clients through a stack of linear layers, without ever forming a client's weights.

Every gradient of a linear layer is a sum of outer products, one an example: of what came back to its outputs and what
went into it. So the weights of client k before its step t are W_t = a_t W_0 - D^T A, with A (R, inputs) all that went
into the layer in its steps so far, D (R, outputs) what came back, scaled by the rate (and, with pulls towards the
round's weights or zero, by what is left of them). Forward and backward passes need only W_0, which all clients of a
round share, and the products A A^T and D D^T, which are small: few large matrix products instead of many small ones
that read and write weights. What comes out is the block's sum of weighted updates, one more product a layer, or single
updates where they are asked for.

It pays where a client sees few examples a round: `pays`.

Legend: K clients of the block, T steps of the longest, B examples of the largest batch, R = T B rows, P weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clients import placement, stack
from clients.fused import Pulls
from clients.stack import Stack


@dataclass(frozen=True)
class Batches:
    """What the clients of a block train on, step after step."""

    x_KRX: Tensor
    """(K, R, ...) examples; row t B + i is the i-th of step t."""
    y_KR: Tensor
    live_KTB: Tensor | None
    """Which rows are examples, where some are only there to fill up; None: all."""
    steps: tuple[int, ...]
    """Steps of each client, at most T."""
    batch: int
    """B."""


_WORTH = 4
"""How many multiplications of small products cost as much as one of those that read and move a client's weights."""


def pays(chain: Stack, rows: int) -> bool:
    """Whether so many examples a client and round cost less this way than through weights of the client's own.

    A row meets the rows before it, half of `rows` on average, in both directions; weights would be met, and moved, by
    every row: counted in multiplications, of which the many small products of the other way take longer.
    """
    small = sum(rows / 2 * 2 * (layer.inputs + layer.outputs) for layer in chain.layers)
    return small <= _WORTH * sum(layer.inputs * layer.outputs for layer in chain.layers)


@dataclass(frozen=True)
class Trained:
    """The updates of a block, not yet multiplied out."""

    chain: Stack
    start: Tensor
    """(P,) the round's weights."""
    inputs: Sequence[Tensor]
    """A of each layer, (K, R, inputs)."""
    returned: Sequence[Tensor]
    """D of each layer, (K, R, outputs)."""
    kept: Sequence[float]
    """a of each client after its last step."""

    def total(self, weights: Sequence[float]) -> Tensor:
        """(P,) the sum over the clients of `weights` times their updates."""
        made = torch.zeros_like(self.start)
        (scale,) = placement.sent(made.device, torch.tensor(weights, dtype=made.dtype))
        made.add_(self.start, alpha=sum(w * (a - 1) for w, a in zip(weights, self.kept, strict=True)))
        for layer, a, d in zip(self.chain.layers, self.inputs, self.returned, strict=True):
            weight, bias = layer.of(made)
            scaled = d if all(w == 1 for w in weights) else d * scale[:, None, None]
            rows = scaled.reshape(-1, layer.outputs)
            weight.addmm_(rows.T, a.reshape(-1, layer.inputs), alpha=-1)
            if bias is not None:
                bias.sub_(rows.sum(0))
        return made

    def update(self, k: int) -> Tensor:
        """The update (P,) of client `k` of the block."""
        made = self.start * (self.kept[k] - 1)
        for layer, a, d in zip(self.chain.layers, self.inputs, self.returned, strict=True):
            weight, bias = layer.of(made)
            weight.addmm_(d[k].T, a[k], alpha=-1)
            if bias is not None:
                bias.sub_(d[k].sum(0))
        return made


@torch.no_grad()
def train(
    chain: Stack, start: Tensor, batches: Batches, loss: Callable[[Tensor, Tensor], Tensor], pulls: Pulls
) -> Trained:
    """SGD of every client from the weights `start` (P,) over its batches.

    loss: a plain mean over examples, as `dp_sgd.apart` says of it; one that weighs them against each other is not.
    """
    placement.agree(start, batches.x_KRX, batches.y_KR)
    weights, K, B = [layer.of(start) for layer in chain.layers], len(batches.steps), batches.batch
    x = chain.functions[0](batches.x_KRX.flatten(0, 1)).view(K, batches.y_KR.shape[1], -1)
    R = x.shape[1]
    inputs = [x] + [start.new_empty(K, R, layer.inputs) for layer in chain.layers[1:]]
    returned = [start.new_empty(K, R, layer.outputs) for layer in chain.layers]
    first = _forward(weights[0], x)  # of all steps at once: nothing of x depends on a step
    products = torch.bmm(x, x.transpose(1, 2))
    paces = _paces(batches, R // B, pulls, start)
    for t in range(R // B):
        now, before = slice(t * B, (t + 1) * B), slice(0, t * B)

        # forward: W_t a = a_t W_0 a - D (A a), and what each function needs to go back
        passed = []
        for i, function in enumerate(chain.functions[1:]):
            if i == 0:
                outputs, met = first[:, now], products[:, now, before]
            else:
                outputs, met = _forward(weights[i], inputs[i][:, now]), None
            if paces.kept is not None:
                outputs = outputs * paces.kept[t]
            if t:
                met = torch.bmm(inputs[i][:, now], inputs[i][:, before].transpose(1, 2)) if met is None else met
                if weights[i][1] is not None:
                    met = met + 1
                outputs = torch.baddbmm(outputs, met, returned[i][:, before], alpha=-1)
            passed.append(stack.passed(function, outputs.reshape(K * B, -1)))
            if i + 1 < len(chain.layers):
                inputs[i + 1][:, now] = passed[i][1].view(K, B, -1)

        # backward, from every example's own loss to what came back to each layer's outputs
        back = stack.slopes(loss, passed[-1][1], batches.y_KR[:, now].reshape(-1)).view(K, B, -1)
        back = _averaged(back, batches, t)
        for i in reversed(range(len(chain.layers))):
            back = stack.back_through(passed[i], back.reshape(K * B, -1)).view(K, B, -1)
            returned[i][:, now] = back
            if i:
                further = torch.matmul(back, weights[i][0])
                if paces.kept is not None:
                    further = further * paces.kept[t]
                if t:
                    met = torch.bmm(back, returned[i][:, before].transpose(1, 2))
                    further = torch.baddbmm(further, met, inputs[i][:, before], alpha=-1)
                back = further
        _move(returned, paces, B, t, pulls.rate)
    return Trained(chain, start, inputs, returned, paces.last)


def _forward(weights: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, *weights)


def _averaged(back: Tensor, batches: Batches, t: int) -> Tensor:
    """What comes back of each client's mean over its own batch; rows that fill up bring nothing."""
    if batches.live_KTB is None:
        return back / batches.batch
    live = batches.live_KTB[:, t]
    count = live.sum(1).clamp_min(1)
    return torch.where(live[:, :, None], back / count[:, None, None], 0.0)


@dataclass(frozen=True)
class _Paces:
    """How each client's weights shrink, which its steps alone decide; known before the first."""

    last: Sequence[float]
    """a of each client after its last step."""
    kept: Tensor | None = None
    """(T, K, 1, 1) a before each step; None: 1 throughout."""
    keep: Tensor | None = None
    """(T, K, 1, 1) what each step leaves of the weights; of who has taken all steps 1."""


def _paces(batches: Batches, T: int, pulls: Pulls, start: Tensor) -> _Paces:
    """Worked out here and sent at once, to where `start` is."""
    if pulls.keep == 1:
        return _Paces([1.0] * len(batches.steps))
    a = torch.ones(len(batches.steps), dtype=start.dtype)
    moves = torch.tensor([[t < steps for steps in batches.steps] for t in range(T)], dtype=start.dtype)
    keep, kept = 1 + moves * (pulls.keep - 1), list[Tensor]()
    for t in range(T):
        kept.append(a.clone())
        a.mul_(keep[t]).add_(moves[t], alpha=pulls.back)
    there = placement.sent(start.device, torch.stack(kept)[:, :, None, None], keep[:, :, None, None])
    return _Paces(a.tolist(), *there)


def _move(returned: Sequence[Tensor], paces: _Paces, B: int, t: int, rate: float) -> None:
    """One step of SGD, on what stands for the weights; who has taken all steps stands still."""
    for d in returned:
        if paces.keep is not None:
            d[:, : t * B].mul_(paces.keep[t])
        d[:, t * B : (t + 1) * B].mul_(rate)
