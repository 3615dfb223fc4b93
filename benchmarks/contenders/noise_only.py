"""noise-only: what torch's normal_ takes to draw a round's noise of example-level DP, and nothing else."""

import torch
from torch import Tensor
from torch_loop import Learn, go
from workload import Workload


def draws(workload: Workload, device: str) -> Learn:
    """As many numbers as the client would draw; its update stays zero."""
    buffer = torch.empty(len(workload.array("start")), device=device)

    def learn(number: int, place: int, weights: Tensor, total: Tensor) -> None:
        for _ in range(workload.steps):
            buffer.normal_()

    return learn


if __name__ == "__main__":
    go(draws)
