"""SpentFile: what every client of a large fleet has spent, on disk; a commit writes the rows that its round changed.

The checkpoint of a large fleet holds the rows that changed. They are put into this file once the checkpoint has
replaced the last one, and are on disk before the next one does: whenever a crash comes, the checkpoint's rows over this
file are what was committed. A smaller fleet whose clients have numbers has no such file: its checkpoint holds all rows.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.durable import sync_folder
from scenarios.numbered import Names, Numbered
from server.spendings import ROW, Places, Spendings
from server.state import Spent

LISTED = 10_000
"""Most clients that a file of a run names one by one where what they are can be computed from a number."""

_PLACES, _ROWS = "spent/places", "spent/rows"
Tensors = dict[str, NDArray[Any]]


def large(names: Names) -> bool:
    """Whether these clients are rows of arrays in a run's files, too."""
    return isinstance(names, Numbered) and len(names) > LISTED


class SpentFile:
    """One file, an array of ROW."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: Spendings | None = None  # as the last checkpoint has it

    def changes(self, clients: Mapping[str, Spent]) -> Tensors:
        """What the next checkpoint has to hold so that `clients` is committed; empty where they are listed by name."""
        if not (isinstance(clients, Spendings) and isinstance(clients.names, Numbered)):
            return {}
        if not large(clients.names):
            return _held(clients, clients.spent)
        if self._last is None:
            self._last = Spendings(clients.names)
            self._make(len(clients.names))
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        return _held(clients, clients.changed(self._last))

    def settle(self, clients: Mapping[str, Spent], held: Tensors) -> None:
        """The checkpoint with `held` was written: put its rows into the file."""
        if isinstance(clients, Spendings) and large(clients.names):
            self._put(held)
            self._last = clients

    def read(self, names: Names, tensors: Tensors) -> Spendings:
        """What the checkpoint with these tensors committed. Raises ValueError or OSError where the file is no such."""
        if not large(names):
            rows = np.zeros(len(names), ROW)
            _fill(rows, tensors)
            return Spendings(names, rows)
        self._put(tensors)
        self._last = Spendings(names, np.load(self._path, allow_pickle=False))
        return self._last

    def _put(self, tensors: Tensors) -> None:
        rows = np.lib.format.open_memmap(self._path, mode="r+")
        if rows.dtype != ROW or rows.ndim != 1:
            raise ValueError("other rows")
        _fill(rows, tensors)

    def _make(self, clients: int) -> None:
        self._path.parent.mkdir(exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        np.lib.format.open_memmap(partial, "w+", ROW, (clients,))  # a hole: what nobody wrote to takes no room
        partial.replace(self._path)
        sync_folder(self._path.parent)


def _held(clients: Spendings, places: Places) -> Tensors:
    return {_PLACES: places, _ROWS: clients.rows[places].view(np.uint8).reshape(len(places), ROW.itemsize)}


def _fill(rows: NDArray[Any], tensors: Tensors) -> None:
    places, held = tensors[_PLACES], np.ascontiguousarray(tensors[_ROWS]).view(ROW)
    if places.dtype.kind not in "iu" or places.ndim != 1 or held.shape != (len(places), 1) or (places < 0).any():
        raise ValueError("other rows")
    rows[places] = held[:, 0]
