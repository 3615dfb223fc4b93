"""Test results on the wire: what a changed message costs is its own client's, and never another number for all."""

import random
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from clients import messages
from privacy import exact_counts
from scenarios import build_model, load
from server.encrypted import Encrypted
from server.evaluation import SummedTests
from server.masked import Masked
from server.state import Score, first_state

CLIENTS, VICTIM = 6, "site-02"
Bend = Callable[[str, str, bytes], bytes]
Evaluate = Callable[..., Score]


def honest(client: str, kind: str, data: bytes) -> bytes:
    return data


def gone(client: str, kind: str, data: bytes) -> bytes:
    return b"no record" if (client, kind) == (VICTIM, "evaluate") else data


@pytest.fixture(params=["protect=masked", "protect=encrypted", "protect=encrypted protect.trust=shared"])
def evaluate(request: pytest.FixtureRequest, house: Callable[..., Any]) -> Iterator[Evaluate]:
    """evaluate(down=..., up=...) -> the score of the first weights; evaluate.said: what clients were heard to say."""
    mine = house(f"{request.param} evaluation.on=clients", CLIENTS)
    gathered = mine.gathered.tests(3)
    assert isinstance(gathered, Masked | Encrypted)
    grid, numbers = exact_counts.grid(16, CLIENTS), count(1)
    summed = SummedTests(gathered, grid, mine.fleet.hello(), lambda: next(numbers))
    state = first_state(build_model(load(str(mine.folder / "made.py")), mine.settings), mine.settings)

    def one(down: Bend = honest, up: Bend = honest) -> Score:
        mine.wire.down, mine.wire.up = down, up
        return summed(mine.fleet, state)

    yield one
    if isinstance(gathered, Encrypted):
        gathered.close()


def test_over_the_wire_a_reply_holds_nothing_but_what_is_hidden(evaluate: Evaluate, tools: SimpleNamespace) -> None:
    said = []

    def listen(client: str, kind: str, data: bytes) -> bytes:
        if kind == "evaluate":
            said.append(dict(tools.parsed(data)["umbel"]))
        return data

    assert evaluate(up=listen).accuracy is not None
    assert len(said) == CLIENTS
    assert all((one["examples"], one["correct"], one["loss"], one["reason"]) == (0, 0, 0.0, "") for one in said)


def test_a_changed_answer_costs_its_client_its_part_and_changes_no_number(
    evaluate: Evaluate, tools: SimpleNamespace
) -> None:
    draw, seen = random.Random(5), list[bool]()
    whole, without = evaluate(), evaluate(up=gone)
    assert whole.accuracy != without.accuracy
    for _ in range(40):
        found = evaluate(up=lambda name, kind, data: tools.bent(data, draw) if _hit(name, kind) else data)
        seen.append(VICTIM in found.missing)
        assert found.missing.keys() <= {VICTIM}
        assert found[:3] == (without if seen[-1] else whole)[:3]
    assert sum(seen) > 30, "what a reply says beside the hidden numbers is looked at by nobody"


def test_a_client_that_was_shown_another_model_adds_nothing_that_is_read(
    evaluate: Evaluate, tools: SimpleNamespace
) -> None:
    def other(name: str, kind: str, data: bytes) -> bytes:
        if not _hit(name, kind):
            return data
        task = messages.decode_task(tools.parsed(data))
        task.weights[0] += 1
        return bytes(tools.serialized(messages.encode_task(task)))

    without, found = evaluate(up=gone), evaluate(down=other)
    assert found[:3] in (without[:3], (None, None, None))
    assert VICTIM in found.missing


def _hit(name: str, kind: str) -> bool:
    return (name, kind) == (VICTIM, "evaluate")
