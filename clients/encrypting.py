"""One client's part of an encrypted sum: its key, whom it trusts, what it notes down (privacy/encrypted_sum.py)."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from clients.masking import hold_to, view
from clients.task import Protection, Task
from privacy import bfv, durable, holder, key_letter
from privacy.bfv import Parameters
from privacy.encrypted_sum import Protector
from privacy.holder import Shown
from privacy.integers import Grid, Integers
from privacy.refused import Refused
from scenarios.settings import Protect

ROUNDS = 1 << 16
"""Rounds that a run's key serves: more than any run has, those that `umbel export` adds later included."""


def recipient(states: Path, name: str) -> X25519PrivateKey:
    """The key to which letters for client `name` are sealed: of the node's own secret, as `masking.identity`."""
    info = b"umbel letters: " + name.encode()
    return X25519PrivateKey.from_private_bytes(HKDF(SHA256(), 32, None, info).derive(durable.secret(states / "key")))


def simulated(states: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The public keys of clients that share this machine and its secret, by name."""
    return {name: recipient(states, name).public_key().public_bytes_raw() for name in names}


def introduce(states: Path, identity: bytes) -> None:
    """Let the clients that share this disk know the key holder by its raw Ed25519 public key."""
    states.mkdir(parents=True, exist_ok=True)
    durable.write_atomic(states / "keyholder", identity.hex().encode())


def introduced(states: Path) -> bytes:
    """The key holder's raw public key, as `introduce` left it. Raises Refused where there is none."""
    try:
        return bytes.fromhex((states / "keyholder").read_text())
    except (OSError, ValueError):
        raise Refused("protect=encrypted: this client knows no key holder, so it encrypts for nobody") from None


def parameters(grid: Grid, wanted: Protect) -> Parameters:
    """Those of a sum on `grid`, made of one's own settings. Raises Refused with the nearest that is possible."""
    return bfv.fit(wanted.trust, grid.entries, grid.width, wanted.max_clients)


def shown(task: Task, grid: Grid, attempt: int, minimum: int) -> Shown:
    """What every client of a round is shown alike: a sum over clients that saw different is not opened."""
    return Shown(grid, view(task, grid), attempt, minimum)


def request(attempt: int, letter: bytes, public: bytes) -> bytes:
    """What the server says to a client: its letter, and the run's public key (empty in `shared`)."""
    return holder.pack({"attempt": attempt}, letter, public)


@dataclass(frozen=True)
class Member:
    """A client of an encrypted sum. What it must remember between two messages is on its disk."""

    states: Path
    holder: bytes
    """The key holder's raw Ed25519 public key, known from elsewhere than the server."""
    wanted: Protect

    def encrypt(self, task: Task, grid: Grid, values: Integers) -> bytes:
        """values (P + 2,) -> the envelope for the server. Raises Refused for what an honest server does not ask."""
        if (asked := task.protection) is None:
            raise Refused("the task is without the protection that this node's settings ask for")
        hold_to(asked.minimum, self.wanted)
        if asked.of_tests != (task.kind == "evaluate"):
            raise Refused("an update has no place in a sum of test results, nor they in one of updates")
        try:
            said, (letter, public) = holder.unpack(asked.request)
            attempt = said["attempt"]
            if type(attempt) is not int or not 0 < attempt < 2**53:
                raise ValueError("an attempt that is no number")
        except (ValueError, KeyError) as error:
            raise Refused(f"the server's word on the key cannot be read: {error}") from None
        if not 1 <= task.round <= ROUNDS:  # noted down as answered it would be the last one
            raise Refused(f"round {task.round} is none of the {ROUNDS} that a run has")
        made = parameters(grid, self.wanted)
        identity, private = Ed25519PublicKey.from_public_bytes(self.holder), recipient(self.states, task.client)
        keys = key_letter.read(letter, public, asked.run, task.client, ROUNDS, made, identity, private)
        self._once(task, asked, attempt)
        return Protector(keys).protect(task.round, values, shown(task, grid, attempt, asked.minimum).hash)

    def _once(self, task: Task, asked: Protection, attempt: int) -> None:
        """Note down, before it is done, that this round of this attempt is answered. Raises Refused for a second time.

        Of two different answers under one tag the server could make combinations that pass as one, and of two runs
        at once the key holder would open two sums that differ by one client.
        """
        folder = hashlib.sha256(task.client.encode()).hexdigest()[:16]  # a name from the network is no path
        path, base = self.states / folder / ("encrypted-tests" if asked.of_tests else "encrypted"), asked.base
        known, *last = json.loads(path.read_bytes()) if path.exists() else [base, 0, 0]
        if known != base:
            raise Refused("the server calls this run by another name than before: start a new run")
        if (attempt, task.round) <= tuple(last):
            raise Refused(f"round {task.round} of attempt {attempt} was answered already")
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomic(path, json.dumps([base, attempt, task.round]).encode())


def run_name(run: str, parameters: Parameters) -> str:
    """The name under which a run has a key for updates of this shape: a pruned model's are shorter."""
    return f"{run}:{parameters.entries}"
