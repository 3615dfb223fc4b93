"""A federation whose messages travel as bytes between the real server and the real handlers, for whoever bends them."""

import math
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from clients import app as client_app
from clients import encrypting, masking, messages
from clients.task import Reply
from privacy.holder import Remote
from privacy.keyholder import KeyHolder
from scenarios import build_model, load
from scenarios.settings import Settings, override
from server import rounds
from server.encrypted import Encrypted
from server.gather import Gather, clear
from server.grid import GridFleet
from server.masked import Masked
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

DUE = {
    "encrypted payloads": 3000,
    "masked payloads": 1500,
    "encrypted records": 1200,
    "masked records": 150,
    "encrypted tasks": 800,
    "masked tasks": 150,
    "requests": 4000,
    "key holder's answers": 200,
    "blocks": 400,
}
"""How many changed messages come to each door, over all trusts or stages together."""

SCENARIO = """
import torch
from torch import nn
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings

SIZES = {{f"site-{{i:02}}": 10 + i for i in range({clients})}}

def examples(name):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 50), 5, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())

def data(settings):
    return Federation(SIZES, examples, examples("validation"), examples("test"), examples)

net = lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
SCENARIO = Scenario("for a test", Settings(), {{"net": net}}, data, name="made")
"""
BASE = "rounds.number=1 rounds.minimum=0 local.batch=8 local.rate=0.5 local.steps=2 privacy.unit=none protect.minimum=3"

Bend = Callable[[str, str, bytes], bytes]
"""(client, kind of task, the record as bytes) -> what arrives instead."""


def honest(client: str, kind: str, data: bytes) -> bytes:
    return data


def serialized(record: RecordDict) -> bytes:
    return bytes(recorddict_to_proto(record).SerializeToString(deterministic=True))


def parsed(data: bytes) -> RecordDict:
    """Raises what Flower raises for bytes that are no record."""
    return recorddict_from_proto(Proto.FromString(data))


class Wire:
    """The nodes of a fleet, all in this process; what was asked and answered honestly is answered from memory."""

    def __init__(self, contexts: Mapping[int, tuple[str, Context]]) -> None:
        self.contexts = contexts
        self.down = self.up = honest
        self.known: dict[tuple[int, str, bytes], bytes] = {}
        self.unreadable = 0
        self._sent: dict[str, tuple[Message, bytes | None]] = {}
        self._number = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, outgoing: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in outgoing:
            self._number += 1
            message.metadata.__dict__["_message_id"] = str(self._number)
            kind, (name, _) = message.metadata.message_type, self.contexts[message.metadata.dst_node_id]
            sent = serialized(message.content)
            arrived = sent if kind in ("query", "query.keyholder") else self.down(name, kind, sent)
            key = message.metadata.dst_node_id, kind, arrived
            answer = self.known.get(key) or self.handled(message.metadata.dst_node_id, kind, arrived)
            if arrived == sent and answer and kind != "query.keyholder":
                self.known[key] = answer
            if answer and kind != "query":
                answer = self.up(name, kind, answer)
            self._sent[str(self._number)] = message, answer
            ids.append(str(self._number))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for number in message_ids:
            message, answer = self._sent.pop(number)
            if answer is None:
                yield Message(Error(code=2, reason="it cannot be read"), reply_to=message)
            else:
                yield Message(parsed(answer), reply_to=message)

    def handled(self, node: int, kind: str, data: bytes) -> bytes | None:
        """What the node's handler answers; None where Flower could not even read the message."""
        try:
            content = parsed(data)
        except Exception:
            self.unreadable += 1
            return None
        message = Message(content, node, kind)
        message.metadata.__dict__["_message_id"] = "1"
        return serialized(client_app.app(message, self.contexts[node][1]).content)


@dataclass
class Rows(NoJournal):
    """A journal of one round."""

    rows: list[Row] = field(default_factory=list)

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        return {}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.rows.append(row)


@dataclass
class House:
    """One federation: the disks of clients and key holder, the wire between them, and a server."""

    folder: Path
    settings: Settings
    names: list[str]
    wire: Wire
    fleet: GridFleet
    gathered: Gather
    recipients: dict[str, bytes]
    clear: "House | None" = None
    """The same clients where the server reads their integers; None: it is that."""
    _without: dict[frozenset[str], bytes] = field(default_factory=dict)

    def round(self, down: Bend = honest, up: Bend = honest) -> tuple[bytes, Row]:
        """(the weights after round 1, its row); forgotten by clients and key holder, it can be played again."""
        self.wire.down, self.wire.up = down, up
        journal, begin = Rows(), replace(self._first(), until=1)
        told = self.fleet.hello(), {}, begin, self.settings, journal, lambda _: Score(1.0, 0.5), self.gathered
        [(state, row)] = rounds.rounds(self.fleet, *told)
        for path in [*self.folder.glob("state-*/*/*/encrypted"), *self.folder.glob("keys/*/round-*")]:
            path.unlink()
        return state.weights.tobytes(), row

    def begin(self) -> bytes:
        """The weights before round 1."""
        return self._first().weights.tobytes()

    def _first(self) -> ServerState:
        return first_state(build_model(load(str(self.folder / "made.py")), self.settings), self.settings)

    def forget_masks(self) -> None:
        """As if nobody had begun to mask."""
        for path in self.folder.glob("state-*/*/*/masks-*"):
            shutil.rmtree(path)
        self.wire.known.clear()

    def without(self, names: Iterable[str]) -> bytes:
        """The weights of a round in the clear in which these clients were gone from the start."""
        if self.clear:
            return self.clear.without(names)
        away = frozenset(names)
        if away not in self._without:
            gone = serialized(messages.encode_reply(Reply(0, "", reason="gone")))
            self._without[away], _ = self.round(up=lambda name, kind, data: gone if name in away else data)
        return self._without[away]


Houses = Callable[..., House]


@pytest.fixture
def house(flower_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Houses:
    """house(settings, clients=24) -> House."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what a crash would leave is the matter of other tests
    monkeypatch.setattr(client_app, "_node", lru_cache(64)(client_app._node.__wrapped__))  # each a process of its own

    def made(text: str, clients: int = 24) -> House:
        return replace(built(text, clients), clear=built("codec=int16", clients))

    def built(text: str, clients: int) -> House:
        folder = tmp_path / text.split()[0]
        folder.mkdir()
        (folder / "made.py").write_text(SCENARIO.format(clients=clients))
        scenario, names = str(folder / "made.py"), [f"site-{i:02}" for i in range(clients)]
        settings = override(load(scenario).settings, f"{BASE} protect.max_clients={clients} {text}")
        told = {"scenario": scenario, "set": f"{BASE} protect.max_clients={clients} {text}"}
        states = {name: folder / f"state-{name}" for name in names}
        recipients = {name: encrypting.simulated(states[name], [name])[name] for name in names}
        (folder / "clients.toml").write_text("".join(f'{name} = "{key.hex()}"\n' for name, key in recipients.items()))
        peers = "\n".join(masking.introduction(states[name], name) for name in names)
        (folder / "peers.toml").write_text(peers)
        owner: dict[str, Any] = {
            "keys": str(folder / "keys"),
            "clients": str(folder / "clients.toml"),
            "minimum": 3,
        }
        holder = KeyHolder(folder / "keys", recipients, minimum=3)
        identity = holder.identity.hex()
        holder.close()
        contexts = {1: ("", Context(1, 1, owner, RecordDict(), told))}
        for node, name in enumerate(names, 2):
            mine = {"client": name, "state": str(states[name]), "keyholder": identity}
            mine |= {"scenario": scenario, "peers": str(folder / "peers.toml")}
            contexts[node] = name, Context(1, node, mine, RecordDict(), told)
        wire = Wire(contexts)
        fleet = GridFleet(wire, names, clients, wait=20.0)
        fleet.hello()
        gathered: Gather = Masked("run", 1, 3) if settings.protect.mode == "masked" else clear
        if settings.protect.mode == "encrypted":
            gathered = Encrypted("run", 1, 3, settings.protect, Remote(fleet.exchange))
        return House(folder, settings, names, wire, fleet, gathered, recipients)

    return made


# ---- what a wire, or whoever sits at its other end, makes of a message ----


def changed(data: bytes, draw: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """`data` with a bit flipped, a piece cut, doubled, exchanged or filled, or something else altogether; never as it
    was. Every other change is within the first 200 bytes, where headers lie.
    """
    size = len(data) if draw.random() < 0.5 else min(len(data), 200)
    i, j = sorted(draw.randrange(size + 1) for _ in range(2))
    flip = min(i, max(0, len(data) - 1))
    ways: list[Callable[[], bytes]] = [
        lambda: data[:flip] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[flip : flip + 1]) + data[flip + 1 :],
        lambda: data[:i],
        lambda: data[i:],
        lambda: data[:i] + data[j:],
        lambda: data[:j] + data[i:],
        lambda: data[:i] + bytes(j - i) + data[j:],
        lambda: data[:i] + b"\xff" * (j - i) + data[j:],
        lambda: data[:i] + draw.randbytes(j - i) + data[j:],
        lambda: data[j:] + data[:j],
        lambda: data + draw.randbytes(i + 1),
        lambda: draw.randbytes(len(data)),
        lambda: draw.choice(others) if others else b"",
        lambda: (draw.choice(others) if others else b"")[:j] + data[j:],
    ]
    while (made := draw.choice(ways)()) == data:
        i, j = sorted(draw.randrange(len(data) + 2) for _ in range(2))
    return made


VALUES: list[Any] = [
    0,
    -1,
    1,
    2**53 + 1,
    2**62,
    0.0,
    -1.5,
    1e300,
    math.nan,
    math.inf,
    True,
    False,
    "",
    "site-01",
    "x" * 300,
]
VALUES += ["\x1b[31m\n", "\u202e", b"", b"\0" * 40, [], [2**40], [-1], ["a", "a"], [0.5], "0" * 64]


def edited(record: RecordDict, draw: random.Random) -> RecordDict:
    """`record` with one of its fields, arrays or records changed, in a way that Flower lets through."""
    arrays = {name: part for name, part in record.items() if isinstance(part, ArrayRecord)}
    configs = {name: part for name, part in record.items() if isinstance(part, ConfigRecord)}
    told = sorted(configs)[draw.randrange(len(configs))] if len(configs) > 1 else "umbel"  # a block has its own
    config = configs.get(told, ConfigRecord({"do": "deal"}))  # a key holder's message has no fields
    fields, whole = dict(config), dict(record)
    where = draw.choice(sorted(arrays))
    name = draw.choice(sorted(arrays[where]))
    array = arrays[where][name]

    def rewritten(**changes: Any) -> None:
        said = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | changes
        whole[where] = ArrayRecord(dict(arrays[where]) | {name: Array(**said)})

    match draw.randrange(14):
        case 0:
            del fields[draw.choice(sorted(fields))]
        case 1:
            fields[draw.choice(["shell", "", "protect", "x" * 300])] = draw.choice(VALUES)
        case 2:
            rewritten(dtype=draw.choice(["float64", "object", "int8", "", "x" * 300]))
        case 3:
            rewritten(stype=draw.choice(["numpy.ndarray", "umbel.payload.v2", "", "pickle"]))
        case 4:
            rewritten(shape=draw.choice([(), (0,), (2**30,), (len(array.data), 1), (-1,), (1,) * 40]))
        case 5:
            rewritten(data=(data := changed(array.data, draw)), shape=(len(data) // max(1, _width(array)),))
        case 6:
            rewritten(data=changed(array.data, draw))
        case 7:
            whole[where] = ArrayRecord(dict(arrays[where]) | {draw.choice(["more", "control", ""]): array})
        case 8:
            whole[draw.choice(["more", "request", "arrays", "umbel"])] = draw.choice([arrays[where], config])
        case 9:
            del whole[draw.choice(sorted(whole))]
        case _:
            fields[draw.choice(sorted(fields))] = draw.choice(VALUES)
    if whole.get(told) is config:
        whole[told] = ConfigRecord(fields)
    return RecordDict(whole)


def _width(array: Array) -> int:
    return {"float32": 4, "float64": 8}.get(array.dtype, 1)


def bent(data: bytes, draw: random.Random) -> bytes:
    """The bytes of a record, changed in what they say or as bytes; never as they were."""
    made = data
    while made == data:
        with suppress(TypeError, ValueError):  # what Flower itself cannot write
            made = changed(data, draw) if draw.random() < 0.3 else serialized(edited(parsed(data), draw))
    return made


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """What a file of tests cannot import from here."""
    return SimpleNamespace(due=DUE, parsed=parsed, serialized=serialized, changed=changed, bent=bent)
