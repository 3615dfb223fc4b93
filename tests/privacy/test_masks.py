"""A masked sum is the exact sum of those who survived, or it is none; one vector by itself says nothing."""

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import frames, neighbours, pads
from privacy.dealing import Lost
from privacy.frames import HEADER, SIGNATURE, Rules, Stage
from privacy.packing import unpack
from privacy.transcript import FileStore

STAGES = [Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.SIGN, Stage.UNMASK]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(4, 9), st.integers(1, 30), st.integers(1, 64))
def test_the_sum_is_exact_whoever_drops_and_when(fleets: Any, data: Any, count: int, entries: int, width: int) -> None:
    fleet = fleets(count, entries, width)
    leave = data.draw(st.lists(st.sampled_from(STAGES), max_size=count // 3))
    absent = dict(zip(data.draw(st.permutations(fleet.names)), leave, strict=False))
    server = fleet.server()
    requests = fleet.until(server, Stage.UNMASK, absent)
    gone = [name for name, stage in absent.items() if stage <= Stage.UNMASK]
    result = fleet.finish(server, requests, gone)
    in_it = [name for name in fleet.names if absent.get(name, Stage.UNMASK) > Stage.MASK]
    assert result.survivors == tuple(in_it)
    assert (result.values == fleet.total(in_it)).all()


@pytest.mark.parametrize("stage", [Stage.REVEAL, Stage.SHARE, Stage.MASK, Stage.SIGN, Stage.UNMASK])
@pytest.mark.usefixtures("drawn_graphs")
def test_the_sum_is_exact_over_a_graph_that_the_clients_have_drawn(fleets: Any, stage: Stage) -> None:
    fleet = fleets(14, failure=Fraction(1, 2))
    assert neighbours.degree(14, failure=Fraction(1, 2)).neighbours < 13
    gone = ["b", "k"]
    server = fleet.server()
    requests = fleet.until(server, Stage.UNMASK, dict.fromkeys(gone, stage))
    result = fleet.finish(server, requests, gone)
    in_it = [name for name in fleet.names if name not in gone or stage > Stage.MASK]
    assert result.survivors == tuple(in_it)
    assert (result.values == fleet.total(in_it)).all()


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        (Stage.ADVERTISE, "2 clients take part, 3 are the minimum"),
        (Stage.SHARE, "0 shared with enough others, 3 are the minimum"),
        (Stage.MASK, "2 survivors are below the minimum of 3"),
        (Stage.SIGN, "2 have signed who survived, of a quorum of 4"),
        (Stage.UNMASK, "2 of 3 shares of the self-mask of a came"),
    ],
)
def test_a_round_with_too_few_is_lost_and_says_what_lacked(fleets: Any, stage: Stage, why: str) -> None:
    fleet = fleets(6, minimum=3)
    server = fleet.server()
    gone = ["c", "d", "e", "f"] if stage is not Stage.UNMASK else ["d", "e", "f"]
    requests = fleet.until(server, stage)
    with pytest.raises(Lost, match=why):
        fleet.finish(server, requests, gone)


def test_a_client_that_masked_and_then_dropped_with_too_few_left_loses_the_round(fleets: Any) -> None:
    fleet = fleets(6)
    server = fleet.server()
    requests = fleet.until(server, Stage.MASK)
    with pytest.raises(Lost, match="a has 2 neighbours left, of 3 due"):
        fleet.finish(server, requests, ["d", "e", "f"])


def _uniform(values: Any, width: int) -> bool:
    """Chi-squared over all values of a few bits: passes what is uniform but for one time in 10^6."""
    cells = 1 << width
    counts = np.bincount(values.astype(np.int64), minlength=cells)
    expected = len(values) / cells
    statistic = ((counts - expected) ** 2 / expected).sum()
    return bool(statistic < cells - 1 + 5 * np.sqrt(2 * (cells - 1)))


@pytest.mark.parametrize("width", [1, 5])
def test_one_vector_by_itself_looks_uniform(fleets: Any, width: int) -> None:
    fleet = fleets(4, 60_000, width)
    fleet.vectors = {name: np.zeros(60_000, np.uint64) for name in fleet.names}
    server = fleet.server()
    requests = fleet.until(server, Stage.MASK)
    body = fleet.answer("a", requests["a"])[HEADER + SIGNATURE : -SIGNATURE]
    masked = unpack(body, 60_000, width)
    assert _uniform(masked, width)
    assert not _uniform(masked % max(1, 2**width - 1), width), "the test would not see a bias"


def test_no_two_clients_vectors_and_no_two_attempts_bear_the_same_mask(fleets: Any) -> None:
    fleet = fleets(4, 500, 32)
    fleet.vectors = {name: np.zeros(500, np.uint64) for name in fleet.names}
    seen = []
    for number in (1, 2):
        requests = fleet.until(fleet.server(number), Stage.MASK)
        seen += [fleet.answer(name, request)[HEADER + SIGNATURE :] for name, request in requests.items()]
    parts = {row[i : i + 8] for row in seen for i in range(0, 1992, 8)}
    assert len(parts) == 8 * 249


@given(st.integers(1, 64), st.integers(1, 40_000), st.binary(min_size=32, max_size=32))
@settings(max_examples=25, deadline=None)
def test_a_pad_that_is_added_and_taken_away_leaves_nothing(width: int, entries: int, key: bytes) -> None:
    total = pads.zeros(entries, width)
    pads.add(total, key, 1)
    once = total.copy()
    assert entries < 8 or once.any()
    pads.add(total, key, -1)
    assert not total.any()


def test_a_pad_is_the_key_stream_of_chacha20(monkeypatch: pytest.MonkeyPatch) -> None:
    total = pads.zeros(16, 23)
    pads.add(total, bytes(32), 1)
    # RFC 8439, appendix A.1, test vector 1: key, nonce and counter of zeros
    expected = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert total.astype("<u4").tobytes().hex() == expected


@pytest.mark.parametrize("low", [bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little")])
def test_a_key_of_low_order_agrees_on_nothing(low: bytes) -> None:
    with pytest.raises(ValueError, match="low order"):
        pads.agree(b"k" * 32, low, b"")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (None, "a vector of 7 uint64"),
        (np.zeros(6, np.uint64), "a vector of 7 uint64"),
        (np.zeros(7, np.int64), "a vector of 7 uint64"),
        (np.full(7, 2**12, np.uint64), "a value of 4096 takes more than 12 bits"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_before_it_is_masked(fleets: Any, values: Any, why: str) -> None:
    fleet = fleets(4)
    server = fleet.server()
    requests = fleet.until(server, Stage.MASK)
    with pytest.raises(ValueError, match=why):
        fleet.client("a").answer(requests["a"], values)
    assert (fleet.finish(server, requests).values == fleet.total(fleet.names)).all()


@pytest.mark.parametrize("rules", [(0, 8, 2), (1, 0, 2), (1, 65, 2), (1, 8, 1)])
def test_impossible_rules_are_refused(rules: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="are possible"):
        Rules(*rules)


# ---- What is on disk, and for how long ----


def test_a_client_restarted_between_any_two_stages_goes_on(fleets: Any, tmp_path: Path) -> None:
    fleet = fleets(
        4, store=lambda name: FileStore(tmp_path / name)
    )  # a new Client for each message, by its store alone
    server = fleet.server()
    requests = server.ask()
    while requests:
        for name, request in requests.items():
            fleet.stores[name] = FileStore(tmp_path / name)
            server.hear(name, fleet.answer(name, request))
        requests = server.ask()
    assert (server.result().values == fleet.total(fleet.names)).all()


def test_a_retry_gets_the_stored_bytes_at_every_stage(fleets: Any) -> None:
    fleet = fleets(4)
    server = fleet.server()
    asked = []
    while requests := server.ask():
        for name, request in requests.items():
            answer = fleet.answer(name, request)
            asked.append((name, request, answer))
            fleet.vectors[name] = fleet.vectors[name] ^ np.uint64(1)  # trained again, to something else
            assert fleet.answer(name, request) == answer
            fleet.vectors[name] = fleet.vectors[name] ^ np.uint64(1)
            server.hear(name, answer)
            server.hear(name, answer)
    assert all(fleet.answer(name, request) == answer for name, request, answer in asked)
    assert (server.result().values == fleet.total(fleet.names)).all()


def test_a_new_attempt_shows_new_keys_and_ends_the_old_one(fleets: Any) -> None:
    fleet = fleets(4)
    old = fleet.server(1)
    requests = fleet.until(old, Stage.MASK)
    before = fleet.answer("a", requests["a"])
    new = fleet.server(2)
    opened = new.ask()
    adverts = [fleet.answer("a", request)[HEADER:-SIGNATURE] for request in (opened["a"],)]
    assert adverts[0] not in requests["a"]
    assert fleet.stores["a"].get("secrets") is not None
    with pytest.raises(ValueError, match="attempt 1 of round 1 is not open here"):
        fleet.answer("a", requests["a"])
    for name in "bcd":
        new.hear(name, fleet.answer(name, opened[name]))
    new.hear("a", fleet.answer("a", opened["a"]))
    result = fleet.finish(new, new.ask())
    assert (result.values == fleet.total(fleet.names)).all()
    assert before[HEADER + SIGNATURE :] not in fleet.stores["a"].get("mask")


def test_who_has_unmasked_takes_part_in_no_other_attempt_at_that_round(fleets: Any) -> None:
    fleet = fleets(4)
    server = fleet.server(1)
    requests = fleet.until(server, Stage.UNMASK)
    fleet.finish(server, requests, ["d"])
    again = fleet.server(2).ask()
    with pytest.raises(ValueError, match="round 1 was unmasked in attempt 1"):
        fleet.answer("a", again["a"])
    fleet.answer("d", again["d"])
    with pytest.raises(ValueError, match="attempt 1 of round 1 is not open"):
        fleet.answer("d", requests["d"])
    fleet.answer("a", fleet.server(1, of=2).ask()["a"])


def test_secrets_are_for_their_owner_alone_and_gone_after_the_round(fleets: Any, tmp_path: Path) -> None:
    fleet = fleets(4, store=lambda name: FileStore(tmp_path / name))
    server = fleet.server()
    requests = fleet.until(server, Stage.UNMASK)
    folder = tmp_path / "a"
    secret = (folder / "secrets").read_bytes()[-128:]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    fleet.finish(server, requests)
    fleet.client("a").close(0)
    assert (folder / "secrets").exists(), "another round's end is not this one's"
    fleet.client("a").close(1)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "lock"]
    assert all(secret[i : i + 32] not in (folder / "latest").read_bytes() for i in range(0, 128, 32))
    for number in (1, 2):
        with pytest.raises(ValueError, match="round 1 is closed"):
            fleet.answer("a", fleet.server(number).ask()["a"])
    with pytest.raises(ValueError, match="is not open"):
        fleet.answer("a", requests["a"])
    with pytest.raises(ValueError, match="attempt 9 of round 0 is over"):
        fleet.answer("a", fleet.server(9, of=0).ask()["a"])


def test_of_two_questions_at_once_one_is_answered(fleets: Any, tmp_path: Path) -> None:
    fleet = fleets(6, store=lambda name: FileStore(tmp_path / name))
    server = fleet.server()
    requests = fleet.until(server, Stage.UNMASK)
    signers = sorted(server._signed)
    quorums = [signers[i : i + 4] for i in range(3)]
    bodies = [frames.bits(who, 6) + b"".join(server._signed[i] for i in who) for who in quorums]
    asked = [frames.write(fleet.attempt(), Stage.UNMASK, body) for body in bodies]
    assert requests["a"] == asked[0]

    def refused(request: bytes) -> str:
        try:
            fleet.answer("a", request)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as at_once:
        first, *others = sorted(at_once.map(refused, asked))
    assert first == ""
    assert all("asked twice, and not for the same" in why for why in others)


def test_what_a_crash_left_of_a_secret_is_gone_too(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    (tmp_path / "secrets.partial").write_bytes(b"half a key")
    store.put("secrets", b"key")
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o600
    (tmp_path / "secrets.partial").write_bytes(b"half a key")
    store.erase("secrets")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_that_cannot_be_recorded_does_not_leave(
    fleets: Any, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleets(4)
    server = fleet.server()
    requests = fleet.until(server, stage)
    store = fleet.stores["a"]

    def full(key: str, value: bytes) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", full)
        with pytest.raises(OSError, match="no space"):
            fleet.answer("a", requests["a"])
    assert (fleet.finish(server, requests).values == fleet.total(fleet.names)).all()
