"""Dealing: each client's two secrets in shares, sealed for its neighbours, who give one of them back: both halves.

The secrets are the seed of its self-mask and its mask key. With its shares a client publishes a commitment to each,
so that a holder sees whether what it got is what the server will hold it to, and a share or dealer that lies has a
name.
"""

from collections.abc import Mapping

from privacy import frames, pads, shares
from privacy.frames import commit, padded, statement
from privacy.roster import View

NOTHING, SELF, KEY, SPOILT = range(4)  # what a slot of what is given back holds
_COMMITMENTS = 2 * 32
DEALT = _COMMITMENTS + 2 * shares.SIZE + pads.SEALED  # bytes of a slot of what is dealt
GIVEN = 1 + shares.SIZE
_NAMES = {SELF: "self-mask", KEY: "mask key"}


class Lost(ValueError):
    """An attempt that gives no sum, and why; `offenders` are those known to have lied."""

    def __init__(self, reason: str, offenders: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.offenders = offenders


def deal(view: View, me: int, self_seed: bytes, mask_key: bytes, share_key: bytes) -> bytes:
    """The client's half: a slot for each neighbour, with commitments to its two shares and both shares sealed."""
    places = [holder + 1 for holder in view.edges[me]]
    dealt = [shares.split(secret, view.degree.threshold, places) for secret in (self_seed, mask_key)]
    rows = []
    for holder, *pair in zip(view.edges[me], *dealt, strict=True):
        commitments = _commitments(view, me, holder, *pair)
        key = pads.agree(share_key, view.adverts[holder].share_key, _info(view, me, holder))
        rows.append(commitments + pads.seal(key, b"".join(pair), commitments))
    return b"".join(rows)


def give(view: View, me: int, dealer: int, dealt: bytes, share_key: bytes, kind: int) -> bytes:
    """The client's half: its share of one secret of a neighbour, or that it got none that fits the commitments."""
    commitments, sealed = dealt[:_COMMITMENTS], dealt[_COMMITMENTS:]
    key = pads.agree(share_key, view.adverts[dealer].share_key, _info(view, dealer, me))
    text = pads.unseal(key, sealed, commitments)
    if text is None or commitments != _commitments(view, dealer, me, *(pair := frames.slots(text, shares.SIZE))):
        return bytes([SPOILT]) + bytes(shares.SIZE)
    return bytes([kind]) + pair[kind - SELF]


def check(view: View, holder: int, dealer: int, dealt: bytes | None, kind: int, given: bytes) -> None:
    """The server's half: raise ValueError where a slot given back is not what the dealer has committed to.

    dealt: the dealer's slot for this holder, None with kind NOTHING, where no share is due.
    """
    name, said, share = view.adverts[dealer].name, given[0], given[1:]
    if said not in (kind, SPOILT) or (dealt is None and said != NOTHING):
        raise ValueError(f"a share of {name} that is not due")
    if said in (NOTHING, SPOILT):
        if any(share):
            raise ValueError(f"a share of {name} where it says that there is none")
        return
    due = frames.slots((dealt or b"")[:_COMMITMENTS], 32)[kind - SELF]
    if not shares.valid(share) or _commitment(view, dealer, holder, kind, share) != due:
        raise ValueError(f"not the share that {name} dealt it")


def recover(view: View, dealer: int, kind: int, given: Mapping[int, bytes]) -> bytes:
    """The server's half: one secret of a client from its checked slots, by holder; Lost where it cannot."""
    advert, attempt, threshold = view.adverts[dealer], view.attempt, view.degree.threshold
    good = [holder for holder, slot in given.items() if slot[0] == kind][:threshold]
    if len(good) < threshold:
        spoilt = [view.adverts[holder].name for holder, slot in given.items() if slot[0] == SPOILT]
        why = f"; those dealt to {', '.join(spoilt)} were spoilt, it or they lied" if spoilt else ""
        raise Lost(f"{attempt}: {len(good)} of {threshold} shares of the {_NAMES[kind]} of {advert.name} came{why}")
    secret = shares.join({holder + 1: given[holder][1:] for holder in good})
    if kind == SELF:
        own = commit("self seed", attempt, padded(advert.name), secret) == advert.self_mask
    else:
        own = pads.public(secret) == advert.mask_key
    if not own:
        raise Lost(f"{attempt}: {advert.name} dealt another {_NAMES[kind]} than its own", (advert.name,))
    return secret


def _info(view: View, dealer: int, holder: int) -> bytes:
    return statement("shares", view.attempt, *(padded(view.adverts[i].name) for i in (dealer, holder)))


def _commitments(view: View, dealer: int, holder: int, of_self: bytes, of_key: bytes) -> bytes:
    return _commitment(view, dealer, holder, SELF, of_self) + _commitment(view, dealer, holder, KEY, of_key)


def _commitment(view: View, dealer: int, holder: int, kind: int, share: bytes) -> bytes:
    names = (padded(view.adverts[i].name) for i in (dealer, holder))
    return commit("share", view.attempt, bytes([kind]), *names, share)
