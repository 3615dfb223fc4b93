"""The key holder's core: deals the keys of a run, opens one proven aggregate a round, and nothing else ever.

Guarantee: what leaves this file about updates is `publish` of the exact sum over at least `minimum` provisioned
clients, once for each round of a run, whatever the server asks. Which clients those are is on disk before anything is
decrypted, and what was published is on disk before it is returned; asked again, the stored bytes are the answer, so
noise is never drawn twice. An aggregate that is not what its roster made opens nothing, and after three of those the
key is destroyed: a server that tries learns three bits, and of each round that it opens whether it opened.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from privacy import bfv, coefficients, durable, encryption, key_letter, packing, tags
from privacy.bfv import Integers, Parameters
from privacy.encrypted_sum import aggregate_address, read_aggregate
from privacy.envelope import Broken
from privacy.holder import Deal, Opened
from privacy.refused import Refused
from privacy.run_keys import RunKeys

FAILURES = 3
"""Openings that may fail before the key is destroyed."""
Publish = Callable[[Integers, Sequence[str]], bytes]
"""(exact sums (entries,), roster) -> what is told to everybody; central DP noise belongs in here."""


class KeyHolder:
    """folder: nobody else may read it. clients: name -> raw X25519 public key, known from elsewhere than the server.

    cohort: how many clients are asked a round, all by default. minimum: fewer are never opened; the larger of 3 and
    half the cohort by default. Raises Refused for a folder that others can read or a minimum that cannot be met.
    """

    def __init__(
        self,
        folder: Path,
        clients: Mapping[str, bytes],
        cohort: int | None = None,
        minimum: int | None = None,
    ) -> None:
        self._clients = {name: X25519PublicKey.from_public_bytes(key) for name, key in sorted(clients.items())}
        self._cohort = len(clients) if cohort is None else cohort
        self.minimum = least(self._cohort, minimum)
        self._folder = folder
        _own(folder)
        self._lock = _locked(folder)
        self._turn = threading.Lock()
        self._identity = Ed25519PrivateKey.from_private_bytes(durable.secret(folder / "identity"))

    @property
    def identity(self) -> bytes:
        """The raw Ed25519 public key that clients must know from elsewhere than the server."""
        return self._identity.public_key().public_bytes_raw()

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._lock)

    def deal(self, run: str, rounds: int, parameters: Parameters) -> Deal:
        """The keys of a run: those it has, or new ones where there are none or the clients are others than then.

        Raises Refused for another number of rounds or parameters than the run has, and where its key was destroyed.
        """
        if not 1 <= rounds < 1 << 32:
            raise Refused(f"a run of {rounds} rounds: 1 to {(1 << 32) - 1} can be dealt keys for")
        folder = self._run(run)
        folder.mkdir(mode=0o700, exist_ok=True)
        if (folder / "retired").exists():
            raise Refused(f"the key of run {run} was destroyed after {FAILURES} failed openings: start a new run")
        if self._cohort > parameters.clients:
            raise Refused(
                f"protect.max_clients={parameters.clients} is less than the cohort of {self._cohort}: raise it to that"
            )
        keys = self._keys(folder / "key", run, rounds, parameters)
        letters = {
            name: key_letter.write(keys.of(name), recipient, self._identity)
            for name, recipient in self._clients.items()
        }
        public = b"" if parameters.trust == "shared" else keys.public
        mac_keys = {name: keys.secrets[name].mac for name in letters}
        return Deal(keys.key_id, public, letters, mac_keys, keys.link_key, keys.clients, self.minimum, self.identity)

    def open(
        self,
        run: str,
        round: int,
        roster: Sequence[str],
        aggregate: bytes,
        publish: Publish | None = None,
        shown: bytes = b"",
    ) -> bytes:
        """What is published of the sum over `roster`; by default the sums, packed at the width of a field.

        shown: hash of what the server says it showed to all of them (privacy/tags.py).
        Whatever comes with a round that was opened, the answer is that round's. Raises Refused, and then nothing of
        the aggregate is known to anybody.
        """
        with self._turn:
            return self._answer(run, round, roster, aggregate, publish, shown)

    def opened(self, run: str, round: int) -> Opened | None:
        """What was published of a round, and of whom; None: nothing was."""
        record = self._run(run) / f"round-{round:06}.json"
        if not (answer := record.with_suffix(".answer")).exists():
            return None
        said = json.loads(record.read_bytes())
        opened = Opened(tuple(said["roster"]), bytes.fromhex(said["shown"]), answer.read_bytes(), b"")
        return replace(opened, signature=self._identity.sign(opened.statement(run, round)))

    def _answer(
        self,
        run: str,
        round: int,
        roster: Sequence[str],
        aggregate: bytes,
        publish: Publish | None,
        shown: bytes,
    ) -> bytes:
        folder = self._run(run)
        record, answer = folder / f"round-{round:06}.json", folder / f"round-{round:06}.answer"
        if answer.exists():
            return answer.read_bytes()
        keys = self._usable(run, folder)
        self._check_roster(roster, round, keys)
        parameters = keys.parameters
        address = aggregate_address(parameters, keys.key_id, run, round, roster)
        try:
            polynomials = read_aggregate(aggregate, address, keys.link_key, parameters)
        except (Broken, coefficients.Unreadable) as error:
            raise Refused(f"the aggregate of round {round} cannot be read: {error}") from error
        request = {"roster": sorted(roster), "shown": shown.hex(), "aggregate": hashlib.sha256(aggregate).hexdigest()}
        if record.exists() and json.loads(record.read_bytes()) != request:
            raise Refused(f"round {round} of run {run} was asked for with another aggregate: it is lost, go on")
        durable.write_atomic(record, json.dumps(request).encode())  # an attempt counts from here on, crash or not
        sums = self._opened(keys, run, round, roster, polynomials, shown)
        if sums is None:
            durable.write_atomic(record, json.dumps({**request, "failed": True}).encode())
            self._retire_if_due(folder)
            raise Refused(f"the aggregate of round {round} is not the sum of its roster's updates: it stays closed")
        packed = publish(sums, tuple(sorted(roster))) if publish else packing.pack(sums, parameters.width)
        durable.write_atomic(answer, packed)
        return packed

    def _check_roster(self, roster: Sequence[str], round: int, keys: RunKeys) -> None:
        if not 1 <= round <= keys.rounds:
            raise Refused(f"round {round} of a run whose key was made for {keys.rounds}")
        if len(set(roster)) != len(roster):
            raise Refused("a roster names a client twice")
        if strangers := sorted(set(roster) - self._clients.keys() | set(roster) - keys.secrets.keys()):
            raise Refused(f"{strangers[0]} is not among the clients that this key holder knows")
        if len(roster) > keys.parameters.clients:
            raise Refused(f"a sum over {len(roster)} clients: protect.max_clients={keys.parameters.clients}")
        if len(roster) < self.minimum:
            raise Refused(f"a sum over {len(roster)} clients stays closed: protect.minimum={self.minimum}")

    def _opened(
        self, keys: RunKeys, run: str, round: int, roster: Sequence[str], polynomials: Integers, shown: bytes
    ) -> Integers | None:
        parameters = keys.parameters
        decryptor = encryption.Decryptor(parameters, keys.secret)
        slots = np.stack([decryptor.decrypt(pair) for pair in polynomials])
        plain = parameters.plain
        pads = [
            tags.pads(keys.secrets[name].pad, run, round, name, len(slots), plain, shown) for name in sorted(roster)
        ]
        if not tags.hold(slots, pads, tags.weights(keys.weight_secret, plain), plain):
            return None
        return bfv.from_slots(slots, parameters)

    def _usable(self, run: str, folder: Path) -> RunKeys:
        self._retire_if_due(folder)
        if not (folder / "key").exists():
            raise Refused(f"there is no key for run {run}: it was not dealt here, or was destroyed")
        return RunKeys.load(folder / "key")

    def _retire_if_due(self, folder: Path) -> None:
        records = folder.glob("round-*.json")
        if sum(not record.with_suffix(".answer").exists() for record in records) >= FAILURES:
            durable.write_atomic(folder / "retired", b"")
            (folder / "key").unlink(missing_ok=True)

    def _keys(self, path: Path, run: str, rounds: int, parameters: Parameters) -> RunKeys:
        registered = {name: key.public_bytes_raw().hex() for name, key in self._clients.items()}
        if path.exists():
            held = RunKeys.load(path)
            if (held.rounds, held.parameters) != (rounds, parameters):
                raise Refused(f"run {run} has a key for {held.rounds} rounds of {held.parameters}: start a new run")
            if held.clients == registered:
                return held
            path.unlink()
        keys = RunKeys.new(run, rounds, parameters, registered)
        durable.secret(path, keys.to_bytes())
        return keys

    def _run(self, run: str) -> Path:
        return self._folder / hashlib.sha256(run.encode()).hexdigest()[:32]


def least(cohort: int, minimum: int | None = None) -> int:
    """How many clients a sum must be over: `minimum`, or the larger of 3 and half the cohort. Raises Refused."""
    chosen = max(3, -(-cohort // 2)) if minimum is None else minimum
    if chosen < 3:
        raise Refused(f"protect.minimum={chosen}: of two clients each knows the other's update, set 3 at least")
    if chosen > cohort:
        raise Refused(f"protect.minimum={chosen} of a cohort of {cohort} clients: at most {cohort} can be met")
    return chosen


def _own(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_mode & 0o077 or status.st_uid != os.getuid():
        raise Refused(f"others can read the key folder {folder}: chmod 700 it, and let it belong to you")


def _locked(folder: Path) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise Refused(f"another key holder uses {folder}: stop it, or give this one a folder of its own") from None
    return lock
