"""DP-SGD by Opacus: clipping, noise and sampling are what the mechanism says; what it cannot protect is refused."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from privacy.dp_sgd import PrivateGradient, check, check_apart, noise_generator
from privacy.plan import Mechanism
from privacy.refused import Refused

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
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


def poisson_at(rate: float, sizes: torch.Tensor) -> bool:
    """Whether batches of 50 examples have binomial sizes: mean and variance within five deviations."""
    variance = 50 * rate * (1 - rate)
    near = abs(float(sizes.mean()) - 50 * rate) < 5 * math.sqrt(variance / len(sizes))
    return near and abs(float(sizes.var()) / variance - 1) < 0.15


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_samples_are_poisson_at_the_plans_rate_and_no_other(rate: float) -> None:
    private = PrivateGradient(small_model(), LOSS, Mechanism(rate, 1.0), 1.0, noise_generator(5))
    sizes = torch.tensor([len(chosen) for chosen in private.batches(50, 4000)], dtype=torch.float64)
    assert poisson_at(rate, sizes)
    assert not poisson_at(0.95 * rate, sizes)
    assert not poisson_at(rate, torch.full((4000,), 50 * rate, dtype=torch.float64))  # batches of one size


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


def test_a_norm_that_tracks_statistics_is_refused() -> None:
    with pytest.raises(Refused, match="InstanceNorm1d"):
        check(nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(6, 3)))


class Centred(nn.Module):
    """No layer shows that examples meet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x - x.mean(0))
        return out


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 5.0]))
SUMMED = nn.CrossEntropyLoss(reduction="sum")


@pytest.mark.parametrize(("model", "loss"), [(Centred, LOSS), (small_model, WEIGHTED), (small_model, SUMMED)])
def test_a_model_or_loss_in_which_examples_meet_is_refused(model: Callable[[], nn.Module], loss: Loss) -> None:
    with pytest.raises(Refused, match="mixes the examples"):
        check_apart(model(), loss, *batch(40))


@pytest.mark.parametrize("model", [small_model, lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 3))])
def test_a_model_and_loss_that_keep_examples_apart_are_allowed(model: Callable[[], nn.Module]) -> None:
    built = model()
    before = [parameter.clone() for parameter in built.parameters()]
    check_apart(built, LOSS, *batch(40))
    assert all(torch.equal(old, new) for old, new in zip(before, built.parameters(), strict=True))
    check_apart(built, LOSS, *batch(0))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_an_example_that_is_not_finite_moves_the_sum_by_at_most_the_clipping_norm(value: float) -> None:
    x, y = batch(23)
    x[-1, 2] = value
    more = one_step(Mechanism(1.0, 0.0), 0.3, x, y) * 23
    less = one_step(Mechanism(1.0, 0.0), 0.3, x[:-1], y[:-1]) * 22
    assert float((more - less).norm()) <= 0.3 * (1 + 1e-4)


class Remembers(nn.Module):
    """Adds what it saw last to what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.last: torch.Tensor
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x + self.last)
        self.last = x.detach().sum(0)
        return out


def test_what_a_layer_remembers_of_its_inputs_reaches_neither_the_next_step_nor_the_update() -> None:
    model = Remembers()
    private = PrivateGradient(model, LOSS, Mechanism(1.0, 0.0), 1e6, noise_generator(1))
    private.batches(10, 2)
    private.step(*batch(10))
    first = gradient(model).clone()
    private.step(*batch(10))
    assert torch.equal(gradient(model), first)
    assert not model.last.any()


def words(generator: torch.Generator) -> list[int]:
    return generator.get_state()[24 : 24 + 624 * 8].view(torch.int64).tolist()


@pytest.mark.parametrize(("seed", "follows"), [(5, True), (2**62 + 5, True), (None, False)])
def test_the_noise_of_a_real_run_does_not_follow_from_32_bits(seed: int | None, follows: bool) -> None:
    # Matsumoto's initialization makes every word of the state from the one before, and the first is the seed's 32 bits
    first, second, *_ = found = words(noise_generator(seed))
    assert (second == (1812433253 * (first ^ first >> 30) + 1) % 2**32) is follows
    assert all(0 <= word < 2**32 for word in found)


def normal(draws: torch.Tensor) -> bool:
    """Whether they are standard normal: mean, deviation, and how many lie within one deviation."""
    mean, deviation, inner = float(draws.mean()), float(draws.std()), float((draws.abs() < 1).double().mean())
    tolerance = 5 / math.sqrt(len(draws))
    return abs(mean) < tolerance and abs(deviation - 1) < tolerance and abs(inner - 0.6827) < tolerance / 2


def test_the_noise_of_a_real_run_is_normal_and_nothing_like_it() -> None:
    draws = torch.randn(200_000, generator=noise_generator(None), dtype=torch.float64)
    assert normal(draws)
    assert not normal(0.98 * draws)
    assert not normal(draws + 0.02)
    uniform = torch.rand(200_000, generator=noise_generator(None), dtype=torch.float64)
    assert not normal((uniform - 0.5) * math.sqrt(12))


def test_group_norm_is_allowed() -> None:
    check(nn.Sequential(nn.Linear(6, 6), nn.GroupNorm(2, 6), nn.Linear(6, 3)))


def test_a_layer_opacus_cannot_handle_is_refused_in_one_line() -> None:
    with pytest.raises(Refused) as caught:
        check(nn.Sequential(nn.LSTM(6, 5)))
    assert "\n" not in str(caught.value)
