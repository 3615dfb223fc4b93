"""start.json: what a run began with; what its clients said, their plans, its settings; of a large fleet as arrays."""

import os
import weakref
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.roster import Roster
from clients.task import Hello
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios.numbered import ByName, Numbered
from scenarios.settings import Settings, knobs
from server.plans import Plans, planned
from server.record import RunFolder
from server.spent_file import large

Start = Mapping[str, Any]
"""start.json as `read` hands it out: of a large fleet with the folder of its arrays."""


def read(folder: RunFolder) -> dict[str, Any] | None:
    """None where the run has not begun."""
    found: dict[str, Any] | None = folder.read_json("start.json")
    if found is not None and "fleet" in found:
        found["arrays"] = folder.fleet
    return found


def write(
    folder: RunFolder,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    server_data: Mapping[str, str],
    settings: Settings,
    ledger: Mapping[str, Any],
) -> Mapping[str, Hello]:
    """Returns the roster; of a large fleet with the digests on disk, where the report will look for them."""
    if isinstance(roster, Roster) and isinstance(roster.names, Numbered) and large(roster.names):
        table = planned(plans, roster.names)
        folder.fleet.mkdir(exist_ok=True)
        _save(folder.fleet, "examples", roster.examples)
        _save(folder.fleet, "digests", np.asarray(roster.digests))
        _save(folder.fleet, "plans", table.which)
        said: dict[str, Any] = {
            "fleet": [roster.names.number, roster.names.digits],
            "clients": {},
            "plans": {},
            "kinds": [asdict(plan) for plan in table.kinds],
        }
        roster = Roster(roster.names, roster.examples, _Kept(folder.fleet / "digests.npy"), roster.able)
    else:
        met = {name: replace(hello, head=None, seen=None) for name, hello in roster.items()}  # how often it was drawn
        said = {
            "clients": {name: asdict(hello) for name, hello in met.items()},
            "plans": {name: asdict(plan) for name, plan in plans.items()},
        }
    told = {"server_data": dict(server_data), "settings": _fixed(settings), "ledger": ledger}
    folder.write_json("start.json", said | told)
    return roster


def plans(start: Start) -> Mapping[str, Plan]:
    """Every client's plan."""
    if "fleet" in start:
        kinds = [_plan(plan) for plan in start["kinds"]]
        return Plans(Numbered(*start["fleet"]), kinds, np.array(_array(start["arrays"], "plans")))
    return {name: _plan(plan) for name, plan in start["plans"].items()}


def sizes(start: Start) -> Mapping[str, int]:
    """Every client's training examples."""
    if "fleet" in start:
        examples = _array(start["arrays"], "examples")
        return ByName(Numbered(*start["fleet"]), lambda at: int(examples[at]))
    return {name: int(said["examples"]) for name, said in start["clients"].items()}


def same_settings(start: Start, settings: Settings) -> None:
    """Refuse a run whose settings are not those that it began with."""
    for name, value in _fixed(settings).items():
        if (before := start["settings"].get(name, value)) != value:
            raise Refused(f"{name} was {before} when the run began, settings.toml says {value}: start a new run")


def met_again(start: Start, roster: Mapping[str, Hello], server_data: Mapping[str, str]) -> Mapping[str, Hello]:
    """The clients of this run among those of `roster`; who came later has no plan.

    Raises Refused where one of them is missing, or it or the server has other data.
    """
    if "fleet" in start:
        roster = _rows_again(start, roster)
    else:
        for name, before in start["clients"].items():
            _same_client(name, before, roster)
        roster = {name: roster[name] for name in sorted(start["clients"])}
    if dict(server_data) != start["server_data"]:
        raise Refused("the server's test or validation data has changed since the run began: start a new run")
    return roster


def _rows_again(start: Start, roster: Mapping[str, Hello]) -> Roster:
    names = Numbered(*start["fleet"])
    if not isinstance(roster, Roster) or roster.names != names:
        raise Refused(f"the {len(names)} clients of this run are not there any more: start a new run")
    before, now = _array(start["arrays"], "digests"), np.asarray(roster.digests)
    if before.shape != now.shape:
        raise Refused(f"{start['arrays'] / 'digests.npy'} is of another fleet: the run cannot go on from it")
    if len(others := np.flatnonzero((before != now).any(axis=1))):
        raise Refused(f"the data of client {names[int(others[0])]} has changed since the run began: start a new run")
    return Roster(names, roster.examples, _Kept(start["arrays"] / "digests.npy"), roster.able)


def _same_client(name: str, before: Mapping[str, Any], roster: Mapping[str, Hello]) -> None:
    if name not in roster:
        raise Refused(f"client {name} of this run is not there any more: start its node, or start a new run")
    if roster[name].digest != before["digest"]:
        raise Refused(f"the data of client {name} has changed since the run began: start a new run")
    if roster[name].identity != before.get("identity", ""):
        raise Refused(
            f"client {name} signs with another key than when the run began: bring back the state folder of its "
            "node, or start a new run"
        )


def _fixed(settings: Settings) -> dict[str, Any]:
    """The settings that a run keeps from its first round to its last: the plans and the account rest on them."""
    values = {name: value for name, value, _ in knobs(settings) if not name.startswith(("run.", "export.", "report."))}
    return {"run.seed": settings.run.seed, **values}


def _plan(plan: Mapping[str, Any]) -> Plan:
    whole = _plan(plan["whole"]) if plan["whole"] else None
    return Plan(**{**plan, "mechanism": Mechanism(**plan["mechanism"]), "whole": whole})


class _Kept:
    """(C, 32) digests in a file, read one by one."""

    def __init__(self, path: Path) -> None:
        self._file, self._first = os.open(path, os.O_RDONLY), np.lib.format.open_memmap(path, mode="r").offset
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, at: int) -> bytes:
        return os.pread(self._file, 32, self._first + 32 * at)


def _save(fleet: Path, name: str, array: NDArray[Any]) -> None:
    """Durable before start.json, without which nobody looks at it."""
    with (fleet / f"{name}.npy").open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _array(fleet: Path, name: str) -> NDArray[Any]:
    """Raises Refused where it is not there or no array."""
    try:
        found: NDArray[Any] = np.asarray(np.load(fleet / f"{name}.npy", mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise Refused(f"{fleet / name}.npy does not read ({type(error).__name__}): bring it back from a copy") from None
    return found
