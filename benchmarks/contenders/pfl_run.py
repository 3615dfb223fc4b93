"""pfl: Apple's pfl-research with its SimulatedBackend, FederatedAveraging and Gaussian mechanism.

With several processes it is its own distributed context (gloo): each process takes every so manieth client.
"""

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from trial import Trial
from workload import Workload

_ADDRESSES, _RANK = "PFL_WORKER_ADDRESSES", "PFL_WORKER_RANK"


def main() -> None:
    trial = Trial()
    others = [] if trial.told.rank or trial.told.processes == 1 else _others(trial)
    run(trial)
    for other in others:
        if other.wait(60):
            raise RuntimeError("another process of pfl failed")


def _others(trial: Trial) -> list[subprocess.Popen[bytes]]:
    """The other processes of the layout; pfl finds them by their addresses."""
    count, ports = trial.told.processes, []
    for _ in range(count):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(f"localhost:{free.getsockname()[1]}")
    os.environ |= {_ADDRESSES: ",".join(ports), _RANK: "0"}
    return [
        subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank)], env={**os.environ, _RANK: str(rank)})
        for rank in range(1, count)
    ]


def run(trial: Trial) -> None:
    """The federation; pfl looks for its other processes as it is imported."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

    workload = trial.workload

    class Model(nn.Module):
        """What pfl asks of a model: its loss and its metrics."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = workload.build()

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.inner(x), y)

        def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
            """pfl asks for them in round 1, a warm-up."""
            return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}

    class Commit(TrainingProcessCallback):
        """Keeps the weights of every round; the first process alone."""

        def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
            if not trial.told.rank:
                trial.begin()
            return Metrics()

        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            if not trial.told.rank:
                weights = torch.cat([p.detach().reshape(-1) for p in model.pytorch_model.parameters()])
                trial.committed(weights.numpy())
            return False, Metrics()

    def dataset(user: tuple[int, int]) -> Dataset:
        number, place = user
        x, y = workload.local(int(workload.cohorts[number, place]))
        order = torch.from_numpy(workload.orders[number, place].astype(np.int64))
        return Dataset((x[order], y[order]), user_id=str(user))

    users = _users(workload, trial.rounds)
    data = FederatedDataset(dataset, lambda: next(users))
    steps = [WeightByUser()]
    if workload.unit == "client":
        steps.append(CentrallyAppliedPrivacyMechanism(GaussianMechanism(workload.clip, workload.noise)))
    inner = Model()
    central = torch.optim.SGD(inner.parameters(), lr=1.0)
    model = PyTorchModel(inner, torch.optim.SGD, central)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=trial.rounds,
            evaluation_frequency=trial.rounds + 1,
            train_cohort_size=workload.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data, steps),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=workload.rate, local_batch_size=workload.batch),
        callbacks=[Commit()],
        send_metrics_to_platform=False,
    )
    if not trial.told.rank:
        trial.finish(workload.evaluate(inner.inner))


def _users(workload: Workload, rounds: int) -> Iterator[tuple[int, int]]:
    """(round from 0, place in the cohort), in turn."""
    return itertools.product(range(rounds), range(workload.cohort))


if __name__ == "__main__":
    main()
