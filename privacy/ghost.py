"""Ghost weights: a model extended by one weight a canary, which that canary alone can move."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Ghost(nn.Module):
    """A model with one more weight a canary; takes (N, D + 1): an example's D entries, and the canary's number or 0.

    Gives (N, classes + 2): the model's outputs, the canary's weight, and 1 for a canary.
    """

    def __init__(self, base: nn.Module | None, shape: tuple[int, ...], canaries: int) -> None:
        super().__init__()
        self.base, self._shape, self._canaries = base, shape, canaries
        self.ghost = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.ghost.weight)

    def forward(self, x: Tensor) -> Tensor:
        number = x[:, -1].long()
        marks = nn.functional.one_hot(number, self._canaries + 1)[:, 1:].to(x.dtype)
        columns = [self.ghost(marks), (number > 0).to(x.dtype)[:, None]]
        if self.base is not None:
            columns.insert(0, self.base(x[:, :-1].reshape(-1, *self._shape)))
        return torch.cat(columns, 1)


def ghost_loss(loss: Callable[[Tensor, Tensor], Tensor], push: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean loss of `Ghost`: the scenario's for examples; a canary's is its weight times `push`, its gradient `push`."""

    def mixed(outputs: Tensor, y: Tensor) -> Tensor:
        real = outputs[:, -1] == 0
        total = push * (outputs[:, -2] * outputs[:, -1]).sum()
        if outputs.shape[1] > 2 and real.any():
            total = total + loss(outputs[real, :-2], y[real]) * real.sum()
        return total / max(1, len(y))

    return mixed
