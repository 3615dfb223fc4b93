"""Composition in the Fourier domain is held against dp-accounting's own convolutions and the Gaussian closed form."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from privacy import accounting, fourier
from privacy.plan import Mechanism

MIXES = [
    {Mechanism(0.05, 1.0): 40, Mechanism(0.2, 2.0): 25},
    {Mechanism(0.3, 0.8): 3, Mechanism(0.01, 1.5): 500, Mechanism(1.0, 12.0): 7},
    {Mechanism(0.5, 0.4): 4},
    {Mechanism(0.02, 3.0): 1},
]


def convolved(history: dict[Mechanism, int], delta: float, interval: float) -> float:
    """The slow truth: the same grid, composed by dp-accounting."""
    total = pld.identity(interval)
    for mechanism, count in history.items():
        step = pld.from_gaussian_mechanism(
            mechanism.noise_multiplier,
            value_discretization_interval=interval,
            sampling_prob=mechanism.sampling_rate,
        )
        total = total.compose(step.self_compose(count))
    return float(total.get_epsilon_for_delta(delta))


def interval_of(history: dict[Mechanism, int]) -> float:
    return min(fourier._interval(mechanism) for mechanism in history)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("history", MIXES)
def test_composing_transforms_equals_convolving_on_the_same_grid(history: dict[Mechanism, int], delta: float) -> None:
    slow = convolved(history, delta, interval_of(history))
    found = fourier.epsilon(sorted(history.items()), delta)
    assert found is not None
    assert slow * (1 - 1e-6) - 1e-9 <= found <= slow * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("delta", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize(("noise", "steps"), [(0.9, 1), (4.0, 60), (20.0, 2000)])
def test_gaussian_steps_never_fall_below_the_closed_form(noise: float, steps: int, delta: float) -> None:
    exact = accounting.gaussian(math.sqrt(steps) / noise, delta)
    found = fourier.epsilon([(Mechanism(1.0, noise), steps)], delta)
    assert found is not None
    assert exact * (1 - 2e-9) <= found <= exact * 1.01


@pytest.mark.parametrize("delta", [1e-14, 1e-17])
def test_a_delta_that_rounding_swallows_gets_no_answer_and_then_the_renyi_bound(delta: float) -> None:
    history = {Mechanism(0.1, 1.0): 2000}
    assert fourier.epsilon(list(history.items()), delta) is None
    assert accounting.epsilon(history, delta) > accounting.epsilon(history, 1e-9)


def test_a_loss_too_wide_for_the_grid_gets_the_renyi_bound() -> None:
    history = {Mechanism(0.5, 0.02): 2000}
    assert fourier.epsilon(list(history.items()), 1e-5) is None
    assert 1e4 < accounting.epsilon(history, 1e-5) < math.inf


def test_a_wide_loss_in_fine_steps_is_composed_on_a_wider_interval() -> None:
    history = {Mechanism(1e-3, 0.8): 4, Mechanism(0.5, 0.3): 60}
    assert interval_of(history) == 1e-4
    found = fourier.epsilon(sorted(history.items()), 1e-5)
    assert found is not None
    slow = convolved(history, 1e-5, 1e-3)
    assert found == pytest.approx(slow, rel=1e-4)


def test_a_step_of_almost_no_noise_is_not_put_on_a_grid() -> None:
    assert fourier.epsilon([(Mechanism(0.5, 1e-4), 1)], 1e-5) is None


@pytest.mark.parametrize("history", MIXES)
def test_a_window_that_is_too_small_costs_tightness_and_never_the_bound(
    history: dict[Mechanism, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrapped-around mass: the sentence of the module's docstring, with windows that wrap much of it."""
    delta = 1e-3
    slow = convolved(history, delta, interval_of(history))
    window = fourier._window
    wrapped = 0
    for shift in np.linspace(-0.9, 0.9, 25):
        for halvings in (0, 1, 2, 3):

            def moved(
                cumulants: fourier.Array, tail: float, interval: float, shift: float = shift, halvings: int = halvings
            ) -> tuple[int, int]:
                start, size = window(cumulants, tail, interval)
                return start + int(shift * size), size >> halvings

            monkeypatch.setattr(fourier, "_window", moved)
            found = fourier.epsilon(sorted(history.items()), delta)
            assert found is None or found >= slow * (1 - 1e-6)
            wrapped += found is not None and found > slow * 1.01
    assert wrapped, "no window wrapped anything: the test saw nothing"


def test_without_the_mass_above_the_window_the_bound_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    history, delta = MIXES[0], 1e-3
    slow = convolved(history, delta, interval_of(history))
    window = fourier._window
    top = int(slow / interval_of(history))

    def cut(cumulants: fourier.Array, tail: float, interval: float) -> tuple[int, int]:
        _, size = window(cumulants, tail, interval)
        return top - size, size  # ends where epsilon is: what lies beyond comes back where it weighs nothing

    monkeypatch.setattr(fourier, "_window", cut)
    found = fourier.epsilon(sorted(history.items()), delta)
    assert found is None or found >= slow
    monkeypatch.setattr(fourier, "_TILTS", np.where(fourier._TILTS > 0, np.inf, fourier._TILTS))
    with np.errstate(invalid="ignore"):
        unbounded = fourier.epsilon(sorted(history.items()), delta)
    assert unbounded is not None
    assert unbounded < slow


def test_a_removed_example_and_an_added_one_are_both_composed() -> None:
    mechanism = Mechanism(0.3, 0.5)
    removed, added = (fourier._one_direction([(mechanism, 5)], 1e-3, 1e-2, side) for side in (0, 1))
    assert removed is not None
    assert added is not None
    assert removed != added
    assert fourier.epsilon([(mechanism, 5)], 1e-3) == max(removed, added)
