"""Rounds in which all clients send the same coordinates: where weights move, where noise falls, what a clip holds."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from clients import state, training, upload
from clients.task import Hello, Reply, Task
from clients.training import Node
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import budget, facts, rounds
from server import run as job
from server.combine import COMBINERS, Contribution
from server.embedded import EmbeddedFleet
from server.masked import Masked
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

NAMES = [f"site-{i}" for i in range(6)]
P, K = 34, 7
BASE = "rounds.number=1 local.batch=8 local.rate=0.5 local.steps=3 codec=shared-topk:0.2"
CLIENT = "privacy.unit=client privacy.epsilon=20 privacy.clip=0.2 privacy.noise_seed=4"


def made_node(text: str, folder: Path) -> Node:
    settings = override(Settings(), f"{BASE} {text}")
    sizes = {name: 10 + 9 * i for i, name in enumerate(NAMES)}

    def examples(name: str) -> Examples:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        x = torch.randn(sizes.get(name, 50), 5, generator=generator)
        return Examples(x, (x.sum(1) > 0).long())

    federation = Federation(sizes, examples, examples("validation"), examples("test"))
    net = {"net": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))}
    return Node(Scenario("made", settings, net, lambda _: federation, name="made"), settings, federation, folder)


Bend = Callable[[Task, Reply], Reply]


@dataclass
class Heard(NoJournal):
    """A journal and a fleet that remember; what a task says, and what is answered, is bent on its way."""

    fleet: EmbeddedFleet
    bend: Bend
    shown: Callable[[Task], Task]
    tasks: list[Task] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    states: list[ServerState] = field(default_factory=list)

    def hello(self) -> Mapping[str, Hello]:
        return self.fleet.hello()

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        self.tasks += tasks
        for task, reply in zip(tasks, self.fleet.ask([self.shown(task) for task in tasks]), strict=True):
            self.replies.append(self.bend(task, reply))
            yield self.replies[-1]

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        return {}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.rows.append(row)
        self.states.append(state)


def federate(
    folder: Path,
    text: str = "",
    bend: Bend = lambda _, reply: reply,
    shown: Callable[[Task], Task] = lambda task: task,
) -> Heard:
    node = made_node(text, folder)
    heard, settings = Heard(EmbeddedFleet(node), bend, shown), node.settings
    roster = heard.hello()
    plans = budget.plans(roster, settings)
    begin = replace(first_state(node.template, settings), until=settings.rounds.number)
    gathered = {"gathered": Masked("r", 1, 3)} if settings.protect.mode == "masked" else {}
    for _ in rounds.rounds(heard, roster, plans, begin, settings, heard, lambda _: Score(1.0, 0.5), **gathered):
        pass
    return heard


def lost(task: Task, _: Reply) -> Reply:
    return Reply(task.round, task.client, reason="gone")


def steps_of(heard: Heard) -> list[np.ndarray]:
    """What each round added to the weights."""
    first = next(task for task in heard.tasks if task.kind == "train")
    weights = [first.weights, *(state.weights for state in heard.states)]
    return [after.astype(np.float64) - before for before, after in zip(weights, weights[1:], strict=False)]


def named(heard: Heard, number: int) -> np.ndarray:
    """The coordinates that the tasks of round `number` name, the same for all."""
    sets = {task.coordinates.tobytes() for task in heard.tasks if task.round == number and task.coordinates is not None}
    assert len(sets) == 1
    return np.frombuffer(sets.pop(), np.uint32)


# ---- where weights move ----


@pytest.mark.parametrize(
    "text", ["", "codec=shared-topk:0.2:int16", "protect=masked protect.max_clients=6", CLIENT, "privacy.unit=local"]
)
def test_weights_move_at_the_rounds_coordinates_and_nowhere_else(tmp_path: Path, text: str) -> None:
    heard = federate(tmp_path, f"rounds.number=3 {text} privacy.epsilon=50 privacy.noise_seed=4")
    for number, moved in enumerate(steps_of(heard), 1):
        assert np.flatnonzero(moved).tolist() == named(heard, number).tolist()
    assert len({named(heard, number).tobytes() for number in (1, 2, 3)}) == 3


def test_half_of_a_round_are_the_coordinates_that_moved_fastest_in_what_was_applied(tmp_path: Path) -> None:
    def short(task: Task, reply: Reply) -> Reply:
        return lost(task, reply) if task.round == 2 else reply

    heard = federate(tmp_path, "rounds.number=3", short)
    assert [row["applied"] for row in heard.rows] == [True, False, True]
    largest = set(np.argsort(-np.abs(steps_of(heard)[0]))[: K // 2].tolist())
    for number in (2, 3):
        assert largest <= set(named(heard, number).tolist())


@pytest.mark.parametrize("combine", COMBINERS)
def test_every_combiner_sees_the_values_that_were_sent_and_no_zeros_in_place_of_others(
    tmp_path: Path, combine: str
) -> None:
    heard = federate(tmp_path, f"server.combine={combine} server.weighting=uniform")
    sent = [np.frombuffer(reply.payload, "<f4") for reply in heard.replies]
    assert {len(values) for values in sent} == {K}
    settings = override(Settings(), f"server.combine={combine}").server
    expected = COMBINERS[combine]([Contribution(values, 1.0, 1) for values in sent], settings)
    np.testing.assert_allclose(steps_of(heard)[0][named(heard, 1)], expected, atol=1e-6)


@pytest.mark.parametrize("step", ["momentum", "adam", "yogi", "adagrad"])
def test_a_server_step_takes_zeros_for_what_was_not_sent(tmp_path: Path, step: str) -> None:
    from server import step as steps

    heard = federate(tmp_path, f"rounds.number=2 server.step={step}")
    plain, made = federate(tmp_path / "plain", "rounds.number=1"), override(Settings(), f"server.step={step}").server
    whole = steps_of(plain)[0].astype(np.float32)
    weights, _ = steps.resolve(made).apply(steps.resolve(made).init(P), heard.tasks[0].weights, whole)
    np.testing.assert_allclose(heard.states[0].weights, weights, atol=1e-6)


def test_bytes_are_those_of_values_up_and_of_weights_and_coordinates_down(tmp_path: Path) -> None:
    for text, size in (("", 4 * K), ("codec=shared-topk:0.2:int16", 2 * (K + 2))):
        heard = federate(tmp_path / text, text)
        assert heard.rows[0]["bytes_up"] == len(NAMES) * size
        assert heard.rows[0]["bytes_down"] == len(NAMES) * 4 * (P + K)
        told = facts._protect(made_node(text, tmp_path), heard.states[-1], {}, len(NAMES), "embedded")
        assert (told["values"], told["values_sent"], told["upload_bytes_per_client"]) == (P, K, size)


# ---- what is left out ----


def test_what_is_left_out_is_sent_when_its_turn_comes_and_nothing_twice(tmp_path: Path) -> None:
    node = made_node("", tmp_path)
    heard = federate(tmp_path, "rounds.number=4 local.rate=0.5")
    kept, given_ = np.zeros(P), np.zeros(P)
    asked = [task for task in heard.tasks if task.client == "site-2"]
    for task in asked:
        alone = replace(task, state_round=0, coordinates=np.arange(K, dtype=np.uint32), round=task.round)
        whole = replace(node, settings=override(node.settings, "codec=float32"), states=tmp_path / "whole")
        reply = training.answer(whole, replace(alone, coordinates=None))
        given_ += np.frombuffer(reply.payload, "<f4")
        sent = next(r for r in heard.replies if (r.client, r.round) == (task.client, task.round))
        kept[task.coordinates] += np.frombuffer(sent.payload, "<f4")
    left = state.load(tmp_path, replace(asked[-1], state_round=4)).residual
    assert left is not None
    np.testing.assert_allclose(kept + left, given_, atol=1e-5)
    assert np.abs(left).max() > 0.01


def test_a_client_whose_masked_update_was_in_no_sum_sends_it_again(tmp_path: Path) -> None:
    def shaky(task: Task, reply: Reply) -> Reply:
        return lost(task, reply) if task.round == 2 and task.client == "site-0" else reply

    text = "protect=masked protect.max_clients=6 rounds.number=3"
    heard = federate(tmp_path, text, shaky)
    goes_on = {task.client: task.state_round for task in heard.tasks if task.round == 3 and task.kind == "train"}
    assert goes_on == {name: 1 if name == "site-0" else 2 for name in NAMES}


# ---- clip and noise ----


@pytest.mark.parametrize("codec", ["shared-topk:0.2", "shared-topk:0.2:int8", "shared-topk:0.2:int16"])
def test_a_clip_holds_for_what_leaves_residual_included(tmp_path: Path, codec: str) -> None:
    heard = federate(tmp_path, f"{CLIENT} rounds.number=4 local.rate=2 codec={codec}")
    settings = made_node(f"{CLIENT} codec={codec}", tmp_path).settings
    residuals = [state.load(tmp_path, replace(task, state_round=4)).residual for task in heard.tasks[:6]]
    assert all(np.linalg.norm(residual) > 1 for residual in residuals if residual is not None)  # five times the clip
    lengths = []
    for task, reply in zip(heard.tasks, heard.replies, strict=True):
        values = upload.decode(reply.payload, task, settings)
        lengths.append(float(np.linalg.norm(values.astype(np.float64))))
    grid = upload.grid_of(heard.tasks[0], settings)
    assert max(lengths) <= (grid.norm if grid else 0.2) * (1 + 1e-6)
    assert min(lengths[6:]) > 0.19  # the clip was at work


def test_a_client_that_shouts_moves_the_sum_by_the_norm_alone(tmp_path: Path) -> None:
    def shout(task: Task, reply: Reply) -> Reply:
        loud = replace(reply, payload=np.full(K, 1e4, "<f4").tobytes())
        return loud if task.client == "site-3" else reply

    def without(task: Task, reply: Reply) -> Reply:
        return lost(task, reply) if task.client == "site-3" else reply

    ends = [federate(tmp_path / name, CLIENT, bend).states[-1].weights for name, bend in (("a", shout), ("b", without))]
    apart = np.linalg.norm(ends[0].astype(np.float64) - ends[1]) * len(NAMES)
    assert apart == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("codec", ["shared-topk:0.2", "shared-topk:0.2:int16"])
def test_the_noise_on_a_sum_falls_on_the_coordinates_of_the_round_and_is_that_of_the_norm(
    tmp_path: Path, codec: str
) -> None:
    heard = federate(tmp_path, f"{CLIENT} privacy.noise_seed=1 rounds.number=60 codec={codec}", lost)
    text = f"{CLIENT} rounds.number=60 codec={codec}"
    node = made_node(text, tmp_path)
    plan = next(iter(budget.plans(heard.hello(), node.settings).values()))
    drawn = np.concatenate([moved[named(heard, number)] for number, moved in enumerate(steps_of(heard), 1)])
    assert len(drawn) == 60 * K
    grid = upload.grid_of(heard.tasks[0], node.settings) if heard.tasks else None
    sigma = plan.mechanism.noise_multiplier * (grid.norm if grid else 0.2) / len(NAMES)
    assert drawn.std() == pytest.approx(sigma, rel=0.15)


def test_local_noise_is_on_every_value_that_leaves_and_never_in_the_residual(tmp_path: Path) -> None:
    text = "privacy.unit=local privacy.epsilon=50 privacy.clip=0.2 rounds.number=2"
    seeds = [federate(tmp_path / str(seed), f"{text} privacy.noise_seed={seed}") for seed in (1, 2)]
    first = [np.frombuffer(heard.replies[0].payload, "<f4") for heard in seeds]
    assert (first[0] != first[1]).all()
    left = [state.load(tmp_path / str(seed), replace(seeds[0].tasks[0], state_round=1)).residual for seed in (1, 2)]
    assert left[0] is not None
    assert (left[0] == left[1]).all()


# ---- the same to the bit ----


@pytest.mark.parametrize("faults", ["", "faults.dropout=0.2 run.seed=2"])
def test_noise_in_shares_under_masks_is_that_in_the_clear(
    run_real: Callable[..., Any], tmp_path: Path, faults: str
) -> None:
    text = "privacy.unit=client privacy.noise=shares privacy.epsilon=9 privacy.noise_seed=3 rounds.number=2"
    weights = []
    for name, way in (("clear", ""), ("masked", "protect=masked")):
        run_real(tmp_path / name, f"{text} {faults} {way} codec=shared-topk:0.3:int16")
        rows = [json.loads(line) for line in (tmp_path / name / "rounds.jsonl").read_text().splitlines()]
        assert [row["applied"] for row in rows] == [True, True]
        weights.append(load_file(tmp_path / name / "weights.safetensors"))
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.parametrize("way", ["codec=shared-topk:0.2", "codec=shared-topk:0.2:int16 server.step=adam"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(
    run_real: Callable[..., Any], tmp_path: Path, way: str
) -> None:
    text = f"privacy.noise_seed=3 rounds.number=4 export.prune=0.5 export.recover_rounds=2 {way}"
    run_real(tmp_path / "whole", text)
    with pytest.raises(job.Stopped):
        run_real(tmp_path / "parts", text, stop_after=2)
    run_real(tmp_path / "parts", text, lose=3)
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)


# ---- who is shown what ----


def test_a_server_that_names_other_coordinates_to_one_client_gets_no_word_from_it(tmp_path: Path) -> None:
    def apart(task: Task) -> Task:
        if task.client != "site-1" or task.coordinates is None:
            return task
        return replace(task, coordinates=np.setdiff1d(np.arange(P, dtype=np.uint32), task.coordinates)[:K])

    heard = federate(tmp_path, "protect=masked protect.max_clients=6", shown=apart)
    assert [entry["name"] for entry in heard.rows[0]["rejected"]] == ["site-1"]
    assert "have not been shown this model" in heard.rows[0]["rejected"][0]["reason"]


@pytest.mark.parametrize(
    ("bent", "said"),
    [
        (None, "without the coordinates"),
        (np.uint32([0, 1, 2]), "names 3 coordinates, this node's settings ask for 7"),
        (np.uint32([0, 1, 2, 3, 4, 5, 5]), "must increase"),
        (np.uint32([0, 1, 2, 3, 4, 5, 34]), "lie below 34"),
    ],
    ids=["none", "few", "twice", "outside"],
)
def test_a_client_does_not_train_for_coordinates_that_cannot_be(
    tmp_path: Path, bent: np.ndarray | None, said: str
) -> None:
    heard = federate(tmp_path, shown=lambda task: replace(task, coordinates=bent))
    assert all(said in entry["reason"] for entry in heard.rows[0]["rejected"])
    assert len(heard.rows[0]["rejected"]) == len(NAMES)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_node_that_sends_all_takes_no_coordinates(tmp_path: Path) -> None:
    node = made_node("codec=float32", tmp_path)
    task = federate(tmp_path / "other").tasks[0]
    assert "this node's settings send all" in training.answer(node, task).reason


def test_the_report_says_that_a_round_is_of_some_values(tmp_path: Path) -> None:
    heard = federate(tmp_path)
    told = facts._protect(made_node("", tmp_path), heard.states[-1], {}, len(NAMES), "embedded")
    assert any(f"A round is of {K} of an update's {P} values" in sentence for sentence in told["who_learns"])
    every = facts._protect(made_node("codec=float32", tmp_path), heard.states[-1], {}, len(NAMES), "embedded")
    assert not any("A round is of" in sentence for sentence in every["who_learns"])
