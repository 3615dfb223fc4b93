"""Task, Reply and Hello <-> Flower records: the only file that knows record keys.

What arrives is hostile until it is checked. A message is one ConfigRecord of scalars and, for tasks and
replies, one ArrayRecord with one flat array; a task may have more, its control variate and its coordinates.
Every decoder raises ValueError with the reason when keys, types, sizes or ranges are not exactly the expected ones.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from clients.task import Charge, Device, Hello, KeyNode, Protection, Reply, Task
from privacy.chain import Head
from privacy.noise_shares import Shares
from privacy.plan import Mechanism
from scenarios.weights import Layout

_FIELDS, _ARRAYS, _FLAT, _CONTROL, _SHARED = "umbel", "arrays", "flat", "control", "coordinates"
_WEIGHTS = "umbel.float32.v1"  # little-endian float32, without a header
_INDICES = "umbel.uint32.v1"  # likewise, of uint32
_PAYLOAD = "umbel.payload.v1"  # what a codec wrote; read by that codec alone
_REQUEST = "request"
_PROTOCOL = "umbel.protocol.v1"  # what hides updates said; read by it alone

_TASK: dict[str, type] = {
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
_REPLY: dict[str, type] = {
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
_HELLO: dict[str, type] = {
    "name": str,
    "examples": int,
    "digest": str,
    "speed": float,
    "down": float,
    "up": float,
    "memory": int,
    "availability": float,
    "node_sequence": int,
    "node_digest": str,
    "server_sequence": int,
    "server_digest": str,
    "identity": str,
    "recipient": str,
    "keyholder": str,
    "nodes": int,
    "reason": str,
}
_LARGEST_ANSWER = 1 << 20
"""Bytes of an answer that carries no update: a thousand clients' shares are a fifth of it."""
_LONGEST = 200
"""Characters of a name, a digest or a reason."""
_SIGNED = {"loss"}
_NOISED = {"examples", "correct"}
"""What noise may take below 0, where the task asks for it."""


def encode_arrays(task: Task) -> ArrayRecord:
    """Weights and control variate, (P,) each, and coordinates (k,): a record that a round's tasks share, sent once."""
    named = {_FLAT: task.weights} | ({} if task.control is None else {_CONTROL: task.control})
    arrays = {
        name: _array(np.ascontiguousarray(vector, "<f4").tobytes(), "float32", len(vector), _WEIGHTS)
        for name, vector in named.items()
    }
    if (shared := task.coordinates) is not None:
        arrays[_SHARED] = _array(np.ascontiguousarray(shared, "<u4").tobytes(), "uint32", len(shared), _INDICES)
    return ArrayRecord(arrays)


def encode_task(task: Task, arrays: ArrayRecord | None = None) -> RecordDict:
    """The message for `task`; `arrays` is `encode_arrays(task)` where several tasks share it."""
    mechanism = task.mechanism or Mechanism(sampling_rate=0.0, noise_multiplier=0.0)
    fields: dict[str, Any] = {
        **{name: getattr(task, name) for name in _TASK if hasattr(task, name)},
        "sampling_rate": mechanism.sampling_rate,
        "noise_multiplier": mechanism.noise_multiplier,
        "share_multiplier": task.shares.multiplier if task.shares else 0.0,
        "share_honest": task.shares.honest if task.shares else 0,
        "run": task.charge.run if task.charge else "",
        "attempt": task.charge.attempt if task.charge else 0,
        **_written("server", task.charge.head if task.charge else None),
        **_written("node", task.charge.known if task.charge else None),
        "protected_run": task.protection.run if task.protection else "",
        "entries": task.protection.entries if task.protection else 0,
        "minimum": task.protection.minimum if task.protection else 0,
        "names": [name for name, _ in task.layout],
        "ranks": [len(shape) for _, shape in task.layout],
        "dims": [size for _, shape in task.layout for size in shape],
    }
    record = RecordDict({_FIELDS: _config(fields, _TASK), _ARRAYS: arrays or encode_arrays(task)})
    if task.protection:
        request = task.protection.request
        record[_REQUEST] = ArrayRecord({_FLAT: _array(request, "uint8", len(request), _PROTOCOL)})
    return record


def decode_task(record: RecordDict) -> Task:
    """The task in `record`."""
    fields = _fields(record, _TASK, {_FIELDS, _ARRAYS} | ({_REQUEST} if _REQUEST in record else set()))
    if fields["kind"] not in ("train", "evaluate", "protect"):
        raise ValueError(f"a task of unknown kind {_shown(fields['kind'])!r}")
    layout = _layout(fields)
    size = sum(math.prod(shape) for _, shape in layout)
    arrays = record[_ARRAYS]
    more = fields["kind"] == "train" and isinstance(arrays, ArrayRecord)
    named = {_FLAT} | ({_CONTROL, _SHARED} & set(arrays) if more else set())
    vectors = {
        name: np.frombuffer(_data(record, "float32", size, _WEIGHTS, 4, name, named), "<f4").astype(np.float32)
        for name in named - {_SHARED}
    }
    if not all(np.isfinite(vector).all() for vector in vectors.values()):
        raise ValueError("the weights of the task, or its control variate, are not finite")
    return Task(
        kind=fields["kind"],
        round=fields["round"],
        client=_name(fields["client"]),
        weights=vectors[_FLAT],
        layout=layout,
        rate=fields["rate"],
        steps=fields["steps"],
        control=vectors.get(_CONTROL),
        coordinates=_coordinates(record, size, named) if _SHARED in named else None,
        state_round=fields["state_round"],
        deadline=fields["deadline"],
        mechanism=_mechanism(fields),
        clip=fields["clip"],
        update_clip=fields["update_clip"],
        update_noise=fields["update_noise"],
        shares=_shares(fields),
        largest=fields["largest"],
        charge=_charge(fields),
        protection=_protection(record, fields),
    )


def encode_reply(reply: Reply) -> RecordDict:
    """The message for `reply`."""
    fields = {name: getattr(reply, name) for name in _REPLY if hasattr(reply, name)} | _written("node", reply.head)
    fields["reason"] = _shown(reply.reason)
    array = _array(reply.payload, "uint8", len(reply.payload), _PAYLOAD)
    return RecordDict({_FIELDS: _config(fields, _REPLY), _ARRAYS: ArrayRecord({_FLAT: array})})


def decode_reply(record: RecordDict, task: Task) -> Reply:
    """The answer to `task` in `record`; a reason in it is made printable and cut to 200 characters.

    A payload may hold 16 bytes a weight and 64 KiB more, several times what any codec needs.
    """
    noised = task.kind == "evaluate" and task.mechanism is not None
    fields = _fields(record, _REPLY, {_FIELDS, _ARRAYS}, _SIGNED | _NOISED if noised else _SIGNED)
    if fields["reason"]:
        return Reply(task.round, task.client, reason=_shown(fields["reason"]), late=fields["late"])
    if (fields["round"], fields["client"]) != (task.round, task.client):
        raise ValueError(f"answered for round {fields['round']} of {_shown(fields['client'])!r}")
    payload = _data(record, "uint8", None, _PAYLOAD, 1)
    if len(payload) > max(16 * len(task.weights) + 65536, _LARGEST_ANSWER if task.kind == "protect" else 0):
        raise ValueError(f"a payload of {len(payload)} bytes for {len(task.weights)} weights")
    head = _head(fields, "node")
    return Reply(payload=payload, head=head, **{name: fields[name] for name in fields if not name.startswith("node_")})


def greeting() -> RecordDict:
    """The message that asks a node for its hello."""
    return RecordDict()


def encode_hello(hello: Hello, nodes: int = 0) -> RecordDict:
    """The message for `hello`; `nodes` is how many there are where the node is a simulated one, else 0."""
    device = hello.device
    fields = {
        **{name: getattr(hello, name) for name in ("name", "examples", "digest", "identity", "recipient")},
        **{name: getattr(device, name) for name in ("speed", "down", "up", "memory", "availability")},
        **_written("node", hello.head),
        **_written("server", hello.seen),
    }
    return RecordDict({_FIELDS: _config({**fields, "keyholder": "", "nodes": nodes, "reason": ""}, _HELLO)})


def encode_key_node(node: KeyNode) -> RecordDict:
    """The message for what the node of a key holder says."""
    fields = {name: kind() for name, kind in _HELLO.items()}
    return RecordDict({_FIELDS: _config({**fields, "keyholder": node.identity}, _HELLO)})


def encode_refusal(reason: str, nodes: int = 0) -> RecordDict:
    """The message of a node that cannot take part, for `reason`."""
    fields = {name: kind() for name, kind in _HELLO.items()}
    return RecordDict({_FIELDS: _config({**fields, "nodes": nodes, "reason": _shown(reason) or "unknown"}, _HELLO)})


def decode_hello(record: RecordDict) -> tuple[Hello | KeyNode | str, int]:
    """(the hello, of a client or a key holder, or the reason why the node cannot take part; how many nodes there are

    where they are simulated, 0 for a real device).
    """
    fields = _fields(record, _HELLO, {_FIELDS})
    if fields["reason"]:
        return _shown(fields["reason"]), fields["nodes"]
    if fields["availability"] > 1:
        raise ValueError(f"an availability of {fields['availability']}")
    device = Device(**{name: fields[name] for name in ("speed", "down", "up", "memory", "availability")})
    keys = fields["identity"], fields["recipient"]
    for key in (*keys, fields["keyholder"]):
        if not re.fullmatch("([0-9a-f]{64})?", key):
            raise ValueError(f"{_shown(key)!r} is no public key")
    if fields["keyholder"]:
        return KeyNode(fields["keyholder"]), fields["nodes"]
    said = _head(fields, "node"), _head(fields, "server"), *keys
    return Hello(_name(fields["name"]), fields["examples"], _name(fields["digest"]), device, *said), fields["nodes"]


def encode_bytes(said: bytes) -> RecordDict:
    """The message of what a server and a key holder say to each other (privacy/holder.py)."""
    return RecordDict({_REQUEST: ArrayRecord({_FLAT: _array(said, "uint8", len(said), _PROTOCOL)})})


def decode_bytes(record: RecordDict) -> bytes:
    """The reverse of `encode_bytes`."""
    if set(record) != {_REQUEST}:
        raise ValueError("a message with other records than expected")
    return _data(record, "uint8", None, _PROTOCOL, 1, where=_REQUEST)


def _config(fields: Mapping[str, Any], kinds: Mapping[str, type]) -> ConfigRecord:
    # numpy scalars and ints in a float's place are the caller's convenience, not the wire's
    return ConfigRecord({name: kind(fields[name]) for name, kind in kinds.items()})


def _array(data: bytes, dtype: str, size: int, stype: str) -> Array:
    return Array(dtype=dtype, shape=(size,), stype=stype, data=data)


def _fields(
    record: RecordDict, kinds: Mapping[str, type], records: set[str], signed: Collection[str] = ()
) -> dict[str, Any]:
    if set(record) != records:
        raise ValueError(f"a message with the records {_shown(', '.join(sorted(map(str, record))))!r}")
    config = record[_FIELDS]
    if not isinstance(config, ConfigRecord) or set(config) != set(kinds):
        raise ValueError("a message with other fields than expected: do both sides run the same version of Umbel?")
    for name, kind in kinds.items():
        value = config[name]
        if type(value) is not kind:
            raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
        least = -(2**53) if name in signed else 0
        if isinstance(value, int | float) and not (least <= value <= 2**53):
            raise ValueError(f"{name} is out of range: {value}")
    return dict(config)


def _data(
    record: RecordDict,
    dtype: str,
    size: int | None,
    stype: str,
    width: int,
    name: str = _FLAT,
    names: Collection[str] = frozenset({_FLAT}),
    where: str = _ARRAYS,
) -> bytes:
    """The bytes of array `name` in record `where`; `names`: all that may be there."""
    arrays = record[where]
    if not isinstance(arrays, ArrayRecord) or set(arrays) != set(names):
        raise ValueError("a message with other arrays than expected")
    array = arrays[name]
    if (array.dtype, array.stype) != (dtype, stype):
        raise ValueError(f"an array of {_shown(f'{array.dtype} as {array.stype}')!r}, not {dtype} as {stype!r}")
    if not isinstance(array.data, bytes) or len(array.data) % width:
        raise ValueError("an array whose data is no whole number of entries")
    entries = len(array.data) // width
    if tuple(array.shape) != (entries,) or entries != (entries if size is None else size):
        raise ValueError(f"an array of shape {_shown(str(array.shape))} with {entries} entries, expected {size}")
    return array.data


def _coordinates(record: RecordDict, size: int, named: Collection[str]) -> NDArray[np.uint32]:
    """At most `size` of them; which there may be is for clients/coordinates.py."""
    found = np.frombuffer(_data(record, "uint32", None, _INDICES, 4, _SHARED, named), "<u4").astype(np.uint32)
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


def _written(whose: str, head: Head | None) -> dict[str, Any]:
    sequence, digest = head or Head(0, "")
    return {f"{whose}_sequence": sequence, f"{whose}_digest": digest}


def _head(fields: Mapping[str, Any], whose: str) -> Head | None:
    """The head of a ledger that is written in `fields`; no digest: none."""
    head = Head(fields[f"{whose}_sequence"], fields[f"{whose}_digest"])
    if head == Head(0, ""):
        return None
    if not re.fullmatch("[0-9a-f]{64}", head.digest):
        raise ValueError(f"{_shown(head.digest)!r} is no digest of a ledger")
    return head


def _charge(fields: Mapping[str, Any]) -> Charge | None:
    head, known = _head(fields, "server"), _head(fields, "node")
    if not fields["run"] and not fields["attempt"] and head is None and known is None:
        return None
    if head is None or not fields["attempt"]:
        raise ValueError("a task that names a run of the ledger, but not its attempt or the ledger's head")
    return Charge(_name(fields["run"]), fields["attempt"], head, known)


def _protection(record: RecordDict, fields: Mapping[str, Any]) -> Protection | None:
    if _REQUEST not in record:
        if fields["protected_run"] or fields["entries"] or fields["minimum"]:
            raise ValueError("a task that is to be protected, without the protocol's message")
        return None
    request = _data(record, "uint8", None, _PROTOCOL, 1, where=_REQUEST)
    return Protection(_name(fields["protected_run"]), fields["entries"], fields["minimum"], request)


def _name(text: str) -> str:
    if not text or text != _shown(text):
        raise ValueError(f"{_shown(text)!r} is no name: 1 to {_LONGEST} printable characters are one")
    return text


def _shown(text: str) -> str:
    """`text` as it may stand in a terminal or a log: printable, not long."""
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST])
