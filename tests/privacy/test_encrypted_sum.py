"""Encrypted sums: exact for any clients and integers; what its sender did not make costs that sender alone."""

import os
import random
import signal
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy import coefficients, envelope, packing
from privacy.bfv import Trust
from privacy.encrypted_sum import EncryptedSum, Protector, Rejected, update_address
from privacy.expansion import Died

Gather = Callable[..., Any]
TRUSTS: list[Trust] = ["split", "shared"]


def opened(cohort: Any, server: EncryptedSum, round: int = 1) -> Any:
    data = cohort.holder.open(cohort.run, round, server.roster, server.seal(cohort.deal.link_key))
    return packing.unpack(data, cohort.parameters.entries, cohort.parameters.width)


@given(
    trust=st.sampled_from(TRUSTS),
    number=st.integers(3, 6),
    entries=st.integers(1, 20_000),
    width=st.integers(3, 48),
)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_sum_is_exact(gather: Gather, trust: Trust, number: int, entries: int, width: int) -> None:
    cohort = gather(trust, entries, width, clients=number, number=number)
    server = cohort.sum()
    for name, update in cohort.updates().items():
        server.add(name, update)
    assert (opened(cohort, server) == cohort.total(*range(number))).all()


@pytest.mark.parametrize("trust", TRUSTS)
def test_the_largest_integers_do_not_carry(gather: Gather, trust: Trust) -> None:
    cohort = gather(trust, width=16, clients=4, number=4)
    server = cohort.sum()
    largest = np.full(cohort.parameters.entries, (1 << 14) - 1, np.uint64)
    for name, protector in cohort.protectors.items():
        server.add(name, protector.protect(1, largest))
    assert (opened(cohort, server) == 4 * largest).all()


@pytest.mark.parametrize("trust", TRUSTS)
def test_clients_that_drop_out_are_missing_from_the_sum_and_nothing_else(gather: Gather, trust: Trust) -> None:
    cohort = gather(trust)
    server, updates = cohort.sum(), cohort.updates()
    for name in ("silo-4", "silo-0", "silo-2"):
        server.add(name, updates[name])
    assert server.roster == ("silo-0", "silo-2", "silo-4")
    assert (opened(cohort, server) == cohort.total(0, 2, 4)).all()


def crafted(cohort: Any) -> dict[str, tuple[bytes, str]]:
    """What a client might send that is not its update, and what the server says to it."""
    good = cohort.updates()["silo-0"]
    other = cohort.updates()["silo-1"]
    parameters, keys = cohort.parameters, cohort.keys["silo-0"]
    address = update_address(parameters, keys.key_id, cohort.run, 1, "silo-0")

    def sealed(body: bytes, **changes: Any) -> bytes:
        there = envelope.Address(**{**vars(address), **changes})
        return envelope.seal(there, body, keys.mac_key)

    body = bytes(envelope.open_(good, address, keys.mac_key))
    above = coefficients.packed(np.full(4096, parameters.data_prime, np.uint64))
    expanded = sealed(bytes(4096 * 8 * 2), size=4096 * 8 * 2)
    return {
        "nothing": (b"", "0 bytes came"),
        "no ciphertexts": (sealed(b"", count=0), "bytes came"),
        "one ciphertext too many": (sealed(body * 2, count=2), "bytes came"),
        "a ciphertext too short": (sealed(body[:-8], size=address.size - 8), "bytes came"),
        "ciphertexts in SEAL's own form": (expanded, "bytes came"),
        "oversized": (good + bytes(1 << 20), "bytes came"),
        "a compressed bomb": (zlib.compress(bytes(1 << 26)), "bytes came"),
        "a compressed bomb of the right length": (
            zlib.compress(bytes(1 << 26))[: len(good)].ljust(len(good), b"x"),
            "kind",
        ),
        "numbers that lie": (good[:57] + b"\xff" * 8 + good[65:], "number of ciphertexts"),
        "another version": (good[:4] + b"\2" + good[5:], "version"),
        "another run": (sealed(body, run="other"), "run"),
        "a replayed round": (cohort.protectors["silo-0"].protect(2, cohort.integers(0)), "round"),
        "another client's update": (other, "sender"),
        "another client's MAC": (envelope.seal(address, body, cohort.keys["silo-1"].mac_key), "MAC"),
        "another key": (
            sealed(body, fingerprint=envelope.fingerprint(b"k", parameters.to_bytes())),
            "key or parameters",
        ),
        "other parameters": (sealed(body, fingerprint=envelope.fingerprint(keys.key_id, b"p")), "key or parameters"),
        "a coefficient above the prime": (sealed(above + body[len(above) :]), "below the data prime"),
    }


@pytest.mark.parametrize("trust", TRUSTS)
def test_every_crafted_envelope_is_refused_by_name_and_the_sum_goes_on(gather: Gather, trust: Trust) -> None:
    cohort = gather(trust)
    server, updates = cohort.sum(), cohort.updates()
    for data, why in crafted(cohort).values():
        with pytest.raises(Rejected, match=f"update of silo-0 was refused.*{why}") as caught:
            server.add("silo-0", data)
        assert caught.value.client == "silo-0"
    for name, update in updates.items():
        server.add(name, update)
    with pytest.raises(Rejected, match=r"silo-0.*already"):
        server.add("silo-0", updates["silo-0"])
    with pytest.raises(Rejected, match=r"stranger.*not asked"):
        server.add("stranger", updates["silo-0"])
    assert (opened(cohort, server) == cohort.total(*range(5))).all()


@pytest.mark.parametrize("trust", TRUSTS)
def test_thousands_of_mutated_envelopes_are_all_refused(gather: Gather, trust: Trust) -> None:
    cohort = gather(trust)
    server, updates = cohort.sum(), cohort.updates()
    good, draw = updates["silo-0"], random.Random(0)
    mutations: list[Callable[[bytearray], None]] = [
        lambda data: data.__setitem__(at := draw.randrange(len(data)), data[at] ^ 1 << draw.randrange(8)),
        lambda data: data.__setitem__(at := draw.randrange(65), data[at] ^ 1 << draw.randrange(8)),
        lambda data: data.__delitem__(slice(draw.randrange(len(data)), None)),
        lambda data: data.insert(draw.randrange(len(data)), draw.randrange(256)),
        lambda data: data.extend(draw.randbytes(draw.randrange(1, 100))),
        lambda data: data.__setitem__(slice(at := draw.randrange(len(data) - 64), at + 64), bytes(64)),
    ]
    for i in range(5_100):
        data = bytearray(good)
        mutations[i % len(mutations)](data)
        if bytes(data) == good:
            continue
        with pytest.raises(Rejected, match="silo-0"):
            server.add("silo-0", bytes(data))
    for name, update in updates.items():
        server.add(name, update)
    assert (opened(cohort, server) == cohort.total(*range(5))).all()


@pytest.mark.parametrize("trust", TRUSTS)
def test_a_client_that_seals_noise_crashes_nothing_and_its_sum_stays_closed(gather: Gather, trust: Trust) -> None:
    """With a true MAC around them arbitrary numbers reach SEAL, below the prime: whatever they hold, they are read."""
    cohort = gather(trust)
    server, updates = cohort.sum(), cohort.updates()
    address = update_address(cohort.parameters, cohort.deal.key_id, cohort.run, 1, "silo-0")
    noise = np.random.default_rng(0).integers(0, cohort.parameters.data_prime, (2, 4096), np.uint64)
    body = b"".join(map(coefficients.packed, noise))[: address.size]
    server.add("silo-0", envelope.seal(address, body, cohort.keys["silo-0"].mac_key))
    for name in ("silo-1", "silo-2"):
        server.add(name, updates[name])
    with pytest.raises(ValueError, match="not the sum"):
        opened(cohort, server)


def test_a_worker_that_dies_costs_one_update_and_the_sum_is_kept(gather: Gather) -> None:
    cohort = gather("shared")
    server, updates = cohort.sum(), cohort.updates()
    server.add("silo-0", updates["silo-0"])
    first = cohort.worker.pid
    os.kill(first, signal.SIGSEGV)
    with pytest.raises(Rejected, match=r"silo-1.*died"):
        server.add("silo-1", updates["silo-1"])
    for name in ("silo-2", "silo-3"):
        server.add(name, updates[name])
    assert cohort.worker.pid != first
    os.kill(cohort.worker.pid, signal.SIGKILL)
    assert (opened(cohort, server) == cohort.total(0, 2, 3)).all()


def test_the_sum_is_fetched_from_the_worker_before_it_holds_too_much(gather: Gather) -> None:
    cohort = gather("shared", clients=20, number=20)
    server = cohort.sum()
    for i, (name, update) in enumerate(cohort.updates().items()):
        server.add(name, update)
        if i == 16:  # what it had before is here by now
            os.kill(cohort.worker.pid, signal.SIGKILL)
            cohort.worker.close()
    assert (opened(cohort, server) == cohort.total(*range(20))).all()


def test_a_worker_begins_each_round_at_nothing(gather: Gather) -> None:
    cohort = gather("shared")
    server, updates = cohort.sum(), cohort.updates()
    server.add("silo-4", updates["silo-4"])
    server = cohort.sum()
    for name in ("silo-1", "silo-2", "silo-3"):
        server.add(name, updates[name])
    assert (opened(cohort, server) == cohort.total(1, 2, 3)).all()


def test_a_worker_that_hangs_is_not_waited_for_for_ever(gather: Gather, monkeypatch: Any) -> None:
    cohort = gather("shared")
    monkeypatch.setattr("privacy.expansion._SECONDS", 0.2)
    with pytest.raises(Died):
        cohort.worker.add(bytes(coefficients.SEED - 1))


def test_a_round_beyond_the_run_is_not_encrypted(gather: Gather) -> None:
    cohort = gather()
    protector: Protector = cohort.protectors["silo-0"]
    with pytest.raises(ValueError, match="round 6 of a run whose key was made for 5"):
        protector.protect(6, cohort.integers(0))


def test_what_the_server_holds_has_no_place_for_a_key(gather: Gather) -> None:
    cohort = gather("shared")
    data = cohort.parameters.to_bytes()
    assert len(data) < 100
    assert cohort.keys["silo-0"].key[-64:] not in repr(vars(cohort.sum())).encode() + data
    assert "key" not in repr(cohort.keys["silo-0"]).lower().replace("clientkeys", "").replace("key_letter", "")
