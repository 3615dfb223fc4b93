"""What a server asks of a key holder, wherever that is: requests and answers as bytes, the server's half and its own.

A message is a list of parts, each with its length before it; the first is a JSON object, what follows are bytes as they
are. The server is no friend of the key holder's: `answer` reads whatever comes, and never raises.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from privacy.bfv import Parameters
from privacy.integers import Grid, Integers
from privacy.refused import Refused

if TYPE_CHECKING:
    from privacy.cohort_noise import CohortNoise
    from privacy.keyholder import KeyHolder, Publish

_LENGTH = struct.Struct("<I")


class Unreachable(RuntimeError):
    """A key holder that gave no answer, or none that can be one. The message says what is known."""


@dataclass(frozen=True, repr=False)
class Deal:
    """What the server is given at the start of a run."""

    key_id: bytes
    public: bytes
    """To be passed on to every client: the public key; empty in `shared`."""
    letters: Mapping[str, bytes]
    """To be passed on, client by client; the server can change none, nor the public key."""
    mac_keys: Mapping[str, bytes]
    """With which it checks who sent what."""
    link_key: bytes
    """With which it seals aggregates."""
    recipients: Mapping[str, str]
    """X25519 public keys of the clients in hex, as the key holder knows them."""
    minimum: int
    """Fewest clients in a sum that it opens."""
    identity: bytes
    """The key holder's raw Ed25519 public key, with which it signs what it publishes."""
    noise: Mapping[str, float] | None = None
    """The fields of the `CohortNoise` that it puts on every sum; None: it publishes sums as they are."""


@dataclass(frozen=True)
class Opened:
    """The one answer of a round."""

    roster: tuple[str, ...]
    """Whose sum it is, sorted."""
    shown: bytes
    """The hash of what these clients were shown."""
    published: bytes
    signature: bytes
    """The key holder's, of all this for its run and round."""

    def statement(self, run: str, round: int) -> bytes:
        """What is signed."""
        said = json.dumps([run, round, *self.roster]).encode()
        digests = (hashlib.sha256(part).digest() for part in (said, self.shown, self.published))
        return b"umbel opened" + b"".join(digests)


@dataclass(frozen=True)
class Shown:
    """What the server showed to all clients of a round, as far as it concerns whoever opens their sum."""

    grid: Grid
    view: bytes
    """The hash of the rest: the model, above all."""
    attempt: int
    """The server's, so that what a client made for an earlier one fits no aggregate of this one."""
    minimum: int
    """Fewest clients in the sum, as they were told: where each adds a share of the noise, it is a share for so many."""

    @property
    def hash(self) -> bytes:
        """What goes into the tags: the noise on a sum is for the very grid that its clients rounded and clipped by."""
        said = repr([asdict(self.grid), self.view, self.attempt, self.minimum])
        return hashlib.sha256(b"umbel shown" + said.encode()).digest()


class Holder(Protocol):
    """A key holder as the server sees it. Both raise Refused with its reason, and Unreachable."""

    def deal(self, run: str, rounds: int, parameters: Parameters) -> Deal:
        """`KeyHolder.deal`."""

    def open(
        self, run: str, round: int, roster: Sequence[str], shown: Shown, aggregate: bytes, seed: int | None = None
    ) -> Opened:
        """`KeyHolder.open`: what was published of this round, which may be that of another roster.

        seed: of the noise, where the key holder was told that it may be seeded.
        """


class Remote:
    """The server's half: a `Holder` at the other end of `exchange`, which takes a request and returns its answer."""

    def __init__(self, exchange: Callable[[bytes], bytes]) -> None:
        self._exchange = exchange

    def deal(self, run: str, rounds: int, parameters: Parameters) -> Deal:
        said, parts = self._ask({"do": "deal", "run": run, "rounds": rounds, "parameters": parameters.to_bytes().hex()})
        recipients = said.get("recipients")
        minimum, noise = said.get("minimum"), said.get("noise")
        if type(minimum) is not int or not isinstance(recipients, dict) or len(parts) != 4 + 2 * len(recipients):
            raise Unreachable("the key holder dealt what is no deal")
        if noise is not None and not (isinstance(noise, dict) and all(type(z) in (int, float) for z in noise.values())):
            raise Unreachable("the key holder dealt what is no deal")
        letters = dict(zip(recipients, parts[4::2], strict=True))
        mac_keys = dict(zip(recipients, parts[5::2], strict=True))
        return Deal(parts[0], parts[1], letters, mac_keys, parts[2], recipients, minimum, parts[3], noise)

    def open(
        self, run: str, round: int, roster: Sequence[str], shown: Shown, aggregate: bytes, seed: int | None = None
    ) -> Opened:
        asked = {"do": "open", "run": run, "round": round, "roster": list(roster)}
        asked |= {"grid": asdict(shown.grid), "attempt": shown.attempt, "minimum": shown.minimum, "seed": seed}
        said, parts = self._ask(asked, shown.view, aggregate)
        if not isinstance(said.get("roster"), list) or len(parts) != 3:
            raise Unreachable("the key holder published what is no sum")
        return Opened(tuple(said["roster"]), *parts)

    def _ask(self, fields: Mapping[str, Any], *parts: bytes) -> tuple[dict[str, Any], list[bytes]]:
        try:
            said, answers = unpack(self._exchange(pack(fields, *parts)))
        except ValueError:
            raise Unreachable("the key holder sent what is no answer") from None
        if "refused" in said:
            raise Refused(" ".join(str(said["refused"])[:300].split()))
        return said, answers


def answer(holder: "KeyHolder", request: bytes, noise: "CohortNoise | None" = None, seeded: bool = False) -> bytes:
    """The key holder's half: the answer to any bytes. Never raises: what is refused, or failed, is an answer too.

    noise: what it puts on every sum, once, before anybody else has it. seeded: for tests and replays, no guarantee.
    """
    try:
        asked, parts = unpack(request)
        match asked, parts:
            case {"do": "deal", "run": str(run), "rounds": int(rounds), "parameters": str(parameters)}, []:
                deal = holder.deal(run, rounds, Parameters.from_bytes(bytes.fromhex(parameters)))
                pairs = [part for name in deal.recipients for part in (deal.letters[name], deal.mac_keys[name])]
                said = {"recipients": dict(deal.recipients), "minimum": deal.minimum}
                said |= {"noise": asdict(noise) if noise else None}
                return pack(said, deal.key_id, deal.public, deal.link_key, deal.identity, *pairs)
            case {"do": "open", "run": str(run), "round": int(round), "roster": list(roster)}, [view, aggregate]:
                if not all(isinstance(name, str) for name in roster):
                    raise ValueError("a roster of other things than names")
                shown = Shown(Grid(**asked["grid"]), view, asked["attempt"], asked["minimum"])
                _hold_to(shown, len(roster), noise)
                publish = _noised(noise, shown.grid, asked["seed"] if seeded else None) if noise else None
                holder.open(run, round, roster, aggregate, publish, shown.hash)
                opened = holder.opened(run, round)
                assert opened
                return pack({"roster": opened.roster}, opened.shown, opened.published, opened.signature)
        raise ValueError("neither deal nor open")
    except Refused as error:
        return pack({"refused": str(error)})
    except ValueError as error:
        return pack({"refused": f"the key holder was asked for what it cannot read: {error}"})
    except Exception as error:  # a full disk, for one; its text may name what others need not know
        return pack({"refused": f"the key holder failed with {type(error).__name__}"})


def _hold_to(shown: Shown, clients: int, noise: "CohortNoise | None") -> None:
    """Refuse a sum over fewer than its clients were told, whose shares of the noise are too little, and noise twice."""
    if type(shown.minimum) is not int:
        raise ValueError("a minimum that is no number")
    if clients < shown.minimum:
        raise Refused(f"a sum over {clients} clients stays closed: its clients were told of {shown.minimum} at least")
    if noise and shown.grid.noise:
        raise Refused("the clients noised their integers (privacy.noise=shares): start `umbel keyholder` without noise")


def _noised(noise: "CohortNoise", grid: Grid, seed: int | None) -> "Publish":
    """Publishes total (P,) and votes of a sum with noise on them, float64."""
    from privacy.cohort_noise import generator

    def publish(sums: Integers, roster: Sequence[str]) -> bytes:
        total, weight, votes = grid.read(sums, len(roster))
        if weight != len(roster):
            raise Refused(f"weights add up to {weight:g}, {len(roster)} clients of 1 each were to be summed")
        noisy, votes = noise.noised(total, votes, grid.norm, generator(seed))
        return np.append(noisy, votes).astype("<f8").tobytes()

    return publish


def pack(fields: Mapping[str, Any], *parts: bytes) -> bytes:
    """The message of a JSON object and parts."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in (json.dumps(fields).encode(), *parts))


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The reverse of `pack`. Raises ValueError for what it cannot have made."""
    parts, at = [], 0
    while at < len(data):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(data, at)[0] if start <= len(data) else len(data) + 1
        if at > len(data):
            raise ValueError("a message that was cut off")
        parts.append(data[start:at])
    try:
        fields = json.loads(parts[0]) if parts else None
    except RecursionError:
        raise ValueError("a message that is nested too deep") from None
    if not isinstance(fields, dict):
        raise ValueError("a message without its fields")
    return fields, parts[1:]
