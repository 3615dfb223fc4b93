"""What it takes to draw a round's noise of example-level DP, and nothing else.

noise-only draws it by torch's normal_, noise-own by Umbel's generator (privacy/key_stream.py).
"""

import sys

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


def own(workload: Workload, device: str) -> Learn:
    """The same, by a key stream a client; added to zeros, as Umbel's are to weights."""
    from privacy.key_stream import Gaussian, KeyStream

    buffer = torch.zeros(len(workload.array("start")))
    gaussian = Gaussian(buffer)

    def learn(number: int, place: int, weights: Tensor, total: Tensor) -> None:
        stream = KeyStream()
        for _ in range(workload.steps):
            gaussian.add(buffer, 1.0, stream)

    return learn


if __name__ == "__main__":
    go(own if "noise-own" in sys.argv else draws)
