"""Clients with next to nothing to do: what is left of a round is what it costs to ask them."""

import torch
from torch import nn

from scenarios import Examples, Federation, Scenario
from scenarios.numbered import ByName, Numbered
from scenarios.settings import Evaluation, Export, Fleet, Local, Reference, Rounds, Settings

ONE = Examples(torch.ones(1, 4), torch.zeros(1, dtype=torch.int64))


def data(settings: Settings) -> Federation:
    """One example a client."""
    names = Numbered(settings.fleet.clients, len(str(settings.fleet.clients)))
    return Federation(ByName(names, lambda at: 1), lambda name: ONE, validation=ONE, test=ONE)


SCENARIO = Scenario(
    summary="no-op clients: one step on one example, 10 weights",
    settings=Settings(
        rounds=Rounds(number=4),
        local=Local(batch=0),
        fleet=Fleet(clients=100, wait=600),
        evaluation=Evaluation(on="server"),
        export=Export(prune=0),
        reference=Reference(no_privacy=False),
    ),
    models={"linear": lambda: nn.Linear(4, 2)},
    data=data,
    skipped={"central": "nothing is learned", "no_privacy": "nothing is learned"},
)
