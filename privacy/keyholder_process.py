"""The key holder of a simulation: a process of its own beside the server's, with a folder that is nobody else's."""

import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privacy import holder
from privacy.child import Child
from privacy.holder import Remote, Unreachable
from privacy.refused import Refused

if TYPE_CHECKING:
    from privacy.cohort_noise import CohortNoise

_LENGTH = struct.Struct("<Q")
_MOST = 1 << 34
"""Bytes of a message: a sum over a billion entries has fewer."""
_SECONDS = 120.0
_SERVE = "from privacy.keyholder_process import serve; serve()"


class Process(Remote):
    """A `Holder`. The process is started at first use, and again after it died; `close` ends it.

    clients: X25519 public keys by name. noise: fields of the `CohortNoise` that it puts on every sum. The rest as for
    `KeyHolder`, whose Refused it raises at its start, and `holder.answer`.
    """

    def __init__(
        self,
        folder: Path,
        clients: Mapping[str, bytes],
        cohort: int,
        minimum: int,
        noise: Mapping[str, float] | None = None,
        seeded: bool = False,
    ) -> None:
        super().__init__(self._exchanged)
        keys = {name: key.hex() for name, key in clients.items()}
        self._told: dict[str, Any] = {"folder": str(folder), "clients": keys, "cohort": cohort, "minimum": minimum}
        self._told |= {"noise": dict(noise) if noise else None, "seeded": seeded}
        self._child: Child | None = None
        self.identity = self._started()

    @property
    def pid(self) -> int | None:
        """None: there is none at present."""
        return self._child.pid if self._child else None

    def close(self) -> None:
        if self._child:
            self._child.close()
            self._child = None

    def _started(self) -> bytes:
        """Start it; returns the raw Ed25519 public key of the key holder."""
        self._child = Child(_SERVE)
        said, parts = holder.unpack(self._through(holder.pack(self._told)))
        if "refused" in said:
            self.close()
            raise Refused(str(said["refused"]))
        return parts[0]

    def _exchanged(self, request: bytes) -> bytes:
        if not self._child:
            self._started()
        return self._through(request)

    def _through(self, request: bytes) -> bytes:
        assert self._child
        try:
            self._child.write(_LENGTH.pack(len(request)))
            self._child.write(request)
            (length,) = _LENGTH.unpack(self._child.read(_LENGTH.size, _SECONDS))
            if length > _MOST:
                raise OSError("it sent what is no answer")
            return bytes(self._child.read(length, _SECONDS))
        except OSError as error:
            self.close()
            raise Unreachable(f"the key holder's process is gone ({error})") from None


def serve() -> None:
    """The process's side, until its input ends: who it is to be, then request by request."""
    from privacy.keyholder import KeyHolder

    with suppress(EOFError):
        told, _ = holder.unpack(_read())
        clients = {name: bytes.fromhex(key) for name, key in told["clients"].items()}
        try:
            mine = KeyHolder(Path(told["folder"]), clients, told["cohort"], told["minimum"])
        except (Refused, OSError) as error:
            _write(holder.pack({"refused": str(error)}))
            return
        noise = _noise(told["noise"])
        _write(holder.pack({}, mine.identity))
        while True:
            _write(holder.answer(mine, _read(), noise, told["seeded"]))


def _noise(fields: Mapping[str, float] | None) -> "CohortNoise | None":
    if fields is None:
        return None
    from privacy.cohort_noise import CohortNoise  # loads torch, which nothing else here needs

    return CohortNoise(**fields)


def _read() -> bytes:
    """The next message. Raises EOFError where there is none any more, or what came is none."""
    head = sys.stdin.buffer.read(_LENGTH.size)
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else _MOST + 1
    if length > _MOST or len(data := sys.stdin.buffer.read(length)) != length:
        raise EOFError
    return data


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(_LENGTH.pack(len(data)) + data)
    sys.stdout.buffer.flush()
