"""Lengths: how many bytes a client of a masked sum sends at each stage; its cohort and the rules fix them."""

from privacy import packing, roster
from privacy.dealing import DEALT, GIVEN
from privacy.frames import HEADER, SIGNATURE, Rules, Stage


def sent(clients: int, rules: Rules) -> dict[Stage, int]:
    """Bytes by stage, for a cohort of `clients` of which nobody dropped before it dealt its shares.

    Raises ValueError for a cohort below the minimum.
    """
    near = roster.degree(clients, rules).neighbours
    bodies = {
        Stage.ADVERTISE: roster.KEYS,
        Stage.SHARE: near * DEALT,
        Stage.MASK: SIGNATURE + packing.size(rules.entries, rules.width),
        Stage.SIGN: SIGNATURE,
        Stage.UNMASK: near * GIVEN,
    }
    if not roster.complete(clients, rules):
        bodies[Stage.REVEAL] = 32
    return {stage: HEADER + bodies[stage] + SIGNATURE for stage in Stage if stage in bodies}
