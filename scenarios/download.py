"""One file over HTTP: gone on with where it was cut, checked by the digest of its content, there in one step or not."""

import gzip
import hashlib
import http.client
import os
import re
import secrets
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from privacy.refused import Refused

Progress = Callable[[int, int, str], None]
"""Called with (bytes received, bytes in all or 0 where the origin does not say, file name)."""

_CHUNK = 1 << 18


def download(url: str, target: Path, size: int, sha256: str, progress: Progress, timeout: float) -> None:
    """Fetch `url` into the file `target`, decompressed if the address ends with .gz.

    What was received stays beside it as NAME.part until the file is complete, and a later call asks for the rest only
    (RFC 9110, section 14). `target` appears in one step, and only with a content of `size` bytes and digest `sha256`;
    a part that cannot lead there is thrown away, and so is one that grows beyond what such a content can take.
    `timeout` is in seconds without a byte. Raises Refused when the origin does not answer, answers something else or is
    cut; OSError when the folder of `target` cannot be written.
    """
    part = target.with_name(url.rpartition("/")[2] + ".part")
    resumed = True
    while resumed:
        resumed = _receive(url, part, target.name, _most(size, url), progress, timeout)
        if _install(part, url.endswith(".gz"), target, size, sha256):
            part.unlink(missing_ok=True)
            return
        part.unlink(missing_ok=True)  # if it began in an earlier call, that may be the fault: once more from the start
    raise Refused(f"{url} is not the {target.name} that was published (its SHA-256 differs): name another origin")


def _most(size: int, url: str) -> int:
    """The most bytes that a content of `size` bytes takes on the way; deflate never adds more than a thousandth."""
    return size + size // 1000 + 1024 if url.endswith(".gz") else size


def _receive(url: str, part: Path, name: str, most: int, progress: Progress, timeout: float) -> bool:
    """Bring `part` to its end; returns whether bytes of an earlier call are in it."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "umbel"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if have and error.code == 416:  # no byte is left to send: the digest decides
                return True
            raise Refused(f"{url} answers {error.code} {error.reason}: name another origin, or try later") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Refused(f"{url} cannot be reached ({_reason(error)}): try later, or name another origin") from None
    with response:
        if have and not _goes_on(response, have):
            have = 0
        total = 0 if response.length is None else have + response.length
        done = have
        with part.open("ab" if have else "wb") as stream:
            for chunk in _chunks(response, url):
                done += len(chunk)
                if max(done, total) > most:
                    break
                stream.write(chunk)
                progress(done, total, name)
    if max(done, total) > most:
        part.unlink()
        raise Refused(f"{url} sends more than the {most} bytes that {name} can take: name another origin")
    if done < total:
        raise Refused(f"{url} was cut after {done} of {total} bytes: the same command goes on from there")
    return have > 0


def _goes_on(response: http.client.HTTPResponse, have: int) -> bool:
    """Whether the answer begins at byte `have`; an origin without ranges answers 200 and begins at the first."""
    if response.status != 206:
        return False
    return re.match(rf"bytes {have}-", response.headers.get("Content-Range", "")) is not None


def _chunks(response: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"{url} was cut ({_reason(error)}): the same command goes on from there") from None
        if not chunk:
            return
        yield chunk


def _install(part: Path, compressed: bool, target: Path, size: int, sha256: str) -> bool:
    """Copy the content of `part` to `target` if that is right; exactly the bytes that were checked are installed."""
    mine = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    digest, left = hashlib.sha256(), size
    try:
        with gzip.open(part) if compressed else part.open("rb") as stream, mine.open("xb") as copy:
            while chunk := stream.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    return False
                digest.update(chunk)
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
        if left or digest.hexdigest() != sha256:
            return False
        mine.replace(target)
        return True
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False
    finally:
        mine.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return getattr(inner, "strerror", None) or str(inner) or type(error).__name__
