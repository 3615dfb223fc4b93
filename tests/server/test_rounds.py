"""One federation over fleets that behave and fleets that do not: a bad client costs its own update, never the run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clients.task import Device, Hello, Reply, Task
from clients.training import Node
from privacy import accounting
from privacy.plan import Plan
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import budget, combine
from server.embedded import EmbeddedFleet
from server.references import NoJournal
from server.rounds import Fleet, rate, rounds
from server.state import Row, Score, ServerState, final_weights, first_state

NAMES = ["a", "b", "c", "d"]
SIZES = dict(zip(NAMES, (10, 20, 30, 40), strict=True))
BASE = "rounds.number=3 local.batch=8 local.rate=0.2"


def made_examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(ord(name))
    x = torch.randn(SIZES[name], 5, generator=generator)
    return Examples(x, (x[:, 0] > 0).long())


class Kept(NoJournal):
    """A journal that remembers what it was told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, Mapping[str, int]]] = []
        self.rows: list[Row] = []
        self.refused: set[tuple[int, str]] = set()

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        self.events.append(("reserve", number, dict(steps)))
        return {name: "ledger: made up" for name in steps if (number, name) in self.refused}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.events.append(("commit", state.round, dict(taken)))
        self.rows.append(row)


class Bent:
    """The embedded fleet with every reply passed through `bend`, and devices given."""

    def __init__(
        self, fleet: EmbeddedFleet, bend: Callable[[Task, Reply], Reply], devices: Mapping[str, Device]
    ) -> None:
        self._fleet, self._bend, self._devices, self.asked = fleet, bend, devices, list[list[str]]()

    def hello(self) -> dict[str, Hello]:
        return {n: replace(h, device=self._devices.get(n, Device())) for n, h in self._fleet.hello().items()}

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        self.asked.append([task.client for task in tasks])
        return (self._bend(task, reply) for task, reply in zip(tasks, self._fleet.ask(tasks), strict=True))


def federate(
    folder: Path,
    text: str = "",
    bend: Callable[[Task, Reply], Reply] = lambda _, reply: reply,
    devices: Mapping[str, Device] = {},
    state: ServerState | None = None,
    refused: set[tuple[int, str]] = set(),  # noqa: B006
) -> tuple[ServerState, Kept, Bent]:
    settings = override(Settings(), f"{BASE} {text}")
    federation = Federation(SIZES, made_examples, made_examples("a"), made_examples("b"))
    scenario = Scenario("made", Settings(), {"net": lambda: nn.Linear(5, 2)}, lambda _: federation, name="made")
    node = Node(scenario, settings, federation, folder)
    fleet, journal = Bent(EmbeddedFleet(node), bend, devices), Kept()
    journal.refused = refused
    plans = budget.plans(fleet.hello(), settings)
    state = state or first_state(node.template, settings)
    *_, (last, _) = rounds(fleet, fleet.hello(), plans, state, settings, journal, lambda _: Score(1.0, 0.5))
    return last, journal, fleet


def plans_of(folder: Path, text: str) -> dict[str, Plan]:
    settings = override(Settings(), f"{BASE} {text}")
    return budget.plans({n: Hello(n, SIZES[n], "") for n in NAMES}, settings)


def test_every_client_is_asked_and_the_weights_move(tmp_path: Path) -> None:
    state, journal, fleet = federate(tmp_path)
    assert fleet.asked == [NAMES] * 3
    assert [row["replies"] for row in journal.rows] == [4] * 3
    assert state.round == 3
    assert journal.rows[0]["bytes_up"] == 4 * 4 * 12
    assert journal.rows[0]["bytes_down"] == 4 * 4 * 12


def test_a_fraction_asks_fewer_and_the_same_ones_for_the_same_seed(tmp_path: Path) -> None:
    _, _, fleet = federate(tmp_path, "rounds.fraction=0.5 rounds.number=20")
    _, _, again = federate(tmp_path, "rounds.fraction=0.5 rounds.number=20")
    assert all(len(asked) == 2 and asked == sorted(asked) for asked in fleet.asked)
    assert fleet.asked == again.asked
    assert len({tuple(asked) for asked in fleet.asked}) > 3


GARBAGE: dict[str, Callable[[Task, Reply], Reply]] = {
    "too short": lambda _, reply: replace(reply, payload=reply.payload[:-1]),
    "not finite": lambda _, reply: replace(reply, payload=np.full(12, np.nan, "<f4").tobytes()),
    "empty": lambda _, reply: replace(reply, payload=b""),
    "other round": lambda _, reply: replace(reply, round=reply.round + 1),
    "other client": lambda _, reply: replace(reply, client="d"),
    "more steps": lambda task, reply: replace(reply, steps=task.steps + 1),
    "fewer steps without a deadline": lambda task, reply: replace(reply, steps=task.steps - 1),
    "no steps": lambda _, reply: replace(reply, steps=0),
    "other size": lambda _, reply: replace(reply, examples=10**9),
    "failure": lambda task, _: Reply(task.round, task.client, reason="failed with RuntimeError"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_client_that_answers_garbage_costs_its_own_update_and_is_named(tmp_path: Path, kind: str) -> None:
    def bend(task: Task, reply: Reply) -> Reply:
        return GARBAGE[kind](task, reply) if task.client == "b" else reply

    state, journal, _ = federate(tmp_path, bend=bend)
    for row in journal.rows:
        assert [entry["name"] for entry in row["rejected"]] == ["b"]
        assert row["rejected"][0]["reason"]
        assert (row["replies"], row["applied"]) == (3, True)
    assert np.isfinite(state.weights).all()
    assert state.clients["b"].last == 0


def test_a_late_client_is_named_as_late(tmp_path: Path) -> None:
    _, journal, _ = federate(
        tmp_path, bend=lambda t, r: Reply(t.round, t.client, reason="deadline", late=True) if t.client == "c" else r
    )
    assert journal.rows[0]["late"] == ["c"]
    assert journal.rows[0]["rejected"] == []


def test_a_round_with_too_few_good_replies_is_not_applied_and_says_so(tmp_path: Path) -> None:
    first, _, _ = federate(tmp_path, "rounds.number=1")
    state, journal, _ = federate(
        tmp_path,
        "rounds.minimum=3",
        bend=lambda t, r: r if t.round == 1 or t.client == "a" else Reply(t.round, t.client, reason="gone"),
    )
    assert [row["applied"] for row in journal.rows] == [True, False, False]
    assert "3 are needed" in journal.rows[1]["reason"]
    assert np.array_equal(state.weights, first.weights)


def test_an_update_that_overflows_the_weights_is_not_applied(tmp_path: Path) -> None:
    huge = np.full(12, 3e38, "<f4").tobytes()
    state, journal, _ = federate(tmp_path, "server.rate=10", bend=lambda _, reply: replace(reply, payload=huge))
    assert [row["applied"] for row in journal.rows] == [False] * 3
    assert np.isfinite(state.weights).all()


PRIVATE = "privacy.unit=example privacy.epsilon=5 privacy.noise_seed=1"


def test_what_could_be_released_is_reserved_before_anyone_is_asked_and_committed_after(tmp_path: Path) -> None:
    order: list[str] = []
    _, journal, _ = federate(tmp_path, PRIVATE, bend=lambda t, r: (order.append(f"{t.round}{t.client}"), r)[1])
    assert [(kind, number) for kind, number, _ in journal.events] == [
        (kind, number) for number in (1, 2, 3) for kind in ("reserve", "commit")
    ]
    assert journal.events[0][2] == {"a": 2, "b": 3, "c": 4, "d": 5}


def test_whom_the_ledger_refuses_is_not_asked_and_the_round_goes_on_without_it(tmp_path: Path) -> None:
    state, journal, fleet = federate(tmp_path, PRIVATE, refused={(2, "b"), (3, "b")})
    assert fleet.asked == [NAMES, ["a", "c", "d"], ["a", "c", "d"]]
    assert journal.rows[1]["skipped"] == [{"name": "b", "reason": "ledger: made up"}]
    assert journal.rows[1]["cohort"] == NAMES
    assert all(row["applied"] for row in journal.rows)
    assert (state.clients["a"].rounds, state.clients["b"].rounds) == (3, 1)
    assert journal.events[-1] == ("commit", 3, {"a": 2, "c": 4, "d": 5})


def test_each_account_accumulates_over_all_rounds_up_to_its_budget(tmp_path: Path) -> None:
    state, journal, _ = federate(tmp_path, PRIVATE)
    plans = plans_of(tmp_path, PRIVATE)
    spent = {n: accounting.epsilon({plans[n].mechanism: state.clients[n].steps}, plans[n].delta) for n in NAMES}
    one_round = accounting.epsilon({plans["a"].mechanism: 2}, plans["a"].delta)
    assert all(4.9 <= epsilon <= 5 for epsilon in spent.values())
    assert one_round < 4
    epsilons = [row["epsilon"] for row in journal.rows]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == max(spent.values())


def test_a_client_whose_reply_is_lost_has_spent_all_the_same(tmp_path: Path) -> None:
    state, _, _ = federate(
        tmp_path, PRIVATE, bend=lambda t, r: Reply(t.round, t.client, reason="gone") if t.client == "a" else r
    )
    assert state.clients["a"].steps == 3 * 2
    assert state.clients["a"].rounds == 3


def test_a_client_that_cannot_afford_the_round_is_left_out_by_name(tmp_path: Path) -> None:
    state, _, _ = federate(tmp_path, PRIVATE + " rounds.number=2")
    more = replace(state, until=4)
    after, journal, fleet = federate(tmp_path, PRIVATE + " rounds.number=2", state=more)
    assert fleet.asked == [[], []]
    assert {entry["name"] for entry in journal.rows[0]["skipped"]} == set(NAMES)
    assert "budget" in journal.rows[0]["skipped"][0]["reason"]
    assert {n: s.steps for n, s in after.clients.items()} == {n: s.steps for n, s in state.clients.items()}


def test_the_final_weights_are_the_mean_of_the_last_rounds(tmp_path: Path) -> None:
    each = [federate(tmp_path, "rounds.number=4 rounds.average=2 local.decay=0", state=None)[0]]
    third = federate(tmp_path, "rounds.number=3")[0].weights
    fourth = federate(tmp_path, "rounds.number=4")[0].weights
    assert np.allclose(final_weights(each[0]), (third.astype(np.float64) + fourth) / 2, atol=1e-7)


def test_the_rate_falls_linearly_and_recovery_begins_at_full_rate() -> None:
    local = override(Settings(), "local.rate=10 local.decay=0.6").local
    assert [rate(local, n, 5) for n in (1, 3, 5, 6, 9)] == pytest.approx([10, 7, 4, 10, 10])
    assert rate(local, 1, 1) == 10


SLOW = {"b": Device(speed=40.0), "c": Device(speed=1.0), "d": Device(memory=10)}


def test_a_slow_client_does_the_steps_that_fit_and_one_that_cannot_fit_is_late_by_name(tmp_path: Path) -> None:
    done: dict[str, int] = {}

    def bend(task: Task, reply: Reply) -> Reply:
        done[task.client] = reply.steps
        return reply

    _, journal, fleet = federate(tmp_path, "fleet.deadline=0.45", bend=bend, devices=SLOW)
    assert fleet.asked[0] == ["a", "b"]
    assert done == {"a": 2, "b": 2}
    assert journal.rows[0]["late"] == ["c"]
    assert journal.rows[0]["skipped"][0]["name"] == "d"
    assert "memory" in journal.rows[0]["skipped"][0]["reason"]
    assert journal.rows[-1]["simulated_seconds"] == pytest.approx(3 * 0.45)


def test_shorter_work_is_accounted_as_shorter(tmp_path: Path) -> None:
    text = PRIVATE + " fleet.deadline=0.45"
    state, _, _ = federate(tmp_path, text, devices={"b": Device(speed=40.0)})
    assert state.clients["b"].steps == 3 * 2
    assert state.clients["d"].steps == 3 * 5


def test_a_client_that_is_offline_is_not_asked_and_named(tmp_path: Path) -> None:
    _, journal, fleet = federate(tmp_path, "rounds.number=30", devices={"a": Device(availability=0.5)})
    asked = sum("a" in names for names in fleet.asked)
    assert 5 < asked < 25
    assert sum(bool(row["skipped"]) for row in journal.rows) == 30 - asked


def test_with_the_profile_equal_a_deadline_changes_nothing(tmp_path: Path) -> None:
    free, bound = federate(tmp_path)[0], federate(tmp_path, "fleet.deadline=5")[0]
    assert np.array_equal(free.weights, bound.weights)


def test_fednova_gives_a_slow_client_its_full_say(tmp_path: Path) -> None:
    devices = {"d": Device(speed=20.0)}
    text = "rounds.number=1 server.weighting=uniform local.steps=8 fleet.deadline=0.5"
    plain = federate(tmp_path, text, devices=devices)[0].weights
    nova = federate(tmp_path, text + " server.normalize=true", devices=devices)[0].weights
    same = federate(tmp_path, text + " server.normalize=true")[0].weights
    assert not np.allclose(plain, nova)
    assert np.allclose(same, federate(tmp_path, text)[0].weights, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_fednova_counts_steps_with_momentum_by_how_far_they_carry_a_constant_gradient(momentum: float) -> None:
    far, velocity = 0.0, 0.0
    for steps in range(1, 30):
        velocity = momentum * velocity + 1
        far += velocity
        assert combine.plain_steps(steps, momentum) == pytest.approx(far)


def test_a_fleet_is_the_protocol_and_nothing_more(tmp_path: Path) -> None:
    fleet: Fleet = federate(tmp_path)[2]
    assert list(fleet.hello()) == NAMES
