"""Blocks on Flower's real simulation: the embedded cohort's bits, on a Ray of its own and on a running cluster."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from scenarios import load
from scenarios.settings import Settings, override
from server import flower, ray_cluster, run
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder
from server.state import Row
from server.superlink import COMMANDS, PARENT

SMALL = (
    "fleet.clients=6 rounds.number=3 rounds.average=1 export.recover_rounds=0 export.prune=0 run.processes=2 "
    "reference.central_epochs=0 reference.no_privacy=false local.engine=cohort local.block=2"
)
WAYS = {
    "with noise": "privacy.noise_seed=1",
    "median": "privacy.unit=none server.combine=median",
    "residuals": "privacy.unit=none codec=topk:0.5",
    "encrypted": "privacy.unit=none protect=encrypted rounds.number=1",
}
pytestmark = pytest.mark.slow


def settings(way: str) -> Settings:
    return override(load("digits").settings, f"{SMALL} {WAYS[way]}")


def embedded(path: Path, way: str, until: int = 99) -> Path:
    """The folder of an embedded run that is stopped after round `until`."""
    new = not path.exists()
    folder = RunFolder.create(path, "digits", settings(way)) if new else RunFolder.open(path)
    told = settings(way) if new else folder.settings()[1]
    with folder:
        stop = lambda: len(folder.rows()) >= until  # noqa: E731
        try:
            run.run(run.prepare(load("digits"), told, folder, EmbeddedFleet, Quiet(), stop))
        except run.Stopped:
            assert until < 99
    return path


def rows(path: Path) -> list[Row]:
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def assert_same(one: Path, other: Path, but: str = "") -> None:
    """but: a field of the rows that differs from run to run."""
    assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    assert [row | {but: 0} for row in rows(one)] == [row | {but: 0} for row in rows(other)]
    said = [json.loads((path / "report.json").read_text()) for path in (one, other)]
    assert said[0]["privacy"]["clients"] == said[1]["privacy"]["clients"]
    assert said[0]["fleet"]["engine"] == said[1]["fleet"]["engine"]


def processes(mark: str) -> list[str]:
    """The commands of all processes with `mark` in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in file.read_bytes().split(b"\0"):
                found.append((file.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_blocks_on_ray_give_the_embedded_bits(way: str, tmp_path: Path) -> None:
    out = flower.run("digits", load("digits"), settings(way), tmp_path / "ray", Quiet(), lambda: False)
    keys = "bytes_down" if way == "encrypted" else ""  # of a public key, which is drawn, packed
    assert_same(out, embedded(tmp_path / "embedded", way), keys)
    assert processes(f"{PARENT}={os.getpid()}") == []


def test_an_embedded_run_goes_on_in_blocks_on_ray(tmp_path: Path) -> None:
    embedded(tmp_path / "run", "residuals", until=1)
    flower.run("digits", load("digits"), settings("residuals"), tmp_path / "run", Quiet(), lambda: False, resume=True)
    assert_same(tmp_path / "run", embedded(tmp_path / "whole", "residuals"))


def test_a_worker_of_ray_that_is_killed_is_named_and_the_run_comes_to_the_same_bits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WAYS, "long", "privacy.unit=none rounds.number=30 local.epochs=5")
    killed = list[int]()

    def look() -> bool:
        if not killed and (tmp_path / "ray" / "rounds.jsonl").exists() and rows(tmp_path / "ray"):
            mark = f"{PARENT}={os.getpid()}".encode()
            for file in Path("/proc").glob("[0-9]*/environ"):
                with suppress(OSError):
                    name = (file.parent / "cmdline").read_bytes()
                    if (
                        mark in file.read_bytes().split(b"\0")
                        and name.startswith(b"ray::ClientAppActor")
                        and not killed
                    ):
                        killed.append(int(file.parent.name))
                        os.kill(killed[0], signal.SIGKILL)
        return False

    out = flower.run("digits", load("digits"), settings("long"), tmp_path / "ray", Quiet(), look)
    assert killed
    assert "umbel: worker of Ray died in its blocks" in capfd.readouterr().err
    assert_same(out, embedded(tmp_path / "embedded", "long"))


# ---- a cluster that runs already ----


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """HOST:PORT of a Ray cluster of two CPUs, as a user starts it, on this machine alone."""
    place = Path(tempfile.mkdtemp(prefix="umbel-ray-"))  # short: Ray keeps sockets in it
    ports = [free_port() for _ in range(4)]
    command = [str(COMMANDS / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}", f"--temp-dir={place}"]
    command += [f"--dashboard-agent-listen-port={ports[2]}", f"--dashboard-agent-grpc-port={ports[3]}"]
    command += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=200000000"]
    with (place / "log").open("wb") as log:
        head = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        limit = time.monotonic() + 90
        while not answers(ports[0]):
            assert head.poll() is None, (place / "log").read_text()
            assert time.monotonic() < limit
            time.sleep(0.2)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def test_a_running_cluster_is_joined_and_no_second_ray_is_started(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    wanted, running = settings("with noise"), set[str]()

    def look() -> bool:
        running.update(processes(f"{PARENT}={os.getpid()}"))
        return False

    found = ray_cluster.found(wanted)
    assert (found.address, found.cpus, found.workers(wanted)) == (cluster, 2, 2)
    out = flower.run("digits", load("digits"), wanted, tmp_path / "ray", Quiet(), look, cluster=found)
    assert any("flwr-simulation" in command for command in running)
    assert not [command for command in running if re.search(r"gcs_server|raylet/raylet|ClientAppActor", command)]
    assert answers(int(cluster.rpartition(":")[2])), "it is left as it was"
    assert_same(out, embedded(tmp_path / "embedded", "with noise"))


def test_more_processes_than_the_cluster_has_are_one_line(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    with pytest.raises(run.Refused, match=r"run.processes=5 is more than the 2 CPUs .* the nearest is 2"):
        ray_cluster.found(override(settings("median"), "run.processes=5"))
