"""Spendings: what every client has spent so far, by name; a row of numbers each."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenarios.numbered import Names
from server.state import Spent

Places = NDArray[np.int64]
"""Indices of clients, in the order of their names."""


ROW = np.dtype([("steps", "<i8"), ("rounds", "<i4"), ("last", "<i4"), ("whole", "<i4")])


class Spendings(Mapping[str, Spent]):
    """By name; who has spent nothing is not in it. 20 bytes a client.

    A value: a round makes another one, which takes the rows over, and this one keeps what stood in those that changed
    (Baker 1991). So a round costs what its cohort costs; to read an old value costs a copy.
    """

    def __init__(self, names: Names, rows: NDArray[Any] | None = None) -> None:
        """rows: (C,) of ROW; None: nobody has spent anything."""
        self.names = names
        self._rows = np.zeros(len(names), ROW) if rows is None else rows
        self._later: tuple[Spendings, Places, NDArray[Any]] | None = None

    @property
    def rows(self) -> NDArray[Any]:
        """(C,) of ROW, for reading alone."""
        newest, undo = self, []
        while newest._later is not None:
            newest, *before = newest._later
            undo.append(before)
        if not undo:
            return self._rows
        rows = newest._rows.copy()
        for places, values in reversed(undo):
            rows[places] = values
        return rows

    def changed(self, since: "Spendings") -> Places:
        """Where rows differ from those of `since`, or may."""
        places, at = [np.empty(0, np.int64)], since
        while at is not self:
            if at._later is None:  # not one that this was made from
                return np.flatnonzero(since.rows != self.rows)
            at, more, _ = at._later
            places.append(more)
        return np.unique(np.concatenate(places))

    def __getitem__(self, name: str) -> Spent:
        spent = Spent(*self.rows[self.names.place(name)].item())
        if spent == Spent():
            raise KeyError(name)
        return spent

    def __iter__(self) -> Iterator[str]:
        return (self.names[at] for at in self.spent.tolist())

    def __len__(self) -> int:
        return len(self.spent)

    @property
    def spent(self) -> Places:
        """Of those who have spent something."""
        return np.flatnonzero(self.rows != np.zeros((), ROW))

    def places(self, names: Iterable[str]) -> Places:
        """Where these clients stand."""
        return np.fromiter(map(self.names.place, names), np.int64)

    def last(self, names: Iterable[str]) -> list[int]:
        """The last round of which the update of each of these clients was part; 0: none."""
        found: list[int] = self.rows["last"][self.places(names)].tolist()
        return found

    def lost(self, at: Places, steps: NDArray[Any], whole: NDArray[Any]) -> "Spendings":
        """With what clients `at` may have released in a round that nobody committed."""
        made = self._handed_over(at)
        made._rows["steps"][at] += steps
        made._rows["whole"][at] += whole
        return made

    def after(self, number: int, paid: Places, steps: NDArray[Any], whole: int, joined: Places) -> "Spendings":
        """After round `number`: clients `paid` have spent `steps`, and so much of their second account; `joined` are
        those whose updates were part of it."""
        made = self._handed_over(np.union1d(paid, joined))
        made._rows["steps"][paid] += steps
        made._rows["rounds"][paid] += 1
        made._rows["whole"][paid] += whole
        made._rows["last"][joined] = number
        return made

    def _handed_over(self, places: Places) -> "Spendings":
        """Another value of the same rows, which differ at `places` from now on."""
        made = Spendings(self.names, self.rows)
        if self._later is None:
            self._later, self._rows = (made, places, self._rows[places]), self._rows[:0]
        return made


def spendings(clients: Mapping[str, Spent], names: Names) -> Spendings:
    """`clients` as rows over all of `names`."""
    if isinstance(clients, Spendings) and clients.names == names:
        return clients
    made = Spendings(names)
    for name, spent in clients.items():
        made.rows[names.place(name)] = spent.steps, spent.rounds, spent.last, spent.whole
    return made


def without_updates(clients: Mapping[str, Spent]) -> Mapping[str, Spent]:
    """As if no update had been part of any round."""
    if not isinstance(clients, Spendings):
        return {name: replace(spent, last=0) for name, spent in clients.items()}
    rows = clients.rows.copy()
    rows["last"] = 0
    return Spendings(clients.names, rows)
