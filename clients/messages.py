"""Task and Reply <-> Flower records, and the bytes of a key holder: with every key of them.

A task has one array, its weights, and may have more, its control variate and its coordinates, and the message of a
protocol that hides updates; a reply has its payload.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients import records
from clients.records import ARRAYS, FIELDS, FLAT, INDICES, PAYLOAD, PROTOCOL, REQUEST, WEIGHTS, ArrayRecord, RecordDict
from clients.task import Charge, Protection, Reply, Task
from privacy.noise_shares import Shares
from privacy.plan import Mechanism
from scenarios.weights import Layout, Vector

_CONTROL, _SHARED = "control", "coordinates"
TASK: dict[str, type] = {
    "kind": str,
    "round": int,
    "client": str,
    "rate": float,
    "steps": int,
    "state_round": int,
    "deadline": float,
    "clip": float,
    "update_clip": float,
    "update_noise": float,
    "share_multiplier": float,
    "share_honest": int,
    "largest": int,
    "sampling_rate": float,
    "noise_multiplier": float,
    "run": str,
    "attempt": int,
    "server_sequence": int,
    "server_digest": str,
    "node_sequence": int,
    "node_digest": str,
    "protected_run": str,
    "entries": int,
    "minimum": int,
    "names": list,
    "ranks": list,
    "dims": list,
}
REPLY: dict[str, type] = {
    "round": int,
    "client": str,
    "examples": int,
    "steps": int,
    "within": bool,
    "loss": float,
    "correct": int,
    "reason": str,
    "late": bool,
    "node_sequence": int,
    "node_digest": str,
}
_LARGEST_ANSWER = 1 << 20
"""Bytes of an answer that carries no update: a thousand clients' shares are a fifth of it."""
_SIGNED = {"loss"}
_NOISED = {"examples", "correct"}
"""What noise may take below 0, where the task asks for it."""


def encode_arrays(task: Task) -> ArrayRecord:
    """Weights and control variate, (P,) each, and coordinates (k,): a record that a round's tasks share, sent once."""
    named = {FLAT: task.weights} | ({} if task.control is None else {_CONTROL: task.control})
    flat = {name: np.ascontiguousarray(vector, "<f4").tobytes() for name, vector in named.items()}
    made = records.arrays(WEIGHTS, **flat)
    if (shared := task.coordinates) is not None:
        made.update(records.arrays(INDICES, **{_SHARED: np.ascontiguousarray(shared, "<u4").tobytes()}))
    return made


def encode_task(task: Task, arrays: ArrayRecord | None = None) -> RecordDict:
    """The message for `task`; `arrays` is `encode_arrays(task)` where several tasks share it."""
    record = RecordDict({FIELDS: records.config(task_fields(task), TASK), ARRAYS: arrays or encode_arrays(task)})
    if task.protection:
        record[REQUEST] = records.arrays(PROTOCOL, flat=task.protection.request)
    return record


def task_fields(task: Task) -> dict[str, Any]:
    """The fields of a task, those of TASK."""
    mechanism = task.mechanism or Mechanism(sampling_rate=0.0, noise_multiplier=0.0)
    return {
        **{name: getattr(task, name) for name in TASK if hasattr(task, name)},
        "sampling_rate": mechanism.sampling_rate,
        "noise_multiplier": mechanism.noise_multiplier,
        "share_multiplier": task.shares.multiplier if task.shares else 0.0,
        "share_honest": task.shares.honest if task.shares else 0,
        "run": task.charge.run if task.charge else "",
        "attempt": task.charge.attempt if task.charge else 0,
        **records.written("server", task.charge.head if task.charge else None),
        **records.written("node", task.charge.known if task.charge else None),
        "protected_run": task.protection.run if task.protection else "",
        "entries": task.protection.entries if task.protection else 0,
        "minimum": task.protection.minimum if task.protection else 0,
        "names": [name for name, _ in task.layout],
        "ranks": [len(shape) for _, shape in task.layout],
        "dims": [size for _, shape in task.layout for size in shape],
    }


def decode_task(record: RecordDict) -> Task:
    """The task in `record`."""
    fields = records.fields(record, TASK, {FIELDS, ARRAYS} | ({REQUEST} if REQUEST in record else set()))
    request = records.data(record, PROTOCOL, REQUEST) if REQUEST in record else None
    return task_of(fields, decode_arrays(record, fields), request)


@dataclass(frozen=True)
class Arrays:
    """What of a task is large, and its layout; the tasks of a round share them."""

    layout: Layout
    weights: Vector
    control: Vector | None
    coordinates: NDArray[np.uint32] | None


def decode_arrays(record: RecordDict, fields: Mapping[str, Any]) -> Arrays:
    """The arrays in `record`, as the task of these fields may have them."""
    if fields["kind"] not in ("train", "evaluate", "protect"):
        raise ValueError(f"a task of unknown kind {records.shown(fields['kind'])!r}")
    layout = _layout(fields)
    size = sum(math.prod(shape) for _, shape in layout)
    arrays = record[ARRAYS]
    more = fields["kind"] == "train" and isinstance(arrays, ArrayRecord)
    names = {FLAT} | ({_CONTROL, _SHARED} & set(arrays) if more else set())
    floats = names - {_SHARED}
    read = {name: records.data(record, WEIGHTS, name=name, among=names, entries=size) for name in floats}
    vectors = {name: np.frombuffer(data, "<f4").astype(np.float32) for name, data in read.items()}
    if not all(np.isfinite(vector).all() for vector in vectors.values()):
        raise ValueError("the weights of the task, or its control variate, are not finite")
    shared = _coordinates(record, size, names) if _SHARED in names else None
    return Arrays(layout, vectors[FLAT], vectors.get(_CONTROL), shared)


def task_of(fields: Mapping[str, Any], arrays: Arrays, request: bytes | None) -> Task:
    """The task of these fields; request: the protocol's message, if it has one."""
    return Task(
        kind=fields["kind"],
        round=fields["round"],
        client=records.name(fields["client"]),
        weights=arrays.weights,
        layout=arrays.layout,
        rate=fields["rate"],
        steps=fields["steps"],
        control=arrays.control,
        coordinates=arrays.coordinates,
        state_round=fields["state_round"],
        deadline=fields["deadline"],
        mechanism=_mechanism(fields),
        clip=fields["clip"],
        update_clip=fields["update_clip"],
        update_noise=fields["update_noise"],
        shares=_shares(fields),
        largest=fields["largest"],
        charge=_charge(fields),
        protection=_protection(fields, request),
    )


def encode_reply(reply: Reply) -> RecordDict:
    """The message for `reply`."""
    fields = {name: getattr(reply, name) for name in REPLY if hasattr(reply, name)}
    fields |= {**records.written("node", reply.head), "reason": records.shown(reply.reason)}
    return RecordDict({FIELDS: records.config(fields, REPLY), ARRAYS: records.arrays(PAYLOAD, flat=reply.payload)})


def decode_reply(record: RecordDict, task: Task) -> Reply:
    """The answer to `task` in `record`; a reason in it is made printable and cut to 200 characters.

    A payload may hold 16 bytes a weight and 64 KiB more, several times what any codec needs.
    """
    fields = records.fields(record, REPLY, {FIELDS, ARRAYS}, signed(task))
    return reply_of(fields, task, lambda: records.data(record, PAYLOAD))


def signed(task: Task) -> Collection[str]:
    """The fields of an answer to `task` that may be below 0."""
    return _SIGNED | _NOISED if task.kind == "evaluate" and task.mechanism is not None else _SIGNED


def reply_of(fields: Mapping[str, Any], task: Task, carried: Callable[[], bytes]) -> Reply:
    """The answer to `task` of these fields; carried: its payload, which is looked at if it says that it is good."""
    if fields["reason"]:
        return Reply(task.round, task.client, reason=records.shown(fields["reason"]), late=fields["late"])
    if (fields["round"], fields["client"]) != (task.round, task.client):
        raise ValueError(f"answered for round {fields['round']} of {records.shown(fields['client'])!r}")
    payload = carried()
    if len(payload) > max(16 * len(task.weights) + 65536, _LARGEST_ANSWER if task.kind == "protect" else 0):
        raise ValueError(f"a payload of {len(payload)} bytes for {len(task.weights)} weights")
    head = records.head(fields, "node")
    return Reply(payload=payload, head=head, **{name: fields[name] for name in fields if not name.startswith("node_")})


def encode_bytes(said: bytes) -> RecordDict:
    """The message of what a server and a key holder say to each other (privacy/holder.py)."""
    return RecordDict({REQUEST: records.arrays(PROTOCOL, flat=said)})


def decode_bytes(record: RecordDict) -> bytes:
    """The reverse of `encode_bytes`."""
    if set(record) != {REQUEST}:
        raise ValueError("a message with other records than expected")
    return records.data(record, PROTOCOL, REQUEST)


def _coordinates(record: RecordDict, size: int, named: Collection[str]) -> NDArray[np.uint32]:
    """At most `size` of them; which there may be is for clients/coordinates.py."""
    found = np.frombuffer(records.data(record, INDICES, name=_SHARED, among=named), "<u4").astype(np.uint32)
    if len(found) > size:
        raise ValueError(f"a task that names {len(found)} coordinates of {size} weights")
    return found


def _layout(fields: Mapping[str, Any]) -> Layout:
    names, ranks, dims = fields["names"], fields["ranks"], fields["dims"]
    if not all(type(name) is str and name for name in names) or len(set(names)) != len(names):
        raise ValueError("a layout whose names are not distinct texts")
    if not all(type(number) is int and 0 <= number < 2**40 for number in [*ranks, *dims]):
        raise ValueError("a layout whose shapes are not whole numbers")
    if len(ranks) != len(names) or sum(ranks) != len(dims):
        raise ValueError("a layout whose shapes do not fit its names")
    ends = np.cumsum(ranks, dtype=np.int64).tolist() if ranks else []
    return tuple((name, tuple(dims[end - rank : end])) for name, rank, end in zip(names, ranks, ends, strict=True))


def _mechanism(fields: Mapping[str, Any]) -> Mechanism | None:
    rate, noise = fields["sampling_rate"], fields["noise_multiplier"]
    if rate == noise == 0:
        return None
    if not 0 < rate <= 1 or noise == 0:
        raise ValueError(f"a mechanism with sampling rate {rate} and noise multiplier {noise}")
    return Mechanism(sampling_rate=rate, noise_multiplier=noise)


def _shares(fields: Mapping[str, Any]) -> Shares | None:
    multiplier, honest = fields["share_multiplier"], fields["share_honest"]
    if multiplier == honest == 0:
        return None
    if not multiplier or not honest:
        raise ValueError(f"a noise share of {honest} honest clients with noise multiplier {multiplier}")
    return Shares(multiplier, honest)


def _charge(fields: Mapping[str, Any]) -> Charge | None:
    head, known = records.head(fields, "server"), records.head(fields, "node")
    if not fields["run"] and not fields["attempt"] and head is None and known is None:
        return None
    if head is None or not fields["attempt"]:
        raise ValueError("a task that names a run of the ledger, but not its attempt or the ledger's head")
    return Charge(records.name(fields["run"]), fields["attempt"], head, known)


def _protection(fields: Mapping[str, Any], request: bytes | None) -> Protection | None:
    if request is None:
        if fields["protected_run"] or fields["entries"] or fields["minimum"]:
            raise ValueError("a task that is to be protected, without the protocol's message")
        return None
    return Protection(records.name(fields["protected_run"]), fields["entries"], fields["minimum"], request)
