"""Models and data that the tests of this room share; every value is drawn from a fixed seed."""

import copy
from collections.abc import Callable

import onnx
import pytest
import torch
from torch import nn

from edge_export.to_onnx import export
from scenarios import Examples

META = {"umbel.version": "1", "umbel.classes": "[]"}


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def _mlp2nn() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def _cnn() -> nn.Module:
    """McMahan et al. 2017: two 5 x 5 convolutions, each with 2 x 2 max pooling, and one hidden layer of 512."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


def _norms() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 36, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 5)),
    )


def _depthwise() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


class _Residual(nn.Module):
    """Two layers whose channels are added, so that they can only be removed together; and two output layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        return self.c(h + torch.relu(self.b(h))) + self.d(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (64,)),
    "2nn": (_mlp2nn, (1, 28, 28)),
    "cnn": (_cnn, (1, 28, 28)),
    "norms": (_norms, (1, 8, 8)),
    "depthwise": (_depthwise, (1, 8, 8)),
    "residual": (_Residual, (8,)),
}


@pytest.fixture(scope="session")
def build() -> Callable[[str], tuple[nn.Module, torch.Tensor]]:
    """name -> (model with seeded weights and used batch statistics, inputs (50, ...))."""

    def built(name: str) -> tuple[nn.Module, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            maker, shape = MODELS[name]
            model, x = maker(), torch.randn(50, *shape)
            with torch.no_grad():
                model.train()(x)  # batch statistics that are not those of a new model
            return model.eval(), x

    return built


@pytest.fixture(scope="session")
def exported(build) -> Callable[[str], tuple[nn.Module, torch.Tensor, onnx.ModelProto]]:
    """name -> (model, inputs, its ONNX graph with META), each exported once a session."""
    graphs: dict[str, onnx.ModelProto] = {}

    def made(name: str) -> tuple[nn.Module, torch.Tensor, onnx.ModelProto]:
        model, x = build(name)
        if name not in graphs:
            graphs[name] = export(model, x[:1], META)
        return model, x, copy.deepcopy(graphs[name])

    return made


@pytest.fixture(scope="session")
def blobs() -> Callable[[int, int], Examples]:
    """(number, seed) -> Examples of three Gaussian classes around fixed centres in 16 dimensions."""

    def drawn(number: int, seed: int) -> Examples:
        centres = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(3, (number,), generator=generator)
        return Examples(centres[y] + 1.5 * torch.randn(number, 16, generator=generator), y)

    return drawn


@pytest.fixture(scope="session")
def trained(blobs: Callable[[int, int], Examples]) -> nn.Module:
    """16-32-3, trained on blobs until it knows them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    x, y = blobs(300, 1)
    step = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(100):
        step.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        step.step()
    return model
