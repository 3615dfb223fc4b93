"""local.engine=cohort in a federation: what single clients come to, whatever sums, processes or deaths lie between."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clients import cohort
from clients import workers as workers_of
from clients.task import Reply, Summand, Task
from clients.training import Node
from clients.workers import Room, Workers
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from scenarios.weights import Vector
from server import budget, combine, engine, pairs
from server.canaries import Unrecorded
from server.embedded import EmbeddedFleet
from server.rounds import rounds
from server.state import Row, Score, ServerState, first_state

SIZES = {f"{i:02}": 10 + 3 * i for i in range(9)}
BASE = "rounds.number=4 local.batch=8 local.rate=0.2 run.processes=1"
TEST = os.getpid()


def examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 30), 12, generator=generator)
    return Examples(x, (x[:, 0] + x[:, 1] > 0).long())


def net() -> nn.Module:
    """So wide that passes are shared by five of the nine clients, and the larger ones train one after another."""
    return nn.Sequential(nn.Linear(12, 60), nn.ReLU(), nn.Linear(60, 2))


def made_node(folder: Path, text: str, data: Callable[[str], Examples] = examples) -> Node:
    settings = override(Settings(), f"{BASE} {text}")
    federation = Federation(SIZES, data, examples("validation"), examples("test"))
    scenario = Scenario("made", Settings(), {"net": net}, lambda _: federation, name="made")
    return Node(scenario, settings, federation, folder)


def federate(
    folder: Path, text: str, state: ServerState | None = None, data: Callable[[str], Examples] = examples
) -> tuple[ServerState, list[Row]]:
    node = made_node(folder, text, data)
    fleet = EmbeddedFleet(node)
    plans = budget.plans(fleet.hello(), node.settings)
    state = state or first_state(node.template, node.settings)
    score = Score(1.0, 0.5)
    steps = list(rounds(fleet, fleet.hello(), plans, state, node.settings, Unrecorded(), lambda _: score))
    return steps[-1][0], [row for _, row in steps]


def close(one: Vector, other: Vector, most: float = 1e-5) -> bool:
    """most: what an entry may be off, where what follows is continuous in the updates."""
    off = np.abs(one - other) / np.abs(other).max()
    return bool(np.median(off) <= 1e-5 and off.max() <= most)


WAYS = {
    "mean": "",
    "uniform": "server.weighting=uniform",
    "part of the fleet": "rounds.fraction=0.5",
    "adam": "server.step=adam server.rate=0.01",
    "proximal": "local.proximal=0.3",
    "momentum": "local.momentum=0.9 local.rate=0.02",
    "momentum and nova": "local.momentum=0.9 local.rate=0.02 server.normalize=true fleet.profile=edge fleet.deadline=5",
    "momentum under dp": "local.momentum=0.9 local.rate=0.02 privacy.unit=example privacy.noise_seed=2",
    "median": "server.combine=median",
    "krum": "server.combine=krum",
    "nova": "server.normalize=true",
    "scaffold": "local.scaffold=true",
    "float16": "codec=float16",
    "top-k": "codec=topk:0.2",
    "shared coordinates": "codec=shared-topk:0.3",
    "integers": "codec=int16",
    "dropouts": "faults.dropout=0.3",
    "deadline": "fleet.profile=edge fleet.deadline=5",
    "example": "privacy.unit=example privacy.noise_seed=2",
    "client": "privacy.unit=client privacy.noise_seed=2 privacy.epsilon=50",
    "secret draw": "privacy.unit=client privacy.noise_seed=2 rounds.fraction=0.6 rounds.minimum=0 privacy.epsilon=50",
    "adaptive": "privacy.unit=client privacy.noise_seed=2 privacy.adapt=true privacy.epsilon=50",
    "by turns": "privacy.unit=client privacy.noise_seed=2 privacy.bands=2 privacy.epsilon=50",
    "both": "privacy.unit=both privacy.noise_seed=2 privacy.epsilon=50",
    "local": "privacy.unit=local privacy.noise_seed=2 privacy.epsilon=500",
}


@pytest.mark.parametrize("way", WAYS)
def test_blocks_come_to_what_single_clients_come_to(tmp_path: Path, way: str) -> None:
    truth, told = federate(tmp_path / "single", WAYS[way])
    found, rows = federate(tmp_path / "cohort", f"{WAYS[way]} local.engine=cohort local.block=4")
    jumps = {"top-k": 0.1, "shared coordinates": 0.1, "integers": 1e-4}  # an entry is sent or not, goes up or down
    assert close(found.weights, truth.weights, jumps.get(way, 1e-5))
    assert found.clients == truth.clients
    same = (
        "cohort",
        "replies",
        "rejected",
        "late",
        "skipped",
        "applied",
        "reason",
        "bytes_up",
        "bytes_down",
        "epsilon",
    )
    assert [[row[key] for key in same] for row in rows] == [[row[key] for key in same] for row in told]
    assert rows[-1]["applied"]


@pytest.mark.parametrize("way", ["mean", "momentum", "example", "client", "top-k"])
def test_one_process_or_two_give_the_same_bits(tmp_path: Path, way: str) -> None:
    text = f"{WAYS[way]} local.engine=cohort local.block=2"
    one, _ = federate(tmp_path / "one", text)
    two, _ = federate(tmp_path / "two", f"{text} run.processes=2")
    assert np.array_equal(one.weights, two.weights)


@pytest.mark.parametrize("engine", ["single", "cohort"])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_run_in_two_parts_gives_the_same_bits(tmp_path: Path, engine: str, momentum: float) -> None:
    text = f"local.engine={engine} rounds.fraction=0.7 local.momentum={momentum}"
    whole, _ = federate(tmp_path / "whole", text)
    node = made_node(tmp_path, text)
    first = replace(first_state(node.template, node.settings), until=2)
    half, _ = federate(tmp_path / "parts", text, first)
    rest, _ = federate(tmp_path / "parts", text, replace(half, until=4))
    assert np.array_equal(rest.weights, whole.weights)


def once(path: Path) -> bool:
    """Whether this is the first call with `path`, in any process."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def test_a_worker_that_dies_is_named_and_its_block_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def data(name: str) -> Examples:
        if name == "05" and os.getpid() != TEST and once(tmp_path / "died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return examples(name)

    text = "local.engine=cohort local.block=2 run.processes=2"
    found, rows = federate(tmp_path / "dies", text, data=data)
    assert (tmp_path / "died").exists()
    assert "died in its block, which is trained again" in capsys.readouterr().err
    assert np.array_equal(found.weights, federate(tmp_path / "lives", text)[0].weights)
    assert all(row["replies"] == len(SIZES) for row in rows)


def fatal(name: str) -> Examples:
    """Of client 05, no data but the end of any process that asks for them, this one apart."""
    if name == "05" and os.getpid() != TEST:
        os.kill(os.getpid(), signal.SIGKILL)
    return examples(name)


def unreadable(name: str) -> Examples:
    if name == "05" and os.getpid() != TEST:
        raise OSError
    return examples(name)


@pytest.mark.parametrize("way", ["mean", "client", "adaptive", "top-k", "median", "integers"])
def test_a_client_that_ends_every_worker_leaves_the_others_of_its_block_in_the_round(tmp_path: Path, way: str) -> None:
    text = f"local.engine=cohort local.block=4 run.processes=2 rounds.number=2 {WAYS[way]}"
    found, rows = federate(tmp_path / "dies", text, data=fatal)
    left = {"name": "05", "reason": "its worker died 3 times, then with it alone"}
    assert [(row["rejected"], row["replies"], row["applied"]) for row in rows] == [([left], 8, True)] * 2
    truth, _ = federate(tmp_path / "fails", text, data=unreadable)
    assert close(found.weights, truth.weights, {"top-k": 0.1, "integers": 1e-4}.get(way, 1e-5))


def test_lines_on_deaths_name_no_client(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    federate(tmp_path, "local.engine=cohort local.block=4 run.processes=2 rounds.number=1", data=fatal)
    said = [line for line in capsys.readouterr().err.splitlines() if "died" in line]
    assert [line.partition(" died ")[2] for line in said] == [
        "in its block, which is trained again",
        "in its block, which is trained again",
        "in its block, whose clients are trained one by one",
        "with one client alone, which is left out of the round",
    ]


def tasks(count: int, value: float, length: int = 3) -> list[Task]:
    weights = np.full(length, value, np.float32)
    return [Task("train", 1, f"{i:02}", weights, ()) for i in range(count)]


def told(given: Sequence[Task], _: Room | None) -> list[Reply]:
    return [Reply(task.round, task.client, task.weights.tobytes() + os.urandom(8)) for task in given]


def test_workers_see_each_rounds_weights_and_draw_apart() -> None:
    workers = Workers(told, 2, print)
    drawn = set()
    for value in (1.0, 2.0):
        replies = [reply for block in workers.map(cohort.cut(tasks(6, value), 2)) for reply in block]
        assert [reply.client for reply in replies] == [f"{i:02}" for i in range(6)]
        assert {reply.payload[:12] for reply in replies} == {np.full(3, value, np.float32).tobytes()}
        drawn |= {reply.payload[12:] for reply in replies}
    assert len(drawn) == 12
    workers.close()


def summing(given: Sequence[Task], room: Room | None) -> list[Reply]:
    """The sum of each block is the number of its first client; the first block is the last to be done."""
    assert room is not None, "a block is sent by itself"
    room[:] = float(given[0].client)
    time.sleep(0.3 * (given[0].client == "00"))
    *others, last = (Reply(task.round, task.client, summand=Summand(0, 1.0)) for task in given)
    assert last.summand is not None
    return [*others, replace(last, summand=replace(last.summand, total=room, whole=float(len(given))))]


def test_the_sums_of_blocks_that_are_done_early_stand_until_they_are_read() -> None:
    workers = Workers(summing, 2, print)
    totals = [
        reply.summand.total.copy()
        for block in workers.map(cohort.cut(tasks(8, 1.0), 2))
        for reply in block
        if reply.summand is not None and reply.summand.total is not None
    ]
    workers.close()
    assert [total.tolist() for total in totals] == [[number] * 3 for number in (0.0, 2.0, 4.0, 6.0)]


def test_a_round_that_is_left_halfway_leaves_nothing_to_the_next() -> None:
    workers = Workers(told, 2, print)
    next(workers.map(cohort.cut(tasks(8, 1.0), 2)))
    replies = [reply for block in workers.map(cohort.cut(tasks(4, 2.0), 2)) for reply in block]
    assert {reply.payload[:12] for reply in replies} == {np.full(3, 2.0, np.float32).tobytes()}
    workers.close()


@pytest.mark.parametrize(("weights", "sent"), [(3, [6, 3, 1, 1, 1]), (1 << 17, [1] * 12)])
def test_small_blocks_share_a_message_and_large_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, weights: int, sent: list[int]
) -> None:
    given, messages, start = tasks(12, 1.0, weights), list[int](), workers_of._Worker.start

    def started(worker: workers_of._Worker, numbers: list[int], blocks: Sequence[Sequence[Task]]) -> None:
        messages.append(len(blocks))
        start(worker, numbers, blocks)

    monkeypatch.setattr(workers_of._Worker, "start", started)
    workers = Workers(told, 1, print)
    replies = [reply for block in workers.map(cohort.cut(given, 1)) for reply in block]
    workers.close()
    assert messages == sent
    assert [reply.client for reply in replies] == [task.client for task in given]


def test_a_block_that_kills_every_worker_takes_none_of_its_message_along() -> None:
    workers, said = Workers(deadly, 2, lambda line: said.append(line)), list[str]()
    replies = [reply for block in workers.map(cohort.cut(tasks(16, 1.0), 1)) for reply in block]
    workers.close()
    assert [reply.client for reply in replies if reply.reason] == ["01"]
    died = [line.partition(" died ")[2] for line in said]
    assert died == [
        "in its blocks, which are trained again",
        "in its block, which is trained again",
        "in its block, whose clients are trained one by one",
        "with one client alone, which is left out of the round",
    ]


def deadly(given: Sequence[Task], room: Room | None) -> list[Reply]:
    if given[0].client == "01":
        os.kill(os.getpid(), signal.SIGKILL)
    return told(given, room)


def noised(node: Node, given: Sequence[Task], _: Room | None) -> list[Reply]:
    return cohort.answer(node, given)


def test_no_two_workers_draw_the_same_noise(tmp_path: Path) -> None:
    node = made_node(tmp_path, "privacy.unit=example local.engine=cohort", lambda name: examples("00"))
    fleet = EmbeddedFleet(node)
    plans = budget.plans(fleet.hello(), node.settings)
    first = first_state(node.template, node.settings)
    given = [
        Task(
            "train",
            1,
            name,
            first.weights,
            first.layout,
            0.1,
            2,
            mechanism=plans[name].mechanism,
            clip=plans[name].clip,
        )
        for name in SIZES
    ]
    torch.rand(1)  # a generator that forked processes would repeat
    workers = Workers(partial(noised, node), 2, print)
    payloads = [reply.payload for block in workers.map(cohort.cut(given, 1)) for reply in block]
    workers.close()
    assert len(set(payloads)) == len(SIZES)


def test_a_sum_that_holds_other_clients_than_those_accepted_is_not_applied() -> None:
    parts = [combine.Part(1.0, True, None, 0.0), combine.Part(2.0, True, np.ones(3), 3.0)]
    assert combine.of_parts(parts, 3).weight == 3.0
    short = combine.of_parts(parts[1:], 3)
    assert short.reason is not None
    assert not short.total.any()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("local.precision=bf16", "local.precision=bf16 is for local.engine=cohort"),
        ("local.block=5", "local.block=5 is for local.engine=cohort"),
        ("local.fallback=none", "local.fallback=none is for local.engine=cohort"),
    ],
)
def test_a_setting_of_blocks_without_blocks_is_refused(text: str, line: str) -> None:
    with pytest.raises(Refused, match=line):
        pairs.check(override(Settings(), text))


def test_bf16_is_refused_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(Refused, match="this one has float32 alone"):
        pairs.check(override(Settings(), "local.engine=cohort local.precision=bf16"))


def test_a_row_says_how_its_round_was_trained(tmp_path: Path) -> None:
    _, rows = federate(tmp_path, "local.engine=cohort local.block=4")
    how = {"name": "cohort", "block": 4, "precision": "float32", "device": "cpu", "threads": 1, "processes": 1}
    assert rows[0]["engine"] == how | {"trained": [entry("gram", "", 5), entry("fused", MANY, 4)]}
    _, rows = federate(tmp_path, "")
    assert (rows[0]["engine"]["name"], rows[0]["engine"]["trained"]) == ("single", [])


MANY = "more than 25 examples x epochs a round"
"""Why the larger clients share no pass: so many rows cost more by Gram matrices than by weights of so small a model."""


def entry(way: str, why: str, count: int, precision: str = "float32", of: str = "clients") -> dict[str, object]:
    return {"way": way, "why": why, "precision": precision, of: count}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("fleet.clock=wall fleet.deadline=60", [entry("single", "a deadline on the wall clock", 9)]),
        ("privacy.unit=example", [entry("rows", "", 9)]),
        ("codec=int16 local.steps=3", [entry("gram", "", 9)]),
        (WAYS["secret draw"], []),
    ],
)
def test_a_row_counts_how_clients_were_trained_and_why_but_not_those_of_a_secret_draw(
    tmp_path: Path, text: str, trained: list[dict[str, object]], processes: int
) -> None:
    _, rows = federate(tmp_path, f"local.engine=cohort run.processes={processes} {text}")
    assert [row["engine"]["trained"] for row in rows] == [trained] * 4
    assert [one["times"] for one in engine.summed(rows)] == [36 for _ in trained]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", f"cohort: 4 of 9 clients are trained one after another through one model: {MANY}"),
        ("local.batch=0", "cohort: 3 of 9 clients are trained one after another"),
        ("fleet.clock=wall fleet.deadline=60", "cohort: 9 of 9 clients are trained one by one: a deadline on the wall"),
        ("local.precision=bf16", f"through one model: {MANY}; bf16 for 4 of 9, float32 for the others"),
    ],
)
def test_who_shares_no_pass_is_said_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    node = made_node(tmp_path, f"local.engine=cohort {text}")
    assert line in engine.said(node, EmbeddedFleet(node).hello())


@pytest.mark.parametrize("text", ["", "local.engine=cohort local.steps=1", "local.engine=cohort privacy.unit=example"])
def test_nothing_is_said_where_all_share_passes_or_nobody_was_to(tmp_path: Path, text: str) -> None:
    node = made_node(tmp_path, text)
    assert engine.said(node, EmbeddedFleet(node).hello()) == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("local.fallback=none", "4 of 9 clients can only be trained one after another through one model"),
        ("local.fallback=none fleet.clock=wall fleet.deadline=60", "set local.fallback=single"),
        ("local.fallback=fused fleet.clock=wall fleet.deadline=60", "9 of 9 clients can only be trained one by one"),
        ("local.precision=bf16 privacy.unit=example", r"those of this run train otherwise \(rows\)"),
        ("local.precision=bf16 local.steps=1", r"\(gram\): set local.precision=float32"),
    ],
)
def test_a_demand_that_clients_cannot_meet_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    node = made_node(tmp_path, f"local.engine=cohort {text}")
    with pytest.raises(Refused, match=line) as caught:
        engine.check(node, EmbeddedFleet(node).hello())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "local.fallback=none local.steps=1",
        "local.fallback=none privacy.unit=example",
        "local.fallback=fused",
        "fleet.clock=wall fleet.deadline=60",
        "local.precision=bf16",
    ],
)
def test_a_demand_that_clients_meet_is_no_obstacle(tmp_path: Path, text: str) -> None:
    node = made_node(tmp_path, f"local.engine=cohort {text}")
    engine.check(node, EmbeddedFleet(node).hello())


def test_a_device_is_told_of_as_a_block_of_its_own(tmp_path: Path) -> None:
    wanted = made_node(tmp_path, "local.engine=cohort run.processes=4").settings
    alone = {
        "name": "cohort",
        "block": 1,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        "processes": 1,
        "trained": [],
    }
    assert cohort.told(wanted, 9, alone=True) == alone
    assert cohort.told(wanted, 9) == alone | {"block": 5, "processes": 4}


def test_a_row_of_a_secret_draw_does_not_say_how_many_were_drawn(tmp_path: Path) -> None:
    _, rows = federate(tmp_path, f"{WAYS['secret draw']} local.engine=cohort rounds.number=6")
    assert {row["engine"]["block"] for row in rows} == {3}


@pytest.mark.parametrize("way", ["mean", "example"])
def test_a_round_from_any_checkpoint_of_a_run_comes_to_the_same_weights(tmp_path: Path, way: str) -> None:
    single, text = made_node(tmp_path, f"{WAYS[way]} rounds.number=10"), f"{WAYS[way]} rounds.number=10"
    fleet = EmbeddedFleet(single)
    plans = budget.plans(fleet.hello(), single.settings)
    states = [first_state(single.template, single.settings)]
    told = states[0], single.settings, Unrecorded(), lambda _: Score(1.0, 0.5)
    states += [state for state, _ in rounds(fleet, fleet.hello(), plans, *told)]
    off = []
    for before, after in pairwise(states):
        found, _ = federate(tmp_path, f"{text} local.engine=cohort", replace(before, until=after.round))
        off.append(np.abs(found.weights - after.weights).max() / np.abs(after.weights).max())
    assert len(off) == 10
    assert np.median(off) <= 1e-5
    assert max(off) <= 1e-2
