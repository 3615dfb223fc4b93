"""Fleets in this process: of clients that mask their vectors, and with the keys of encrypted sums."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy import bfv, frames, key_letter, neighbours
from privacy.bfv import Parameters, Trust
from privacy.encrypted_sum import EncryptedSum, Protector
from privacy.expansion import Worker
from privacy.frames import Attempt, Rules, Stage
from privacy.holder import Deal
from privacy.key_letter import ClientKeys
from privacy.keyholder import KeyHolder
from privacy.masked_sum import Server, Sum
from privacy.masks import Client
from privacy.packing import Integers
from privacy.transcript import Store


@dataclass
class Memory:
    """A store without a disk."""

    records: dict[str, bytes] = field(default_factory=dict)

    def lock(self) -> AbstractContextManager[None]:
        return nullcontext()

    def get(self, key: str) -> bytes | None:
        return self.records.get(key)

    def put(self, key: str, value: bytes) -> None:
        self.records[key] = value

    def erase(self, *keys: str) -> None:
        for key in keys:
            self.records.pop(key, None)


class Fleet:
    """Clients named a, b, c … with vectors of their own."""

    def __init__(
        self,
        count: int,
        entries: int = 7,
        width: int = 12,
        minimum: int = 2,
        failure: Fraction = Fraction(1, 1000),
        store: Callable[[str], Store] = lambda name: Memory(),
    ) -> None:
        self.rules = Rules(entries, width, minimum, failure=failure)
        self.names = [chr(ord("a") + i) for i in range(count)]
        self.identities = {name: Ed25519PrivateKey.generate() for name in self.names}
        self.known = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        self.stores = {name: store(name) for name in self.names}
        draw = np.random.default_rng(count + entries + width)
        self.vectors = {name: draw.integers(0, 2**width - 1, entries, np.uint64, endpoint=True) for name in self.names}

    def client(self, name: str) -> Client:
        return Client(name, self.identities[name], self.known, "run", self.rules, self.stores[name])

    def answer(self, name: str, request: bytes) -> bytes:
        return self.client(name).answer(request, self.vectors[name])

    def attempt(self, number: int = 1, of: int = 1) -> Attempt:
        return Attempt(frames.run_id("run", self.rules), of, number)

    def server(self, number: int = 1, of: int = 1) -> Server:
        return Server(self.attempt(number, of), self.rules, self.known, self.names)

    def until(self, server: Server, stage: Stage, absent: Mapping[str, Stage] | None = None) -> dict[str, bytes]:
        """Go on to the requests of `stage`, which nobody has answered yet. absent: who is gone, from which stage on."""
        gone = absent or {}
        while requests := server.ask():
            if server.stage is stage:
                return requests
            for name, request in requests.items():
                if name not in gone or server.stage is None or server.stage < gone[name]:
                    server.hear(name, self.answer(name, request))
        raise AssertionError(f"no {stage.name}")

    def finish(self, server: Server, requests: Mapping[str, bytes], gone: Collection[str] = ()) -> Sum:
        """Answer these requests and all that follow."""
        while requests:
            for name, request in requests.items():
                if name not in gone:
                    server.hear(name, self.answer(name, request))
            requests = server.ask()
        return server.result()

    def total(self, names: Collection[str]) -> Integers:
        """The slow truth: Python's own integers."""
        columns = zip(*(self.vectors[name].tolist() for name in names), strict=True)
        return np.array([sum(column) % 2**self.rules.width for column in columns], np.uint64)


@pytest.fixture(scope="session")
def fleets() -> type[Fleet]:
    return Fleet


@pytest.fixture
def drawn_graphs() -> Iterator[None]:
    """Graphs for a dozen clients, too, whose neighbours would else be all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_ALL", 0)
        neighbours.degree.cache_clear()
        yield
    neighbours.degree.cache_clear()


RUN, ROUNDS = "run", 5


@dataclass
class Cohort:
    """Who takes part in a run, with what each one holds."""

    holder: KeyHolder
    deal: Deal
    parameters: Parameters
    keys: Mapping[str, ClientKeys]
    protectors: Mapping[str, Protector]
    worker: Worker
    private: Mapping[str, X25519PrivateKey]
    run: str = RUN

    def sum(self, round: int = 1) -> EncryptedSum:
        return EncryptedSum(self.parameters, self.deal.key_id, RUN, round, self.deal.mac_keys, self.worker)

    def integers(self, seed: int) -> Integers:
        limit = 1 << (self.parameters.width - (self.parameters.clients - 1).bit_length())
        return np.random.default_rng(seed).integers(0, limit, self.parameters.entries, np.uint64)

    def updates(self, round: int = 1) -> dict[str, bytes]:
        return {
            name: protector.protect(round, self.integers(i))
            for i, (name, protector) in enumerate(self.protectors.items())
        }

    def total(self, *clients: int) -> Integers:
        return np.sum([self.integers(i) for i in clients], axis=0, dtype=np.uint64)


@pytest.fixture
def gather(tmp_path: Path) -> Iterator[Callable[..., Cohort]]:
    """gather(trust="split", entries=100, width=23, clients=6, number=5, minimum=None) -> Cohort."""
    made: list[Cohort] = []

    def new(
        trust: Trust = "split",
        entries: int = 100,
        width: int = 23,
        clients: int = 6,
        number: int = 5,
        minimum: int | None = None,
    ) -> Cohort:
        parameters = bfv.fit(trust, entries, width, clients)
        private = {f"silo-{i}": X25519PrivateKey.generate() for i in range(number)}
        public = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
        holder = KeyHolder(tmp_path / f"keys-{len(made)}", public, minimum=minimum)
        deal = holder.deal(RUN, ROUNDS, parameters)
        identity = Ed25519PublicKey.from_public_bytes(holder.identity)
        keys = {
            name: key_letter.read(
                deal.letters[name], deal.public, RUN, name, ROUNDS, parameters, identity, private[name]
            )
            for name in private
        }
        protectors = {name: Protector(each) for name, each in keys.items()}
        made.append(Cohort(holder, deal, parameters, keys, protectors, Worker(parameters), private))
        return made[-1]

    yield new
    for cohort in made:
        cohort.worker.close()
        cohort.holder.close()
