"""The private file of the devices' heads: what it keeps, what it gives away, and which file is refused."""

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy import heads
from privacy.ledger import Account, Head, Ledger
from privacy.refused import Refused

A, B = (Account("example", name, "wards") for name in "ab")
DIGESTS = st.integers(0, 2**256 - 1).map("{:064x}".format)
HEADS = st.dictionaries(st.sampled_from([A, B]), st.builds(Head, st.integers(0, 2**60), DIGESTS))


def made(folder: Path) -> Ledger:
    ledger = Ledger(folder / "devices.ledger")
    ledger.open({A: (None, 1e-3), B: (None, 1e-3)})
    return ledger


def head(sequence: int) -> Head:
    return Head(sequence, f"{sequence:064x}")


@given(known=HEADS, news=HEADS)
def test_of_each_account_the_furthest_head_is_read_back_by_any_process(
    tmp_path_factory: pytest.TempPathFactory, known: dict[Account, Head], news: dict[Account, Head]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    heads.keep(made(folder), known)
    kept = heads.keep(Ledger(folder / "devices.ledger"), news)
    assert kept == heads.read(Ledger(folder / "devices.ledger"))
    assert kept.keys() == known.keys() | news.keys()
    for account, one in kept.items():
        said = [each[account] for each in (known, news) if account in each]
        assert one in said
        assert one.sequence == max(each.sequence for each in said)


def test_two_runs_on_one_ledger_keep_what_either_of_them_heard(tmp_path: Path) -> None:
    one, other = made(tmp_path), made(tmp_path)
    heads.keep(one, {A: head(5)})
    heads.keep(other, {A: head(3), B: head(4)})
    assert heads.keep(one, {}) == {A: head(5), B: head(4)}


def test_neither_length_nor_order_nor_an_earlier_head_tells_who_was_drawn(tmp_path: Path) -> None:
    first, second = (made(tmp_path / name) for name in ("one", "two"))
    heads.keep(first, {A: head(9), B: head(9)})
    heads.keep(second, {B: head(9), A: head(9)})
    before = heads.place(first).read_bytes()
    assert before.partition(b"\n")[2] == heads.place(second).read_bytes().partition(b"\n")[2]
    heads.keep(first, {B: head(1234)})
    after = heads.place(first).read_bytes()
    assert len(after) == len(before)
    assert after.count(head(9).digest.encode()) == 1, "the old head of b is gone"


def test_the_file_is_for_its_owner_alone_even_where_a_crash_left_an_open_one(tmp_path: Path) -> None:
    ledger, old = made(tmp_path), os.umask(0)
    try:
        (tmp_path / "devices.heads.partial").write_bytes(b"left")
        (tmp_path / "devices.heads.partial").chmod(0o644)
        heads.keep(ledger, {A: head(5)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(heads.place(ledger).stat().st_mode) == 0o600


def test_a_fleet_without_ledgers_of_its_own_has_no_such_file(tmp_path: Path) -> None:
    assert heads.keep(made(tmp_path), {}) == {}
    assert not heads.place(made(tmp_path)).exists()


def test_a_missing_file_knows_nothing_and_an_older_one_what_it_knew(tmp_path: Path) -> None:
    ledger = made(tmp_path)
    heads.keep(ledger, {A: head(5)})
    old = heads.place(ledger).read_bytes()
    heads.keep(ledger, {A: head(8)})
    heads.place(ledger).write_bytes(old)
    assert heads.read(ledger) == {A: head(5)}
    heads.place(ledger).unlink()
    assert heads.read(ledger) == {}


def test_any_changed_or_missing_byte_is_refused_in_one_line_and_nothing_is_written_over_it(tmp_path: Path) -> None:
    ledger = made(tmp_path)
    heads.keep(ledger, {A: head(5), B: head(7)})
    path = heads.place(ledger)
    whole, before = path.read_bytes(), ledger.path.read_bytes()
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for content in [*damaged, whole[:-1], whole[:40], b"", b"[" * 10_000]:
        path.write_bytes(content)
        for act in (lambda: heads.read(ledger), lambda: heads.keep(ledger, {A: head(9)})):
            with pytest.raises(Refused, match=r"devices\.heads is damaged.*or delete it") as caught:
                act()
            assert "\n" not in str(caught.value)
        assert (path.read_bytes(), ledger.path.read_bytes()) == (content, before)


def test_the_file_of_another_ledger_or_of_one_that_is_gone_is_refused(tmp_path: Path) -> None:
    mine, other = made(tmp_path / "mine"), made(tmp_path / "other")
    heads.keep(other, {A: head(5)})
    heads.place(mine).write_bytes(heads.place(other).read_bytes())
    with pytest.raises(Refused, match="not written with the key"):
        heads.read(mine)
    for path in (tmp_path / "other").glob("devices.ledger*"):
        path.unlink()
    with pytest.raises(Refused, match="bring both back"):
        heads.read(Ledger(other.path))


def test_forgetting_a_client_leaves_the_others_and_every_account_as_they_are(tmp_path: Path) -> None:
    ledger = made(tmp_path)
    heads.keep(ledger, {A: head(5), B: head(7)})
    before = ledger.path.read_bytes()
    assert [heads.forget(ledger, "a"), heads.forget(ledger, "a")] == [1, 0]
    assert heads.read(ledger) == {B: head(7)}
    assert ledger.path.read_bytes() == before
    assert "a" not in {json.loads(line)[1] for line in heads.place(ledger).read_bytes().splitlines()[1:]}
