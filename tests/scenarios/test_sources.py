"""Sources: finding, reading, and fetching from a real HTTP server on loopback that misbehaves on request."""

import gzip
import hashlib
import os
import re
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from privacy.refused import Refused
from scenarios import sources

CONTENT = {"a.data": bytes(range(256)) * 3000, "b.data": b"short and plain\n"}


@dataclass
class Origin:
    """What the server holds, how it misbehaves, and what it was asked."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    cut: int | None = None
    """Bytes of the body after which the connection is dropped."""
    declare: int | None = None
    """A Content-Length that is not true."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def origin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Origin]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Origin()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, wanted = self.path.lstrip("/"), self.headers.get("Range")
            state.asked.append((name, wanted))
            if name not in state.files:
                self.send_error(404)
                return
            body, start = state.files[name], 0
            if wanted and state.ranges:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
                if start >= len(body):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(state.declare or len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:][: state.cut])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture(params=["", ".gz"], ids=["plain", "gz"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, origin: Origin) -> str:
    """A small source of two files, served as they are or compressed."""
    files = tuple(sources.File(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in CONTENT.items())
    monkeypatch.setitem(
        sources.SOURCES, "made", sources.Source("for tests", "none", "http://nowhere/", request.param, files)
    )
    # stored, not deflated: the compressed file is as long as its content, so there is something to cut
    origin.files = {n + request.param: gzip.compress(c, 0) if request.param else c for n, c in CONTENT.items()}
    return "made"


def fetch(origin: Origin, folder: Path, said: list[tuple[int, int, str]] | None = None) -> Path:
    said = [] if said is None else said
    return sources.get("made", folder, lambda *step: said.append(step), origin.address, timeout=5)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_get_stores_the_uncompressed_content_and_says_how_far_it_is(made: str, origin: Origin, tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []
    assert fetch(origin, tmp_path, said) == tmp_path / made
    assert contents(tmp_path / made) == CONTENT
    last = {name: (done, total) for done, total, name in said}
    assert all(done == total for done, total in last.values())
    assert set(last) == set(CONTENT)


def test_a_second_get_asks_the_origin_for_nothing(made: str, origin: Origin, tmp_path: Path) -> None:
    fetch(origin, tmp_path)
    origin.asked.clear()
    fetch(origin, tmp_path)
    assert origin.asked == []


def test_a_damaged_file_is_fetched_again(made: str, origin: Origin, tmp_path: Path) -> None:
    (fetch(origin, tmp_path) / "a.data").write_bytes(b"damaged")
    fetch(origin, tmp_path)
    assert contents(tmp_path / made) == CONTENT


def test_a_cut_download_is_one_line_and_goes_on_where_it_was_cut(made: str, origin: Origin, tmp_path: Path) -> None:
    first = next(iter(origin.files))
    origin.cut = 300_000
    with pytest.raises(Refused, match=r"was cut after 300000 of .* goes on from there") as refusal:
        fetch(origin, tmp_path)
    assert "\n" not in str(refusal.value)
    assert names(tmp_path / made) == {f"{first}.part"}
    origin.cut = None
    said: list[tuple[int, int, str]] = []
    fetch(origin, tmp_path, said)
    assert origin.asked[1] == (first, "bytes=300000-")
    assert min(done for done, _, name in said if name == "a.data") > 300_000
    assert contents(tmp_path / made) == CONTENT


def test_an_origin_without_ranges_begins_again(made: str, origin: Origin, tmp_path: Path) -> None:
    origin.cut, origin.ranges = 300_000, False
    with pytest.raises(Refused, match="was cut"):
        fetch(origin, tmp_path)
    origin.cut = None
    fetch(origin, tmp_path)
    assert contents(tmp_path / made) == CONTENT


def test_a_complete_part_is_installed_though_no_byte_is_left(made: str, origin: Origin, tmp_path: Path) -> None:
    (tmp_path / made).mkdir()
    for name, body in origin.files.items():
        (tmp_path / made / f"{name}.part").write_bytes(body)
    fetch(origin, tmp_path)
    assert contents(tmp_path / made) == CONTENT


def test_a_part_of_something_else_is_thrown_away_and_fetched_anew(made: str, origin: Origin, tmp_path: Path) -> None:
    (tmp_path / made).mkdir()
    for name in origin.files:
        (tmp_path / made / f"{name}.part").write_bytes(b"x" * 10)
    fetch(origin, tmp_path)
    assert contents(tmp_path / made) == CONTENT
    assert [wanted for _, wanted in origin.asked] == ["bytes=10-", None] * 2


def test_a_wrong_digest_leaves_nothing_behind(made: str, origin: Origin, tmp_path: Path) -> None:
    for name, body in origin.files.items():
        wrong = bytearray(gzip.decompress(body) if name.endswith(".gz") else body)
        wrong[7] ^= 1
        origin.files[name] = gzip.compress(wrong, 0) if name.endswith(".gz") else bytes(wrong)
    with pytest.raises(Refused, match=r"is not the a\.data that was published \(its SHA-256 differs\)"):
        fetch(origin, tmp_path)
    assert names(tmp_path / made) == set()
    assert len(origin.asked) == 1


@pytest.mark.parametrize("harm", ["longer", "declared"])
def test_an_origin_that_sends_too_much_is_cut_off(made: str, origin: Origin, tmp_path: Path, harm: str) -> None:
    first = next(iter(origin.files))
    if harm == "longer":
        origin.files[first] += bytes(100_000)
    else:
        origin.declare = 10**12
    with pytest.raises(Refused, match="sends more than the"):
        fetch(origin, tmp_path)
    assert names(tmp_path / made) == set()


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch, origin: Origin, tmp_path: Path) -> None:
    file = sources.File("a.data", 10_000, "0" * 64)
    monkeypatch.setitem(sources.SOURCES, "made", sources.Source("for tests", "none", "http://nowhere/", ".gz", (file,)))
    origin.files = {"a.data.gz": gzip.compress(bytes(10_000_000))}
    assert len(origin.files["a.data.gz"]) < 10_500  # passes the limit of what may come over the wire
    written: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: written.append(os.fstat(descriptor).st_size))
    with pytest.raises(Refused, match="SHA-256 differs"):
        fetch(origin, tmp_path)
    assert written == []
    assert names(tmp_path / "made") == set()


def test_what_goes_wrong_is_one_line_with_the_way_out(made: str, origin: Origin, tmp_path: Path) -> None:
    origin.files = {}
    with pytest.raises(Refused, match="answers 404 Not Found: name another origin"):
        fetch(origin, tmp_path)
    for address, reason in {
        "http://127.0.0.1:1": "cannot be reached .*refused",
        "ftp://127.0.0.1": "begins with http",
        "http://127.0.0.1:no": "cannot be reached",
    }.items():
        with pytest.raises(Refused, match=reason) as refusal:
            sources.get(made, tmp_path, lambda *_: None, address, timeout=5)
        assert "\n" not in str(refusal.value)
    with pytest.raises(Refused, match="there is no data set 'mist': choose one of heart_disease, mnist"):
        sources.get("mist", tmp_path, lambda *_: None)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Refused, match="cannot be stored in"):
        fetch(origin, tmp_path / "file")


def test_find_looks_in_data_else_umbel_data_else_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("UMBEL_DATA", raising=False)
    places = [sources.downloads(), tmp_path / "environment", tmp_path / "named"]
    assert places[0] == tmp_path / "cache" / "umbel"
    for place in places:
        (place / "mnist").mkdir(parents=True)
        (place / "mnist" / "train-images-idx3-ubyte.gz").touch()
    assert sources.find("mnist") == places[0] / "mnist"
    monkeypatch.setenv("UMBEL_DATA", str(places[1]))
    assert sources.find("mnist") == places[1] / "mnist"
    assert sources.find("mnist", str(places[2])) == places[2] / "mnist"
    (places[1] / "mnist" / "train-images-idx3-ubyte.gz").unlink()
    assert sources.find("mnist") == places[0] / "mnist"


def test_a_missing_data_set_is_one_line_with_both_ways_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UMBEL_DATA", str(tmp_path / "environment"))
    with pytest.raises(Refused) as refusal:
        sources.find("heart_disease")
    message = str(refusal.value)
    assert "\n" not in message
    for part in ("heart_disease", "--data", "UMBEL_DATA", "umbel data get heart_disease", str(tmp_path / "cache")):
        assert part in message
    with pytest.raises(Refused, match="umbel data get heart_disease") as refusal:
        sources.find("heart_disease", str(tmp_path / "named"))
    assert str(tmp_path / "cache") not in str(refusal.value)  # a folder that was named is not silently replaced


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (0, 28, 28)])
@pytest.mark.parametrize("compressed", [False, True])
def test_read_idx_returns_the_array_that_was_written(tmp_path: Path, shape: tuple[int, ...], compressed: bool) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    name, content = ("x.gz", gzip.compress(idx(array))) if compressed else ("x", idx(array))
    (tmp_path / name).write_bytes(content)
    read = sources.read_idx(tmp_path, "x")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no idx file"),
        (b"\0\0\x0d\1" + struct.pack(">I", 4) + bytes(16), "no idx file"),  # float32
        (b"\x80\4\x95\0" + bytes(100), "no idx file"),  # a pickle
        (b"\0\0\x08\0", "no idx file"),
        (b"\0\0\x08\3" + bytes(5), "ends within its header"),
        (b"\0\0\x08\3" + struct.pack(">3I", 2**30, 2**30, 2**30), "declares the sizes"),
        (b"\0\0\x08\1" + struct.pack(">i", -1), "declares the sizes"),
        (idx(np.zeros(10, np.uint8))[:-1], "declares 10 bytes of data but holds 9"),
        (idx(np.zeros(10, np.uint8)) + b"\0", "declares 10 bytes of data but holds more"),
    ],
)
def test_read_idx_refuses_what_it_does_not_declare(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Refused, match=reason):
        sources.read_idx(tmp_path, "x")
    (tmp_path / "x").unlink()
    (tmp_path / "x.gz").write_bytes(gzip.compress(content))
    with pytest.raises(Refused, match=reason):
        sources.read_idx(tmp_path, "x")


def test_a_broken_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(idx(np.arange(200, dtype=np.uint8)))
    for content in (whole[:-12], b"no gzip at all", whole[:40] + b"\xff\xff\xff" + whole[43:]):
        (tmp_path / "x.gz").write_bytes(content)
        with pytest.raises(Refused, match="cannot be read"):
            sources.read_idx(tmp_path, "x")


def test_read_text_refuses_what_is_too_long_or_no_text_and_quotes_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"secret" * 10)
    assert sources.read_text(tmp_path, "x", 60) == "secret" * 10
    with pytest.raises(Refused, match="more than 59 bytes"):
        sources.read_text(tmp_path, "x", 59)
    (tmp_path / "x").write_bytes(b"secret\xff")
    with pytest.raises(Refused, match="other than ASCII") as refusal:
        sources.read_text(tmp_path, "x")
    assert "secret" not in str(refusal.value)
    with pytest.raises(Refused, match="umbel data get"):
        sources.read_text(tmp_path, "y")


def test_the_registered_digests_are_those_of_the_published_files() -> None:
    root = os.environ.get("UMBEL_DATA")
    if not root:
        pytest.skip("UMBEL_DATA is not set: it names the folder that holds heart_disease/ and mnist/")
    for name, source in sources.SOURCES.items():
        for file in source.files:
            folder = Path(root) / name
            plain = folder / file.name
            content = (
                plain.read_bytes() if plain.is_file() else gzip.decompress((folder / f"{file.name}.gz").read_bytes())
            )
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256), file.name


def test_the_real_files_are_fetched_whole_from_a_mirror(origin: Origin, tmp_path: Path) -> None:
    root = os.environ.get("UMBEL_DATA")
    if not root:
        pytest.skip("UMBEL_DATA is not set: it names the folder that holds heart_disease/")
    held = {path.name: path.read_bytes() for path in (Path(root) / "heart_disease").glob("processed.*.data")}
    origin.files = held
    folder = sources.get("heart_disease", tmp_path, lambda *_: None, origin.address + "/")
    assert contents(folder) == held
