"""What travels for blocks of clients, changed in any way, is refused or says what an honest sender may say."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from clients import blocks, cohort, messages
from clients.task import Reply, Summand, Task
from privacy.plan import Mechanism
from scenarios.settings import Settings, override

SIZES = {f"site-{i:02}": 10 + i for i in range(6)}
SUMMED, SINGLE = override(Settings(), ""), override(Settings(), "server.combine=median")


def tasks() -> list[list[Task]]:
    weights = np.arange(12, dtype=np.float32)
    made = [
        Task("train", 3, name, weights, (("w", (3, 4)),), 0.1, 2 + i, mechanism=Mechanism(0.5, 1.0 + i), clip=1.0)
        for i, name in enumerate(SIZES)
    ]
    return [made[:2], made[2:5], made[5:]]


def answered(given: list[list[Task]], summed: bool) -> RecordDict:
    """What an honest worker says: sums of ones, or four payloads of bytes; one client has dropped out."""
    made = []
    for block in given:
        replies = [Reply(3, task.client, b"" if summed else b"abcd", SIZES[task.client], task.steps) for task in block]
        if summed:
            whole = float(sum(SIZES[task.client] for task in block))
            replies = [replace(reply, summand=Summand(48, float(reply.examples))) for reply in replies]
            last = Summand(48, float(replies[-1].examples), np.full(12, whole), whole)
            replies[-1] = replace(replies[-1], summand=last)
        if len(block) == 3:
            replies[0] = Reply(3, block[0].client, reason="dropped out")
        made.append(replies)
    return blocks.encode_replies(made, [])


@pytest.mark.parametrize("summed", [True, False])
def test_a_changed_answer_is_refused_block_by_block_or_says_what_an_honest_one_may(tools: Any, summed: bool) -> None:
    given, settings = tasks(), SUMMED if summed else SINGLE
    weigh, draw = cohort.weigh(settings), random.Random(summed)
    data = tools.serialized(answered(given, summed))
    truth = [blocks.decode_replies(tools.parsed(data), i, block, weigh, settings) for i, block in enumerate(given)]
    refused = spared = 0
    for _ in range(tools.due["blocks"]):
        try:
            record = tools.parsed(tools.bent(data, draw))
        except Exception:  # Flower's: the message never comes to us
            continue
        came = list[Any]()
        for i, block in enumerate(given):
            try:
                came.append(blocks.decode_replies(record, i, block, weigh, settings))
            except ValueError:
                came.append(None)
        refused += came.count(None) > 0
        spared += 0 < came.count(None) < len(given)
        for block, replies, before in zip(given, came, truth, strict=True):
            if replies is None:
                continue
            assert [(reply.round, reply.client) for reply in replies] == [(3, task.client) for task in block]
            assert all(reply.reason.isprintable() and len(reply.reason) <= 200 for reply in replies)
            for reply, was in zip(replies, before, strict=True):
                assert not (reply.payload and reply.summand)
                assert len(reply.payload) <= 16 * 12 + 65536
                if reply.summand and reply.summand.total is not None:
                    assert reply.summand.total.shape == (12,)
                    assert np.isfinite(reply.summand.total).all()
                    weights = [other.summand.weight for other in replies if other.summand]
                    assert reply.summand.whole == sum(weights)
                assert type(reply.examples) is type(was.examples)
    assert refused > tools.due["blocks"] / 4
    assert spared > refused / 2, "garbage in one block is no garbage in the others"


def test_a_changed_message_is_refused_or_makes_tasks_that_a_server_may_send(tools: Any) -> None:
    given, draw, refused = tasks(), random.Random(7), 0
    data = tools.serialized(blocks.encode_tasks(given, messages.encode_arrays(given[0][0])))
    for _ in range(tools.due["blocks"]):
        try:
            record = tools.parsed(tools.bent(data, draw))
        except Exception:  # Flower's
            continue
        try:
            came = blocks.decode_tasks(record)
        except ValueError:
            refused += 1
            continue
        for task in (task for block in came for task in block):
            assert np.isfinite(task.weights).all()
            assert len(task.weights) == sum(int(np.prod(shape)) for _, shape in task.layout)
            assert task.client.isprintable()
            assert 0 < len(task.client) <= 200
    assert refused > tools.due["blocks"] / 4
