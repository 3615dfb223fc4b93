"""Frames: the bytes of every message of a masked sum, of fixed lengths, hostile ones refused before they are read.

A frame is a header of 141 bytes (version, run, round, attempt, view, stage, sender), a body whose length follows from
what both sides know already, and from a client an Ed25519 signature over both. Clients stand in a body by their number
in the sorted roster: sets are bit strings, tables have a slot for each neighbour, empty ones are zeros. A message
therefore has the same size whoever sends it and whoever has dropped out.
"""

import hashlib
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privacy.neighbours import TENTH, THIRD, THOUSANDTH

NAME = 64
SIGNATURE = 64
_VERSION = b"UMK1"
_ATTEMPT = struct.Struct(">4s32sII32s")
HEADER = _ATTEMPT.size + 1 + NAME


class Stage(IntEnum):
    """What the server asks for, in this order; REVEAL only where a graph has to be drawn."""

    ADVERTISE = 0
    REVEAL = 1
    SHARE = 2
    MASK = 3
    SIGN = 4
    UNMASK = 5


@dataclass(frozen=True)
class Rules:
    """What server and clients have settled beforehand. Messages under other rules are those of another run."""

    entries: int  # integers in a vector
    width: int  # bits of an integer: sums are modulo 2^width
    minimum: int  # survivors below which nobody unmasks
    dropout: Fraction = THIRD
    failure: Fraction = THOUSANDTH
    colluding: Fraction = TENTH  # with the server; no more neighbours for it up to 1000 clients

    def __post_init__(self) -> None:
        if self.entries < 1 or not 1 <= self.width <= 64 or self.minimum < 2:
            raise ValueError(f"{self}: entries from 1, a width of 1 to 64 bits and a minimum from 2 on are possible")


@dataclass(frozen=True)
class Attempt:
    """One try at one round's sum: what every key, signature and commitment is bound to."""

    run: bytes  # 32 bytes, as `run_id` makes them
    round: int
    number: int
    view: bytes = bytes(32)  # the hash of what all clients are to have seen alike: who saw another model adds nothing

    @classmethod
    def of(cls, data: bytes) -> "Attempt":
        """The attempt whose bytes these are."""
        _, run, number, attempt, view = _ATTEMPT.unpack(data)
        return cls(run, number, attempt, view)

    def __bytes__(self) -> bytes:
        return _ATTEMPT.pack(_VERSION, self.run, self.round, self.number, self.view)

    def __str__(self) -> str:
        return f"attempt {self.number} of round {self.round}"


def run_id(run: str, rules: Rules) -> bytes:
    """The 32 bytes that stand for a run under its rules."""
    fields = (rules.entries, rules.width, rules.minimum, rules.dropout, rules.failure, rules.colluding)
    return hashlib.sha256(" ".join(("umbel masks", *map(str, fields), run)).encode()).digest()


def padded(name: str) -> bytes:
    """A client's name as 64 bytes. Raises ValueError for one that does not fit."""
    encoded = name.encode()
    if not 1 <= len(encoded) <= NAME or b"\0" in encoded:
        raise ValueError(f"the name {name[:NAME]!r}: 1 to {NAME} bytes without a zero can take part")
    return encoded.ljust(NAME, b"\0")


def statement(purpose: str, attempt: Attempt, *parts: bytes) -> bytes:
    """What is signed, hashed or derived from, for one purpose only. The parts have lengths that the purpose fixes."""
    return b"umbel masks: " + purpose.encode().ljust(32, b"\0") + bytes(attempt) + b"".join(parts)


def commit(purpose: str, attempt: Attempt, *parts: bytes) -> bytes:
    """The hash of a statement: binding, and hiding where a part is a secret of 32 random bytes."""
    return hashlib.sha256(statement(purpose, attempt, *parts)).digest()


def verified(identity: bytes, signature: bytes, content: bytes) -> bool:
    """Whether the owner of this Ed25519 key has signed this."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def header(attempt: Attempt, stage: Stage, sender: str = "") -> bytes:
    """The first bytes of a frame; the server has no name."""
    return bytes(attempt) + bytes([stage]) + (padded(sender) if sender else bytes(NAME))


def write(
    attempt: Attempt, stage: Stage, body: bytes, sender: str = "", identity: Ed25519PrivateKey | None = None
) -> bytes:
    """A frame; signed where an identity is given."""
    frame = header(attempt, stage, sender) + body
    return frame + identity.sign(frame) if identity else frame


def addressed(data: bytes, run: bytes) -> tuple[Attempt, Stage]:
    """What a request of the server is about; its body is yet unread."""
    if len(data) < HEADER:
        raise ValueError(f"a message of {len(data)} bytes: shorter than a header")
    version, of, number, attempt, view = _ATTEMPT.unpack_from(data)
    if version != _VERSION:
        raise ValueError("another version of the protocol")
    if of != run:
        raise ValueError("of another run, or under other rules")
    if data[_ATTEMPT.size] not in list(Stage):
        raise ValueError(f"no stage {data[_ATTEMPT.size]}")
    if any(data[_ATTEMPT.size + 1 : HEADER]):
        raise ValueError("a client's message, not the server's")
    return Attempt(of, number, attempt, view), Stage(data[_ATTEMPT.size])


def read(data: bytes, attempt: Attempt, stage: Stage, sender: str, identity: bytes, size: int) -> bytes:
    """The body, of `size` bytes, of a frame that a client signed for this stage; else ValueError says why not."""
    if len(data) != HEADER + size + SIGNATURE:
        raise ValueError(f"{HEADER + size + SIGNATURE} bytes are due at {stage.name.lower()}, {len(data)} came")
    if data[:HEADER] != header(attempt, stage, sender):
        raise ValueError(f"not its answer at {stage.name.lower()} in {attempt}")
    if not verified(identity, data[-SIGNATURE:], data[:-SIGNATURE]):
        raise ValueError("not signed by its identity key")
    return data[HEADER:-SIGNATURE]


def parts(body: bytes, *sizes: int) -> list[bytes]:
    """A body cut into pieces of these sizes, which must be all of it."""
    if len(body) != sum(sizes):
        raise ValueError(f"a body of {sum(sizes)} bytes is due, {len(body)} came")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [body[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def slots(table: bytes, size: int) -> list[bytes]:
    """The rows of a table, each of `size` bytes."""
    return [table[start : start + size] for start in range(0, len(table), size)]


def bits(numbers: Collection[int], clients: int) -> bytes:
    """A set of clients as a bit string, client i in bit i."""
    return sum(1 << i for i in numbers).to_bytes(bits_size(clients), "little")


def bits_size(clients: int) -> int:
    """Bytes of a set of clients."""
    return (clients + 7) // 8


def numbers(data: bytes, clients: int) -> frozenset[int]:
    """The set in a bit string. Raises ValueError for bits beyond the last client."""
    value = int.from_bytes(data, "little")
    if value >> clients:
        raise ValueError(f"bits beyond the last of {clients} clients")
    return frozenset(i for i in range(clients) if value >> i & 1)


def table(rows: Sequence[bytes | None], size: int) -> bytes:
    """Rows of `size` bytes, one after the other, zeros for None."""
    return b"".join(bytes(size) if row is None else row for row in rows)
