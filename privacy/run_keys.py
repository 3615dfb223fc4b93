"""Run keys: all that is secret about one run, as the key holder keeps it on disk (mode 0600)."""

import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from privacy import encryption
from privacy.bfv import Parameters
from privacy.key_letter import KEY_ID, SECRET, ClientKeys


class ClientSecrets(NamedTuple):
    """What belongs to one client."""

    pad: bytes
    mac: bytes


@dataclass(frozen=True, repr=False)
class RunKeys:
    """It has no repr, so that no log has it."""

    run: str
    rounds: int
    parameters: Parameters
    key_id: bytes
    public: bytes
    secret: bytes
    weight_secret: bytes
    link_key: bytes
    clients: Mapping[str, str]
    """Name -> X25519 public key in hex, as it was when these were made."""
    secrets: Mapping[str, ClientSecrets]

    @staticmethod
    def new(run: str, rounds: int, parameters: Parameters, clients: Mapping[str, str]) -> "RunKeys":
        """Fresh ones, from the operating system's entropy and SEAL's."""
        public, secret = encryption.keys(parameters)
        return RunKeys(
            run=run,
            rounds=rounds,
            parameters=parameters,
            key_id=secrets.token_bytes(KEY_ID),
            public=public,
            secret=secret,
            weight_secret=secrets.token_bytes(SECRET),
            link_key=secrets.token_bytes(SECRET),
            clients=clients,
            secrets={name: ClientSecrets(secrets.token_bytes(SECRET), secrets.token_bytes(SECRET)) for name in clients},
        )

    def of(self, client: str) -> ClientKeys:
        """What the letter to a client carries."""
        return ClientKeys(
            run=self.run,
            client=client,
            rounds=self.rounds,
            parameters=self.parameters,
            key_id=self.key_id,
            key=self.secret if self.parameters.trust == "shared" else self.public,
            pad_secret=self.secrets[client].pad,
            weight_secret=self.weight_secret,
            mac_key=self.secrets[client].mac,
        )

    def to_bytes(self) -> bytes:
        content: dict[str, Any] = {name: base64.b64encode(getattr(self, name)).decode() for name in _BYTES}
        content |= {"run": self.run, "rounds": self.rounds, "parameters": self.parameters.to_bytes().hex()}
        content |= {"clients": self.clients}
        content |= {"secrets": {name: [each.hex() for each in pair] for name, pair in self.secrets.items()}}
        return json.dumps(content).encode()

    @staticmethod
    def load(path: Path) -> "RunKeys":
        """What `to_bytes` made; nobody but the key holder can write there."""
        content = json.loads(path.read_bytes())
        pairs = {name: ClientSecrets(*map(bytes.fromhex, pair)) for name, pair in content["secrets"].items()}
        return RunKeys(
            run=content["run"],
            rounds=content["rounds"],
            parameters=Parameters.from_bytes(bytes.fromhex(content["parameters"])),
            clients=content["clients"],
            secrets=pairs,
            **{name: base64.b64decode(content[name]) for name in _BYTES},
        )


_BYTES = ("key_id", "public", "secret", "weight_secret", "link_key")
