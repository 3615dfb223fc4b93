"""What a server asks of a key holder, changed in any way, is refused; what is opened is the sum that was proven."""

import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy import bfv, envelope, holder, key_letter
from privacy.bfv import Parameters, Trust
from privacy.encrypted_sum import EncryptedSum, Protector, aggregate_address
from privacy.expansion import Worker
from privacy.holder import Deal, Opened, Remote, Shown, Unreachable
from privacy.integers import Grid
from privacy.keyholder import KeyHolder
from privacy.keyholder_process import Process

NAMES = [f"silo-{i}" for i in range(5)]
GRID = Grid(130, 16, 1.0, 8)
RUN, ROUNDS, VIEW = "run", 9, b"v" * 32
SHOWN = Shown(GRID, VIEW, 1, 2)


class Bench:
    """Clients of a key holder, and a server that knows how to ask it."""

    def __init__(self, remote: Remote, identity: bytes, private: dict[str, X25519PrivateKey], trust: Trust) -> None:
        self.parameters = bfv.fit(trust, GRID.entries, GRID.width, GRID.clients)
        self.deal: Deal = remote.deal(RUN, ROUNDS, self.parameters)
        holder_key = Ed25519PublicKey.from_public_bytes(identity)
        letters = {
            name: key_letter.read(
                self.deal.letters[name], self.deal.public, RUN, name, ROUNDS, self.parameters, holder_key, private[name]
            )
            for name in NAMES
        }
        self.protectors = {name: Protector(letter) for name, letter in letters.items()}
        self.worker = Worker(self.parameters)

    def summed(self, round_: int, names: list[str], shown: Shown) -> EncryptedSum:
        total = EncryptedSum(self.parameters, self.deal.key_id, RUN, round_, self.deal.mac_keys, self.worker)
        for name in names:
            entries = np.arange(GRID.entries, dtype=np.uint64) + NAMES.index(name)
            total.add(name, self.protectors[name].protect(round_, entries, shown.hash))
        return total

    def aggregate(self, round_: int, names: list[str] = NAMES) -> bytes:
        return self.summed(round_, names, SHOWN).seal(self.deal.link_key)


def asked(aggregate: bytes, view: bytes = VIEW, **changes: Any) -> bytes:
    """What an honest server asks to have round 1 opened, with these fields changed."""
    requests: list[bytes] = []
    with suppress(Unreachable):
        Remote(lambda request: requests.append(request) or b"").open(RUN, 1, NAMES, SHOWN, aggregate)
    fields, _ = holder.unpack(requests[0])
    return holder.pack(fields | changes, view, aggregate)


def dealt(made: Parameters, **changes: Any) -> bytes:
    return holder.pack({"do": "deal", "run": RUN, "rounds": ROUNDS, "parameters": made.to_bytes().hex()} | changes)


@pytest.fixture
def private() -> dict[str, X25519PrivateKey]:
    return {name: X25519PrivateKey.generate() for name in NAMES}


@pytest.fixture
def keys(tmp_path: Path, private: dict[str, X25519PrivateKey], monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyHolder]:
    monkeypatch.setattr("os.fsync", lambda _: None)
    public = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    made = KeyHolder(tmp_path / "keys", public, minimum=3)
    yield made
    made.close()


# ---- thousands ----


def test_ten_thousand_changed_messages_come_to_the_doors(tools: Any) -> None:
    """Those of this folder; tests/privacy has as many again, of envelopes and frames without what is around them."""
    assert sum(tools.due.values()) >= 10_000


@pytest.mark.parametrize("trust", ["split", "shared"])
def test_changed_requests_open_nothing_but_the_very_sum(
    keys: KeyHolder, private: Any, tools: Any, trust: Trust
) -> None:
    bench, draw = Bench(Remote(partial(holder.answer, keys)), keys.identity, private, trust), random.Random(trust)

    def answered(request: bytes) -> tuple[dict[str, Any], list[bytes]]:
        for record in keys._run(RUN).glob("round-*"):  # as if it had never been asked
            record.unlink()
        return holder.unpack(holder.answer(keys, request))

    open_, deal = asked(bench.aggregate(1)), dealt(bench.parameters)
    others = [open_, asked(bench.aggregate(2), round=2), asked(bench.aggregate(1, NAMES[:3]), roster=NAMES[:3])]
    honest, opened = [answered(request) for request in others], 0
    assert all("roster" in said for said, _ in honest)
    for _ in range(tools.due["requests"] // 2):
        request = draw.choice([open_, open_, open_, deal])
        said, parts = answered(tools.changed(request, draw, [*others, deal]))
        if "roster" in said:
            opened += 1
            assert (said, parts) in honest
        elif "recipients" in said:
            assert (parts[0] == bench.deal.key_id) == (parts[2] == bench.deal.link_key)
        else:
            assert list(said) == ["refused"]
            assert not parts
            assert not list(keys._run(RUN).glob("*.answer"))
    assert opened < tools.due["requests"] / 20
    assert answered(open_) == honest[0]
    bench.worker.close()


# ---- crafted ----


def crafted(bench: Bench, trust: Trust) -> dict[str, tuple[bytes, str]]:
    """What is made to break a key holder or to get more out of it, and the words with which it is refused."""
    good, parameters, link = bench.aggregate(1), bench.parameters, bench.deal.link_key
    address = aggregate_address(parameters, bench.deal.key_id, RUN, 1, NAMES)
    body = bytes(envelope.open_(good, address, link))

    def sealed(content: bytes, key: bytes = link, **changes: Any) -> bytes:
        return envelope.seal(envelope.Address(**{**vars(address), **changes}), content, key)

    def grid(**changes: Any) -> dict[str, Any]:
        return {"grid": asdict(GRID) | changes}

    bomb, deep = zlib.compress(bytes(1 << 26)), 200_000
    other: Trust = "shared" if trust == "split" else "split"
    return {
        "nothing": (b"", "without its fields"),
        "a number": (b"\7", "cut off"),
        "lengths that lie": (struct.pack("<I", 2**32 - 1) + good, "cut off"),
        "nested without end": (struct.pack("<I", deep) + b"[" * deep, "nested too deep"),
        "a number without end": (struct.pack("<I", 9_000) + b"1" * 9_000, "cannot read"),
        "no text": (struct.pack("<I", 4) + b"\xff\xfe\xfd\xfc", "cannot read"),
        "a zlib bomb": (bomb, "cut off"),
        "a zlib bomb for an aggregate": (asked(bomb), "bytes came"),
        "an aggregate of 64 MB": (asked(bytes(1 << 26)), "bytes came"),
        "a million parts": (holder.pack({"do": "open"}, *[b""] * 1_000_000), "neither"),
        "another word": (holder.pack({"do": "sign", "run": RUN}), "neither"),
        "a run that is no text": (dealt(parameters, run=5), "neither"),
        "a run of half a character": (dealt(parameters, run="\ud800"), "cannot read"),
        "rounds without end": (dealt(parameters, run="x", rounds=2**40), "a run of 1099511627776 rounds"),
        "no rounds": (dealt(parameters, run="y", rounds=0), "a run of 0 rounds"),
        "other rounds": (dealt(parameters, rounds=ROUNDS + 1), "has a key for 9 rounds"),
        "other parameters": (dealt(bfv.fit(other, GRID.entries, GRID.width, GRID.clients)), "has a key for 9 rounds"),
        "parameters that nobody makes": (dealt(parameters, parameters="00" * 18), "no BFV parameters"),
        "a grid of 2^40 bits": (asked(good, **grid(bits=2**40)), "has no grid"),
        "a grid of no bits": (asked(good, **grid(bits=0)), "has no grid"),
        "a grid with noise without end": (asked(good, **grid(noise=10**4000)), "for noise"),
        "a grid that is no number": (asked(good, **grid(limit=float("nan"))), "no grid"),
        "a grid of text": (asked(good, **grid(limit="1")), "TypeError"),
        "a grid with a field more": (asked(good, **grid(more=1)), "TypeError"),
        "a grid of another range": (asked(good, **grid(limit=0.5)), "is not the sum"),
        "another model": (asked(good, view=b"w" * 32), "is not the sum"),
        "another attempt": (asked(good, attempt=2), "is not the sum"),
        "a round of another kind": (asked(good, round="1"), "neither"),
        "a round without end": (asked(good, round=10**300), "OSError"),
        "a negative round": (asked(good, round=-1), "round -1 of a run"),
        "a round beyond the run": (asked(bench.aggregate(9), round=10), "round 10 of a run whose key was made for 9"),
        "a replayed round": (asked(good, round=2), "another round"),
        "a run that was not dealt": (asked(good, run="other"), "there is no key for run other"),
        "a roster of two": (asked(bench.aggregate(1, NAMES[:2]), roster=NAMES[:2]), "stays closed: protect.minimum=3"),
        "a roster of nobody": (asked(good, roster=[]), "stays closed"),
        "a roster of numbers": (asked(good, roster=[1, 2, 3]), "other things than names"),
        "a client twice": (asked(good, roster=[*NAMES, NAMES[0]]), "names a client twice"),
        "a stranger": (asked(good, roster=[*NAMES, "mallory"]), "mallory is not among the clients"),
        "fewer than were summed": (asked(good, roster=NAMES[:3]), "another sender"),
        "fewer than were summed, sealed so": (
            asked(sealed(body, sender=aggregate_address(parameters, b"", RUN, 1, NAMES[:3]).sender), roster=NAMES[:3]),
            "is not the sum",
        ),
        "no ciphertexts": (asked(sealed(b"", count=0)), "bytes came"),
        "a ciphertext too many": (asked(sealed(body * 2, count=2)), "bytes came"),
        "a ciphertext too short": (asked(sealed(body[:-8], size=address.size - 8)), "bytes came"),
        "zeros": (asked(sealed(bytes(len(body)))), "is not the sum"),
        "coefficients above the prime": (asked(sealed(b"\xff" * len(body))), "below the data prime"),
        "another key": (asked(sealed(body, fingerprint=bytes(16))), "another key or parameters"),
        "another run's sum": (asked(sealed(body, run="other")), "another run"),
        "a client's MAC": (asked(sealed(body, key=bench.deal.mac_keys[NAMES[0]])), "its MAC is not"),
        "a client's update": (
            asked(bench.protectors[NAMES[0]].protect(1, np.zeros(132, np.uint64), VIEW)),
            "cannot be read",
        ),
    }


@pytest.mark.parametrize("trust", ["split", "shared"])
def test_every_crafted_request_to_a_real_process_is_refused_and_it_lives_on(
    private: Any, tmp_path: Path, trust: Trust
) -> None:
    public = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    process = Process(tmp_path / "keys", public, len(NAMES), 3)
    try:
        bench, first = Bench(process, process.identity, private, trust), process.pid
        for case, (request, why) in crafted(bench, trust).items():
            for record in (tmp_path / "keys").glob("*/round-*"):  # three failures would destroy the key
                record.unlink()
            said, parts = holder.unpack(process._exchange(request))
            assert why in said.get("refused", ""), case
            assert not parts
        assert process.pid == first
        for record in (tmp_path / "keys").glob("*/round-*"):
            record.unlink()
        opened = process.open(RUN, 1, NAMES, SHOWN, bench.aggregate(1))
        assert isinstance(opened, Opened)
        assert opened.roster == tuple(NAMES)
    finally:
        process.close()
        bench.worker.close()


# ---- what comes back ----


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["split", "shared"])
def test_changed_answers_of_a_key_holder_cost_the_round_or_the_clients_they_were_about(
    house: Any, tools: Any, trust: str
) -> None:
    here, draw = house(f"protect=encrypted protect.trust={trust}", clients=6), random.Random(trust)
    begin, applied = here.begin(), 0
    for i in range(tools.due["key holder's answers"] // 2):
        deal = i % 2 == 1  # else the answer to `open`
        if deal:
            here.gathered._deals.clear()
            here.wire.known.clear()
        changed = 0

        def up(name: str, kind: str, data: bytes, deal: bool = deal) -> bytes:
            nonlocal changed
            if kind != "query.keyholder" or changed or (b'"recipients"' in data) != deal:
                return data
            changed += 1
            return bytes(tools.bent(data, draw))

        weights, row = here.round(up=up)
        assert changed == 1
        assert row["applied"] or row["reason"]
        named = {entry["name"] for entry in row["rejected"]}
        assert weights == (here.without(named) if row["applied"] else begin)
        applied += row["applied"]
        if deal:
            here.gathered._deals.clear()
    assert applied < tools.due["key holder's answers"] / 8
