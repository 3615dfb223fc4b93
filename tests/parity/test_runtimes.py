"""The same weights, to the bit, on all three runtimes: embedded, Flower's simulation, SuperLink with SuperNodes."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients import app as client_app
from clients import messages
from clients.task import Charge, Reply, Task
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import build_model, load
from scenarios.settings import Settings, override
from scenarios.weights import flatten, layout
from server import flower, run
from server.embedded import EmbeddedFleet
from server.record import RunFolder
from server.state import Row
from server.superlink import COMMANDS, PARENT, environment, own

PROJECT = Path(__file__).parents[2]
SMALL = (
    "fleet.clients=3 rounds.number=2 rounds.average=1 export.recover_rounds=0 export.prune=0 "
    "reference.central_epochs=0 reference.no_privacy=false codec=topk:0.5"
)
NOISE = {
    "with noise and control variates": "privacy.noise_seed=1 local.scaffold=true local.steps=3",
    "without": "privacy.unit=none",  # and with the residual of topk in the place of control variates
    "integers": "privacy.unit=client privacy.epsilon=50 privacy.noise_seed=1 codec=int9",
    "coordinates": "privacy.unit=client privacy.epsilon=50 privacy.noise_seed=1 codec=shared-topk:0.1:int9",
    "masked": "privacy.noise_seed=1 protect=masked codec=int16 rounds.number=1",  # five messages a round
}


class Heard:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.said: list[str] = []

    def row(self, row: Row) -> None:
        self.rows.append(row)

    def status(self, text: str) -> None:
        self.said.append(text)


def settings(noise: str) -> Settings:
    return override(load("digits").settings, f"{SMALL} {NOISE[noise]}")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folder of the embedded runtime, for each kind of noise."""
    folders = {}
    for noise in NOISE:
        path = tmp_path_factory.mktemp("embedded") / "run"
        folder = RunFolder.create(path, "digits", settings(noise))
        run.run(run.prepare(load("digits"), settings(noise), folder, EmbeddedFleet, Heard()))
        folders[noise] = path
    return folders


def assert_same(one: Path, other: Path, number: int = 2) -> None:
    """Same weights to the bit, same rounds (times aside), same account."""
    assert (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    assert rows(one) == rows(other)
    clients = [json.loads((path / "report.json").read_text())["privacy"]["clients"] for path in (one, other)]
    assert clients[0] == clients[1]
    assert len(rows(one)) == number


def rows(path: Path) -> list[Row]:
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE)
def test_flowers_simulation_gives_the_embedded_weights(noise: str, embedded: dict[str, Path], tmp_path: Path) -> None:
    heard, running = Heard(), set()

    def look() -> bool:
        running.update(ours())
        return False

    out = flower.run("digits", load("digits"), settings(noise), tmp_path / "run", heard, look)
    assert out == tmp_path / "run"
    assert_same(out, embedded[noise], settings(noise).rounds.number)
    assert [row["round"] for row in heard.rows] == list(range(1, settings(noise).rounds.number + 1))
    assert len(running) > 3 or not Path("/proc").is_dir()  # SuperLink, SuperExec, simulation, Ray
    assert ours() == []


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE)
def test_real_nodes_give_the_embedded_weights(
    noise: str, embedded: dict[str, Path], superlink: str, tmp_path: Path
) -> None:
    out = flower.run("digits", load("digits"), settings(noise), tmp_path / "run", Heard(), lambda: False, superlink)
    assert_same(out, embedded[noise], settings(noise).rounds.number)


def test_masked_rounds_give_the_weights_of_the_same_integers_in_the_clear(
    embedded: dict[str, Path], tmp_path: Path
) -> None:
    clear = override(settings("masked"), "protect=none")
    folder = RunFolder.create(tmp_path / "run", "digits", clear)
    run.run(run.prepare(load("digits"), clear, folder, EmbeddedFleet, Heard()))
    weights = [(path / "weights.safetensors").read_bytes() for path in (tmp_path / "run", embedded["masked"])]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_simulation_that_is_stopped_goes_on_embedded_to_the_same_weights(tmp_path: Path) -> None:
    wanted = override(settings("without"), "rounds.number=60 local.rate=0.5")
    heard = Heard()
    with pytest.raises(run.Stopped, match=r"stopped after round \d+: `umbel resume"):
        flower.run("digits", load("digits"), wanted, tmp_path / "cut", heard, lambda: bool(heard.rows))
    done = len(rows(tmp_path / "cut"))
    assert 1 <= done < 60
    assert not (tmp_path / "cut" / flower.STOP).exists()
    for name in ("cut", "whole"):
        path = tmp_path / name
        folder = RunFolder.open(path) if name == "cut" else RunFolder.create(path, "digits", wanted)
        told = folder.settings()[1]
        run.run(run.prepare(load("digits"), told, folder, EmbeddedFleet, Heard()))
    assert_same(tmp_path / "cut", tmp_path / "whole", 60)


def ours() -> list[str]:
    """Processes that a simulation of this process has started."""
    mark, found = f"{PARENT}={os.getpid()}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            found += [file.parent.name] if mark in file.read_bytes().split(b"\0") else []
    return found


@pytest.mark.slow
def test_too_few_simulated_nodes_are_one_line_and_no_wait(tmp_path: Path) -> None:
    with own(tmp_path) as link:
        (tmp_path / "config.toml").write_text(f'[superlink.own]\naddress = "{link.address}"\ninsecure = true\n')
        command = [str(COMMANDS / "flwr"), "run", str(PROJECT), "own", "--stream"]
        command += ["--federation-config", "num-supernodes=2 client-resources-num-cpus=1"]
        command += ["--run-config", f"""set='{SMALL} run.out="{tmp_path / "run"}"'"""]
        done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=100)
    lines = [line for line in done.stdout.splitlines() if line.startswith("umbel: exit")]
    assert lines == [
        "umbel: exit 2 there are 3 clients but 2 simulated nodes: "
        "add --federation-config num-supernodes=3, or set fleet.clients=2"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("superlink", "reason"),
    [
        ("127.0.0.1:1", "no SuperLink answers at 127.0.0.1:1"),
        ("127.0.0.1", "write HOST:PORT"),
        ("grpc://127.0.0.1:1", "write HOST:PORT"),
        ("127.0.0.1:eighty", "write HOST:PORT"),
    ],
)
def test_a_superlink_that_is_not_there_is_one_line(superlink: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=reason):
        flower.run("digits", load("digits"), settings("without"), tmp_path / "run", Heard(), lambda: False, superlink)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text", ["", "rounds.number=7 local.rate=0.1 privacy.noise_seed=3", "server.rate=0.25 model=mlp partition=iid"]
)
def test_the_set_string_makes_the_same_settings_on_every_node(text: str, tmp_path: Path) -> None:
    scenario = load("digits")
    wanted = override(scenario.settings, text)
    told = override(
        scenario.settings,
        flower.settings_text(scenario, wanted, tmp_path / "a folder", resume=True, clock="wall"),
    )
    assert (told.run.out, told.run.resume, told.fleet.clock) == (str(tmp_path / "a folder"), True, "wall")
    assert told.model_copy(update={"run": wanted.run, "fleet": wanted.fleet}) == wanted


@pytest.mark.slow
def test_a_real_node_reserves_in_its_own_ledger_replays_its_bytes_and_is_found_out_when_it_forgets(
    superlink: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = override(load("digits").settings, f"{SMALL} rounds.number=1 run.state={tmp_path / 'server'}")
    out = flower.run("digits", load("digits"), wanted, tmp_path / "one", Heard(), lambda: False, superlink)
    assert [row["rejected"] for row in rows(out)] == [[]]
    me, server, node = (
        Account("example", "client-0", "digits"),
        *(
            Ledger(path, keep=True)
            for path in (tmp_path / "server" / "devices.ledger", home / "state-0" / "node.ledger")
        ),
    )
    for ledger in (server, node):
        ledger.read()
    assert +node.accounts[me].history == +server.accounts[me].history != {}
    assert node.holds(server.seen[me])
    assert server.holds(node.seen[me])

    # the server's last message once more, at the node's own front door
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1, raising=False)
    reserved = [body for body in node.records or () if body["kind"] == "RESERVE"][-1]
    model, text = build_model(load("digits"), wanted), flower.settings_text(load("digits"), wanted, out, False, "wall")
    charge = Charge(reserved["run"], reserved["attempt"], server.chain.head, server.seen[me])
    task = Task(
        "train", 1, "client-0", flatten(model), layout(model), 0.1, reserved["steps"],
        mechanism=Mechanism(*reserved["mechanism"]), clip=wanted.privacy.clip, charge=charge,
    )  # fmt: skip
    config = {"client": "client-0", "state": str(home / "state-0")}
    context = Context(1, 1, config, RecordDict(), {"scenario": "digits", "set": text})
    message = Message(messages.encode_task(task), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    again = messages.decode_reply(client_app.app(message, context).content, task)
    (stored,) = (home / "state-0").glob("*.reply")
    assert again.reason == ""
    assert len(again.payload) > 1000
    assert stored.read_bytes().endswith(b"\n" + again.payload)
    assert hashlib.sha256(again.payload).hexdigest().encode() in stored.read_bytes()
    assert node.read() == node.chain.head
    assert sum(node.accounts[me].history.values()) == sum(server.accounts[me].history.values()), "it cost nothing"

    for path in (home / "state-0").glob("node.ledger*"):  # file, head and key
        path.unlink()
    out = flower.run("digits", load("digits"), wanted, tmp_path / "two", Heard(), lambda: False, superlink)
    (row,) = rows(out)
    assert [entry["name"] for entry in row["rejected"]] == ["client-0"]
    assert "it was rolled back" in row["rejected"][0]["reason"]


class Dies(EmbeddedFleet):
    """Its client-0 is gone from round 2 on."""

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task, reply in zip(tasks, super().ask(tasks), strict=True):
            gone = task.client == "client-0" and task.round > 1
            yield Reply(task.round, task.client, reason="its node is gone") if gone else reply


@pytest.mark.slow
def test_a_node_that_is_killed_between_masking_and_unmasking_is_in_that_sum_and_the_run_goes_on(tmp_path: Path) -> None:
    wanted = override(
        settings("masked"), "rounds.number=2 privacy.unit=none privacy.noise_seed= fleet.clients=4 protect.minimum=4"
    )
    clear = override(wanted, "protect=none protect.minimum= rounds.minimum=4")
    folder = RunFolder.create(tmp_path / "clear", "digits", clear)
    run.run(run.prepare(load("digits"), clear, folder, Dies, Heard()))
    with deployment(tmp_path, 4) as (address, nodes):

        def look() -> bool:
            if nodes[0].poll() is None and list(tmp_path.glob("state-[123]/*/*/masks-*/sign")):
                os.killpg(nodes[0].pid, signal.SIGKILL)
            return False

        heard = Heard()
        out = flower.run("digits", load("digits"), wanted, tmp_path / "run", heard, look, address)
        assert nodes[0].poll() == -signal.SIGKILL
    first, second = rows(out)
    assert (first["replies"], first["rejected"], first["applied"]) == (4, [], True)
    assert (second["replies"], second["applied"]) == (0, False)
    assert second["reason"] == "no masked sum: attempt 1 of round 2: 3 clients take part, 4 are the minimum"
    assert "client-0" in [entry["name"] for entry in second["rejected"]] + second["late"]
    assert "clients take the masks off the sum, round 1" in heard.said
    assert (out / "weights.safetensors").read_bytes() == (tmp_path / "clear" / "weights.safetensors").read_bytes()


# ---- A SuperLink and its SuperNodes, as a user starts them ----


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the nodes keep their state, in state-0 to state-2."""
    return tmp_path_factory.mktemp("deployment")


@pytest.fixture(scope="module")
def superlink(home: Path) -> Iterator[str]:
    """HOST:PORT of a SuperLink with three SuperNodes, each told by its owner which client it is."""
    with deployment(home, 3) as (address, _):
        yield address


@contextmanager
def deployment(home: Path, number: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """HOST:PORT of a SuperLink, and its SuperNodes: client-0 and so on, who know one another by a file of keys."""
    address = f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    states = [home / f"state-{i}" for i in range(number)]
    printed = [umbel("key", "node", str(state), f"client-{i}") for i, state in enumerate(states)]
    (home / "peers.toml").write_text("".join(printed))
    command = ["flower-superlink", "--insecure", "--host", host, "--port", port]
    processes = [start([*command, "--disable-runtime-dependency-installation"], home / "superlink")]
    try:
        wait_for(int(port), home)
        for i, state in enumerate(states):
            config = f'client="client-{i}" state="{state}" peers="{home / "peers.toml"}"'
            command = ["flower-supernode", "--insecure", "--superlink", address, "--port", str(free_port())]
            processes.append(start([*command, "--node-config", config], home / f"node-{i}"))
        yield address, processes[1:]
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(20)


def umbel(*words: str) -> str:
    return subprocess.run([str(COMMANDS / "umbel"), *words], capture_output=True, text=True, check=True).stdout


def start(command: list[str], home: Path) -> subprocess.Popen[bytes]:
    home.mkdir()
    with (home / "log").open("wb") as log:
        return subprocess.Popen(
            [str(COMMANDS / command[0]), *command[1:]],
            env=environment(home),
            stdout=log,
            stderr=log,
            start_new_session=True,  # a node and the processes of its messages are one group
        )


def wait_for(port: int, home: Path) -> None:
    limit = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < limit, (home / "superlink" / "log").read_text()
            time.sleep(0.1)
