"""Example-level DP-SGD of a stack of linear layers, without the examples' own gradients.

An example's gradient of a linear layer is one outer product, of what came back to its outputs and what went in, so its
squared norm is the product of theirs, and the clipped sum is one matrix product of rows scaled by what clips them
(Goodfellow 2015; Lee and Kifer 2021, "ghost clipping"). The samples, the noise and their account are those of
privacy/dp_sgd.py, whose `PrivateGradient` is the truth that this is tested against.

Guarantee: every step is one `Mechanism` step on the client's examples, add-or-remove-one adjacency, whoever sees the
weights, as there. An example whose gradient is not finite counts as zero.

Legend: P is the number of weights, K of clients, N of a client's examples, R of those of all clients' samples together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from clients import placement, stack
from clients.fused import Pulls
from clients.stack import Stack
from privacy import dp_sgd
from privacy.plan import Mechanism

_TINY = 1e-6
"""Added to a norm before it divides, as Opacus does."""
_ENTRIES = 1 << 21
"""Of the weights of clients that are trained together: 8 MB, which with their noise outgrow no processor's caches."""

Loss = Callable[[Tensor, Tensor], Tensor]
Rows = tuple[Tensor, Tensor]
"""What came back to a layer's outputs (R, outputs), and what went in (R, inputs); the sum over R is the gradient's."""
Weights = tuple[list[Tensor], list[Tensor] | None]
"""Of one layer, every client's own: (outputs, inputs) each, and biases (outputs,)."""


@dataclass(frozen=True)
class Private:
    """What one client trains on, x: (N, ...) and y: (N,), and how."""

    x: Tensor
    y: Tensor
    steps: int
    mechanism: Mechanism
    source: dp_sgd.Source
    """Of its noise, on the device of x."""
    draws: torch.Generator
    """Of its samples, on the processor; it may be the same."""


def together(chain: Stack) -> int:
    """How many clients are best trained at once: a large model's weights would push each other out of the caches."""
    return max(1, _ENTRIES // chain.size)


@torch.no_grad()
def train(
    chain: Stack, start: Tensor, clients: Sequence[Private], loss: Loss, pulls: Pulls, clip: float
) -> list[Tensor]:
    """The update (P,) of each client by its private steps from the weights `start` (P,).

    Their layers act on their own rows, all else on everybody's at once. loss: a plain mean over examples. Momentum sums
    up what was noised, and costs nothing.
    """
    for one in clients:
        placement.agree(start, one.x, one.y)
    weights_KP, noise = start.repeat(len(clients), 1), dp_sgd.Noise(start, partial(_parts, chain))
    x, y = chain.functions[0](torch.cat([one.x for one in clients])), torch.cat([one.y for one in clients])
    scales = [pulls.rate / (one.mechanism.sampling_rate * len(one.y)) for one in clients]
    velocities = torch.zeros_like(weights_KP) if pulls.momentum else None
    live = list[int]()
    for step in _sent(_steps(clients, scales, start.dtype), start.device):
        if step.live != live:
            live, own = step.live, [weights_KP[k] for k in step.live]
            rests = [None if velocities is None else velocities[k] for k in live]
            layers = weights(chain, own)
            moving = layers if velocities is None else weights(chain, [velocities[k] for k in live])
        sizes = step.sizes
        rows = clipped(chain, layers, x[step.rows], y[step.rows], sizes, loss, clip)
        to = [pulls.moved(flat, start, velocity) for flat, velocity in zip(own, rests, strict=True)]
        for (matrices, biases), (back, inputs) in zip(moving, rows, strict=True):
            moves = torch.split(back * step.scales, sizes)
            for matrix, move, seen in zip(matrices, moves, torch.split(inputs, sizes), strict=True):
                matrix.addmm_(move.T, seen, alpha=-1)
            for bias, move in zip(biases or (), moves, strict=False):
                bias.sub_(move.sum(0))
        for k, flat, moved in zip(live, own, to, strict=True):
            noise.add(moved, -scales[k], clients[k].mechanism, clip, clients[k].source)
            if moved is not flat:
                flat.add_(moved)
    return list(weights_KP.sub_(start))


@dataclass(frozen=True)
class _Step:
    """A sample of each client that still takes steps."""

    live: list[int]
    """Who they are."""
    sizes: list[int]
    """How many examples each has drawn."""
    rows: Tensor
    """(R,) which examples, of all clients' in a row."""
    scales: Tensor
    """(R, 1) what an example's gradient weighs in its client's step."""


def _steps(clients: Sequence[Private], scales: Sequence[float], dtype: torch.dtype) -> Iterator[_Step]:
    """Each step's samples, drawn when it is asked for: the noise of the step before may be of the same generator."""
    samples = [dp_sgd.poisson(one.mechanism, len(one.y), one.steps, one.draws) for one in clients]
    firsts = [0]
    for one in clients[:-1]:
        firsts.append(firsts[-1] + len(one.y))
    for step in range(max(one.steps for one in clients)):
        live = [k for k, one in enumerate(clients) if one.steps > step]
        drawn = [next(samples[k]) for k in live]
        sizes = list(map(len, drawn))
        rows = torch.tensor(
            [firsts[k] + i for k, sample in zip(live, drawn, strict=True) for i in sample], dtype=torch.long
        )
        each = torch.tensor([scales[k] for k in live], dtype=dtype)
        yield _Step(live, sizes, rows, torch.repeat_interleave(each, torch.tensor(sizes))[:, None])


def _sent(steps: Iterator[_Step], there: torch.device) -> Iterator[_Step]:
    """`steps`; to a device other than the processor all go at once, before the first."""
    if there.type == "cpu":
        yield from steps
        return
    whole = list(steps)
    sizes = [sum(step.sizes) for step in whole]
    rows, scales = placement.sent(there, torch.cat([s.rows for s in whole]), torch.cat([s.scales for s in whole]))
    for step, own, weighing in zip(whole, torch.split(rows, sizes), torch.split(scales, sizes), strict=True):
        yield replace(step, rows=own, scales=weighing)


def _parts(chain: Stack, flat: Tensor) -> list[Tensor]:
    return [part for layer in chain.layers for part in layer.of(flat) if part is not None]


def weights(chain: Stack, flats: Sequence[Tensor]) -> list[Weights]:
    """Views of every layer's weights in the vectors (P,) of clients."""
    made = list[Weights]()
    for layer in chain.layers:
        own = [layer.of(flat) for flat in flats]
        made.append(([matrix for matrix, _ in own], [bias for _, bias in own if bias is not None] or None))
    return made


def clipped(
    chain: Stack, layers: Sequence[Weights], x: Tensor, y: Tensor, sizes: list[int], loss: Loss, clip: float
) -> list[Rows]:
    """The sums of the gradients of the examples' own losses, each at most `clip` long, as rows of each layer.

    x: (R, inputs), as the first layer takes them, and y: (R,): so many `sizes` of each client, in order. Of no
    examples there are no rows.
    """
    if not len(y):
        return [(x.new_zeros(0, layer.outputs), x.new_zeros(0, layer.inputs)) for layer in chain.layers]
    inputs, passed = [x], []
    for layer, own, function in zip(chain.layers, layers, chain.functions[1:], strict=True):
        passed.append(stack.passed(function, _through(inputs[-1], own, sizes, layer.outputs)))
        inputs.append(passed[-1][1].detach())
    back, backs = stack.slopes(loss, inputs[-1], y), list[Tensor]()
    for i in reversed(range(len(layers))):
        backs.append(stack.back_through(passed[i], back))
        if i:
            back = torch.empty_like(inputs[i])
            for matrix, one, further in zip(
                layers[i][0], torch.split(backs[-1], sizes), torch.split(back, sizes), strict=True
            ):
                torch.mm(one, matrix, out=further)
    backs.reverse()
    squares = x.new_zeros(len(y))
    for d, a, (_, biases) in zip(backs, inputs, layers, strict=False):
        squares += d.square().sum(1) * (a.square().sum(1) + (biases is not None))
    factors, sound = (clip / (squares.sqrt() + _TINY)).clamp(max=1.0)[:, None], squares.isfinite()[:, None]
    if sound.is_cpu and sound.all():  # elsewhere to look would be to wait
        return [(d * factors, a) for d, a in zip(backs, inputs, strict=False)]
    return [
        (torch.where(sound, d * factors, 0.0), torch.where(sound, a, 0.0)) for d, a in zip(backs, inputs, strict=False)
    ]


def _through(rows: Tensor, own: Weights, sizes: list[int], outputs: int) -> Tensor:
    """(R, outputs) what every client's layer makes of its own rows."""
    made = rows.new_empty(len(rows), outputs)
    for k, (matrix, one, out) in enumerate(
        zip(own[0], torch.split(rows, sizes), torch.split(made, sizes), strict=True)
    ):
        if own[1]:
            torch.addmm(own[1][k], one, matrix.T, out=out)
        else:
            torch.mm(one, matrix.T, out=out)
    return made
