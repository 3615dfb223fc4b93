"""A fleet like that of workload A: 1,000 clients of 60 random examples, the 2NN of McMahan et al. 2017, 50 a round."""

import torch
from torch import Tensor, nn

from scenarios import Examples, Federation, Scenario
from scenarios.numbered import ByName, Numbered
from scenarios.settings import Evaluation, Export, Fleet, Local, Reference, Rounds, Settings


def examples(number: int, count: int = 60) -> Examples:
    """Of a client, by its number."""
    generator = torch.Generator().manual_seed(number)
    x: Tensor = torch.rand(count, 784, generator=generator)
    return Examples(x, (x[:, :78].sum(1) * 10).long() % 10)


def data(settings: Settings) -> Federation:
    """Made when asked for."""
    names = Numbered(settings.fleet.clients)
    held = examples(settings.fleet.clients)
    return Federation(ByName(names, lambda at: 60), lambda name: examples(names.place(name)), held, test=held)


SCENARIO = Scenario(
    summary="2NN on random examples, 50 of 1,000 clients a round",
    settings=Settings(
        rounds=Rounds(fraction=0.05),
        local=Local(batch=10, rate=0.1),
        fleet=Fleet(clients=1000, wait=600),
        evaluation=Evaluation(every=1_000_000),
        export=Export(prune=0),
        reference=Reference(no_privacy=False),
    ),
    models={
        "2nn": lambda: nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    },
    data=data,
    skipped={"central": "nothing is learned", "no_privacy": "nothing is learned"},
)
