"""MNIST as McMahan et al. 2017 federate it: 100 clients, IID or two shards of sorted labels each; their 2NN and CNN."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privacy.refused import Refused
from scenarios import Examples, Federation, Gathered, Scenario, partition, sources
from scenarios.numbered import ByName
from scenarios.seeds import derive
from scenarios.settings import Export, Fleet, Local, Reference, Rounds, Settings

_VALIDATION = 1000


def two_nn() -> nn.Module:
    """The paper's 2NN: 784-200-200-10, ReLU; 199,210 parameters. Takes (N, 1, 28, 28)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    )


def cnn() -> nn.Module:
    """The paper's CNN: 5x5 convolutions of 32 and 64 channels, each 2x2 max-pooled, 512 units; 1,663,370 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def data(settings: Settings) -> Federation:
    """The 10,000 test images are the server's, and so are 1,000 for validation, drawn by seed from the 60,000.

    The clients share the other 59,000: 590 each where the paper, which has no such part, gives 600.
    Pixels are divided by 255 and not centred; the paper does not say, and its rates suit [0, 1].
    """
    folder = sources.find("mnist", settings.run.data)
    x, y = _load(folder, "train")
    x_test, y_test = _load(folder, "t10k")
    if len(y) <= _VALIDATION:
        raise Refused(
            f"{folder} holds {len(y)} training images: the {_VALIDATION} of the validation part take them all"
        )
    order = np.random.default_rng(derive(settings.run.seed, "split")).permutation(len(y))
    held, rest = np.sort(order[:_VALIDATION]), np.sort(order[_VALIDATION:])
    parts = partition.split(y[rest], settings.fleet.clients, settings.partition, settings.run.seed)

    def clients(names: Sequence[str]) -> Examples:
        theirs = rest[parts.of(names)]
        return _examples(x[theirs], y[theirs])

    return Federation(
        sizes=ByName(parts.names, lambda at: int(parts.sizes[at])),
        client=Gathered(clients),
        validation=_examples(x[held], y[held]),
        test=_examples(x_test, y_test),
    )


def _load(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 28, 28) and digits (N,); the images stay bytes until a client asks for its own."""
    images = sources.read_idx(folder, f"{part}-images-idx3-ubyte")
    digits = sources.read_idx(folder, f"{part}-labels-idx1-ubyte")
    if images.shape[1:] != (28, 28) or digits.shape != (len(images),) or digits.max(initial=0) > 9:
        raise Refused(
            f"{folder} holds {part} images of shape {images.shape} with labels of shape {digits.shape} up to "
            f"{digits.max(initial=0)}: that is not MNIST, fetch it again"
        )
    return images, digits.astype(np.int64)


def _examples(images: NDArray[np.uint8], digits: NDArray[np.int64]) -> Examples:
    x = images[:, None].astype(np.float32) / np.float32(255)
    return Examples(torch.from_numpy(x), torch.from_numpy(digits))


SCENARIO = Scenario(
    summary="MNIST, 100 clients, 2NN or CNN of McMahan et al. 2017, no privacy by default (data: mnist)",
    settings=Settings(
        rounds=Rounds(number=87, fraction=0.1),
        local=Local(epochs=1, batch=10, rate=0.1),
        fleet=Fleet(clients=100),
        export=Export(recover_rounds=5),
        reference=Reference(central_epochs=20, central_batch=32, central_rate=0.1),
    ),
    models={"2nn": two_nn, "cnn": cnn},
    data=data,
)
