"""SCAFFOLD's two halves: they compute the same from the same bytes, and what they add stays whole under DP."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clients import codecs, scaffold, state
from clients.sgd import train
from clients.task import Task
from clients.training import Node, answer
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario, build_model
from scenarios.settings import Settings, override
from scenarios.weights import Vector, flatten, layout, load

LOSS = nn.functional.cross_entropy
CODECS = ["float32", "float16", "qsgd8", "topk:0.3"]
SIZE = 21


def made_examples(seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator))


def made_node(folder: Path, text: str = "") -> Node:
    federation = Federation({"a": 40}, lambda name: made_examples(), made_examples(1), made_examples(2))
    scenario = Scenario("made", Settings(), {"net": lambda: nn.Linear(6, 3)}, lambda settings: federation, name="made")
    return Node(scenario, override(Settings(), f"local.scaffold=true local.steps=10000000 {text}"), federation, folder)


def made_task(node: Node, **changes: object) -> Task:
    model = build_model(node.scenario, node.settings)
    task = Task("train", 1, "a", flatten(model), layout(model), rate=0.5, steps=4, control=vector(7))
    return replace(task, **changes)  # type: ignore[arg-type]


def vector(seed: int, scale: float = 0.1) -> Vector:
    return np.random.default_rng(seed).normal(0, scale, SIZE).astype(np.float32)


@dataclass(frozen=True)
class Sent:
    update: Vector
    weight: float
    steps: int


@settings(deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    weights=st.lists(st.floats(0.1, 1e3), min_size=1, max_size=5),
    rates=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_the_servers_variate_is_the_mean_of_the_clients_whatever_a_codec_loses_and_whoever_replies(
    codec: str, weights: list[float], rates: list[float], seed: int
) -> None:
    random, coder = np.random.default_rng(seed), codecs.resolve(codec)
    control, own = np.zeros(SIZE, np.float32), [np.zeros(SIZE, np.float32) for _ in weights]
    for rate in rates:
        task = Task("train", 1, "a", np.zeros(SIZE, np.float32), (("w", (SIZE,)),), rate=rate, control=control)
        tally, replies = scaffold.Tally(control, rate, sum(weights)), []
        for i, weight in enumerate(weights):
            if random.random() < 0.3:  # not asked, or lost
                continue
            steps = int(random.integers(1, 20))
            update = random.normal(0, steps * rate, SIZE).astype(np.float32)
            decoded = coder.decode(coder.encode(update, None, i)[0], SIZE)
            own[i] = scaffold.advanced(task, own[i], decoded, steps)
            replies.append(Sent(decoded, weight, steps))
        assert list(tally.through(iter(replies))) == replies
        control = tally.advanced()
    mean = np.average(own, axis=0, weights=weights)
    assert np.allclose(control, mean, rtol=0, atol=1e-5 * (1 + np.abs(own).max()))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("private", [None, Mechanism(0.5, 1.0)], ids=["without noise", "DP"])
def test_a_clients_variate_is_a_function_of_what_it_has_sent_and_of_nothing_else_of_its_data(
    tmp_path: Path, codec: str, private: Mechanism | None
) -> None:
    node = made_node(tmp_path, f"codec={codec}")
    own = np.zeros(SIZE, np.float32)
    for number in (1, 2, 3):
        control = vector(number)
        task = made_task(node, round=number, state_round=number - 1, control=control, mechanism=private, clip=1.0)
        reply = answer(node, task)
        assert reply.reason == ""
        update = codecs.resolve(codec).decode(reply.payload, SIZE)
        own = (own.astype(np.float64) - control - update.astype(np.float64) / (4 * 0.5)).astype(np.float32)
        kept = state.load(tmp_path, replace(task, round=number + 1, state_round=number))
        assert kept.control is not None
        assert np.allclose(kept.control, own, rtol=1e-6, atol=1e-7)
        assert kept.residual is None, "the variate is the memory of what was not sent"
        own = kept.control


def drift(mechanism: Mechanism | None, correction: Vector | None) -> Vector:
    """Where many steps lead from zero."""
    settings = override(Settings(), "local.batch=0 privacy.noise_seed=1")
    model = nn.Linear(6, 3)
    load(model, np.zeros(SIZE, np.float32))
    task = Task("train", 1, "a", flatten(model), layout(model), rate=0.5, steps=20, mechanism=mechanism, clip=1e6)
    train(model, made_examples(), LOSS, task, settings.local, settings, correction)
    return flatten(model)


def test_the_correction_acts_under_dp_as_it_does_without() -> None:
    free, corrected = drift(None, None), drift(None, vector(3, 0.3))
    private = drift(Mechanism(1.0, 0.0), vector(3, 0.3))
    assert np.linalg.norm(corrected - free) > np.linalg.norm(free)
    assert np.linalg.norm(private - corrected) < 0.05 * np.linalg.norm(corrected - free)


def test_the_correction_is_never_clipped() -> None:
    settings = override(Settings(), "local.batch=0 privacy.noise_seed=1")
    model, long = nn.Linear(6, 3), vector(3, 100.0)
    load(model, np.zeros(SIZE, np.float32))
    task = Task("train", 1, "a", flatten(model), layout(model), 0.5, 1, mechanism=Mechanism(1.0, 0.0), clip=1e-3)
    train(model, made_examples(), LOSS, task, settings.local, settings, long)
    assert np.allclose(flatten(model), -0.5 * long, atol=1e-3)


def test_a_step_goes_along_gradient_plus_c_minus_c_i(tmp_path: Path) -> None:
    node = made_node(tmp_path, "local.batch=0")
    own, control = vector(1), vector(2)
    state.save(tmp_path, made_task(node, round=1), state.ClientState(control=own))
    task = made_task(node, round=2, state_round=1, control=control, steps=3)
    reply = answer(node, task)
    model, data = build_model(node.scenario, node.settings), made_examples()
    for _ in range(3):
        model.zero_grad()
        LOSS(model(data.x), data.y).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        load(model, flatten(model) - np.float32(0.5) * (gradient.numpy() + control - own))
    assert np.allclose(np.frombuffer(reply.payload, "<f4"), flatten(model) - task.weights, atol=1e-6)


def test_a_deadline_divides_by_the_steps_that_were_taken(tmp_path: Path) -> None:
    node = made_node(tmp_path)
    task = made_task(node, steps=10_000_000, deadline=0.2)
    reply = answer(node, task)
    assert 1 <= reply.steps < task.steps
    kept = state.load(tmp_path, replace(task, round=2, state_round=1))
    expected = -task.control - np.frombuffer(reply.payload, "<f4") / (reply.steps * 0.5)  # type: ignore[operator]
    assert np.allclose(kept.control, expected, atol=1e-6)


def test_a_client_that_was_late_keeps_no_new_variate(tmp_path: Path) -> None:
    node = made_node(tmp_path)
    assert answer(node, made_task(node, deadline=1e-9)).late
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_buffers_and_frozen_weights_are_not_corrected(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3))
    model[1].weight.requires_grad_(False)
    shapes = layout(model)
    task = Task("train", 1, "a", flatten(model), shapes, rate=1e-3, steps=2)
    settings, correction = Settings(), np.full(len(task.weights), 1e3, np.float32)
    train(model, made_examples(), LOSS, task, settings.local, settings, correction)
    moved = dict(zip([name for name, _ in shapes], np.split(flatten(model) - task.weights, _ends(shapes)), strict=True))
    assert np.abs(moved["0.weight"]).min() > 1
    assert np.abs(moved["1.weight"]).max() == 0
    assert np.abs(moved["1.running_mean"]).max() < 100


def _ends(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> list[int]:
    return list(np.cumsum([int(np.prod(shape)) for _, shape in shapes])[:-1])


REFUSED = {
    "without the control variate": {"control": None},
    "without a learning rate": {"rate": 0.0},
    "its control variate of round 3 is gone": {"round": 5, "state_round": 3},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_task_that_cannot_be_corrected_is_refused_and_leaves_nothing(tmp_path: Path, reason: str) -> None:
    node = made_node(tmp_path)
    reply = answer(node, made_task(node, **REFUSED[reason]))  # type: ignore[arg-type]
    assert reason in reply.reason
    assert reply.payload == b""
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_node_that_was_not_told_of_scaffold_takes_no_control_variate(tmp_path: Path) -> None:
    node = made_node(tmp_path, "local.scaffold=false")
    assert "do not ask for" in answer(node, made_task(node)).reason
    assert answer(node, made_task(node, control=None)).reason == ""


def test_a_variate_that_overflows_is_refused_on_either_side() -> None:
    huge = np.full(SIZE, 3e38, np.float32)
    task = Task("train", 1, "a", huge, (("w", (SIZE,)),), rate=1e-3, control=huge)
    with pytest.raises(Refused, match="finite"):
        scaffold.advanced(task, None, huge, 1)
    tally = scaffold.Tally(huge, 1e-3, 1.0)
    list(tally.through([Sent(huge, 1.0, 1)]))
    with pytest.raises(OverflowError, match="finite"):
        tally.advanced()
