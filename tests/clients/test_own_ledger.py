"""A device's own ledger: it reserves before it trains, replays and never redraws, and finds a server that forgot."""

import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from clients import own_ledger, training
from clients.own_ledger import OwnLedger
from clients.task import Charge, Hello, Reply, Task
from clients.training import Node
from privacy import accounting
from privacy.chain import Head
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario, build_model
from scenarios.settings import Settings, override
from scenarios.weights import flatten, layout

ME = Account("example", "a", "wards")
STEP = Mechanism(1.0, 10.0)
SERVER = Head(7, "5e" * 32)


def made_node(folder: Path, text: str = "") -> Node:
    data = Examples(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)
    federation = Federation({"a": 40}, lambda name: data, data)
    settings = override(Settings(), f"privacy.unit=example local.batch=0 local.steps=4 {text}")
    scenario = Scenario("made", settings, {"net": lambda: nn.Linear(6, 3)}, lambda _: federation, dataset="wards")
    return Node(scenario, settings, federation, folder / "states")


def made_task(node: Node, number: int = 1, attempt: int = 1, run: str = "run", known: Head | None = None) -> Task:
    model = build_model(node.scenario, node.settings)
    charge = Charge(run, attempt, SERVER, known)
    return Task("train", number, "a", flatten(model), layout(model), 0.5, 4, mechanism=STEP, clip=1.0, charge=charge)


def standing(own: OwnLedger) -> Ledger:
    """What a process that comes later finds."""
    found = Ledger(own.path)
    found.read()
    return found


def spent(own: OwnLedger) -> int:
    return sum(standing(own).accounts[ME].history.values())


def test_steps_are_on_disk_before_data_is_touched_and_what_was_not_taken_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, own, seen = made_node(tmp_path), OwnLedger(tmp_path), list[int]()
    real = training.answer

    def spying(node: Node, task: Task) -> Reply:
        seen.append(spent(own))
        return replace(real(node, task), steps=3)

    monkeypatch.setattr(own_ledger.cohort, "alone", spying)
    reply = own.answer(node, made_task(node))
    assert (reply.reason, reply.steps, seen, spent(own)) == ("", 3, [4], 3)
    assert reply.head is not None
    assert Ledger(own.path).holds(reply.head)
    assert standing(own).seen[ME] == SERVER


def test_a_replayed_task_gets_the_stored_bytes_and_costs_nothing(tmp_path: Path) -> None:
    node, own = made_node(tmp_path), OwnLedger(tmp_path)
    first = own.answer(node, made_task(node))
    assert first == OwnLedger(tmp_path).answer(node, made_task(node)), "the same, to the bit, after a restart"
    other_weights = replace(made_task(node), weights=made_task(node).weights + 1)
    assert own.answer(node, other_weights).payload == first.payload, "whatever the replay asks for"
    assert spent(own) == 4
    again = own.answer(node, made_task(node, attempt=2))
    assert again.payload != first.payload, "a new attempt is a new reservation, and new noise"
    assert spent(own) == 8


@pytest.mark.parametrize(("number", "attempt"), [(1, 1), (2, 1), (1, 9)])
def test_an_attempt_that_is_over_is_never_run_again(tmp_path: Path, number: int, attempt: int) -> None:
    node, own = made_node(tmp_path), OwnLedger(tmp_path)
    own.answer(node, made_task(node, 1))
    own.answer(node, made_task(node, 2, 2))
    reply = own.answer(node, made_task(node, number, attempt))
    assert (reply.payload, "reserved before" in reply.reason, spent(own)) == (b"", True, 8)


def test_a_reply_that_is_not_kept_or_damaged_is_not_drawn_anew(tmp_path: Path) -> None:
    node, own = made_node(tmp_path), OwnLedger(tmp_path)
    own.answer(node, made_task(node))
    (file,) = tmp_path.glob("*.reply")
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:20], b"", None):
        file.write_bytes(content) if content is not None else file.unlink()
        reply = own.answer(node, made_task(node))
        assert (reply.payload, "its reply is not kept" in reply.reason, spent(own)) == (b"", True, 4)


def test_what_is_charged_is_the_noise_that_the_task_asks_for(tmp_path: Path) -> None:
    node, own = made_node(tmp_path, "privacy.epsilon=400"), OwnLedger(tmp_path)
    less = Mechanism(1.0, 0.5)
    assert own.answer(node, replace(made_task(node), mechanism=less)).reason == ""
    assert standing(own).accounts[ME].history == {less: 4}
    for change in ({"mechanism": None}, {"charge": None}):
        assert "not charged" in own.answer(node, replace(made_task(node, 2), **change)).reason  # type: ignore[arg-type]


def test_the_owners_budget_is_never_passed_and_the_reason_says_what_is_left(tmp_path: Path) -> None:
    node, delta = made_node(tmp_path), accounting.default_delta(40)
    own = OwnLedger(tmp_path, accounting.epsilon({STEP: 9}, delta))
    replies = [own.answer(node, made_task(node, number)) for number in range(1, 5)]
    assert [bool(reply.payload) for reply in replies] == [True, True, False, False]
    assert "its own ledger: epsilon 0." in replies[2].reason
    assert spent(own) == 8


@pytest.mark.parametrize("text", ["privacy.unit=none", "privacy.unit=client", "privacy.noise_seed=1"])
def test_an_owners_budget_lets_no_run_pass_that_could_not_be_charged(tmp_path: Path, text: str) -> None:
    node, own = made_node(tmp_path, text), OwnLedger(tmp_path, 5.0)
    with pytest.raises(Refused, match=r"owner's budget of 5"):
        own.greet(node, Hello("a", 40, "d"))
    reply = own.answer(node, replace(made_task(node), mechanism=None, charge=None))
    assert (reply.payload, "owner's budget" in reply.reason) == (b"", True)
    assert OwnLedger(tmp_path).greet(node, Hello("a", 40, "d")) == Hello("a", 40, "d"), "without one it takes part"
    assert not own.path.exists()


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_budget_that_is_no_budget_is_refused(tmp_path: Path, budget: object) -> None:
    with pytest.raises(Refused, match="no number above 0"):
        OwnLedger.of(tmp_path, budget)


def test_a_ledger_rolled_back_with_its_head_and_key_is_found_by_what_the_server_saw(tmp_path: Path) -> None:
    node, own = made_node(tmp_path), OwnLedger(tmp_path)
    own.answer(node, made_task(node, 1))
    old = {path: path.read_bytes() for path in tmp_path.glob("node.ledger*")}
    assert len(old) == 3
    known = own.answer(node, made_task(node, 2)).head
    assert own.answer(node, made_task(node, 3, known=known)).reason == ""
    for path, content in old.items():
        path.write_bytes(content)
    reply = own.answer(node, made_task(node, 4, known=known))
    assert (reply.payload, "was rolled back" in reply.reason) == (b"", True)
    for path in old:
        path.unlink()
    assert "was rolled back" in own.answer(node, made_task(node, 4, known=known)).reason


def test_hello_says_the_own_head_and_the_servers_that_was_seen_last(tmp_path: Path) -> None:
    node, own = made_node(tmp_path), OwnLedger(tmp_path)
    first = own.greet(node, Hello("a", 40, "d"))
    assert first.seen is None
    own.answer(node, made_task(node))
    said = own.greet(node, Hello("a", 40, "d"))
    assert said.seen == SERVER
    assert said.head is not None
    assert said.head.sequence > (first.head or SERVER).sequence - 1
    own.greet(node, Hello("a", 40, "other data"))
    own.greet(node, Hello("a", 40, "other data"))
    assert (standing(own).accounts[ME].changes, spent(own)) == (1, 4), "spending stays when the data change"


def test_a_damaged_ledger_is_a_reason_without_this_nodes_paths(tmp_path: Path) -> None:
    node, own = made_node(tmp_path), OwnLedger(tmp_path)
    own.answer(node, made_task(node))
    own.path.write_bytes(own.path.read_bytes()[:-400])
    reply = own.answer(node, made_task(node, 2))
    assert reply.reason.startswith("its own ledger: node.ledger: it ends after")
    assert str(tmp_path) not in reply.reason


def test_a_client_that_was_too_late_for_one_step_has_spent_nothing(tmp_path: Path) -> None:
    node, own = made_node(tmp_path), OwnLedger(tmp_path)
    reply = own.answer(node, replace(made_task(node), deadline=1e-9))
    assert (reply.late, spent(own)) == (True, 0)


def test_a_device_that_dies_at_any_line_of_a_task_has_written_down_what_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL at every line of own_ledger.py, then asked again: stored bytes, a refusal, or first noise."""
    import sys

    node, told = made_node(tmp_path), tmp_path / "told"
    count = Counter[str]()
    monkeypatch.setattr(
        own_ledger.cohort, "alone", lambda _, task: Reply(task.round, "a", os.urandom(8), 40, task.steps)
    )

    def work(folder: Path, stop: int) -> None:
        def trace(frame: object, kind: str, _: object) -> object:
            if frame.f_code.co_filename != own_ledger.__file__:  # type: ignore[attr-defined]
                return None
            if kind == "line":
                count["lines"] += 1
                if count["lines"] == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            reply = OwnLedger(folder).answer(node, made_task(node))
        finally:
            sys.settrace(None)
        told.write_bytes(reply.payload)

    work(tmp_path / "whole", 0)
    lines, count["lines"] = count["lines"], 0
    assert lines > 30
    for stop in range(1, lines + 1):
        folder = tmp_path / f"cut-{stop}"
        told.write_bytes(b"")
        if (child := os.fork()) == 0:
            try:
                work(folder, stop)
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        own = OwnLedger(folder)
        before = spent(own) if own.path.exists() and ME in standing(own).accounts else 0
        assert told.read_bytes() == b""
        reply = own.answer(node, made_task(node))
        assert spent(own) == 4, f"line {stop}"
        if before and not reply.payload:
            assert "its reply is not kept" in reply.reason


def test_noise_on_a_whole_update_is_one_step_a_round_whatever_the_local_steps(tmp_path: Path) -> None:
    node, own = made_node(tmp_path, "privacy.unit=local"), OwnLedger(tmp_path, budget=50.0)
    task = replace(made_task(node), mechanism=None, clip=0.0, update_clip=1.0, update_noise=10.0)
    assert own.answer(node, task).steps == 4
    account = Account("local", "a", "wards")
    assert dict(standing(own).accounts[account].history) == {Mechanism(1.0, 10.0): 1}


def test_noised_test_results_are_charged_to_the_test_examples_and_replayed_apart(tmp_path: Path) -> None:
    node = made_node(tmp_path, "evaluation.on=clients evaluation.epsilon=5")
    node = replace(node, federation=replace(node.federation, client_test=node.federation.client))
    own, tests = OwnLedger(tmp_path), Account("example", "a", "wards (test)")
    trained = own.answer(node, made_task(node))
    examined = replace(made_task(node), kind="evaluate", mechanism=Mechanism(1.0, 7.0), clip=0.0)
    counts = own.answer(node, examined)
    assert not counts.reason
    assert dict(standing(own).accounts[tests].history) == {Mechanism(1.0, 7.0): 1}
    assert spent(own) == 4
    assert own.answer(node, made_task(node)).payload == trained.payload
    assert own.answer(node, examined) == counts
    assert "not charged" in own.answer(node, replace(examined, charge=None)).reason


def test_noised_test_results_are_charged_where_the_server_adds_the_other_noise(tmp_path: Path) -> None:
    node = made_node(tmp_path, "privacy.unit=client evaluation.on=clients evaluation.epsilon=5")
    node = replace(node, federation=replace(node.federation, client_test=node.federation.client))
    own, tests = OwnLedger(tmp_path), Account("example", "a", "wards (test)")
    examined = replace(made_task(node), kind="evaluate", mechanism=Mechanism(1.0, 7.0), clip=0.0)
    counts = own.answer(node, examined)
    assert dict(standing(own).accounts[tests].history) == {Mechanism(1.0, 7.0): 1}
    assert own.answer(node, examined) == counts, "a replay draws no fresh noise"


def test_the_account_of_a_whole_client_is_kept_at_a_delta_for_a_fleet_and_not_for_its_examples(tmp_path: Path) -> None:
    node, own = made_node(tmp_path, "privacy.unit=local"), OwnLedger(tmp_path, budget=90.0)
    own.greet(node, Hello("a", 40, "5e" * 32))
    assert standing(own).accounts[Account("local", "a", "wards")].delta == 1e-6
