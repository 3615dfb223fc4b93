"""What a server sends to a client, changed in any way, is refused with a reason; nothing leaves that is not hidden."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from clients import messages
from privacy import bfv, holder
from privacy.frames import HEADER, NAME, Stage
from privacy.keyholder import KeyHolder

STAGES = [Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.SIGN, Stage.UNMASK]
TRUSTS = ["split", "shared"]
HIDDEN = (b"UMBE", b"UMK1")
"""How an envelope and a frame begin."""


def stage_of(data: bytes, tools: Any) -> int:
    """Of the protocol's message in a task of a masked sum."""
    return int(tools.parsed(data)["request"]["flat"].data[HEADER - NAME - 1])


def bent_task(data: bytes, draw: random.Random, tools: Any) -> bytes:
    """`data` changed, and not into a task to train for ever, which a server may ask for."""
    while True:
        made = bytes(tools.bent(data, draw))
        try:
            if messages.decode_task(tools.parsed(made)).steps < 1000:
                return made
        except Exception:  # Flower's, or ours: both are what is to be seen
            return made


def told(data: bytes, tools: Any) -> tuple[str, bytes]:
    """(reason, payload) of what a handler has answered: one of them, and of payloads what the server cannot read."""
    record = tools.parsed(data)
    reason, payload = record["umbel"]["reason"], record["arrays"]["flat"].data
    assert bool(reason) != bool(payload)
    assert reason.isprintable()
    assert len(reason) <= 200
    assert not payload or payload.startswith(HIDDEN)
    return str(reason), bytes(payload)


def play(here: Any, tools: Any, draw: random.Random, victim: str, at: Callable[[bytes], bool]) -> tuple[bool, str]:
    """A round in which one message to `victim` is changed: (whether it was answered, why not)."""
    came, changed = list[tuple[str, bytes]](), False

    def down(name: str, kind: str, data: bytes) -> bytes:
        nonlocal changed
        if name != victim or changed or not at(data):
            return data
        changed = True
        return bent_task(data, draw, tools)

    def up(name: str, kind: str, data: bytes) -> bytes:
        if name == victim and changed:
            came.append(told(data, tools))
        return data

    begin = here.begin()
    weights, row = here.round(down, up)
    assert changed
    named = {entry["name"] for entry in row["rejected"]} | set(row["late"])
    if row["applied"]:
        assert named <= {victim}
        assert weights == here.without(named), "what was changed is in the sum"
    else:
        assert row["reason"]
        assert weights == begin
    reason, payload = came[0] if came else ("cannot be read", b"")
    return bool(payload), reason


@pytest.mark.slow
@pytest.mark.parametrize("trust", TRUSTS)
def test_changed_tasks_to_encrypt_are_refused_or_make_no_difference_or_the_sum_stays_closed(
    house: Any, tools: Any, trust: str
) -> None:
    here, draw = house(f"protect=encrypted protect.trust={trust}", clients=6), random.Random(trust)
    answered = [
        play(here, tools, draw, here.names[i % 6], bool)[0] for i in range(tools.due["encrypted tasks"] // len(TRUSTS))
    ]
    assert 0 < sum(answered) < len(answered) / 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_changed_messages_of_a_masked_sum_are_refused_or_make_no_difference(
    house: Any, tools: Any, stage: Stage
) -> None:
    here, draw, answered = house("protect=masked", clients=6), random.Random(stage), list[bool]()
    for i in range(tools.due["masked tasks"] // len(STAGES)):
        here.forget_masks()
        answered.append(play(here, tools, draw, here.names[i % 6], lambda data: stage_of(data, tools) == stage)[0])
    assert sum(answered) < len(answered) / 2


@pytest.mark.parametrize("asked", ["protect=masked", "protect=encrypted protect.trust=split"])
def test_an_update_of_fewer_steps_than_the_server_asked_stays_out_of_the_sum(
    house: Any, tools: Any, asked: str
) -> None:
    here = house(asked, clients=6)
    victim = here.names[0]

    def down(name: str, kind: str, data: bytes) -> bytes:
        record = tools.parsed(data)
        if name != victim or kind != "train":
            return data
        record["umbel"]["steps"] = 1
        return bytes(tools.serialized(record))

    weights, row = here.round(down)
    assert [entry["reason"] for entry in row["rejected"]] == ["took 1 steps where 2 were asked"]
    assert weights == here.without([victim])


# ---- crafted ----


def asked(record: RecordDict, request: bytes | None, **fields: Any) -> RecordDict:
    """A task with another protocol's message, or none, and other fields."""
    config = ConfigRecord(dict(record["umbel"]) | fields)
    if request is None:
        bare = dict(config) | {"protected_run": "", "entries": 0, "minimum": 0}
        return RecordDict({"umbel": ConfigRecord(bare), "arrays": record["arrays"]})
    array = Array(dtype="uint8", shape=(len(request),), stype=record["request"]["flat"].stype, data=request)
    return RecordDict({**record, "umbel": config, "request": ArrayRecord({"flat": array})})


def nested(deep: int) -> bytes:
    return deep.to_bytes(4, "little") + b"[" * deep


@pytest.mark.parametrize("trust", TRUSTS)
def test_every_crafted_task_to_encrypt_is_refused_in_one_line(house: Any, tools: Any, trust: str) -> None:
    here, tasks = house(f"protect=encrypted protect.trust={trust}", clients=4), dict[str, bytes]()

    def keep(name: str, kind: str, data: bytes) -> bytes:
        return tasks.setdefault(name, data)

    here.round(down=keep)
    victim, other = here.names[:2]
    record = tools.parsed(tasks[victim])
    said, (letter, public) = holder.unpack(record["request"]["flat"].data)
    theirs = holder.unpack(tools.parsed(tasks[other])["request"]["flat"].data)[1][0]
    stranger = KeyHolder(here.folder / "stranger", here.recipients, minimum=3)
    known = messages.decode_task(record)
    assert known.protection
    size = known.protection.entries
    wide = bfv.fit("split" if trust == "split" else "shared", size, 18, 4)
    forged = stranger.deal(known.protection.run, 1 << 16, wide)
    stranger.close()
    cases: dict[str, tuple[RecordDict, str]] = {
        "no protection": (asked(record, None), "without the protection that this node's settings ask for"),
        "nothing": (asked(record, b""), "cannot be read"),
        "no letter": (asked(record, holder.pack(said)), "cannot be read"),
        "an attempt that is text": (asked(record, holder.pack({"attempt": "1"}, letter, public)), "cannot be read"),
        "an attempt without end": (asked(record, holder.pack({"attempt": 10**400}, letter, public)), "cannot be read"),
        "nested without end": (asked(record, nested(200_000)), "cannot be read"),
        "another client's letter": (asked(record, holder.pack(said, theirs, public)), "is not signed"),
        "another key holder's letter": (
            asked(record, holder.pack(said, forged.letters[victim], forged.public)),
            "is not signed",
        ),
        "a public key of the server's": (
            asked(record, holder.pack(said, letter, public[::-1] or b"k")),
            "is not signed",
        ),
        "another run": (asked(record, holder.pack(said, letter, public), protected_run="other:132"), "is not signed"),
        "another size": (asked(record, holder.pack(said, letter[:-1], public)), "is not signed"),
        "a letter of 40 MB": (
            asked(record, holder.pack(said, bytes(40 << 20), public)),
            "a key letter of 41943040 bytes",
        ),
        "a public key of 40 MB": (asked(record, holder.pack(said, letter, bytes(40 << 20))), "a key letter of"),
        "a round beyond the run": (
            asked(record, holder.pack(said, letter, public), round=1 << 40),
            "round 1099511627776",
        ),
        "another client's task": (asked(record, holder.pack(said, letter, public), client=other), "the task is for"),
        "a mask's stage": (asked(record, b"UMK1" + bytes(200), kind="protect"), "of another run, or under other rules"),
    }
    node = here.names.index(victim) + 2
    for case, (changed, why) in cases.items():
        kind = "query.protect" if changed["umbel"]["kind"] == "protect" else "train"
        reason, payload = told(here.wire.handled(node, kind, tools.serialized(changed)), tools)
        assert why in reason, case
        assert not payload
    reason, payload = told(here.wire.handled(node, "train", tasks[victim]), tools)
    assert payload, reason
    for again in (
        tasks[victim],
        tools.serialized(asked(record, holder.pack({"attempt": 1}, letter, public), rate=0.1)),
    ):
        reason, _ = told(here.wire.handled(node, "train", again), tools)
        assert reason == "round 1 of attempt 1 was answered already"
