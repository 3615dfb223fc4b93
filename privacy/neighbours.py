"""Neighbours: with how many others a client of a masked sum shares its masks, which ones, and how many must agree.

A client's masks and the shares of its secrets go to k neighbours instead of to everybody (Bell et al. 2020, "Secure
Single-Server Aggregation with (Poly)Logarithmic Overhead", section 3): the k nearest on a ring in random order, a
Harary graph, so that the neighbours of one client are a uniform sample of the others.

The threshold t of k shares is above k/2: below it a server gets one secret of a client from some of its neighbours
and the other one from the rest. Two sides bound k, each by the tail of a hypergeometric law and a union bound over n
clients:

- Correct: if a share `dropout` of all drops, the chance that any client keeps fewer than t neighbours is at most
  `failure`: n P[Hyp(n - 1, n - 1 - floor(n dropout), k) < t].
- Secure: if a share `colluding` of all clients tells the server everything, the chance that any other client has t or
  more of those for neighbours is at most 2^-40 after the server has tried 2^64 graphs (it can try: it may drop
  clients once it has seen their part of the seed): n P[Hyp(n - 1, floor(n colluding), k) >= t] <= 2^-104. Fewer than
  t colluding clients in all are harmless in every graph.

And no two lists of survivors can both find a quorum above (n + colluding clients) / 2, as two such quorums have an
honest client in common (Bonawitz et al. 2017, section 6). All is exact in integers, so that every machine finds the
same k.

Up to 64 clients all are neighbours: 63 masks cost less than the stage that draws a graph together.
"""

from collections.abc import Set
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from hashlib import sha256
from math import comb

THIRD = Fraction(1, 3)
TENTH = Fraction(1, 10)
THOUSANDTH = Fraction(1, 1000)
_ALL = 64
_INSECURE = Fraction(1, 2 ** (40 + 64))

Graph = tuple[tuple[int, ...], ...]  # the neighbours of each client, ascending, by its number


@dataclass(frozen=True)
class Degree:
    """What a cohort needs."""

    neighbours: int  # k
    threshold: int  # t, of k shares
    quorum: int  # signatures on one list of survivors


@cache
def degree(
    clients: int, dropout: Fraction = THIRD, failure: Fraction = THOUSANDTH, colluding: Fraction = Fraction(0)
) -> Degree:
    """The fewest neighbours that are enough for `clients` (at least 2); all of them where no fewer are.

    Raises ValueError where even all of them, or all signatures, would not stand `colluding` and `dropout` together.
    """
    if clients < 2:
        raise ValueError(f"{clients} clients: it takes two to share a mask")
    dropped, liars = int(clients * dropout), int(clients * colluding)
    quorum = (clients + liars) // 2 + 1
    if liars and quorum > clients - dropped:
        raise ValueError(f"{liars} colluding of {clients} clients take a quorum of {quorum}, and {dropped} may drop")
    for k in range(2 if clients > _ALL else clients - 1, clients):  # two already make a ring
        if clients * k % 2:
            continue  # no graph has an odd sum of degrees
        threshold = _threshold(clients, k, liars)
        fails = clients * _below(clients - 1, clients - 1 - dropped, k, threshold)
        if fails <= failure or (k == clients - 1 and not liars):
            break
    else:
        raise ValueError(
            f"{liars} colluding and {dropped} dropped of {clients} clients leave no threshold between them"
        )
    return Degree(k, threshold, quorum)


def graph(clients: int, neighbours: int, seed: bytes) -> Graph:
    """The k-regular graph of `seed`: its hash of each number puts the clients in a ring, each knows the k nearest.

    An odd k takes the one opposite. Raises ValueError where there is no such graph.
    """
    if clients * neighbours % 2 or not 0 < neighbours < clients:
        raise ValueError(f"no graph of {clients} clients gives each {neighbours} neighbours")
    ring = sorted(range(clients), key=lambda i: sha256(b"umbel masks: ring" + seed + i.to_bytes(4, "big")).digest())
    steps = [s for step in range(1, neighbours // 2 + 1) for s in (step, -step)] + [clients // 2] * (neighbours % 2)
    found: list[tuple[int, ...]] = [()] * clients
    for place, client in enumerate(ring):
        found[client] = tuple(sorted(ring[(place + step) % clients] for step in steps))
    return tuple(found)


def connected(edges: Graph, among: Set[int]) -> bool:
    """Whether the clients `among` hang together without the others: if not, their sum would come apart into several."""
    if not among:
        return False
    reached = {next(iter(among))}
    border = list(reached)
    while border:
        new = among & set(edges[border.pop()]) - reached
        reached |= new
        border.extend(new)
    return len(reached) == len(among)


def _threshold(clients: int, k: int, liars: int) -> int:
    """The least t above k/2 that the colluding neighbours of no client reach."""
    ways, t = 0, min(k, liars) + 1
    limit = _INSECURE * comb(clients - 1, k) / clients
    while t > k // 2 + 1 and (ways := ways + comb(liars, t - 1) * comb(clients - 1 - liars, k - t + 1)) <= limit:
        t -= 1
    return max(t, k // 2 + 1)


def _below(population: int, good: int, drawn: int, t: int) -> Fraction:
    """P[X < t] for X, the good ones among `drawn` of a population without replacement. Exact."""
    ways = sum(comb(good, x) * comb(population - good, drawn - x) for x in range(min(t, good + 1, drawn + 1)))
    return Fraction(ways, comb(population, drawn))
