"""What a client sends of its update: the codec or the integers that the settings ask for, read back or refused."""

import math
from dataclasses import replace

import numpy as np
import pytest

from clients import upload
from clients.codecs import CodecError
from clients.task import Task
from privacy import packing
from privacy.refused import Refused
from scenarios.settings import Settings, override

P = 40
TASK = Task("train", 3, "a", np.zeros(P, np.float32), (("w", (P,)),), steps=1, largest=80)
CODECS = ["float32", "float16", "topk:0.3", "qsgd8", "int2", "int7", "int16", "int24"]


def settings(codec: str, text: str = "") -> Settings:
    return override(Settings(), f"codec={codec} {text}")


def update(seed: int = 0, norm: float = 0.5) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=P)
    return (values * (norm / np.linalg.norm(values))).astype(np.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_sent_has_the_size_that_is_said_and_is_read_back(codec: str) -> None:
    wanted = settings(codec)
    payload, residual = upload.encode(update(), None, True, 40, TASK, wanted)
    assert len(payload) == upload.size(wanted, P)
    read = upload.decode(payload, TASK, wanted).astype(float)
    left = 0 if residual is None else residual
    bits = upload.bits(wanted)
    step = 0.01 if bits is None else 1 / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(read + left, update(), atol=3 * step)  # half the weight, so twice the step
    assert upload.encode(update(), None, True, 40, TASK, wanted)[0] == payload


@pytest.mark.parametrize(("codec", "bits"), [("int2", 2), ("int16", 16), ("float32", None), ("qsgd8", None)])
def test_a_codec_of_integers_says_its_bits(codec: str, bits: int | None) -> None:
    assert upload.bits(settings(codec)) == bits
    upload.check(settings(codec))


@pytest.mark.parametrize(
    ("codec", "reason"),
    [("int1", "nearest is int2"), ("int25", "nearest is int24"), ("int", "no codec"), ("int-4", "no codec")],
)
def test_integers_of_impossible_bits_are_refused_with_the_nearest(codec: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        upload.check(settings(codec))


def test_protected_updates_are_integers_of_protect_bits_whatever_the_codec() -> None:
    assert upload.bits(settings("float32", "protect=masked protect.bits=9")) == 9


def test_a_range_that_is_set_is_that_of_the_grid() -> None:
    made = upload.grid(settings("int4", "protect.range=0.25 protect.max_clients=7"), P, 1, 0.5, 0.0)
    assert made is not None
    assert (made.limit, made.clip, made.clients, made.rotation) == (0.25, 0.5, 7, None)


def test_few_bits_rotate_by_a_seed_of_run_and_round() -> None:
    first, same, other, run = (
        upload.grid(settings("int4", f"run.seed={seed}"), 4000, number, 0.5, 0.0)
        for seed, number in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert first == same
    assert first is not None
    assert first.rotation is not None
    assert len({grid.rotation for grid in (first, other, run) if grid}) == 3


def test_local_noise_fits_into_the_range_and_no_norm_cuts_it() -> None:
    clip, noise, task = 0.5, 4.0, replace(TASK, update_clip=0.5, update_noise=4.0, largest=0)
    sigma = 2 * clip * noise
    noised = (np.random.default_rng(0).normal(size=P) * sigma).astype(np.float32)
    read = upload.decode(upload.encode(noised, None, True, 9, task, settings("int12"))[0], task, settings("int12"))
    np.testing.assert_allclose(read, noised, atol=sigma / 100)
    made = upload.grid_of(task, settings("int12"))
    assert made is not None
    assert made.limit == clip + 6 * sigma


def test_a_client_weighs_by_its_examples_and_refuses_a_task_whose_largest_is_smaller() -> None:
    assert upload.weight(TASK, 20) == 0.25
    assert upload.weight(replace(TASK, largest=0), 20) == 1
    with pytest.raises(Refused, match="no client has more than 80 examples"):
        upload.weight(TASK, 81)


def test_an_update_that_is_not_finite_is_refused_at_the_client() -> None:
    with pytest.raises(CodecError, match="not finite"):
        upload.encode(np.full(P, math.nan, np.float32), None, True, 40, TASK, settings("int16"))


def test_a_weight_that_the_examples_do_not_make_is_refused() -> None:
    wanted = settings("int8")
    made = upload.grid_of(TASK, wanted)
    assert made is not None
    payload, _ = upload.encode(update(), None, True, 40, TASK, wanted)
    assert upload.unpack(payload, 0.5, made)[-2] == round(255 / 2)
    with pytest.raises(ValueError, match="a weight of 128, its examples make 64"):
        upload.unpack(payload, 0.25, made)


def test_bytes_that_are_no_integers_of_the_grid_are_refused() -> None:
    wanted = settings("int7")
    payload, _ = upload.encode(update(), None, True, 40, TASK, wanted)
    made = upload.grid_of(TASK, wanted)
    assert made is not None
    for bad in (b"", payload[:-1], payload + b"\0", b"\xff" * len(payload)):
        with pytest.raises(ValueError, match=r"bits|a value of"):
            upload.unpack(bad, 0.5, made)
    for entries in (np.full(P + 2, 127, np.uint64), np.zeros(P + 2, np.uint64)):
        with pytest.raises(ValueError, match=r"a value of|a weight of"):
            upload.decode(packing.pack(entries, 7), TASK, wanted)
