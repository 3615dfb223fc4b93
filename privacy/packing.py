"""Packing: unsigned integers of any width up to 64 bits <-> bytes without a gap.

Value i takes the bits from i * width on of one little-endian bit string, as the sums of protected aggregation travel:
a width need not be that of a machine word. Legend: N is the number of values.
"""

from math import gcd

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.uint64]

_WORD = 64


def size(count: int, width: int) -> int:
    """Bytes of `count` values of `width` bits."""
    return (count * width + 7) // 8


def pack(values: Integers, width: int) -> bytes:
    """The bytes of values (N,), each of `width` bits (1 to 64). Raises ValueError for a value that is wider."""
    _check(width)
    if width < _WORD and len(values) and int(values.max()) >> width:
        raise ValueError(f"a value of {int(values.max())} takes more than {width} bits")
    period, words = _period(width)
    groups = -(-len(values) // period)
    padded = np.zeros((groups, period), np.uint64)
    padded.reshape(-1)[: len(values)] = values
    packed = np.zeros((groups, words), np.uint64)
    for i in range(period):  # a period of values fills whole words, so that each place in it shifts by the same bits
        word, shift = divmod(i * width, _WORD)
        packed[:, word] |= padded[:, i] << np.uint64(shift)
        if shift + width > _WORD:
            packed[:, word + 1] |= padded[:, i] >> np.uint64(_WORD - shift)
    return packed.astype("<u8", copy=False).tobytes()[: size(len(values), width)]


def unpack(data: bytes, count: int, width: int) -> Integers:
    """The `count` values of `width` bits in `data`.

    `data` may be anything: whatever `pack` cannot have made (another length, bits after the last value) raises
    ValueError with the reason.
    """
    _check(width)
    if len(data) != size(count, width):
        raise ValueError(f"{count} values of {width} bits take {size(count, width)} bytes, {len(data)} came")
    if (used := count * width % 8) and data[-1] >> used:
        raise ValueError(f"there are bits after the last of {count} values")
    period, words = _period(width)
    groups = -(-count // period)
    packed = np.frombuffer(data.ljust(groups * words * 8, b"\0"), "<u8").reshape(groups, words)
    values = np.empty((groups, period), np.uint64)
    for i in range(period):
        word, shift = divmod(i * width, _WORD)
        values[:, i] = packed[:, word] >> np.uint64(shift)
        if shift + width > _WORD:
            values[:, i] |= packed[:, word + 1] << np.uint64(_WORD - shift)
    if width < _WORD:
        values &= np.uint64((1 << width) - 1)
    return values.reshape(-1)[:count]


def _period(width: int) -> tuple[int, int]:
    """(how many values end together with a word, how many words those are)."""
    shared = gcd(width, _WORD)
    return _WORD // shared, width // shared


def _check(width: int) -> None:
    if not 1 <= width <= _WORD:
        raise ValueError(f"a width of {width} bits: 1 to {_WORD} can be packed")
