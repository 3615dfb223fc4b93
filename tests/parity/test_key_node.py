"""A key holder that is a node of a real fleet: the embedded weights to the bit, and what its owner is told."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scenarios import load
from scenarios.settings import Settings, override
from server import flower, run
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder
from server.superlink import COMMANDS, environment

SMALL = (
    "fleet.clients=3 rounds.number=2 rounds.average=1 export.recover_rounds=0 export.prune=0 fleet.wait=60 "
    "reference.no_privacy=false privacy.noise_seed=1 protect=encrypted"
)


@dataclass
class Fleet:
    """A SuperLink, three SuperNodes and a key holder, as their owners start them."""

    home: Path
    address: str
    processes: dict[str, subprocess.Popen[bytes]]

    def start(self, name: str, *command: str) -> None:
        (self.home / name).mkdir(exist_ok=True)
        with (self.home / name / "log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment(self.home / name), stdout=log, stderr=log, start_new_session=True
            )

    def key_holder(self) -> None:
        words = ["keyholder", str(self.home / "keys"), "--clients", str(self.home / "clients.toml")]
        self.start("keyholder", *UMBEL, *words, "--superlink", self.address, "--port", str(free_port()))

    def run(self, name: str, settings: Settings) -> Path:
        return flower.run("digits", load("digits"), settings, self.home / name, Quiet(), lambda: False, self.address)


UMBEL = [sys.executable, "-m", "server.cli"]


def umbel(*words: str) -> str:
    return subprocess.run([*UMBEL, *words], capture_output=True, text=True, check=True).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(text: str = "") -> Settings:
    return override(load("digits").settings, f"{SMALL} {text}")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home, port = tmp_path_factory.mktemp("deployment"), free_port()
    made = Fleet(home, f"127.0.0.1:{port}", {})
    names = [f"client-{i}" for i in range(3)]
    lines = [umbel("key", "recipient", name, "--state", str(home / f"state-{name}")) for name in names]
    (home / "clients.toml").write_text("".join(lines))
    known = umbel("keyholder", str(home / "keys"), "--clients", str(home / "clients.toml")).strip()
    words = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    made.start("superlink", str(COMMANDS / "flower-superlink"), *words)
    limit = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < limit, (home / "superlink" / "log").read_text()
            time.sleep(0.1)
    for name in names:
        config = f'client="{name}" state="{home / f"state-{name}"}" {known}'
        words = ["--insecure", "--superlink", made.address, "--port", str(free_port()), "--node-config", config]
        made.start(name, str(COMMANDS / "flower-supernode"), *words)
    made.key_holder()
    yield made
    for process in reversed(made.processes.values()):
        os.killpg(process.pid, signal.SIGTERM)
    for process in made.processes.values():
        process.wait(20)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "privacy.unit=client privacy.noise=shares protect.trust=shared"])
def test_a_key_holder_among_real_nodes_gives_the_embedded_weights(fleet: Fleet, tmp_path: Path, text: str) -> None:
    wanted = settings(text)
    with RunFolder.create(tmp_path / "run", "digits", wanted) as folder:
        run.run(run.prepare(load("digits"), wanted, folder, EmbeddedFleet, Quiet()))
    out = fleet.run(wanted.privacy.noise, wanted)
    assert (out / "weights.safetensors").read_bytes() == (tmp_path / "run" / "weights.safetensors").read_bytes()
    rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [(row["applied"], row["replies"]) for row in rows] == [(True, 3), (True, 3)]
