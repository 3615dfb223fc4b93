"""RAY_ADDRESS: a cluster that cannot be reached is one line and exit code 2, and nothing is written."""

import socket
import subprocess
from pathlib import Path

import pytest

from privacy.refused import Refused
from scenarios.settings import Settings, override
from server import ray_cluster
from server.ray_cluster import Cluster
from server.superlink import COMMANDS


def test_without_an_address_a_simulation_has_a_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_cluster.found(Settings()) == Cluster()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert ray_cluster.found(Settings()) == Cluster()
    assert Cluster().workers(override(Settings(), "run.processes=5")) == 5


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("ray://127.0.0.1:10001", "is no address of a Ray cluster: set HOST:PORT"),
        ("127.0.0.1", "set HOST:PORT"),
        (":6379", "set HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(address: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Refused, match=line):
        ray_cluster.found(Settings())


def test_what_listens_and_is_no_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_PATIENCE", 3.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(Refused, match="no Ray cluster answers"):
            ray_cluster.found(Settings())


def test_a_run_on_a_cluster_that_is_not_there_writes_nothing(tmp_path: Path) -> None:
    command = [str(COMMANDS / "umbel"), "run", "digits", "--runtime", "simulation", "--out", str(tmp_path / "run")]
    told = {"RAY_ADDRESS": "127.0.0.1:1", "UMBEL_STATE": str(tmp_path / "state"), "PATH": str(COMMANDS)}
    done = subprocess.run(command, env=told, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines() == [
        "umbel: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 ([Errno 111] Connection refused): start it with "
        "`ray start --head`, or unset RAY_ADDRESS"
    ]
    assert list(tmp_path.iterdir()) == []
