"""Vectors: the pads that a client adds to its integers, and those that do not cancel in the sum: both halves."""

from collections.abc import Mapping

import numpy as np

from privacy import packing, pads
from privacy.agreement import Numbers, Sharers
from privacy.frames import Attempt, Rules, padded, statement
from privacy.packing import Integers
from privacy.roster import Advert


def mask(sharers: Sharers, rules: Rules, me: int, self_seed: bytes, mask_key: bytes, values: Integers) -> bytes:
    """The client's half: values (entries,) under its own pad and one with each neighbour who shared, packed.

    Raises ValueError for values that the rules do not allow.
    """
    if values.shape != (rules.entries,) or values.dtype != np.uint64:
        raise ValueError(f"a vector of {rules.entries} uint64 is to be masked")
    if int(values.max()) >> rules.width:
        raise ValueError(f"a value of {int(values.max())} takes more than {rules.width} bits")
    total, adverts, attempt = pads.zeros(rules.entries, rules.width), sharers.view.adverts, sharers.view.attempt
    pads.add(total, _own(self_seed, attempt, adverts[me].name), 1)
    for other in sharers.near(me):
        pads.add(total, *_between(mask_key, adverts[me], adverts[other], attempt))
    return packing.pack(_reduced(values + total, rules.width), rules.width)


def unmask(
    sharers: Sharers, rules: Rules, survivors: Numbers, secrets: Mapping[int, bytes], total: Integers
) -> Integers:
    """The server's half: the sum of the survivors' values, from `total`, that of their masked ones; both (entries,).

    secrets: of each who shared, by number: a survivor's seed of its self-mask, the mask key of one that dropped.
    """
    masks, adverts, attempt = pads.zeros(rules.entries, rules.width), sharers.view.adverts, sharers.view.attempt
    for dealer, secret in secrets.items():
        if dealer in survivors:
            pads.add(masks, _own(secret, attempt, adverts[dealer].name), 1)
            continue
        for other in sharers.near(dealer) & survivors:  # what these added for one who never did
            key, sign = _between(secret, adverts[dealer], adverts[other], attempt)
            pads.add(masks, key, -sign)
    return _reduced(total - masks, rules.width)


def _own(seed: bytes, attempt: Attempt, name: str) -> bytes:
    """The key of a client's own pad."""
    return pads.derive(seed, statement("self mask", attempt, padded(name)))


def _between(key: bytes, mine: Advert, other: Advert, attempt: Attempt) -> tuple[bytes, int]:
    """The key of the pad between two clients, and whether the first adds it (1) or takes it away (-1)."""
    names = sorted((mine.name, other.name))
    info = statement("pairwise mask", attempt, *map(padded, names))
    return pads.agree(key, other.mask_key, info), 1 if names[0] == mine.name else -1


def _reduced(values: Integers, width: int) -> Integers:
    return values if width == 64 else values & np.uint64((1 << width) - 1)
