"""A workload as every contender reads it: model, data, who is asked in which round, in which order examples come.

A folder that `catalogue.py` writes holds it, so that a contender needs numpy and torch alone, in any environment.

Legend: P is the number of weights, R of rounds, K of clients asked a round, N of a client's examples.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def two_nn() -> nn.Module:
    """McMahan et al. 2017: 784-200-200-10, ReLU; 199,210 weights."""
    hidden = [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, 10))


def cnn() -> nn.Module:
    """McMahan et al. 2017: 5x5 convolutions of 32 and 64 channels, each max-pooled, 512 units; 1,663,370 weights."""
    first = [nn.Conv2d(1, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10))


class NextCharacter(nn.Module):
    """GRU with 128 units over characters embedded in 8 numbers (the embedding of LEAF); takes their numbers (N, 80)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 8)
        self.gru = nn.GRU(8, 128, batch_first=True)
        self.out = nn.Linear(128, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(self.embed(x.long()))[0][:, -1])


CHARACTERS = 65
"""Distinct ones in tinyshakespeare."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "2nn": two_nn,
    "cnn": cnn,
    "gru": NextCharacter,
    "linear": lambda: nn.Linear(4, 2),
}


def _rows(path: str, firsts: Sequence[int], count: int) -> np.ndarray[Any, Any]:
    """From each of `firsts` on so many rows of an array in a file, read and not mapped: what was mapped counts as
    memory of whoever has looked at it."""
    file, start, dtype, shape = _opened(path)
    size = dtype.itemsize * math.prod(shape)
    read = b"".join([os.pread(file, count * size, start + first * size) for first in firsts])
    return np.frombuffer(read, dtype).reshape(-1, *shape)


@lru_cache
def _opened(path: str) -> tuple[int, int, np.dtype[Any], tuple[int, ...]]:
    """(its descriptor, where its first row begins, dtype, shape of a row)."""
    array = np.lib.format.open_memmap(path, mode="r")
    return os.open(path, os.O_RDONLY), array.offset, array.dtype, array.shape[1:]


@dataclass(frozen=True)
class Workload:
    """What is to be done in a round; the arrays lie in the folder of the file that `read` took."""

    name: str
    model: str
    clients: int
    cohort: int
    examples: int
    batch: int
    """Examples a local step; with unit=example expected; 0: all."""
    steps: int
    """Local steps of a client."""
    rate: float
    scale: float = 1.0
    """By which stored examples are divided."""
    shared: bool = False
    """Whether all clients have the same examples."""
    unit: str = "none"
    """none; example: Poisson samples, each example's gradient clipped; client: updates clipped, the sum noised."""
    clip: float = 1.0
    noise: float = 0.0
    """Noise multiplier."""
    settings: str = ""
    """What makes Umbel do the same."""
    folder: str = ""

    @classmethod
    def read(cls, path: Path) -> "Workload":
        return cls(**json.loads(path.read_text()), folder=str(path.parent))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({key: value for key, value in asdict(self).items() if key != "folder"}))

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """One of start (P,), x, y, x_test, y_test, cohorts (R, K) and orders (R, K, N); read as it is touched."""
        return np.asarray(np.load(Path(self.folder) / f"{name}.npy", mmap_mode="r"))  # np.memmap is slow to cut

    @cached_property
    def cohorts(self) -> np.ndarray[Any, Any]:
        return self.array("cohorts")

    @cached_property
    def orders(self) -> np.ndarray[Any, Any]:
        return self.array("orders")

    def local(self, *clients: int) -> tuple[Tensor, Tensor]:
        """(x (N, ...), y (N,)) of each client, one after another: it has N rows on end."""
        firsts = [0 if self.shared else client * self.examples for client in clients]
        x, y = (_rows(f"{self.folder}/{name}.npy", firsts, self.examples) for name in ("x", "y"))
        return self._tensors(x, y)

    def test(self) -> tuple[Tensor, Tensor]:
        return self._tensors(self.array("x_test"), self.array("y_test"))

    def _tensors(self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        divided = torch.from_numpy(x.astype(np.float32)).div_(self.scale)
        return divided, torch.from_numpy(y.astype(np.int64))

    def build(self) -> tuple[nn.Module, Tensor]:
        """(the model in its first state, its weights (P,)): every parameter is a view of them."""
        model, flat = MODELS[self.model](), torch.from_numpy(np.array(self.array("start")))
        adopt(model, flat)
        return model, flat

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """{seconds, accuracy} on the test set, 1024 at a time."""
        began, correct = time.monotonic(), 0
        x, y = self.test()
        device = next(model.parameters()).device
        with torch.no_grad():
            for some, labels in zip(x.split(1024), y.split(1024), strict=True):
                correct += int((model(some.to(device)).argmax(1).cpu() == labels).sum())
        return {"seconds": time.monotonic() - began, "accuracy": correct / len(y)}


def adopt(model: nn.Module, flat: Tensor) -> None:
    """Make the parameters of `model` views of `flat` (P,), in the order of its state."""
    parameters = list(model.parameters())
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
