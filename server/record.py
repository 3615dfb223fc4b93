"""The run folder: one writer, rounds committed all or nothing, and everything that a killed run needs to go on."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clients.coordinates import Pace
from privacy.chain import Head
from privacy.durable import write_atomic
from privacy.refused import Refused
from scenarios.numbered import Numbered
from scenarios.settings import Settings, from_toml, to_toml
from server.spendings import Spendings
from server.spent_file import SpentFile
from server.state import Row, ServerState, Spent

_FORMAT = "1"


class RunFolder:
    """One run on disk. The checkpoint's rename is the commit; rounds.jsonl is brought in line with it on opening.

    settings.toml (scenario and settings), checkpoint.safetensors (the committed state with its row and the ledger's
    head), rounds.jsonl (a row a committed round), start.json (what the run began with), fleet/ (what belongs to these
    of a large fleet's clients).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states = path / "clients"
        """Client states of simulated clients; a real device keeps its own."""
        self.fleet = path / "fleet"
        """What a large fleet's clients are, as arrays."""
        self._spent = SpentFile(self.fleet / "spent.npy")
        self._lock = self._hold()
        self._ends = ExitStack()

    @classmethod
    def create(cls, path: Path, scenario: str, settings: Settings) -> "RunFolder":
        """A new run in `path`, which must be empty or absent. Raises Refused otherwise."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise Refused(f"{path} is not empty: choose another --out, or `umbel resume {path}`")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"{path} cannot be made ({error.strerror}): choose another --out") from None
        folder = cls(path)
        folder.write_settings(scenario, settings)
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run. Raises Refused when it is none, or when another process holds it."""
        if not (path / "settings.toml").is_file():
            raise Refused(f"{path} is no run folder: it has no settings.toml; `umbel run` makes one")
        return cls(path)

    def discard(self) -> None:
        """Leave nothing behind of a run that was refused before it began."""
        self.close()
        shutil.rmtree(self.path)

    def close(self) -> None:
        """Let another process hold the run."""
        self._ends.close()
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a process forked from this one may hold it too
            os.close(self._lock)
            self._lock = -1

    def at_close(self, end: Callable[[], object]) -> None:
        """End what else holds the run, such as a process of its own, when this is closed."""
        self._ends.callback(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether the run has come to its report, so that there is nothing to go on with."""
        return all((self.path / name).exists() for name in ("report.json", "report.html"))

    def settings(self) -> tuple[str, Settings]:
        """(scenario, settings) the run was started with."""
        return from_toml(self.path / "settings.toml")

    def write_settings(self, scenario: str, settings: Settings) -> None:
        write_atomic(self.path / "settings.toml", to_toml(settings, scenario).encode())

    def commit(self, state: ServerState, row: Row, ledger: Head | None = None) -> None:
        """Make the round durable: the checkpoint replaces the old one, then the row joins rounds.jsonl.

        ledger: its head once the round was reserved; kept here, so that a ledger rolled back behind it is found out.
        """
        self.checkpoint(state, row, ledger)
        self._append(row)

    def checkpoint(self, state: ServerState, row: Row, ledger: Head | None) -> None:
        """Replace the committed state by `state`, whose last round is `row`."""
        tensors: dict[str, NDArray[Any]] = {f"step/{name}": value for name, value in state.step.items()}
        tensors["weights"] = state.weights
        if state.average is not None:
            tensors["average"] = state.average
        if state.control is not None:
            tensors["control"] = state.control
        if state.noise is not None:
            tensors["noise"] = state.noise
        if state.pace is not None:
            tensors |= {f"pace/{name}": value for name, value in vars(state.pace).items()}
        tensors |= (changed := self._spent.changes(state.clients))
        rest = {
            "until": state.until,
            "round": state.round,
            "phase": state.phase,
            "layout": state.layout,
            "averaged": state.averaged,
            "clock": state.clock,
            "clip": state.clip,
            **_clients(state.clients),
            "row": row,
            "ledger": ledger,
        }
        write_atomic(
            self.path / "checkpoint.safetensors", save(tensors, {"format": _FORMAT, "state": json.dumps(rest)})
        )
        self._spent.settle(state.clients, changed)

    def committed(self) -> ServerState | None:
        """The last committed state; None before the first round. Brings rounds.jsonl in line with it.

        Raises Refused when a file of the run is damaged.
        """
        path = self.path / "checkpoint.safetensors"
        if not path.exists():
            if self.rows(torn_tail=True):
                raise Refused(f"{path} is missing, but rounds were committed: the run cannot go on without it")
            write_atomic(self.path / "rounds.jsonl", b"")
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata()
                tensors: dict[str, NDArray[Any]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            rest = json.loads(metadata["state"])
            clients: Mapping[str, Spent] = {name: Spent(*numbers) for name, numbers in rest["clients"].items()}
            if "fleet" in rest:
                clients = self._spent.read(Numbered(*rest["fleet"]), tensors)
            state = ServerState(
                weights=tensors["weights"],
                layout=tuple((name, tuple(shape)) for name, shape in rest["layout"]),
                step={name.removeprefix("step/"): v for name, v in tensors.items() if name.startswith("step/")},
                until=rest["until"],
                round=rest["round"],
                phase=rest["phase"],
                clients=clients,
                average=tensors.get("average"),
                averaged=rest["averaged"],
                clock=rest["clock"],
                clip=rest.get("clip", 0.0),
                control=tensors.get("control"),
                noise=tensors.get("noise"),
                pace=Pace(tensors["pace/speed"], tensors["pace/sent"]) if "pace/sent" in tensors else None,
            )
            row = rest["row"]
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise Refused(f"{path} is damaged ({type(error).__name__}): the run cannot go on from it") from None
        rows = self.rows(torn_tail=True)
        if [r["round"] for r in rows] not in ([*range(1, state.round + 1)], [*range(1, state.round)]):
            raise Refused(f"{self.path / 'rounds.jsonl'} does not match the checkpoint of round {state.round}")
        if len(rows) < state.round:
            rows.append(row)
        write_atomic(self.path / "rounds.jsonl", "".join(_line(r) for r in rows).encode())
        return state

    def ledger_head(self) -> Head | None:
        """The ledger's head that the last committed round saw; None before, and without a ledger."""
        path = self.path / "checkpoint.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                head = json.loads(file.metadata()["state"])["ledger"]
            return Head(int(head[0]), str(head[1])) if head else None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError) as error:
            raise Refused(f"{path} is damaged ({type(error).__name__}): the run cannot go on from it") from None

    def rows(self, torn_tail: bool = False) -> list[Row]:
        """The rows of rounds.jsonl. With `torn_tail` a last line that a crash cut off is left out."""
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        try:
            return [json.loads(line) for line in lines[: -1 if torn_tail else None] if line]
        except ValueError:
            raise Refused(f"{path} is damaged: a line is no JSON") from None

    def read_json(self, name: str) -> Any:
        """A JSON file of the run; None when it is not there."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            raise Refused(f"{path} is damaged: it is no JSON") from None

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def _append(self, row: Row) -> None:
        with (self.path / "rounds.jsonl").open("ab") as file:
            file.write(_line(row).encode())
            file.flush()
            os.fsync(file.fileno())

    def _hold(self) -> int:
        try:
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Refused(f"{self.path} cannot be written to ({error.strerror}): is it yours?") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise Refused(
                f"{self.path} is held by another process that is running it: wait for it or stop it"
            ) from None
        return lock


def _clients(clients: Mapping[str, Spent]) -> dict[str, Any]:
    """What a checkpoint says of them: all by name, or which fleet it is whose rows stand apart, as arrays."""
    if isinstance(clients, Spendings) and isinstance(clients.names, Numbered):
        return {"clients": {}, "fleet": [clients.names.number, clients.names.digits]}
    return {"clients": {name: [s.steps, s.rounds, s.last, s.whole] for name, s in clients.items()}}


def save_named(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Named tensors as one safetensors file, atomically."""
    write_atomic(path, save(dict(tensors), {"format": _FORMAT}))


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
