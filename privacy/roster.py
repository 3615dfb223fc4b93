"""Roster: who takes part in an attempt with which keys, as the server and every client check it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256

from privacy import frames, neighbours, pads
from privacy.frames import NAME, SIGNATURE, Attempt, Rules, Stage
from privacy.neighbours import Degree, Graph

KEYS = 4 * 32
_ENTRY = NAME + KEYS + SIGNATURE


@dataclass(frozen=True)
class Advert:
    """What a client shows at first, signed with its identity key."""

    name: str
    nonce: bytes  # a commitment to its part of the graph's seed
    mask_key: bytes  # X25519, for pairwise masks; its secret half is shared out
    share_key: bytes  # X25519, for shares on their way through the server
    self_mask: bytes  # a commitment to the seed of its self-mask
    signature: bytes

    @property
    def body(self) -> bytes:
        return self.nonce + self.mask_key + self.share_key + self.self_mask


@dataclass(frozen=True, repr=False)
class Secrets:
    """What stands behind an advert, for its client's eyes alone; 32 bytes each."""

    nonce: bytes
    self_seed: bytes
    mask_key: bytes
    share_key: bytes

    def shown(self, attempt: Attempt, name: str) -> bytes:
        """The advert's body, as `read_advert` reads it."""
        nonce = frames.commit("nonce", attempt, frames.padded(name), self.nonce)
        seed = frames.commit("self seed", attempt, frames.padded(name), self.self_seed)
        return nonce + pads.public(self.mask_key) + pads.public(self.share_key) + seed


@lru_cache(maxsize=1024)  # a client meets each of them at every stage, and simulated ones all meet the same
def read_advert(data: bytes, attempt: Attempt, name: str, identity: bytes) -> Advert:
    """The advert in a client's answer; ValueError says why it is none."""
    body = frames.read(data, attempt, Stage.ADVERTISE, name, identity, KEYS)
    nonce, mask_key, share_key, self_mask = frames.slots(body, 32)
    return Advert(name, nonce, mask_key, share_key, self_mask, data[-SIGNATURE:])


def write_roster(adverts: Sequence[Advert]) -> bytes:
    """All adverts, by name."""
    return len(adverts).to_bytes(4, "big") + b"".join(frames.padded(a.name) + a.body + a.signature for a in adverts)


def read_roster(body: bytes, attempt: Attempt, identities: Mapping[str, bytes]) -> tuple[Advert, ...]:
    """The adverts in a roster: known names in ascending order, each signed; ValueError names who is not."""
    count = int.from_bytes(body[:4], "big")
    if len(body) != 4 + count * _ENTRY or count > len(identities):
        raise ValueError(f"a roster of {len(body)} bytes for {count} of {len(identities)} known clients")
    adverts: list[Advert] = []
    for entry in frames.slots(body[4:], _ENTRY):
        try:
            name = entry[:NAME].rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ValueError("a name in the roster is no text") from error
        if name not in identities or frames.padded(name) != entry[:NAME]:
            raise ValueError(f"{name!r} in the roster is unknown here")
        if adverts and name <= adverts[-1].name:
            raise ValueError(f"{name} is out of order in the roster")
        frame = frames.header(attempt, Stage.ADVERTISE, name) + entry[NAME:]
        try:
            adverts.append(read_advert(frame, attempt, name, identities[name]))
        except ValueError as error:
            raise ValueError(f"the keys of {name} in the roster: {error}") from error
    return tuple(adverts)


@dataclass(frozen=True)
class View:
    """The cohort of an attempt as one party sees it; those whose `digest` is the same see the same."""

    attempt: Attempt
    adverts: tuple[Advert, ...]
    degree: Degree
    edges: Graph
    digest: bytes

    @cached_property
    def number(self) -> dict[str, int]:
        """Each name's number."""
        return {advert.name: i for i, advert in enumerate(self.adverts)}

    @property
    def size(self) -> int:
        return len(self.adverts)


def degree(clients: int, rules: Rules) -> Degree:
    """What a cohort of so many needs under these rules. Raises ValueError below the minimum."""
    if clients < rules.minimum:
        raise ValueError(f"{clients} clients take part, {rules.minimum} are the minimum")
    return neighbours.degree(clients, rules.dropout, rules.failure, rules.colluding)


def complete(clients: int, rules: Rules) -> bool:
    """Whether all are neighbours of all, so that there is no graph to draw."""
    return degree(clients, rules).neighbours == clients - 1


def view(attempt: Attempt, rules: Rules, adverts: Sequence[Advert], nonces: Mapping[int, bytes] | None) -> View:
    """The cohort of those in the roster who revealed their nonces, by number; None where all are neighbours of all.

    The seed of the graph is the hash of the roster and the nonces: nobody knew it when the nonces were committed to.
    Raises ValueError for a nonce that is not the one committed to, or too few.
    """
    if nonces is None and not complete(len(adverts), rules):
        raise ValueError("nobody has revealed a nonce, and a graph has to be drawn")
    for i, nonce in (nonces or {}).items():
        check_nonce(attempt, adverts[i], nonce)
    members = tuple(adverts if nonces is None else (adverts[i] for i in sorted(nonces)))
    needs = degree(len(members), rules)
    revealed = b"" if nonces is None else b"".join(i.to_bytes(4, "big") + nonces[i] for i in sorted(nonces))
    digest = frames.commit("view", attempt, sha256(write_roster(adverts)).digest(), sha256(revealed).digest())
    return View(attempt, members, needs, neighbours.graph(len(members), needs.neighbours, digest), digest)


def check_nonce(attempt: Attempt, advert: Advert, nonce: bytes) -> None:
    """Raise ValueError where this is not the nonce that a client committed to."""
    if frames.commit("nonce", attempt, frames.padded(advert.name), nonce) != advert.nonce:
        raise ValueError(f"{advert.name} committed to another nonce")


def write_nonces(nonces: Mapping[int, bytes], clients: int) -> bytes:
    """Who revealed, and what."""
    return frames.bits(nonces, clients) + frames.table([nonces.get(i) for i in range(clients)], 32)


def read_nonces(body: bytes, clients: int) -> dict[int, bytes]:
    """The nonces by number; ValueError where the bytes are not those of `write_nonces`."""
    who, table = frames.parts(body, frames.bits_size(clients), 32 * clients)
    revealed = frames.numbers(who, clients)
    rows = frames.slots(table, 32)
    if any(any(row) for i, row in enumerate(rows) if i not in revealed):
        raise ValueError("a nonce of nobody")
    return {i: rows[i] for i in sorted(revealed)}
