"""Pads: what two clients, or one, can add to a vector and only they can take away again; and the keys for it.

Keys are agreed by X25519 (RFC 7748) and derived by HKDF-SHA256 (RFC 5869) under an info that names the purpose, the
attempt and both clients, so that no key serves twice. A pad is ChaCha20's key stream (RFC 8439) under a key of its
own, read as words of 32 or 64 bits: a power of two that 2^width divides, so that a pad is uniform modulo 2^width
without rejection.
"""

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger]

SEALED = 16  # bytes that sealing adds
_BLOCK = 1 << 16  # bytes of key stream at a time: what stays in a core's cache, and lets other threads in between
_ONCE = bytes(12)  # each key seals one text


def public(key: bytes) -> bytes:
    """The public half of an X25519 key of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()


def agree(key: bytes, other: bytes, info: bytes) -> bytes:
    """32 bytes that the owners of both keys find, for the purpose `info`. Raises ValueError for a key of low order."""
    try:
        shared = X25519PrivateKey.from_private_bytes(key).exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise ValueError("a public key of low order: what it agrees on is no secret") from error
    return derive(shared, info)


def derive(secret: bytes, info: bytes) -> bytes:
    """32 bytes for the purpose `info`."""
    return HKDF(SHA256(), 32, salt=None, info=info).derive(secret)


def seal(key: bytes, text: bytes, bound: bytes) -> bytes:
    """The text, encrypted and authenticated together with `bound`; the key must never seal another one."""
    return ChaCha20Poly1305(key).encrypt(_ONCE, text, bound)


def unseal(key: bytes, sealed: bytes, bound: bytes) -> bytes | None:
    """The text; None where it, the key or `bound` is not what was sealed."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, sealed, bound)
    except InvalidTag:
        return None


def zeros(entries: int, width: int) -> Words:
    """A sum of pads of `width` bits to begin with: (entries,) words that wrap around at a multiple of 2^width."""
    return np.zeros(entries, np.uint32) if width <= 32 else np.zeros(entries, np.uint64)


def add(total: Words, key: bytes, sign: int) -> None:
    """Add the pad of `key` to `total` (entries,) in place, or take it away where sign is -1."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    nothing, block = bytes(_BLOCK), bytearray(_BLOCK + 64)
    step = _BLOCK // total.itemsize
    little = total.dtype.newbyteorder("<")
    for start in range(0, len(total), step):
        part = total[start : start + step]
        stream.update_into(nothing[: part.nbytes], block)
        words = np.frombuffer(block, little, len(part))
        if sign < 0:
            np.subtract(part, words, out=part)
        else:
            np.add(part, words, out=part)
