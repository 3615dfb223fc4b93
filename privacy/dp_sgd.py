"""Example-level DP-SGD: the only door to Opacus, from the check of a model to a noisy gradient.

Guarantee: with the generator of `noise_generator(None)`, every call of `PrivateGradient.step` is one `Mechanism` step
on the client's examples, add-or-remove-one adjacency, whoever sees the gradient (Abadi et al. 2016, Algorithm 1).
"""

import os
import warnings
from collections.abc import Callable, Iterator

import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from privacy.plan import History, Mechanism
from privacy.refused import Refused

_FLOATS_AT_ONCE = 1 << 26


def check(model: nn.Module) -> None:
    """Refuse a model in which one example touches another's gradient, naming the layer and the remedy.

    Opacus looks at trainable layers of exact type only; statistics of frozen, non-affine or derived batch norms
    leave the client as well, so every batch norm is refused here.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise Refused(
                f"layer {name!r} ({type(module).__name__}) mixes the examples of a batch, so example-level DP cannot "
                "hold: use nn.GroupNorm in its place, or privacy.unit=none"
            )
    if errors := ModuleValidator.validate(model, strict=False):
        raise Refused(f"the model does not allow example-level DP: {str(errors[0]).splitlines()[0]}")


def noise_generator(seed: int | None) -> torch.Generator:
    """A generator seeded by the operating system's entropy; by `seed` only where no guarantee is claimed."""
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(os.urandom(8), "big") if seed is None else seed)
    return generator


class PrivateGradient:
    """Leaves in every `parameter.grad` the clipped, noised mean gradient of a Poisson sample.

    Opacus' own classes do the work; its PrivacyEngine is not used because it derives the sampling rate and the
    expected batch from the loader's length (rate 1/ceil(n/B), batch 0 for n=49, B=1), and both must be the plan's.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        mechanism: Mechanism,
        clip: float,
        generator: torch.Generator,
    ) -> None:
        self._model, self._loss, self._mechanism, self._generator = model, loss, mechanism, generator
        self._clip = clip
        self._wrapped = GradSampleModule(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._chunk = max(1, _FLOATS_AT_ONCE // sum(p.numel() for p in parameters))
        self._optimizer = DPOptimizer(
            torch.optim.SGD(parameters, lr=0.0),  # the caller steps; Opacus clips, sums, adds noise and scales
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=1,
            generator=generator,
        )

    def batches(self, examples: int, steps: int) -> Iterator[list[int]]:
        """`steps` Poisson samples of the indices below `examples`; a sample may be empty."""
        self._optimizer.expected_batch_size = self._mechanism.sampling_rate * examples
        return iter(
            UniformWithReplacementSampler(
                num_samples=examples,
                sample_rate=self._mechanism.sampling_rate,
                generator=self._generator,
                steps=steps,
            )
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        """x: (B, ...), y: (B,) of one Poisson sample, B >= 0. Large samples go through in parts and get noise once."""
        starts = range(0, max(1, len(x)), self._chunk)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            for start in starts:
                self._optimizer.signal_skip_step(do_skip=start != starts[-1])
                self._optimizer.zero_grad()
                part = slice(start, start + self._chunk)
                torch.autograd.backward(self._loss(self._wrapped(x[part]), y[part]))
                self._optimizer.pre_step()

    def close(self) -> None:
        """Take Opacus' hooks off the model again."""
        self._wrapped.to_standard_module()
        for parameter in self._model.parameters():
            parameter.grad = parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]


def epsilon_rdp(history: History, delta: float) -> float:
    """Opacus' Renyi accountant on the same history: valid, looser, independent of the one that is claimed."""
    accountant = RDPAccountant()
    accountant.history = [(m.noise_multiplier, m.sampling_rate, count) for m, count in sorted(history.items()) if count]
    if not accountant.history:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns when the best order is the largest it tries; the bound still holds
        return float(accountant.get_epsilon(delta))
