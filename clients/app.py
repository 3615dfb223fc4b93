"""The Flower ClientApp: finds out which client this node is, then does what the embedded fleet does in process.

Torch and Opacus are imported where there is training, since on a device every message starts a process of its own:
neither a stage of a masked sum nor a key holder needs them.
"""

import hashlib
import os
import socket
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from privacy.durable import secret
from privacy.refused import Refused

if TYPE_CHECKING:
    from clients.own_ledger import OwnLedger
    from clients.task import Reply, Task
    from clients.training import Node
    from clients.workers import Workers

app = ClientApp()

_HELD = 0.5
"""Seconds for which a worker that is alive is not idle when the living are counted (server/blocks.py)."""


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which client this node is and what it holds, or why it cannot take part."""
    if "keys" in context.node_config:
        return Message(_key_node(context), reply_to=message)
    from clients import device, greetings, training

    nodes = _simulated(context)
    try:
        node, name = _here(context)
        said = device.said(context.node_config)
        told = training.hello(node, name, said)
        own = _own(context)
        content = greetings.encode_hello(own.greet(node, told) if own else told, nodes)
    except Exception as error:
        content = greetings.encode_refusal(_reason(error), nodes)
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's data."""
    return Message(_work(message.content, context), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on this node's test data."""
    return Message(_work(message.content, context), reply_to=message)


@app.query("protect")
def protect(message: Message, context: Context) -> Message:
    """Answer the protocol that hides updates, before or after training."""
    return Message(_work(message.content, context), reply_to=message)


@app.query("keyholder")
def keyholder(message: Message, context: Context) -> Message:
    """Deal the keys of a run or open one of its sums, where this is the node of a key holder."""
    from clients import messages
    from privacy import holder

    try:
        from clients import key_node

        said = key_node.answer(context.node_config, messages.decode_bytes(message.content))
    except Exception as error:
        said = holder.pack({"refused": _reason(error)})
    return Message(messages.encode_bytes(said), reply_to=message)


@app.query("blocks")
def blocks(message: Message, context: Context) -> Message:
    """Work at blocks of clients, where this is one of Flower's simulated nodes: it can play any of them."""
    return Message(_blocks(message.content, context), reply_to=message)


def _key_node(context: Context) -> RecordDict:
    from clients import greetings

    try:
        from clients import key_node  # a library that is missing is a reason, too

        return greetings.encode_key_node(key_node.hello(context.node_config))
    except Exception as error:
        return greetings.encode_refusal(_reason(error))


def _work(content: RecordDict, context: Context) -> RecordDict:
    from clients import messages
    from clients.task import Reply

    try:
        task = messages.decode_task(content)
        reply = (_stage(task, context) if task.kind == "protect" else None) or _answer(task, context)
    except Exception as error:
        reply = Reply(round=0, client="", reason=_reason(error))
    return messages.encode_reply(reply)


def _blocks(content: RecordDict, context: Context) -> RecordDict:
    from clients import blocks

    try:
        if "partition-id" not in context.node_config or {"client", "keys"} & set(context.node_config):
            raise Refused("a device trains its own client alone, blocks are for simulated nodes: set fleet.clock=wall")
        tasks = blocks.decode_tasks(content)
        if not tasks:  # it is asked who is alive, and those who are shall all be asked
            time.sleep(_HELD)
            return blocks.encode_replies([], [f"{os.getpid()} on {socket.gethostname()}"])
        workers, deaths = _crew(**_told(context))
        deaths.clear()
        return blocks.encode_replies(workers.map(tasks), deaths)
    except Exception as error:
        return blocks.encode_refusal(_reason(error))


def _answer(task: "Task", context: Context) -> "Reply":
    from clients import cohort, device

    node, name = _here(context)
    _addressed(task, name, context)
    if task.deadline:  # the link takes its part of it: this node's owner knows how fast it is
        link = device.transfer_seconds(device.said(context.node_config), task.download, task.weights.nbytes)
        task = replace(task, deadline=max(1e-9, task.deadline - link))
    own = _own(context)
    return own.answer(node, task) if own else cohort.alone(node, task)


def _stage(task: "Task", context: Context) -> "Reply | None":
    """What `_answer` makes of a stage of a masked sum, without torch; None where this node keeps no settings for it."""
    from clients import masking, upload, wanted
    from clients.task import Reply

    if "client" not in context.node_config or (known := wanted.kept(_states(context), _run(context))) is None:
        return None
    _addressed(task, str(context.node_config["client"]), context)
    member = masking.Member(known.folder, _peers(context), known.settings.protect)
    return Reply(task.round, task.client, member.answer(task, upload.grid_of(task, known.settings)))


def _addressed(task: "Task", name: str, context: Context) -> None:
    """Refuse a task that is for another client, or that the owner of this device does not allow."""
    from clients import pins

    if task.client != name:
        raise Refused(f"this node is {name}, the task is for {task.client}")
    if "client" in context.node_config:
        pins.hold_task_to(context.node_config, task)


def _reason(error: Exception) -> str:
    """What may leave the node about `error`: our own words, else its kind alone, since its text may quote data."""
    print(f"umbel: {type(error).__name__}: {error}", flush=True)
    return str(error) if isinstance(error, Refused) else f"failed with {type(error).__name__}"


def _simulated(context: Context) -> int:
    """How many nodes there are where this is one of Flower's simulated ones; 0 for a device that has a name."""
    return 0 if "client" in context.node_config else int(context.node_config.get("num-partitions", 0))


def _states(context: Context) -> Path:
    """What this node keeps between rounds and runs lies here."""
    named = str(context.node_config.get("state", "")) or os.environ.get("UMBEL_STATE", "")
    return Path(named or "~/.umbel/state").expanduser()


def _run(context: Context) -> str:
    """A digest of all that this device's settings for a run follow from, the owner's file included."""
    config, run = context.node_config, context.run_config
    scenario = _scenario(str(run["scenario"]), str(config.get("scenario", "")))
    file = Path(scenario).read_bytes() if scenario.endswith(".py") and Path(scenario).is_file() else b""
    said = context.run_id, scenario, str(run["set"]), sorted(config.items())
    return hashlib.sha256(repr(said).encode() + file).hexdigest()[:16]


def _peers(context: Context) -> dict[str, bytes]:
    """The public keys of all clients, as this device's owner has them."""
    from clients.masking import read_peers

    peers = str(context.node_config.get("peers", ""))
    return read_peers(Path(peers)) if peers else {}


def _own(context: Context) -> "OwnLedger | None":
    """The ledger of this device; simulated nodes keep none, as their server's is on the same disk."""
    from clients.own_ledger import OwnLedger

    if "client" not in context.node_config:
        return None
    return OwnLedger.of(_states(context), context.node_config.get("budget"))


def _here(context: Context) -> tuple["Node", str]:
    """(what this process has to train with, the name of this node's client).

    A device is told both by its owner: `client`, `data`, `state`, `scenario`, `peers`, `keyholder`, and what it
    demands of every run (clients/pins.py), in its node config.
    A simulated node is the partition-id'th of the sorted client names, and may be told its data folder by the run.
    """
    from clients import pins, wanted

    config, node = context.node_config, _node(**_told(context))
    named = str(config.get("client", ""))
    clients = sorted(node.federation.sizes)
    if named:
        if clients and named not in clients:
            raise Refused(f"this node is client {named!r}, but the scenario has {', '.join(clients)}"[:200])
        pins.hold_to(config, node.settings.protect)
        if node.settings.protect.mode == "masked":
            wanted.keep(_states(context), _run(context), wanted.Wanted(node.settings, node.states))
        return node, named
    if "partition-id" not in config:
        raise Refused("""this node does not say which client it is: start it with --node-config 'client="NAME"'""")
    number, nodes = int(config["partition-id"]), _simulated(context)
    if nodes < len(clients):
        raise Refused(f"there are {len(clients)} clients, but {nodes} nodes")
    if number >= len(clients):
        raise Refused(f"there are {len(clients)} clients: this node, number {number} from 0, is one too many")
    return node, clients[number]


def _told(context: Context) -> dict[str, Any]:
    """What `_node` makes a node of."""
    config, run = context.node_config, context.run_config
    return {
        "scenario": _scenario(str(run["scenario"]), str(config.get("scenario", ""))),
        "text": str(run["set"]),
        "data": str(config.get("data", "")),
        "states": str(_states(context)),
        "run": context.run_id,
        "device": bool(str(config.get("client", ""))),
        "peers": str(config.get("peers", "")),
        "keyholder": str(config.get("keyholder", "")),
    }


def _scenario(asked: str, own: str) -> str:
    """The scenario to load: the owner's own file where the run asks for a file of that name."""
    return own if asked.endswith(".py") and Path(asked).name == Path(own).name else asked


@lru_cache(maxsize=1)
def _node(
    scenario: str, text: str, data: str, states: str, run: int, device: bool, peers: str, keyholder: str
) -> "Node":
    from clients import masking, pins
    from clients.training import Node
    from scenarios import load
    from scenarios.settings import override

    loaded = load(scenario)
    settings = override(loaded.settings, text)
    out = settings.run.out
    if device or data:  # a server must not choose where a device looks for data
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"data": data})})
    if out and not device:
        folder = Path(out).absolute() / "clients"  # simulated clients keep their state where the embedded ones do
    else:  # a resumed run keeps its folder, but not Flower's number
        folder = Path(states) / hashlib.sha256(f"{loaded.name}\n{out or run}".encode()).hexdigest()[:16]
    if device:  # digests of this node's data show a change from run to run, too
        secret(folder / "key", secret(Path(states) / "key"))
    known = (masking.read_peers(Path(peers)) if peers else {}) if device else None
    trusted = pins.key_holder(keyholder) if device and settings.protect.mode == "encrypted" else None
    return Node(loaded, settings, loaded.data(settings), folder, known, trusted)


@lru_cache(maxsize=1)
def _crew(**told: Any) -> "tuple[Workers, list[str]]":
    """(who works at blocks here: a process apart, as Flower replaces nothing that dies on Ray; what died)."""
    from clients import cohort
    from clients.workers import Workers

    deaths, machine = list[str](), socket.gethostname()
    return Workers(cohort.forked(_node(**told)), 1, lambda line: deaths.append(f"{line} (on {machine})")), deaths
