"""Chain: an append-only file of records, each tied to all before it, that no crash and no edit can shorten unnoticed.

Layout: `_MAGIC`, then records: length (4 bytes, big endian) | SHA-256 of (the digest before | body) | tag, the digest's
HMAC-SHA256 under the file's own key | body, a JSON object. Anyone can check the digests; who has FILE.key also knows
that nobody without it wrote a record. FILE.head names the last record that was made durable, with a tag of its own: up
to there nothing may be missing, and only a short record beyond it is what a crash leaves.
"""

import fcntl
import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from privacy.durable import secret, write_atomic
from privacy.refused import Refused

_FAMILY, _MAGIC = b"umbel ledger ", b"umbel ledger 2\n"
_FIRST = hashlib.sha256(_MAGIC).digest()
_FRAME = 4 + 32 + 32
_LONGEST = 1 << 16
_PATIENCE = 60.0


class Head(NamedTuple):
    """How far a ledger goes: the number of its records and the digest of the last."""

    sequence: int
    digest: str


class _Frame(NamedTuple):
    """One record as it lies in the file."""

    end: int
    digest: bytes
    tag: bytes
    body: bytes


def _frames(data: bytes, at: int, before: bytes) -> Iterator[_Frame]:
    """The whole records of `data` from `at`; ends at a short one. Raises ValueError where a digest does not fit."""
    while len(data) - at >= _FRAME:
        length = int.from_bytes(data[at : at + 4])
        end = at + _FRAME + length
        if length <= _LONGEST and len(data) < end:
            return
        digest, body = data[at + 4 : at + 36], data[at + _FRAME : end]
        if length > _LONGEST or hashlib.sha256(before + body).digest() != digest:
            raise ValueError("a record is damaged")
        yield _Frame(end, digest, data[at + 36 : at + _FRAME], body)
        at, before = end, digest


def readable(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """(the bodies of a damaged file's records, as far as its digests bear them out; its key, empty where it is lost).

    A key that fits the first record is the file's: then the tags must bear out the others as well.
    """
    data, found = path.read_bytes() if path.is_file() else b"", list[dict[str, Any]]()
    key_path = path.with_name(path.name + ".key")
    key = key_path.read_bytes() if key_path.is_file() else b""
    with suppress(ValueError):
        for frame in _frames(data, len(_MAGIC), _FIRST) if data.startswith(_MAGIC) else ():
            fits = _tag(key, frame.digest) == frame.tag
            if not found and not fits:
                key = b""
            if key and not fits:
                break
            found.append(json.loads(frame.body))
    return found, key if found else b""


def _tag(key: bytes, said: bytes) -> bytes:
    return hmac.digest(key, said, "sha256")


class Chain:
    """The file. Several processes may share it: each holds its lock for a block of `held`.

    Every method raises Refused when the file is damaged, shorter than its head says, of another version, out of reach
    or held for over a minute, and leaves it as it was.
    """

    def __init__(self, path: Path, take: Callable[[int, dict[str, Any]], None], keyed: bool = True) -> None:
        """take: given each record's sequence number, from 1, and body, in order and once; raises ValueError, KeyError,
        TypeError, IndexError, OverflowError or AttributeError for one that does not follow from those before it.
        keyed: False to read another's file, whose key is not here, by its digests alone.
        """
        self.path, self._take, self._keyed = path, take, keyed
        self._head_path = path.with_name(path.name + ".head")
        self._key_path = path.with_name(path.name + ".key")
        self._key = b""
        self._digests = bytearray(_FIRST)  # 32 bytes a record, which one object each would be more than twice
        self._end = 0
        self._time = 0

    @property
    def head(self) -> Head:
        return Head(self._records, self._digests[-32:].hex())

    @property
    def _records(self) -> int:
        return len(self._digests) // 32 - 1

    def _digest(self, sequence: int) -> bytes:
        """Of that record; of what comes before all for 0. Raises IndexError for one that was not read."""
        if not 0 <= sequence <= self._records:
            raise IndexError(sequence)
        return bytes(self._digests[32 * sequence : 32 * sequence + 32])

    @property
    def now(self) -> int:
        """Seconds since 1970: the clock, or the last record's time where the clock was set back behind it."""
        return max(int(time.time()), self._time)

    def holds(self, head: Head) -> bool:
        """Whether what was read goes on from `head`; False when it was rolled back behind it, or is another file."""
        return 0 <= head.sequence <= self._records and self._digest(head.sequence).hex() == head.digest

    def tag(self, said: bytes) -> bytes:
        """The tag of what else is bound to this file, under its key; empty before the first record, as is the key.

        said: begins with its kind, so that it is neither a record's digest nor what a head file says.
        """
        return _tag(self._key, said) if self._key else b""

    @contextmanager
    def held(self, write: bool = True) -> Iterator[BinaryIO]:
        """The file under its lock, all that other processes wrote read and checked."""
        try:
            headed = self._head_path.exists()  # asked for first: whoever makes both makes the file first
            if not self.path.exists():
                if headed or self._end:
                    self._read(b"")
                if not write:
                    yield None  # type: ignore[misc]  # readers do not look at it
                    return
                self.path.parent.mkdir(parents=True, exist_ok=True)
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
        if self._end == 0:  # before the first record, so that a ledger with records always has its key and its head
            self._key = secret(self._key_path)
            self._anchor()
        digest, frames, now = self._digest(self._records), bytearray() if self._end else bytearray(_MAGIC), self.now
        for sequence, entry in enumerate(bodies, self._records + 1):
            body = json.dumps({"sequence": sequence, "time": now, **entry}, separators=(",", ":")).encode()
            if len(body) > _LONGEST:  # nobody could read it, nor what follows it
                raise Refused(f"a record of {len(body)} bytes does not go into a ledger, {_LONGEST} do")
            digest = hashlib.sha256(digest + body).digest()
            frames += len(body).to_bytes(4) + digest + _tag(self._key, digest) + body
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
        write_atomic(self._head_path, json.dumps([*self.head, self._head_tag(self.head)]).encode())

    def _head_tag(self, head: Head) -> str:
        return _tag(self._key, f"head {head.sequence} {head.digest}".encode()).hex()

    def _read(self, data: bytes) -> None:
        """Check and take in `data`, what stands beyond the part that is known; a short last record stays unread."""
        at, damaged, begun = 0, "", bool(data) or self._end > 0
        if self._end == 0 and not _MAGIC.startswith(data[: len(_MAGIC)]):
            other = "of another version" if data.startswith(_FAMILY) else "no ledger"
            raise Refused(f"{self.path} is {other}: use the Umbel that wrote it, or name another folder by --state")
        if self._keyed and not self._key and (begun or self._head_path.exists()):
            self._key = self._known_key()
        if self._end == 0 and len(data) >= len(_MAGIC):
            at = self._end = len(_MAGIC)
        try:
            for frame in _frames(data, at, self._digest(self._records)):
                if self._keyed and not hmac.compare_digest(_tag(self._key, frame.digest), frame.tag):
                    damaged = f"record {self._records + 1} was not written with this ledger's key"
                    break
                damaged = f"record {self._records + 1} does not follow from those before it"
                body = json.loads(frame.body)
                if body["time"] < self._time:
                    break
                self._take(self._records + 1, body)
                damaged, self._time = "", body["time"]
                self._digests += frame.digest
                self._end, at = self._end + frame.end - at, frame.end
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
            damaged = damaged or f"record {self._records + 1} is damaged"
        if damaged := damaged or self._against_head(begun):
            raise Refused(
                f"{self.path}: {damaged}, so what was spent cannot be known: bring its files back from a copy, or "
                "charge what the other side wrote down by `umbel ledger adopt`"
            )

    def _known_key(self) -> bytes:
        try:
            return self._key_path.read_bytes()
        except FileNotFoundError:
            raise Refused(
                f"{self.path}: its key {self._key_path.name} is missing, so it could be anyone's: bring it back from a "
                "copy, or charge what the other side wrote down by `umbel ledger adopt`"
            ) from None

    def _against_head(self, begun: bool) -> str:
        """What is wrong with a ledger, begun or not, that goes as far as was read; empty if nothing is."""
        try:
            sequence, digest, tag = json.loads(self._head_path.read_bytes())
            if self._digest(max(0, sequence)).hex() != digest:
                return f"record {sequence} is not the one that its head file names"
            if self._keyed and not hmac.compare_digest(self._head_tag(Head(sequence, digest)), tag):
                return "its head file was not written with this ledger's key"
            return ""
        except FileNotFoundError:
            return "its head file is missing" if begun else ""
        except IndexError:
            return f"it ends after record {self._records}, its head file names {sequence}"
        except (ValueError, TypeError, AttributeError):
            return "its head file is damaged"
