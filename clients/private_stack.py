"""Example-level DP-SGD of a stack of linear layers, without the examples' own gradients.

An example's gradient of a linear layer is one outer product, of what came back to its outputs and what went in, so its
squared norm is the product of theirs, and the clipped sum is one matrix product of rows scaled by what clips them
(Goodfellow 2015; Lee and Kifer 2021, "ghost clipping"). The samples, the noise and their account are those of
privacy/dp_sgd.py, whose `PrivateGradient` is the truth that this is tested against.

Guarantee: every step is one `Mechanism` step on the client's examples, add-or-remove-one adjacency, whoever sees the
weights, as there. An example whose gradient is not finite counts as zero.

Legend: P is the number of weights, N of examples, B of a sample.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clients import stack
from clients.fused import Pulls
from clients.stack import Stack
from privacy import dp_sgd
from privacy.plan import Mechanism

_TINY = 1e-6
"""Added to a norm before it divides, as Opacus does."""

Rows = tuple[Tensor, Tensor]
"""What came back to a layer's outputs (B, outputs), and what went in (B, inputs); the sum over B is the gradient's."""


@torch.no_grad()
def train(
    chain: Stack,
    start: Tensor,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    pulls: Pulls,
    steps: int,
    mechanism: Mechanism,
    clip: float,
    generator: torch.Generator,
) -> Tensor:
    """The update (P,) of one client by `steps` private steps from the weights `start` (P,).

    x: (N, ...), y: (N,). loss: a plain mean over examples. Momentum sums up what was noised, and costs nothing.
    """
    weights, noise = start.clone(), torch.empty_like(start)
    velocity = torch.zeros_like(start) if pulls.momentum else None
    layers, drawn = [layer.of(weights) for layer in chain.layers], [layer.of(noise) for layer in chain.layers]
    parts = [part for pair in drawn for part in pair if part is not None]
    x, scale = chain.functions[0](x), pulls.rate / (mechanism.sampling_rate * len(y))
    for sample in dp_sgd.poisson(mechanism, len(y), steps, generator):
        rows = clipped(chain, layers, x[sample], y[sample], loss, clip)
        to = pulls.moved(weights, start, velocity)
        for (weight, bias), (back, inputs) in zip([layer.of(to) for layer in chain.layers], rows, strict=True):
            weight.addmm_(back.T, inputs, alpha=-scale)
            if bias is not None:
                bias.sub_(back.sum(0), alpha=scale)
        dp_sgd.draw_noise(parts, mechanism, clip, generator)
        to.sub_(noise, alpha=scale)
        if velocity is not None:
            weights.add_(velocity)
    return weights - start


def clipped(
    chain: Stack,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    clip: float,
) -> list[Rows]:
    """The sum of the gradients of the examples' own losses, each at most `clip` long, as rows of each layer.

    x: (B, inputs), as the first layer takes them. Of no examples there are no rows.
    """
    if not len(y):
        return [(x.new_zeros(0, layer.outputs), x.new_zeros(0, layer.inputs)) for layer in chain.layers]
    inputs, passed = [x], []
    for (weight, bias), function in zip(layers, chain.functions[1:], strict=True):
        passed.append(stack.passed(function, torch.nn.functional.linear(inputs[-1], weight, bias)))
        inputs.append(passed[-1][1].detach())
    back, backs = stack.slopes(loss, inputs[-1], y), list[Tensor]()
    for (weight, _), through in zip(reversed(layers), reversed(passed), strict=True):
        backs.append(stack.back_through(through, back))
        back = backs[-1] @ weight
    backs.reverse()
    squares = torch.zeros(len(y), dtype=x.dtype)
    for d, a, (_, bias) in zip(backs, inputs, layers, strict=False):
        squares += d.square().sum(1) * (a.square().sum(1) + (bias is not None))
    factors, sound = (clip / (squares.sqrt() + _TINY)).clamp(max=1.0)[:, None], squares.isfinite()[:, None]
    if sound.all():
        return [(d * factors, a) for d, a in zip(backs, inputs, strict=False)]
    return [
        (torch.where(sound, d * factors, 0.0), torch.where(sound, a, 0.0)) for d, a in zip(backs, inputs, strict=False)
    ]
