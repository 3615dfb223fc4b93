"""torch-loop: one client after another in a bare loop; the floor that any framework built on torch stands on.

The weights are one buffer whose views are the model's parameters, gradients come from autograd, a step is one call;
with several processes each takes every so manieth client and adds up its own updates in shared memory.
"""

from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor, nn
from trial import Trial
from workload import Workload, adopt

Learn = Callable[[int, int, Tensor, Tensor], None]
"""(round from 0, place in the cohort, the round's weights (P,), the sum (P,) to which the update is added)."""


def plain(workload: Workload, device: str = "cpu") -> Learn:
    """Local SGD on given batches; with unit=client the update is clipped."""
    model, flat = workload.build()
    if device != "cpu":
        flat = _moved(model, flat, device)
    parameters, clip = list(model.parameters()), workload.clip if workload.unit == "client" else 0.0

    def learn(number: int, place: int, weights: Tensor, total: Tensor) -> None:
        flat.copy_(weights)
        x, y = workload.local(int(workload.cohorts[number, place]))
        order = torch.from_numpy(np.array(workload.orders[number, place], dtype=np.int64))
        if device != "cpu":
            x, y, order = (part.pin_memory().to(device, non_blocking=True) for part in (x, y, order))
        for batch in order.split(workload.batch):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-workload.rate)
        flat.sub_(weights)
        if clip:
            flat.mul_((clip / flat.norm()).clamp(max=1.0))
        total.add_(flat)

    return learn


def go(make: Callable[[Workload, str], Learn]) -> None:
    """Run the trial that the arguments ask for; every process makes its own learner."""
    trial = Trial()
    workload, device, processes = trial.workload, trial.told.device, trial.told.processes
    model, start = workload.build()
    weights = start.clone().share_memory_() if processes > 1 else start.to(device)
    totals = [torch.zeros_like(weights) for _ in range(processes)]
    ends = []
    for rank in range(1, processes):
        totals[rank].share_memory_()
        ours, theirs = torch.multiprocessing.Pipe()
        told = (theirs, make, workload, weights, totals[rank], rank, processes)
        torch.multiprocessing.get_context("fork").Process(target=_helper, args=told, daemon=True).start()
        ends.append(ours)
    learn = make(workload, device)
    for end in ends:
        end.recv()
    trial.begin()
    for number in range(trial.rounds):
        for end in ends:
            end.send(number)
        _share(learn, workload, number, weights, totals[0], 0, processes)
        for end, total in zip(ends, totals[1:], strict=True):
            end.recv()
            totals[0].add_(total)
        if workload.unit == "client" and workload.noise:
            totals[0].add_(torch.empty_like(weights).normal_(0, workload.noise * workload.clip))
        weights.add_(totals[0], alpha=1 / workload.cohort)
        trial.committed(weights.numpy(force=True))
    _moved(model, weights.clone(), device)
    trial.finish(workload.evaluate(model))


def _share(
    learn: Learn, workload: Workload, number: int, weights: Tensor, total: Tensor, rank: int, processes: int
) -> None:
    total.zero_()
    for place in range(rank, workload.cohort, processes):
        learn(number, place, weights, total)


def _helper(
    end: Connection,
    make: Callable[[Workload, str], Learn],
    workload: Workload,
    weights: Tensor,
    total: Tensor,
    rank: int,
    processes: int,
) -> None:
    """One more process: its clients of every round that it is told of."""
    torch.seed()  # a fork goes on with its parent's generator
    learn = make(workload, "cpu")
    end.send("ready")
    while True:
        _share(learn, workload, end.recv(), weights, total, rank, processes)
        end.send("done")


def _moved(model: nn.Module, flat: Tensor, device: str) -> Tensor:
    flat = flat.to(device)
    adopt(model, flat)
    return flat


if __name__ == "__main__":
    go(plain)
