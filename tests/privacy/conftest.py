"""A small cohort with the keys of a run, for the tests of encrypted sums."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy import bfv, key_letter
from privacy.bfv import Integers, Parameters, Trust
from privacy.encrypted_sum import EncryptedSum, Protector
from privacy.expansion import Worker
from privacy.key_letter import ClientKeys
from privacy.keyholder import Deal, KeyHolder

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
