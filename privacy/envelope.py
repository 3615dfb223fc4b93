"""Envelope: the one form in which ciphertexts travel, checked to the last byte before anything reads what is in it.

A fixed header (version, run, round, sender, fingerprint of key and parameters, number and size of ciphertexts), the
ciphertexts, a MAC. Whoever opens one knows beforehand what every byte of the header must be, so nothing is parsed: a
header differs or it does not. There is no compression and no length that the sender may choose.

The MAC's key is one that sender and receiver share, so that a receiver can say who sent what: between a client and the
server it names the offender, between server and key holder it keeps others out. Against the server it proves nothing;
that is what tags are for (privacy/tags.py).
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass

_VERSION = 1
_HEADER = struct.Struct("<4sB16sI16s16sII")
_FIELDS = ("kind", "version", "run", "round", "sender", "key or parameters", "number of ciphertexts", "their size")
_MAC = 32


class Broken(ValueError):
    """An envelope that is not what was asked for. The message says in which way."""


@dataclass(frozen=True)
class Address:
    """What every byte of the header must be."""

    run: str
    round: int
    sender: str
    """The client's name, or for an aggregate the roster."""
    fingerprint: bytes
    count: int
    size: int

    @property
    def length(self) -> int:
        """Bytes of the whole envelope."""
        return length(self.count, self.size)

    def header(self) -> bytes:
        run, sender = _short(self.run.encode()), _short(self.sender.encode())
        return _HEADER.pack(b"UMBE", _VERSION, run, self.round, sender, self.fingerprint, self.count, self.size)


def length(count: int, size: int) -> int:
    """Bytes of an envelope of `count` ciphertexts of `size` bytes."""
    return _HEADER.size + count * size + _MAC


def fingerprint(key_id: bytes, parameters: bytes) -> bytes:
    """16 bytes that no other key or parameters have."""
    return _short(key_id + parameters)


def seal(address: Address, ciphertexts: bytes, key: bytes) -> bytes:
    """ciphertexts: count x size bytes."""
    if len(ciphertexts) != address.count * address.size:
        raise ValueError(f"{len(ciphertexts)} bytes came, {address.count} x {address.size} are sealed")
    content = address.header() + ciphertexts
    return content + hmac.digest(key, content, "sha256")


def open_(data: bytes, address: Address, key: bytes) -> memoryview:
    """The ciphertexts, count x size bytes. Raises Broken for all but what `seal` made of this address and key."""
    if len(data) != address.length:
        raise Broken(f"{len(data)} bytes came, {address.length} were expected")
    view = memoryview(data)
    if (header := view[: _HEADER.size]) != (expected := address.header()):
        pairs = zip(_FIELDS, _HEADER.unpack(header), _HEADER.unpack(expected), strict=True)
        raise Broken(f"it has another {next(name for name, came, due in pairs if came != due)}")
    if not hmac.compare_digest(hmac.digest(key, view[:-_MAC], "sha256"), view[-_MAC:]):
        raise Broken("its MAC is not the sender's: it was changed on the way or made by another")
    return view[_HEADER.size : -_MAC]


def _short(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
