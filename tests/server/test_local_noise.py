"""privacy.unit=local through whole rounds and runs: who pays, what leaves a client, what may come after the noise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients.task import Task
from clients.training import Node, answer
from privacy import accounting, recompute
from privacy.ledger import Account
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import edge
from server import run as job
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder

SIZES = {f"site-{i:02}": 5 + i for i in range(12)}
BASE = (
    "rounds.number=3 local.batch=8 local.rate=0.5 reference.no_privacy=false export.recover_rounds=1 "
    "privacy.unit=local privacy.epsilon=20 privacy.clip=0.2"
)


def examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 50), 5, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())


def made(scale: float = 1.0) -> Scenario:
    def client(name: str) -> Examples:
        return Examples(examples(name).x * scale, examples(name).y)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))

    federation = Federation(SIZES, client, examples("validation"), examples("test"))
    return Scenario("made", override(Settings(), BASE), {"net": net}, lambda _: federation, name="made")


@pytest.fixture(autouse=True)
def _no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edge models take seconds and have tests of their own."""
    monkeypatch.setattr(edge.bundle, "ship", lambda *_, **__: [])


def prepared(folder: RunFolder, text: str, stop_after: int = 99) -> job.Job:
    def stop() -> bool:
        return len(folder.rows()) == stop_after

    return job.prepare(made(), override(made().settings, text), folder, EmbeddedFleet, Quiet(), stop)


def run(path: Path, text: str = "", stop_after: int = 99) -> dict[str, Any]:
    """Begin the run in `path` or go on with it; stops after round `stop_after`."""
    settings = override(made().settings, text)
    with RunFolder.open(path) if path.exists() else RunFolder.create(path, "made", settings) as folder:
        return job.run(prepared(folder, text, stop_after))


def task(z: float = 50.0, clip: float = 0.2) -> tuple[Node, Task]:
    scenario = made()
    node = Node(scenario, scenario.settings, scenario.data(scenario.settings), Path("unused"))
    weights = job.first_state(node.template, node.settings)
    return node, Task(
        "train", 1, "site-03", weights.weights, weights.layout, rate=0.5, steps=1, update_clip=clip, update_noise=z
    )


# what leaves a client


def test_what_a_client_sends_is_noise_around_a_short_update_whatever_its_examples() -> None:
    node, asked = task(z=50.0)
    sent = np.frombuffer(answer(node, asked).payload, "<f4").astype(np.float64)
    assert 0.8 < sent.std() / (50 * 2 * 0.2) < 1.2
    other = replace(node, federation=made(scale=1e30).data(node.settings))
    reply = answer(other, asked)
    assert reply.reason == ""
    assert reply.within
    assert 0.8 < np.frombuffer(reply.payload, "<f4").astype(np.float64).std() / (50 * 2 * 0.2) < 1.2


def test_whether_the_update_was_clipped_is_not_said() -> None:
    node, asked = task()
    short = replace(asked, rate=1e-9)
    assert answer(node, asked).within == answer(node, short).within


def test_a_node_refuses_a_task_with_less_noise_or_another_norm_than_its_settings_ask_for() -> None:
    for z, clip, word in ((0.0, 0.2, "noise"), (0.05, 0.2, "noise"), (50.0, 0.3, "norm"), (50.0, 0.0, "norm")):
        node, asked = task(z, clip)
        reply = answer(node, asked)
        assert word in reply.reason
        assert not reply.payload


# who pays


def test_a_client_pays_for_the_rounds_it_joins_and_for_no_other(tmp_path: Path) -> None:
    text = f"rounds.fraction=0.5 rounds.number=4 run.state={tmp_path / 'state'}"
    found = run(tmp_path / "run", text)
    rows = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    joined = {name: sum(name in row["cohort"] for row in rows) for name in SIZES}
    assert len(set(joined.values())) > 1
    assert {client["name"]: client["steps"] for client in found["privacy"]["clients"]} == joined
    for client in found["privacy"]["clients"]:
        history = {Mechanism(1.0, client["noise_multiplier"]): joined[client["name"]]}
        assert client["epsilon"] == pytest.approx(accounting.epsilon(history, 1 / 120), rel=1e-6)
        assert client["epsilon_total"] == pytest.approx(client["epsilon"], rel=1e-6)
    ledger = next((tmp_path / "state").rglob("*.ledger"))
    for row in recompute.accounts(recompute.records(ledger)):
        claimed = next(client for client in found["privacy"]["clients"] if client["name"] == row["client"])
        assert row["unit"] == "local"
        assert row["epsilon"] == pytest.approx(claimed["epsilon"], rel=1e-3)


def test_a_round_that_was_cut_off_is_paid_for_and_the_last_one_skipped(tmp_path: Path) -> None:
    with pytest.raises(job.Stopped):
        run(tmp_path / "run", stop_after=2)
    with RunFolder.open(tmp_path / "run") as folder:  # what a kill in round 3 leaves behind
        assert prepared(folder, "").accounts.reserve(3, dict.fromkeys(SIZES, 1)) == {}
    found = run(tmp_path / "run")
    assert {client["steps"] for client in found["privacy"]["clients"]} == {4}
    assert found["privacy"]["worst_epsilon"] <= 20
    assert found["edge"]["recovery"] == "pruned without recovery: no privacy budget is left"


def test_with_a_seed_a_stopped_run_ends_with_the_same_bits_and_promises_nothing(tmp_path: Path) -> None:
    text = "privacy.noise_seed=4 codec=topk:0.3 server.step=momentum rounds.fraction=0.5"
    whole = run(tmp_path / "whole", text)
    with pytest.raises(job.Stopped):
        run(tmp_path / "parts", text, stop_after=2)
    parts = run(tmp_path / "parts", text)
    ends = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]
    assert parts["privacy"] == whole["privacy"]
    assert not parts["privacy"]["guarantee"]


def test_the_budget_over_runs_is_kept_in_an_account_of_its_own(tmp_path: Path) -> None:
    text = f"privacy.budget=30 run.state={tmp_path}"
    run(tmp_path / "first", text)
    with pytest.raises(job.Stopped, match="the budget is spent: site-00"):
        run(tmp_path / "second", text)
    with RunFolder.open(tmp_path / "first") as folder:
        ledger = prepared(folder, text).accounts.ledger
    assert ledger is not None
    assert set(ledger.accounts) == {Account("local", name, "made") for name in SIZES}


# what comes after


def test_the_server_takes_the_noised_updates_as_they_are_long_as_they_are(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "rounds.number=1 export.recover_rounds=0 server.weighting=uniform")
    z = found["privacy"]["clients"][0]["noise_multiplier"]
    with RunFolder.open(tmp_path / "run") as folder:
        state = folder.committed()
    assert state is not None
    moved = state.weights - task()[1].weights
    assert moved.std() == pytest.approx(z * 2 * 0.2 / np.sqrt(len(SIZES)), rel=0.3)


@pytest.mark.parametrize("text", ["server.combine=median", "server.combine=krum", "server.normalize=true"])
def test_any_combiner_may_come_after_the_noise(tmp_path: Path, text: str) -> None:
    found = run(tmp_path / "run", f"{text} rounds.number=1 export.recover_rounds=0 codec=qsgd8")
    assert found["privacy"]["guarantee"]
    assert all(client["steps"] == 1 for client in found["privacy"]["clients"])


def test_the_report_says_that_the_promise_is_about_a_whole_client_and_holds_against_the_server(tmp_path: Path) -> None:
    found = run(tmp_path / "run")
    privacy, html = found["privacy"], (tmp_path / "run/report.html").read_text()
    assert privacy["adjacency"].startswith("replace all examples of one client")
    assert "the server" in privacy["against"]
    assert "not the server" not in privacy["against"]
    assert privacy["delta_rule"] == "1 / (10 x the number of clients)"
    assert "one whole client" in html
    assert "What anyone can learn about one client" in html


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("privacy.delta=0.1", "publish one of 12 clients"),
        ("privacy.max_noise=0.2", "smallest epsilon"),
        ("privacy.adapt=true", "privacy.adapt is for privacy.unit=client"),
        ("privacy.unit=example privacy.delta=0.1", "publish one of the 10 examples of site-05"),
    ],
)
def test_what_cannot_be_promised_is_refused_before_round_one(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(Refused, match=line) as caught:
        run(tmp_path / "run", text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
