"""privacy.noise=shares through whole rounds, runs and audits: who adds the noise, what is released, who pays."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from clients import upload
from clients.task import Hello, Reply, Task
from clients.training import Node, answer
from privacy import accounting, audit, noise_shares
from privacy.noise_shares import Shares
from privacy.plan import Mechanism, Plan
from privacy.promise import promise
from privacy.refused import Refused
from scenarios import load
from scenarios.seeds import derive
from scenarios.settings import Settings, override
from server import budget, canaries, exposure, gather, guarantee, pairs, probes, rounds, run, select, verify
from server.embedded import EmbeddedFleet
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

from .conftest import SIZES, real_scenario

NAMES = sorted(SIZES)
SHARES = "privacy.unit=client privacy.noise=shares privacy.epsilon=9 privacy.clip=0.3"
CLEAR = f"{SHARES} codec=int12 rounds.number=1 rounds.average=1"
Bend = Callable[[Task, Reply], Reply]


class Heard(NoJournal):
    """A journal and a fleet that remember, with replies passed through `bend`."""

    def __init__(self, fleet: EmbeddedFleet, bend: Bend) -> None:
        self.fleet, self.bend = fleet, bend
        self.tasks: list[Task] = []
        self.replies: list[Reply] = []
        self.rows: list[Row] = []
        self.reserved: list[dict[str, int]] = []

    def hello(self) -> Any:
        return self.fleet.hello()

    def ask(self, tasks: Any) -> Any:
        for task, reply in zip(tasks, self.fleet.ask(tasks), strict=True):
            self.tasks.append(task)
            self.replies.append(self.bend(task, reply))
            yield self.replies[-1]

    def reserve(self, number: int, steps: Any) -> dict[str, str]:
        self.reserved.append(dict(steps))
        return {}

    def commit(self, state: ServerState, row: Row, taken: Any) -> None:
        self.rows.append(row)


def made_node(text: str, folder: Path) -> Node:
    scenario = real_scenario()
    settings = override(scenario.settings, text)
    return Node(scenario, settings, scenario.data(settings), folder)


def federate(folder: Path, text: str, bend: Bend = lambda _, reply: reply) -> tuple[np.ndarray, Heard, ServerState]:
    """(how far the weights moved (P,), what was heard, the last state)."""
    node = made_node(text, folder)
    heard = Heard(EmbeddedFleet(node), bend)
    roster = heard.hello()
    begin = first_state(node.template, node.settings)
    ran = rounds.rounds(
        heard, roster, budget.plans(roster, node.settings), begin, node.settings, heard, lambda _: Score(1.0, 0.5)
    )
    *_, (last, _) = ran
    return last.weights.astype(float) - begin.weights, heard, last


def losing(*names: str) -> Bend:
    return lambda task, reply: Reply(task.round, task.client, reason="gone") if task.client in names else reply


# ---- a round ----


def test_the_round_is_the_sum_of_what_came_over_all_clients_and_the_server_adds_nothing(tmp_path: Path) -> None:
    moved, heard, _ = federate(tmp_path, CLEAR, losing(NAMES[2]))
    settings = made_node(CLEAR, tmp_path).settings
    grid = upload.grid_of(heard.tasks[0], settings)
    assert grid is not None
    assert grid.noise == Shares(heard.tasks[0].shares.multiplier, 3 - 1).variance(grid)
    sent = [upload.decode(r.payload, t, settings) for t, r in zip(heard.tasks, heard.replies, strict=True) if r.payload]
    assert len(sent) == 5
    np.testing.assert_allclose(moved, sum(one.astype(float) for one in sent) / 6, atol=1e-6)


def test_every_client_adds_a_share_of_its_own_and_another_in_every_round(tmp_path: Path) -> None:
    def shares(text: str) -> list[bytes]:
        _, heard, _ = federate(tmp_path, f"{CLEAR} rounds.number=2 local.rate=1e-9 {text}")
        return [reply.payload for reply in heard.replies]

    fresh, seeded = shares(""), shares("privacy.noise_seed=5")
    assert len(set(fresh)) == len(set(seeded)) == 12
    assert not set(fresh) & set(shares(""))
    assert seeded == shares("privacy.noise_seed=5")


@pytest.mark.parametrize("came", [3, 6])
def test_the_noise_of_a_round_is_that_of_the_shares_that_came_both_ways(tmp_path: Path, came: int) -> None:
    text = f"{CLEAR} rounds.number=40 rounds.average=40 local.rate=1e-9 privacy.colluding=0"  # noise alone
    _, heard, _ = federate(tmp_path, text, losing(*NAMES[came:]))
    moves, settings = [], made_node(text, tmp_path).settings
    grid = upload.grid_of(heard.tasks[0], settings)
    assert grid is not None
    for i in range(0, len(heard.replies), 6):
        sent = [(t, r) for t, r in zip(heard.tasks[i : i + 6], heard.replies[i : i + 6], strict=True) if r.payload]
        moves.append(sum(upload.decode(r.payload, t, settings).astype(float) for t, r in sent) / grid.norm)
    found, error = float(np.std(moves)), 5 / math.sqrt(2 * np.size(moves))
    charged = multiplier(heard)
    assert found == pytest.approx(charged * math.sqrt(came / 3), rel=error)
    assert error < 0.06
    assert all(row["applied"] for row in heard.rows)


def multiplier(heard: Heard) -> float:
    assert heard.tasks[0].shares is not None
    assert heard.tasks[0].shares.honest == 3
    return heard.tasks[0].shares.multiplier


@pytest.mark.parametrize(("minimum", "lost", "applied"), [(4, 2, True), (4, 3, False), (6, 1, False)])
def test_too_few_noised_updates_cancel_the_round_and_it_stays_charged(
    tmp_path: Path, minimum: int, lost: int, applied: bool
) -> None:
    moved, heard, state = federate(tmp_path, f"{CLEAR} protect.minimum={minimum}", losing(*NAMES[:lost]))
    assert heard.rows[0]["applied"] is applied
    assert bool(moved.any()) is applied
    said = f"{6 - lost} noised updates came, {minimum} are needed for the noise that was charged"
    assert heard.rows[0]["reason"] == (None if applied else said)
    assert heard.reserved == [dict.fromkeys(NAMES, 1)]
    assert {name: spent.steps for name, spent in state.clients.items()} == dict.fromkeys(NAMES, 1)


def test_the_clip_bit_that_no_noise_covers_says_nothing(tmp_path: Path) -> None:
    for clip in (1e-6, 1e6):
        _, heard, _ = federate(tmp_path, f"{CLEAR} privacy.clip={clip}")
        settings = made_node(f"{CLEAR} privacy.clip={clip}", tmp_path).settings
        grid = upload.grid_of(heard.tasks[0], settings)
        assert grid is not None
        assert {int(upload.unpack(reply.payload, 1.0, grid)[-1]) for reply in heard.replies} == {1}
        assert all(reply.within for reply in heard.replies)


@pytest.mark.parametrize("way", ["masked", "encrypted", "encrypted protect.trust=shared"])
@pytest.mark.parametrize("faults", ["", "faults.dropout=0.2 run.seed=2"])
def test_a_protected_run_is_the_run_in_the_clear_to_the_bit_where_noise_is_seeded(
    run_real: Callable[..., Any], tmp_path: Path, way: str, faults: str
) -> None:
    text = f"{SHARES} privacy.noise_seed=3 rounds.number=2 {faults}"
    weights = []
    for name, sent in (("clear", "codec=int16"), ("hidden", f"protect={way} protect.bits=16")):
        run_real(tmp_path / name, f"{text} {sent}")
        rows = [json.loads(line) for line in (tmp_path / name / "rounds.jsonl").read_text().splitlines()]
        assert [(row["applied"], row["replies"]) for row in rows] == [(True, 5 if faults else 6)] * 2
        weights.append(load_file(tmp_path / name / "weights.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


# ---- what a node insists on ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda task: replace(task, shares=None), "without the noise share"),
        (lambda task: replace(task, shares=Shares(task.shares.multiplier / 2, 2)), "smaller noise share"),
        (lambda task: replace(task, update_clip=3.0), "without the clipping norm"),
    ],
)
def test_a_node_refuses_a_task_of_less_noise(tmp_path: Path, change: Callable[[Task], Task], said: str) -> None:
    _, heard, _ = federate(tmp_path, CLEAR)
    node = made_node(CLEAR, tmp_path)
    assert not answer(node, heard.tasks[0]).reason
    assert said in answer(node, change(heard.tasks[0])).reason


# ---- what is refused before anyone is asked ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("privacy.unit=example privacy.noise=shares", "for privacy.unit=client, not example"),
        ("privacy.unit=both privacy.noise=shares", "for privacy.unit=client, not both"),
        ("privacy.unit=client privacy.noise=shares", "set protect=masked or encrypted, or codec=int16"),
        (f"{CLEAR} rounds.fraction=0.5", "set rounds.fraction=1"),
        (f"{CLEAR} privacy.bands=2", "set privacy.bands=1"),
        (f"{CLEAR} privacy.adapt=true", "privacy.adapt=false"),
    ],
)
def test_pairs_that_noise_in_shares_makes_no_sense_of_are_refused(text: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        pairs.check(override(Settings(), text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("protect.minimum=7", "protect.minimum=7 is more than the 6 clients a round asks: the nearest is 6"),
        ("privacy.colluding=3", "leaves no honest client of the 3 .*: the nearest is 2"),
    ],
)
def test_too_many_survivors_or_colluders_are_refused_with_the_nearest(text: str, said: str) -> None:
    roster = {name: Hello(name, 10, "") for name in NAMES}
    run.enough(roster, override(Settings(), CLEAR))
    with pytest.raises(Refused, match=said):
        run.enough(roster, override(Settings(), f"{CLEAR} {text}"))


def test_the_honest_are_the_fewest_survivors_less_those_who_may_collude() -> None:
    assert select.honest(20, override(Settings(), SHARES)) == 9
    assert select.honest(20, override(Settings(), f"{SHARES} protect.minimum=16 privacy.colluding=4")) == 12
    plans = budget.plans({name: Hello(name, 10, "") for name in NAMES}, override(Settings(), CLEAR))
    made = gather.shares(override(Settings(), CLEAR), plans)
    assert made == Shares(plans[NAMES[0]].mechanism.noise_multiplier, 2)


def test_the_plan_is_that_of_the_servers_noise_but_for_the_chance() -> None:
    roster = {name: Hello(name, 10, "") for name in NAMES}
    here = budget.plans(roster, override(Settings(), CLEAR))[NAMES[0]]
    there = budget.plans(roster, override(Settings(), f"{CLEAR} privacy.noise=server"))[NAMES[0]]
    assert here.mechanism.noise_multiplier == pytest.approx(there.mechanism.noise_multiplier, rel=1e-6)
    assert (here.steps, here.delta + here.chance) == (there.steps, pytest.approx(there.delta))


# ---- the report ----


@pytest.mark.parametrize(("kind", "server"), [("shares", True), ("encrypted-shares", True), ("trusted-shares", False)])
def test_the_epsilon_holds_against_the_server_where_it_reads_sums_alone(
    real_run: Callable[[str], Path], kind: str, server: bool
) -> None:
    report = json.loads((real_run(kind) / "report.json").read_text())
    found = report["statement"]["epsilon"]["adversaries"]
    assert found["report_reader"] == found["other_client"] == report["privacy"]["worst_epsilon"]
    assert found["server"] == (report["privacy"]["worst_epsilon"] if server else None)
    assert "at least 2 of the clients in every sum are honest" in report["privacy"]["against"]
    assert ("not the server" in report["privacy"]["against"]) is not server
    for who in ("report_reader", "other_client", "server"):
        on_condition = "as long as at least 2 of the clients in every sum are honest" in found[f"{who}_reason"]
        assert on_condition == (found[who] is not None)
    parties = {party["party"]: party["before_noise"] for party in report["statement"]["trust"]["parties"]}
    assert parties["server"] is not server
    assert not parties["key holder"]
    assert not verify.check(real_run(kind)).wrong
    assert report["statement"]["delta"]["chance"] == noise_shares.CHANCE
    hazards = {one["hazard"]: one["state"] for one in report["statement"]["interpretation"]["hazards"]}
    assert hazards["attacks on floating-point noise"] == "pass"


def test_who_must_not_collude_for_the_epsilon_to_hold_is_said_by_the_way_updates_are_hidden(
    real_run: Callable[[str], Path],
) -> None:
    report = json.loads((real_run("encrypted-shares") / "report.json").read_text())
    said = {}
    for mode, trust in (("masked", None), ("encrypted", "split"), ("encrypted", "shared")):
        travelled = {**report, "protect": {**report["protect"], "mode": mode, "trust": trust}}
        found = guarantee.adversaries(travelled)
        said[trust or mode] = (found["other_client_reason"], found["server_reason"])
    assert {other.partition("are honest")[2] for other, _ in (said["masked"], said["split"])} == {""}
    assert "it is not given what they send" in said["shared"][0]
    assert "no more clients collude with the server than masks bear" in said["masked"][1]
    assert "the key holder and the server do not collude" in said["split"][1]
    assert "neither a client nor the key holder, who all have the secret key" in said["shared"][1]


@pytest.mark.parametrize(
    ("way", "whom", "uncovered"),
    [
        ("codec=int16", "the server", "the server: it sees the update of each client with that client's own share"),
        ("protect=masked", "more colluding clients than that together with the server", "who took part"),
        ("protect=encrypted", "the server and the key holder together", "the server together with the key holder"),
        (
            "protect=encrypted protect.trust=shared",
            "any single client, or the key holder, together with the server",
            "together with any one",
        ),
    ],
)
def test_against_whom_a_share_alone_is_too_little_noise_is_said(way: str, whom: str, uncovered: str) -> None:
    settings = override(Settings(), f"{SHARES} {way}")
    text = " ".join(exposure.who_learns(settings, 1000, 20, "deployment"))
    assert "if at least 9 of its clients are honest" in text
    assert f"no epsilon holds against {whom}" in text
    assert "before the noise" not in text
    assert "clipped and without noise" not in text
    made = promise("client", honest=9, mode=settings.protect.mode, trust=settings.protect.trust)
    assert uncovered in made.not_covered[0]
    assert made.against is not None
    assert "at least 9 of the clients in every sum are honest" in made.against


# ---- the audit ----

DELTA = 1e-5


def audited(states: Path, noise: float, seed: int, codec: str = "int16") -> tuple[audit.Verdict, float]:
    """(what 1000 canaries say, the epsilon claimed) of five rounds of a noise multiplier."""
    scenario = load("digits")
    text = f"privacy.unit=client privacy.noise=shares codec={codec} rounds.number=5 export.recover_rounds=0"
    settings = override(scenario.settings, f"{text} privacy.noise_seed={seed}")
    names = [f"client-{i:02}" for i in range(20)]
    claimed = accounting.epsilon({Mechanism(1.0, noise): 5}, DELTA)
    plan = Plan(Mechanism(1.0, noise), settings.privacy.clip, claimed, DELTA, 5)
    setup = canaries.Setup(scenario, settings, dict.fromkeys(names, 50), dict.fromkeys(names, plan), None, states, seed)
    included = np.random.default_rng(derive(seed, "coins")).random(1000) < 0.5
    found = probes.PROBES["client"]["client"](setup, names[0], included, lambda: None)
    return audit.verdict(found.scores, included, claimed, DELTA), claimed


@pytest.mark.parametrize(("noise", "codec"), [(1.0, "int16"), (2.0, "int4")])
def test_correct_shares_pass_the_audit_with_an_estimate_near_the_claim(
    tmp_path: Path, noise: float, codec: str
) -> None:
    said, claimed = audited(tmp_path, noise, 1, codec)
    assert said.passed
    assert said.lower_bound <= claimed
    assert said.estimate == pytest.approx(claimed, rel=0.25)


def halved(patch: pytest.MonkeyPatch) -> None:
    right = noise_shares.share
    patch.setattr(noise_shares, "share", lambda variance, size, random: right(variance, size, random) // 2)


def forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(noise_shares, "share", lambda variance, size, random: np.zeros(size, np.int64))


def spread_over_too_many(patch: pytest.MonkeyPatch) -> None:
    right = Shares.variance
    patch.setattr(Shares, "variance", lambda self, grid: right(replace(self, honest=4 * self.honest), grid))


@pytest.mark.parametrize("bug", [halved, forgotten, spread_over_too_many])
def test_a_bug_in_the_shares_fails_the_claim(
    bug: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    said, claimed = audited(tmp_path, 1.0, 5)
    assert not said.passed, said
    assert said.estimate > 1.5 * claimed or said.lower_bound > claimed
