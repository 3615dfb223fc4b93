"""Shared coordinates: the set of a round, what a client picks and keeps, what it refuses; sums at the same places."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st

from clients import codecs, coordinates, masking, upload
from clients.task import Task
from privacy import packing
from privacy.integers import Grid
from privacy.refused import Refused
from scenarios.settings import Settings, override

VALUES = ["float32", "float16", "qsgd8", "int16", "int9"]
sizes, shares = st.integers(1, 300), st.floats(0.001, 1)


def vector(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def task(size: int, named: np.ndarray, **changes: object) -> Task:
    made = Task("train", 1, "a", np.zeros(size, np.float32), (("w", (size,)),), coordinates=named)
    return replace(made, **changes)  # type: ignore[arg-type]


# ---- the set of a round ----


@tried(deadline=None)
@given(size=sizes, share=shares, seed=st.integers(0, 9), number=st.integers(1, 500))
def test_a_round_has_ceil_of_share_times_p_increasing_coordinates_the_fastest_among_them(
    size: int, share: float, seed: int, number: int
) -> None:
    k = ceil(share * size)
    before = coordinates.of_round(share, size, seed, number, None)
    pace = coordinates.paced(None, vector(k, seed), before, size, number)
    found = coordinates.of_round(share, size, seed, number + 1, pace)
    coordinates.hold_to(found, share, size)
    assert found.shape == (k,)
    fastest = np.argsort(-pace.speed, kind="stable")[: k - coordinates.fresh(k)]
    assert set(fastest) <= set(found)


@tried(deadline=None, max_examples=40)
@given(size=st.integers(1, 120), share=shares, begin=st.integers(1, 60), fast=st.integers(0, 9))
def test_every_coordinate_is_in_the_set_once_in_any_p_over_m_rounds_whatever_moves(
    size: int, share: float, begin: int, fast: int
) -> None:
    pace = coordinates.Pace(vector(size, fast), np.zeros(size, np.uint32))  # always the same: the worst for the others
    seen = set[int]()
    for number in range(begin, begin + ceil(size / coordinates.fresh(ceil(share * size)))):
        seen |= set(coordinates.of_round(share, size, 3, number, pace).tolist())
    assert seen == set(range(size))


def test_the_set_is_made_of_seed_round_and_last_update_alone() -> None:
    first = coordinates.of_round(0.1, 200, 0, 1, None)
    assert (first == coordinates.of_round(0.1, 200, 0, 1, None)).all()
    others = [coordinates.of_round(0.1, 200, 1, 1, None), coordinates.of_round(0.1, 200, 0, 2, None)]
    assert all((first != other).any() for other in others)


def test_speed_is_what_came_over_the_rounds_in_which_it_gathered() -> None:
    first = coordinates.paced(None, np.float32([-4, 2]), np.uint32([1, 3]), 5, 7)
    assert first.speed.tolist() == [0, 4, 0, 2, 0]
    later = coordinates.paced(first, np.float32([9, -9]), np.uint32([1, 2]), 5, 10)
    assert later.speed.tolist() == [0, 3, 9 / 4, 2, 0]
    assert later.sent.tolist() == [6, 10, 10, 7, 6]
    assert first.speed.tolist() == [0, 4, 0, 2, 0]


def test_what_is_spread_stands_at_its_coordinates_and_elsewhere_is_zero() -> None:
    whole = coordinates.spread(np.float32([1, -2]), np.uint32([1, 4]), 6)
    assert whole.tolist() == [0, 1, 0, 0, -2, 0]
    assert whole.dtype == np.float32


# ---- the client ----


@tried(deadline=None)
@given(size=sizes, share=shares)
def test_what_is_picked_and_what_is_kept_are_the_update_and_the_residual_to_the_bit(size: int, share: float) -> None:
    named = coordinates.of_round(share, size, 0, 1, None)
    update, residual = vector(size), vector(size, 1)
    given_ = update.copy(), residual.copy()
    sent, kept = coordinates.picked(update, residual, named)
    assert kept is not None
    assert (coordinates.spread(sent, named, size) + kept == given_[0] + given_[1]).all()
    assert not kept[named].any()
    assert (update == given_[0]).all()
    assert (residual == given_[1]).all()


def test_over_one_turn_of_the_window_all_of_every_update_is_sent() -> None:
    size, share, residual, pace = 90, 0.1, None, None
    sent, given_ = np.zeros(size), np.zeros(size)
    for number in range(1, ceil(size / coordinates.fresh(9)) * 2):
        if number <= 10:
            given_ += (update := vector(size, number))
        else:
            update = np.zeros(size, np.float32)
        named = coordinates.of_round(share, size, 0, number, pace)
        values, residual = coordinates.picked(update, residual, named)
        pace = coordinates.paced(pace, values, named, size, number)
        sent += coordinates.spread(values, named, size)
    np.testing.assert_allclose(sent, given_, atol=1e-5)


@pytest.mark.parametrize(("update", "residual"), [(np.nan, 1.0), (np.inf, 1.0), (3e38, 3e38)])
def test_nothing_is_sent_of_what_is_not_finite_anywhere_and_the_residual_stays(update: float, residual: float) -> None:
    broken, before = np.ones(6, np.float32), np.full(6, residual, np.float32)
    broken[5] = update
    sent, kept = coordinates.picked(broken, before, np.uint32([0, 1]))
    assert np.isnan(sent).all()
    assert kept is before


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (None, "without the coordinates"),
        (np.uint32([1, 2]), "names 2 coordinates, this node's settings ask for 3"),
        (np.uint32([[1, 2, 3]]), "names 3 coordinates"),
        (np.int64([1, 2, 3]), "names 3 coordinates"),
        (np.uint32([1, 1, 3]), "must increase and lie below 30"),
        (np.uint32([3, 2, 1]), "must increase"),
        (np.uint32([1, 2, 30]), "lie below 30"),
        (np.uint32([1, 2, 2**32 - 1]), "lie below 30"),
    ],
    ids=["none", "few", "matrix", "dtype", "twice", "back", "P", "largest"],
)
def test_a_task_with_other_coordinates_than_the_settings_ask_for_is_refused(
    named: np.ndarray | None, said: str
) -> None:
    with pytest.raises(Refused, match=said):
        coordinates.hold_to(named, 0.1, 30)


def test_coordinates_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(Refused, match="this node's settings send all"):
        coordinates.hold_to(np.uint32([1]), None, 30)


def test_clients_sign_which_coordinates_they_were_shown() -> None:
    grid, one = Grid(2, 8, 1.0, 5), task(9, np.uint32([1, 2]))
    views = {masking.view(replace(one, coordinates=named), grid) for named in (np.uint32([1, 2]), np.uint32([1, 3]))}
    assert len(views) == 2


# ---- the values ----


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("size", [1, 9, 10, 511, 1300])
def test_the_bytes_are_those_of_k_values_and_no_index(values: str, size: int) -> None:
    settings = override(Settings(), f"codec=shared-topk:0.1:{values}")
    named = coordinates.of_round(0.1, size, 0, 1, None)
    sent, _ = coordinates.picked(vector(size), None, named)
    asked = task(size, named)
    payload, residual = upload.encode(sent, None, True, 1, asked, settings)
    assert residual is None
    assert len(payload) == upload.size(settings, size)
    alone = override(Settings(), f"codec={values}")
    assert len(payload) == upload.size(alone, ceil(0.1 * size))
    np.testing.assert_allclose(
        upload.decode(payload, asked, settings), np.clip(sent, -1, 1) if values.startswith("int") else sent, atol=0.05
    )


@tried(deadline=None, max_examples=30)
@given(size=st.integers(1, 200), share=shares, clients=st.integers(1, 9), width=st.integers(2, 20))
def test_the_sum_of_what_is_decoded_is_what_the_sum_decodes_to(
    size: int, share: float, clients: int, width: int
) -> None:
    settings = override(Settings(), f"codec=shared-topk:{share!r}:int{width}")
    named = coordinates.of_round(share, size, 0, 1, None)
    asked = task(size, named)
    grid = upload.grid_of(asked, settings)
    assert grid is not None
    total, apart = np.zeros(grid.entries, np.uint64), np.zeros(size)
    for client in range(clients):
        sent, _ = coordinates.picked(vector(size, client), None, named)
        payload, _ = upload.encode(sent, None, True, 1, replace(asked, client=str(client)), settings)
        entries = packing.unpack(payload, grid.entries, grid.field)
        total += entries
        apart += coordinates.spread(grid.read(entries, 1)[0].astype(np.float32), named, size)
    together = coordinates.spread(grid.read(total, clients)[0].astype(np.float32), named, size)
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_a_payload_of_another_number_of_values_is_refused(change: int) -> None:
    settings, asked = (
        override(Settings(), "codec=shared-topk:0.1"),
        task(100, coordinates.of_round(0.1, 100, 0, 1, None)),
    )
    with pytest.raises(codecs.CodecError, match=f"takes 40 bytes, {40 + change} came"):
        upload.decode(bytes(40 + change), asked, settings)


def test_values_that_are_not_finite_are_refused_at_the_server() -> None:
    settings, asked = override(Settings(), "codec=shared-topk:0.1"), task(20, np.uint32([1, 2]))
    with pytest.raises(codecs.CodecError, match="finite"):
        upload.decode(np.float32([1, np.nan]).tobytes(), asked, settings)


# ---- names ----


@pytest.mark.parametrize("codec", ["float32", "int16", "topk:0.1", "shared-topk:0.05:int16", "shared-topk:1:qsgd8"])
def test_a_codec_is_split_and_joined_again(codec: str) -> None:
    assert coordinates.split(coordinates.joined(*coordinates.split(codec))) == coordinates.split(codec)


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        ("shared-topk", "as in shared-topk:0.05"),
        ("shared-topk:", "as in shared-topk:0.05"),
        ("shared-topk:five", "above 0 and at most 1"),
        ("shared-topk:0", "above 0"),
        ("shared-topk:1.5", "at most 1"),
        ("shared-topk:nan", "at most 1"),
        ("shared-topk:-0.1:int16", "above 0"),
        ("shared-topk:0.1:", "may be float32, float16, qsgd8 or intN"),
        ("shared-topk:0.1:topk:0.1", "may be float32"),
        ("shared-topk:0.1:shared-topk:0.1", "may be float32"),
        ("shared-topk:0.1:int", "there is no codec 'int'"),
        ("shared-topk:0.1:int99", "the nearest is int24"),
    ],
)
def test_a_share_or_values_that_cannot_be_are_refused_in_one_line_with_the_way_out(codec: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        upload.check(override(Settings(), f"codec={codec}"))
    assert "\n" not in str(caught.value)


def test_the_same_integers_in_the_clear_are_at_the_same_coordinates() -> None:
    hidden = override(Settings(), "protect=masked codec=shared-topk:0.05 protect.bits=9")
    assert upload.in_the_clear(hidden).codec == "shared-topk:0.05:int9"
    assert upload.everywhere(upload.in_the_clear(hidden)).codec == "int9"
