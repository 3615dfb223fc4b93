"""Pruning removes whole hidden channels, the least important ones, and leaves a model that clients can rebuild."""

import copy

import pytest
import torch
from torch import nn

from edge_export.prune import Pruned, macs, prune
from privacy.refused import Refused
from scenarios import weights

NAMES = ["mlp", "2nn", "cnn", "norms", "depthwise", "residual"]


@pytest.mark.parametrize("name", NAMES)
def test_a_newly_built_model_takes_the_pruned_layout_and_gives_the_same_outputs(build, name):
    model, x = build(name)
    small, _ = prune(model, x[:1], 0.5)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    weights.fit(fresh, weights.layout(small))
    weights.load(fresh, weights.flatten(small))
    with torch.no_grad():
        assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("name", NAMES)
def test_multiply_accumulates_fall_and_the_outputs_keep_their_number(build, name):
    model, x = build(name)
    small, done = prune(model, x[:1], 0.5)
    assert done.macs_after < 0.6 * done.macs_before
    assert (done.macs_before, done.macs_after) == (macs(model, x[:1]), macs(small, x[:1]))
    assert done.parameters_after == sum(p.numel() for p in small.parameters()) < done.parameters_before
    with torch.no_grad():
        assert small(x).shape == model(x).shape


@pytest.mark.parametrize("name", NAMES)
def test_the_input_model_is_untouched(build, name):
    model, x = build(name)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small, _ = prune(model, x[:1], 0.5)
    assert model.training
    assert small.training
    assert not any(p.requires_grad for p in [*model.parameters(), *small.parameters()])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def test_the_numbers_are_those_of_a_hand_count(build):
    model, x = build("cnn")
    _, done = prune(model, x[:1], 0.5)
    before = 28 * 28 * 32 * 25 + 14 * 14 * 64 * 32 * 25 + 3136 * 512 + 512 * 10
    after = 28 * 28 * 16 * 25 + 14 * 14 * 32 * 16 * 25 + 1568 * 256 + 256 * 10
    assert (done.macs_before, done.macs_after) == (before, after)
    assert done.parameters_before == 1_663_370  # McMahan et al. 2017, section 3
    model, x = build("2nn")
    _, done = prune(model, x[:1], 0.5)
    assert done == Pruned(784 * 200 + 200 * 200 + 2000, 784 * 100 + 100 * 100 + 1000, 199_210, 89_610)


@pytest.mark.parametrize(("name", "layers"), [("mlp", (0, 2)), ("cnn", (0, 3, 7, 9))])
def test_channels_without_weight_go_first_so_that_the_function_stays(build, name, layers):
    model, x = build(name)
    for i in layers[:-1]:
        dead = torch.randperm(len(model[i].weight), generator=torch.Generator().manual_seed(i))[::2]
        with torch.no_grad():
            model[i].weight[dead] = 0
            model[i].bias[dead] = 0
    small, _ = prune(model, x[:1], 0.5)
    assert len(small[layers[0]].weight) == len(model[layers[0]].weight) // 2
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=0)


def test_the_strongest_channels_are_those_that_stay():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 1.0, 5.0, 2.0, 6.0, 4.0])[:, None].expand(6, 4))
        model[2].weight.fill_(0.1)
    small, _ = prune(model, torch.ones(1, 4), 0.5)
    assert small[0].weight[:, 0].tolist() == [5.0, 6.0, 4.0]


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_the_share_is_the_share_of_channels_that_goes(build, share):
    model, x = build("mlp")
    small, _ = prune(model, x[:1], share)
    assert small[0].out_features == small[2].in_features == 64 * (1 - share)


def test_pruning_twice_gives_the_same_bits(build):
    model, x = build("norms")
    first, second = (weights.flatten(prune(model, x[:1], 0.5)[0]) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.BatchNorm1d(6), nn.Flatten()])
def test_outputs_stay_whatever_follows_the_last_layer(last):
    model = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 6), last)
    small, _ = prune(model, torch.ones(1, 13), 0.5)
    assert (small[0].out_features, small[2].out_features) == (16, 6)


@pytest.mark.parametrize("model", [nn.Linear(13, 1), nn.Sequential(nn.Flatten(), nn.Linear(13, 10))])
def test_a_model_without_hidden_channels_is_refused(model):
    with pytest.raises(Refused, match="there is nothing to prune: the model has no hidden channels"):
        prune(model, torch.ones(1, 13), 0.5)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_removes_nothing_or_everything_is_refused(build, share):
    model, x = build("mlp")
    with pytest.raises(Refused, match=r"set export\.prune above 0 and below 1"):
        prune(model, x[:1], share)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


def test_a_model_that_cannot_be_pruned_is_refused_in_one_line_and_left_alone():
    model, x = _Recurrent(), torch.ones(1, 5, 8)
    before = weights.flatten(model)
    with pytest.raises(Refused, match=r"set export\.prune=0$") as refused:
        prune(model, x, 0.5)
    assert "\n" not in str(refused.value)
    assert weights.flatten(model).tobytes() == before.tobytes()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def test_layers_that_share_parameters_are_not_parted():
    with pytest.raises(Refused, match="share parameters"):
        prune(Tied(), torch.zeros(1, 6), 0.5)
