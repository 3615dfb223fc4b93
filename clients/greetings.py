"""Hello <-> Flower records: what a node says at first, that it is a client, a key holder, or why it is neither."""

import re

from clients import records
from clients.records import FIELDS, RecordDict
from clients.task import Device, Hello, KeyNode

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


def question() -> RecordDict:
    """The message that asks a node for its hello."""
    return RecordDict()


def encode_hello(hello: Hello, nodes: int = 0) -> RecordDict:
    """The message for `hello`; `nodes` is how many there are where the node is a simulated one, else 0."""
    device = hello.device
    fields = {
        **{name: getattr(hello, name) for name in ("name", "examples", "digest", "identity", "recipient")},
        **{name: getattr(device, name) for name in ("speed", "down", "up", "memory", "availability")},
        **records.written("node", hello.head),
        **records.written("server", hello.seen),
    }
    return RecordDict({FIELDS: records.config({**fields, "keyholder": "", "nodes": nodes, "reason": ""}, _HELLO)})


def encode_key_node(node: KeyNode) -> RecordDict:
    """The message for what the node of a key holder says."""
    fields = {name: kind() for name, kind in _HELLO.items()}
    return RecordDict({FIELDS: records.config({**fields, "keyholder": node.identity}, _HELLO)})


def encode_refusal(reason: str, nodes: int = 0) -> RecordDict:
    """The message of a node that cannot take part, for `reason`."""
    fields = {name: kind() for name, kind in _HELLO.items()}
    said = {**fields, "nodes": nodes, "reason": records.shown(reason) or "unknown"}
    return RecordDict({FIELDS: records.config(said, _HELLO)})


def decode_hello(record: RecordDict) -> tuple[Hello | KeyNode | str, int]:
    """(the hello, of a client or a key holder, or the reason why the node cannot take part; how many nodes there are

    where they are simulated, 0 for a real device).
    """
    fields = records.fields(record, _HELLO, {FIELDS})
    if fields["reason"]:
        return records.shown(fields["reason"]), fields["nodes"]
    if fields["availability"] > 1:
        raise ValueError(f"an availability of {fields['availability']}")
    device = Device(**{name: fields[name] for name in ("speed", "down", "up", "memory", "availability")})
    keys = fields["identity"], fields["recipient"]
    for key in (*keys, fields["keyholder"]):
        if not re.fullmatch("([0-9a-f]{64})?", key):
            raise ValueError(f"{records.shown(key)!r} is no public key")
    if fields["keyholder"]:
        return KeyNode(fields["keyholder"]), fields["nodes"]
    name, digest = records.name(fields["name"]), records.name(fields["digest"])
    said = records.head(fields, "node"), records.head(fields, "server"), *keys
    return Hello(name, fields["examples"], digest, device, *said), fields["nodes"]
