"""DP-SGD by Opacus: clipping, noise and sampling are what the mechanism says; what it cannot protect is refused."""

import math

import pytest
import torch
from torch import nn

from privacy.dp_sgd import PrivateGradient, check, noise_generator
from privacy.plan import Mechanism
from privacy.refused import Refused

LOSS = nn.functional.cross_entropy


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def one_step(mechanism: Mechanism, clip: float, x: torch.Tensor, y: torch.Tensor, seed: int | None = 1) -> torch.Tensor:
    model = small_model()
    private = PrivateGradient(model, LOSS, mechanism, clip, noise_generator(seed))
    private.batches(max(1, len(x)), 1)
    private.step(x, y)
    return gradient(model).clone()


def by_hand(clip: float, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The slow truth: each example's gradient alone, clipped, summed, divided by the number of examples."""
    total = torch.zeros(())
    for i in range(len(x)):
        model = small_model()
        LOSS(model(x[i : i + 1]), y[i : i + 1]).backward()
        g = gradient(model)
        total = total + g * min(1.0, clip / float(g.norm()))
    return total / len(x)


@pytest.mark.parametrize("clip", [0.05, 0.7, 1e6])
def test_without_noise_the_gradient_is_the_mean_of_clipped_ones(clip: float) -> None:
    x, y = batch(23)
    found = one_step(Mechanism(1.0, 0.0), clip, x, y)
    assert torch.allclose(found, by_hand(clip, x, y), atol=2e-6)


def test_one_example_more_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    x, y = batch(23)
    x[-1] *= 1000
    more = one_step(Mechanism(1.0, 0.0), 0.3, x, y) * 23
    less = one_step(Mechanism(1.0, 0.0), 0.3, x[:-1], y[:-1]) * 22
    assert float((more - less).norm()) <= 0.3 * (1 + 1e-4)


@pytest.mark.parametrize(("multiplier", "fits"), [(2.0, True), (1.8, False), (2.2, False)])
def test_noise_has_the_standard_deviation_of_the_mechanism_and_no_other(multiplier: float, fits: bool) -> None:
    x, y = batch(10)
    clean = one_step(Mechanism(1.0, 0.0), 0.5, x, y)
    draws = torch.cat([one_step(Mechanism(1.0, 2.0), 0.5, x, y, seed) - clean for seed in range(120)])
    ratio = float(draws.std()) / (multiplier * 0.5 / 10)
    assert (abs(ratio - 1) < 5 / math.sqrt(2 * len(draws))) is fits


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_samples_are_poisson_at_the_plans_rate(rate: float) -> None:
    private = PrivateGradient(small_model(), LOSS, Mechanism(rate, 1.0), 1.0, noise_generator(5))
    sizes = torch.tensor([len(chosen) for chosen in private.batches(50, 4000)], dtype=torch.float64)
    assert abs(float(sizes.mean()) - 50 * rate) < 5 * math.sqrt(50 * rate * (1 - rate) / 4000)
    assert float(sizes.var()) == pytest.approx(50 * rate * (1 - rate), rel=0.15)


def test_the_divisor_is_the_expected_batch_and_not_the_drawn_one() -> None:
    model = small_model()
    private = PrivateGradient(model, LOSS, Mechanism(0.5, 0.0), 1e6, noise_generator(1))
    private.batches(49, 1)
    x, y = batch(10)
    private.step(x, y)
    assert torch.allclose(gradient(model) * 24.5, by_hand(1e6, x, y) * 10, atol=1e-5)


def test_an_empty_sample_still_gives_noise_and_no_nan() -> None:
    x, y = batch(4)
    found = one_step(Mechanism(0.2, 1.0), 1.0, x[:0], y[:0])
    assert torch.isfinite(found).all()
    assert float(found.abs().max()) > 0


def test_a_sample_that_goes_through_in_parts_is_noised_once_and_clipped_the_same() -> None:
    x, y = batch(23)
    model = small_model()
    private = PrivateGradient(model, LOSS, Mechanism(1.0, 1.5), 0.4, noise_generator(9))
    private._chunk = 4
    private.batches(23, 1)
    private.step(x, y)
    assert torch.allclose(gradient(model), one_step(Mechanism(1.0, 1.5), 0.4, x, y, 9), atol=1e-6)


def test_noise_of_a_real_run_is_new_every_time_whatever_the_global_seed() -> None:
    x, y = batch(10)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(one_step(Mechanism(1.0, 5.0), 1.0, x, y, None))
    assert abs(float(torch.cosine_similarity(*draws, dim=0))) < 0.9
    assert not torch.equal(*draws)


def test_the_model_is_clean_afterwards_and_keeps_its_names() -> None:
    model = small_model()
    names = list(model.state_dict())
    private = PrivateGradient(model, LOSS, Mechanism(1.0, 1.0), 1.0, noise_generator(1))
    private.batches(5, 1)
    private.step(*batch(5))
    private.close()
    assert list(model.state_dict()) == names
    LOSS(model(batch(5)[0]), batch(5)[1]).backward()
    assert not any(getattr(p, "grad_sample", None) is not None for p in model.parameters())


class DerivedNorm(nn.BatchNorm1d):
    """Passes Opacus' own check, which looks at exact types of trainable layers."""


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), DerivedNorm(5), nn.BatchNorm1d(5).requires_grad_(False)],
)
def test_every_kind_of_batch_norm_is_refused_with_the_remedy(layer: nn.Module) -> None:
    with pytest.raises(Refused, match="GroupNorm"):
        check(nn.Sequential(nn.Linear(6, 5), layer, nn.Linear(5, 3)))


def test_group_norm_is_allowed() -> None:
    check(nn.Sequential(nn.Linear(6, 6), nn.GroupNorm(2, 6), nn.Linear(6, 3)))


def test_a_layer_opacus_cannot_handle_is_refused_in_one_line() -> None:
    with pytest.raises(Refused) as caught:
        check(nn.Sequential(nn.LSTM(6, 5)))
    assert "\n" not in str(caught.value)
