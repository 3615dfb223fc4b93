"""Example-level DP-SGD: the only door to Opacus, from the check of a model to a noisy gradient.

Opacus takes a second and 50 MB to load: it is where it is used, so that runs without it do without.

Guarantee: with a `KeyStream`, or the generator of `noise_generator(None)`, every call of `PrivateGradient.step` is one
`Mechanism` step on the client's examples, add-or-remove-one adjacency, whoever sees the gradient (Abadi et al. 2016,
Algorithm 1).
"""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from privacy.key_stream import Gaussian, KeyStream
from privacy.plan import History, Mechanism
from privacy.refused import Refused

Source = torch.Generator | KeyStream
"""Of noise: a key stream; torch's generator on a GPU, and of a seed."""

_FLOATS_AT_ONCE = 1 << 26
_HEAD, _WORDS = 24, 624
"""Where torch keeps the words of its Mersenne Twister in a generator's state, 8 bytes each of which 4 are used."""
_PRV_POINTS = 1 << 23


def load() -> None:
    """Load Opacus, and with it sympy, now rather than where it is first used."""
    import opacus  # noqa: F401


def check(model: nn.Module) -> None:
    """Refuse a layer through which one example touches another's gradient, naming it and the remedy.

    Opacus looks at trainable layers of exact type only; statistics of frozen, non-affine or derived norms
    leave the client as well, so every batch norm, and every norm that tracks statistics, is refused here.
    """
    from opacus.validators import ModuleValidator

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) or getattr(module, "track_running_stats", False):
            raise Refused(
                f"layer {name!r} ({type(module).__name__}) mixes the examples of a batch, so example-level DP cannot "
                "hold: use nn.GroupNorm in its place, or privacy.unit=none"
            )
    if errors := ModuleValidator.validate(model, strict=False):
        raise Refused(f"the model does not allow example-level DP: {str(errors[0]).splitlines()[0]}")


def check_apart(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Refuse a model or loss that mixes examples where no layer shows it, as `x - x.mean(0)` or class weights do.

    x: (N, ...), y: (N,), not a client's. Then one example's gradient is not its own, and clipping it does not bound
    what it can change.
    """
    count, together, alone = _losses(model, loss, x, y)
    if abs(together - alone) > 1e-3 * max(1.0, abs(alone)):
        raise Refused(
            f"the model or its loss mixes the examples of a batch (the loss of {count} is {together:.4g}, the mean "
            f"of their losses {alone:.4g}), so example-level DP cannot hold: make the loss a plain mean (no class "
            "weights) and the model's output for an example independent of the others, or set privacy.unit=none"
        )


def apart(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> bool:
    """Whether the loss of examples, x (N, ...) and y (N,), is the mean of each one's, to rounding."""
    _, together, alone = _losses(model, loss, x, y)
    return abs(together - alone) <= 1e-5 * max(1.0, abs(alone))


def _losses(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[int, float, float]:
    """(how many examples, at most 32; their loss together; the mean of their losses).

    Weights are drawn for it: zeros would hide a mixture.
    """
    twin, generator = copy.deepcopy(model).eval(), torch.Generator().manual_seed(0)
    some = torch.randperm(len(y), generator=generator)[:32]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        together = float(loss(twin(x[some]), y[some]))
        alone = sum(float(loss(twin(x[i : i + 1]), y[i : i + 1])) for i in some.tolist()) / max(1, len(some))
    return len(some), together, alone


def noise_generator(seed: int | None) -> torch.Generator:
    """A generator whose whole state is the operating system's entropy; of `seed` only where no guarantee is claimed.

    torch's manual_seed keeps 32 bits of a seed, few enough to try them all and take the noise away.
    """
    generator = torch.Generator()
    if seed is not None:
        return generator.manual_seed(seed)
    state = generator.get_state()
    entropy = torch.frombuffer(bytearray(os.urandom(4 * _WORDS)), dtype=torch.uint8)
    state[_HEAD : _HEAD + 8 * _WORDS].view(_WORDS, 8)[:, :4] = entropy.view(_WORDS, 4)
    generator.set_state(state)
    return generator


def poisson(mechanism: Mechanism, examples: int, steps: int, generator: torch.Generator) -> Iterator[list[int]]:
    """`steps` Poisson samples of the indices below `examples`, each drawn when it is asked for; some may be empty."""
    rate = mechanism.sampling_rate
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    sampler = UniformWithReplacementSampler(num_samples=examples, sample_rate=rate, generator=generator, steps=steps)
    return iter(sampler)


class Noise:
    """Noise for sums of gradients that are vectors (P,), with room for its draws."""

    def __init__(self, like: Tensor, parts: Callable[[Tensor], Iterable[Tensor]]) -> None:
        """parts: the layers' own of a vector, which torch's generator fills one after another, as Opacus has it."""
        self._room = torch.empty_like(like)
        self._parts = list(parts(self._room))
        self._gaussian = Gaussian(like) if like.is_cpu else None

    def add(self, to: Tensor, times: float, mechanism: Mechanism, clip: float, source: Source) -> None:
        """Add to `to` (P,) `times` the noise of a sum of gradients that are each clipped at `clip`, in place."""
        deviation = mechanism.noise_multiplier * clip
        if not deviation:
            return
        if isinstance(source, KeyStream):
            assert self._gaussian is not None
            self._gaussian.add(to, times * deviation, source)
            return
        for part in self._parts:
            part.normal_(0.0, deviation, generator=source)
        to.add_(self._room, alpha=times)


class PrivateGradient:
    """Leaves in every `parameter.grad` the clipped, noised mean gradient of a Poisson sample.

    Opacus' own classes clip and sum up, and draw the noise of a seed. That of a key stream is added after them, as the
    cryptographic generator that Opacus would use cannot be had for this torch. Its PrivacyEngine is not used because it
    derives the sampling rate and the expected batch from the loader's length (rate 1/ceil(n/B), batch 0 for n=49, B=1),
    and both must be the plan's. Buffers keep their values, as what a layer remembers of its inputs is not noised. An
    example whose gradient is not finite counts as zero where it is not: a sum that it turned to NaN would tell of it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        mechanism: Mechanism,
        clip: float,
        source: Source,
        draws: torch.Generator | None = None,
    ) -> None:
        """source: of the noise, on the model's device. draws: of the samples; None: `source` if it is torch's."""
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self._model, self._loss, self._mechanism, self._clip = model, loss, mechanism, clip
        self._stream = source if isinstance(source, KeyStream) else None
        by_opacus = None if isinstance(source, KeyStream) else source
        self._draws = draws or by_opacus or noise_generator(None)
        self._wrapped = GradSampleModule(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = [buffer.clone() for buffer in model.buffers()]
        self._chunk = max(1, _FLOATS_AT_ONCE // sum(p.numel() for p in self._parameters))
        self._optimizer = DPOptimizer(
            torch.optim.SGD(self._parameters, lr=0.0),  # the caller steps; Opacus clips, sums, scales, draws of a seed
            noise_multiplier=mechanism.noise_multiplier if by_opacus else 0.0,
            max_grad_norm=clip,
            expected_batch_size=1,
            generator=by_opacus,
        )

    def batches(self, examples: int, steps: int) -> Iterator[list[int]]:
        """`steps` Poisson samples of the indices below `examples`; a sample may be empty."""
        self._optimizer.expected_batch_size = self._mechanism.sampling_rate * examples
        return poisson(self._mechanism, examples, steps, self._draws)

    def step(self, x: Tensor, y: Tensor) -> None:
        """x: (B, ...), y: (B,) of one Poisson sample, B >= 0. Large samples go through in parts and get noise once.

        A step that an exception ended leaves nothing to the next: half a sum kept would count its examples twice.
        """
        self._optimizer._step_skip_queue.clear()
        self._optimizer._is_last_step_skipped = False  # else Opacus keeps the sum of the parts that went through
        starts = range(0, max(1, len(x)), self._chunk)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            for start in starts:
                self._optimizer.signal_skip_step(do_skip=start != starts[-1])
                self._optimizer.zero_grad()
                part = slice(start, start + self._chunk)
                torch.autograd.backward(self._loss(self._wrapped(x[part]), y[part]))
                for parameter in self._parameters:
                    if isinstance(sample := getattr(parameter, "grad_sample", None), Tensor):
                        torch.nan_to_num_(sample, nan=0.0, posinf=0.0, neginf=0.0)
                for buffer, before in zip(self._model.buffers(), self._buffers, strict=True):
                    buffer.copy_(before)
                self._optimizer.pre_step()
        if self._stream:
            deviation = self._mechanism.noise_multiplier * self._clip / self._optimizer.expected_batch_size
            for parameter in self._parameters:
                assert parameter.grad is not None
                Gaussian(parameter.grad.view(-1)).add(parameter.grad.view(-1), deviation, self._stream)

    def close(self) -> None:
        """Take Opacus' hooks off the model again."""
        self._wrapped.to_standard_module()
        for parameter in self._model.parameters():
            parameter.grad = parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]


def epsilon_rdp(history: History, delta: float) -> float | None:
    """Opacus' Renyi accountant on the same history: valid, looser, independent of the one that is claimed.

    None for cohorts of a fixed size, which Opacus does not know.
    """
    if any(mechanism.population for mechanism in history):
        return None
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(m.noise_multiplier, m.sampling_rate, count) for m, count in sorted(history.items()) if count]
    if not accountant.history:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns when the best order is the largest it tries; the bound still holds
        return float(accountant.get_epsilon(delta))


def epsilon_prv(history: History, delta: float) -> tuple[float, float] | None:
    """Opacus' PRV accountant: epsilon lies between the two (Gopi, Lee and Wutschitz 2021, Theorem 5.5).

    None where it gives no answer: its grid would not fit in memory, its own checks fail, or cohorts have a fixed size.
    """
    if any(mechanism.population for mechanism in history):
        return None
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    accountant = PRVAccountant()
    accountant.history = [(m.noise_multiplier, m.sampling_rate, count) for m, count in sorted(history.items()) if count]
    if not accountant.history:
        return 0.0, 0.0
    delta_error, epsilon_error = delta / 1000, 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # logarithms of zero outside the support
        try:
            prvs = [PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in accountant.history]
            counts = [count for _, _, count in accountant.history]
            if accountant._get_domain(prvs, counts, epsilon_error, delta_error).size > _PRV_POINTS:
                return None
            composed = accountant._get_dprv(eps_error=epsilon_error, delta_error=delta_error)
            low, _, high = composed.compute_epsilon(delta, delta_error, epsilon_error)
        except (RuntimeError, ValueError, ArithmeticError, IndexError):
            return None
    return (max(0.0, float(low)), float(high)) if math.isfinite(low) and math.isfinite(high) else None
