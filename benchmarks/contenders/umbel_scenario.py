"""The benchmark's workloads as a scenario of Umbel: `run.data` is the file of the workload."""

from pathlib import Path

from workload import MODELS, Workload

from scenarios import Examples, Federation, Gathered, Scenario
from scenarios.numbered import ByName, Numbered
from scenarios.settings import Evaluation, Export, Local, Reference, Settings


def data(settings: Settings) -> Federation:
    """Every client's rows, made when asked for."""
    workload = Workload.read(Path(settings.run.data))
    names = Numbered(workload.clients)
    test = Examples(*workload.test())
    validation = Examples(test.x[:1].clone(), test.y[:1].clone())
    return Federation(
        sizes=ByName(names, lambda at: workload.examples),
        client=Gathered(lambda clients: Examples(*workload.local(*map(names.place, clients)))),
        validation=validation,
        test=test,
    )


SCENARIO = Scenario(
    summary="a workload of benchmarks/simulation.py",
    settings=Settings(
        local=Local(batch=10, rate=0.1),
        evaluation=Evaluation(every=1_000_000),
        export=Export(prune=0),
        reference=Reference(no_privacy=False),
    ),
    models=MODELS,
    data=data,
)
