"""Admission: what a client is asked for beyond its settings is refused in one line, before it is charged or done."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clients import admission
from clients.own_ledger import OwnLedger
from clients.steps import local_steps
from clients.task import Charge, Hello, Task
from clients.training import Node
from privacy.chain import Head
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario, build_model
from scenarios.settings import Settings, override
from scenarios.weights import flatten, layout
from server import budget
from server.embedded import EmbeddedFleet

NOISED = "evaluation.on=clients evaluation.epsilon=5 evaluation.every=3 rounds.number=10 export.recover_rounds=2"


def wanted(text: str = "") -> Settings:
    return override(Settings(), f"privacy.unit=example local.batch=16 {text}")


def asked(**changes: object) -> Task:
    task = Task("train", 1, "a", np.zeros(3, np.float32), (), 0.1, 1, mechanism=Mechanism(0.4, 1.0), clip=1.0)
    return replace(task, **changes)  # type: ignore[arg-type]


def made_node(folder: Path, text: str) -> Node:
    held = Examples(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)
    federation = Federation({"a": 40}, lambda name: held, held, held, lambda name: held)
    scenario = Scenario("made", wanted(text), {"net": lambda: nn.Linear(6, 3)}, lambda _: federation, dataset="wards")
    return Node(scenario, wanted(text), federation, folder / "states")


@pytest.mark.parametrize(
    "text", ["", "local.steps=7", "local.batch=0 local.epochs=3", "privacy.unit=none local.epochs=4"]
)
@pytest.mark.parametrize("examples", [1, 40, 41])
def test_a_client_takes_as_many_steps_as_its_server_asks_for_and_not_one_more(text: str, examples: int) -> None:
    settings = wanted(text)
    most = local_steps(settings.local, examples, settings.privacy.by_example)
    admission.check(asked(steps=most), settings, examples)
    for steps in (most + 1, 2**53):
        with pytest.raises(Refused, match=f"asks for {steps} steps, a round has {most} by this node's settings"):
            admission.check(asked(steps=steps), settings, examples)


def test_a_client_without_examples_takes_no_steps() -> None:
    with pytest.raises(Refused, match="a round has 0"):
        admission.check(asked(), wanted(), 0)


@pytest.mark.parametrize("text", ["", "privacy.delta=1e-4", "evaluation.epsilon=0.01", "evaluation.epsilon=900"])
def test_the_noise_on_test_results_that_a_server_plans_is_taken_and_less_is_not(tmp_path: Path, text: str) -> None:
    node = made_node(tmp_path, f"{NOISED} {text}")
    planned = budget.test_plans(EmbeddedFleet(node).hello(), node.settings)["a"].mechanism
    admission.check(asked(kind="evaluate", mechanism=planned), node.settings, 40)
    for less in (0.99 * planned.noise_multiplier, 0.0, float("inf")):
        with pytest.raises(Refused, match="less noise on test results"):
            admission.check(asked(kind="evaluate", mechanism=Mechanism(1.0, less)), node.settings, 40)


def test_test_results_that_the_settings_let_the_server_make_are_refused() -> None:
    with pytest.raises(Refused, match="test results, which this node's settings let no client send"):
        admission.check(asked(kind="evaluate", mechanism=None), wanted("evaluation.on=server"), 40)
    admission.check(asked(kind="evaluate", mechanism=None), wanted("evaluation.on=clients"), 40)


@pytest.mark.parametrize(
    "text", ["", "privacy.delta=1e-4", "privacy.epsilon=0.5", "privacy.epsilon=900", "local.batch=0"]
)
def test_the_noise_on_gradients_that_a_server_plans_is_taken_and_less_is_not(tmp_path: Path, text: str) -> None:
    node = made_node(tmp_path, f"privacy.max_noise=300 export.recover_rounds=2 {text}")
    planned = budget.plans(EmbeddedFleet(node).hello(), node.settings)["a"].mechanism
    admission.check_noise(asked(mechanism=planned), node.settings, 40)
    for less in (0.99 * planned.noise_multiplier, 1e-6, 0.0):
        with pytest.raises(Refused, match="less noise on gradients"):
            admission.check_noise(asked(mechanism=replace(planned, noise_multiplier=less)), node.settings, 40)


def test_data_that_cannot_be_read_is_a_reply_that_quotes_none_of_it(tmp_path: Path) -> None:
    def damaged(name: str) -> Examples:
        raise RuntimeError("row 17 of patient.csv")

    node, own = made_node(tmp_path, ""), OwnLedger(tmp_path)
    node = replace(node, federation=replace(node.federation, client=damaged))
    reply = own.answer(node, asked(charge=Charge("run", 1, Head(3, "5e" * 32))))
    assert reply.reason == "failed with RuntimeError"
    assert not own.path.exists()


def test_test_results_of_a_sample_are_refused_as_all_test_examples_are_counted() -> None:
    with pytest.raises(Refused, match=r"accounts for 0\.001 of the test examples, and all are counted"):
        admission.check(asked(kind="evaluate", mechanism=Mechanism(0.001, 50.0)), wanted(NOISED), 40)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "evaluate", "mechanism": Mechanism(0.001, 50.0)},
        {"kind": "evaluate", "mechanism": Mechanism(1.0, 0.5)},
        {"steps": 2**53},
        {"clip": 2.0},
        {"mechanism": Mechanism(0.4, 1e-3)},
    ],
)
def test_what_is_refused_is_not_charged(tmp_path: Path, change: dict[str, object]) -> None:
    node, own = made_node(tmp_path, NOISED), OwnLedger(tmp_path)
    model = build_model(node.scenario, node.settings)
    charge = Charge("run", 1, Head(3, "5e" * 32))
    reply = own.answer(node, asked(weights=flatten(model), layout=layout(model), charge=charge, **change))
    assert reply.reason.startswith("its own ledger: the task")
    assert not own.path.exists()


def test_an_owners_budget_lets_no_test_results_leave_without_noise(tmp_path: Path) -> None:
    node, own = made_node(tmp_path, "evaluation.on=clients"), OwnLedger(tmp_path, 5.0)
    bare = asked(kind="evaluate", mechanism=None)
    with pytest.raises(Refused, match="lets no test results leave without noise"):
        own.greet(node, Hello("a", 40, "d"))
    assert "lets no test results leave without noise" in own.answer(node, bare).reason
    node = made_node(tmp_path, "evaluation.on=server")
    assert "lets no test results leave without noise" in own.answer(node, bare).reason, "whatever the settings say"
