"""int8 models are smaller, nearly as exact, calibrated on what they were given, and safe on every processor."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edge_export.infer import logits, open_model
from edge_export.quantize import quantize
from edge_export.to_onnx import export
from privacy.refused import Refused


def _weights(graph: onnx.ModelProto) -> list[np.ndarray]:
    return [numpy_helper.to_array(w) for w in graph.graph.initializer if len(w.dims) > 1]


@pytest.mark.parametrize("name", ["mlp", "2nn", "cnn", "norms", "depthwise", "residual"])
def test_weights_are_7_bit_integers_and_logits_stay_close(exported, name):
    model, x, full = exported(name)
    graph = quantize(full, x.numpy())
    quantized = [w for w in _weights(graph) if w.dtype == np.int8]
    assert len(quantized) >= 2
    assert 60 <= max(np.abs(w.astype(int)).max() for w in quantized) <= 64
    with torch.no_grad():
        expected = model(x).numpy()
    found = logits(open_model(graph.SerializeToString()), x.numpy())
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert 0 < error < 0.05


def test_a_large_model_becomes_almost_four_times_smaller(exported):
    _, x, full = exported("2nn")
    assert full.ByteSize() / quantize(full, x.numpy()).ByteSize() > 3.7


def test_each_channel_has_its_own_scale():
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None] * torch.rand(4, 8).clamp(0.5))
    graph = quantize(export(model, torch.ones(1, 8), {}), np.ones((4, 8), np.float32))
    first = next(w for w in _weights(graph) if w.dtype == np.int8 and w.shape == (4, 8))
    assert (np.abs(first.astype(int)).max(1) > 60).all()  # with one scale for all, the first rows would be near 0


def test_the_input_range_is_that_of_the_calibration_inputs_alone(exported):
    _, x, full = exported("mlp")
    x = x.clamp(-1.5, 2.5)
    x[0, 0], x[0, 1] = -1.5, 2.5
    graph = quantize(full, x.numpy())
    (first,) = [node for node in graph.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "input"]
    values = {w.name: numpy_helper.to_array(w) for w in graph.graph.initializer}
    assert values[first.input[1]] == pytest.approx(4.0 / 255, rel=1e-6)
    assert values[first.input[2]] == round(1.5 / (4.0 / 255))


def test_logits_are_not_clipped_to_the_range_of_the_calibration():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.ones(2, 2))
    seen = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)  # logits up to 1
    session = open_model(quantize(export(model, torch.ones(1, 2), {}), seen).SerializeToString())
    assert logits(session, np.ones((1, 2), np.float32)) == pytest.approx(2.0, abs=0.05)


def test_the_opset_and_our_metadata_stay_and_the_source_is_untouched(exported):
    _, x, full = exported("norms")
    before = full.SerializeToString(deterministic=True)
    graph = quantize(full, x.numpy())
    assert full.SerializeToString(deterministic=True) == before
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]
    assert {entry.key: entry.value for entry in graph.metadata_props} == {"umbel.version": "1", "umbel.classes": "[]"}
    session = open_model(graph.SerializeToString())
    assert (session.get_inputs()[0].name, session.get_outputs()[0].name) == ("input", "logits")


def test_quantizing_twice_gives_the_same_bytes_and_prints_nothing(exported, capfd):
    _, x, full = exported("norms")
    first, second = (quantize(full, x.numpy()).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert capfd.readouterr() == ("", "")


def test_a_model_without_weights_is_refused(capfd):
    with pytest.raises(Refused, match="no weights that int8 could make smaller"):
        quantize(export(nn.Softmax(1), torch.ones(1, 4), {}), np.ones((2, 4), np.float32))
    assert capfd.readouterr() == ("", "")


def test_inputs_that_the_model_does_not_take_are_refused_in_one_line(exported):
    _, _, full = exported("mlp")
    with pytest.raises(Refused, match="onnxruntime cannot quantize the model") as refused:
        quantize(full, np.ones((2, 5), np.float32))
    assert "\n" not in str(refused.value)
