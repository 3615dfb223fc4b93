"""A torch model as the bytes of one ONNX file: opset 20, any batch, no traces of the machine that exported it."""

import copy
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from privacy.refused import Refused

OPSET = 20
"""GroupNorm runs faster on CPU in opset 20 than in 21 and later (measured)."""
INPUT, OUTPUT = "input", "logits"

_ABSOLUTE = re.compile(r"(?<![\w.])/[\w.@+-]+/[\w.@+-]+|(?<!\w)[A-Za-z]:\\")


def export(model: nn.Module, example_x: Tensor, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """`model` in evaluation mode, traced with the input (1, ...): input `input` (batch, ...), output `logits`.

    metadata: the only text inside besides names of tensors and operators.
    Raises Refused when torch cannot export the model.
    """
    two = example_x.expand(2, *example_x.shape[1:]).contiguous()  # a batch of 1 would be taken for a constant
    with quiet():
        try:
            program = torch.onnx.export(
                copy.deepcopy(model).eval(),
                (two,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = next((line for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
            raise Refused(f"torch cannot export {type(model).__name__} to ONNX: {reason.strip()}") from None
    assert program is not None
    return stripped(program.model_proto, metadata)


def stripped(model: onnx.ModelProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """`model` with no documentation and no metadata but `metadata`. Raises Refused if a path of a machine remains."""
    bare = copy.deepcopy(model)
    del bare.graph.value_info[:]
    for part in _parts(bare):
        for field in ("metadata_props", "doc_string"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
    bare.producer_name, bare.producer_version, bare.domain = "umbel", "", ""
    bare.graph.name = "umbel"
    try:
        onnx.checker.check_model(bare, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Refused(f"the exported model is no valid ONNX: {str(error).splitlines()[0]}") from None
    _refuse_paths(bare)
    for key, value in sorted(metadata.items()):
        bare.metadata_props.add(key=key, value=value)
    return bare


def describe(example_x: Tensor, outputs: int, classes: tuple[str, ...]) -> dict[str, str]:
    """The metadata of a shipped model: its shape of input, the meaning of its outputs, the names of its classes."""
    if classes and len(classes) != max(outputs, 2):
        raise Refused(f"{len(classes)} class names for a model of {max(outputs, 2)} classes: name all or none")
    return {
        "umbel.version": "1",  # of these keys
        "umbel.input": json.dumps(["N", *example_x.shape[1:]]),
        "umbel.output": "logit of class 1" if outputs == 1 else "logits of classes",
        "umbel.classes": json.dumps(classes, ensure_ascii=False),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """No warning, log line or printed graph of torch's exporter or onnxruntime's quantizer reaches the user."""
    loggers = [logging.getLogger(name) for name in ("", "torch", "torch.fx", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        onnxruntime.set_default_logger_severity(4)
        try:
            yield
        finally:
            onnxruntime.set_default_logger_severity(2)  # its default: warnings
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _parts(message: Any) -> Iterator[Any]:
    """`message` and every protobuf message inside it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                yield from _parts(part)


def _refuse_paths(model: onnx.ModelProto) -> None:
    for text in _texts(model):
        found = _ABSOLUTE.search(text)
        if found:
            raise Refused(f"the exported model names a path of this machine: {found.group()}")


def _texts(model: onnx.ModelProto) -> Iterator[str]:
    """Every text in `model`. Numbers are left out: the bytes of weights may spell anything."""
    for part in _parts(model):
        for field, value in part.ListFields():
            if field.type in (field.TYPE_STRING, field.TYPE_BYTES) and field.name != "raw_data":
                for text in value if field.is_repeated else [value]:
                    yield text if isinstance(text, str) else text.decode(errors="replace")
