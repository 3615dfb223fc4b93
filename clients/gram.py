"""Local SGD of a block of clients through a stack of linear layers, without ever forming a client's weights.

Every gradient of a linear layer is a sum of outer products, one an example: of what came back to its outputs and what
went into it. So the weights of client k before its step t are W_t = a_t W_0 - sum over s < t of c_ts D_s^T A_s, with
A_s (B, inputs) what went into the layer in step s and D_s (B, outputs) what came back. The numbers a and c follow from
rate, momentum and pulls alone, and are the same for all clients: `Course`. Forward and backward passes need only W_0,
which all clients of a round share, and the products A A^T and D D^T, which are small: few large matrix products instead
of many small ones that read and write weights. What comes out is the block's sum of weighted updates, one more product
a layer, or single updates where they are asked for.

It pays where a client sees few examples a round: `most`.

Legend: K clients of the block, T steps of the longest, B examples of the largest batch, R = T B rows, P weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clients import placement, stack
from clients.course import course
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


def most(chain: Stack) -> int:
    """The most examples a client and round that cost less this way than through weights of the client's own.

    A row meets the rows before it, half of them on average, in both directions; weights would be met, and moved, by
    every row: counted in multiplications, of which the many small products of the other way take longer.
    """
    small = sum(layer.inputs + layer.outputs for layer in chain.layers)
    return _WORTH * sum(layer.inputs * layer.outputs for layer in chain.layers) // small


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
    weights: Tensor
    """(K, R) c of each client's rows after its last step, whatever of rows that only fill up; on the processor."""

    def total(self, weights: Sequence[float]) -> Tensor:
        """(P,) the sum over the clients of `weights` times their updates."""
        made, scale_KR = torch.zeros_like(self.start), self.weights * self.weights.new_tensor(weights)[:, None]
        made.add_(self.start, alpha=sum(w * (a - 1) for w, a in zip(weights, self.kept, strict=True)))
        even = float(scale_KR[0, 0]) if bool((scale_KR == scale_KR[0, 0]).all()) else None
        (scale_KR,) = (scale_KR,) if even is not None else placement.sent(made.device, scale_KR)
        for layer, a, d in zip(self.chain.layers, self.inputs, self.returned, strict=True):
            rows = (d if even is not None else d * scale_KR[:, :, None]).reshape(-1, layer.outputs)
            self._add(layer.of(made), rows, a.reshape(-1, layer.inputs), 1.0 if even is None else even)
        return made

    def update(self, k: int) -> Tensor:
        """The update (P,) of client `k` of the block."""
        made = self.start * (self.kept[k] - 1)
        (weights_R,) = placement.sent(made.device, self.weights[k])
        for layer, a, d in zip(self.chain.layers, self.inputs, self.returned, strict=True):
            self._add(layer.of(made), d[k] * weights_R[:, None], a[k], 1.0)
        return made

    @staticmethod
    def _add(to: tuple[Tensor, Tensor | None], rows: Tensor, a: Tensor, scale: float) -> None:
        weight, bias = to
        weight.addmm_(rows.T, a, alpha=-scale)
        if bias is not None:
            bias.sub_(rows.sum(0), alpha=scale)


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
    products = torch.bmm(x, x.transpose(1, 2)) if R > B else None  # a first step meets nothing
    way = course(pulls, R // B)
    alpha = -pulls.rate if way.even else -1.0
    if not way.even:
        here = torch.tensor(way.weights, dtype=start.dtype).repeat_interleave(B, 1)  # (T + 1, R)
        (weighed,) = placement.sent(start.device, here)
    for t in range(R // B):
        now, before, kept = slice(t * B, (t + 1) * B), slice(0, t * B), float(way.kept[t])

        # forward: W_t a = a_t W_0 a - D c (A a), and what each function needs to go back
        passed = []
        for i, function in enumerate(chain.functions[1:]):
            if i == 0:
                outputs, met = first[:, now], None if products is None else products[:, now, before]
            else:
                outputs, met = _forward(weights[i], inputs[i][:, now]), None
            if kept != 1:
                outputs = outputs * kept
            if t:
                met = torch.bmm(inputs[i][:, now], inputs[i][:, before].transpose(1, 2)) if met is None else met
                if weights[i][1] is not None:
                    met = met + 1
                if not way.even:
                    met = met * weighed[t, before]
                outputs = torch.baddbmm(outputs, met, returned[i][:, before], alpha=alpha)
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
                if kept != 1:
                    further = further * kept
                if t:
                    met = torch.bmm(back, returned[i][:, before].transpose(1, 2))
                    if not way.even:
                        met = met * weighed[t, before]
                    further = torch.baddbmm(further, met, inputs[i][:, before], alpha=alpha)
                back = further
    ends = list(batches.steps)  # who has taken all steps stands still
    last = torch.full((K, R), pulls.rate, dtype=start.dtype) if way.even else here[ends]
    return Trained(chain, start, inputs, returned, way.kept[ends].tolist(), last)


def _forward(weights: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, *weights)


def _averaged(back: Tensor, batches: Batches, t: int) -> Tensor:
    """What comes back of each client's mean over its own batch; rows that fill up bring nothing."""
    if batches.live_KTB is None:
        return back / batches.batch
    live = batches.live_KTB[:, t]
    count = live.sum(1).clamp_min(1)
    return torch.where(live[:, :, None], back / count[:, None, None], 0.0)
