"""The ledger under whatever a crash, a disk, an editor or another process does to it: 0 under-counts."""

import fcntl
import hmac
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import accounting, chain, durable, recompute, shared_records
from privacy.chain import Head
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused

A, B = Account("example", "a", "digits"), Account("example", "b", "digits")
STEP = Mechanism(1.0, 10.0)
DELTA = 1e-3


@pytest.fixture(autouse=True, params=[shared_records.ALONE, 0], ids=["single", "shared"])
def _records(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds whether accounts have records of their own or share them."""
    monkeypatch.setattr(shared_records, "ALONE", request.param)


def opened(path: Path, budget: float | None = None) -> Ledger:
    made = Ledger(path)
    made.open({A: (budget, DELTA), B: (budget, DELTA)})
    return made


def steps(path: Path, account: Account = A) -> int:
    """What a process that comes later finds spent."""
    found = Ledger(path)
    found.read()
    return sum(found.accounts[account].history.values())


def ask(count: int, *accounts: Account) -> dict[Account, tuple[Mechanism, int]]:
    return dict.fromkeys(accounts or (A, B), (STEP, count))


def test_spending_carries_over_from_run_to_run(tmp_path: Path) -> None:
    path = tmp_path / "l.ledger"
    for run in ("one", "two"):
        made = opened(path)
        assert made.reserve(run, 1, ask(3)) == {}
        made.commit(run, 1, {A: 3, B: 3})
    assert (steps(path, A), steps(path, B)) == (6, 6)


def test_a_reservation_counts_in_full_until_its_commit_says_less_and_not_at_all_once_void(tmp_path: Path) -> None:
    path = tmp_path / "l.ledger"
    made = opened(path)
    made.reserve("run", 1, ask(5))
    assert steps(path) == 5
    made.commit("run", 1, {A: 2})
    assert (steps(path, A), steps(path, B)) == (2, 5)
    made.reserve("run", 2, ask(5))
    made.void("run", 2, [A])
    assert (steps(path, A), steps(path, B)) == (2, 10)


def test_only_the_process_that_reserved_may_void_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "l.ledger"
    made = opened(path)
    made.reserve("run", 1, ask(5))
    later = opened(path)
    with pytest.raises(Refused, match="may have touched data"):
        later.void("run", 1, [A])
    made.commit("run", 1, {A: 5})
    with pytest.raises(Refused, match="may have touched data"):
        made.void("run", 1, [A])
    made.void("run", 1, [B])
    with pytest.raises(Refused, match="may have touched data"):
        made.void("run", 1, [B])
    assert (steps(path, A), steps(path, B)) == (5, 0)


def test_a_round_that_is_repeated_is_a_new_attempt_and_both_count(tmp_path: Path) -> None:
    path = tmp_path / "l.ledger"
    opened(path).reserve("run", 1, ask(5))
    again = opened(path)
    assert again.unanswered("run", 0) == {A: 5, B: 5}
    assert again.unanswered("run", 1) == {}
    assert again.unanswered("other", 0) == {}
    again.reserve("run", 1, ask(5))
    again.commit("run", 1, {A: 4, B: 5})
    assert (steps(path, A), steps(path, B)) == (9, 10)
    assert again.unanswered("run", 0) == {A: 5, B: 5}


def test_the_gate_refuses_the_first_round_that_would_pass_the_budget_and_says_what_is_left(tmp_path: Path) -> None:
    path, budget = tmp_path / "l.ledger", accounting.epsilon({STEP: 7}, DELTA)
    made = opened(path, budget)
    for number in (1, 2, 3):
        assert made.reserve("run", number, ask(2, A)) == {}
    left = budget - accounting.epsilon({STEP: 6}, DELTA)
    assert made.over(ask(2)) == {A: f"{left:.3g} of its {budget:g} is left, which does not pay for a round"}
    assert made.reserve("run", 4, ask(2)).keys() == {A}
    assert (steps(path, A), steps(path, B)) == (6, 2)
    assert made.reserve("run", 5, ask(1, A)) == {}, "what exactly fits is granted"


def test_budget_and_delta_stay_as_the_account_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "l.ledger"
    opened(path)
    made = opened(path, 5.0)  # the first budget that is given counts
    made.open({A: (None, 0.5), B: (5.0, 0.5)})
    assert [(s.budget, s.delta) for s in made.accounts.values()] == [(5.0, DELTA)] * 2
    before = path.read_bytes()
    with pytest.raises(Refused, match=r"opened with a budget of 5 .*keeps it"):
        made.open({A: (6.0, DELTA)})
    assert path.read_bytes() == before


@pytest.mark.parametrize("terms", [(0.0, DELTA), (-1.0, DELTA), (float("nan"), DELTA), (float("inf"), DELTA), (1.0, 1)])
def test_terms_that_mean_nothing_are_refused(tmp_path: Path, terms: tuple[float, float]) -> None:
    with pytest.raises(Refused, match="an account needs"):
        Ledger(tmp_path / "l.ledger").open({A: terms})
    assert not (tmp_path / "l.ledger").read_bytes()


def test_a_ledger_that_was_never_written_is_empty(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "l.ledger").read().sequence == 0
    assert not list(tmp_path.iterdir())


def test_accounts_that_are_charged_alike_share_their_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_records, "ALONE", 100)
    accounts = [Account("example", f"client-{at:05}", "digits") for at in range(10_000)]
    made = Ledger(path := tmp_path / "l.ledger")
    made.open(dict.fromkeys(accounts, (None, DELTA)), data={one: f"{at:064x}" for at, one in enumerate(accounts)})
    opening = made.chain.head.sequence
    made.reserve("run", 1, ask(3, *accounts))
    made.commit("run", 1, dict.fromkeys(accounts[:5000], 3) | dict.fromkeys(accounts[5000:9990], 1))
    assert opening < 30
    assert made.chain.head.sequence == opening + 3
    made.reserve("run", 2, ask(2, accounts[9995]))  # few, but without records of their own
    found = Ledger(path)
    found.read()
    assert [sum(found.accounts[one].history.values()) for one in accounts] == [3] * 5000 + [1] * 4990 + [3] * 5 + [
        5
    ] + [3] * 4
    assert found.accounts[accounts[77]].digest == f"{77:064x}"
    assert found.unanswered("run", 1) == {accounts[9995]: 2}
    cost = {count: accounting.epsilon({STEP: count}, DELTA) for count in (1, 3, 5)}
    recomputed = [row["epsilon"] for row in recompute.accounts(recompute.records(path))]
    assert recomputed[4999:5001] + recomputed[9995:9996] == pytest.approx([cost[3], cost[1], cost[5]], rel=1e-3)


def test_accounts_that_stand_alike_share_one_standing_that_never_changes(tmp_path: Path) -> None:
    """Whoever was charged as often by one mechanism stands alike: there are as many standings as counts."""
    accounts = [Account("example", f"client-{at:05}", "digits") for at in range(5_000)]
    made, random = Ledger(tmp_path / "l.ledger"), np.random.default_rng(1)
    made.open(dict.fromkeys(accounts, (None, DELTA)))
    before = made.accounts.of(accounts)
    for number in range(1, 9):
        asked = ask(3, *(accounts[at] for at in sorted(random.choice(5_000, 1_000, replace=False))))
        made.reserve("run", number, asked)
        made.commit("run", number, dict.fromkeys(asked, 3))
    standings = {id(one): one for one in made.accounts.of(accounts).values()}
    hours = {at for one in standings.values() for at, _ in one.dated}
    assert len(standings) <= 9 ** len(hours)
    assert {sum(one.history.values()) for one in before.values()} == {0}


# ---- what a disk or an editor does ----


def written(folder: Path) -> tuple[Path, list[int]]:
    """A ledger of several rounds, and where each of its records ends."""
    path = folder / "l.ledger"
    made = opened(path)
    for number in (1, 2):
        made.reserve("run", number, ask(number))
        made.commit("run", number, {A: 1, B: number})
    made.reserve("run", 4, ask(4, A))
    data, ends = path.read_bytes(), [15]
    while ends[-1] < len(data):
        ends.append(ends[-1] + 68 + int.from_bytes(data[ends[-1] : ends[-1] + 4]))
    return path, ends


def test_no_flip_of_a_single_bit_goes_unnoticed(tmp_path: Path) -> None:
    path, ends = written(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (1 << (at % 8),) if at % 29 else tuple(1 << b for b in range(8)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with pytest.raises(Refused):
                Ledger(path).read()
    path.write_bytes(whole)
    assert Ledger(path).read().sequence == len(ends) - 1


def test_every_cut_behind_the_head_is_refused_and_every_cut_beyond_it_is_a_torn_tail(tmp_path: Path) -> None:
    path, ends = written(tmp_path)
    head = path.with_name("l.ledger.head")
    anchored, whole = head.read_bytes(), path.read_bytes()
    for cut in sorted({*range(0, len(whole), 17), *ends[:-1], *range(ends[-2], len(whole))}):
        path.write_bytes(whole[:cut])
        with pytest.raises(Refused, match="head file"):
            Ledger(path).read()
        with pytest.raises(Refused):
            opened(path)
        assert path.read_bytes() == whole[:cut], "a refused ledger stays as it was"
    copy, key = tmp_path / "copy.ledger", path.with_name("l.ledger.key")
    shutil.copy(key, tmp_path / "copy.ledger.key")
    for cut in range(ends[-2], len(whole)):  # the head that stood before the last record was written
        for garbage in (b"", b"\xff") if cut % 5 == 0 else (b"",):
            copy.write_bytes(whole[:cut] + garbage * (cut > ends[-2] and len(whole) - cut > 1))
            path.write_bytes(whole)
            copy.with_name("copy.ledger.head").write_text(_head_at(path, ends, len(ends) - 2))
            assert steps(copy) == 2, "rounds 1 and 2, by their commits"
            opened(copy).reserve("run", 4, ask(9, A))
            assert steps(copy) == 11
    assert head.read_bytes() == anchored


def _head_at(path: Path, ends: list[int], sequence: int) -> str:
    """The head file as it stood after record `sequence`."""
    digest = path.read_bytes()[ends[sequence - 1] + 4 : ends[sequence - 1] + 36].hex()
    key = path.with_name(path.name + ".key").read_bytes()
    tag = hmac.new(key, f"head {sequence} {digest}".encode(), "sha256").hexdigest()
    return json.dumps([sequence, digest, tag])


def test_a_missing_or_foreign_half_is_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    head = path.with_name("l.ledger.head")
    whole, anchor = path.read_bytes(), head.read_bytes()
    for ledger_bytes, head_bytes, words in (
        (whole, None, "head file is missing"),
        (None, anchor, "ends after record 0"),
        (b"", anchor, "ends after record 0"),
        (whole, b"[3", "head file is damaged"),
        (whole, b"[-1, 5]", "head file is damaged"),
        (whole, b'[-1, "5", "x"]', "not the one that its head file names"),
        (whole, json.dumps([2, "0" * 64, "0" * 64]).encode(), "not the one that its head file names"),
        (whole.replace(b"ledger 2", b"ledger 1", 1), anchor, "of another version"),
        (b'{"round": 1}\n', anchor, "no ledger"),
    ):
        for file, content in ((path, ledger_bytes), (head, head_bytes)):
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
        with pytest.raises(Refused, match=words) as caught:
            Ledger(path).read()
        assert "\n" not in str(caught.value)


def test_who_has_no_key_cannot_write_a_record_a_head_or_a_whole_ledger(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    key, head = path.with_name("l.ledger.key"), path.with_name("l.ledger.head")
    assert key.stat().st_mode & 0o777 == 0o600
    (other := tmp_path / "forged").mkdir()
    forged, _ = written(other)  # whole and sound, under a key of the forger's own
    Ledger(forged).read()
    mine = {file: file.read_bytes() for file in (path, head)}
    for changed in ((path, head), (path,), (head,)):
        for file in changed:
            shutil.copy(other / file.name, file)
        with pytest.raises(Refused, match=r"key|head file names"):
            Ledger(path).read()
        with pytest.raises(Refused):
            opened(path)
        for file, content in mine.items():
            file.write_bytes(content)
    tag = json.loads(head.read_bytes())[2]
    head.write_text(head.read_text().replace(tag, "0" * 64))
    with pytest.raises(Refused, match="head file was not written with this ledger's key"):
        Ledger(path).read()


def test_a_ledger_without_its_key_is_refused_with_the_way_out_and_read_by_its_digests_alone(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    path.with_name("l.ledger.key").unlink()
    for use in (lambda: Ledger(path).read(), lambda: opened(path)):
        with pytest.raises(Refused, match=r"key l\.ledger\.key is missing.*umbel ledger adopt"):
            use()
    assert not path.with_name("l.ledger.key").exists()
    assert Ledger(path, keyed=False).read().sequence == len(recompute.records(path))


def test_time_never_runs_backwards_and_a_record_in_which_it_does_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = tmp_path / "l.ledger", [2000]
    monkeypatch.setattr(chain.time, "time", lambda: clock[0])
    made = opened(path)
    clock[0] = 1000
    made.reserve("run", 1, ask(1))
    assert {body["time"] for body in recompute.records(path)} == {2000}
    with made.chain.held() as file, pytest.raises(Refused, match="does not follow"):
        made.chain.append(file, [{"kind": "DATA", "account": 1, "digest": "d", "time": 1999}])


def test_a_change_of_data_is_written_down_as_evidence_and_spending_stays(tmp_path: Path) -> None:
    made = opened(path := tmp_path / "l.ledger")
    made.reserve("run", 1, ask(3))
    for digest in ("one", "one", "two", "one"):
        opened(path).open({A: (None, DELTA)}, data={A: digest})
    found = Ledger(path)
    found.read()
    assert (found.accounts[A].digest, found.accounts[A].changes, found.accounts[B].changes) == ("one", 2, 0)
    told = [body for body in recompute.records(path) if body["kind"] == "DATA"]
    assert [body.get("digest") or body["digests"][0] for body in told] == ["one", "two", "one"]
    assert steps(path) == 3


def test_two_processes_on_one_ledger_wait_for_each_other(tmp_path: Path) -> None:
    path, count = tmp_path / "l.ledger", 40
    code = f"""
from pathlib import Path
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
import os
known, book = Account("example", "a", "digits"), Ledger(Path({str(path)!r}))
for number in range(1, {count} + 1):
    book.open({{known: (None, {DELTA})}})
    assert book.reserve(str(os.getpid()), number, {{known: (Mechanism(1.0, 10.0), 3)}}) == {{}}
    book.commit(str(os.getpid()), number, {{known: 2}})
"""
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, cwd=Path(chain.__file__).parents[1]) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert steps(path) == 2 * count * 2
    assert len({body["run"] for body in recompute.records(path) if body["kind"] == "RESERVE"}) == 2


def test_a_file_that_is_rolled_back_with_its_head_is_not_what_its_peer_saw(tmp_path: Path) -> None:
    path = tmp_path / "l.ledger"
    opened(path).reserve("run", 1, ask(1))
    shutil.copytree(tmp_path, tmp_path / "old")
    seen = opened(path)
    seen.reserve("run", 2, ask(1))
    assert Ledger(path).holds(seen.chain.head)
    assert not Ledger(tmp_path / "old" / "l.ledger").holds(seen.chain.head)
    assert not Ledger(path).holds(Head(seen.chain.head.sequence, "0" * 64))


def test_a_file_that_shrinks_while_it_is_used_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.ledger"
    made = opened(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Refused, match="become shorter"):
        made.reserve("run", 1, ask(1))


def test_a_record_that_does_not_follow_is_refused_though_its_digest_fits(tmp_path: Path) -> None:
    path = tmp_path / "l.ledger"
    made = opened(path)
    whose = {"account": 1} if shared_records.ALONE else {"accounts": [[0, 0]]}
    rest = {"run": "run", "round": 1, "attempt": 1}
    asked = {"kind": "RESERVE", **rest, "mechanism": [1.0, 5.0], "steps": 4}
    bodies: list[dict[str, Any]] = [
        {"kind": "COMMIT", **whose, **rest, "steps": 0},
        {"kind": "VOID", **whose, **rest},
        asked | whose | {"steps": -4},
        asked | {"account": 9},
        {"kind": "REFUND", **whose, **rest},
        *(asked | {"accounts": ranges} for ranges in ([], [[0, 2]], [[1, 0]], [[-1, 0]], [[0, 0], [0, 1]], [[0, 1e9]])),
        {"kind": "DATA", "accounts": [[0, 1]], "digests": ["d"]},
    ]
    for number, body in enumerate(bodies):
        shutil.copytree(tmp_path, other := tmp_path.parent / f"{tmp_path.name}-{number}")
        forged = Ledger(other / path.name)
        forged.chain._take = lambda sequence, body: None
        with forged.chain.held() as file:
            forged.chain.append(file, [body])
        with pytest.raises(Refused, match="does not follow"):
            Ledger(other / path.name).read()
    assert made.accounts[A].history == {}


def test_a_full_disk_reserves_nothing_and_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l.ledger"
    made = opened(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(Refused, match="No space left on device"):
            made.reserve("run", 1, ask(1))
    assert path.read_bytes() == before
    assert made.reserve("run", 1, ask(1)) == {}
    assert steps(path) == 1


def test_a_ledger_that_another_process_holds_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "l.ledger"
    made = opened(path)
    monkeypatch.setattr(chain, "_PATIENCE", 0.05)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Refused, match="held by another process"):
            made.reserve("run", 1, ask(1))
    assert made.reserve("run", 1, ask(1)) == {}, "the refusal let go of the lock"


# ---- what a run of rounds does (kills: tests/server/test_ledger_kills.py) ----


ACTIONS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(0, 30)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(ACTIONS)
def test_no_sequence_of_rounds_runs_and_restarts_passes_the_budget(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[int, int, int]]
) -> None:
    path, budget = tmp_path_factory.mktemp("gate") / "l.ledger", 1.5
    released, made = 0, opened(path, budget)
    for number, (kind, count, taken) in enumerate(actions, 1):
        if kind == 0:  # a restart, of the same run or of another
            made = opened(path, budget)
        if A not in made.reserve("run" if kind else f"run-{number}", number, ask(count, A)):
            released += min(taken, count) if kind == 2 else count
            if kind == 2:
                made.commit("run", number, {A: min(taken, count)})
        assert accounting.epsilon({STEP: released}, DELTA) <= budget
        assert steps(path) == released
    assert made.reserve("run", 99, ask(10_000, A)).keys() == {A}


def test_an_independent_script_finds_the_same_epsilon_in_the_same_bytes(tmp_path: Path) -> None:
    path, sampled = tmp_path / "l.ledger", Mechanism(0.2, 3.0)
    made = opened(path)
    for number in (1, 2, 3):
        made.reserve("run", number, {A: (STEP, 5), B: (sampled, 20)})
        made.commit("run", number, {A: 4})
    made.reserve("run", 4, ask(50))
    made.void("run", 4, [A, B])
    rows = recompute.accounts(recompute.records(path))
    assert [(row["client"], row["unit"], row["dataset"], row["delta"]) for row in rows] == [
        ("a", "example", "digits", DELTA),
        ("b", "example", "digits", DELTA),
    ]
    for row, history in zip(rows, ({STEP: 12}, {sampled: 60}), strict=True):
        assert row["epsilon"] == pytest.approx(accounting.epsilon(history, DELTA), rel=5e-3)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        recompute.records(path)


@pytest.mark.parametrize(
    ("number", "attempt", "count"), [(0, 1, 1), (2**53, 1, 1), (1, 2**53, 1), (1, -1, 1), (1, 1, 0), (1, 1, 2**53)]
)
def test_numbers_that_no_record_holds_are_refused_before_they_are_written(
    tmp_path: Path, number: int, attempt: int, count: int
) -> None:
    made = opened(path := tmp_path / "l.ledger")
    before = path.read_bytes()
    with pytest.raises(Refused, match="a ledger counts from 1"):
        made.reserve("run", number, ask(count), attempt)
    assert path.read_bytes() == before


def test_the_largest_numbers_are_written_and_read(tmp_path: Path) -> None:
    most = 2**53 - 1
    made = opened(path := tmp_path / "l.ledger")
    assert made.reserve("run", most, ask(1), most) == {}
    assert steps(path) == 1
    assert made.attempt("run", A) == (most, most)


def test_a_record_that_nobody_could_read_is_not_written(tmp_path: Path) -> None:
    made = opened(path := tmp_path / "l.ledger")
    before = path.read_bytes()
    with pytest.raises(Refused, match="does not go into a ledger"):
        made.reserve("r" * 70_000, 1, ask(1))
    assert path.read_bytes() == before


def test_shared_records_of_short_digests_are_no_longer_than_can_be_read() -> None:
    records = list(shared_records.seeing({2 * at: "x" for at in range(9000)}))
    assert len(records) > 1
    assert sum(len(record["digests"]) for record in records) == 9000
    assert max(len(json.dumps(record)) for record in records) < 1 << 16
