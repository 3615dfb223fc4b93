"""Encrypted sums: clients' integers in, an aggregate out that only the key holder opens; client half and server half.

The server adds updates as they come into one accumulator, and learns from them who sent one and nothing else. An update
that is not to the last byte what its sender made costs the sender that update and nothing else.

Legend: K ciphertexts of two polynomials of N = 4096 coefficients.
"""

import json
from collections.abc import Iterable, Mapping

import numpy as np

from privacy import bfv, coefficients, envelope, tags
from privacy.bfv import DEGREE, Integers, Parameters
from privacy.coefficients import POLYNOMIAL
from privacy.envelope import Address, Broken
from privacy.expansion import Died, Worker
from privacy.key_letter import ClientKeys


class Rejected(ValueError):
    """A client's update that was not added. The message names the client and says why."""

    def __init__(self, client: str, why: str) -> None:
        super().__init__(f"the update of {client} was refused: {why}")
        self.client = client


class Protector:
    """The client's half, for one run."""

    def __init__(self, keys: ClientKeys) -> None:
        from privacy import encryption  # loads tenseal, which a server lacks a use for

        self._keys = keys
        self._encryptor = encryption.Encryptor(keys.parameters, keys.key)
        self._weights = tags.weights(keys.weight_secret, keys.parameters.plain)

    def protect(self, round: int, integers: Integers, shown: bytes = b"") -> bytes:
        """integers (entries,), each below 2^width -> the envelope for the server.

        shown: hash of what the client was shown; the sum is opened where all clients of the round were shown the same.
        """
        keys = self._keys
        if not 1 <= round <= keys.rounds:
            raise ValueError(f"round {round} of a run whose key was made for {keys.rounds}")
        slots = bfv.to_slots(integers, keys.parameters)
        plain = keys.parameters.plain
        pads = tags.pads(keys.pad_secret, keys.run, round, keys.client, len(slots), plain, shown)
        tags.write(slots, pads, self._weights, plain)
        address = update_address(keys.parameters, keys.key_id, keys.run, round, keys.client)
        return envelope.seal(address, self._encryptor.encrypt(slots), keys.mac_key)


class EncryptedSum:
    """The server's half, for one round. It holds no key that opens anything.

    mac_keys: of the clients that were asked. worker: of the same parameters, needed in `shared`; one round at a time.
    """

    def __init__(
        self,
        parameters: Parameters,
        key_id: bytes,
        run: str,
        round: int,
        mac_keys: Mapping[str, bytes],
        worker: Worker | None = None,
    ) -> None:
        self._parameters, self._key_id, self._run, self._round = parameters, key_id, run, round
        self._mac_keys = mac_keys
        self._worker = worker if parameters.trust == "shared" else None
        if self._worker:
            self._worker.clear()
        elif parameters.trust == "shared":
            raise ValueError("seeds are expanded by a worker")
        self._total = np.zeros((parameters.count, 1 if self._worker else 2, DEGREE), np.uint64)
        self._roster: set[str] = set()

    @property
    def roster(self) -> tuple[str, ...]:
        """Whose updates are in the sum, by name."""
        return tuple(sorted(self._roster))

    def add(self, client: str, data: bytes) -> None:
        """Add what `client` sent. Raises Rejected, and then the sum is what it was."""
        if client not in self._mac_keys:
            raise Rejected(client, "it was not asked")
        if client in self._roster:
            raise Rejected(client, "it has sent one for this round already")
        if len(self._roster) >= self._parameters.clients:
            raise Rejected(client, f"the sum bears {self._parameters.clients} updates")
        address = update_address(self._parameters, self._key_id, self._run, self._round, client)
        try:
            content = envelope.open_(data, address, self._mac_keys[client])
            polynomials, seeds = self._read(content)
            if self._worker:
                self._worker.add(seeds)
        except (Broken, coefficients.Unreadable, Died) as error:
            raise Rejected(client, str(error)) from error
        for total, one in zip(self._total, polynomials, strict=True):
            coefficients.add(total, one, self._parameters)
        self._roster.add(client)

    def polynomials(self) -> Integers:
        """The sum so far, (K, 2, N)."""
        if not self._worker:
            return self._total
        return np.stack([self._total[:, 0], self._worker.total()], axis=1)

    def seal(self, link_key: bytes) -> bytes:
        """The aggregate for the key holder, whose `open` wants the roster beside it."""
        return seal(self.polynomials(), self._parameters, self._key_id, self._run, self._round, self.roster, link_key)

    def _read(self, content: memoryview) -> tuple[Integers, bytes]:
        """(the polynomials (K, 1 or 2, N), each coefficient below the data prime; the seeds)."""
        size, number = coefficients.size(self._parameters), self._total.shape[1]
        polynomials, seeds = np.empty_like(self._total), []
        for k, row in enumerate(polynomials):
            piece = content[k * size : (k + 1) * size]
            for i in range(number):
                row[i] = coefficients.polynomial(piece[i * POLYNOMIAL : (i + 1) * POLYNOMIAL], self._parameters)
            seeds.append(piece[number * POLYNOMIAL :])
        return polynomials, b"".join(seeds)


def seal(
    polynomials: Integers,
    parameters: Parameters,
    key_id: bytes,
    run: str,
    round: int,
    roster: Iterable[str],
    link_key: bytes,
) -> bytes:
    """polynomials (K, 2, N) -> the envelope of an aggregate."""
    address = aggregate_address(parameters, key_id, run, round, roster)
    ciphertexts = b"".join(map(coefficients.packed, polynomials.reshape(-1, DEGREE)))
    return envelope.seal(address, ciphertexts, link_key)


def read_aggregate(data: bytes, address: Address, link_key: bytes, parameters: Parameters) -> Integers:
    """The key holder's reading of what `EncryptedSum.seal` made: (K, 2, N). Raises Broken or Unreadable."""
    content = envelope.open_(data, address, link_key)
    pieces = (content[i : i + POLYNOMIAL] for i in range(0, len(content), POLYNOMIAL))
    return np.stack([coefficients.polynomial(piece, parameters) for piece in pieces]).reshape(-1, 2, DEGREE)


def update_address(parameters: Parameters, key_id: bytes, run: str, round: int, client: str) -> Address:
    """What the envelope of a client must say."""
    mark = envelope.fingerprint(key_id, parameters.to_bytes())
    return Address(run, round, json.dumps(["client", client]), mark, parameters.count, coefficients.size(parameters))


def aggregate_address(parameters: Parameters, key_id: bytes, run: str, round: int, roster: Iterable[str]) -> Address:
    """What the envelope of an aggregate must say."""
    mark = envelope.fingerprint(key_id, parameters.to_bytes())
    return Address(run, round, json.dumps(["sum", *sorted(roster)]), mark, parameters.count, 2 * POLYNOMIAL)
