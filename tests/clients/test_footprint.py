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


LOADS = """
import sys, torch
from pathlib import Path
from torch import nn
from clients import cohort
from clients.task import Task
from clients.training import Node
from privacy.plan import Mechanism
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from scenarios.weights import flatten, layout

text, size, folder = sys.argv[1:]
data = Examples(torch.randn(40, 1, 6, 6), torch.arange(40) % 3)
first = [nn.Flatten(), nn.Linear(36, 16)] if size == "stack" else [nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten()]
net = lambda: nn.Sequential(*first, nn.Tanh(), nn.Linear(16, 3))
federation = Federation({"a": 40}, lambda name: data, data)
settings = override(Settings(), f"local.engine=cohort {text}")
node = Node(Scenario("made", settings, {"net": net}, lambda _: federation), settings, federation, Path(folder))
model = net()
mechanism = Mechanism(0.5, 1.0) if "example" in text else None
steps, clip = settings.local.steps, settings.privacy.clip
task = Task("train", 1, "a", flatten(model), layout(model), 0.1, steps, mechanism=mechanism, clip=clip)
work = cohort.forked(node)
before = set(sys.modules)
(reply,) = work([task])
print(reply.way.name, "sympy" in before, "sympy" in sys.modules, reply.reason)
"""


@pytest.mark.parametrize(
    ("text", "model", "said"),
    [
        ("local.steps=1", "stack", "gram False False "),
        ("local.batch=16 local.steps=40", "stack", "fused False False "),
        ("local.steps=3", "images", "fused False False "),
        ("local.steps=3 privacy.unit=example", "stack", "rows True True "),
        ("local.steps=3 privacy.unit=example", "images", "single True True "),
    ],
)
def test_sympy_is_loaded_where_opacus_is_used_and_then_before_processes_are_forked(
    text: str, model: str, said: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", LOADS, text, model, str(tmp_path)]
    done = subprocess.run(command, cwd=HOUSE, check=True, capture_output=True, text=True)
    assert done.stdout == f"{said}\n"


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (40, 1, 6, 6)])
def test_large_data_has_the_fingerprint_that_its_copy_would_have(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = Examples(torch.randn(shape).transpose(0, -1), torch.zeros(shape[0], dtype=torch.int64))
    at_once = training.fingerprint(b"key", examples)
    monkeypatch.setattr(training, "_SMALL", 0)
    assert training.fingerprint(b"key", examples) == at_once
