"""Local SGD: one client's batches, and its steps on a model."""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from clients import placement
from clients.task import Task
from privacy import dp_sgd, on_device
from scenarios import Examples
from scenarios.seeds import derive
from scenarios.settings import Local, Settings
from scenarios.weights import Vector, unflatten


def train(
    model: nn.Module,
    examples: Examples,
    loss: Callable[[Tensor, Tensor], Tensor],
    task: Task,
    local: Local,
    settings: Settings,
    correction: Vector | None = None,
) -> int:
    """Local SGD on `model`, in place; returns the steps taken: task.steps, or fewer where the deadline came first.

    With a mechanism every gradient comes clipped and noised from DP-SGD. The proximal term (FedProx, Li et al. 2020,
    eq. 2), weight decay and `correction` (P,) (clients/scaffold.py) are added to the gradient afterwards: they depend
    on weights and on updates sent before alone, so they cost no privacy and stay exact. Momentum, as in torch.optim.SGD
    (v <- momentum v + gradient, w <- w - rate v), costs none either: v sums up gradients that were noised before. It is
    at rest when a round begins, and nothing of it is kept.
    """
    stop = time.monotonic() + task.deadline if task.deadline else float("inf")
    there, seed = examples.x.device, settings.privacy.noise_seed
    start = [parameter.detach().clone() for parameter in model.parameters()] if local.proximal else []
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()] if local.momentum else []
    named = {} if correction is None else unflatten(correction, task.layout)
    corrections = placement.sent(there, *(named[name] for name, _ in model.named_parameters() if named))
    private = None
    if task.mechanism is not None:
        seed = None if seed is None else derive(seed, "noise", task.round, task.client)
        noise, draws = on_device.generators(seed, there)
        private = dp_sgd.PrivateGradient(model, loss, task.mechanism, task.clip, noise, draws)
        batches: Iterator[Any] = private.batches(len(examples.y), task.steps)
    else:
        batches = shuffled(len(examples.y), task, settings)
    batches = placement.indices(batches, there)
    model.train()
    steps = 0
    for batch in batches:
        if time.monotonic() > stop:
            break
        x, y = examples.x[batch], examples.y[batch]
        if private is not None:
            private.step(x, y)
        else:
            model.zero_grad()
            torch.autograd.backward(loss(model(x), y))
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                if parameter.grad is None:
                    continue
                if local.proximal:
                    parameter.grad.add_(parameter - start[i], alpha=local.proximal)
                if local.weight_decay:
                    parameter.grad.add_(parameter, alpha=local.weight_decay)
                if corrections:
                    parameter.grad.add_(corrections[i])
                moved = velocity[i].mul_(local.momentum).add_(parameter.grad) if velocity else parameter.grad
                parameter.sub_(moved, alpha=task.rate)
        steps += 1
        if task.deadline:
            placement.wait(there)
    if private is not None:
        private.close()
    return steps


def shuffled(examples: int, task: Task, settings: Settings) -> Iterator[Tensor]:
    """The indices of each of the task's batches; reshuffled each epoch, whose last batch may be smaller."""
    seed, batch = derive(settings.run.seed, "batches", task.round, task.client), settings.local.batch
    return islice(_shuffled(examples, batch, seed), task.steps)


def _shuffled(examples: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices without end, reshuffled each epoch; the last batch of an epoch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(examples, generator=generator)
        yield from torch.split(order, batch) if 0 < batch < examples else (order,)
