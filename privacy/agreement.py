"""Agreement: one signed list of those who shared, and one of those who survived, before anything is unmasked.

Bonawitz et al. 2017, figure 4, round 3: without it a server could show a client as a survivor to some of its
neighbours and as dropped to others, and get both of its secrets. A signature of who shared goes along, as whose masks
are in a vector depends on it: a neighbour gives nothing for a survivor that was shown others (Bell et al. 2020, the
malicious variant).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from privacy import frames, neighbours
from privacy.dealing import DEALT
from privacy.frames import SIGNATURE, Rules, padded, statement
from privacy.roster import View

Numbers = frozenset[int]


@dataclass(frozen=True)
class Sharers:
    """A cohort, and who of it has dealt shares, by number."""

    view: View
    who: Numbers

    def near(self, i: int) -> Numbers:
        """Those of a client's neighbours who have."""
        return self.who & set(self.view.edges[i])

    def statement(self, name: str) -> bytes:
        """What a client signs with its vector."""
        return statement("sharers", self.view.attempt, padded(name), self.view.digest, self._bits(self.who))

    def survived(self, name: str, survivors: Numbers) -> bytes:
        """What a client signs once it has seen who survived."""
        lists = self._bits(self.who), self._bits(survivors)
        return statement("survivors", self.view.attempt, padded(name), self.view.digest, *lists)

    def check(self, rules: Rules, survivors: Numbers) -> None:
        """Raise ValueError for survivors that an honest server does not show, or that cannot be unmasked."""
        if not survivors <= self.who:
            raise ValueError("survivors who have shared nothing")
        if len(survivors) < rules.minimum:
            raise ValueError(f"{len(survivors)} survivors are below the minimum of {rules.minimum}")
        due = self.view.degree.threshold
        for i in sorted(self.who):
            if (left := len(survivors & set(self.view.edges[i]))) < due:
                raise ValueError(f"{self.view.adverts[i].name} has {left} neighbours left, of {due} due")
        if not neighbours.connected(self.view.edges, survivors):
            raise ValueError("the survivors do not hang together: their sum would come apart into several")

    def _bits(self, who: Numbers) -> bytes:
        return frames.bits(who, self.view.size)


def settled(view: View, dealt: Numbers, minimum: int) -> Sharers:
    """The server's half: those who dealt to enough others who did. Raises ValueError where these are too few."""
    sharers = Sharers(view, dealt)
    while alone := {i for i in sharers.who if len(sharers.near(i)) < view.degree.threshold}:
        sharers = Sharers(view, sharers.who - alone)  # their masks could not be taken away again
    if len(sharers.who) < minimum:
        raise ValueError(f"{len(sharers.who)} shared with enough others, {minimum} are the minimum")
    return sharers


def show_sharers(sharers: Sharers, dealt: Mapping[int, Mapping[int, bytes]], to: int) -> bytes:
    """The server's half: who shared, and what a client's neighbours dealt it. dealt: slots by dealer, then holder."""
    rows = [dealt[i][to] if i in sharers.who else None for i in sharers.view.edges[to]]
    return frames.bits(sharers.who, sharers.view.size) + frames.table(rows, DEALT)


def read_sharers(view: View, rules: Rules, me: int, body: bytes) -> tuple[Sharers, list[bytes]]:
    """The client's half: who shared, and a slot from each neighbour; ValueError where nothing is to be masked."""
    who, table = frames.parts(body, frames.bits_size(view.size), view.degree.neighbours * DEALT)
    sharers, rows = Sharers(view, frames.numbers(who, view.size)), frames.slots(table, DEALT)
    if any(any(row) and i not in sharers.who for i, row in zip(view.edges[me], rows, strict=True)):
        raise ValueError("shares of somebody who has not shared")
    if me not in sharers.who:
        raise ValueError(f"{view.adverts[me].name} is not among those who shared")
    if len(sharers.who) < rules.minimum or len(sharers.near(me)) < view.degree.threshold:
        raise ValueError(f"too few shared: {len(sharers.who)} in all, {len(sharers.near(me))} neighbours")
    return sharers, rows


def show_survivors(sharers: Sharers, signatures: Mapping[int, bytes], to: int) -> bytes:
    """The server's half: the survivors, and the signatures of who shared by those among a client's neighbours."""
    rows = [signatures.get(i) for i in sharers.view.edges[to]]
    return frames.bits(signatures, sharers.view.size) + frames.table(rows, SIGNATURE)


def read_survivors(sharers: Sharers, rules: Rules, identities: Mapping[str, bytes], me: int, body: bytes) -> Numbers:
    """The client's half: the survivors that the server shows; ValueError where they are not to be signed."""
    view = sharers.view
    who, rows = frames.parts(body, frames.bits_size(view.size), view.degree.neighbours * SIGNATURE)
    survivors = frames.numbers(who, view.size)
    sharers.check(rules, survivors)
    if me not in survivors:
        raise ValueError(f"{view.adverts[me].name} is not among the survivors")
    for i, signature in zip(view.edges[me], frames.slots(rows, SIGNATURE), strict=True):
        name = view.adverts[i].name
        if i not in survivors:
            if any(signature):
                raise ValueError(f"a signature of {name}, who did not survive")
        elif not frames.verified(identities[name], signature, sharers.statement(name)):
            raise ValueError(f"{name} has not signed the same sharers: the server shows different ones")
    return survivors


def show_quorum(sharers: Sharers, signatures: Mapping[int, bytes]) -> bytes:
    """The server's half: as many signatures of the survivors as are due. Raises ValueError where there are fewer."""
    due = sharers.view.degree.quorum
    if len(signatures) < due:
        raise ValueError(f"{len(signatures)} have signed who survived, of a quorum of {due}")
    shown = sorted(signatures)[:due]
    return frames.bits(shown, sharers.view.size) + b"".join(signatures[i] for i in shown)


def check_quorum(sharers: Sharers, survivors: Numbers, identities: Mapping[str, bytes], body: bytes) -> None:
    """The client's half: raise ValueError where no quorum has signed these survivors."""
    view = sharers.view
    who, rows = frames.parts(body, frames.bits_size(view.size), view.degree.quorum * SIGNATURE)
    signers = sorted(frames.numbers(who, view.size))
    if len(signers) != view.degree.quorum or not survivors.issuperset(signers):
        raise ValueError(f"{len(signers)} signatures where {view.degree.quorum} of survivors are due")
    for i, signature in zip(signers, frames.slots(rows, SIGNATURE), strict=True):
        name = view.adverts[i].name
        if not frames.verified(identities[name], signature, sharers.survived(name, survivors)):
            raise ValueError(f"{name} has not signed the same survivors: the server shows different ones")
