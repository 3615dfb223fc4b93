"""Sources: data sets that are not bundled, where they are found, how they are fetched, and their bytes read safely."""

import contextlib
import gzip
import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privacy.refused import Refused
from scenarios.download import Progress, download

_LARGEST_ARRAY = 1 << 30


@dataclass(frozen=True)
class File:
    """One file of a source; size and digest are those of its uncompressed content."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """A public data set. It lies in a folder of its own name, each file as it is or compressed as FILE.gz."""

    description: str
    licence: str
    origin: str
    """Address of the folder that holds the files."""
    suffix: str
    """What the origin adds to a file's name: ".gz" where it serves compressed files."""
    files: tuple[File, ...]


SOURCES = {
    "heart_disease": Source(
        description="920 patients of four hospitals, 13 features and a diagnosis (UCI; Janosi et al. 1988)",
        licence="CC BY 4.0",
        origin="https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/",
        suffix="",
        files=(
            File("processed.cleveland.data", 18461, "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8"),
            File("processed.hungarian.data", 10263, "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796"),
            File(
                "processed.switzerland.data", 4109, "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"
            ),
            File("processed.va.data", 6737, "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f"),
        ),
    ),
    "mnist": Source(
        description="70,000 handwritten digits, 28 x 28 grey pixels (LeCun, Cortes, Burges)",
        licence="CC BY-SA 3.0",
        origin="https://ossci-datasets.s3.amazonaws.com/mnist/",
        suffix=".gz",
        files=(
            File(
                "train-images-idx3-ubyte", 47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
            ),
            File("train-labels-idx1-ubyte", 60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
            File("t10k-images-idx3-ubyte", 7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
            File("t10k-labels-idx1-ubyte", 10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
        ),
    ),
}


# ---- Where they are ----


def downloads() -> Path:
    """The default download folder: umbel in XDG_CACHE_HOME, or in ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "umbel"


def find(name: str, data: str = "") -> Path:
    """The folder of source `name`: in `data` if that is given, else in UMBEL_DATA, else in the download folder.

    One of its files there is enough, as a node may hold a part only. Raises Refused when there is none.
    """
    named = data or os.environ.get("UMBEL_DATA", "")
    roots = [Path(named).expanduser()] if named else []
    if not data:
        roots.append(downloads())
    for root in roots:
        if any(holds(root / name, file.name) for file in SOURCES[name].files):
            return root / name
    raise _missing(name, SOURCES[name].files[0].name, " or ".join(str(root) for root in roots))


def holds(folder: Path, file: str) -> bool:
    """Whether `file` is in `folder`, as it is or compressed."""
    return (folder / file).is_file() or (folder / f"{file}.gz").is_file()


def _missing(name: str, file: str, place: str) -> Refused:
    return Refused(
        f"data set {name} is missing: there is no {name}/{file} (or {file}.gz) in {place}; "
        f"name the folder that holds {name}/ with --data DIR or UMBEL_DATA, or fetch it with `umbel data get {name}`"
    )


# ---- What is in them ----


def read_text(folder: Path, file: str, limit: int = 1 << 20) -> str:
    """The text of `file` in `folder`. Raises Refused if it is missing, unreadable, not ASCII or above `limit` bytes."""
    with _opened(folder, file) as (stream, path):
        content = stream.read(limit + 1)
        if len(content) > limit:
            raise Refused(f"{path} holds more than {limit} bytes: that is no {file}")
        return content.decode("ascii")


def read_idx(folder: Path, file: str) -> NDArray[np.uint8]:
    """The array in an idx `file` of `folder`: two zero bytes, type 8 (uint8), rank, sizes as big-endian int32, data.

    Never reads more than the header declares and a gibibyte holds. Raises Refused when it is missing or not like that.
    """
    with _opened(folder, file) as (stream, path):
        head = stream.read(4)
        if len(head) != 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
            raise Refused(f"{path} is no idx file of bytes (it begins with {head.hex() or 'nothing'})")
        sizes = stream.read(4 * head[3])
        if len(sizes) != 4 * head[3]:
            raise Refused(f"{path} ends within its header: fetch it again")
        shape = struct.unpack(f">{head[3]}i", sizes)
        if min(shape) < 0 or (total := math.prod(shape)) > _LARGEST_ARRAY:
            raise Refused(f"{path} declares the sizes {shape}: that is no data set of this program")
        content = stream.read(total + 1)
        if len(content) != total:
            came = "more" if len(content) > total else str(len(content))
            raise Refused(f"{path} declares {total} bytes of data but holds {came}: fetch it again")
        return np.frombuffer(content, np.uint8).reshape(shape)


@contextlib.contextmanager
def _opened(folder: Path, file: str) -> Iterator[tuple[io.BufferedIOBase, Path]]:
    if not holds(folder, file):
        raise _missing(folder.name, file, str(folder.parent))
    path = folder / file if (folder / file).is_file() else folder / f"{file}.gz"
    try:
        with path.open("rb") if path.name == file else gzip.open(path) as stream:
            yield stream, path
    except UnicodeDecodeError:  # its message would quote the data
        raise Refused(f"{path} holds other than ASCII text: fetch it again") from None
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"{path} cannot be read ({error}): fetch it again") from None


# ---- How they are fetched ----


def get(name: str, folder: Path | None, progress: Progress, origin: str | None = None, timeout: float = 30.0) -> Path:
    """Fetch source `name` into `folder`/`name` (None: `downloads()`) and return that; intact files stay as they are.

    `origin` replaces the address of the folder that holds the files (a mirror); `timeout` is in seconds without a byte.
    See `download` for what happens to a cut one. Raises Refused for an unknown name and whatever goes wrong on the way.
    """
    if name not in SOURCES:
        raise Refused(f"there is no data set {name!r}: choose one of {', '.join(SOURCES)}")
    source, root = SOURCES[name], folder or downloads()
    place = root / name
    base = (origin or source.origin).rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise Refused(f"{base!r} is no address of a data set: it begins with http:// or https://")
    try:
        place.mkdir(parents=True, exist_ok=True)
        for file in source.files:
            if _intact(place, file):
                progress(file.size, file.size, file.name)
            else:
                url = f"{base}/{file.name}{source.suffix}"
                download(url, place / file.name, file.size, file.sha256, progress, timeout)
    except OSError as error:
        raise Refused(f"{name} cannot be stored in {root} ({error.strerror or error}): name another folder") from None
    return place


def _intact(place: Path, file: File) -> bool:
    if not holds(place, file.name):
        return False
    try:
        with _opened(place, file.name) as (stream, _):
            return hashlib.sha256(stream.read(file.size + 1)).hexdigest() == file.sha256
    except Refused:
        return False
