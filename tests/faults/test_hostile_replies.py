"""What clients send, changed in any way, costs whoever sent it that update, and the server sums up the rest."""

import random
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from privacy import coefficients, envelope
from privacy.encrypted_sum import update_address
from privacy.frames import HEADER, NAME, Stage
from privacy.run_keys import RunKeys

STAGES = [Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.SIGN, Stage.UNMASK]
TRUSTS = ["split", "shared"]
Change = Callable[[str, bytes], bytes]
"""(client, payload) -> the payload that it sends instead."""


def payload_of(data: bytes, tools: Any) -> bytes:
    return bytes(tools.parsed(data)["arrays"]["flat"].data)


def sent(data: bytes, payload: bytes, tools: Any) -> bytes:
    """The record of a reply with another payload."""
    record = tools.parsed(data)
    array = Array(dtype="uint8", shape=(len(payload),), stype=record["arrays"]["flat"].stype, data=payload)
    return bytes(tools.serialized(RecordDict({**record, "arrays": ArrayRecord({"flat": array})})))


def by_payload(change: Change, victims: set[str], at: Callable[[bytes], bool], tools: Any) -> Any:
    def up(name: str, kind: str, data: bytes) -> bytes:
        if name not in victims or not at(payload := payload_of(data, tools)):
            return data
        return sent(data, change(name, payload), tools)

    return up


def named(row: Any) -> set[str]:
    """Who has cost itself its update."""
    assert all(entry["reason"].isprintable() for entry in row["rejected"])
    return {entry["name"] for entry in row["rejected"]} | set(row["late"])


# ---- encrypted ----


@pytest.mark.slow
@pytest.mark.parametrize("trust", TRUSTS)
def test_changed_updates_are_refused_by_name_and_the_sum_of_the_rest_is_right(
    house: Any, tools: Any, trust: str
) -> None:
    here, draw, tried = house(f"protect=encrypted protect.trust={trust}"), random.Random(trust), 0
    seen: list[bytes] = []
    here.round(up=by_payload(lambda _, payload: seen.append(payload) or payload, set(here.names), bool, tools))
    victims = set(here.names[4:])
    while tried < tools.due["encrypted payloads"] // len(TRUSTS):

        def bad(name: str, payload: bytes) -> bytes:
            return bytes(tools.changed(payload, draw, [other for other in seen if other != payload]))

        weights, row = here.round(up=by_payload(bad, victims, bool, tools))
        tried += len(victims)
        assert named(row) == victims
        assert (row["applied"], weights) == (True, here.without(victims))


@cache
def zlib_bomb() -> bytes:
    return zlib.compress(bytes(1 << 26))


def crafted(here: Any, name: str, payload: bytes, seen: dict[str, bytes]) -> dict[str, bytes]:
    """What is made to break a reader, sealed with the client's own key where that helps; all of it is refused."""
    [path] = here.folder.glob("keys/*/key")
    keys = RunKeys.load(path)
    mine, parameters, other = keys.secrets[name].mac, keys.parameters, here.names[0]
    address = update_address(parameters, keys.key_id, keys.run, 1, name)

    def sealed(body: bytes, key: bytes = mine, **changes: Any) -> bytes:
        return envelope.seal(envelope.Address(**{**vars(address), **changes}), body, key)

    body, bomb = bytes(envelope.open_(payload, address, mine)), zlib_bomb()
    # a zstd frame of 511 blocks of one byte repeated 128 KiB times, in SEAL's own form: 64 MB when SEAL loads it
    block = struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"\xff"
    frame = b"\x28\xb5\x2f\xfd\0\x58" + block * 511 + b"\1\0\0"
    seal = struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 1, 2, 0, 16 + len(frame)) + frame
    filled = (seal + b"\xff" * len(body))[: len(body)]
    above = coefficients.packed(np.full(4096, parameters.data_prime, np.uint64))
    return {
        "nothing": b"",
        "no ciphertexts": sealed(b"", count=0),
        "a ciphertext too many": sealed(body * 2, count=2),
        "a ciphertext too short": sealed(body[:-8], size=address.size - 8),
        "a number of ciphertexts that lies": payload[:57] + b"\xff" * 8 + payload[65:],
        "oversized within the limit": payload + bytes(4_000),
        "oversized beyond the limit": payload + bytes(1 << 22),
        "a zlib bomb": bomb,
        "a zlib bomb of the right length": (bomb * 9)[: len(payload)].ljust(len(payload), b"x"),
        "a zlib bomb that is sealed": sealed(bomb[: len(body) // 2].ljust(len(body), b"\xff")),
        "SEAL's own form with a zstd bomb": seal,
        "SEAL's own form with a zstd bomb, sealed": sealed(filled),
        "a coefficient above the prime": sealed(above + body[len(above) :]),
        "another version": payload[:4] + b"\2" + payload[5:],
        "another run": sealed(body, run="other"),
        "a replayed round": sealed(body, round=2),
        "another client's update": seen[other],
        "another client's MAC": sealed(body, key=keys.secrets[other].mac),
        "the key holder's MAC": sealed(body, key=keys.link_key),
        "another key": sealed(body, fingerprint=envelope.fingerprint(b"k" * 16, parameters.to_bytes())),
        "other parameters": sealed(body, fingerprint=envelope.fingerprint(keys.key_id, b"p")),
        "an aggregate": sealed(body, sender='["sum", "site-00"]'),
    }


@pytest.mark.parametrize("trust", TRUSTS)
def test_every_crafted_update_is_refused_by_name(house: Any, tools: Any, trust: str) -> None:
    here, seen = house(f"protect=encrypted protect.trust={trust}", clients=25), dict[str, bytes]()
    here.round(up=by_payload(lambda name, payload: seen.setdefault(name, payload), set(here.names), bool, tools))
    kinds = list(crafted(here, here.names[-1], seen[here.names[-1]], seen))
    victims = dict(zip(here.names[3:], kinds, strict=True))

    def craft(name: str, payload: bytes) -> bytes:
        return crafted(here, name, payload, seen)[victims[name]]

    weights, row = here.round(up=by_payload(craft, set(victims), bool, tools))
    assert {kind for name, kind in victims.items() if name not in named(row)} == set()
    assert (row["applied"], weights) == (True, here.without(victims))


@pytest.mark.parametrize("trust", TRUSTS)
@pytest.mark.parametrize("filler", ["zeros", "numbers below the prime", "another client's ciphertexts"])
def test_what_a_client_seals_that_is_no_update_of_its_own_opens_nothing_and_the_next_round_goes_on(
    house: Any, tools: Any, trust: str, filler: str
) -> None:
    """Its MAC is true, so nothing tells the server who it was; the tags tell the key holder that it is no sum."""
    here, seen = house(f"protect=encrypted protect.trust={trust}", clients=4), dict[str, bytes]()
    good, _ = here.round(
        up=by_payload(lambda name, payload: seen.setdefault(name, payload), set(here.names), bool, tools)
    )
    [path] = here.folder.glob("keys/*/key")
    keys = RunKeys.load(path)

    def sealing(name: str, payload: bytes) -> bytes:
        address, other = (update_address(keys.parameters, keys.key_id, keys.run, 1, of) for of in (name, here.names[0]))
        body = bytes(envelope.open_(payload, address, keys.secrets[name].mac))
        noise = np.random.default_rng(0).integers(0, keys.parameters.data_prime, (2, 4096), np.uint64)
        bodies = {
            "zeros": bytes(len(body)),
            "numbers below the prime": b"".join(map(coefficients.packed, noise))[: len(body)],
            "another client's ciphertexts": bytes(
                envelope.open_(seen[here.names[0]], other, keys.secrets[here.names[0]].mac)
            ),
        }
        return envelope.seal(address, bodies[filler], keys.secrets[name].mac)

    _, row = here.round(up=by_payload(sealing, {here.names[2]}, bool, tools))
    assert not row["applied"]
    assert "is not the sum of its roster's updates" in row["reason"]
    took = {"seconds": pytest.approx(1, abs=60), "seconds_evaluation": pytest.approx(1, abs=60)}
    assert here.round() == (good, row | {"applied": True, "reason": None} | took)


# ---- masked ----


def stage_of(payload: bytes) -> int:
    """Of a client's frame; -1: it is none, but a refusal."""
    return payload[HEADER - NAME - 1] if payload else -1


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_changed_answers_of_a_masked_sum_are_refused_at_every_stage(house: Any, tools: Any, stage: Stage) -> None:
    here, draw, tried = house("protect=masked", clients=12), random.Random(stage), 0
    seen: list[tuple[str, bytes]] = []
    good, _ = here.round(
        up=by_payload(lambda name, payload: seen.append((name, payload)) or payload, set(here.names), bool, tools)
    )
    here.forget_masks()
    victims, due = set(here.names[2::3]), here.names if stage > Stage.MASK else here.names[0::3] + here.names[1::3]
    while tried < tools.due["masked payloads"] // len(STAGES):
        before = tried

        def bad(name: str, payload: bytes) -> bytes:
            nonlocal tried
            tried += 1
            return bytes(tools.changed(payload, draw, [other for who, other in seen if who != name]))

        at = stage
        weights, row = here.round(up=by_payload(bad, victims, lambda payload, at=at: stage_of(payload) == at, tools))
        assert tried == before + len(victims)
        assert (row["applied"], row["replies"]) == (True, len(due))
        assert named(row) == set(here.names) - set(due)
        assert all(entry["reason"].startswith(f"{entry['name']}: ") for entry in row["rejected"])
        assert weights == (good if stage > Stage.MASK else here.without(victims))


# ---- the records around ----


@pytest.mark.slow
@pytest.mark.parametrize("trust", TRUSTS)
def test_changed_records_are_refused_by_name_or_say_the_same_of_the_update(house: Any, tools: Any, trust: str) -> None:
    here, draw, tried, taken = house(f"protect=encrypted protect.trust={trust}"), random.Random(trust), 0, 0
    victims = set(here.names[4:])

    def up(name: str, kind: str, data: bytes) -> bytes:
        return bytes(tools.bent(data, draw)) if name in victims else data

    while tried < tools.due["encrypted records"] // len(TRUSTS):
        weights, row = here.round(up=up)
        tried += len(victims)
        taken += len(victims - named(row))
        assert named(row) <= victims
        assert (row["applied"], weights) == (True, here.without(named(row)))
    assert taken < tried / 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_changed_records_of_a_masked_sum_are_refused_or_say_the_same(house: Any, tools: Any, stage: Stage) -> None:
    here, draw, tried = house("protect=masked", clients=6), random.Random(stage), 0

    def up(name: str, kind: str, data: bytes) -> bytes:
        nonlocal tried
        if name != here.names[3] or stage_of(payload_of(data, tools)) != stage:
            return data
        tried += 1
        return bytes(tools.bent(data, draw))

    while tried < tools.due["masked records"] // len(STAGES):
        here.forget_masks()
        weights, row = here.round(up=up)
        assert named(row) <= {here.names[3]}
        assert (row["applied"], weights) == (True, here.without(named(row)))
