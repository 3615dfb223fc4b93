"""Pairwise masks: the server learns the sum of its clients' integer vectors and nothing else: the client's half.

The protocol of Bonawitz et al. 2017 ("Practical Secure Aggregation", figure 4) on the graph of Bell et al. 2020.
Every client adds to its vector a pad of its own and one for each neighbour, which that neighbour takes away from its
own vector; all is modulo 2^width. Who survived is put on one list; then the neighbours give shares of the pads that
did not cancel: of a survivor's own one, or of the mask key of a client that dropped. privacy/neighbours.py says how
many neighbours that takes.

Both halves of each step stand side by side in a file of its own: privacy/roster.py, dealing.py, vectors.py and
agreement.py. What walks a client through the stages is here, what walks the server in privacy/masked_sum.py.

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy import agreement, dealing, frames, roster, shares, transcript, vectors
from privacy.agreement import Numbers, Sharers
from privacy.dealing import GIVEN, KEY, SELF
from privacy.frames import HEADER, Rules, Stage
from privacy.packing import Integers
from privacy.roster import Advert, Secrets, View
from privacy.transcript import Store, Transcript


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
        return self._secrets(told).shown(told.attempt, self.name)

    @staticmethod
    def _secrets(told: Transcript) -> Secrets:
        return Secrets(*frames.slots(told.secrets(), 32))

    def _roster(self, told: Transcript, body: bytes) -> tuple[Advert, ...]:
        adverts = roster.read_roster(body, told.attempt, self.identities)
        if self._advert(told) not in [advert.body for advert in adverts if advert.name == self.name]:
            raise ValueError(f"the roster does not show the keys of {self.name}")
        return adverts

    def _reveal(self, told: Transcript, body: bytes) -> bytes:
        if roster.complete(len(self._roster(told, body)), self.rules):
            raise ValueError("there is no graph to draw: all are neighbours of all")
        return self._secrets(told).nonce

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
        mine = self._secrets(told)
        return dealing.deal(*self._cohort(told, body), mine.self_seed, mine.mask_key, mine.share_key)

    def _shared(self, told: Transcript, body: bytes) -> tuple[Sharers, int, list[bytes]]:
        """What a request for a vector shows: who shared, this client's number, what its neighbours dealt it."""
        view, me = self._cohort(told, told.must(Stage.SHARE)[HEADER:])
        sharers, rows = agreement.read_sharers(view, self.rules, me, body)
        return sharers, me, rows

    def _mask(self, told: Transcript, body: bytes, values: Integers | None) -> bytes:
        sharers, me, _ = self._shared(told, body)
        if values is None:
            raise ValueError(f"a vector of {self.rules.entries} uint64 is to be masked")
        mine = self._secrets(told)
        masked = vectors.mask(sharers, self.rules, me, mine.self_seed, mine.mask_key, values)
        return self.identity.sign(sharers.statement(self.name)) + masked

    def _survivors(self, sharers: Sharers, me: int, body: bytes) -> Numbers:
        return agreement.read_survivors(sharers, self.rules, self.identities, me, body)

    def _sign(self, told: Transcript, body: bytes) -> bytes:
        sharers, me, _ = self._shared(told, told.must(Stage.MASK)[HEADER:])
        return self.identity.sign(sharers.survived(self.name, self._survivors(sharers, me, body)))

    def _unmask(self, told: Transcript, body: bytes) -> bytes:
        sharers, me, rows = self._shared(told, told.must(Stage.MASK)[HEADER:])
        survivors = self._survivors(sharers, me, told.must(Stage.SIGN)[HEADER:])
        agreement.check_quorum(sharers, survivors, self.identities, body)
        share_key = self._secrets(told).share_key

        def given(dealer: int, row: bytes) -> bytes:
            if dealer not in sharers.who:
                return bytes(GIVEN)
            return dealing.give(sharers.view, me, dealer, row, share_key, SELF if dealer in survivors else KEY)

        return b"".join(map(given, sharers.view.edges[me], rows))
