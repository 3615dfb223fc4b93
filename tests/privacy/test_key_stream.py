"""The noise of a real run: normal, of the deviation that is charged, and never twice the same."""

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from privacy import key_stream
from privacy.dp_sgd import PrivateGradient, noise_generator
from privacy.key_stream import Gaussian, KeyStream, radii
from privacy.plan import Mechanism

LOSS = nn.functional.cross_entropy


def drawn(entries: int, dtype: torch.dtype = torch.float32, deviation: float = 1.0) -> Tensor:
    to = torch.zeros(entries, dtype=dtype)
    Gaussian(to).add(to, deviation, KeyStream())
    return to.double()


def shares(draws: Tensor) -> Tensor:
    """How many lie between the quantiles of a standard normal in steps of 1 %, over how many there should be."""
    edges = torch.special.ndtri(torch.linspace(0, 1, 101, dtype=torch.float64))
    return torch.histogram(draws, edges.clamp(-50, 50)).hist / (len(draws) / 100)


def normal(draws: Tensor) -> bool:
    """By chi squared of a hundred equal shares, 99 degrees: at most 6 deviations off."""
    return float((shares(draws) - 1).square().sum() * (len(draws) / 100)) < 99 + 6 * math.sqrt(2 * 99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_normal(dtype: torch.dtype) -> None:
    draws = drawn(1_000_000, dtype)
    assert normal(draws)
    assert not normal(draws * 1.02)
    assert not normal(draws + 0.02)


@pytest.mark.parametrize("entries", [1, 2, 3, 199_210, 1_000_001])
def test_every_entry_gets_a_draw_of_the_deviation_that_is_asked_for(entries: int) -> None:
    draws = drawn(entries, deviation=3.0) / 3
    assert bool((draws != 0).all())
    assert bool((draws.abs() < 7).all())
    assert abs(float(draws.square().mean()) - 1) < 6 * math.sqrt(2 / entries) + 7 * (entries < 9)


def test_draws_are_not_related_to_their_pairs_in_size_or_sign() -> None:
    draws = drawn(100_000)  # of one part: entry i and entry i + 50,000 are made of the same two words
    first, second = draws[:50_000], draws[50_000:]
    for a, b in ((first, second), (first.square() - 1, second.square() - 1), (first.square() - 1, second)):
        assert abs(float((a * b).mean())) < 5 * float(a.std() * b.std()) / math.sqrt(len(a))


def test_noise_is_added_to_what_is_there() -> None:
    to = torch.full((100_000,), 40.0)
    Gaussian(to).add(to, 2.0, KeyStream())
    assert abs(float(to.double().mean()) - 40) < 6 * 2 / math.sqrt(100_000)
    assert abs(float(to.double().std()) - 2) < 6 * 2 / math.sqrt(2 * 100_000)


@pytest.mark.parametrize(
    ("word", "radius"), [(0, 64), (1, 62), (-1, 62), (2**31 - 1, 0), (-(2**31), 0), (2**30, 2), (-(2**30), 2)]
)
def test_the_radius_of_a_word_is_that_of_box_and_muller_and_ends_at_6_66(word: int, radius: float) -> None:
    made = float(radii(torch.tensor([float(word)]))[0])
    assert made == pytest.approx(math.sqrt(radius * math.log(2)), abs=1e-6)
    assert made <= 6.67


def test_two_streams_and_two_parts_of_one_share_no_draw() -> None:
    stream, room = KeyStream(), Gaussian(torch.zeros(100_000))
    first, second, other = (torch.zeros(100_000) for _ in range(3))
    room.add(first, 1.0, stream)
    room.add(second, 1.0, stream)
    room.add(other, 1.0, KeyStream())
    for a, b in ((first, second), (first, other), (second, other)):
        assert int((a == b).sum()) < 10
        assert abs(float((a * b).mean())) < 5 / math.sqrt(len(a))


def test_key_and_counter_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()

    def known(size: int) -> bytes:
        sizes.append(size)
        return bytes(size)

    right = os.urandom
    monkeypatch.setattr(key_stream.os, "urandom", known)
    room = bytearray(32 + 16)
    KeyStream().into(room, 32)
    assert sizes == [16, 16]
    # AES-128 of key 0 over the blocks 0 and 1 (NIST SP 800-38A's mode; the first is FIPS 197's of all zeros)
    assert room[:16].hex() == "66e94bd4ef8a2c3b884cfa59ca342b2e"
    assert room[16:32].hex() == "58e2fccefa7e3061367f1d57a4e7455a"
    monkeypatch.setattr(key_stream.os, "urandom", right)
    again = bytearray(32 + 16)
    KeyStream().into(again, 32)
    assert again[:32] != room[:32]


def noise_of(private: Callable[[nn.Module], PrivateGradient]) -> Tensor:
    """The noise in 40 steps whose gradient is zero, in units of the deviation of a step."""
    model = nn.Linear(40, 50)
    gradient = private(model)
    steps = list(gradient.batches(30, 40))
    made = list[Tensor]()
    for _ in steps:
        gradient.step(torch.zeros(0, 40), torch.zeros(0, dtype=torch.long))
        assert model.weight.grad is not None
        assert model.bias.grad is not None
        made += [model.weight.grad.flatten().double(), model.bias.grad.double()]
    gradient.close()
    return torch.cat(made) * (0.5 * 30) / (1.5 * 0.7)


@pytest.mark.parametrize("source", [KeyStream, lambda: noise_generator(None)], ids=["key stream", "opacus"])
def test_a_private_step_has_the_same_noise_from_a_key_stream_as_from_opacus(source: Callable[[], KeyStream]) -> None:
    noise = noise_of(lambda model: PrivateGradient(model, LOSS, Mechanism(0.5, 1.5), 0.7, source()))
    assert normal(noise)
    assert not normal(noise * 1.1)
