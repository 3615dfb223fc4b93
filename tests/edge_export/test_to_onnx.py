"""An exported model is one file for any batch, holds no trace of the machine, and answers as torch does."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_export.infer import logits, open_model
from edge_export.to_onnx import describe, export, stripped
from privacy.refused import Refused

META = {"umbel.version": "1", "umbel.classes": "[]"}


@pytest.mark.parametrize("name", ["mlp", "cnn", "norms", "depthwise", "residual"])
def test_it_answers_as_torch_does_for_any_batch(exported, name):
    model, x, graph = exported(name)
    session = open_model(graph.SerializeToString())
    for batch in (1, 2, 7, 50):
        with torch.no_grad():
            expected = model(x[:batch]).numpy()
        assert np.abs(logits(session, x[:batch].numpy()) - expected).max() < 1e-5


def test_it_is_opset_20_with_named_float_input_and_output_and_a_free_batch(exported):
    _, _, graph = exported("cnn")
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]
    session = open_model(graph.SerializeToString())
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("input", "tensor(float)", ["batch", 1, 28, 28])
    assert (made.name, made.type, made.shape) == ("logits", "tensor(float)", ["batch", 10])


@pytest.mark.parametrize("name", ["mlp", "norms"])
def test_the_bytes_hold_no_path_no_source_and_no_text_but_ours(exported, name):
    _, _, graph = exported(name)
    data = graph.SerializeToString()
    here = [Path(__file__).parents[2], Path(torch.__file__).parent, Path.home(), sys.prefix]
    for text in [*map(str, here), "site-packages", ".py", "pytorch", "stack_trace", "torch.nn", "aten"]:
        assert text.encode() not in data, text
    assert {entry.key: entry.value for entry in graph.metadata_props} == META


@pytest.mark.parametrize("where", ["/home/someone/model.py", "see /usr/lib/x.so there", "C:\\Users\\someone"])
def test_a_path_that_remains_in_a_name_is_refused(exported, where):
    _, _, graph = exported("mlp")
    graph.graph.node[0].name = where
    with pytest.raises(Refused, match="names a path of this machine"):
        stripped(graph, {})


def test_weights_whose_bytes_spell_a_path_are_no_path(exported):
    _, _, graph = exported("mlp")
    spelled = b"/home/someone/y:\\t" * 2
    graph.graph.initializer[0].raw_data = spelled.ljust(64 * 64 * 4, b"\0")
    scale = onnx.helper.make_tensor("scale", onnx.TensorProto.INT8, [len(spelled)], list(spelled))
    graph.graph.initializer.append(scale)
    assert spelled in stripped(graph, {}).SerializeToString()


def test_documentation_and_metadata_are_stripped_wherever_they_are(exported):
    _, _, graph = exported("mlp")
    clean = stripped(graph, {}).SerializeToString()
    graph.doc_string = graph.graph.doc_string = graph.graph.node[0].doc_string = "/root/secret"
    for part in [graph, graph.graph, graph.graph.node[0], graph.graph.input[0], graph.graph.initializer[0]]:
        part.metadata_props.add(key="where", value="/root/secret")
    assert stripped(graph, {}).SerializeToString() == clean


def test_weights_lie_in_the_file_itself(exported):
    _, _, graph = exported("cnn")
    assert all(weight.data_location == onnx.TensorProto.DEFAULT for weight in graph.graph.initializer)
    assert len(graph.SerializeToString()) > 4 * 1_663_370


def test_exporting_twice_gives_the_same_bytes(exported):
    model, x, first = exported("norms")
    second = export(model, x[:1], META)
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_the_model_keeps_its_mode_and_its_weights(build):
    model, x = build("norms")
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export(model, x[:1], META)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_is_printed_and_loggers_keep_their_levels(build, capfd):
    levels = [logging.getLogger(name).level for name in ("", "torch", "torch.onnx")]
    model, x = build("mlp")
    export(model, x[:1], META)
    assert capfd.readouterr() == ("", "")
    assert [logging.getLogger(name).level for name in ("", "torch", "torch.onnx")] == levels


class _Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_torch_cannot_export_is_refused_in_one_line(capfd):
    with pytest.raises(Refused, match="torch cannot export _Branch to ONNX: ") as refused:
        export(_Branch(), torch.ones(1, 4), META)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_the_metadata_say_what_goes_in_and_what_comes_out():
    said = describe(torch.ones(1, 1, 28, 28), 2, ("cat", "dog"))
    assert json.loads(said["umbel.input"]) == ["N", 1, 28, 28]
    assert json.loads(said["umbel.classes"]) == ["cat", "dog"]
    assert said["umbel.output"] == "logits of classes"
    assert describe(torch.ones(1, 3), 1, ("well", "ill"))["umbel.output"] == "logit of class 1"


@pytest.mark.parametrize("outputs", [1, 2])
def test_class_names_that_do_not_fit_the_outputs_are_refused(outputs):
    with pytest.raises(Refused, match="3 class names for a model of 2 classes"):
        describe(torch.ones(1, 3), outputs, ("a", "b", "c"))
