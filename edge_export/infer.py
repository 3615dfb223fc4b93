"""On the device: classes (and logits) of inputs by an exported model; needs numpy and onnxruntime only.

`python -m edge_export.infer model.onnx input.npy [--out logits.npy]`
Legend: N examples, K columns of logits (one column is the logit of class 1).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

BATCH = 256
"""Rows that run at once: bounds memory whatever N is."""


class Unusable(ValueError):
    """An input file that cannot be used; the message is one line: what was wrong, where, what to do."""


def open_model(model: bytes, name: str = "the model") -> onnxruntime.InferenceSession:
    """A session on one thread over the bytes of an ONNX file; `name` stands in the error.

    Weights that point to another file are not followed. Raises Unusable if onnxruntime cannot run these bytes, or they
    are no classifier with one float32 input and one float32 output (N, K).
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Without this, onnxruntime looks for external weights beside the current directory; below a device nothing can lie.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise Unusable(f"{name} is not an ONNX model that runs here: {_line(error)}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if [i.type for i in inputs] != ["tensor(float)"] or [o.type for o in outputs] != ["tensor(float)"]:
        raise Unusable(f"{name} must have one float32 input and one float32 output: export it with Umbel")
    if len(inputs[0].shape) < 2 or len(outputs[0].shape) != 2:
        raise Unusable(f"{name} must map (N, ...) to (N, K): export it with Umbel")
    return session


def logits(session: onnxruntime.InferenceSession, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs (N, K) of `session` for inputs (N, ...), N at least 1."""
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: np.ascontiguousarray(x[i : i + BATCH])})[0] for i in range(0, len(x), BATCH)]
    return np.concatenate(parts)


def classes(logits_NK: NDArray[np.float32]) -> NDArray[np.int64]:
    """Class indices (N,) of logits (N, K)."""
    if logits_NK.shape[1] == 1:
        return (logits_NK[:, 0] > 0).astype(np.int64)
    found: NDArray[np.int64] = np.argmax(logits_NK, axis=1)
    return found


def read_input(path: Path, session: onnxruntime.InferenceSession) -> NDArray[np.float32]:
    """The array of an .npy file, on disk until it is used; nothing is unpickled.

    Raises Unusable unless it is finite float32 (N, ...) as `session` takes it, N at least 1.
    """
    try:
        x = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, EOFError):
        raise Unusable(f"{path} is no whole .npy file: save one float32 array with numpy.save") from None
    # A symbolic dimension (a string) takes any size.
    wanted = session.get_inputs()[0].shape
    if x.dtype != np.float32:
        raise Unusable(f"{path} holds {x.dtype}, but the model takes float32: save x.astype('float32')")
    if x.ndim != len(wanted) or any(isinstance(w, int) and n != w for n, w in zip(x.shape, wanted, strict=True)):
        shape = ", ".join(["N", *map(str, wanted[1:])])
        raise Unusable(f"{path} has shape {x.shape}, but the model takes ({shape})")
    if len(x) == 0:
        raise Unusable(f"{path} holds no examples: its first dimension is 0")
    if not all(np.isfinite(x[i : i + BATCH]).all() for i in range(0, len(x), BATCH)):
        raise Unusable(f"{path} holds values that are not finite: clean the input")
    return x


def write_logits(path: Path, logits_NK: NDArray[np.float32]) -> None:
    """Save logits (N, K) as .npy, all or nothing. Raises Unusable if the folder cannot be written."""
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            np.save(file, logits_NK)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Unusable(f"{path} cannot be written: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one class index a line; 0, or 2 with one line on stderr when an input cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m edge_export.infer", description="Classes of inputs, one a line.")
    parser.add_argument("model", type=Path, help="an exported model, as model.onnx of a run")
    parser.add_argument("input", type=Path, help="float32 inputs as .npy: N x the model's input shape")
    parser.add_argument("--out", type=Path, help="also save the logits (N, K) as .npy")
    asked = parser.parse_args(arguments)
    try:
        try:
            model = asked.model.read_bytes()
        except OSError as error:
            raise Unusable(f"{asked.model} cannot be read: {error.strerror}") from None
        session = open_model(model, str(asked.model))
        result = logits(session, read_input(asked.input, session))
        if asked.out is not None:
            write_logits(asked.out, result)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, classes(result))))
    return 0


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
