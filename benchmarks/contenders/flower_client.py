"""The ClientApp of flower: a plain one, by Flower's Message API; a module, so that its workers keep what they load."""

import os
from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from workload import MODELS, Workload

WORKLOAD, THREADS = "UMBEL_BENCHMARK_WORKLOAD", "UMBEL_BENCHMARK_THREADS"
"""Environment variables that tell a worker what it works at."""
app = ClientApp()


@cache
def _loaded() -> Workload:
    torch.set_num_threads(int(os.environ[THREADS]))
    return Workload.read(Path(os.environ[WORKLOAD]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round: the weights in, the weights out."""
    workload, told = _loaded(), message.content["config"]
    model = MODELS[workload.model]()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.rate)
    x, y = workload.local(int(told["client"]))
    order = torch.from_numpy(workload.orders[told["server-round"] - 1, told["place"]].astype("int64"))
    model.train()
    for batch in order.split(workload.batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(y)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
