"""Static int8 quantization (QDQ) of an exported model, calibrated on the server's validation inputs alone."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edge_export.to_onnx import INPUT, OUTPUT, quiet, stripped
from privacy.refused import Refused

CALIBRATION = 1000
"""Validation inputs that calibrate at most."""
BATCH = 100


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Inputs (N, ...) in batches, as the calibrator asks for them."""

    def __init__(self, x: NDArray[np.float32]) -> None:
        self._left = iter([{INPUT: x[i : i + BATCH]} for i in range(0, len(x), BATCH)])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._left, None)


def quantize(model: onnx.ModelProto, calibration_x: NDArray[np.float32]) -> onnx.ModelProto:
    """`model` with 8-bit weights (one scale a channel) and 8-bit activations (range seen on `calibration_x` (N, ...)).

    Weights use 7 of the 8 bits: processors without VNNI add two products in 16 bits, and 8-bit weights overflow there
    without a word. So the answers that were checked here are those of every device.
    Raises Refused when nothing in the model can be quantized.
    """
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder, quiet():
        source, path = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)  # given a model in memory, quantize_static moves its weights out into a file
        try:
            quantize_static(
                source,
                path,
                _Batches(calibration_x[:CALIBRATION]),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            done = onnx.load(path)
        except Exception as error:  # the quantizer raises whatever its node handlers stumble on
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise Refused(f"onnxruntime cannot quantize the model: {reason}") from None
    if not any(w.data_type == onnx.TensorProto.INT8 and len(w.dims) > 1 for w in done.graph.initializer):
        raise Refused("the model has no weights that int8 could make smaller or faster")
    _unquantize_logits(done)
    return stripped(done, {entry.key: entry.value for entry in model.metadata_props})


def _unquantize_logits(model: onnx.ModelProto) -> None:
    """Take the last rounding away, in place: it would clip logits beyond the calibration's, and tie near ones."""
    nodes = model.graph.node
    made_by = {output: node for node in nodes for output in node.output}
    last = made_by[OUTPUT]
    rounding = made_by.get(last.input[0])
    if last.op_type != "DequantizeLinear" or rounding is None or rounding.op_type != "QuantizeLinear":
        return
    if sum(rounding.output[0] in node.input for node in nodes) > 1 or rounding.input[0] not in made_by:
        return
    logits = rounding.input[0]
    nodes.remove(last)
    nodes.remove(rounding)
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == logits:
                    names[i] = OUTPUT
    used = {name for node in nodes for name in node.input}
    for weight in [weight for weight in model.graph.initializer if weight.name not in used]:
        model.graph.initializer.remove(weight)
