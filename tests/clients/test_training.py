"""Local training against a plain loop: same weights, same steps, same answers on every path."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clients.sgd import _shuffled, train
from clients.task import Task
from clients.training import Node, answer, digest, evaluate, hello
from privacy.plan import Mechanism
from scenarios import Examples, Federation, Scenario, build_model
from scenarios.settings import Local, Settings, override
from scenarios.weights import Vector, flatten, layout, load

MOST = 10_000_000
"""Steps that a node here may be asked for."""
LOSS = nn.functional.cross_entropy


def made_examples(size: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))


def made_node(folder: Path, settings: Settings | None = None, size: int = 40) -> Node:
    federation = Federation(
        {"a": size},
        lambda name: made_examples(size),
        made_examples(10, 1),
        made_examples(20, 2),
        lambda name: made_examples(9, 3),
    )
    scenario = Scenario("made", Settings(), {"net": lambda: nn.Linear(6, 3)}, lambda settings: federation, name="made")
    return Node(scenario, override(settings or Settings(), f"local.steps={MOST}"), federation, folder)


def made_task(node: Node, **changes: object) -> Task:
    model = build_model(node.scenario, node.settings)
    task = Task("train", 1, "a", flatten(model), layout(model), rate=0.5, steps=4)
    return replace(task, **changes)  # type: ignore[arg-type]


def decoded(payload: bytes) -> Vector:
    return np.frombuffer(payload, "<f4").astype(np.float32)


def test_a_local_run_is_plain_sgd_over_reshuffled_batches(tmp_path: Path) -> None:
    node = made_node(tmp_path, override(Settings(), "local.batch=16"))
    task = made_task(node, steps=5)
    reply = answer(node, task)
    model, data = build_model(node.scenario, node.settings), made_examples(40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    from scenarios.seeds import derive

    batches = _shuffled(40, 16, derive(0, "batches", 1, "a"))
    for _ in range(5):
        chosen = next(batches)
        optimizer.zero_grad()
        LOSS(model(data.x[chosen]), data.y[chosen]).backward()
        optimizer.step()
    assert (reply.reason, reply.steps, reply.examples) == ("", 5, 40)
    assert np.allclose(decoded(reply.payload), flatten(model) - task.weights, atol=1e-6)


def test_an_epoch_uses_every_example_once() -> None:
    batches = _shuffled(40, 16, 7)
    epoch = torch.cat([next(batches) for _ in range(3)])
    assert sorted(epoch.tolist()) == list(range(40))


def test_the_same_task_gives_the_same_bytes_and_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    node = made_node(tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = answer(node, made_task(node))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert answer(node, made_task(node)) == first


def drift(mechanism: Mechanism | None, proximal: float, weight_decay: float = 0.0) -> float:
    """Distance from the start after many steps towards labels that never change."""
    text = f"local.proximal={proximal} local.weight_decay={weight_decay} local.batch=0 privacy.noise_seed=1"
    settings = override(Settings(), text)
    model = nn.Linear(6, 3)
    load(model, np.zeros(21, np.float32))
    task = Task("train", 1, "a", flatten(model), layout(model), rate=0.5, steps=60, mechanism=mechanism, clip=1e6)
    train(model, made_examples(40), LOSS, task, settings.local, settings)
    return float(np.linalg.norm(flatten(model)))


def test_the_proximal_term_acts_under_dp_as_it_does_without() -> None:
    free, held = drift(None, 0.0), drift(None, 1.0)
    private = drift(Mechanism(1.0, 0.0), 1.0)
    assert held < 0.6 * free
    assert private == pytest.approx(held, rel=0.05)


def test_weight_decay_acts_under_dp_as_it_does_without() -> None:
    free, held = drift(None, 0.0), drift(None, 0.0, 1.0)
    assert held < 0.6 * free
    assert drift(Mechanism(1.0, 0.0), 0.0, 1.0) == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("mechanism", [None, Mechanism(1.0, 0.0)])
def test_momentum_is_that_of_torchs_own_sgd_with_and_without_dp(mechanism: Mechanism | None) -> None:
    settings = override(Settings(), "local.momentum=0.9 local.weight_decay=0.2 local.batch=0 privacy.noise_seed=1")
    model, data = nn.Linear(6, 3), made_examples(40)
    twin = copy.deepcopy(model)
    task = Task("train", 1, "a", flatten(model), layout(model), rate=0.05, steps=20, mechanism=mechanism, clip=1e6)
    train(model, data, LOSS, task, settings.local, settings)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=0.2)
    for _ in range(20):
        optimizer.zero_grad()
        LOSS(twin(data.x), data.y).backward()
        optimizer.step()
    assert np.allclose(flatten(model), flatten(twin), rtol=1e-4, atol=1e-5)
    assert not np.allclose(flatten(model), task.weights, atol=0.05)


def test_seeded_noise_is_the_same_again_and_real_noise_never_is(tmp_path: Path) -> None:
    mechanism = Mechanism(1.0, 2.0)
    seeded = made_node(tmp_path, override(Settings(), "privacy.noise_seed=5"))
    real = made_node(tmp_path)
    task = made_task(seeded, mechanism=mechanism, clip=1.0)
    assert answer(seeded, task) == answer(seeded, task)
    assert answer(seeded, task).payload != answer(seeded, replace(task, round=2)).payload
    assert answer(real, task).payload != answer(real, task).payload


@pytest.mark.parametrize("size", [1, 3, 49])
def test_clients_with_fewer_examples_than_a_batch_train_under_dp(tmp_path: Path, size: int) -> None:
    node = made_node(tmp_path, size=size)
    reply = answer(node, made_task(node, mechanism=Mechanism(min(1.0, 32 / size), 1.0), clip=1.0))
    assert reply.reason == ""
    assert np.isfinite(decoded(reply.payload)).all()


def test_a_deadline_that_comes_first_ends_training_early(tmp_path: Path) -> None:
    node = made_node(tmp_path)
    reply = answer(node, made_task(node, steps=MOST, deadline=0.2))
    assert 1 <= reply.steps < MOST


def test_a_deadline_before_the_first_step_makes_the_client_late(tmp_path: Path) -> None:
    node = made_node(tmp_path)
    reply = answer(node, made_task(node, deadline=1e-9))
    assert (reply.late, reply.payload, reply.steps) == (True, b"", 0)


def test_a_failure_is_a_reply_that_quotes_no_data(tmp_path: Path) -> None:
    node = made_node(tmp_path)

    def broken(name: str) -> Examples:
        raise RuntimeError("patient 4711 has no x")

    reply = answer(replace(node, federation=replace(node.federation, client=broken)), made_task(node))
    assert reply.reason == "failed with RuntimeError"
    assert reply.payload == b""


def test_a_node_whose_settings_ask_for_dp_trains_no_task_without_it(tmp_path: Path) -> None:
    node = made_node(tmp_path, override(Settings(), "privacy.unit=example privacy.clip=0.5"))
    private = made_task(node, mechanism=Mechanism(1.0, 1.0), clip=0.5)
    assert answer(node, private).reason == ""
    assert "differential privacy" in answer(node, replace(private, mechanism=None)).reason
    assert "differential privacy" in answer(node, replace(private, clip=50.0)).reason


def test_an_update_that_is_not_finite_is_refused_at_the_client(tmp_path: Path) -> None:
    node = made_node(tmp_path)
    reply = answer(node, made_task(node, rate=3e38, steps=99))
    assert "finite" in reply.reason


def test_the_residual_of_error_feedback_goes_on_from_the_committed_round_only(tmp_path: Path) -> None:
    node = made_node(tmp_path, override(Settings(), "codec=topk:0.2"))
    first = answer(node, made_task(node))
    lost = answer(node, made_task(node, round=2, state_round=1))
    again = answer(node, made_task(node, round=2, state_round=1))
    fresh = answer(node, made_task(node, round=2, state_round=0))
    assert first.reason == lost.reason == ""
    assert lost == again
    assert fresh.payload != again.payload


def test_evaluation_counts_what_the_model_gets_right(tmp_path: Path) -> None:
    node = made_node(tmp_path, override(Settings(), "evaluation.on=clients"))
    reply = answer(node, made_task(node, kind="evaluate"))
    model, data = build_model(node.scenario, node.settings), made_examples(9, 3)
    assert reply.examples == 9
    assert reply.correct == int((model(data.x).argmax(1) == data.y).sum())
    assert reply.loss == pytest.approx(LOSS(model(data.x), data.y).item(), rel=1e-6)


def test_evaluation_in_parts_equals_evaluation_at_once() -> None:
    model, data = nn.Linear(6, 3), made_examples(2500)
    loss, correct = evaluate(model, data, LOSS)
    with torch.no_grad():
        assert math.isclose(loss, float(LOSS(model(data.x), data.y)), rel_tol=1e-5)
        assert correct == int((model(data.x).argmax(1) == data.y).sum())


def test_a_digest_shows_any_change_of_data_and_is_keyed_by_the_node(tmp_path: Path) -> None:
    data = made_examples(5)
    changed = Examples(data.x.clone(), data.y)
    changed.x[0, 0] += 1e-6
    here, there = tmp_path / "here", tmp_path / "there"
    assert digest(here, data) == digest(here, made_examples(5))
    assert digest(here, data) != digest(here, changed)
    assert digest(here, data) != digest(there, data)
    assert (here / "key").stat().st_mode & 0o077 == 0


def test_hello_says_the_number_of_examples_and_what_the_device_can_do(tmp_path: Path) -> None:
    simulated = made_node(tmp_path, override(Settings(), "fleet.profile=edge"))
    assert hello(simulated, "a").examples == 40
    assert hello(simulated, "a").device.speed > 0
    assert hello(simulated, "a") == hello(simulated, "a")
    measured = made_node(tmp_path, override(Settings(), "fleet.clock=wall"))
    assert hello(measured, "a").device.speed > 0
    assert hello(measured, "a").device.memory > 0


def test_local_settings_have_no_say_in_how_many_steps_a_task_takes() -> None:
    model, settings = nn.Linear(6, 3), Settings()
    task = Task("train", 1, "a", flatten(model), layout(model), rate=0.1, steps=7)
    assert train(model, made_examples(40), LOSS, task, Local(epochs=99), settings) == 7
