"""Quantized integers: what protected aggregation sums; the client's half and the server's in one file.

A client's P values become integers k of one public, symmetric grid, -top to top, in steps of limit / top; sums of
integers are exact, so whoever adds them, in the clear, under masks or under encryption, reads the same. Two entries
follow the values: the client's weight, and whether its update was within the clipping norm.

Guarantee: whatever an update is and however its rounding falls, the values that `Grid.quantize` makes of it are at most
`Grid.norm` long in L2, and the sum of any `clients` results carries over in no entry.

**Proof of the norm.** Values outside +-limit are clamped, so no vector is longer than limit sqrt(P). One of length C
that moves by less than a step in each coordinate is at most C + step sqrt(P) long. Stochastic rounding stays, but for a
chance of beta, below the third bound (Kairouz, Liu and Steinke 2021, Algorithm 1 and section 4): what does not is
rounded again, at last towards zero, which lengthens nothing. `norm` is the least of the three.

**Proof of the width.** An entry is at most 2^field - 1, so a sum of n is below n 2^field <= 2^(field + ceil(log2 n)).
`field` is `bits`, and more where clients add noise (privacy/noise_shares.py): it has room for all of a noised value.

Legend: P values of an update, s the step, C the clipping norm.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct, idct, prev_fast_len

from privacy.refused import Refused

Integers = NDArray[np.uint64]
Floats = NDArray[np.float64]

FEWEST, MOST = 2, 24
"""Bits of one value: below there is no grid with both signs, above float32 has no more digits to give."""
WIDEST = 63
"""Bits of one sum: it is read back as a signed 64-bit integer."""
_BETA = 1e-6
"""Chance of a rounding that has to be done again: the bias of conditional rounding is of its order."""
_AGAIN = 3
_PART = 1 << 15
"""Values that are rounded at a time: passes over all of them would wait for memory."""
_WORTH = 1.04
"""The most that rounding on the range +-C may add to the norm; where it adds more, coordinates are rotated."""
_SPREAD = 4
"""Range after a rotation, in units of C / sqrt(P): four standard deviations of a coordinate."""
TAILS = 16
"""Standard deviations of a client's noise that an entry has room for."""
_SLACK = 1 + 1e-9
"""For the last digits of the sums of squares in float64."""


def width(bits: int, clients: int, widest: int = WIDEST, setting: str = "protect.bits", room: int = 0) -> int:
    """Bits of a sum over `clients` entries of `bits` bits and `room` more, at most `widest`: no such sum carries.

    Raises Refused for what is impossible, with the nearest that is possible.
    """
    if not FEWEST <= bits <= MOST:
        raise Refused(f"{setting}={bits} has no grid: the nearest is {min(max(bits, FEWEST), MOST)}")
    if clients < 1:
        raise Refused(f"protect.max_clients={clients} sums nothing: the nearest is 1")
    needed = bits + room + (clients - 1).bit_length()
    if needed > widest:
        narrower = widest - room - (clients - 1).bit_length()
        ways = [f"protect.max_clients={2 ** (widest - room - bits)}"] if widest >= bits + room else []
        ways += [f"{setting}={narrower}"] if narrower >= FEWEST else []
        noised = f" and {room} for noise" if room else ""
        raise Refused(
            f"sums of {clients} clients at {setting}={bits}{noised} need {needed} bits, there are {widest}: the "
            f"nearest is {' or '.join(ways) or 'without noise shares'}"
        )
    return needed


@dataclass(frozen=True)
class Grid:
    """One round's grid: all of it is public, and the same for every client."""

    size: int
    """P."""
    bits: int
    """Of one entry of one client."""
    limit: float
    """The range: a value is from -limit to limit."""
    clients: int
    """How many may be summed."""
    clip: float = 0.0
    """C, L2 norm of an update before rounding; 0: none, and values are bounded by the range alone."""
    rotation: int | None = None
    """Seed of the rotation before rounding, of (run, round); None: coordinates stay as they are."""
    noise: int = 0
    """Variance, in steps^2, of the noise that each client adds to each of its values; 0: none."""

    def __post_init__(self) -> None:
        if not FEWEST <= self.bits <= MOST:  # before 2^bits is computed: they may come from a stranger
            width(self.bits, 1)
        width(self.bits, self.clients, room=self.field - self.bits)
        if not 0 < self.limit < math.inf or not 0 <= self.clip < math.inf or self.size < 1:
            raise ValueError(f"no grid: {self}")

    @classmethod
    def default(cls, size: int, bits: int, clients: int, clip: float, seed: int) -> "Grid":
        """The grid where no range is set.

        Range +-C where rounding adds at most 4 % to the norm; else, at few bits, +-4 C / sqrt(P) after a rotation by
        `seed`, which spreads every update over all coordinates alike. Without a clipping norm nothing says how long an
        update is, so no range could be made for rotated coordinates: it is +-1, above what a weight moves in a round
        of any training that does not diverge.
        """
        if not clip:
            return cls(size, bits, 1.0, clients)
        plain = cls(size, bits, clip, clients, clip)
        if plain.norm <= _WORTH * clip or size <= _SPREAD**2:
            return plain
        return cls(size, bits, _SPREAD * clip / math.sqrt(size), clients, clip, seed)

    @property
    def entries(self) -> int:
        """P values, the weight, the clip bit."""
        return self.size + 2

    @property
    def width(self) -> int:
        """Bits of an entry of a sum."""
        return width(self.bits, self.clients, room=self.field - self.bits)

    @property
    def field(self) -> int:
        """Bits of an entry of one client, its noise included."""
        return max(self.bits, (2 * self.reach).bit_length())

    @property
    def top(self) -> int:
        """The largest k before noise."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def tail(self) -> int:
        """The most that noise moves a k: what is further out is clamped."""
        return math.isqrt(TAILS**2 * self.noise) + 1 if self.noise else 0

    @property
    def reach(self) -> int:
        """The largest k; it travels as k + reach, 0 to 2 reach, since signed fields would borrow from neighbours."""
        return self.top + self.tail

    @property
    def heaviest(self) -> int:
        """The weight entry of a weight of 1."""
        return int(2**self.bits - 1)

    @property
    def step(self) -> float:
        return self.limit / self.top

    @property
    def norm(self) -> float:
        """L2 bound of the values of any result of `quantize`: the sensitivity of their sum to one client."""
        return self._bound * _SLACK

    @property
    def _bound(self) -> float:
        clamped, clip, step, root = self.limit * math.sqrt(self.size), self.clip, self.step, math.sqrt(self.size)
        if not clip:
            return clamped
        likely = clip**2 + (step * root / 2) ** 2 + math.sqrt(-2 * math.log(_BETA)) * step * (clip + step * root / 2)
        return min(clamped, clip + step * root, math.sqrt(likely))

    def weigh(self, weight: float) -> int:
        """The weight entry of a weight in (0, 1]: at least 1, so that no client is lost."""
        if not 0 < weight <= 1:
            raise ValueError(f"a weight of {weight}, not above 0 and at most 1")
        return max(1, round(weight * self.heaviest))

    def quantize(self, update: NDArray[np.float32], weight: float, within: bool, seed: int) -> Integers:
        """The entries (P + 2,) of one client: its update (P,) times its weight, rounded without bias by `seed`.

        The values are scaled by the weight *as its entry says it*, so that a sum of values over the sum of weights is
        the exact weighted mean. Clamping, and no more than a chance of 1e-6 of a second rounding, is what may bias.
        Raises ValueError for an update that is not finite or of another size, and for a weight outside (0, 1].
        """
        if update.shape != (self.size,):
            raise ValueError(f"an update of shape {update.shape} for a grid of {self.size} values")
        heavy = self.weigh(weight)
        values = update.astype(np.float64)
        length = float(np.linalg.norm(values))
        if not math.isfinite(length):
            raise ValueError("an update that is not finite (NaN or infinity) has no place on a grid")
        if self.clip and length > self.clip:
            values *= self.clip / length
        if self.rotation is not None:
            values = rotated(values, self.rotation)
        entries = np.empty(self.entries, np.uint64)
        steps = entries[:-2].view(np.float64)  # numbers of 8 bytes, each to be overwritten by its own whole number
        self._round(values, heavy, np.random.default_rng(seed), steps)
        for part in _parts(self.size):
            entries[:-2][part] = steps[part] + self.reach
        entries[-2:] = heavy, within
        return entries

    def check(self, entries: Integers) -> None:
        """Raises ValueError, with the reason, for (P + 2,) integers that no client can have made.

        With noise an update may be as long as its noise, so there only single values are bounded.
        """
        if entries.shape != (self.entries,) or entries.dtype != np.uint64:
            raise ValueError(f"{entries.dtype} {entries.shape} for a grid of {self.entries} entries")
        if entries[:-2].max() > 2 * self.reach:
            raise ValueError(f"a value of {entries[:-2].max()}, above {2 * self.reach}")
        if not 1 <= entries[-2] <= self.heaviest or entries[-1] > 1:
            raise ValueError(f"a weight of {entries[-2]} and a clip bit of {entries[-1]} are none")
        if self.clip and not self.noise and not self._short(entries[:-2].astype(np.float64) - self.reach):
            raise ValueError(f"an update that is longer than {self.norm:.6g}, the norm after rounding")

    def read(self, total: Integers, count: int) -> tuple[Floats, float, float]:
        """(sum of the weighted updates (P,), sum of the weights, votes) of the sum (P + 2,) over `count` clients.

        votes: +1/2 for every client within the norm, -1/2 for every other. Noise that clients added is in the first.
        Raises ValueError for what no sum over `count` clients can be.
        """
        if not 1 <= count <= self.clients:
            raise ValueError(f"a sum over {count} clients, 1 to {self.clients} can be summed")
        if total.shape != (self.entries,) or total.dtype != np.uint64:
            raise ValueError(f"{total.dtype} {total.shape} for a sum of {self.entries} entries")
        values, weight, within = total[:-2], int(total[-2]), int(total[-1])
        if values.max() > 2 * self.reach * count or not count <= weight <= self.heaviest * count or within > count:
            raise ValueError(f"entries that no {count} clients add up to")
        summed = (values.astype(np.int64) - count * self.reach).astype(np.float64) * self.step
        if self.rotation is not None:
            summed = unrotated(summed, self.rotation)
        return summed, weight / self.heaviest, within - count / 2

    def _round(self, values: Floats, heavy: int, random: np.random.Generator, steps: Floats) -> None:
        """values (P,), overwritten, times the weight of entry `heavy`: to whole `steps` (P,), at most the norm long."""
        exact = values
        for part in _parts(self.size):
            exact[part] *= heavy / self.heaviest / self.step
            np.clip(exact[part], -self.top, self.top, out=exact[part])
        for _ in range(_AGAIN):
            for part in _parts(self.size):
                np.add(exact[part], random.random(part.stop - part.start), out=steps[part])
                np.floor(steps[part], out=steps[part])
                np.minimum(steps[part], self.top, out=steps[part])  # top + u is top + 1 for the last few u below 1
            if not self.clip or self._short(steps):
                return
        np.trunc(exact, out=steps)

    def _short(self, steps: Floats) -> bool:
        return float(np.linalg.norm(steps)) * self.step <= self._bound * (1 + 1e-12)


def _parts(size: int) -> Iterator[slice]:
    """Of a vector (size,), parts that stay in the cache from one operation to the next."""
    return (slice(start, min(start + _PART, size)) for start in range(0, size, _PART))


def rotated(values: Floats, seed: int) -> Floats:
    """values (P,) after an orthonormal map that is drawn by `seed`: twice random signs and a discrete cosine transform.

    Every result is a sum over all values with random signs and factors of at most about sqrt(2 / P), so sub-Gaussian:
    about as long as any other, whatever the vector (Suresh et al. 2017, section 3, with another transform). A Hadamard
    transform would pad to a power of two, and each number of padding would travel. A cosine transform takes any P, but
    8 times as long where P has a large prime factor: so one turns the first m values, m the largest fast length up to
    P, the other the last m. The second also breaks up what is smooth after the first.
    """
    turned = values.copy()
    for part, signs in _turns(len(values), seed):
        turned[part] = dct(turned[part] * signs, type=2, norm="ortho")
    return turned


def unrotated(values: Floats, seed: int) -> Floats:
    """The inverse of `rotated`."""
    turned = values.copy()
    for part, signs in reversed(_turns(len(values), seed)):
        turned[part] = idct(turned[part], type=2, norm="ortho") * signs
    return turned


def _turns(size: int, seed: int) -> list[tuple[slice, Floats]]:
    fast, random = int(prev_fast_len(size, real=True)), np.random.default_rng(seed)
    parts = slice(0, fast), slice(size - fast, size)
    return [(part, random.integers(0, 2, fast, np.int8) * 2.0 - 1) for part in parts]
