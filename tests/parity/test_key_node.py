"""A key holder that is a node of a real fleet: the embedded weights to the bit, its noise among them; and its death."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from clients.task import Reply, Task
from clients.training import Node
from privacy.cohort_noise import CohortNoise
from scenarios import load
from scenarios.settings import Settings, override
from server import budget, flower, run
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder
from server.rounds import central_noise
from server.superlink import COMMANDS, environment

SMALL = (
    "fleet.clients=3 rounds.number=2 rounds.average=1 export.recover_rounds=0 export.prune=0 fleet.wait=120 "
    "reference.no_privacy=false protect=encrypted"
)


@dataclass
class Fleet:
    """A SuperLink and three SuperNodes, as their owners start them; key holders come and go."""

    home: Path
    address: str
    processes: dict[str, subprocess.Popen[bytes]]

    def start(self, name: str, *command: str) -> None:
        (self.home / name).mkdir(exist_ok=True)
        with (self.home / name / "log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment(self.home / name), stdout=log, stderr=log, start_new_session=True
            )

    def start_key_holder(self, *options: str) -> None:
        """Of the same folder each time."""
        words = ["keyholder", str(self.home / "keys"), "--clients", str(self.home / "clients.toml"), *options]
        self.start("keyholder", *UMBEL, *words, "--superlink", self.address, "--port", str(free_port()))

    @contextmanager
    def key_holder(self, *options: str) -> Iterator[None]:
        self.start_key_holder(*options)
        try:
            yield
        finally:
            self.end("keyholder", signal.SIGTERM)

    def end(self, name: str, how: signal.Signals) -> None:
        """A node and the processes of its messages are one group."""
        with suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, how)
        self.processes[name].wait(20)

    def answered(self) -> Iterator[Path]:
        """What clients have noted down of the last round that they encrypted for, a file a client and run."""
        return self.home.glob("state-*/*/*/encrypted")

    def run(self, name: str, settings: Settings, look: Callable[[], bool] = lambda: False) -> Path:
        return flower.run("digits", load("digits"), settings, self.home / name, Quiet(), look, self.address)


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
    yield made
    for name in reversed(made.processes):
        made.end(name, signal.SIGTERM)


def in_the_clear(path: Path, wanted: Settings, fleet: type[EmbeddedFleet] = EmbeddedFleet) -> bytes:
    """The final weights of the same integers in the clear, in this process."""
    clear = override(wanted, "protect=none codec=int16")
    with RunFolder.create(path, "digits", clear) as folder:
        run.run(run.prepare(load("digits"), clear, folder, fleet, Quiet()))
    return (path / "weights.safetensors").read_bytes()


def noise(states: Path, wanted: Settings) -> CohortNoise:
    """What a run is planned with."""
    node = Node(load("digits"), wanted, load("digits").data(wanted), states)
    made = central_noise(budget.plans(EmbeddedFleet(node).hello(), wanted), wanted)
    assert isinstance(made, CohortNoise)
    return made


def rows(out: Path) -> list[dict[str, Any]]:
    path = out / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(1200)  # it starts five processes of Flower, and one a message
def test_a_key_holder_among_real_nodes_puts_the_noise_on_and_gives_the_embedded_weights(
    fleet: Fleet, tmp_path: Path
) -> None:
    wanted = settings("privacy.unit=client privacy.epsilon=50 privacy.noise_seed=1")
    fields = asdict(noise(tmp_path / "states", wanted)).items()
    options = [f"--{name.replace('_', '-')}={value!r}" for name, value in fields]
    with fleet.key_holder(*options, "--seeded"):
        out = fleet.run("run", wanted)
    assert (out / "weights.safetensors").read_bytes() == in_the_clear(tmp_path / "clear", wanted)
    assert [(row["applied"], row["replies"]) for row in rows(out)] == [(True, 3), (True, 3)]


class Loses(EmbeddedFleet):
    """Nothing comes in round 2."""

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task, reply in zip(tasks, super().ask(tasks), strict=True):
            yield Reply(task.round, task.client, reason="lost") if task.round == 2 else reply


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute until Flower lists the dead node no more, beside three rounds of real nodes
def test_a_key_holder_that_is_killed_before_it_opens_a_sum_costs_that_round_and_is_found_again(
    fleet: Fleet, tmp_path: Path
) -> None:
    shares = "privacy.unit=client privacy.epsilon=20 privacy.noise=shares protect.trust=shared"
    wanted, before = settings(f"rounds.number=3 privacy.noise_seed=1 {shares}"), set(fleet.answered())
    killed: list[int] = []

    def look() -> bool:
        notes = [json.loads(path.read_bytes()) for path in set(fleet.answered()) - before]
        if not killed and any(round_ == 2 for _, _, round_ in notes):  # its update is still on its way
            killed.append(fleet.processes["keyholder"].pid)
            fleet.end("keyholder", signal.SIGKILL)
        if len(rows(fleet.home / "hit")) == 2 and fleet.processes["keyholder"].pid in killed:
            fleet.start_key_holder()
        return False

    with fleet.key_holder():
        out = fleet.run("hit", wanted, look)
    assert killed
    assert [(row["applied"], row["replies"]) for row in rows(out)] == [(True, 3), (False, 3), (True, 3)]
    assert rows(out)[1]["reason"].startswith("no encrypted sum: the key holder")
    assert (out / "weights.safetensors").read_bytes() == in_the_clear(tmp_path / "clear", wanted, Loses)
