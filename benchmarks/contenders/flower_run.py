"""flower: Flower's own simulation runtime on Ray, with its FedAvg and a plain ClientApp.

FedAvg asks the nodes that it samples itself; each is told which client of the round it is, as the cohort is given.
Client-level DP is Flower's own wrapper, which clips and noises on the server.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flower_client
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Strategy
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from flwr.simulation import run_simulation
from trial import Trial
from workload import MODELS


class GivenCohorts(FedAvg):
    """FedAvg whose nodes play the clients of the workload's cohorts."""

    def __init__(self, cohorts: np.ndarray[Any, Any], **told: Any) -> None:
        super().__init__(**told)
        self._cohorts = cohorts

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        cohort = self._cohorts[server_round - 1]
        nodes, _ = sample_nodes(grid, self.min_available_nodes, len(cohort))
        for place, (node, client) in enumerate(zip(nodes, cohort, strict=True)):
            told = ConfigRecord({"server-round": server_round, "client": int(client), "place": place})
            content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: told})
            yield Message(content=content, message_type=MessageType.TRAIN, dst_node_id=node)


def main() -> None:
    trial = Trial()
    workload, processes, threads = trial.workload, trial.told.processes, trial.told.threads
    os.environ[flower_client.WORKLOAD] = str(trial.told.workload.absolute())
    os.environ[flower_client.THREADS] = str(threads)
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)  # the workers'
    server, final = ServerApp(), {}

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        model, _ = workload.build()
        share = workload.cohort / workload.clients
        plain = GivenCohorts(workload.cohorts, fraction_train=share, fraction_evaluate=0.0, min_train_nodes=2)
        strategy: Strategy = plain
        if workload.unit == "client":
            strategy = DifferentialPrivacyServerSideFixedClipping(plain, workload.noise, workload.clip, workload.cohort)
        combine = strategy.aggregate_train

        def aggregate_train(server_round: int, replies: Iterable[Message]) -> Any:
            arrays, metrics = combine(server_round, replies)
            if arrays is None:
                raise RuntimeError(f"no reply of round {server_round} was good")
            trial.committed(_flat(arrays))
            return arrays, metrics

        strategy.aggregate_train = aggregate_train  # type: ignore[method-assign]
        while len(list(grid.get_node_ids())) < workload.clients:
            time.sleep(0.05)
        trial.begin()
        result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=trial.rounds)
        final["state"] = result.arrays.to_torch_state_dict()

    resources = {"num_cpus": threads, "num_gpus": 0.0}
    backend = {"init_args": {"num_cpus": processes * threads}, "client_resources": resources}
    run_simulation(server, flower_client.app, workload.clients, backend_config=backend)
    torch.set_num_threads(threads)
    model = MODELS[workload.model]()
    model.load_state_dict(final["state"])
    trial.finish(workload.evaluate(model))


def _flat(arrays: ArrayRecord) -> np.ndarray[Any, Any]:
    return np.concatenate([array.ravel() for array in arrays.to_numpy_ndarrays()]).astype(np.float32)


if __name__ == "__main__":
    main()
