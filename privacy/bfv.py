"""BFV parameters for exact sums: chosen by clients and width, with the proof that no sum is decrypted wrong.

**The bound** (SEAL 4, ring Z[X]/(X^4096 + 1), data prime q, plain modulus t, special prime p). A fresh ciphertext holds
q m / t rounded to the nearest integer (an error below 0.51 a coefficient) plus noise v. A sum of n is decrypted right
where the sum of all these errors stays below q / 2t, which `most_clients` grants but for 2^-64 a coefficient:

- *shared*: v = e, centered binomial, 42 signs halved: sub-Gaussian of variance 10.5 (cosh x <= exp(x^2 / 2), each).
- *split*: SEAL encrypts zero under q p and divides by p: v = r0 + r1 s + (e u + e1 + e2 s) / p, where |r0| <= 1/2, u
  and s are ternary, |e| <= 21, and r1 holds the residues of c1 mod p over p. With c1 uniform these are independent,
  uniform and centered: each is sub-Gaussian of variance 1/12, their sum with signs s over n ciphertexts of
  n |s|^2 / 12. An encryption whose r1 were larger than that more often would tell (a, a u + e2) from uniform, by
  somebody who chose s himself, so the chance rises by no more than the advantage against the very assumption that
  hides the updates.
  |s|^2 <= 3038 but for 2^-66 (Hoeffding, 4096 coefficients, two in three not 0). The rest, for the largest e there can
  be, is sub-Gaussian of variance n (4096 21^2 + 10.5 + 4096 10.5) / p^2. Nothing here is measured.

Legend: K ciphertexts of 4096 slots; slot 0 is the tag's (privacy/tags.py), each other slot holds F fields.
"""

import math
import struct
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privacy.refused import Refused

Integers = NDArray[np.uint64]
Trust = Literal["split", "shared"]

DEGREE = 4096
DATA_SLOTS = DEGREE - 1
WIDEST = 51
"""Bits of a slot: t stays below 2^52, two limbs of 26 bits."""

_PRIMES = {"shared": (1152921504606830593,), "split": (922314686236819457, 40961)}
"""The data prime, below 2^60 as a coefficient travels in 60 bits, and in split the special prime, which never travels
and divides the noise of a public key's encryption by 15. Their product stays below 2^75, SEAL's limit for 192 bits."""
_LIMITS = ((256, 58), (192, 75), (128, 109))
"""(bits of security, bits of all primes together), SEAL's table at degree 4096, of homomorphicencryption.org."""
_FORM = struct.Struct("<4sBBIII")
_MAGIC = b"UBFV"
_TRUSTS: tuple[Trust, ...] = ("split", "shared")


@dataclass(frozen=True)
class Parameters:
    """What client, server and key holder must agree on; all of it public. Made by `fit`."""

    trust: Trust
    entries: int
    width: int
    """Bits of a field: wide enough for the sum of all clients' integers."""
    clients: int
    """The most whose sum is opened."""
    fields: int
    """F."""

    @property
    def primes(self) -> tuple[int, ...]:
        return _PRIMES[self.trust]

    @property
    def data_prime(self) -> int:
        return self.primes[0]

    @property
    def plain(self) -> int:
        """t, congruent 1 mod 2 x 4096, so that slots add one by one: as large as so many clients bear.

        A forged tag is right with a chance of 1 / t.
        """
        return _plain(_most_bits(self.trust, self.clients))

    @property
    def count(self) -> int:
        """K."""
        return -(-self.entries // (self.fields * DATA_SLOTS))

    @property
    def security_bits(self) -> int:
        """SEAL's table, the special prime counted."""
        total = math.prod(self.primes).bit_length()
        return next(bits for bits, most in _LIMITS if total <= most)

    def __str__(self) -> str:
        primes = " x ".join(f"{prime.bit_length()}-bit prime" for prime in self.primes)
        return f"BFV, degree {DEGREE}, {primes}, t={self.plain}, {self.fields} x {self.width} bits a slot"

    def to_bytes(self) -> bytes:
        """Under 100 bytes, and all that the server needs: there is no place for a key in it."""
        return _FORM.pack(_MAGIC, _TRUSTS.index(self.trust), self.width, self.entries, self.clients, self.fields)

    @staticmethod
    def from_bytes(data: bytes) -> "Parameters":
        """Raises Refused for anything that `fit` would not have made."""
        if len(data) != _FORM.size or not data.startswith(_MAGIC):
            raise Refused("these are no BFV parameters of this version: use one version of Umbel everywhere")
        _, trust, width, entries, clients, fields = _FORM.unpack(data)
        made = fit(_TRUSTS[trust % 2], entries, width, clients)
        if trust > 1 or made.fields != fields:
            raise Refused("BFV parameters that nobody would choose: use one version of Umbel everywhere")
        return made


def fit(trust: Trust, entries: int, width: int, clients: int) -> Parameters:
    """As many fields a slot as a sum over `clients` bears. Raises Refused with the nearest that is possible."""
    if trust not in _TRUSTS:
        raise Refused(f"protect.trust={trust}: split or shared")
    if entries < 1 or clients < 1 or width < 1:
        raise Refused(f"{entries} entries of {width} bits from {clients} clients: each must be 1 at least")
    widest = _most_bits(trust, clients)
    if widest >= width:
        return Parameters(trust, entries, width, clients, widest // width)
    nearest = f"the widest field for {clients} clients has {widest} bits" if widest else "no field bears so many"
    raise Refused(
        f"protect.trust={trust} cannot sum fields of {width} bits over {clients} clients: {nearest}, the most clients "
        f"at {width} bits are {most_clients(trust, width)}: lower protect.bits or protect.max_clients"
    )


@cache
def most_clients(trust: Trust, bits: int) -> int:
    """How many ciphertexts may be added where a slot has `bits` bits; 0: not even one."""
    if bits > WIDEST:
        return 0
    room = _PRIMES[trust][0] / (2 * _plain(bits)) - 1  # 1: SEAL's own rounding in decryption is off by less than 2^-50
    low, high = 0, 1 << 32
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if noise(trust, middle) <= room else (low, middle - 1)
    return low


@cache
def _most_bits(trust: Trust, clients: int) -> int:
    """The widest slot that a sum over so many clients bears; 0: none."""
    return max((bits for bits in range(14, WIDEST + 1) if most_clients(trust, bits) >= clients), default=0)


def noise(trust: Trust, clients: int) -> float:
    """What the error of a coefficient of a sum exceeds with a chance of at most 2^-64, by the module's proof."""
    if trust == "shared":
        return 0.51 * clients + _tail(64) * math.sqrt(10.5 * clients)
    special = _PRIMES["split"][1]
    rounding = _tail(65) * math.sqrt(3038 / 12 * clients)
    rest = _tail(66) * math.sqrt((DEGREE * 21**2 + 10.5 + DEGREE * 10.5) * clients) / special
    return 1.01 * clients + rounding + rest


def to_slots(integers: Integers, parameters: Parameters) -> Integers:
    """integers (entries,) -> slots (K, 4096), the tag's slot 0 still empty. Raises ValueError for what does not fit."""
    if integers.dtype != np.uint64 or integers.shape != (parameters.entries,):
        raise ValueError(f"{integers.dtype} {integers.shape} came, uint64 ({parameters.entries},) is encrypted")
    if int(integers.max()) >> parameters.width:
        raise ValueError(f"an integer takes more than {parameters.width} bits")
    slots = np.zeros((parameters.count, DEGREE), np.uint64)
    padded = np.zeros(parameters.count * DATA_SLOTS * parameters.fields, np.uint64)
    padded[: len(integers)] = integers
    fields = padded.reshape(parameters.count, DATA_SLOTS, parameters.fields)
    for i in range(parameters.fields):
        slots[:, 1:] |= fields[:, :, i] << np.uint64(i * parameters.width)
    return slots


def from_slots(slots: Integers, parameters: Parameters) -> Integers:
    """slots (K, 4096) -> integers (entries,), the reverse of `to_slots`."""
    mask = np.uint64((1 << parameters.width) - 1)
    fields = [(slots[:, 1:] >> np.uint64(i * parameters.width)) & mask for i in range(parameters.fields)]
    return np.stack(fields, axis=-1).reshape(-1)[: parameters.entries]


def _tail(bits: int) -> float:
    """How many deviations a sub-Gaussian exceeds, either way, with a chance of at most 2^-bits."""
    return math.sqrt(2 * (bits + 1) * math.log(2))


@cache
def _plain(bits: int) -> int:
    candidate = (1 << bits) // (2 * DEGREE) * 2 * DEGREE + 1
    while candidate <= 1 << bits or not _is_prime(candidate):
        candidate += 2 * DEGREE
    return candidate


def _is_prime(number: int) -> bool:
    """Miller and Rabin with the first twelve primes as bases, which is exact below 2^64 (Sorenson and Webster 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if any(number % base == 0 for base in bases):
        return number in bases
    twos = ((number - 1) & -(number - 1)).bit_length() - 1
    odd = (number - 1) >> twos
    return all(_passes(pow(base, odd, number), twos, number) for base in bases)


def _passes(power: int, twos: int, number: int) -> bool:
    if power == 1:
        return True
    for _ in range(twos):
        if power == number - 1:
            return True
        power = power * power % number
    return False
