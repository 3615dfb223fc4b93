"""Clients side by side: the sum that they would have one after another, and when they share a layer."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from clients import cohort, fused, sgd, together
from clients.task import Task
from clients.training import answer
from scenarios import Examples
from scenarios.settings import Settings, override
from scenarios.weights import flatten, layout

from .test_cohort import LOSS, MODELS, SIZES, WAYS, apart, decoded, examples, made_node, made_tasks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are shared whatever their size."""
    monkeypatch.setattr(together, "OUTGROWN", 1)
    monkeypatch.setattr(together, "MOST", 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_blocks_sum_is_that_of_its_clients_by_themselves(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = list[int]()
    add = together.Together.add
    monkeypatch.setattr(together.Together, "add", lambda self, *told: (sides.append(len(told[2])), add(self, *told))[1])
    monkeypatch.setitem(MODELS, "wide", wide)
    node = made_node(tmp_path, "wide", WAYS[way])
    tasks = made_tasks(node)
    summand = cohort.answer(node, tasks, float)[-1].summand
    single = decoded([answer(node, task) for task in tasks])
    truth = sum(size * update.astype(float) for size, update in zip(SIZES.values(), single, strict=True))
    assert sides == [3, 2]
    assert summand is not None
    assert summand.total is not None
    assert summand.whole == sum(SIZES.values())
    assert apart([summand.total], [truth]) < 2e-5


def flat() -> nn.Module:
    """Nothing that is trained lies before the first layer that is shared."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 3))


def extracted() -> nn.Module:
    """As with a feature extractor that stays as it is."""
    first = [nn.Conv2d(1, 4, 3, padding=1).requires_grad_(False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 3))


@pytest.mark.parametrize("made", [flat, extracted])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_shared_layer_may_be_the_first_that_is_trained(made: Callable[[], nn.Module], momentum: float) -> None:
    settings, model, pulls = override(Settings(), "local.batch=5"), made().double(), fused.Pulls.of(0.1, 0, 0, momentum)
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    trainer, truth, clients = fused.Trainer(copy.deepcopy(model), pulls), torch.zeros_like(start), []
    for name in ("a", "b", "d"):
        data = Examples(examples(name).x.double(), examples(name).y)
        task = Task("train", 1, name, flatten(model), layout(model), rate=0.1, steps=4)
        batches = list(sgd.shuffled(len(data.y), task, settings))
        truth += trainer.train(start, *data, batches, LOSS)[0]
        clients.append(together.Client(data, batches, 1.0))
    total, shared = torch.zeros_like(start), together.large(model, 30)
    assert shared
    together.Together(model, shared, pulls).add(total, start, clients, LOSS)
    assert float((total - truth).abs().max()) <= 1e-9 * float(truth.abs().max())


def test_a_model_of_shared_layers_alone_is_trained_client_by_client() -> None:
    assert not together.large(nn.Sequential(nn.Flatten(), nn.Linear(64, 400)), 30)


def wide() -> nn.Module:
    """Convolutions and two layers that clients of this file's sizes share, one of them without a bias."""
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(
        *first,
        nn.Linear(64, 400),
        nn.Tanh(),
        nn.Sequential(nn.Linear(400, 300, bias=False), nn.ReLU()),
        nn.Linear(300, 3),
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_in_float64_a_sum_is_the_same_to_a_billionth(momentum: float) -> None:
    text = f"local.batch=5 local.proximal=0.3 local.weight_decay=0.1 local.momentum={momentum}"
    settings, model, pulls = override(Settings(), text), wide().double(), fused.Pulls.of(0.1, 0.3, 0.1, momentum)
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    trainer, truth, clients = fused.Trainer(copy.deepcopy(model), pulls), torch.zeros_like(start), []
    for weight, (name, steps) in enumerate({"a": 6, "b": 3, "d": 4}.items(), 1):
        data = Examples(examples(name).x.double(), examples(name).y)
        task = Task("train", 1, name, flatten(model), layout(model), rate=0.1, steps=steps)
        batches = list(sgd.shuffled(len(data.y), task, settings))
        truth += weight * trainer.train(start, *data, batches, LOSS)[0]
        clients.append(together.Client(data, batches, float(weight)))
    total = torch.zeros_like(start)
    together.Together(model, together.large(model, 30), pulls).add(total, start, clients, LOSS)
    assert float((total - truth).abs().max()) <= 1e-9 * float(truth.abs().max())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(lambda x, y: (x, y + 9), "failed with IndexError"), (lambda x, y: (x * torch.inf, y), "finite")],
)
def test_who_fails_beside_others_is_named_and_alone_not_in_the_sum(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    reason: str,
) -> None:
    def data(name: str) -> Examples:
        x, y = examples(name)
        return Examples(*spoil(x, y)) if name == "c" else Examples(x, y)

    monkeypatch.setitem(MODELS, "wide", wide)
    node = made_node(tmp_path, "wide", WAYS["epochs"])
    broken = replace(node, federation=replace(node.federation, client=data))
    replies = cohort.answer(broken, made_tasks(node), float)
    assert [reply.client for reply in replies if reply.reason] == ["c"]
    assert reason in replies[2].reason
    assert replies[-1].summand is not None
    assert replies[-1].summand.whole == sum(SIZES.values()) - SIZES["c"]


LAST = nn.Linear(400, 3)
APART: dict[str, list[nn.Module]] = {
    "dropout": [nn.Dropout(0.3), LAST],
    "batch norm": [nn.BatchNorm1d(400), LAST],
    "a layer that nobody knows": [nn.Bilinear(4, 4, 3)],
    "a layer used twice": [nn.Linear(400, 400)] * 2,
}


@pytest.mark.parametrize("name", APART)
def test_who_draws_or_looks_beyond_a_batch_shares_no_layer(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), *APART[name])
    assert together.large(model, 1) == []


def test_layers_are_shared_where_clients_meet_few_rows_and_see_each_as_one() -> None:
    model = wide()
    assert together.large(model, 1) == [model[4], model[6][0], model[7]]
    assert together.large(model, 100) == [model[6][0]]
    assert together.large(nn.Sequential(nn.Linear(8, 8), nn.Flatten(), LAST), 1) == [LAST]
    model[0].register_forward_hook(lambda *_: None)
    assert together.large(model, 1) == []
