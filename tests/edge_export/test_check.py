"""The check finds what differs from torch: a changed weight, a frozen batch, values that are not finite."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edge_export import check
from edge_export.infer import open_model
from privacy.refused import Refused
from scenarios import Examples


def _session(graph: onnx.ModelProto):
    return open_model(graph.SerializeToString())


class _Odd(nn.Module):
    """A model that answers differently where the first input is large."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + 0.5 * (x[:, :1] > 50)


def test_a_faithful_export_differs_by_rounding_only(exported):
    model, x, graph = exported("cnn")
    assert 0 < check.max_abs_diff(_session(graph), model, x) < check.ALLOWED / 10


def test_a_changed_weight_shows_with_its_size(exported):
    model, x, graph = exported("mlp")
    (bias,) = [w for w in graph.graph.initializer if w.name == "2.bias"]
    values = numpy_helper.to_array(bias).copy()
    values[3] += 0.25
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    assert check.max_abs_diff(_session(graph), model, x) == pytest.approx(0.25, abs=1e-5)


def test_a_difference_in_one_single_example_is_found(exported):
    model, x, graph = exported("mlp")
    x = x.clone()
    x[33, 0] = 100.0  # beyond the small batches
    odd = _Odd(model)
    assert check.max_abs_diff(_session(graph), odd, x[:33]) < 1e-5
    assert check.max_abs_diff(_session(graph), odd, x) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("frozen", [50, 7])
def test_an_export_that_holds_on_to_its_batch_is_refused(exported, frozen):
    model, x, graph = exported("mlp")
    # A model that flattens all rows into the batch it was traced with.
    shape = numpy_helper.from_array(np.array([frozen, 64]), "shape")
    graph.graph.initializer.append(shape)
    graph.graph.node.insert(0, onnx.helper.make_node("Reshape", ["input", "shape"], ["rows"]))
    graph.graph.node[1].input[0] = "rows"
    with pytest.raises(Refused, match="the exported model fails on a batch of 1"):
        check.max_abs_diff(_session(graph), model, x)


def test_answers_of_another_shape_are_refused(exported):
    model, x, graph = exported("mlp")
    with pytest.raises(Refused, match=r"answers \(1, 10\) where torch answers \(1, 64\)"):
        check.max_abs_diff(_session(graph), model[0], x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_answers_that_are_not_finite_are_refused(exported, value):
    model, x, graph = exported("mlp")
    (bias,) = [w for w in graph.graph.initializer if w.name == "2.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.full(10, value, np.float32), bias.name))
    with pytest.raises(Refused, match="not finite"):
        check.max_abs_diff(_session(graph), model, x)


def test_a_torch_model_that_diverged_is_refused_too(exported):
    model, x, graph = exported("mlp")
    diverged = copy.deepcopy(model)
    nn.init.constant_(diverged[2].bias, float("nan"))
    with pytest.raises(Refused, match="not finite"):
        check.max_abs_diff(_session(graph), diverged, x)


def test_accuracy_is_the_share_of_right_classes_over_several_batches(exported):
    model, _, graph = exported("mlp")
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::3] = (y[::3] + 1) % 10
    assert check.accuracy(_session(graph), Examples(x, y)) == pytest.approx(400 / 600)


def test_one_column_is_the_logit_of_class_1():
    outputs = torch.tensor([[-1.0], [2.0], [3.0], [-0.5]])
    assert check.right(outputs, torch.tensor([0, 1, 0, 0])) == 0.75
