"""Coefficients: what a ciphertext is on the wire and to the server, which adds them mod q and needs no SEAL for it.

60 bits each, where SEAL's own form takes 64 and a reader that crashes on crafted bytes. In `split` a ciphertext is both
polynomials, in `shared` the first one and the seed of the second (privacy/expansion.py).

Legend: N = 4096 coefficients below the data prime q.
"""

import numpy as np

from privacy.bfv import DEGREE, Integers, Parameters

POLYNOMIAL = DEGREE * 60 // 8
"""Bytes of a polynomial on the wire."""
SEED = 64
_TOP = np.uint64(60)
_LOW = np.uint64((1 << 60) - 1)
_NIBBLES = np.arange(15, dtype=np.uint64) * np.uint64(4)


class Unreadable(ValueError):
    """Ciphertexts that nobody can have encrypted. The message says why."""


def size(parameters: Parameters) -> int:
    """Bytes of one ciphertext of a client on the wire."""
    return POLYNOMIAL + (SEED if parameters.trust == "shared" else POLYNOMIAL)


def packed(polynomial: Integers) -> bytes:
    """polynomial (N,), below 2^60 -> its bytes on the wire: 15 words of 16 coefficients.

    The sixteenth lies in the upper four bits of the other fifteen, so that there are three operations on all at once.
    """
    groups = polynomial.reshape(-1, 16)
    return (groups[:, :15] | ((groups[:, 15:] >> _NIBBLES) << _TOP)).astype("<u8", copy=False).tobytes()


def polynomial(data: memoryview, parameters: Parameters) -> Integers:
    """(N,), the reverse of `packed`. Raises Unreadable where a coefficient is not below q."""
    words = np.frombuffer(data, "<u8").reshape(-1, 15)
    groups = np.empty((len(words), 16), np.uint64)
    np.bitwise_and(words, _LOW, out=groups[:, :15])
    np.bitwise_or.reduce((words >> _TOP) << _NIBBLES, axis=1, out=groups[:, 15])
    coefficients = groups.reshape(-1)
    if len(coefficients) != DEGREE or int(coefficients.max()) >= parameters.data_prime:
        raise Unreadable("a coefficient is not below the data prime")
    return coefficients


def add(total: Integers, other: Integers, parameters: Parameters) -> None:
    """total += other mod q, in place; all below q, which is below 2^60."""
    total += other
    np.minimum(total, total - np.uint64(parameters.data_prime), out=total)  # below q the difference wraps to above 2^63
