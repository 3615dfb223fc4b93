"""What a server asks of a key holder, wherever that is: requests and answers as bytes, the server's half and its own.

A message is a list of parts, each with its length before it; the first is a JSON object, what follows are bytes as they
are. The server is no friend of the key holder's: `answer` reads whatever comes, and never raises.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from privacy.bfv import Parameters
from privacy.refused import Refused

if TYPE_CHECKING:
    from privacy.keyholder import KeyHolder

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


@dataclass(frozen=True)
class Opened:
    """The one answer of a round."""

    roster: tuple[str, ...]
    """Whose sum it is, sorted."""
    shown: bytes
    """The hash of what these clients were shown."""
    published: bytes


class Holder(Protocol):
    """A key holder as the server sees it. Both raise Refused with its reason, and Unreachable."""

    def deal(self, run: str, rounds: int, parameters: Parameters) -> Deal:
        """`KeyHolder.deal`."""

    def open(self, run: str, round: int, roster: Sequence[str], shown: bytes, aggregate: bytes) -> Opened:
        """`KeyHolder.open`: what was published of this round, which may be that of another roster."""


class Remote:
    """The server's half: a `Holder` at the other end of `exchange`, which takes a request and returns its answer."""

    def __init__(self, exchange: Callable[[bytes], bytes]) -> None:
        self._exchange = exchange

    def deal(self, run: str, rounds: int, parameters: Parameters) -> Deal:
        said, parts = self._ask({"do": "deal", "run": run, "rounds": rounds, "parameters": parameters.to_bytes().hex()})
        recipients = said.get("recipients")
        minimum = said.get("minimum")
        if type(minimum) is not int or not isinstance(recipients, dict) or len(parts) != 3 + 2 * len(recipients):
            raise Unreachable("the key holder dealt what is no deal")
        letters = dict(zip(recipients, parts[3::2], strict=True))
        mac_keys = dict(zip(recipients, parts[4::2], strict=True))
        return Deal(parts[0], parts[1], letters, mac_keys, parts[2], recipients, minimum)

    def open(self, run: str, round: int, roster: Sequence[str], shown: bytes, aggregate: bytes) -> Opened:
        asked = {"do": "open", "run": run, "round": round, "roster": list(roster)}
        said, parts = self._ask(asked, shown, aggregate)
        if not isinstance(said.get("roster"), list) or len(parts) != 2:
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


def answer(holder: "KeyHolder", request: bytes) -> bytes:
    """The key holder's half: the answer to any bytes. Never raises: what is refused, or failed, is an answer too."""
    try:
        asked, parts = unpack(request)
        match asked, parts:
            case {"do": "deal", "run": str(run), "rounds": int(rounds), "parameters": str(parameters)}, []:
                deal = holder.deal(run, rounds, Parameters.from_bytes(bytes.fromhex(parameters)))
                pairs = [part for name in deal.recipients for part in (deal.letters[name], deal.mac_keys[name])]
                said = {"recipients": dict(deal.recipients), "minimum": deal.minimum}
                return pack(said, deal.key_id, deal.public, deal.link_key, *pairs)
            case {"do": "open", "run": str(run), "round": int(round), "roster": list(roster)}, [shown, aggregate]:
                if not all(isinstance(name, str) for name in roster):
                    raise ValueError("a roster of other things than names")
                holder.open(run, round, roster, aggregate, shown=shown)
                opened = holder.opened(run, round)
                assert opened
                return pack({"roster": opened.roster}, opened.shown, opened.published)
        raise ValueError("neither deal nor open")
    except Refused as error:
        return pack({"refused": str(error)})
    except ValueError as error:
        return pack({"refused": f"the key holder was asked for what it cannot read: {error}"})
    except Exception as error:  # a full disk, for one; its text may name what others need not know
        return pack({"refused": f"the key holder failed with {type(error).__name__}"})


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
