"""BlockFleet: blocks on the nodes of a Flower simulation come to the embedded runtime's bits, whoever dies or lies."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict

from clients import app as client_app
from clients.training import Node
from privacy.refused import Refused
from scenarios import load
from scenarios.settings import override
from server import budget
from server.blocks import BlockFleet
from server.canaries import Unrecorded
from server.embedded import EmbeddedFleet
from server.masked import Masked
from server.rounds import Fleet, rounds
from server.score import NOTHING, scorer
from server.state import Row, ServerState, first_state

SCENARIO = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings

SIZES = {f"{i:02}": 10 + 3 * i for i in range(9)}
TEST, HERE = int(os.environ["UMBEL_TEST_PROCESS"]), Path(__file__).parent

def examples(name):
    if name == "05" and os.getpid() != TEST and (HERE / "deadly").exists():
        if (HERE / "once").exists():
            (HERE / "deadly").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 30), 12, generator=generator)
    return Examples(x, (x[:, 0] + x[:, 1] > 0).long())

def data(settings):
    return Federation(SIZES, examples, examples("validation"), examples("test"), examples)

net = lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 2))
SCENARIO = Scenario("for a test", Settings(), {"net": net}, data, name="made")
"""
BASE = "rounds.number=3 local.batch=8 local.rate=0.2 local.epochs=2 run.processes=2 local.engine=cohort local.block=2"
WAYS = {
    "mean": "",
    "part of the fleet": "rounds.fraction=0.5",
    "median": "server.combine=median",
    "nova": "server.normalize=true",
    "scaffold": "local.scaffold=true",
    "top-k": "codec=topk:0.2",
    "shared coordinates": "codec=shared-topk:0.3",
    "integers": "codec=int16",
    "dropouts": "faults.dropout=0.3",
    "example": "privacy.unit=example privacy.noise_seed=2",
    "client": "privacy.unit=client privacy.noise_seed=2 privacy.epsilon=50",
    "adaptive": "privacy.unit=client privacy.noise_seed=2 privacy.adapt=true privacy.epsilon=50",
    "both": "privacy.unit=both privacy.noise_seed=2 privacy.epsilon=50",
    "local": "privacy.unit=local privacy.noise_seed=2 privacy.epsilon=500",
    "clients' tests": "evaluation.on=clients",
    "masked": "protect=masked",
}
Bend = Callable[[RecordDict], RecordDict]


@pytest.fixture(autouse=True)
def _inside_a_flower_process(flower_process: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("UMBEL_TEST_PROCESS", str(os.getpid()))
    monkeypatch.setattr(client_app, "_HELD", 0.0)
    yield
    client_app._node.cache_clear()
    client_app._crew.cache_clear()


@dataclass
class Worker:
    """One of Flower's actors on Ray."""

    alive: bool = True


class Simulated:
    """Of Flower's simulation what a fleet uses: who came back to its pool last works next; the dead fail at once."""

    def __init__(self, contexts: Mapping[int, Context], workers: int = 2) -> None:
        self.contexts, self.pool = contexts, [Worker() for _ in range(workers)]
        self.dies: Callable[[int], bool] = lambda number: False
        """Whether a worker dies at the message of this number, from 0."""
        self.up: Bend = lambda answer: answer
        self.sent = list[Message]()
        self._queue, self._busy = list[Message](), list[tuple[Worker, Message]]()
        self._answers = dict[str, Message]()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(len(self.sent))
            self.sent.append(message)
            self._queue.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        while self._queue and self.pool:
            self._busy.append((self.pool.pop(), self._queue.pop(0)))
        for worker, message in sorted(self._busy, key=lambda one: one[0].alive):  # the dead come back first
            if self.dies(int(message.metadata.message_id)):
                worker.alive = False
            if worker.alive:
                answer = client_app.app(message, self.contexts[message.metadata.dst_node_id])
                answer = Message(self.up(answer.content), reply_to=message)
            else:
                answer = Message(Error(code=0, reason="ActorDiedError at patient 17"), reply_to=message)
            self._answers[message.metadata.message_id] = answer
            self.pool.append(worker)
        self._busy.clear()
        return [self._answers.pop(number) for number in message_ids if number in self._answers]


@dataclass
class House:
    """A federation in a folder."""

    folder: Path
    text: str

    def node(self, name: str) -> Node:
        scenario = load(str(self.folder / "made.py"))
        settings = override(scenario.settings, f"{self.text} run.out={self.folder / name}")
        return Node(scenario, settings, scenario.data(settings), self.folder / name / "clients")

    def grid(self, name: str, nodes: int = 2, workers: int = 2) -> Simulated:
        told = {"scenario": str(self.folder / "made.py"), "set": f"{self.text} run.out={self.folder / name}"}
        config = {"num-partitions": nodes}
        contexts = {7 + i: Context(1, 7 + i, {"partition-id": i} | config, RecordDict(), told) for i in range(nodes)}
        return Simulated(contexts, workers)

    def embedded(self, name: str = "embedded") -> tuple[ServerState, list[Row]]:
        node = self.node(name)
        return federate(node, EmbeddedFleet(node))

    def simulated(self, grid: Simulated, name: str = "simulated") -> tuple[ServerState, list[Row], list[str]]:
        node, said = self.node(name), list[str]()
        return *federate(node, BlockFleet(node, grid, said.append)), said


def federate(node: Node, fleet: Fleet, state: ServerState | None = None) -> tuple[ServerState, list[Row]]:
    roster = fleet.hello()
    plans = budget.plans(roster, node.settings)
    gathered = {"gathered": Masked("run", 1, 3)} if node.settings.protect.mode == "masked" else {}
    state = state or first_state(node.template, node.settings)
    score = scorer(node, fleet, list(roster)) if node.settings.protect.mode == "none" else lambda _: NOTHING
    steps = list(rounds(fleet, roster, plans, state, node.settings, Unrecorded(), score, **gathered))  # type: ignore[arg-type]
    rows = [{name: value for name, value in row.items() if not name.startswith("seconds")} for _, row in steps]
    return steps[-1][0], rows


@pytest.fixture
def house(tmp_path: Path) -> Callable[..., House]:
    """house(settings) -> House."""

    def made(text: str = "") -> House:
        (tmp_path / "made.py").write_text(SCENARIO)
        return House(tmp_path, f"{BASE} {text}")

    return made


@pytest.mark.parametrize("way", WAYS)
def test_blocks_on_workers_give_the_embedded_bits(house: Callable[..., House], way: str) -> None:
    here = house(WAYS[way])
    truth, told = here.embedded()
    found, rows, said = here.simulated(here.grid("simulated"))
    assert np.array_equal(found.weights, truth.weights)
    assert rows == told
    assert found.clients == truth.clients
    assert (said, rows[-1]["applied"]) == ([], True)


@pytest.mark.parametrize(("nodes", "workers"), [(1, 1), (3, 2), (9, 4)])
def test_however_many_nodes_and_workers_give_the_same_bits(
    house: Callable[..., House], nodes: int, workers: int
) -> None:
    here = house()
    grid = here.grid("simulated", nodes, workers)
    found, rows, _ = here.simulated(grid)
    truth, told = here.embedded()
    assert (found.weights.tobytes(), rows) == (truth.weights.tobytes(), told)
    assert len(grid.sent) == 3 * min(nodes, 5), "a message a node and round, and no more than blocks"


def test_a_run_that_goes_on_in_blocks_elsewhere_gives_the_same_bits(house: Callable[..., House]) -> None:
    here = house("codec=topk:0.2")
    truth, _ = here.embedded()
    node = here.node("both")
    first = replace(first_state(node.template, node.settings), until=1)
    half, _ = federate(node, EmbeddedFleet(node), first)
    rest, _ = federate(node, BlockFleet(node, here.grid("both"), print), replace(half, until=3))
    assert np.array_equal(rest.weights, truth.weights)


def test_a_large_round_goes_out_in_several_messages(
    house: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.blocks._MOST", 1)
    here = house()
    grid = here.grid("simulated")
    found, _, _ = here.simulated(grid)
    assert len(grid.sent) == 15
    assert np.array_equal(found.weights, here.embedded()[0].weights)


# ---- deaths ----


def test_a_process_that_dies_at_a_block_is_named_and_the_block_trained_again(house: Callable[..., House]) -> None:
    here = house("privacy.unit=client privacy.noise_seed=2 privacy.epsilon=50")
    truth, told = here.embedded()
    (here.folder / "deadly").touch()
    (here.folder / "once").touch()
    found, rows, said = here.simulated(here.grid("simulated"))
    assert (found.weights.tobytes(), rows) == (truth.weights.tobytes(), told)
    (line,) = said
    assert line.startswith("worker 1 died in its block, which is trained again (on ")


@pytest.mark.parametrize("way", ["mean", "median", "client", "masked"])
def test_a_client_that_ends_every_process_is_left_out_alone_with_the_embedded_bits(
    house: Callable[..., House], way: str
) -> None:
    here = house(f"rounds.number=1 {WAYS[way]}")
    (here.folder / "deadly").touch()
    found, rows, said = here.simulated(here.grid("simulated"))
    assert rows[0]["rejected"] == [{"name": "05", "reason": "its worker died 3 times, then with it alone"}]
    assert (len(said), rows[0]["applied"]) == (4, True)
    truth, told = here.embedded()
    assert (found.weights.tobytes(), rows) == (truth.weights.tobytes(), told)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("number", range(3))
def test_a_worker_of_ray_that_dies_is_named_and_gets_nothing_more(
    house: Callable[..., House], workers: int, number: int
) -> None:
    here = house()
    truth, told = here.embedded()
    grid = here.grid("simulated", workers, workers)
    grid.dies = lambda message: message == number
    found, rows, said = here.simulated(grid)
    assert (found.weights.tobytes(), rows) == (truth.weights.tobytes(), told)
    assert len(said) == 1
    assert said[0].endswith("which are trained again")
    assert sum(worker.alive for worker in grid.pool) == workers - 1


def test_when_every_worker_of_ray_has_died_the_run_says_so(house: Callable[..., House]) -> None:
    here = house()
    grid = here.grid("simulated")
    grid.dies = lambda message: True
    with pytest.raises(RuntimeError, match="every worker of the simulation has died"):
        here.simulated(grid)


# ---- what does not fit ----


def garbled(change: Callable[[dict[str, Any]], object], block: int = 0) -> Bend:
    """What changes the fields of that block in every answer that has it."""

    def bend(answer: RecordDict) -> RecordDict:
        if f"umbel.{block}" in answer:
            change(answer[f"umbel.{block}"])  # type: ignore[arg-type]
        return answer

    return bend


def summing(value: float) -> Bend:
    """What fills the sum of the first block of every answer with `value`."""

    def bend(answer: RecordDict) -> RecordDict:
        array = answer["arrays.0"]["total"]
        array.data = np.full(len(array.data) // 8, value, "<f8").tobytes()
        return answer

    return bend


@pytest.mark.parametrize(
    ("text", "bend", "reason"),
    [
        ("", garbled(lambda fields: fields.update(examples=[11, 13])), "trained on 11 examples, had 10 at first"),
        ("", garbled(lambda fields: fields.update(steps=1)), "took 1 steps where"),
        ("", garbled(lambda fields: fields.update(client=["00", "00"])), "answered for round 1 of '00'"),
        ("", garbled(lambda fields: fields.update(within="yes")), "within is a str"),
        ("", garbled(lambda fields: fields.update(bytes=2**40)), "bytes for pieces of"),
        ("", garbled(lambda fields: fields.update(reason="away")), "an update that is in the sum and is not"),
        ("", summing(np.nan), "a sum of updates that is not finite"),
        ("privacy.unit=client privacy.epsilon=50", summing(1.0), "clipped updates make 2 at most"),
        ("server.combine=median", garbled(lambda fields: fields.update(summed=True)), "a sum where single answers"),
    ],
)
def test_a_garbled_block_costs_its_own_clients_who_are_named(
    house: Callable[..., House], text: str, bend: Bend, reason: str
) -> None:
    here = house(f"rounds.number=1 {text}")
    grid = here.grid("simulated")

    def first(answer: RecordDict) -> RecordDict:
        return bend(answer) if answer["umbel.0"]["client"][0] == "00" else answer

    grid.up = first
    _, (row,), _ = here.simulated(grid)
    assert [entry["name"] for entry in row["rejected"]] == ["00", "01"]
    assert all(reason in entry["reason"] for entry in row["rejected"])
    assert (row["replies"], row["applied"]) == (7, True)


def test_a_message_that_is_none_costs_the_clients_of_its_worker(house: Callable[..., House]) -> None:
    here = house("rounds.number=1")
    grid = here.grid("simulated")
    grid.up = lambda answer: RecordDict() if "umbel.2" in answer else answer
    _, (row,), _ = here.simulated(grid)
    assert [entry["name"] for entry in row["rejected"]] == ["04", "05", "06", "07", "08"]
    assert row["applied"]


def test_a_worker_that_never_answers_is_late(house: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    here = house("rounds.number=1 fleet.wait=0.05")
    grid = here.grid("simulated")
    answered = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", lambda ids: [one for one in answered(ids) if "1" not in ids])
    _, (row,), _ = here.simulated(grid)
    assert row["late"] == ["04", "05", "06", "07", "08"]


@pytest.mark.parametrize("config", [{"client": "00"}, {"keys": "here"}, {"data": "somewhere"}])
def test_a_node_that_is_not_simulated_takes_no_blocks(house: Callable[..., House], config: dict[str, str]) -> None:
    here = house("rounds.number=1")
    grid = here.grid("simulated")
    if "data" in config:  # a device whose owner forgot to say which client it is
        del grid.contexts[7].node_config["partition-id"]
    grid.contexts[7].node_config.update(config)
    _, (row,), _ = here.simulated(grid)
    assert {entry["reason"] for entry in row["rejected"]} == {
        "a device trains its own client alone, blocks are for simulated nodes: set fleet.clock=wall"
    }


def test_without_a_node_the_run_is_refused(house: Callable[..., House]) -> None:
    here = house()
    with pytest.raises(Refused, match="there are no simulated nodes"):
        here.simulated(here.grid("simulated", nodes=0))
