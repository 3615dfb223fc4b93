"""Chain: an append-only file of records, each tied to all before it, that no crash and no edit can shorten unnoticed.

Layout: `_MAGIC`, then records: length (4 bytes, big endian) | SHA-256 of (the digest before | body) | body, a JSON
object. Beside it FILE.head names the last record that was made durable: up to there nothing may be missing, and only
a short record beyond it is what a crash leaves.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from privacy.refused import Refused

_FAMILY, _MAGIC = b"umbel ledger ", b"umbel ledger 1\n"
_LONGEST = 1 << 16
_PATIENCE = 60.0


class Head(NamedTuple):
    """How far a ledger goes: the number of its records and the digest of the last."""

    sequence: int
    digest: str


class Chain:
    """The file. Several processes may share it: each holds its lock for a block of `held`.

    Every method raises Refused when the file is damaged, shorter than its head says, of another version, out of reach
    or held for over a minute, and leaves it as it was.
    """

    def __init__(self, path: Path, take: Callable[[int, dict[str, Any]], None]) -> None:
        """take: given each record's sequence number, from 1, and body, in order and once; raises ValueError, KeyError,
        TypeError, IndexError or AttributeError for one that does not follow from those before it.
        """
        self.path, self._take = path, take
        self._head_path = path.with_name(path.name + ".head")
        self._digests = [hashlib.sha256(_MAGIC).digest()]
        self._end = 0

    @property
    def head(self) -> Head:
        return Head(len(self._digests) - 1, self._digests[-1].hex())

    def holds(self, head: Head) -> bool:
        """Whether what was read goes on from `head`; False when it was rolled back behind it, or is another file."""
        return head.sequence < len(self._digests) and self._digests[head.sequence].hex() == head.digest

    @contextmanager
    def held(self, write: bool = True) -> Iterator[BinaryIO]:
        """The file under its lock, all that other processes wrote read and checked."""
        try:
            if write:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            elif not self.path.exists():
                self._read(b"")
                yield None  # type: ignore[misc]  # readers do not look at it
                return
            flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
            with os.fdopen(os.open(self.path, flags, 0o600), "r+b" if write else "rb", buffering=0) as file:
                limit = time.monotonic() + _PATIENCE
                while True:
                    try:
                        fcntl.flock(file, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > limit:
                            raise Refused(f"{self.path} is held by another process: wait for it or stop it") from None
                        time.sleep(0.01)
                if os.fstat(file.fileno()).st_size < self._end:
                    raise Refused(f"{self.path} has become shorter: what was spent cannot be known, bring back a copy")
                file.seek(self._end)
                self._read(file.readall())
                yield file
        except OSError as error:
            raise Refused(
                f"the ledger {self.path} cannot be {'written' if write else 'read'} ({error.strerror}): nothing was "
                "released; name another folder by --state or UMBEL_STATE"
            ) from None

    def append(self, file: BinaryIO, bodies: list[dict[str, Any]], durable: bool = True) -> None:
        """Write the records in one go, in place of a short last one; durable: on disk, and named by the head."""
        if not bodies:
            return
        if self._end == 0:
            self._anchor()  # before the first record, so that a ledger with records always has its head
        digest, frames, now = self._digests[-1], bytearray() if self._end else bytearray(_MAGIC), int(time.time())
        for sequence, entry in enumerate(bodies, len(self._digests)):
            body = json.dumps({"sequence": sequence, "time": now, **entry}, separators=(",", ":")).encode()
            digest = hashlib.sha256(digest + body).digest()
            frames += len(body).to_bytes(4) + digest + body
        try:
            file.truncate(self._end)
            file.seek(self._end)
            rest = memoryview(frames)
            while rest:
                rest = rest[file.write(rest) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(self._end)
            raise
        self._read(bytes(frames))
        if durable:
            self._anchor()

    def seal(self, file: BinaryIO) -> None:
        """Make what was appended in passing durable, too, and name it by the head."""
        if self._end:
            os.fsync(file.fileno())
            self._anchor()

    def _anchor(self) -> None:
        """Name the last record in the head file, atomically and durably."""
        partial = self._head_path.with_name(self._head_path.name + ".partial")
        with partial.open("wb") as file:
            file.write(json.dumps(self.head).encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._head_path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read(self, data: bytes) -> None:
        """Check and take in `data`, what stands beyond the part that is known; a short last record stays unread."""
        at, damaged = 0, ""
        if self._end == 0 and not _MAGIC.startswith(data[: len(_MAGIC)]):
            other = "of another version" if data.startswith(_FAMILY) else "no ledger"
            raise Refused(f"{self.path} is {other}: use the Umbel that wrote it, or name another folder by --state")
        if self._end == 0 and len(data) >= len(_MAGIC):
            at = self._end = len(_MAGIC)
        while not damaged and len(data) - at >= 36:
            length = int.from_bytes(data[at : at + 4])
            digest, body = data[at + 4 : at + 36], data[at + 36 : at + 36 + length]
            if length <= _LONGEST and len(body) < length:
                break
            if length > _LONGEST or hashlib.sha256(self._digests[-1] + body).digest() != digest:
                damaged = f"record {len(self._digests)} is damaged"
                break
            try:
                self._take(len(self._digests), json.loads(body))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                damaged = f"record {len(self._digests)} does not follow from those before it"
                break
            at += 36 + length
            self._digests.append(digest)
            self._end += 36 + length
        damaged = damaged or self._against_head(bool(data) or self._end > 0)
        if damaged:
            raise Refused(
                f"{self.path}: {damaged}, so what was spent cannot be known: bring both files back from a copy"
            )

    def _against_head(self, begun: bool) -> str:
        """What is wrong with a ledger, begun or not, that goes as far as was read; empty if nothing is."""
        try:
            head = Head(*json.loads(self._head_path.read_bytes()))
            if self._digests[max(0, head.sequence)].hex() == head.digest:
                return ""
            return f"record {head.sequence} is not the one that its head file names"
        except FileNotFoundError:
            return "its head file is missing" if begun else ""
        except IndexError:
            return f"it ends after record {len(self._digests) - 1}, its head file names {head.sequence}"
        except (ValueError, TypeError, AttributeError):
            return "its head file is damaged"
