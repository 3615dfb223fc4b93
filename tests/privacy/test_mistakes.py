"""Mistakes of federated frameworks, each measured or read there, and the behaviour of Umbel in their place.

Flower 1.41, NVFLARE (f3b7c1b), pfl-research (c9d1f32); docs/pitfalls.md says which test holds which.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from torch import nn

from clients.task import Hello, Reply, Task
from clients.training import Node, answer
from privacy import accounting
from privacy.plan import Mechanism
from privacy.promise import promise
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import budget, compare, console, facts, results, rounds
from server import run as job
from server.embedded import EmbeddedFleet
from server.record import RunFolder
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

NAMES = [f"site-{i:02}" for i in range(20)]
BASE = (
    "rounds.number=1 local.batch=0 local.rate=0.5 reference.no_privacy=false export.recover_rounds=0 "
    "export.prune=0 privacy.epsilon=20 privacy.clip=0.2"
)
Bend = Callable[[Task, Reply], Reply]


def data(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(30, 5, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))


def made() -> Scenario:
    federation = Federation(dict.fromkeys(NAMES, 30), data, data("validation"), data("test"))
    return Scenario("made", override(Settings(), BASE), {"net": net}, lambda _: federation, name="made")


def nobody(task: Task, reply: Reply) -> Reply:
    return Reply(task.round, task.client, reason="gone")


@dataclass
class Watched(NoJournal):
    """The fleet with every reply passed through `bend`, and a journal that keeps the rows."""

    fleet: EmbeddedFleet
    bend: Bend
    rows: list[Row] = field(default_factory=list)

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        if self.bend is nobody:  # no need to train then
            return iter([Reply(task.round, task.client, reason="gone") for task in tasks])
        return (self.bend(task, reply) for task, reply in zip(tasks, self.fleet.ask(tasks), strict=True))

    def hello(self) -> Mapping[str, Hello]:
        return self.fleet.hello()

    def reserve(self, number: int, steps: Mapping[str, int]) -> Mapping[str, str]:
        return {}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.rows.append(row)


def federated(folder: Path, text: str, bend: Bend) -> tuple[list[ServerState], list[Row]]:
    """(the state before each round and after the last, the rows)."""
    settings = override(made().settings, text)
    node = Node(made(), settings, made().data(settings), folder)
    watched = Watched(EmbeddedFleet(node), bend)
    roster, begin = watched.hello(), first_state(node.template, settings)
    plans = budget.plans(roster, settings)
    loop = rounds.rounds(watched, roster, plans, begin, settings, watched, lambda _: Score(1.0, 0.5))
    return [begin, *(state for state, _ in loop)], watched.rows


def one_round(folder: Path, text: str, bend: Bend = lambda _, reply: reply) -> tuple[ServerState, np.ndarray, Row]:
    """(the state after it, what it added to the weights, its row)."""
    (begin, state), (row,) = federated(folder, text, bend)
    return state, state.weights - begin.weights, row


def of_one(change: Callable[[np.ndarray], np.ndarray], within: bool = True) -> Bend:
    """The first client sends something else."""

    def bend(task: Task, reply: Reply) -> Reply:
        if task.client != NAMES[0]:
            return reply
        update = change(np.frombuffer(reply.payload, "<f4").copy()).astype("<f4")
        return replace(reply, payload=update.tobytes(), within=within)

    return bend


def lost(task: Task, reply: Reply) -> Reply:
    return Reply(task.round, task.client, reason="gone") if task.client == NAMES[0] else reply


CLIENT = "privacy.unit=client privacy.noise_seed=3"


# Flower: an update of zeros divides by zero in the server's round; one NaN makes the global model NaN.


@pytest.mark.parametrize("adapt", ["false", "true"])
def test_a_client_that_did_not_move_counts_like_any_other(tmp_path: Path, adapt: str) -> None:
    text = f"{CLIENT} privacy.adapt={adapt}"
    still = one_round(tmp_path / "a", text, of_one(np.zeros_like))
    absent = one_round(tmp_path / "b", text, lost)
    assert still[2]["applied"]
    assert still[2]["replies"] == 20
    assert np.array_equal(still[1], absent[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codec", ["float32", "float16", "qsgd8"])
def test_an_update_that_is_not_finite_costs_its_client_and_nobody_else(
    tmp_path: Path, value: float, codec: str
) -> None:
    def poisoned(task: Task, reply: Reply) -> Reply:
        if task.client != NAMES[0]:
            return reply
        raw = bytearray(reply.payload)
        kind = {"float32": "<f4", "float16": "<f2", "qsgd8": "<f4"}[codec]
        raw[: np.dtype(kind).itemsize] = np.array([value], kind).tobytes()
        return replace(reply, payload=bytes(raw))

    text = f"{CLIENT} codec={codec}"
    bad, absent = one_round(tmp_path / "a", text, poisoned), one_round(tmp_path / "b", text, lost)
    assert np.isfinite(bad[0].weights).all()
    assert np.array_equal(bad[1], absent[1])
    assert [entry["name"] for entry in bad[2]["rejected"]] == NAMES[:1]


# Flower: sqrt(2 ln(1.25 / delta)) / epsilon is a bound for epsilon below 1 alone: a request for 10 costs 10.39.


def test_a_budget_of_ten_is_kept_where_the_classic_formula_passes_it() -> None:
    classic = math.sqrt(2 * math.log(1.25 / 1e-5)) / 10
    assert accounting.epsilon({Mechanism(1.0, classic): 1}, 1e-5) == pytest.approx(10.39, abs=0.01)
    noise = accounting.calibrate(1.0, 1, 10.0, 1e-5, 100.0)
    assert 9.9 < accounting.epsilon({Mechanism(1.0, noise): 1}, 1e-5) <= 10
    assert noise > classic


AMOUNTS = ("epsilon", "client_epsilon", "budget", "delta", "clip", "update_clip")


@pytest.mark.parametrize("name", [*(f"privacy.{amount}" for amount in AMOUNTS), "evaluation.epsilon"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "1e999"])
def test_what_is_no_amount_is_refused_in_one_line(name: str, value: str) -> None:
    with pytest.raises(Refused, match=name.replace(".", r"\.")) as caught:
        override(Settings(), f"{name}={value}")
    assert "\n" not in str(caught.value)


# One account for all adversaries: a server that sees who was drawn faces epsilon 17.9 where readers face 1.83.


def test_a_draw_of_clients_that_others_can_see_makes_no_step_cheaper() -> None:
    roster = {name: Hello(name, 30, "") for name in NAMES}
    for unit, cheaper in (("example", False), ("client", True), ("both", False)):
        made_for = [
            budget.plans(roster, override(made().settings, f"privacy.unit={unit} rounds.minimum=0 rounds.fraction={f}"))
            for f in (1.0, 0.25)
        ]
        whole, quarter = (plans[NAMES[0]].mechanism for plans in made_for)
        assert (quarter.sampling_rate < 1) is cheaper
        assert (quarter.noise_multiplier < whole.noise_multiplier) is cheaper


# NVFLARE: an example makes its DP in round 0 alone, so that a client which restarts trains that round without.


def test_a_node_that_starts_in_a_later_round_trains_under_dp(tmp_path: Path) -> None:
    settings = override(made().settings, "privacy.unit=example local.batch=0 rounds.number=9")
    open_settings = override(settings, "privacy.unit=none")
    plan = budget.plans({NAMES[0]: Hello(NAMES[0], 30, "")}, settings)[NAMES[0]]
    sent = []
    for use in (settings, settings, open_settings):
        node = Node(made(), use, made().data(use), tmp_path)  # a process that has seen no round before
        begin = first_state(node.template, settings)
        task = Task("train", 7, NAMES[0], begin.weights, begin.layout, rate=0.5, steps=1)
        if use is settings:
            assert "differential privacy" in answer(node, task).reason
            task = replace(task, mechanism=plan.mechanism, clip=plan.clip)
        sent.append(np.frombuffer(answer(node, task).payload, "<f4"))
    deviation = 0.5 * plan.mechanism.noise_multiplier * 0.2 / 30
    assert np.std(sent[0] - sent[1]) == pytest.approx(deviation * math.sqrt(2), rel=0.25)
    assert np.abs(sent[0] - sent[2]).max() > deviation


# NVFLARE, Flower, Opacus: loss, accuracy and counts leave the clients beside the noised update, uncovered and unsaid.


def test_a_reply_to_training_carries_no_metric_and_its_counts_are_named_as_not_covered(tmp_path: Path) -> None:
    settings = override(made().settings, "privacy.unit=none")
    node = Node(made(), settings, made().data(settings), tmp_path)
    begin = first_state(node.template, settings)
    reply = answer(node, Task("train", 1, NAMES[0], begin.weights, begin.layout, rate=0.5, steps=1))
    told = {name for name, value in vars(reply).items() if value != vars(Reply(1, NAMES[0]))[name]}
    assert told == {"payload", "examples", "steps"}  # the update, and two counts
    for unit in ("example", "client", "both"):
        named = " ".join(not_covered(f"privacy.unit={unit}"))
        assert "number of examples" in named
        assert "who took part" in named
        assert "floating-point" in named


@pytest.mark.parametrize("unit", ["example", "client"])
def test_what_clients_measure_is_named_as_not_covered_where_they_evaluate(unit: str) -> None:
    measured = "test accuracy and loss that the clients computed, released without noise"
    assert measured in not_covered(f"privacy.unit={unit} evaluation.on=clients")
    assert measured not in not_covered(f"privacy.unit={unit}")


def not_covered(text: str) -> list[str]:
    node: Any = SimpleNamespace(settings=override(made().settings, text))
    return facts._not_covered(node, promise(node.settings.privacy.unit).not_covered, {})


# pfl: a cohort of 50 with the noise of one of 1000 (noise_scale 0.05), quoted at the epsilon of the 1000.


def test_the_epsilon_that_is_claimed_is_that_of_the_noise_that_was_added(tmp_path: Path) -> None:
    text = "privacy.unit=client rounds.fraction=0.5 rounds.minimum=0 rounds.number=30"
    settings = override(made().settings, text)
    plan = budget.plans({name: Hello(name, 30, "") for name in NAMES}, settings)[NAMES[0]]
    states, rows = federated(tmp_path, text, nobody)
    added = np.concatenate([after.weights - before.weights for before, after in pairwise(states)]).astype(np.float64)
    expected = 0.5 * len(NAMES)

    def fits(multiplier: float) -> bool:
        """Whether what was added to the mean is noise of that multiplier: chi-squared, two-sided, at 1e-4."""
        statistic = float(((added * expected / (multiplier * 0.2)) ** 2).sum())
        return 1e-4 < float(stats.chi2.cdf(statistic, len(added))) < 1 - 1e-4

    assert fits(plan.mechanism.noise_multiplier)
    assert not fits(plan.mechanism.noise_multiplier * 1.15)
    assert not fits(plan.mechanism.noise_multiplier * 0.85)
    claimed = rows[-1]["epsilon"]
    assert claimed == accounting.epsilon({plan.mechanism: 30}, plan.delta) <= 20
    scaled_down = Mechanism(plan.mechanism.sampling_rate, plan.mechanism.noise_multiplier * 0.05)
    assert accounting.epsilon({scaled_down: 30}, plan.delta) > 5 * claimed


# Flower's and NVFLARE's examples use delta 1e-5 for everyone and print it, if at all, somewhere else.


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("privacy.unit=example", "1 / (10 x the client's examples)"),
        ("privacy.unit=client", "1 / (10 x the number of clients)"),
        ("privacy.unit=example privacy.delta=1e-4", "0.0001 for every client"),
    ],
)
def test_delta_follows_the_data_and_is_shown_with_its_rule_wherever_epsilon_is(
    whole_run: Callable[[str], Path], text: str, rule: str
) -> None:
    path = whole_run(text)
    found = results.load(path)["privacy"]
    wanted = 1e-4 if "delta=" in text else 1 / (10 * (30 if "example" in text else len(NAMES)))
    assert found["delta_rule"] == rule
    assert [client["delta"] for client in found["clients"]] == pytest.approx([wanted] * len(NAMES))
    shown = summary(path)
    assert "ε" in shown
    assert f"δ {rule}" in shown
    assert rule in (path / "report.html").read_text().replace("&#39;", "'")


# A simulation with noise that can be computed again is one in every place where its epsilon stands.


class Quiet:
    def row(self, row: dict[str, Any]) -> None:
        pass

    def status(self, text: str) -> None:
        pass


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """whole_run(settings) -> the folder of a finished run, made once for each settings."""
    made_runs: dict[str, Path] = {}

    def run(text: str) -> Path:
        if text not in made_runs:
            path, settings = tmp_path_factory.mktemp("runs") / "run", override(made().settings, text)
            with RunFolder.create(path, "made", settings) as folder:
                job.run(job.prepare(made(), settings, folder, EmbeddedFleet, Quiet()))
            made_runs[text] = path
        return made_runs[text]

    return run


def summary(path: Path) -> str:
    at = Console(file=io.StringIO(), width=200)
    console.summary(results.load(path), path, at)
    return " ".join(at.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.mark.parametrize("unit", ["example", "client"])
def test_reproducible_noise_stamps_report_summary_and_comparison(
    whole_run: Callable[[str], Path], tmp_path: Path, unit: str
) -> None:
    stamp, page = "simulation, no guarantee", tmp_path / "compare.html"
    seeded, real = whole_run(f"privacy.unit={unit} privacy.noise_seed=1"), whole_run(f"privacy.unit={unit}")
    assert results.load(seeded)["privacy"]["why_not"].startswith(stamp)
    assert not results.load(seeded)["privacy"]["guarantee"]
    assert results.load(real)["privacy"]["guarantee"]
    for path, stamped in ((seeded, True), (real, False)):
        assert (stamp in (path / "report.json").read_text()) is stamped
        assert (stamp in (path / "report.html").read_text()) is stamped
        assert (stamp in summary(path)) is stamped
    at = Console(file=io.StringIO(), width=300)
    compare.compare([seeded, real], page, at)
    assert at.file.getvalue().count(stamp) == 1  # type: ignore[attr-defined]
    assert stamp in page.read_text()
