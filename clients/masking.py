"""One client's part of a masked sum: who it is, whom it knows, what it keeps on its disk (privacy/masks.py)."""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from clients.task import Task
from privacy import durable
from privacy.frames import Attempt, Rules, Stage, addressed, padded, run_id
from privacy.integers import Grid, Integers
from privacy.masks import Client
from privacy.refused import Refused
from privacy.transcript import FileStore
from scenarios.settings import Protect

LEAST = 3
"""Fewest clients in a sum: of two, each knows the other's update from the sum and its own."""


def identity(states: Path, name: str) -> Ed25519PrivateKey:
    """The key that client `name` signs with: of the node's own secret, so it lasts as long as its state folder."""
    info = b"umbel identity: " + name.encode()
    return Ed25519PrivateKey.from_private_bytes(HKDF(SHA256(), 32, None, info).derive(durable.secret(states / "key")))


def public(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes that others know it by."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def simulated(states: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The public keys of clients that share this machine and its secret, by name."""
    return {name: public(identity(states, name)) for name in names}


def fitting(name: str) -> None:
    """Raises Refused for a name that is too long for the protocol."""
    try:
        padded(name)
    except ValueError as error:
        raise Refused(str(error)) from None


def introduction(states: Path, name: str) -> str:
    """The line by which `read_peers` learns client `name` of the node with this state folder.

    Raises Refused for a name that no client can have.
    """
    fitting(name)
    key = name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
    return f'{key} = "{public(identity(states, name)).hex()}"'


def read_peers(path: Path) -> dict[str, bytes]:
    """The public keys of all clients by name, from a TOML file of lines NAME = "64 hexadecimal digits".

    Raises Refused for a file that is not one.
    """
    try:
        said = tomllib.loads(path.read_text())
        keys = {name: bytes.fromhex(key) for name, key in said.items()}
    except (OSError, ValueError, TypeError) as error:
        raise Refused(
            f'{path.name} is no list of clients ({type(error).__name__}): lines of NAME = "KEY" make one'
        ) from None
    for name, key in keys.items():
        if len(key) != 32:
            raise Refused(f"{path.name}: the key of {name} has {len(key)} bytes, an Ed25519 key has 32")
    return keys


def introduced(states: Path, name: str, peers: Mapping[str, bytes]) -> str:
    """The public key that client `name` says it has.

    Raises Refused where its owner's list of clients has another, and for a name that no client can have.
    """
    fitting(name)
    mine = public(identity(states, name))
    if peers.get(name) != mine:
        whose = "another key" if name in peers else "no key"
        raise Refused(
            f"protect=masked: this node's list of clients (peers) has {whose} for {name}: put in what `umbel key node` "
            "prints here"
        )
    return mine.hex()


def view(task: Task, grid: Grid) -> bytes:
    """The hash of what every client of a round is to be sent alike, which they sign: 32 bytes.

    A server that gave all but one another model, or another largest client, would find that one's update alone in the
    sum (Pasquini, Francati and Ateniese 2022).
    """
    said = [
        task.kind,
        task.round,
        task.layout,
        task.rate,
        task.clip,
        task.update_clip,
        task.update_noise,
        task.largest,
        grid,
    ]
    hashed = hashlib.sha256(repr(said).encode())
    hashed.update(task.weights.astype("<f4").tobytes())
    hashed.update(b"" if task.coordinates is None else task.coordinates.astype("<u4").tobytes())
    return hashed.digest()


def hold_to(minimum: int, wanted: Protect) -> None:
    """Refuse a server that would read a sum of fewer clients, or of others, than this node's settings say."""
    if minimum < LEAST or (wanted.minimum or minimum) != minimum:
        least = wanted.minimum or LEAST
        raise Refused(f"the server would open a sum of {minimum} clients, this node's least is {least}")


@dataclass(frozen=True)
class Member:
    """A client of a masked sum. It remembers nothing: what it needs between two messages is on its disk."""

    states: Path
    """Its records lie under it, a folder a run."""
    peers: Mapping[str, bytes]
    """Ed25519 public keys of all clients, itself among them, by name."""
    wanted: Protect

    def answer(self, task: Task, grid: Grid | None, values: Integers | None = None) -> bytes:
        """The answer to the protocol's message in `task`.

        grid: of the round. values (P + 2,): what is to be masked, where it is the turn of that.
        Raises Refused for what an honest server does not ask, or not now, and for a sum over too few clients.
        """
        if (asked := task.protection) is None:
            raise Refused("the task is without the protection that this node's settings ask for")
        hold_to(asked.minimum, self.wanted)
        try:
            if grid is None:
                raise ValueError("nothing is masked but integers")
            rules = Rules(grid.entries, grid.width, asked.minimum)
            if asked.entries != grid.entries:
                raise ValueError(f"{asked.entries} entries are asked for, an update has {grid.entries}")
            attempt, stage = addressed(asked.request, run_id(asked.run, rules))
            if (stage is Stage.MASK) != (values is not None) or attempt.round != task.round:
                raise ValueError(f"{stage.name.lower()} of {attempt} has no place in a task to {task.kind}")
            if values is not None and asked.of_tests != (task.kind == "evaluate"):
                raise ValueError("an update has no place in a sum of test results, nor they in one of updates")
            if values is not None and attempt.view != view(task, grid):
                raise ValueError("the other clients have not been shown this model, or not with these settings")
            folder = self.states / hashlib.sha256(task.client.encode()).hexdigest()[:16]  # a name is no path
            _once(folder / ("masked-tests" if asked.of_tests else "masked"), asked.base, attempt)
            store = FileStore(folder / f"masks-{attempt.run.hex()[:16]}")
            key = identity(self.states, task.client)
            client = Client(task.client, key, self.peers, asked.run, rules, store)
            answer = client.answer(asked.request, values)
            if stage is Stage.UNMASK:  # the last word: nothing here is needed any more
                client.close(task.round)
        except ValueError as error:
            raise Refused(str(error)) from None
        return answer


def _once(path: Path, run: str, attempt: Attempt) -> None:
    """Note down in `path` which round is summed under which name and rules. Raises Refused for a round under two.

    Each name and each rules have records of their own, which know nothing of one another: one update would go into two
    sums, and were they over all and over all but one, their difference would be that one's update.
    """
    known, rules, last = json.loads(path.read_bytes()) if path.exists() else (run, "", 0)
    if known != run:
        raise Refused("the server calls this run by another name than before: start a new run")
    if attempt.run.hex() != rules and attempt.round <= last:
        raise Refused(f"round {attempt.round} is to be summed under other rules than round {last} was")
    if attempt.round > last:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomic(path, json.dumps([run, attempt.run.hex(), attempt.round]).encode())
