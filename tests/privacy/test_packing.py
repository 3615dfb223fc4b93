"""Integers without a gap between them: what is packed comes back, and nothing else is read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import packing


@given(st.integers(1, 64), st.integers(0, 300), st.integers(0, 2**32))
def test_what_is_packed_comes_back(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**width - 1, count, np.uint64, endpoint=True)
    data = packing.pack(values, width)
    assert len(data) == packing.size(count, width) == -(-count * width // 8)
    assert (packing.unpack(data, count, width) == values).all()


@given(st.integers(1, 64), st.lists(st.integers(0, 2**64 - 1), max_size=40))
def test_the_bytes_are_one_little_endian_bit_string(width: int, numbers: list[int]) -> None:
    values = [number % 2**width for number in numbers]
    whole = sum(value << (i * width) for i, value in enumerate(values))
    data = packing.pack(np.array(values, np.uint64), width)
    assert int.from_bytes(data, "little") == whole


def test_a_value_that_is_too_wide_is_refused() -> None:
    with pytest.raises(ValueError, match="a value of 8 takes more than 3 bits"):
        packing.pack(np.array([8], np.uint64), 3)


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "take 2 bytes, 0 came"), (b"\0\0\0", "take 2 bytes, 3 came"), (b"\0\x80", "bits after the last of 3")],
)
def test_bytes_that_pack_cannot_have_made_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        packing.unpack(data, 3, 5)


@pytest.mark.parametrize("width", [0, 65])
def test_a_width_of_no_machine_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"a width of {width} bits"):
        packing.pack(np.zeros(1, np.uint64), width)
    with pytest.raises(ValueError, match=f"a width of {width} bits"):
        packing.unpack(b"\0", 1, width)
