"""Blocks <-> Flower records: the tasks of many clients in one message, and what a worker made of them; with every key.

A message has the arrays that a round's tasks share once, and of each block the fields: once what its clients have
alike, a column of the rest. The answer has of each block either every client's own payload or, where the server wants
a mean of floats, the block's sum. Each block is read by itself, so that garbage in one costs its own clients alone.

Legend: P is the number of weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np

from clients import messages, records, upload
from clients.answers import Weigh
from clients.records import ARRAYS, FIELDS, FLAT, PAYLOAD, PROTOCOL, REQUEST, SUM, ArrayRecord, RecordDict
from clients.task import Reply, Summand, Task, Way
from scenarios.settings import Local, Settings

Block = Sequence[Task]

_BY, _TOTAL = "client", "total"
_TASK = messages.TASK | {"bytes": int}
"""bytes: of the protocol's own message to this client."""
_REPLY = {name: kind for name, kind in messages.REPLY.items() if not name.startswith("node_")} | {
    "bytes": int,
    "summed": bool,
    "way": str,
    "why": str,
    "precision": str,
}
"""bytes: of the client's payload. summed: in its place, the update is in the block's sum. way, why and precision: how
it was trained (clients/ways.py), empty where it was not.
"""
_WAYS, _PRECISIONS = get_args(get_type_hints(Way)["name"]), get_args(get_type_hints(Local)["precision"])
_LINES = 1000
_SAID = {"reason": str, "deaths": list}


def encode_tasks(blocks: Sequence[Block], arrays: ArrayRecord) -> RecordDict:
    """The message of these blocks, whose tasks share `arrays` (`messages.encode_arrays`)."""
    made = RecordDict({ARRAYS: arrays})
    for i, block in enumerate(blocks):
        requests = [task.protection.request if task.protection else b"" for task in block]
        rows = [
            messages.task_fields(task) | {"bytes": len(request)} for task, request in zip(block, requests, strict=True)
        ]
        made[_of(FIELDS, i)] = records.table(rows, _TASK, _BY)
        if any(task.protection for task in block):
            made[_of(REQUEST, i)] = records.arrays(PROTOCOL, flat=b"".join(requests))
    return made


def decode_tasks(record: RecordDict) -> list[list[Task]]:
    """The blocks in `record`. Raises ValueError for a message that is none."""
    count = sum(name.startswith(FIELDS) for name in record)
    hidden = [i for i in range(count) if _of(REQUEST, i) in record]
    if set(record) != {ARRAYS, *(_of(FIELDS, i) for i in range(count)), *(_of(REQUEST, i) for i in hidden)}:
        raise ValueError("a message with other records than expected")
    blocks, shared, common = list[list[Task]](), None, {}
    for i in range(count):
        one = RecordDict({FIELDS: record[_of(FIELDS, i)]})
        rows = records.rows(one, _TASK, {FIELDS}, _BY)
        alike = {name: rows[0][name] for name in ("kind", "round", "names", "ranks", "dims")}
        if shared is None:
            shared, common = messages.decode_arrays(record, rows[0]), alike
        if any({name: row[name] for name in common} != common for row in rows):
            raise ValueError("a message with tasks of several kinds, rounds or layouts")
        requests = _pieces(records.data(record, PROTOCOL, _of(REQUEST, i)) if i in hidden else b"", rows)
        blocks.append(
            [
                messages.task_of(row, shared, request if i in hidden else None)
                for row, request in zip(rows, requests, strict=True)
            ]
        )
    return blocks


def encode_replies(blocks: Iterable[Sequence[Reply]], deaths: Sequence[str]) -> RecordDict:
    """The message of a worker's replies, each block read before the next is asked for.

    deaths: what it has to say, once all are there, of processes of its own that died at them.
    """
    made = RecordDict()
    for i, replies in enumerate(blocks):
        rows = [
            {name: getattr(reply, name) for name in messages.REPLY if hasattr(reply, name)}
            | {"reason": records.shown(reply.reason), "bytes": len(reply.payload), "summed": reply.summand is not None}
            | _told(reply.way)
            for reply in replies
        ]
        made[_of(FIELDS, i)] = records.table(rows, _REPLY, _BY)
        arrays = records.arrays(PAYLOAD, flat=b"".join(reply.payload for reply in replies))
        for reply in replies:
            if reply.summand is not None and reply.summand.total is not None:
                total = np.ascontiguousarray(reply.summand.total, "<f8").tobytes()
                arrays.update(records.arrays(SUM, **{_TOTAL: total}))
        made[_of(ARRAYS, i)] = arrays
    made[FIELDS] = records.config({"reason": "", "deaths": [*map(records.shown, deaths)]}, _SAID)
    return made


def encode_refusal(reason: str) -> RecordDict:
    """The message of a node that does no block, for `reason`."""
    said = {"reason": records.shown(reason) or "unknown", "deaths": []}
    return RecordDict({FIELDS: records.config(said, _SAID)})


def decode_said(record: RecordDict) -> list[str]:
    """What a worker says of processes of its own that died; raises ValueError with the reason why it has no answer."""
    if FIELDS not in record:
        raise ValueError("a message with other records than expected")
    said = records.fields(RecordDict({FIELDS: record[FIELDS]}), _SAID, {FIELDS})
    if said["reason"]:
        raise ValueError(records.shown(said["reason"]))
    if len(said["deaths"]) > _LINES or not all(type(line) is str for line in said["deaths"]):
        raise ValueError("deaths are no lines of text, or too many")
    return [records.shown(line) for line in said["deaths"]]


def decode_replies(record: RecordDict, i: int, block: Block, weigh: Weigh | None, settings: Settings) -> list[Reply]:
    """The replies to `block`, the i-th of its message; what they weigh is reckoned here. Raises ValueError for garbage.

    weigh: as the server sums them; None: it looks at single updates.
    """
    if not {_of(FIELDS, i), _of(ARRAYS, i)} <= set(record):
        raise ValueError("an answer without this block")
    one = RecordDict({FIELDS: record[_of(FIELDS, i)], ARRAYS: record[_of(ARRAYS, i)]})
    rows, size = records.rows(one, _REPLY, {FIELDS, ARRAYS}, _BY, messages.signed(block[0])), len(block[0].weights)
    if len(rows) != len(block):
        raise ValueError(f"an answer of {len(rows)} clients, {len(block)} were asked")
    held = [at for at, row in enumerate(rows) if row["summed"]]
    if held and (weigh is None or block[0].kind != "train"):
        raise ValueError("a sum where single answers were asked for")
    among = {FLAT, _TOTAL} if held else {FLAT}
    payloads = _pieces(records.data(one, PAYLOAD, among=among), rows)
    replies = [_reply(row, task, data) for row, task, data in zip(rows, block, payloads, strict=True)]
    if not held:
        return replies
    assert weigh is not None
    total = np.frombuffer(records.data(one, SUM, name=_TOTAL, among=among, entries=size), "<f8").astype(np.float64)
    if not np.isfinite(total).all():
        raise ValueError("a sum of updates that is not finite")
    whole = 0.0
    for at in held:
        if replies[at].reason or replies[at].late or payloads[at]:
            raise ValueError("an update that is in the sum and is not")
        whole += (weight := weigh(replies[at].examples))
        replies[at] = replace(replies[at], summand=Summand(upload.size(settings, size), weight))
    if float(np.abs(total).max(initial=0.0)) > whole * float(np.finfo(np.float32).max):
        raise ValueError("a sum of updates larger than updates are")
    last = replies[held[-1]].summand
    assert last is not None
    replies[held[-1]] = replace(replies[held[-1]], summand=replace(last, total=total, whole=whole))
    return replies


def _reply(row: dict[str, Any], task: Task, payload: bytes) -> Reply:
    fields = {name: value for name, value in row.items() if name in messages.REPLY}
    return replace(messages.reply_of(fields | records.written("node", None), task, lambda: payload), way=_way(row))


def _told(way: Way | None) -> dict[str, str]:
    if way is None:
        return {"way": "", "why": "", "precision": ""}
    return {"way": way.name, "why": way.why, "precision": way.precision}


def _way(row: dict[str, Any]) -> Way | None:
    if not row["way"]:
        return None
    if row["way"] not in _WAYS or row["precision"] not in _PRECISIONS:
        raise ValueError(f"trained in no known way: {records.shown(row['way'])!r}, {records.shown(row['precision'])!r}")
    return Way(row["way"], records.shown(row["why"]), row["precision"])


def _pieces(data: bytes, rows: Sequence[dict[str, Any]]) -> list[bytes]:
    """`data` cut into what belongs to each row, of its `bytes`."""
    ends = np.cumsum([row["bytes"] for row in rows], dtype=object).tolist()
    if ends[-1] != len(data):
        raise ValueError(f"{len(data)} bytes for pieces of {ends[-1]}")
    return [data[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _of(name: str, i: int) -> str:
    return f"{name}.{i}"
