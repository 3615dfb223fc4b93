"""Masked sums: the server's half of privacy/masks.py, one attempt at a sum from the first request to its values."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from privacy import agreement, dealing, frames, packing, pads, roster, vectors
from privacy.agreement import Numbers, Sharers
from privacy.dealing import DEALT, GIVEN, KEY, NOTHING, SELF, Lost
from privacy.frames import SIGNATURE, Attempt, Rules, Stage
from privacy.packing import Integers
from privacy.roster import Advert, View

_Requests = tuple[Stage, dict[str, bytes]]


@dataclass(frozen=True)
class Sum:
    """What the server learns."""

    values: Integers  # (entries,), modulo 2^width
    survivors: tuple[str, ...]  # whose vectors are in it


class Server:
    """One attempt at a sum. While `ask` gives requests: send them, `hear` what comes, ask again; then `result`."""

    def __init__(self, attempt: Attempt, rules: Rules, identities: Mapping[str, bytes], cohort: Sequence[str]) -> None:
        """identities: the Ed25519 public keys, by name, of at least the cohort; cohort: whom to ask."""
        self.stage: Stage | None = None  # what was asked last
        self._attempt, self._rules = attempt, rules
        self._identities = {name: identities[name] for name in cohort}
        self._asked: frozenset[str] = frozenset()
        self._heard: dict[str, bytes] = {}  # at this stage: who, and the hash of what
        self._adverts: dict[str, Advert] = {}
        self._nonces: dict[str, bytes] = {}
        self._view: View
        self._dealt: dict[int, dict[int, bytes]] = {}  # slots by dealer, then by holder
        self._sharers: Sharers
        self._total = np.zeros(rules.entries, np.uint64)
        self._vectors: dict[int, bytes] = {}  # who survived: their signatures of who shared
        self._signed: dict[int, bytes] = {}  # signatures of who survived
        self._given: dict[int, dict[int, bytes]] = {}  # slots by holder, then by dealer

    def ask(self) -> dict[str, bytes]:
        """End this stage with those heard: the requests of the next, by name; none when the sum is there to be read.

        Sent again, a request gets the same answer. Raises Lost where too few were heard to go on.
        """
        follow: dict[Stage | None, Callable[[], _Requests | None]] = {
            None: lambda: (Stage.ADVERTISE, dict.fromkeys(self._identities, b"")),
            Stage.ADVERTISE: self._after_adverts,
            Stage.REVEAL: self._after_nonces,
            Stage.SHARE: self._after_shares,
            Stage.MASK: self._after_vectors,
            Stage.SIGN: self._after_signatures,
            Stage.UNMASK: lambda: None,
        }
        try:
            following = follow[self.stage]()
        except ValueError as error:
            raise Lost(f"{self._attempt}: {error}") from error
        if following is None:
            return {}
        self.stage, bodies = following
        self._heard, self._asked = {}, frozenset(bodies)
        return {name: frames.write(self._attempt, self.stage, body) for name, body in bodies.items()}

    def hear(self, name: str, data: bytes) -> None:
        """Take one client's answer. ValueError names it and says what is wrong; then nothing has been taken.

        The same answer again changes nothing.
        """
        digest = hashlib.sha256(data).digest()
        if self.stage is None or name not in self._asked:
            raise ValueError(f"{name[: frames.NAME]!r} was not asked")
        if name in self._heard:
            if self._heard[name] == digest:
                return
            raise ValueError(f"{name} answered twice, and not the same, at {self.stage.name.lower()}")
        take: dict[Stage, Callable[[str, bytes], None]] = {
            Stage.ADVERTISE: self._advertised,
            Stage.REVEAL: self._revealed,
            Stage.SHARE: self._shared,
            Stage.MASK: self._masked,
            Stage.SIGN: self._survivors_signed,
            Stage.UNMASK: self._unmasked,
        }
        try:
            take[self.stage](name, data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self._heard[name] = digest

    def _read(self, name: str, data: bytes, stage: Stage, size: int) -> bytes:
        return frames.read(data, self._attempt, stage, name, self._identities[name], size)

    def _rows(self, name: str, data: bytes, stage: Stage, size: int) -> tuple[int, dict[int, bytes]]:
        """A client's number and its table: a slot of `size` bytes for each neighbour."""
        me = self._view.number[name]
        table = self._read(name, data, stage, self._view.degree.neighbours * size)
        return me, dict(zip(self._view.edges[me], frames.slots(table, size), strict=True))

    def _to(self, who: Numbers, body: Callable[[int], bytes]) -> dict[str, bytes]:
        return {self._view.adverts[i].name: body(i) for i in sorted(who)}

    def _advertised(self, name: str, data: bytes) -> None:
        advert = roster.read_advert(data, self._attempt, name, self._identities[name])
        for key in (advert.mask_key, advert.share_key):
            pads.agree(bytes(32), key, b"")  # refuses keys of low order, which would stop its neighbours
        self._adverts[name] = advert

    def _after_adverts(self) -> _Requests:
        self._adverts = dict(sorted(self._adverts.items()))
        adverts = list(self._adverts.values())
        drawn = not roster.complete(len(adverts), self._rules)
        if not drawn:
            self._view = roster.view(self._attempt, self._rules, adverts, None)
        return Stage.REVEAL if drawn else Stage.SHARE, dict.fromkeys(self._adverts, roster.write_roster(adverts))

    def _revealed(self, name: str, data: bytes) -> None:
        nonce = self._read(name, data, Stage.REVEAL, 32)
        roster.check_nonce(self._attempt, self._adverts[name], nonce)
        self._nonces[name] = nonce

    def _after_nonces(self) -> _Requests:
        nonces = {i: self._nonces[name] for i, name in enumerate(self._adverts) if name in self._nonces}
        self._view = roster.view(self._attempt, self._rules, list(self._adverts.values()), nonces)
        return Stage.SHARE, dict.fromkeys(self._view.number, roster.write_nonces(nonces, len(self._adverts)))

    def _shared(self, name: str, data: bytes) -> None:
        me, rows = self._rows(name, data, Stage.SHARE, DEALT)
        self._dealt[me] = rows

    def _after_shares(self) -> _Requests:
        self._sharers = sharers = agreement.settled(self._view, frozenset(self._dealt), self._rules.minimum)
        return Stage.MASK, self._to(sharers.who, lambda i: agreement.show_sharers(sharers, self._dealt, i))

    def _masked(self, name: str, data: bytes) -> None:
        body = self._read(name, data, Stage.MASK, SIGNATURE + packing.size(self._rules.entries, self._rules.width))
        signature, vector = body[:SIGNATURE], body[SIGNATURE:]
        if not frames.verified(self._identities[name], signature, self._sharers.statement(name)):
            raise ValueError("has not signed who shared")
        self._total += packing.unpack(vector, self._rules.entries, self._rules.width)
        self._vectors[self._view.number[name]] = signature

    def _after_vectors(self) -> _Requests:
        survivors = frozenset(self._vectors)
        self._sharers.check(self._rules, survivors)
        return Stage.SIGN, self._to(survivors, lambda i: agreement.show_survivors(self._sharers, self._vectors, i))

    def _survivors_signed(self, name: str, data: bytes) -> None:
        signature = self._read(name, data, Stage.SIGN, SIGNATURE)
        said = self._sharers.survived(name, frozenset(self._vectors))
        if not frames.verified(self._identities[name], signature, said):
            raise ValueError("has not signed who survived")
        self._signed[self._view.number[name]] = signature

    def _after_signatures(self) -> _Requests:
        body = agreement.show_quorum(self._sharers, self._signed)
        return Stage.UNMASK, self._to(frozenset(self._signed), lambda i: body)

    def _unmasked(self, name: str, data: bytes) -> None:
        me, given = self._rows(name, data, Stage.UNMASK, GIVEN)
        for dealer, slot in given.items():
            kind = self._kind(dealer)
            dealing.check(self._view, me, dealer, None if kind == NOTHING else self._dealt[dealer][me], kind, slot)
        self._given[me] = given

    def _kind(self, dealer: int) -> int:
        """Which of a client's secrets is to be unmasked."""
        if dealer not in self._sharers.who:
            return NOTHING
        return SELF if dealer in self._vectors else KEY

    def result(self) -> Sum:
        """The exact sum of the survivors' vectors. Raises Lost where shares lack or a secret is not one's own."""
        if self.stage is not Stage.UNMASK:
            raise ValueError("the sum is not unmasked yet")
        secrets = {dealer: self._secret(dealer) for dealer in sorted(self._sharers.who)}
        survivors = frozenset(self._vectors)
        values = vectors.unmask(self._sharers, self._rules, survivors, secrets, self._total)
        return Sum(values, tuple(self._view.adverts[i].name for i in sorted(survivors)))

    def _secret(self, dealer: int) -> bytes:
        given = {i: self._given[i][dealer] for i in self._view.edges[dealer] if i in self._given}
        return dealing.recover(self._view, dealer, self._kind(dealer), given)
