"""Shares: a secret in parts, of which `threshold` tell it and fewer tell nothing (Shamir 1979).

The field is that of the integers modulo 2^255 - 19. A secret is 32 bytes, little-endian, below its order: an X25519
key or a seed. A share is as long.
"""

import secrets
from collections.abc import Mapping, Sequence

_FIELD = 2**255 - 19
SIZE = 32


def draw() -> bytes:
    """A secret from the operating system's entropy, uniform in the field."""
    return secrets.randbelow(_FIELD).to_bytes(SIZE, "little")


def split(secret: bytes, threshold: int, places: Sequence[int]) -> list[bytes]:
    """One share for each of `places`: the values there of a random polynomial with `threshold` coefficients.

    places: different numbers from 1 on, as the value at 0 is the secret. Raises ValueError where they cannot be.
    """
    if not 1 <= threshold <= len(set(places)) == len(places) or min(places) < 1:
        raise ValueError(f"no {threshold} of {len(places)} shares at these places")
    coefficients = [secrets.randbelow(_FIELD) for _ in range(threshold - 1)] + [_number(secret)]
    return [_value(coefficients, place).to_bytes(SIZE, "little") for place in places]


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly `threshold` shares by place: Lagrange's polynomial at 0. Wrong ones give a wrong secret."""
    secret = 0
    for place, share in shares.items():
        above = below = 1
        for other in shares:
            if other != place:
                above = above * other % _FIELD
                below = below * (other - place) % _FIELD
        secret += _number(share) * above * pow(below, -1, _FIELD)
    return (secret % _FIELD).to_bytes(SIZE, "little")


def valid(share: bytes) -> bool:
    """Whether these bytes are a number of the field."""
    return len(share) == SIZE and int.from_bytes(share, "little") < _FIELD


def _number(value: bytes) -> int:
    if not valid(value):
        raise ValueError("not a number of the field: 32 bytes below 2^255 - 19")
    return int.from_bytes(value, "little")


def _value(coefficients: list[int], place: int) -> int:
    value = 0
    for coefficient in coefficients:  # Horner, the highest power first
        value = (value * place + coefficient) % _FIELD
    return value
