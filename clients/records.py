"""Flower records: typed fields and flat arrays in them, checked; the only door of clients to Flower's records.

What arrives is hostile until it is checked. A message is one ConfigRecord of scalars and ArrayRecords of flat arrays.
Every reader raises ValueError with the reason when keys, types, sizes or ranges are not exactly the expected ones.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from privacy.chain import Head

__all__ = ["ArrayRecord", "RecordDict"]

FIELDS, ARRAYS, REQUEST, FLAT = "umbel", "arrays", "request", "flat"
_LONGEST = 200
"""Characters of a name, a digest or a reason."""


@dataclass(frozen=True)
class Kind:
    """What an array is: the type of its entries, and who reads it."""

    dtype: str
    width: int
    stype: str


WEIGHTS = Kind("float32", 4, "umbel.float32.v1")
"""Little-endian float32, without a header."""
INDICES = Kind("uint32", 4, "umbel.uint32.v1")
"""Likewise, of uint32."""
SUM = Kind("float64", 8, "umbel.float64.v1")
"""Likewise, of float64: a sum of updates."""
PAYLOAD = Kind("uint8", 1, "umbel.payload.v1")
"""What a codec wrote; read by that codec alone."""
PROTOCOL = Kind("uint8", 1, "umbel.protocol.v1")
"""What hides updates said; read by it alone."""


def config(fields: Mapping[str, Any], kinds: Mapping[str, type]) -> ConfigRecord:
    """The fields of `kinds`, each as its kind: the caller's may be numpy scalars, or ints in a float's place."""
    return ConfigRecord({name: kind(fields[name]) for name, kind in kinds.items()})


def arrays(kind: Kind, **named: bytes) -> ArrayRecord:
    """Flat arrays of one kind, by name."""
    return ArrayRecord(
        {
            name: Array(dtype=kind.dtype, shape=(len(data) // kind.width,), stype=kind.stype, data=data)
            for name, data in named.items()
        }
    )


def fields(
    record: RecordDict, kinds: Mapping[str, type], records: set[str], signed: Collection[str] = ()
) -> dict[str, Any]:
    """The fields of a message of exactly these records. signed: fields that may be below 0."""
    config = _config(record, kinds, records)
    for name, kind in kinds.items():
        _check(name, config[name], kind, name in signed)
    return dict(config)


def table(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, type], by: str) -> ConfigRecord:
    """The fields of many: what all have alike stands there once, as lists always do, anything else as a column.

    by: the field that is a column always, so that it can be seen how many there are.
    """
    made = ConfigRecord()
    for name, kind in kinds.items():
        column = [kind(row[name]) for row in rows]
        alike = kind is list or (name != by and all(value == column[0] for value in column))
        made[name] = column[0] if alike else column
    return made


def rows(
    record: RecordDict, kinds: Mapping[str, type], records: set[str], by: str, signed: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The reverse of `table`: the fields of each, checked as those of `fields` are."""
    config, read = _config(record, kinds, records), dict[str, list[Any]]()
    named = config[by]
    count = len(named) if isinstance(named, list) else 0
    if not count:
        raise ValueError(f"a message that names no {by}")
    for name, kind in kinds.items():
        value = config[name]
        column = value if type(value) is list and kind is not list else [value]
        if len(column) != count and column is value:
            raise ValueError(f"{name} has {len(column)} entries, there are {count} clients")
        for entry in column:
            _check(name, entry, kind, name in signed)
        read[name] = column if column is value else column * count
    return [dict(zip(read, row, strict=True)) for row in zip(*read.values(), strict=True)]


def _config(record: RecordDict, kinds: Mapping[str, type], records: set[str]) -> ConfigRecord:
    if set(record) != records:
        raise ValueError(f"a message with the records {shown(', '.join(sorted(map(str, record))))!r}")
    config = record[FIELDS]
    if not isinstance(config, ConfigRecord) or set(config) != set(kinds):
        raise ValueError("a message with other fields than expected: do both sides run the same version of Umbel?")
    return config


def _check(name: str, value: Any, kind: type, signed: bool) -> None:
    if type(value) is not kind:
        raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}")
    least = -(2**53) if signed else 0
    if isinstance(value, int | float) and not (least <= value <= 2**53):
        raise ValueError(f"{name} is out of range: {value}")


def data(
    record: RecordDict,
    kind: Kind,
    where: str = ARRAYS,
    name: str = FLAT,
    among: Collection[str] = frozenset({FLAT}),
    entries: int | None = None,
) -> bytes:
    """The bytes of array `name` in record `where`; `among`: all that must be there; `entries`: how many, if known."""
    arrays = record[where]
    if not isinstance(arrays, ArrayRecord) or set(arrays) != set(among):
        raise ValueError("a message with other arrays than expected")
    array = arrays[name]
    if (array.dtype, array.stype) != (kind.dtype, kind.stype):
        said = shown(f"{array.dtype} as {array.stype}")
        raise ValueError(f"an array of {said!r}, not {kind.dtype} as {kind.stype!r}")
    if not isinstance(array.data, bytes) or len(array.data) % kind.width:
        raise ValueError("an array whose data is no whole number of entries")
    came = len(array.data) // kind.width
    if tuple(array.shape) != (came,) or came != (came if entries is None else entries):
        raise ValueError(f"an array of shape {shown(str(array.shape))} with {came} entries, expected {entries}")
    return array.data


def written(whose: str, head: Head | None) -> dict[str, Any]:
    """The fields for the head of a ledger."""
    sequence, digest = head or Head(0, "")
    return {f"{whose}_sequence": sequence, f"{whose}_digest": digest}


def head(fields: Mapping[str, Any], whose: str) -> Head | None:
    """The head of a ledger that is written in `fields`; no digest: none."""
    said = Head(fields[f"{whose}_sequence"], fields[f"{whose}_digest"])
    if said == Head(0, ""):
        return None
    if not re.fullmatch("[0-9a-f]{64}", said.digest):
        raise ValueError(f"{shown(said.digest)!r} is no digest of a ledger")
    return said


def name(text: str) -> str:
    """`text`, which must be a name: printable, not long, not empty."""
    if not text or text != shown(text):
        raise ValueError(f"{shown(text)!r} is no name: 1 to {_LONGEST} printable characters are one")
    return text


def shown(text: str) -> str:
    """`text` as it may stand in a terminal or a log: printable, not long."""
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST])
