"""SCAFFOLD in a federation whose clients pull apart: it comes to the optimum at which FedAvg never arrives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients import state as client_state
from clients.task import Device, Hello, Reply, Task
from clients.training import Node
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios import load as load_scenario
from scenarios.settings import Settings, override
from scenarios.weights import Vector
from server import budget, edge, pairs, run
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder
from server.references import NoJournal
from server.rounds import rounds
from server.state import Row, Score, ServerState, first_state

SIZES = {"a": 20, "b": 30, "c": 40, "d": 70}
D = 6
BASE = "local.batch=0 local.steps=10 local.rate=0.1 server.weighting=uniform rounds.number=40"
SCAFFOLD = "local.scaffold=true"
CODECS = ["float32", "float16", "qsgd8", "topk:0.34"]


@cache
def made_examples(name: str) -> Examples:
    """Linear regression: inputs of another covariance and answers of another truth for each client."""
    number = ord(name) - ord("a")
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(SIZES[name], D, generator=generator) * torch.linspace(0.4, 1.6, D).roll(2 * number)
    return Examples(x, x @ (2 * torch.randn(D, generator=generator)))


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    return ((outputs[:, 0] - y) ** 2).mean() / 2


def optimum(weights: Mapping[str, float]) -> Vector:
    """The least of the clients' weighted losses, in closed form."""
    hessian, right = np.zeros((D, D)), np.zeros(D)
    for name, weight in weights.items():
        x, y = (part.double().numpy() for part in made_examples(name))
        hessian += weight * x.T @ x / len(y)
        right += weight * x.T @ y / len(y)
    return np.linalg.solve(hessian, right).astype(np.float32)


EQUAL, BY_SIZE = optimum(dict.fromkeys(SIZES, 1.0)), optimum({name: float(size) for name, size in SIZES.items()})


class Watched:
    """The embedded fleet with devices given, every reply passed through `bend`, and every task kept."""

    def __init__(self, node: Node, bend: Callable[[Task, Reply], Reply], devices: Mapping[str, Device]) -> None:
        self._fleet, self._bend, self._devices = EmbeddedFleet(node), bend, devices
        self.asked: list[Task] = []

    def hello(self) -> dict[str, Hello]:
        return {n: replace(h, device=self._devices.get(n, Device())) for n, h in self._fleet.hello().items()}

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        self.asked += tasks
        return (self._bend(task, reply) for task, reply in zip(tasks, self._fleet.ask(tasks), strict=True))


def made_node(folder: Path, text: str) -> Node:
    settings = override(Settings(), f"{BASE} {text}")
    federation = Federation(SIZES, made_examples, made_examples("a"))
    models = {"net": lambda: nn.Linear(D, 1, bias=False)}
    return Node(
        Scenario("made", Settings(), models, lambda _: federation, squared, name="made"), settings, federation, folder
    )


def federate(
    folder: Path,
    text: str,
    bend: Callable[[Task, Reply], Reply] = lambda _, reply: reply,
    devices: Mapping[str, Device] = {},
    state: ServerState | None = None,
) -> tuple[ServerState, list[Row], list[Task]]:
    node = made_node(folder, text)
    fleet = Watched(node, bend, devices)
    begun = state or first_state(node.template, node.settings)
    steps = list(rounds(fleet, fleet.hello(), {}, begun, node.settings, NoJournal(), lambda _: Score(1.0, 0.5)))
    return steps[-1][0], [row for _, row in steps], fleet.asked


def variates(folder: Path, state: ServerState) -> dict[str, Vector]:
    """Each client's c_i, from its own disk, as its next task would find it; zeros where it has none yet."""
    found = {}
    for name in SIZES:
        last = state.clients[name].last if name in state.clients else 0
        task = Task("train", state.round + 1, name, state.weights, state.layout, state_round=last)
        own = client_state.load(folder, task).control
        found[name] = np.zeros(D, np.float32) if own is None else own
    return found


def distance(state: ServerState, to: Vector = EQUAL) -> float:
    return float(np.linalg.norm(state.weights - to))


@pytest.fixture(scope="module")
def stalled(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How far from the optimum FedAvg ends."""
    return distance(federate(tmp_path_factory.mktemp("fedavg"), "")[0])


def test_fedavg_stalls_at_another_point_however_long_it_runs(stalled: float, tmp_path: Path) -> None:
    assert stalled > 0.1 * np.linalg.norm(EQUAL)
    assert distance(federate(tmp_path, "rounds.number=20")[0]) == pytest.approx(stalled, rel=0.01)


@pytest.mark.parametrize("codec", CODECS)
def test_scaffold_comes_to_the_optimum_whatever_the_codec_loses(codec: str, stalled: float, tmp_path: Path) -> None:
    state, _, _ = federate(tmp_path, f"{SCAFFOLD} codec={codec}")
    assert distance(state) < 1e-2 * stalled


def test_scaffold_comes_to_the_optimum_when_half_the_clients_are_asked(stalled: float, tmp_path: Path) -> None:
    state, _, _ = federate(tmp_path, f"{SCAFFOLD} rounds.fraction=0.5 rounds.number=80")
    assert distance(state) < 3e-2 * stalled


@pytest.mark.parametrize("change", ["", "server.normalize=true"])
def test_clients_that_take_fewer_steps_do_not_move_the_optimum(change: str, stalled: float, tmp_path: Path) -> None:
    devices = {"d": Device(speed=700.0), "a": Device(speed=240.0)}
    text = f"{SCAFFOLD} fleet.deadline=0.5 {change}"
    state, _, asked = federate(tmp_path, text, devices=devices)
    assert {task.client: task.steps for task in asked} == {"a": 6, "b": 10, "c": 10, "d": 5}
    assert distance(state) < 1e-2 * stalled


def test_the_optimum_is_that_of_the_weights_of_the_mean(tmp_path: Path) -> None:
    state, _, _ = federate(tmp_path, f"{SCAFFOLD} server.weighting=examples")
    assert distance(state, BY_SIZE) < 0.01 < 0.1 < distance(state, EQUAL)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_servers_variate_is_the_mean_of_those_on_the_clients_disks(
    codec: str, weighting: str, tmp_path: Path
) -> None:
    text = f"{SCAFFOLD} codec={codec} server.weighting={weighting} rounds.fraction=0.5 rounds.number=7"
    state, _, _ = federate(tmp_path, text)
    own = variates(tmp_path, state)
    weights = [SIZES[name] if weighting == "examples" else 1 for name in SIZES]
    assert state.control is not None
    assert np.abs(state.control).max() > 0.1
    assert np.allclose(state.control, np.average(list(own.values()), axis=0, weights=weights), atol=1e-5)


def test_a_reply_that_was_not_accepted_moves_neither_variate(tmp_path: Path) -> None:
    def bend(task: Task, reply: Reply) -> Reply:
        return replace(reply, payload=b"") if task.client == "b" and task.round > 1 else reply

    state, rows, _ = federate(tmp_path, f"{SCAFFOLD} rounds.number=4", bend)
    assert [len(row["rejected"]) for row in rows] == [0, 1, 1, 1]
    assert np.allclose(state.control, np.mean(list(variates(tmp_path, state).values()), axis=0), atol=1e-5)
    assert state.clients["b"].last == 1


def test_a_round_that_is_not_applied_leaves_every_variate_as_it_was(tmp_path: Path) -> None:
    def bend(task: Task, reply: Reply) -> Reply:
        return Reply(task.round, task.client, reason="gone") if task.round == 3 and task.client != "a" else reply

    before, _, _ = federate(tmp_path / "two", f"{SCAFFOLD} rounds.minimum=3 rounds.number=2")
    after, rows, _ = federate(tmp_path / "three", f"{SCAFFOLD} rounds.minimum=3 rounds.number=3", bend)
    assert [row["applied"] for row in rows] == [True, True, False]
    assert np.array_equal(after.control, before.control)  # type: ignore[arg-type]
    for name, own in variates(tmp_path / "three", after).items():
        assert np.array_equal(own, variates(tmp_path / "two", before)[name])


def test_a_variate_that_overflows_leaves_the_round_unapplied_and_says_so(tmp_path: Path) -> None:
    huge = np.full(D, 1e38, "<f4").tobytes()
    state, rows, _ = federate(
        tmp_path, f"{SCAFFOLD} rounds.number=1 local.steps=1", lambda _, r: replace(r, payload=huge)
    )
    assert (rows[0]["applied"], rows[0]["reason"]) == (
        False,
        "the control variate is no longer finite: lower local.rate",
    )
    assert not np.any(state.control)
    assert np.isfinite(state.weights).all()


def test_a_run_cut_off_after_its_clients_answered_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    text = f"{SCAFFOLD} codec=qsgd8 rounds.fraction=0.5"
    whole, _, _ = federate(tmp_path / "whole", f"{text} rounds.number=6")
    folder = RunFolder.create(tmp_path / "run", "made", Settings())
    state, rows, _ = federate(tmp_path / "cut", f"{text} rounds.number=3")
    folder.commit(state, rows[-1])
    (folder.path / "rounds.jsonl").write_text("".join(f'{{"round": {n}}}\n' for n in (1, 2, 3)))
    federate(tmp_path / "cut", text, state=replace(state, until=4))  # round 4 reaches the clients and is lost
    found = folder.committed()
    assert found is not None
    assert np.array_equal(found.control, state.control)  # type: ignore[arg-type]
    again, _, _ = federate(tmp_path / "cut", text, state=replace(found, until=6))
    assert again.weights.tobytes() == whole.weights.tobytes()
    assert again.control.tobytes() == whole.control.tobytes()  # type: ignore[union-attr]


def test_a_client_that_lost_its_variate_is_named_and_left_out(tmp_path: Path) -> None:
    state, _, _ = federate(tmp_path, f"{SCAFFOLD} rounds.number=2")
    lost = Task("train", 3, "c", state.weights, state.layout, state_round=2)
    client_state._file(tmp_path, "c", 2).unlink()
    assert client_state.load(tmp_path, lost).control is None
    _, (row,), _ = federate(tmp_path, SCAFFOLD, state=replace(state, until=3))
    assert [entry["name"] for entry in row["rejected"]] == ["c"]
    assert "control variate of round 2 is gone" in row["rejected"][0]["reason"]
    assert row["applied"]


def test_the_variate_travels_down_and_counts_there_and_in_memory(tmp_path: Path) -> None:
    slow = {"a": Device(down=100.0), "b": Device(memory=5 * 4 * D)}
    _, (plain,), _ = federate(tmp_path / "plain", "rounds.number=1", devices=slow)
    _, (corrected,), _ = federate(tmp_path / "scaffold", f"{SCAFFOLD} rounds.number=1", devices=slow)
    assert (plain["bytes_down"], plain["bytes_up"]) == (4 * 4 * D, 4 * 4 * D)
    assert (corrected["bytes_down"], corrected["bytes_up"]) == (3 * 8 * D, 3 * 4 * D)
    assert plain["simulated_seconds"] == pytest.approx(4 * D / 100)
    assert corrected["simulated_seconds"] == pytest.approx(8 * D / 100)
    assert plain["skipped"] == []
    assert "memory" in corrected["skipped"][0]["reason"]


def test_without_scaffold_nothing_travels_and_nothing_is_kept(tmp_path: Path) -> None:
    state, _, asked = federate(tmp_path, "rounds.number=2")
    assert state.control is None
    assert all(task.control is None for task in asked)
    assert list(tmp_path.rglob("*.safetensors")) == []


REFUSED = {
    "privacy.unit=client": "let out only a noised sum",
    "privacy.unit=both": "let out only a noised sum",
    "privacy.unit=local": "many times longer",
    "server.combine=median": "leaves some updates out",
    "server.combine=krum": "leaves some updates out",
    "local.proximal=0.1": "both act against drift",
    "local.momentum=0.9": "its steps weigh differently",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_scaffold_cannot_be_paired_with_is_refused_in_one_line_with_the_way_out(change: str) -> None:
    pairs.check(override(Settings(), f"local.scaffold=false {change}"))
    with pytest.raises(Refused, match=REFUSED[change]) as caught:
        pairs.check(override(Settings(), f"{SCAFFOLD} {change}"))
    assert "\n" not in str(caught.value)
    assert "set " in str(caught.value)


def test_a_private_run_with_pruning_and_recovery_goes_through_to_its_report(tmp_path: Path) -> None:
    scenario = load_scenario("digits")
    text = (
        "partition=dirichlet:0.1 fleet.clients=4 rounds.number=4 local.steps=5 local.rate=0.5 local.batch=32 "
        "export.recover_rounds=2 export.prune=0.5 reference.central_epochs=0 privacy.noise_seed=1"
    )
    settings = override(scenario.settings, f"{text} {SCAFFOLD}")
    with RunFolder.create(tmp_path / "run", "digits", settings) as folder:
        found = run.run(run.prepare(scenario, settings, folder, EmbeddedFleet, Quiet()))
        rows, state = folder.rows(), folder.committed()
    assert [row["rejected"] for row in rows] == [[]] * 6
    assert all(row["applied"] for row in rows)
    assert state is not None
    assert state.control is not None
    assert state.control.shape == state.weights.shape  # of the pruned model
    assert np.abs(state.control).max() > 0
    roster = EmbeddedFleet(Node(scenario, settings, scenario.data(settings), tmp_path)).hello()
    plain = budget.plans(roster, override(scenario.settings, text))
    for client in found["privacy"]["clients"]:
        plan = plain[client["name"]]
        assert (client["noise_multiplier"], client["steps"]) == (plan.mechanism.noise_multiplier, 6 * 5), (
            "it costs nothing"
        )
        assert client["epsilon"] <= plan.epsilon == settings.privacy.epsilon


def test_recovery_after_pruning_begins_with_variates_of_zero(tmp_path: Path) -> None:
    scenario = load_scenario("digits")
    settings = override(scenario.settings, "privacy.unit=none local.scaffold=true")
    node = Node(scenario, settings, scenario.data(settings), tmp_path)
    state = first_state(node.template, settings)
    moved = replace(state, control=np.ones_like(state.weights))
    pruned = edge.pruned_state(node, moved, state.weights, 2)
    assert pruned.control is not None
    assert pruned.control.shape == pruned.weights.shape != state.weights.shape
    assert not pruned.control.any()
