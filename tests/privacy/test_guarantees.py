"""The guarantees that docstrings state: every file that adds noise has one, and DP-SGD's is held as a distribution."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from privacy.dp_sgd import PrivateGradient, noise_generator
from privacy.plan import Mechanism

PRIVACY = Path(__file__).parents[2] / "privacy"
NOISE = {"normal", "randn", "gauss", "laplace", "integers", "DPOptimizer"}


def adds_noise(tree: ast.Module) -> bool:
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(getattr(function, "attr", getattr(function, "id", "")) in NOISE for function in called)


def test_every_file_that_adds_noise_states_what_it_guarantees() -> None:
    trees = {path.name: ast.parse(path.read_text()) for path in PRIVACY.glob("*.py")}
    found = {name for name, tree in trees.items() if adds_noise(tree)}
    assert {"dp_sgd.py", "cohort_noise.py"} <= found
    assert [name for name in found if "\nGuarantee: " not in (ast.get_docstring(trees[name]) or "")] == []


# "every call of `PrivateGradient.step` is one `Mechanism` step on the client's examples, add-or-remove-one adjacency":
# with one example or with none, what is seen along its gradient, in units of C, is q N(1, z^2) + (1 - q) N(0, z^2) or
# N(0, z^2), and no direction but that one tells the two apart.

CLIP, STEPS = 0.3, 1500


def seen(mechanism: Mechanism, there: bool) -> np.ndarray:
    """(STEPS,) what steps release along the gradient of an example that is there or not, in units of C."""
    torch.manual_seed(3)
    model, x, y = nn.Linear(4, 3), torch.tensor([[1.0, -2.0, 0.5, 3.0]]), torch.tensor([1])
    nn.functional.cross_entropy(model(x), y).backward()
    direction = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    assert direction.norm() > CLIP  # the clip is at work
    direction = direction / direction.norm()
    private = PrivateGradient(model, nn.functional.cross_entropy, mechanism, CLIP, noise_generator(None))
    found = []
    for batch in private.batches(1, STEPS):
        private.step(x[batch if there else []], y[batch if there else []])
        released = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        found.append(float(released @ direction) * mechanism.sampling_rate / CLIP)  # a sum again: the batch expected
    return np.array(found)


def follows(values: np.ndarray, rate: float, noise: float) -> bool:
    """Kolmogorov-Smirnov, at 1e-4."""

    def cumulative(at: np.ndarray) -> np.ndarray:
        return rate * stats.norm.cdf(at, 1, noise) + (1 - rate) * stats.norm.cdf(at, 0, noise)

    return bool(stats.kstest(values, cumulative).pvalue > 1e-4)


@pytest.mark.parametrize("mechanism", [Mechanism(0.4, 0.3), Mechanism(1.0, 1.0)])
def test_a_step_of_dp_sgd_is_the_mechanism_that_is_accounted_and_no_other(mechanism: Mechanism) -> None:
    rate, noise = mechanism.sampling_rate, mechanism.noise_multiplier
    there, gone = seen(mechanism, True), seen(mechanism, False)
    assert follows(there, rate, noise)
    assert follows(gone, 0.0, noise)
    assert not follows(there, 0.7 * rate, noise)
    assert not follows(there, rate, 0.5 * noise)
    assert not follows(there, rate, 2 * noise)
    assert not follows(gone, 0.2, noise)
    assert not follows(2 * there, rate, noise)  # the example counted twice, or noise for half the norm
    assert math.isclose(float(gone.mean()), 0, abs_tol=5 * noise / math.sqrt(STEPS))
