"""Does an exported model answer as the torch model does: the largest difference of logits, and accuracy."""

import copy

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_export.infer import BATCH, logits
from privacy.refused import Refused
from scenarios import Examples, predict

ALLOWED = 1e-4
"""Largest difference of a float32 model's logits from torch's; beyond it the model is not shipped."""
BATCHES = (1, 7)
"""Batch sizes that are checked besides the usual one: an export may hold on to the batch it was traced with."""


def torch_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs (N, K) of `model` in evaluation mode for inputs (N, ...); `model` is left as it was."""
    still = copy.deepcopy(model).eval()
    with torch.no_grad():
        return torch.cat([still(part) for part in torch.split(x, BATCH)])


def max_abs_diff(session: onnxruntime.InferenceSession, model: nn.Module, x: Tensor) -> float:
    """Largest absolute difference of `session`'s logits from `model`'s, on x (N, ...) and on the small BATCHES.

    Raises Refused when the exported model fails, answers in another shape, or either answers with what is not finite.
    """
    small = [x[torch.arange(size) % len(x)] for size in BATCHES]
    return max(_diff(session, model, part) for part in [*small, x])


def _diff(session: onnxruntime.InferenceSession, model: nn.Module, x: Tensor) -> float:
    expected, found = torch_logits(model, x).numpy(), _logits(session, x)
    if found.shape != expected.shape:
        raise Refused(f"the exported model answers {found.shape} where torch answers {expected.shape}")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise Refused("the model answers with values that are not finite")
    return float(np.abs(found - expected).max())


def accuracy(session: onnxruntime.InferenceSession, examples: Examples) -> float:
    """Share of `examples` that the exported model classifies right."""
    return right(torch.from_numpy(_logits(session, examples.x)), examples.y)


def right(outputs: Tensor, y: Tensor) -> float:
    """Share of outputs (N, K) whose class is y (N,)."""
    return float((predict(outputs) == y).double().mean())


def _logits(session: onnxruntime.InferenceSession, x: Tensor) -> NDArray[np.float32]:
    try:
        return logits(session, x.numpy())
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise Refused(f"the exported model fails on a batch of {len(x)}: {str(error).splitlines()[0]}") from None
