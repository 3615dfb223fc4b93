"""Who gets which training examples: iid, Dirichlet by label, by shards of sorted labels; all from the run's seed."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privacy.refused import Refused
from scenarios.seeds import derive

Indices = NDArray[np.int64]


def split(labels: NDArray[np.int64], clients: int, how: str, seed: int, least: int = 1) -> dict[str, Indices]:
    """Indices into `labels` (N,) for each of `clients` clients, by client name; every example goes to one client.

    how: "iid"; "dirichlet:ALPHA" (each label's examples spread over clients by Dirichlet(ALPHA), Hsu et al. 2019);
    "shards:NUMBER" (sorted by label, NUMBER equal shards a client, McMahan et al. 2017; 2 where no NUMBER is given).
    least: the fewest examples of a client; dirichlet is redrawn until every client has that many.
    Raises Refused when `how` is unknown or the data does not suffice.
    """
    kind, _, argument = how.partition(":")
    if kind not in PARTITIONS:
        raise Refused(f"there is no partition {how!r}: choose one of {', '.join(PARTITIONS)} (as in dirichlet:0.3)")
    if len(labels) < clients * least:
        raise Refused(f"{len(labels)} examples do not give {clients} clients {least} each: lower fleet.clients")
    try:
        value = float(argument) if argument else None
    except ValueError:
        raise Refused(f"partition {how!r}: {argument!r} is no number, write for example {kind}:0.5") from None
    rng = np.random.default_rng(derive(seed, "partition"))
    parts = PARTITIONS[kind](labels, clients, value, rng, least)
    fewest = min(map(len, parts))
    if fewest < least:
        raise Refused(f"partition {how} leaves a client {fewest} examples, {least} are needed: lower fleet.clients")
    width = len(str(clients - 1))
    return {f"client-{i:0{width}}": np.sort(part) for i, part in enumerate(parts)}


def _iid(
    labels: NDArray[np.int64], clients: int, value: float | None, rng: np.random.Generator, least: int
) -> list[Indices]:
    if value is not None:
        raise Refused(f"partition iid takes no number, {value:g} came: write partition=iid")
    return list(np.array_split(rng.permutation(len(labels)), clients))


def _dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float | None, rng: np.random.Generator, least: int
) -> list[Indices]:
    if alpha is None or not 0 < alpha <= 1e9:  # far beyond, numpy draws zeros only
        raise Refused("partition dirichlet needs a concentration above 0 and up to 1e9, as in dirichlet:0.3")
    for _ in range(1_000):
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)).astype(np.int64)
            for part, share in zip(parts, np.split(members, cuts), strict=True):
                part.append(share)
        joined = [np.concatenate(part) for part in parts]
        if min(map(len, joined)) >= least:
            return joined
    raise Refused(f"no Dirichlet({alpha}) draw in 1,000 gave all {clients} clients {least} examples: raise ALPHA")


def _shards(
    labels: NDArray[np.int64], clients: int, number: float | None, rng: np.random.Generator, least: int
) -> list[Indices]:
    if number is not None and not (number.is_integer() and 1 <= number <= len(labels)):
        raise Refused("partition shards needs a whole number of shards a client, as in shards:2")
    each = 2 if number is None else int(number)
    shards = np.array_split(np.argsort(labels, kind="stable"), clients * each)
    order = rng.permutation(len(shards))
    return [np.concatenate([shards[k] for k in order[i * each : (i + 1) * each]]) for i in range(clients)]


PARTITIONS: dict[str, Callable[[NDArray[np.int64], int, float | None, np.random.Generator, int], list[Indices]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
}
