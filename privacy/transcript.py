"""Transcript: what a client was asked and answered in the current attempt, so that no question has two answers.

Everything a client needs between two messages is its secrets and what it was asked; both are on disk before the
answer leaves. The same question gets the stored bytes, another one at the same stage is refused. When the round has
ended the secrets are erased, and what stays is its number.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from privacy import durable
from privacy.frames import Attempt, Stage

_OPEN, _CLOSED = b"\0", b"\1"
_SECRETS = "secrets"
_LATEST = "latest"
_KEYS = (_SECRETS, *(stage.name.lower() for stage in Stage))


class Store(Protocol):
    """A client's few records of one run, for its eyes alone."""

    def lock(self) -> AbstractContextManager[None]:
        """Held while a message is answered: two at once must not find the same stage unanswered."""

    def get(self, key: str) -> bytes | None:
        """The record, None where there is none."""

    def put(self, key: str, value: bytes) -> None:
        """Replace the record, all or nothing; on return it outlasts a crash."""

    def erase(self, *keys: str) -> None:
        """Remove the records, where there are any, as lastingly."""


class FileStore:
    """Records as files in a folder of their own, both for their owner's eyes alone (modes 0600 and 0700)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)

    @contextmanager
    def lock(self) -> Iterator[None]:
        path = self._folder / "lock"
        path.touch(mode=0o600)
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def get(self, key: str) -> bytes | None:
        path = self._folder / key
        return path.read_bytes() if path.exists() else None

    def put(self, key: str, value: bytes) -> None:
        durable.write_atomic(self._folder / key, value, private=True)

    def erase(self, *keys: str) -> None:
        durable.remove(*(self._folder / key for key in keys))


class Transcript:
    """One attempt in a store. Everything raises ValueError with the reason for what is asked out of turn."""

    def __init__(self, store: Store, attempt: Attempt) -> None:
        self._store = store
        self.attempt = attempt

    def begin(self) -> None:
        """Leave the attempts before for this one; not for an older one, nor in a round that was unmasked here.

        A second attempt of a round adds up the same vectors: the difference of both sums is that of the rosters.
        """
        before = _latest(self._store)
        if before is not None:
            last, closed = before
            if last.run != self.attempt.run:
                raise ValueError("this store is of another run, or of other rules")
            if (self.attempt.round, self.attempt.number) < (last.round, last.number):
                raise ValueError(f"{self.attempt} is over: {last} is the latest here")
            if self.attempt.round == last.round and closed:
                raise ValueError(f"round {last.round} is closed here")
            if self.attempt == last:
                return
            if self.attempt.round == last.round and Transcript(self._store, last).asked(Stage.UNMASK) is not None:
                raise ValueError(
                    f"round {last.round} was unmasked in {last}: no other attempt adds up the same vectors"
                )
        self._store.put(_LATEST, bytes(self.attempt) + _OPEN)
        _erase(self._store)

    def current(self) -> None:
        """Refuse an attempt that is not the one begun last, or closed."""
        if _latest(self._store) != (self.attempt, False):
            raise ValueError(f"{self.attempt} is not open here")

    def secrets(self, draw: Callable[[], bytes] | None = None) -> bytes:
        """This attempt's secrets; drawn and recorded at first, where `draw` is given."""
        record = self._own(_SECRETS)
        if record is None:
            if draw is None:
                raise ValueError(f"{self.attempt} has no keys here")
            record = draw()
            self._store.put(_SECRETS, bytes(self.attempt) + record)
        return record

    def asked(self, stage: Stage) -> bytes | None:
        """What was asked and answered at a stage, None where nothing was."""
        record = self._own(stage.name.lower())
        return None if record is None else record[4 : 4 + int.from_bytes(record[:4], "big")]

    def must(self, stage: Stage) -> bytes:
        """What was asked at a stage that has to come before."""
        request = self.asked(stage)
        if request is None:
            raise ValueError(f"{stage.name.lower()} of {self.attempt} has not been asked here")
        return request

    def once(self, stage: Stage, request: bytes, compute: Callable[[], bytes]) -> bytes:
        """The one answer to `request` at `stage`: the stored bytes, or at first what `compute` says, recorded."""
        record = self._own(stage.name.lower())
        if record is not None:
            size = int.from_bytes(record[:4], "big")
            if record[4 : 4 + size] != request:
                raise ValueError(f"asked twice, and not for the same, at {stage.name.lower()} of {self.attempt}")
            return record[4 + size :]
        if any(self.asked(later) is not None for later in Stage if later > stage):
            raise ValueError(f"{stage.name.lower()} of {self.attempt} is over")
        answer = compute()
        self._store.put(stage.name.lower(), bytes(self.attempt) + len(request).to_bytes(4, "big") + request + answer)
        return answer

    def _own(self, key: str) -> bytes | None:
        record, mine = self._store.get(key), bytes(self.attempt)
        return None if record is None or not record.startswith(mine) else record[len(mine) :]


def close(store: Store, ended: int) -> None:
    """End a round: its secrets and messages are erased, and it is not begun again. Other rounds are left alone."""
    latest = _latest(store)
    if latest is not None and latest[0].round == ended:
        store.put(_LATEST, bytes(latest[0]) + _CLOSED)
        _erase(store)


def _latest(store: Store) -> tuple[Attempt, bool] | None:
    record = store.get(_LATEST)
    return None if record is None else (Attempt.of(record[:-1]), record[-1:] == _CLOSED)


def _erase(store: Store) -> None:
    store.erase(*_KEYS)
