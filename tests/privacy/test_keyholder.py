"""The key holder: a proven sum a round is opened, once; every other aggregate a server can make stays closed."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy import bfv, coefficients, encryption, key_letter, packing
from privacy.bfv import DEGREE, Integers, Trust
from privacy.cohort_noise import CohortNoise
from privacy.encrypted_sum import seal as seal_sum
from privacy.keyholder import KeyHolder, least
from privacy.refused import Refused

Gather = Callable[..., Any]
TRUSTS: list[Trust] = ["split", "shared"]
NAMES = ("silo-0", "silo-1", "silo-2", "silo-3", "silo-4")


class Attack:
    """What a malicious server has in a round: each client's ciphertexts, and everything it can compute from them."""

    def __init__(self, cohort: Any, round: int = 1) -> None:
        self.cohort, self.parameters, self.round = cohort, cohort.parameters, round
        self.read = {name: self.alone(name, data, round) for name, data in cohort.updates(round).items()}

    def alone(self, client: str, data: bytes, round: int) -> Integers:
        """(K, 2, N)."""
        server = self.cohort.sum(round)
        server.add(client, data)
        return server.polynomials()

    def sealed(self, polynomials: Integers, roster: tuple[str, ...]) -> bytes:
        deal = self.cohort.deal
        return seal_sum(polynomials, self.parameters, deal.key_id, self.cohort.run, self.round, roster, deal.link_key)

    def plus(self, *ciphertexts: Integers) -> Integers:
        total = np.zeros_like(ciphertexts[0])
        for one in ciphertexts:
            coefficients.add(total, one, self.parameters)
        return total

    def all(self, *names: str) -> Integers:
        return self.plus(*(self.read[name] for name in names))

    def constant(self, slots: Integers) -> Integers:
        """An encryption without noise or key of slots (K, N), what `add_plain` adds."""
        context = encryption._context(self.parameters)
        encoder, q, t = seal.BatchEncoder(context), self.parameters.data_prime, self.parameters.plain
        out = np.zeros((len(slots), 2, DEGREE), np.uint64)
        for k, row in enumerate(slots):
            plain = seal.Plaintext()
            encoder.encode(row.tolist(), plain)
            message = [plain.data(i) if i < plain.coeff_count() else 0 for i in range(DEGREE)]
            out[k, 0] = [(2 * q * m + t) // (2 * t) % q for m in message]
        return out

    def asked(self, polynomials: Integers, roster: tuple[str, ...] = NAMES) -> bytes:
        return self.cohort.holder.open(self.cohort.run, self.round, roster, self.sealed(polynomials, roster))


def copied(attack: Attack) -> Integers:
    """One client's ciphertext as often as there are clients: it passes a constant sentinel."""
    return attack.plus(*[attack.read["silo-0"]] * 5)


def padded(attack: Attack) -> Integers:
    """One client's ciphertext, and constants in place of the others."""
    slots = bfv.to_slots(attack.cohort.integers(9), attack.parameters)
    slots[:, 0] = 4
    return attack.plus(attack.read["silo-0"], attack.constant(slots))


def shifted(attack: Attack) -> Integers:
    """The true sum, with a constant added to one slot that is not the tag's."""
    slots = np.zeros((attack.parameters.count, DEGREE), np.uint64)
    slots[0, 7] = 1
    return attack.plus(attack.all(*NAMES), attack.constant(slots))


def swapped(attack: Attack) -> Integers:
    """One client left out, another counted twice."""
    return attack.plus(attack.all(*NAMES[:4]), attack.read["silo-0"])


def left_out(attack: Attack) -> Integers:
    """One client less than the roster says."""
    return attack.all(*NAMES[:4])


def reordered(attack: Attack) -> Integers:
    """All clients, and the first two ciphertexts of one change places."""
    moved = attack.read["silo-0"].copy()
    moved[[0, 1]] = moved[[1, 0]]
    return attack.plus(moved, attack.all(*NAMES[1:]))


def of_another_round(attack: Attack) -> Integers:
    """The sum of what the clients sent in round 2."""
    return Attack(attack.cohort, round=2).all(*NAMES)


def random_numbers(attack: Attack) -> Integers:
    """Nothing that anybody encrypted: what an attacker who wants raw decryptions would send."""
    return np.random.default_rng(0).integers(0, attack.parameters.data_prime, attack.read["silo-0"].shape, np.uint64)


def zeros(attack: Attack) -> Integers:
    """A transparent ciphertext."""
    return np.zeros_like(attack.read["silo-0"])


def a_second_polynomial_alone(attack: Attack) -> Integers:
    """(0, 1): its decryption is the secret key."""
    made = np.zeros_like(attack.read["silo-0"])
    made[:, 1, 0] = attack.parameters.data_prime // attack.parameters.plain
    return made


FORGED = [copied, padded, shifted, swapped, left_out, reordered, of_another_round, random_numbers, zeros]
FORGED += [a_second_polynomial_alone]


@pytest.mark.parametrize("trust", TRUSTS)
def test_an_aggregate_that_is_not_the_sum_of_its_roster_stays_closed(gather: Gather, trust: Trust) -> None:
    for forge in FORGED:
        attack = Attack(gather(trust, entries=9000))
        with pytest.raises(Refused, match="round 1 is not the sum of its roster"):
            attack.asked(forge(attack))
        assert attack.cohort.holder.opened(attack.cohort.run, 1) is None
    attack = Attack(gather(trust, entries=9000))
    sums = packing.unpack(attack.asked(attack.all(*NAMES)), 9000, attack.parameters.width)
    assert (sums == attack.cohort.total(*range(5))).all()


ROSTERS = {
    "too short": (NAMES[:2], "over 2 clients stays closed: protect.minimum=3"),
    "empty": ((), "over 0 clients"),
    "padded with a copy": ((*NAMES[:2], "silo-1"), "names a client twice"),
    "padded with a stranger": ((*NAMES[:2], "nobody"), "nobody is not among the clients"),
}


@pytest.mark.parametrize("case", ROSTERS)
def test_a_roster_that_is_too_short_or_made_up_is_refused_before_anything_is_decrypted(
    gather: Gather, case: str
) -> None:
    roster, why = ROSTERS[case]
    attack = Attack(gather())
    for _ in range(4):  # none of these is a failed opening: nothing was tried
        with pytest.raises(Refused, match=why):
            attack.asked(attack.all(*NAMES[:2]), roster)
    assert attack.asked(attack.all(*NAMES))


def test_more_clients_than_a_sum_bears_are_refused(tmp_path: Path) -> None:
    clients = {f"silo-{i}": X25519PrivateKey.generate().public_key().public_bytes_raw() for i in range(5)}
    parameters = bfv.fit("split", 10, 23, 4)
    holder = KeyHolder(tmp_path / "keys", clients, cohort=4)
    holder.deal("run", 5, parameters)
    with pytest.raises(Refused, match=r"over 5 clients: protect\.max_clients=4"):
        holder.open("run", 1, NAMES, b"")
    holder.close()
    holder = KeyHolder(tmp_path / "keys", clients)
    with pytest.raises(Refused, match=r"protect\.max_clients=4 is less than the cohort of 5"):
        holder.deal("other", 5, parameters)
    holder.close()


def test_another_clients_roster_does_not_fit_the_sum(gather: Gather) -> None:
    attack = Attack(gather())
    with pytest.raises(Refused, match="not the sum"):
        attack.asked(attack.all(*NAMES[:3]), NAMES[2:])


def test_a_repeat_gets_the_stored_bytes_whatever_comes_with_it(gather: Gather) -> None:
    attack, drawn = Attack(gather()), np.random.default_rng(0)

    def noised(sums: Integers, roster: Any) -> bytes:
        return (sums + drawn.integers(0, 1 << 20, sums.shape, np.uint64)).tobytes()

    data = attack.sealed(attack.all(*NAMES), NAMES)
    holder, run = attack.cohort.holder, attack.cohort.run
    first = holder.open(run, 1, NAMES, data, noised)
    assert holder.open(run, 1, NAMES, data, noised) == first
    fewer = attack.sealed(attack.all(*NAMES[:4]), NAMES[:4])
    assert holder.open(run, 1, NAMES[:4], fewer, noised) == first
    assert holder.open(run, 1, (), b"", noised) == first
    opened = holder.opened(run, 1)
    assert (opened.roster, opened.shown, opened.published) == (NAMES, b"", first)


def test_a_key_holder_that_was_restarted_is_the_same_and_opens_no_round_again(gather: Gather) -> None:
    cohort = gather()
    attack = Attack(cohort)
    first, before = attack.asked(attack.all(*NAMES)), cohort.holder
    before.close()
    public = {name: key.public_key().public_bytes_raw() for name, key in cohort.private.items()}
    cohort.holder = KeyHolder(before._folder, public)
    assert cohort.holder.identity == before.identity
    assert cohort.holder.deal(cohort.run, 5, cohort.parameters).key_id == cohort.deal.key_id
    assert attack.asked(attack.all(*NAMES[:4]), NAMES[:4]) == first
    later = Attack(cohort, round=2)
    assert later.asked(later.all(*NAMES)) == first  # the same integers, opened under the key that was kept


def test_roster_and_round_are_on_disk_before_anything_is_decrypted(gather: Gather, monkeypatch: Any) -> None:
    attack = Attack(gather())

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encryption.Decryptor, "decrypt", dies)
    with pytest.raises(KeyboardInterrupt):
        attack.asked(attack.all(*NAMES))
    monkeypatch.undo()
    with pytest.raises(Refused, match="asked for with another aggregate"):
        attack.asked(attack.all(*NAMES[:4]), NAMES[:4])
    assert attack.asked(attack.all(*NAMES))  # the very same may be asked for again: nothing was told


def test_after_three_failed_openings_the_key_is_gone(gather: Gather) -> None:
    cohort = gather()
    folder = next(path.parent for path in Path(cohort.holder._folder).glob("*/key"))
    for round in (1, 2, 3):
        attack = Attack(cohort, round)
        with pytest.raises(Refused, match="not the sum"):
            attack.asked(copied(attack))
    assert not (folder / "key").exists()
    with pytest.raises(Refused, match="no key for run run"):
        attack.asked(attack.all(*NAMES))
    with pytest.raises(Refused, match="destroyed after 3 failed openings"):
        cohort.holder.deal(cohort.run, 5, cohort.parameters)


def test_a_failed_round_is_not_tried_again(gather: Gather) -> None:
    attack = Attack(gather())
    for _ in range(2):
        with pytest.raises(Refused, match=r"not the sum|another aggregate"):
            attack.asked(copied(attack))
    with pytest.raises(Refused, match="another aggregate"):
        attack.asked(attack.all(*NAMES))


def test_mutated_aggregates_are_refused_and_crash_nothing(gather: Gather) -> None:
    attack, draw = Attack(gather()), random.Random(0)
    good = attack.sealed(attack.all(*NAMES), NAMES)
    for i in range(500):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if i % 3 == 0:
            del data[draw.randrange(len(data)) :]
        with pytest.raises(Refused, match="cannot be read"):
            attack.cohort.holder.open(attack.cohort.run, 1, NAMES, bytes(data))
    assert attack.cohort.holder.open(attack.cohort.run, 1, NAMES, good)


def test_central_noise_is_drawn_once_and_the_mean_is_published(gather: Gather) -> None:
    attack = Attack(gather())
    noise, random = CohortNoise(1.0, 5.0), np.random.default_rng(3)

    def publish(sums: Integers, roster: Any) -> bytes:
        return noise.release(sums.astype(np.float64), 0.0, 1.0, random)[0].tobytes()

    data = attack.sealed(attack.all(*NAMES), NAMES)
    mean = np.frombuffer(attack.cohort.holder.open(attack.cohort.run, 1, NAMES, data, publish), np.float32)
    again = np.frombuffer(attack.cohort.holder.open(attack.cohort.run, 1, NAMES, data, publish), np.float32)
    assert (mean == again).all()
    error = mean * 5 - attack.cohort.total(*range(5)).astype(np.float64)
    assert 0.5 < np.std(error) < 1.5


def test_a_key_is_kept_for_its_run_and_rotated_when_a_client_is_removed(tmp_path: Path) -> None:
    clients = {f"silo-{i}": X25519PrivateKey.generate().public_key().public_bytes_raw() for i in range(4)}
    parameters = bfv.fit("split", 10, 23, 9)
    holder = KeyHolder(tmp_path / "keys", clients)
    first, again, other = (holder.deal(run, 3, parameters).key_id for run in ("a", "a", "b"))
    assert first == again != other
    with pytest.raises(Refused, match="start a new run"):
        holder.deal("a", 4, parameters)
    holder.close()
    del clients["silo-0"]
    fewer = KeyHolder(tmp_path / "keys", clients)
    deal = fewer.deal("a", 3, parameters)
    assert deal.key_id != first
    assert sorted(deal.letters) == sorted(clients)
    fewer.close()


def test_secret_keys_are_for_the_owner_alone(gather: Gather) -> None:
    cohort = gather("shared")
    files = [path for path in Path(cohort.holder._folder).rglob("*") if path.name in ("key", "identity")]
    assert len(files) == 2
    for path in files:
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0
    assert cohort.keys["silo-0"].key not in b"".join(cohort.deal.letters.values())


def test_a_folder_that_others_can_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o755)
    with pytest.raises(Refused, match=r"others can read the key folder .*: chmod 700") as caught:
        KeyHolder(tmp_path / "keys", dict.fromkeys("abc", bytes(32)))
    assert "\n" not in str(caught.value)


def test_a_second_key_holder_on_one_folder_is_refused(tmp_path: Path) -> None:
    clients = {f"silo-{i}": X25519PrivateKey.generate().public_key().public_bytes_raw() for i in range(3)}
    first = KeyHolder(tmp_path / "keys", clients)
    with pytest.raises(Refused, match="another key holder uses"):
        KeyHolder(tmp_path / "keys", clients)
    first.close()
    KeyHolder(tmp_path / "keys", clients).close()


@pytest.mark.parametrize(("cohort", "minimum", "expected"), [(3, None, 3), (6, None, 3), (9, None, 5), (9, 3, 3)])
def test_the_minimum_is_three_or_half_the_cohort(cohort: int, minimum: int | None, expected: int) -> None:
    assert least(cohort, minimum) == expected


@pytest.mark.parametrize(("cohort", "minimum", "why"), [(2, None, "at most 2"), (9, 10, "at most 9"), (9, 2, "set 3")])
def test_a_minimum_that_cannot_be_met_or_hides_nobody_is_refused(cohort: int, minimum: int | None, why: str) -> None:
    with pytest.raises(Refused, match=f"protect.minimum.*{why}"):
        least(cohort, minimum)


def letter_changes(cohort: Any) -> dict[str, dict[str, Any]]:
    """What the server, or a client's own mistake, might put in place of what belongs there."""
    mine = cohort.deal.letters["silo-0"]
    stranger = Ed25519PrivateKey.generate()
    return {
        "its own key": {
            "letter": key_letter.write(cohort.keys["silo-0"], cohort.private["silo-0"].public_key(), stranger)
        },
        "another public key": {"public": encryption.keys(cohort.parameters)[0]},
        "no public key": {"public": b"" if cohort.parameters.trust == "split" else b"x"},
        "another client's letter": {"letter": cohort.deal.letters["silo-1"]},
        "a flipped bit": {"letter": mine[:-1] + bytes([mine[-1] ^ 1])},
        "a cut letter": {"letter": mine[:-1]},
        "nothing": {"letter": b""},
        "too much": {"letter": bytes(1 << 21)},
        "another run": {"run": "other"},
        "another number of rounds": {"rounds": 6},
        "another client": {"client": "silo-1"},
        "other parameters": {"parameters": bfv.fit(cohort.parameters.trust, 101, 23, 6)},
        "another identity": {"holder": stranger.public_key()},
        "another private key": {"private": X25519PrivateKey.generate()},
    }


@pytest.mark.parametrize("trust", TRUSTS)
def test_a_client_takes_no_key_that_its_key_holder_did_not_send_it_for_this_run(gather: Gather, trust: Trust) -> None:
    cohort = gather(trust)
    right = {
        "letter": cohort.deal.letters["silo-0"],
        "public": cohort.deal.public,
        "run": cohort.run,
        "client": "silo-0",
        "rounds": 5,
        "parameters": cohort.parameters,
        "holder": Ed25519PublicKey.from_public_bytes(cohort.holder.identity),
        "private": cohort.private["silo-0"],
    }
    assert key_letter.read(**right) == cohort.keys["silo-0"]
    for change in letter_changes(cohort).values():
        with pytest.raises(Refused, match=r"key holder|another key|bytes"):
            key_letter.read(**{**right, **change})
    draw = random.Random(0)
    for _ in range(300):
        letter = bytearray(right["letter"])
        letter[draw.randrange(len(letter))] ^= 1 << draw.randrange(8)
        with pytest.raises(Refused, match="not signed by the key holder"):
            key_letter.read(**{**right, "letter": bytes(letter)})
