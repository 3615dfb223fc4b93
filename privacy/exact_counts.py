"""Test results in a protected sum: a client's whole numbers as digits of a grid, and what their sums say at the server.

A client says three numbers: how many test examples it has, how many of them were right, and the sum of their losses in
fixed point. Each is written in balanced digits, -top to top in base 2 top + 1, one entry of the grid a digit. A number
is its digits times powers of the base, so the sum of numbers follows from the sums of digits, which carry nowhere.

Guarantee: the sums that `read` finds are those of the clients' numbers, exactly; only each client's loss was rounded,
to `_POINT`-ths. They have no noise: the number of a client's test examples stays the same, so two sums that differ by
one client tell it.

Legend: D is the number of digits of a number.
"""

import math

import numpy as np

from privacy.integers import Floats, Grid, Integers

_POINT = 1 << 20
"""A loss is a multiple of 1 / _POINT."""
_BITS = 64
"""A number has digits for about so many bits: 10^15 each way at the least, of examples or of losses."""


def grid(bits: int, clients: int) -> Grid:
    """Of three numbers: a step is 1, so that digits are read as they were written."""
    digits = -(-_BITS // bits)
    return Grid(3 * digits, bits, float(2 ** (bits - 1) - 1), clients)


def entries(grid: Grid, examples: int, correct: int, loss: float) -> Integers:
    """The entries (3 D + 2,) of one client; loss: the mean over its examples.

    A loss that is not finite, or too large for its digits, is none, and the last entry says so. Raises ValueError for
    counts that are too large.
    """
    total = loss * examples * _POINT if examples else 0.0  # of no examples the mean is none
    known = math.isfinite(total) and abs(round(total)) <= _largest(grid)
    numbers = examples, correct, round(total) if known else 0
    digits = [digit for number in numbers for digit in _digits(number, grid)]
    return np.array([*digits, grid.heaviest, known], np.uint64)


def read(grid: Grid, total: Floats, clients: int, votes: float) -> tuple[float | None, float] | None:
    """(mean loss, share that was right) over all examples of the sum (3 D,) of `clients`; None where there are none.

    votes: +1/2 for every client with a loss, -1/2 for every other; of one without, the mean is none. Raises ValueError
    for sums that no test results add up to.
    """
    base, digits = 2 * grid.top + 1, grid.size // 3
    sums = [int(digit) for digit in total]  # exact: below 2^53, as of fewer than 2^29 clients
    parts = (sums[i : i + digits] for i in range(0, grid.size, digits))
    examples, correct, loss = (sum(digit * base**place for place, digit in enumerate(part)) for part in parts)
    if not 0 <= correct <= examples:
        raise ValueError(f"{correct} of {examples} test examples right are no test results")
    if not examples:
        return None
    return loss / _POINT / examples if votes == clients / 2 else None, correct / examples


def _digits(number: int, grid: Grid) -> list[int]:
    """The balanced digits of `number`, the lowest first, each plus top, as entries travel."""
    if abs(number) > _largest(grid):
        raise ValueError(f"{number} has more digits than the {grid.size // 3} of a test result")
    base, found = 2 * grid.top + 1, []
    for _ in range(grid.size // 3):
        number, digit = divmod(number + grid.top, base)
        found.append(digit)
    return found


def _largest(grid: Grid) -> int:
    return int(((2 * grid.top + 1) ** (grid.size // 3) - 1) // 2)
