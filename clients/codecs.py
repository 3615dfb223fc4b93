"""Codecs: an update <-> the bytes that travel; the bytes counted anywhere are the bytes made here.

Legend: P is the number of entries of an update. All numbers are little-endian; a payload has no header, as its length
follows from the codec and P, which both sides know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from privacy.refused import Refused
from scenarios.weights import Vector

Payload = bytes

_BLOCK = 512
"""Entries that share one scale in qsgd8; the bucket of Alistarh et al. 2017, section 5."""
_LARGEST = float(np.finfo(np.float32).max)


class CodecError(ValueError):
    """An update that cannot be encoded, or bytes that are no update. The message says why."""


@dataclass(frozen=True)
class Codec:
    """One way to send an update."""

    name: str
    """As in the setting `codec`."""
    bytes: Callable[[int], int]
    """P -> the length of every payload for P entries."""
    pack: Callable[[Vector, int], Payload]
    """(finite vector (P,), seed) -> payload, unchecked: use `encode`."""
    unpack: Callable[[Payload, int], Vector]
    """(payload of the right length, P) -> vector (P,), not yet checked for finiteness: use `decode`."""
    feedback: bool = False
    """Whether what a payload leaves out is kept as the client's residual and sent later (error feedback)."""

    def encode(self, update: Vector, residual: Vector | None, seed: int) -> tuple[Payload, Vector | None]:
        """The payload for update (P,) float32 plus residual (P,) or None, and the next residual.

        What is decoded plus the next residual equals update + residual up to the codec's own rounding; exactly so with
        error feedback (Stich et al. 2018, Algorithm 1). Codecs without feedback give no residual. `seed` (>= 0) drives
        the rounding of qsgd8; equal arguments give equal bytes.
        Raises CodecError for an update that is not finite float32 (P,), or is too large for the codec.
        """
        for vector in (update, update if residual is None else residual):
            if vector.dtype != np.float32 or vector.ndim != 1 or len(vector) != len(update):
                raise CodecError(f"{self.name} encodes float32 (P,), not {vector.dtype} {vector.shape}")
        with np.errstate(over="ignore", invalid="ignore"):  # looked at in the next line
            whole = update if residual is None else update + residual
        _refuse_non_finite(whole, f"an update for {self.name}")
        payload = self.pack(whole, seed)
        return payload, whole - self.unpack(payload, len(whole)) if self.feedback else None

    def decode(self, payload: Payload, size: int) -> Vector:
        """The update of a payload, (size,) float32, finite and writable.

        `payload` may be anything: whatever `encode` cannot have made raises CodecError with the reason.
        """
        if len(payload) != self.bytes(size):
            raise CodecError(f"{self.name} of {size} entries takes {self.bytes(size)} bytes, {len(payload)} came")
        with np.errstate(over="ignore", invalid="ignore"):  # looked at in the next line
            update = self.unpack(payload, size)
        _refuse_non_finite(update, f"a {self.name} payload")
        return update


def float32() -> Codec:
    """The update as it is: 4 bytes an entry."""
    return Codec("float32", lambda size: 4 * size, lambda update, _: update.astype("<f4").tobytes(), _unpack_float32)


def float16() -> Codec:
    """Rounded to half precision: 2 bytes an entry, relative error at most 2^-11 (absolute 2^-25 below 2^-14)."""
    return Codec("float16", lambda size: 2 * size, _pack_float16, _unpack_float16)


def topk(share: float) -> Codec:
    """The ceil(share * P) entries of largest magnitude, the rest as residual (Stich et al. 2018, Definition 2.1).

    The payload is their indices (uint32, increasing), then their values (float32): 8 bytes an entry that is sent. Of
    equal magnitudes the lower index is sent. Raises Refused unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise Refused(f"codec topk:{share:g}: the share must be above 0 and at most 1, as in topk:0.05")

    def count(size: int) -> int:
        return ceil(share * size)

    def pack(update: Vector, _: int) -> Payload:
        indices = largest(np.abs(update), count(len(update)))
        return indices.astype("<u4").tobytes() + update[indices].astype("<f4").tobytes()

    def unpack(payload: Payload, size: int) -> Vector:
        indices = np.frombuffer(payload, "<u4", count(size)).astype(np.int64)
        if len(indices) and (indices[-1] >= size or (np.diff(indices) <= 0).any()):
            raise CodecError(f"the indices of a topk payload must increase and lie below {size}")
        update = np.zeros(size, np.float32)
        update[indices] = np.frombuffer(payload, "<f4", offset=4 * len(indices))
        return update

    return Codec(f"topk:{share:g}", lambda size: 8 * count(size), pack, unpack, feedback=True)


def qsgd8() -> Codec:
    """8 bits an entry, rounded at random without bias (Alistarh et al. 2017, section 3.1, with max-norm buckets).

    Each block of 512 entries has a scale, its largest magnitude / 127; an entry x becomes floor(x / scale + u) with u
    uniform in [0, 1), so that its expectation is x and its error below one scale. The payload is the scales (float32),
    then the entries (int8).
    """
    return Codec("qsgd8", lambda size: 4 * ceil(size / _BLOCK) + size, _pack_qsgd8, _unpack_qsgd8)


CODECS: dict[str, Callable[..., Codec]] = {"float32": float32, "float16": float16, "topk": topk, "qsgd8": qsgd8}


def resolve(name: str) -> Codec:
    """The codec of the setting `codec`: float32, float16, topk:SHARE or qsgd8. Raises Refused for any other."""
    kind, colon, argument = name.partition(":")
    if kind not in CODECS:
        raise Refused(
            f"there is no codec {name!r}: choose float32, float16, topk:SHARE (as in topk:0.05), shared-topk:SHARE, "
            "qsgd8 or intN (as in int16)"
        )
    if kind != "topk":
        if colon:
            raise Refused(f"codec {name!r}: {kind} takes no argument, write codec={kind}")
        return CODECS[kind]()
    try:
        share = float(argument)
    except ValueError:
        raise Refused(f"codec {name!r}: topk needs the share of entries to send, as in topk:0.05") from None
    return topk(share)


def _unpack_float32(payload: Payload, size: int) -> Vector:
    return np.frombuffer(payload, "<f4").astype(np.float32)


def _pack_float16(update: Vector, _: int) -> Payload:
    with np.errstate(over="ignore"):  # looked at in the next line
        halves = update.astype("<f2")
    if not np.isfinite(halves).all():
        raise CodecError(f"an entry of {np.abs(update).max():g} is beyond float16 (65504): use codec=float32")
    return halves.tobytes()


def _unpack_float16(payload: Payload, size: int) -> Vector:
    return np.frombuffer(payload, "<f2").astype(np.float32)


def largest(magnitudes: Vector, count: int) -> NDArray[np.int64]:
    """Indices, increasing, of the `count` largest; a partition alone may pick other ties on another processor."""
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(magnitudes, -count)[-count]
    above = np.flatnonzero(magnitudes > threshold)
    ties = np.flatnonzero(magnitudes == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, ties]))


def _pack_qsgd8(update: Vector, seed: int) -> Payload:
    size, blocks = len(update), ceil(len(update) / _BLOCK)
    padded = np.zeros((blocks, _BLOCK))
    padded.reshape(-1)[:size] = update
    exact = np.abs(padded).max(axis=1, initial=0.0) / 127
    scales: Vector = exact.astype("<f4")
    # a scale that float32 rounded down would push the largest entry beyond 127 and bias it
    scales = np.where(scales < exact, np.nextafter(scales, np.float32(np.inf)), scales)
    if (scales.astype(np.float64) * 127 > _LARGEST).any():
        raise CodecError(f"an entry of {np.abs(update).max():g} is beyond qsgd8's scales: use codec=float32")
    units = (padded / np.where(scales > 0, scales, 1.0)[:, None]).reshape(-1)[:size]
    levels = np.floor(units + np.random.default_rng(seed).random(size))
    levels = np.minimum(levels, 127)  # 127 + u is 128 in float64 for the last few u below 1
    return scales.astype("<f4").tobytes() + levels.astype(np.int8).tobytes()


def _unpack_qsgd8(payload: Payload, size: int) -> Vector:
    scales = np.frombuffer(payload, "<f4", ceil(size / _BLOCK)).astype(np.float32)
    levels = np.frombuffer(payload, np.int8, offset=scales.nbytes)
    if not (np.isfinite(scales).all() and (scales >= 0).all() and (levels > -128).all()):
        raise CodecError("a qsgd8 payload must hold finite scales of at least 0 and levels from -127 to 127")
    return levels.astype(np.float32) * np.repeat(scales, _BLOCK)[:size]


def _refuse_non_finite(vector: Vector, what: str) -> None:
    if not np.isfinite(vector).all():
        raise CodecError(f"{what} must be finite: {np.count_nonzero(~np.isfinite(vector))} of {vector.size} are not")
