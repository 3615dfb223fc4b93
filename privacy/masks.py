"""Pairwise masks: the server learns the sum of its clients' integer vectors and nothing else: both halves.

The protocol of Bonawitz et al. 2017 ("Practical Secure Aggregation", figure 4) on the graph of Bell et al. 2020.
Every client adds to its vector a pad of its own and one for each neighbour, which that neighbour takes away from its
own vector; all is modulo 2^width. Who survived is put on one list; then the neighbours give shares of the pads that
did not cancel: of a survivor's own one, or of the mask key of a client that dropped. privacy/neighbours.py says how
many neighbours that takes.

Each stage is one message to every client and one back; a device takes seconds for either:

    advertise  <- nothing                           -> X25519 keys, commitments to a self-mask and a nonce
    reveal     <- all adverts                       -> the nonce, for the seed of the graph
    share      <- all nonces                        -> shares of both secrets, sealed for each neighbour
    mask       <- who shared, shares of neighbours  -> the masked vector, a signature of who shared
    sign       <- the survivors, those signatures   -> a signature of the survivors
    unmask     <- a quorum of these                 -> one share for each neighbour

Folded: up to 64 clients there is no graph to draw, the adverts come with `share` and `reveal` falls away; an advert
needs nothing of others and can travel with whatever the client sends before. The rest would be unsound. Shares need
the graph, and the graph all adverts. A vector that travelled with the shares would bear masks of clients whose shares
nobody has, and be lost with the first of them that drops. Shares given before a quorum has signed could be given for
two lists.

Guarantee: let the server deviate at will and learn all that colluding clients know: fewer than t, the threshold,
among the neighbours of each honest client, and too few for two quorums without an honest client in common
(privacy/neighbours.py sees to both for a share `colluding`). Then what they learn of the honest clients' vectors is
sums, each over at least t + 1 - c honest survivors, c being the most colluding neighbours of one. If no client
colludes it is one sum, over at least `minimum` clients, as every client sees that the survivors hang together.
Clients learn of each other who takes part. It rests on X25519, HKDF, ChaCha20-Poly1305, Ed25519, SHA-256 as a random
oracle, and identity keys known out of band. The server picks the cohort: it is the colluding clients in what it
picked that count.

Nothing hides who took part, when and for how long. A client may add any vector modulo 2^width: no range can be
checked under a mask. A vector that goes into two sums is open to their difference. So a client that has unmasked
takes part in no other attempt at that round, and the sums of two attempts differ by t - c honest vectors or more; the
caller must not offer one update in two rounds. Server and clients can make a round fail. No client can change more of
a sum than its own vector: each share and secret is checked against a commitment before use, and the liar is named.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy import agreement, dealing, frames, packing, pads, roster, shares, transcript
from privacy.agreement import Numbers, Sharers
from privacy.dealing import DEALT, GIVEN, KEY, NOTHING, SELF, Lost
from privacy.frames import HEADER, SIGNATURE, Attempt, Rules, Stage, commit, padded, statement
from privacy.packing import Integers
from privacy.roster import Advert, View
from privacy.transcript import Store, Transcript

_Requests = tuple[Stage, dict[str, bytes]]


# ---- What both halves compute ----


def _self_pad(seed: bytes, attempt: Attempt, name: str) -> bytes:
    """The key of a client's own pad."""
    return pads.derive(seed, statement("self mask", attempt, padded(name)))


def _pair_pad(key: bytes, mine: Advert, other: Advert, attempt: Attempt) -> tuple[bytes, int]:
    """The key of the pad between two clients, and whether the first adds it (1) or takes it away (-1)."""
    names = sorted((mine.name, other.name))
    info = statement("pairwise mask", attempt, *map(padded, names))
    return pads.agree(key, other.mask_key, info), 1 if names[0] == mine.name else -1


def _reduced(values: Integers, width: int) -> Integers:
    return values if width == 64 else values & np.uint64((1 << width) - 1)


# ---- The client's half ----


@dataclass(frozen=True)
class Client:
    """A client of one run. It remembers nothing: any process with the same store goes on where another stopped."""

    name: str
    identity: Ed25519PrivateKey
    identities: Mapping[str, bytes]  # the Ed25519 public keys of all clients, known out of band
    run: str
    rules: Rules
    store: Store

    def answer(self, request: bytes, values: Integers | None = None) -> bytes:
        """The answer to the server's request, whatever its stage; it is on disk when this returns.

        values (entries,): the vector, looked at when it is masked for the first time. Raises ValueError with the reason
        for what an honest server does not ask, or not now.
        """
        attempt, stage = frames.addressed(request, frames.run_id(self.run, self.rules))
        with self.store.lock():
            told = Transcript(self.store, attempt)
            if stage is Stage.ADVERTISE:
                told.begin()
            told.current()
            compute: dict[Stage, Callable[[bytes], bytes]] = {
                Stage.ADVERTISE: lambda body: self._advertise(told, body),
                Stage.REVEAL: lambda body: self._reveal(told, body),
                Stage.SHARE: lambda body: self._share(told, body),
                Stage.MASK: lambda body: self._mask(told, body, values),
                Stage.SIGN: lambda body: self._sign(told, body),
                Stage.UNMASK: lambda body: self._unmask(told, body),
            }

            def reply() -> bytes:
                return frames.write(attempt, stage, compute[stage](request[HEADER:]), self.name, self.identity)

            return told.once(stage, request, reply)

    def close(self, ended: int) -> None:
        """Erase the secrets of a round that has ended, well or not; it cannot be gone on with."""
        with self.store.lock():
            transcript.close(self.store, ended)

    def _advertise(self, told: Transcript, body: bytes) -> bytes:
        frames.parts(body)
        told.secrets(lambda: b"".join(shares.draw() for _ in range(4)))
        return self._advert(told)

    def _advert(self, told: Transcript) -> bytes:
        nonce, self_seed, mask_key, share_key = self._secrets(told)
        name = padded(self.name)
        seen = pads.public(mask_key) + pads.public(share_key)
        return commit("nonce", told.attempt, name, nonce) + seen + commit("self seed", told.attempt, name, self_seed)

    @staticmethod
    def _secrets(told: Transcript) -> list[bytes]:
        """Nonce, seed of the self-mask, mask key, share key."""
        return frames.slots(told.secrets(), 32)

    def _roster(self, told: Transcript, body: bytes) -> tuple[Advert, ...]:
        adverts = roster.read_roster(body, told.attempt, self.identities)
        if self._advert(told) not in [advert.body for advert in adverts if advert.name == self.name]:
            raise ValueError(f"the roster does not show the keys of {self.name}")
        return adverts

    def _reveal(self, told: Transcript, body: bytes) -> bytes:
        if roster.complete(len(self._roster(told, body)), self.rules):
            raise ValueError("there is no graph to draw: all are neighbours of all")
        return self._secrets(told)[0]

    def _cohort(self, told: Transcript, body: bytes) -> tuple[View, int]:
        """What a request for shares shows: the cohort, and this client's number in it."""
        revealed, nonces = told.asked(Stage.REVEAL), None
        adverts = self._roster(told, body if revealed is None else revealed[HEADER:])
        if revealed is not None:
            nonces = roster.read_nonces(body, len(adverts))
        view = roster.view(told.attempt, self.rules, adverts, nonces)
        if self.name not in view.number:
            raise ValueError(f"the nonce of {self.name} is left out")
        return view, view.number[self.name]

    def _share(self, told: Transcript, body: bytes) -> bytes:
        return dealing.deal(*self._cohort(told, body), *self._secrets(told)[1:])

    def _shared(self, told: Transcript, body: bytes) -> tuple[Sharers, int, list[bytes]]:
        """What a request for a vector shows: who shared, this client's number, what its neighbours dealt it."""
        view, me = self._cohort(told, told.must(Stage.SHARE)[HEADER:])
        who, table = frames.parts(body, frames.bits_size(view.size), view.degree.neighbours * DEALT)
        sharers, rows = Sharers(view, frames.numbers(who, view.size)), frames.slots(table, DEALT)
        if any(any(row) and i not in sharers.who for i, row in zip(view.edges[me], rows, strict=True)):
            raise ValueError("shares of somebody who has not shared")
        if me not in sharers.who:
            raise ValueError(f"{self.name} is not among those who shared")
        if len(sharers.who) < self.rules.minimum or len(sharers.near(me)) < view.degree.threshold:
            raise ValueError(f"too few shared: {len(sharers.who)} in all, {len(sharers.near(me))} neighbours")
        return sharers, me, rows

    def _mask(self, told: Transcript, body: bytes, values: Integers | None) -> bytes:
        width, attempt = self.rules.width, told.attempt
        sharers, me, _ = self._shared(told, body)
        if values is None or values.shape != (self.rules.entries,) or values.dtype != np.uint64:
            raise ValueError(f"a vector of {self.rules.entries} uint64 is to be masked")
        if int(values.max()) >> width:
            raise ValueError(f"a value of {int(values.max())} takes more than {width} bits")
        _, self_seed, mask_key, _ = self._secrets(told)
        total, adverts = pads.zeros(self.rules.entries, width), sharers.view.adverts
        pads.add(total, _self_pad(self_seed, attempt, self.name), 1)
        for other in sharers.near(me):
            pads.add(total, *_pair_pad(mask_key, adverts[me], adverts[other], attempt))
        signature = self.identity.sign(sharers.statement(self.name))
        return signature + packing.pack(_reduced(values + total, width), width)

    def _survivors(self, sharers: Sharers, me: int, body: bytes) -> Numbers:
        return agreement.read_survivors(sharers, self.rules, self.identities, me, body)

    def _sign(self, told: Transcript, body: bytes) -> bytes:
        sharers, me, _ = self._shared(told, told.must(Stage.MASK)[HEADER:])
        return self.identity.sign(sharers.survived(self.name, self._survivors(sharers, me, body)))

    def _unmask(self, told: Transcript, body: bytes) -> bytes:
        sharers, me, rows = self._shared(told, told.must(Stage.MASK)[HEADER:])
        survivors = self._survivors(sharers, me, told.must(Stage.SIGN)[HEADER:])
        agreement.check_quorum(sharers, survivors, self.identities, body)
        share_key = self._secrets(told)[3]

        def given(dealer: int, row: bytes) -> bytes:
            if dealer not in sharers.who:
                return bytes(GIVEN)
            return dealing.give(sharers.view, me, dealer, row, share_key, SELF if dealer in survivors else KEY)

        return b"".join(map(given, sharers.view.edges[me], rows))


# ---- The server's half ----


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
        sharers = Sharers(self._view, frozenset(self._dealt))
        while alone := {i for i in sharers.who if len(sharers.near(i)) < self._view.degree.threshold}:
            sharers = Sharers(self._view, sharers.who - alone)  # their masks could not be taken away again
        if len(sharers.who) < self._rules.minimum:
            raise ValueError(f"{len(sharers.who)} shared with enough others, {self._rules.minimum} are the minimum")
        self._sharers, bits = sharers, frames.bits(sharers.who, self._view.size)

        def body(me: int) -> bytes:
            rows = [self._dealt[i][me] if i in sharers.who else None for i in self._view.edges[me]]
            return bits + frames.table(rows, DEALT)

        return Stage.MASK, self._to(sharers.who, body)

    def _masked(self, name: str, data: bytes) -> None:
        width, entries = self._rules.width, self._rules.entries
        body = self._read(name, data, Stage.MASK, SIGNATURE + packing.size(entries, width))
        signature, vector = body[:SIGNATURE], body[SIGNATURE:]
        if not frames.verified(self._identities[name], signature, self._sharers.statement(name)):
            raise ValueError("has not signed who shared")
        self._total += packing.unpack(vector, entries, width)
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
        masks, adverts = pads.zeros(self._rules.entries, self._rules.width), self._view.adverts
        for dealer in sorted(self._sharers.who):
            given = {i: self._given[i][dealer] for i in self._view.edges[dealer] if i in self._given}
            secret = dealing.recover(self._view, dealer, self._kind(dealer), given)
            if dealer in self._vectors:
                pads.add(masks, _self_pad(secret, self._attempt, adverts[dealer].name), 1)
                continue
            for other in self._sharers.near(dealer) & self._vectors.keys():  # what these added for one who never did
                key, sign = _pair_pad(secret, adverts[dealer], adverts[other], self._attempt)
                pads.add(masks, key, -sign)
        names = tuple(adverts[i].name for i in sorted(self._vectors))
        return Sum(_reduced(self._total - masks, self._rules.width), names)
