"""Who gets which training examples: iid, Dirichlet by label, by shards of sorted labels; all from the run's seed."""

import tempfile
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from privacy.refused import Refused
from scenarios.numbered import ByName, Numbered
from scenarios.seeds import derive

Indices = NDArray[np.int64]

_LARGE = 1 << 26


class Parts(ByName[Indices]):
    """The examples of every client, ascending, by its name: slices of one array."""

    def __init__(self, owners: Indices, clients: int) -> None:
        """owners: (N,) the client, by number, that holds each example."""
        self.sizes = np.bincount(owners, minlength=clients)
        """(C,) examples of each client."""
        self._order, self._ends = _kept(np.argsort(owners, kind="stable")), np.cumsum(self.sizes)
        self.names = Numbered(clients)

    def value(self, at: int) -> Indices:
        return self._order[self._ends[at] - self.sizes[at] : self._ends[at]]

    def of(self, names: Sequence[str]) -> Indices:
        """The examples of these clients, one client's after another's."""
        return np.concatenate([self[name] for name in names])


def split(labels: NDArray[np.int64], clients: int, how: str, seed: int, least: int = 1) -> Parts:
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
    parts = Parts(PARTITIONS[kind](labels, clients, value, rng, least), clients)
    if (fewest := parts.sizes.min()) < least:
        raise Refused(f"partition {how} leaves a client {fewest} examples, {least} are needed: lower fleet.clients")
    return parts


def _iid(labels: NDArray[np.int64], clients: int, value: float | None, rng: np.random.Generator, least: int) -> Indices:
    if value is not None:
        raise Refused(f"partition iid takes no number, {value:g} came: write partition=iid")
    return _dealt(rng.permutation(len(labels)), np.arange(clients))


def _dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float | None, rng: np.random.Generator, least: int
) -> Indices:
    if alpha is None or not 0 < alpha <= 1e9:  # far beyond, numpy draws zeros only
        raise Refused("partition dirichlet needs a concentration above 0 and up to 1e9, as in dirichlet:0.3")
    owners = np.empty(len(labels), np.int64)
    for _ in range(1_000):
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)).astype(np.int64)
            owners[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
        if np.bincount(owners, minlength=clients).min() >= least:
            return owners
    raise Refused(f"no Dirichlet({alpha}) draw in 1,000 gave all {clients} clients {least} examples: raise ALPHA")


def _shards(
    labels: NDArray[np.int64], clients: int, number: float | None, rng: np.random.Generator, least: int
) -> Indices:
    if number is not None and not (number.is_integer() and 1 <= number <= len(labels)):
        raise Refused("partition shards needs a whole number of shards a client, as in shards:2")
    each = 2 if number is None else int(number)
    holders = np.empty(clients * each, np.int64)
    holders[rng.permutation(clients * each)] = np.repeat(np.arange(clients), each)
    return _dealt(np.argsort(labels, kind="stable"), holders)


def _dealt(order: Indices, holders: Indices) -> Indices:
    """(N,) the owner of every example where `order` (N,) is cut into equal parts, longer ones first, for `holders`."""
    each, longer = divmod(len(order), len(holders))
    owners = np.empty(len(order), np.int64)
    owners[order] = np.repeat(holders, each + (np.arange(len(holders)) < longer))
    return owners


def _kept(indices: Indices) -> Indices:
    """In a file without a name where they are many: the system keeps in memory what is in use."""
    if indices.nbytes < _LARGE:
        return indices
    with tempfile.TemporaryFile(prefix="umbel-partition-") as file:
        kept: Indices = np.memmap(file, np.int64, "w+", shape=indices.shape)
    kept[:] = indices
    return kept


PARTITIONS: dict[str, Callable[[NDArray[np.int64], int, float | None, np.random.Generator, int], Indices]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
}
