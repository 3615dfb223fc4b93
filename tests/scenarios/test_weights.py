"""Weights as one vector and back; fitting a model to a pruned one's shapes, with a real pruner as the judge."""

import copy

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn

from privacy.refused import Refused
from scenarios import weights

MODELS = {
    "linear": lambda: nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 3)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(), _Head(16)
    ),
    "batch norm without affine": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=False), nn.ReLU(), _Head(16)
    ),
    "group norm": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), _Head(16)),
    "layer norm": lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), _Head(16)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), _Head(16)),
    "one dimension": lambda: nn.Sequential(nn.Conv1d(3, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), _Head(16)),
}
battery = pytest.mark.parametrize("name", MODELS)


class _Head(nn.Module):
    """Mean over all positions, then three outputs."""

    def __init__(self, channels):
        super().__init__()
        self.out = nn.Linear(channels, 3)

    def forward(self, x):
        return self.out(x.flatten(2).mean(2))


def build(name):
    """(model with running statistics that are not its initial ones, a batch for it)."""
    torch.manual_seed(0)
    model = MODELS[name]()
    first = model[0]
    shape = {nn.Linear: (12,), nn.Conv1d: (3, 9), nn.Conv2d: (3, 9, 9)}[type(first)]
    x = torch.randn(5, *shape)
    for _ in range(3):
        model(x)
    return model.eval(), x


def pruned(name):
    """The model of `build` without half its hidden channels, by torch-pruning, and its batch."""
    model, x = build(name)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    pruner = torch_pruning.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[last])
    pruner.step()
    return model, x


# ---- vector and back ----


@battery
def test_a_model_loaded_from_its_own_vector_gives_the_same_outputs(name):
    model, x = build(name)
    torch.manual_seed(1)
    other = MODELS[name]().eval()
    assert not torch.equal(other(x), model(x))
    weights.load(other, weights.flatten(model))
    assert torch.equal(other(x), model(x))


@battery
def test_the_vector_lies_as_the_layout_says(name):
    model, _ = build(name)
    vector, shapes = weights.flatten(model), weights.layout(model)
    assert vector.dtype == np.float32
    assert vector.shape == (sum(int(np.prod(shape)) for _, shape in shapes),)
    state, start = model.state_dict(), 0
    for entry, shape in shapes:
        size = int(np.prod(shape))
        assert (vector[start : start + size] == state[entry].numpy().ravel()).all()
        start += size
    named = weights.unflatten(vector, shapes)
    assert all(torch.equal(named[entry], state[entry]) for entry, _ in shapes)


def test_running_statistics_travel_and_counters_stay():
    model, _ = build("batch norm")
    entries = [entry for entry, _ in weights.layout(model)]
    assert {"1.running_mean", "1.running_var"} <= set(entries)
    assert "1.num_batches_tracked" not in entries
    other = MODELS["batch norm"]()
    weights.load(other, weights.flatten(model))
    assert int(model[1].num_batches_tracked) == 3
    assert int(other[1].num_batches_tracked) == 0


def test_vector_and_model_share_no_memory():
    model, _ = build("linear")
    vector = weights.flatten(model)
    before = vector.copy()
    named = weights.unflatten(vector, weights.layout(model))
    with torch.no_grad():
        for value in [*model.parameters(), *named.values()]:
            value.add_(1)
    assert (vector == before).all()
    weights.load(model, vector)
    vector += 1
    assert (weights.flatten(model) == before).all()


@pytest.mark.parametrize("change", [-1, 1])
def test_a_vector_of_another_length_is_refused_with_both(change):
    model, _ = build("linear")
    size = len(weights.flatten(model))
    before = weights.flatten(model)
    with pytest.raises(Refused, match=rf"\({size + change},\) came where the model has {size} entries"):
        weights.load(model, np.zeros(size + change, np.float32))
    assert (weights.flatten(model) == before).all()


def test_a_matrix_is_no_vector():
    model, _ = build("linear")
    with pytest.raises(Refused, match="entries"):
        weights.load(model, weights.flatten(model)[None])


# ---- fit ----


@battery
def test_a_fresh_model_fitted_to_a_pruned_one_gives_its_outputs(name):
    small, x = pruned(name)
    fresh = MODELS[name]().eval()
    assert weights.layout(small) != weights.layout(fresh)
    weights.fit(fresh, weights.layout(small))
    weights.load(fresh, weights.flatten(small))
    assert torch.equal(fresh(x), small(x))


@battery
def test_a_fitted_model_trains_as_the_pruned_one(name):
    small, x = pruned(name)
    fresh = MODELS[name]()
    weights.fit(fresh, weights.layout(small))
    weights.load(fresh, weights.flatten(small))
    for model in (small.train(), fresh.train()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert (weights.flatten(small) == weights.flatten(fresh)).all()


def test_a_fitted_layer_says_its_own_sizes():
    small, _ = pruned("grouped")
    fresh = MODELS["grouped"]()
    weights.fit(fresh, weights.layout(small))
    assert str(fresh) == str(small)


def test_fitting_to_the_same_layout_leaves_the_model_as_it_is():
    model, _ = build("batch norm")
    before = list(model.parameters())
    weights.fit(model, weights.layout(model))
    assert all(new is old for new, old in zip(model.parameters(), before, strict=True))


def shapes_with(model, entry, shape):
    return tuple((name, shape if name == entry else old) for name, old in weights.layout(model))


@pytest.mark.parametrize(
    "shape",
    [(17, 12), (10**12, 12), (0, 12), (-4, 12), (16,), (16, 12, 1)],
    ids=["more", "huge", "none", "negative", "short", "long"],
)
def test_a_shape_that_is_no_part_of_the_models_is_refused_and_changes_nothing(shape):
    model, x = build("linear")
    before = model(x)
    with pytest.raises(Refused, match=r"0\.weight has shape .* no part of \(16, 12\)"):
        weights.fit(model, shapes_with(model, "0.weight", shape))
    assert torch.equal(model(x), before)


def test_weights_of_another_model_are_refused():
    model, _ = build("linear")
    with pytest.raises(Refused, match="names differ"):
        weights.fit(model, weights.layout(build("batch norm")[0]))
    with pytest.raises(Refused, match="names differ"):
        weights.fit(model, weights.layout(model)[:-1])


def test_a_layer_of_another_kind_that_would_have_to_change_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    with pytest.raises(Refused, match=r"layer '0' \(Embedding\)"):
        weights.fit(copy.deepcopy(model), shapes_with(model, "0.weight", (10, 2)))
