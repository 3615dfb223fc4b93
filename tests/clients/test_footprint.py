"""What a simulated client takes beside its data: nothing is loaded for it, copied for it or unshared by it."""

import gc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from clients import training
from clients.task import Reply, Task
from clients.workers import Room, Workers
from scenarios import Examples

HOUSE = Path(__file__).resolve().parents[2]
TASK = Task("train", 1, "a", np.zeros(10, np.float32), ())


def unshared(tasks: Sequence[Task], _: Room | None) -> list[Reply]:
    """Replies whose examples are the kB that this process has to itself after a collection."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
    return [Reply(task.round, task.client, examples=own) for task in tasks]


def test_a_worker_shares_its_parents_objects_after_a_collection_too() -> None:
    """A fork that was not frozen copies some 60 MB of torch's objects by its first collection."""
    workers = Workers(unshared, 1, print)
    ((reply,),) = workers.map([[TASK]])
    workers.close()
    assert reply.examples < 25_000
    assert gc.get_freeze_count() == 0


def test_a_block_loads_no_more_than_torch_had_loaded() -> None:
    code = """
import sys, torch
from clients import gram, stack
from clients.fused import Pulls
model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
chain, start = stack.read(model), torch.randn(5 * 7 + 7 + 7 * 3 + 3)
before = set(sys.modules)
batches = gram.Batches(torch.randn(2, 8, 5), torch.zeros(2, 8, dtype=torch.int64), None, (2, 2), 4)
gram.train(chain, start, batches, torch.nn.functional.cross_entropy, Pulls.of(0.1, 0.0, 0.0))
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, check=True, capture_output=True, text=True)
    assert "sympy" not in done.stdout


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (40, 1, 6, 6)])
def test_large_data_has_the_fingerprint_that_its_copy_would_have(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = Examples(torch.randn(shape).transpose(0, -1), torch.zeros(shape[0], dtype=torch.int64))
    at_once = training.fingerprint(b"key", examples)
    monkeypatch.setattr(training, "_SMALL", 0)
    assert training.fingerprint(b"key", examples) == at_once
