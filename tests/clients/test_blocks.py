"""The messages of blocks: what goes in comes out, once what clients have alike."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from clients import blocks, cohort, messages
from clients.task import Charge, Protection, Reply, Summand, Task
from privacy.chain import Head
from privacy.noise_shares import Shares
from privacy.plan import Mechanism
from scenarios.settings import Settings, override

LAYOUT = (("a.weight", (2, 3)), ("a.bias", (2,)))
WEIGHTS = np.arange(8, dtype=np.float32)
SETTINGS = Settings()


def task(name: str, **more: Any) -> Task:
    return Task("train", 4, name, WEIGHTS, LAYOUT, 0.1, 3, **more)


TASKS = [
    [task("a"), task("b", state_round=2)],
    [task("c", mechanism=Mechanism(0.5, 1.5), clip=1.0, charge=Charge("run", 2, Head(3, "5e" * 32), None))],
]


def same(one: Task, other: Task) -> bool:
    """Whether all fields are equal."""
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Task)]
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def sent(given: list[list[Task]]) -> RecordDict:
    return blocks.encode_tasks(given, messages.encode_arrays(given[0][0]))


@pytest.mark.parametrize(
    "given",
    [
        TASKS,
        [[task("a", control=WEIGHTS + 1, coordinates=np.array([1, 5], np.uint32))]],
        [[task("a", update_clip=0.5, shares=Shares(2.0, 3)), task("b", update_clip=0.5, shares=Shares(2.0, 3))]],
        [[task(name, protection=Protection("run", 10, 3, name.encode() * 5)) for name in ("a", "bc")], [task("d")]],
    ],
)
def test_tasks_come_out_as_they_went_in(given: list[list[Task]]) -> None:
    found = blocks.decode_tasks(sent(given))
    assert [len(block) for block in found] == [len(block) for block in given]
    pairs = [pair for came, went in zip(found, given, strict=True) for pair in zip(came, went, strict=True)]
    assert all(same(came, went) for came, went in pairs)


def test_weights_and_what_clients_have_alike_are_sent_once() -> None:
    record = sent([[task(f"{i:03}", state_round=i) for i in range(100)]])
    columns = {name for name, value in record["umbel.0"].items() if type(value) is list}
    assert columns == {"client", "state_round", "names", "ranks", "dims"}
    assert sum(len(array.data) for array in record["arrays"].values()) == WEIGHTS.nbytes


def test_replies_come_out_as_they_went_in_and_are_weighed_by_the_server() -> None:
    single = [
        [Reply(4, "a", b"abc", 5, 3), Reply(4, "b", b"", 6, 3, within=False)],
        [Reply(4, "c", reason="no")],
    ]
    record = blocks.encode_replies(single, ["worker 1 died"])
    assert blocks.decode_said(record) == ["worker 1 died"]
    assert [blocks.decode_replies(record, i, TASKS[i], None, SETTINGS) for i in range(2)] == single
    total = np.arange(8.0)
    forged = [Reply(4, "a", b"", 5, 3, summand=Summand(1, 99.0)), Reply(4, "b", b"", 6, 3)]
    forged[1] = replace(forged[1], summand=Summand(1, 99.0, total, 198.0))
    found = blocks.decode_replies(blocks.encode_replies([forged], []), 0, TASKS[0], cohort.weigh(SETTINGS), SETTINGS)
    one, two = (reply.summand for reply in found)
    assert one == Summand(32, 5.0)
    assert two is not None
    assert (two.bytes, two.weight, two.whole) == (32, 6.0, 11.0)
    assert two.total is not None
    assert two.total.tolist() == total.tolist()


def test_a_sum_that_nobody_asked_for_is_refused() -> None:
    summed = Summand(32, 5.0, np.zeros(8), 5.0)
    record = blocks.encode_replies([[Reply(4, "a", b"", 5, 3, summand=summed), Reply(4, "b", b"x", 6, 3)]], [])
    median = override(SETTINGS, "server.combine=median")
    with pytest.raises(ValueError, match="a sum where single answers were asked for"):
        blocks.decode_replies(record, 0, TASKS[0], cohort.weigh(median), median)


def test_a_worker_that_does_not_work_says_why_in_printable_words() -> None:
    with pytest.raises(ValueError, match="no \\?data"):
        blocks.decode_said(blocks.encode_refusal("no \x1bdata"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"client": "a"}, "names no client"),
        ({"client": []}, "names no client"),
        ({"steps": [1]}, "steps has 1 entries, there are 2 clients"),
        ({"steps": [1, -1]}, "steps is out of range"),
        ({"steps": [1.0, 1.0]}, "steps is a float, not a int"),
        ({"rate": [0.1, float("nan")]}, "rate is nan"),
        ({"kind": ["train", "evaluate"]}, "several kinds, rounds or layouts"),
        ({"round": [4, 5]}, "several kinds, rounds or layouts"),
        ({"client": ["a", "\x1b"]}, "is no name"),
        ({"bytes": 2**53}, "0 bytes for pieces of"),
        ({"more": 1}, "other fields than expected"),
    ],
)
def test_a_garbled_message_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    record = sent(TASKS)
    record["umbel.0"] = ConfigRecord(dict(record["umbel.0"]) | change)
    with pytest.raises(ValueError, match=reason):
        blocks.decode_tasks(record)


@pytest.mark.parametrize("name", ["more", "umbel", "umbel.3", "request.5"])
def test_a_message_of_other_records_is_refused(name: str) -> None:
    record = sent(TASKS)
    record[name] = record["umbel.0"]
    with pytest.raises(ValueError, match="other records than expected"):
        blocks.decode_tasks(record)


@pytest.mark.parametrize(
    ("late", "entry", "reason"),
    [(True, 1.0, "that is in the sum and is not"), (False, 1e300, "larger than updates are")],
)
def test_a_sum_that_would_end_the_round_costs_its_block_alone(late: bool, entry: float, reason: str) -> None:
    summed = Summand(32, 11.0, np.full(8, entry), 11.0)
    said = [
        Reply(4, "a", b"", 5, 3, late=late, summand=replace(summed, total=None)),
        Reply(4, "b", b"", 6, 3, summand=summed),
    ]
    record = blocks.encode_replies([said], [])
    with pytest.raises(ValueError, match=reason):
        blocks.decode_replies(record, 0, TASKS[0], cohort.weigh(SETTINGS), SETTINGS)
