"""Handwritten digits (8 x 8, bundled with scikit-learn) on 20 clients that each see few of the ten digits."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from scenarios import Examples, Federation, Gathered, Scenario, partition
from scenarios.numbered import ByName
from scenarios.seeds import derive
from scenarios.settings import Export, Local, Privacy, Reference, Rounds, Settings


def mlp() -> nn.Module:
    """64-64-10, tanh; the last layer starts at zero, so that no digit is favoured before the first round."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    return model


def data(settings: Settings) -> Federation:
    """A fifth is the test set; 100 examples are the server's validation part; the rest is the clients'."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16 - 0.3053).astype(np.float32)  # the mean pixel of all digits, a public constant
    y = y.astype(np.int64)
    seed = derive(settings.run.seed, "split") % 2**32
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    x, x_held, y, y_held = train_test_split(x, y, test_size=100, stratify=y, random_state=seed)
    parts = partition.split(y, settings.fleet.clients, settings.partition, settings.run.seed, least=20)

    def examples(x: np.ndarray, y: np.ndarray) -> Examples:
        return Examples(torch.from_numpy(x), torch.from_numpy(y))

    return Federation(
        sizes=ByName(parts.names, lambda at: int(parts.sizes[at])),
        client=Gathered(lambda names: examples(x[parts.of(names)], y[parts.of(names)])),
        validation=examples(x_held, y_held),
        test=examples(x_test, y_test),
    )


SCENARIO = Scenario(
    summary="handwritten digits, 20 clients, under DP unless told otherwise (bundled data)",
    settings=Settings(
        partition="dirichlet:0.3",
        rounds=Rounds(number=50, average=4),
        local=Local(batch=0, rate=12.0, decay=0.7),
        privacy=Privacy(unit="example", epsilon=8.0, clip=0.35),
        export=Export(recover_rounds=3, prune=0.25),
        reference=Reference(
            central_epochs=30, central_batch=32, central_rate=0.3, no_privacy_set="local.rate=2 local.decay=0"
        ),
    ),
    models={"mlp": mlp},
    data=data,
)
