"""privacy.unit=both, and test results that clients noise: two accounts a client, each with its own mechanism."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients.task import Reply, Task
from clients.training import Node, answer
from privacy import accounting, heads, recompute
from privacy.chain import Head
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from scenarios.weights import flatten, layout
from server import budget, score, select
from server import run as job
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder
from server.state import Spent, first_state

NAMES = [f"site-{i:02}" for i in range(12)]
BASE = (
    "rounds.number=3 local.batch=10 local.rate=0.3 reference.no_privacy=false export.recover_rounds=0 export.prune=0 "
    "privacy.unit=both privacy.epsilon=6 privacy.client_epsilon=20 privacy.clip=0.5 privacy.update_clip=0.3"
)
NOISED = "evaluation.on=clients evaluation.epsilon=4 evaluation.every=2"


def made_examples(name: str) -> Examples:
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    return Examples(x, (x.sum(1) > 0).long())


def made() -> Scenario:
    sizes, validation = dict.fromkeys(NAMES, 30), made_examples("validation")
    federation = Federation(sizes, made_examples, validation, validation, made_examples)
    return Scenario(
        "made", override(Settings(), BASE), {"net": lambda: nn.Linear(5, 2)}, lambda _: federation, name="made"
    )


def run(path: Path, text: str = "", stop_after: int = 99) -> dict[str, Any]:
    again, settings = path.exists(), override(made().settings, text)
    with RunFolder.open(path) if again else RunFolder.create(path, "made", settings) as folder:

        def stop() -> bool:
            return len(folder.rows()) == stop_after

        return job.run(job.prepare(made(), settings, folder, EmbeddedFleet, Quiet(), stop))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def ledger(state: Path) -> Ledger:
    opened = Ledger(state / "simulations" / "made.ledger")
    opened.read()
    return opened


def test_each_client_pays_for_its_examples_and_for_itself(tmp_path: Path, state: Path) -> None:
    privacy = run(tmp_path / "run")["privacy"]
    one = privacy["clients"][0]
    assert (one["steps"], one["whole"]["steps"]) == (9, 3)
    assert one["epsilon"] == pytest.approx(6, rel=0.01)
    assert one["whole"]["epsilon"] == pytest.approx(20, rel=0.01)
    assert one["whole"]["epsilon"] <= privacy["worst_whole_epsilon"] <= 20
    assert one["sampling_rate"] == pytest.approx(1 / 3)
    assert one["whole"]["sampling_rate"] == 1
    assert (one["delta"], one["whole"]["delta"]) == (1 / 300, 1 / 120)
    rows = {(row["unit"], row["client"]): row for row in recompute.accounts(recompute.records(ledger(state).path))}
    assert rows["example", NAMES[0]]["epsilon"] == pytest.approx(one["epsilon_total"], rel=5e-3)
    assert rows["client", NAMES[0]]["epsilon"] == pytest.approx(one["whole"]["epsilon_total"], rel=5e-3)
    assert "of a client as a whole" in privacy["adjacency"]
    assert "a client as a whole against the server" in privacy["not_covered"][0]


def test_where_the_draw_is_secret_everyone_pays_both_accounts_drawn_or_not(tmp_path: Path, state: Path) -> None:
    found = run(tmp_path / "run", "rounds.fraction=0.5 rounds.minimum=0")
    assert {(client["steps"], client["whole"]["steps"]) for client in found["privacy"]["clients"]} == {(9, 3)}
    histories = {account.unit: set() for account in ledger(state).accounts}
    for account, standing in ledger(state).accounts.items():
        histories[account.unit].add(tuple(sorted(standing.history.items())))
    assert all(len(seen) == 1 for seen in histories.values()), "nothing in the ledger tells who was drawn"


def test_the_account_that_runs_out_first_leaves_the_client_out_and_the_other_is_not_charged(
    tmp_path: Path, state: Path
) -> None:
    spent = ledger(state)
    tired = Account("client", NAMES[3], "made")
    spent.open({tired: (30.0, 1 / 120)})
    step = Mechanism(1.0, 1.0)
    spent.reserve("elsewhere", 1, {tired: (step, accounting.most_steps(step, 30.0, 1 / 120))})
    before = dict(ledger(state).accounts[tired].history)
    found = run(tmp_path / "run", "privacy.budget=30")
    after = ledger(state)
    assert found["fleet"]["left_out"][0]["name"] == NAMES[3]
    assert dict(after.accounts[tired].history) == before
    assert sum(after.accounts[Account("example", NAMES[3], "made")].history.values()) == 0
    assert sum(after.accounts[Account("example", NAMES[4], "made")].history.values()) == 9


def test_a_resumed_run_counts_a_lost_round_in_both_accounts(tmp_path: Path) -> None:
    path, settings = tmp_path / "run", override(made().settings, "rounds.number=3")
    with pytest.raises(job.Stopped):
        run(path, stop_after=1)
    with RunFolder.open(path) as folder:
        prepared = job.prepare(made(), settings, folder, EmbeddedFleet, Quiet())
        assert prepared.accounts.reserve(2, dict.fromkeys(NAMES, 3)) == {}
    clients = run(path)["privacy"]["clients"]
    assert {(client["steps"], client["whole"]["steps"]) for client in clients} == {(9, 3)}, (
        "no round more than paid for"
    )


def test_a_client_can_pay_only_while_both_of_its_accounts_can(tmp_path: Path) -> None:
    settings = override(made().settings, "")
    roster = EmbeddedFleet(Node(made(), settings, made().data(settings), tmp_path)).hello()
    plan = budget.plans(roster, settings)[NAMES[0]]
    assert plan.whole is not None
    assert select.can_pay(plan, Spent(steps=6, whole=2), 3)
    assert not select.can_pay(plan, Spent(steps=6, whole=3), 3)
    assert not select.can_pay(plan, Spent(steps=7, whole=2), 3)


def test_a_node_trains_no_task_that_lacks_either_half(tmp_path: Path) -> None:
    settings = made().settings
    node = Node(made(), settings, made().data(settings), tmp_path)
    weights, shape = flatten(node.template), layout(node.template)
    whole = Task(
        "train", 1, NAMES[0], weights, shape, 0.1, 1, mechanism=Mechanism(1 / 3, 2.0), clip=0.5, update_clip=0.3
    )
    assert not answer(node, whole).reason
    assert "differential privacy" in answer(node, replace(whole, mechanism=None)).reason
    assert "clipping norm" in answer(node, replace(whole, update_clip=0.0)).reason


# ---- test results ----


def test_noised_test_results_are_charged_to_the_test_examples_for_every_evaluation(tmp_path: Path, state: Path) -> None:
    found = run(tmp_path / "run", NOISED)
    tests = [client["tests"] for client in found["privacy"]["clients"]]
    assert {one["steps"] for one in tests} == {2}, "after round 2 and at the end"
    assert all(3.9 < one["epsilon"] <= 4 for one in tests)
    assert found["privacy"]["worst_tests_epsilon"] == max(one["epsilon"] for one in tests)
    account = ledger(state).accounts[Account("example", NAMES[0], "made (test)")]
    assert dict(account.history) == {Mechanism(1.0, tests[0]["noise_multiplier"]): 2}
    assert found["final"]["loss"] is None
    assert found["final"]["worst_client_accuracy"] is None
    assert 0 <= found["final"]["accuracy"] <= 1
    assert not any("test accuracy" in text for text in found["privacy"]["not_covered"])


@pytest.mark.parametrize("text", ["", "rounds.fraction=0.5 rounds.minimum=0"])
def test_whose_test_examples_cannot_pay_is_named_where_draws_are_secret_too(
    tmp_path: Path, state: Path, text: str
) -> None:
    spent, tired = ledger(state), Account("example", NAMES[3], "made (test)")
    spent.open({tired: (30.0, 1 / 300)})
    step = Mechanism(1.0, 1.0)
    spent.reserve("elsewhere", 1, {tired: (step, accounting.most_steps(step, 30.0, 1 / 300))})
    found = run(tmp_path / "run", f"{NOISED} privacy.budget=30 {text}")
    with RunFolder.open(tmp_path / "run") as folder:
        rows = [row["unevaluated"] for row in folder.rows()]
    (one,) = rows[1]
    assert (rows[0], rows[2], one["name"]) == ([], [], NAMES[3]), "rounds 1 and 3 are not evaluated"
    assert re.fullmatch(r"ledger: epsilon 0\.\d+ of its 30 is left, which does not pay for a round", one["reason"])
    assert found["fleet"]["unevaluated"] == [{**one, "times": 2}], "after round 2 and at the end"
    assert [client["tests"]["steps"] for client in found["privacy"]["clients"]] == [2] * 3 + [0] + [2] * 8
    assert "not evaluated" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("text", "named"), [("", True), ("rounds.fraction=0.5 rounds.minimum=0", False)])
@pytest.mark.parametrize("how", ["evaluation.on=clients", NOISED])
def test_a_client_whose_evaluation_fails_is_named_where_that_cannot_hang_on_a_secret_draw(
    tmp_path: Path, how: str, text: str, named: bool
) -> None:
    def broken(name: str) -> Examples:
        if name == NAMES[3]:
            raise OSError("its disk is gone")
        return made_examples(name)

    settings, federation = override(made().settings, f"{how} {text}"), made().data(made().settings)
    node = Node(made(), settings, replace(federation, client_test=broken), tmp_path)
    fleet = EmbeddedFleet(node)
    found = score.scorer(node, fleet, NAMES, budget.test_plans(fleet.hello(), settings))
    missing = found(first_state(node.template, settings)).missing
    assert dict(missing) == ({NAMES[3]: "failed with OSError"} if named else {})


def test_test_results_as_they_are_stand_under_what_is_not_covered(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "evaluation.on=clients")
    assert any("test accuracy and loss" in text for text in found["privacy"]["not_covered"])
    assert found["privacy"]["worst_tests_epsilon"] is None


def test_no_more_evaluations_are_made_than_were_planned(tmp_path: Path, state: Path) -> None:
    path = tmp_path / "run"
    run(path, NOISED)
    settings = override(made().settings, NOISED)
    with RunFolder.open(path) as folder:
        prepared = job.prepare(made(), settings, folder, EmbeddedFleet, Quiet())
        assert prepared.committed is not None
        again = prepared.score(prepared.committed)
        assert again.accuracy is None
        assert dict(again.missing) == dict.fromkeys(NAMES, "budget: all 2 evaluations of this run were made")
    assert sum(ledger(state).accounts[Account("example", NAMES[0], "made (test)")].history.values()) == 2


def test_a_node_whose_settings_ask_for_noise_says_nothing_of_its_tests_without_it(tmp_path: Path) -> None:
    settings = override(made().settings, NOISED)
    node = Node(made(), settings, made().data(settings), tmp_path)
    task = Task("evaluate", 1, NAMES[0], flatten(node.template), layout(node.template))
    assert "without the noise" in answer(node, task).reason
    replies = [answer(node, replace(task, mechanism=Mechanism(1.0, 5.0))) for _ in range(40)]
    assert len({reply.examples for reply in replies}) > 10
    assert {reply.loss for reply in replies} == {0.0}
    assert np.mean([reply.examples for reply in replies]) == pytest.approx(30, abs=6)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("privacy.unit=example privacy.client_epsilon=3", "privacy.client_epsilon is for privacy.unit=both"),
        ("evaluation.epsilon=3", "set evaluation.on=clients"),
        (
            f"privacy.unit=client privacy.client_epsilon= privacy.delta=0.05 privacy.epsilon=40 {NOISED}",
            "one of the 30 examples",
        ),
        ("privacy.unit=none privacy.client_epsilon= evaluation.on=clients evaluation.epsilon=3", "a privacy.unit"),
        (
            "privacy.client_epsilon=0.2 privacy.epsilon=30 privacy.max_noise=3",
            "privacy.client_epsilon=0.2 .*smallest epsilon",
        ),
        ("server.combine=median", "median is no sum"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(Refused, match=line) as caught:
        run(tmp_path / "run", text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_worst_epsilon_of_a_round_is_that_of_the_examples(tmp_path: Path) -> None:
    found = run(tmp_path / "run")
    with RunFolder.open(tmp_path / "run") as folder:
        last = folder.rows()[-1]
    client = found["privacy"]["clients"][0]
    history = {Mechanism(client["sampling_rate"], client["noise_multiplier"]): client["steps"]}
    assert last["epsilon"] == accounting.epsilon(history, client["delta"])


@pytest.mark.parametrize(("text", "recorded"), [("", True), ("rounds.fraction=0.5 rounds.minimum=0", False)])
def test_heads_of_single_devices_are_records_only_where_everybody_may_know_who_took_part(
    tmp_path: Path, text: str, recorded: bool
) -> None:
    settings = override(made().settings, text)
    with RunFolder.create(tmp_path / "run", "made", settings) as folder:
        prepared = job.prepare(made(), settings, folder, EmbeddedFleet, Quiet())
        assert prepared.accounts.reserve(1, dict.fromkeys(NAMES, 3)) == {}
        prepared.accounts.heard(Reply(1, NAMES[2], b"", 30, 3, head=Head(4, "ab" * 32)))
        state = first_state(prepared.node.template, settings)
        prepared.accounts.commit(replace(state, round=1), {"round": 1}, dict.fromkeys(NAMES, 3))
        assert prepared.accounts.ledger is not None
        records = Ledger(prepared.accounts.ledger.path, keep=True)
    records.read()
    assert any(record["kind"] == "SEEN" for record in records.records or ()) == recorded
    assert len(heads.read(records)) == (not recorded)


def test_a_delta_that_would_publish_a_test_example_is_refused_by_its_client(tmp_path: Path) -> None:
    settings = override(made().settings, f"{NOISED} privacy.delta=0.03")
    node = Node(made(), settings, made().data(settings), tmp_path)
    many = Examples(torch.zeros(40, 5), torch.zeros(40, dtype=torch.int64))
    crowded = replace(node, federation=replace(node.federation, client_test=lambda _: many))
    task = Task("evaluate", 1, NAMES[0], flatten(node.template), layout(node.template), mechanism=Mechanism(1.0, 5.0))
    assert not answer(node, task).reason
    assert "too many for delta=0.03" in answer(crowded, task).reason


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_update_that_is_not_finite_leaves_as_nothing_and_not_as_an_error(tmp_path: Path, value: float) -> None:
    settings = override(made().settings, "privacy.unit=client privacy.client_epsilon=")

    def broken(name: str) -> Examples:
        return Examples(torch.full((30, 5), value), torch.zeros(30, dtype=torch.int64))

    federation = replace(made().data(settings), client=broken)
    node = Node(made(), settings, federation, tmp_path)
    task = Task("train", 1, NAMES[0], flatten(node.template), layout(node.template), 0.1, 1, update_clip=0.5)
    reply = answer(node, task)
    assert not reply.reason
    assert not np.frombuffer(reply.payload, "<f4").any()
