"""umbel ledger adopt: no account is lowered, whatever was lost on either side and wherever it is cut off."""

import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import adopt as adoption
from privacy import recompute, shared_records
from privacy.adopt import adopt
from privacy.chain import Head
from privacy.ledger import Account, Ledger, Window
from privacy.plan import Mechanism
from privacy.refused import Refused

A, B = Account("example", "a", "wards"), Account("example", "b", "wards")
STEP, OTHER = Mechanism(1.0, 10.0), Mechanism(0.2, 2.0)
DELTA = 1e-3


@pytest.fixture(autouse=True, params=[shared_records.ALONE, 0], ids=["single", "shared"])
def _records(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds whether accounts have records of their own or share them."""
    monkeypatch.setattr(shared_records, "ALONE", request.param)


def read(path: Path, keyed: bool = True) -> Ledger:
    found = Ledger(path, keep=True, keyed=keyed)
    found.read()
    return found


def history(path: Path, account: Account = A) -> Counter[Mechanism]:
    return +read(path).accounts[account].history if account in read(path).accounts else Counter()


def pair(folder: Path, rounds: int = 5, alone: int = 0) -> tuple[Path, Path, list[Head]]:
    """A server's ledger and a device's, as `rounds` rounds leave them, and the server's head in each round."""
    server, node, heads = Ledger(folder / "devices.ledger"), Ledger(folder / "node" / "node.ledger"), list[Head]()
    server.open({A: (20.0, DELTA), B: (None, DELTA)})
    node.open({A: (9.0, DELTA)}, Window(30, 5.0))
    if alone:  # what the server has lost, or never knew
        node.reserve("alone", 1, {A: (OTHER, alone)})
    for number in range(1, rounds + 1):
        server.reserve("run", number, {A: (STEP, 4), B: (OTHER, 6)})
        heads.append(server.chain.head)
        node.reserve("run", number, {A: (STEP, 4)}, 1, {A: heads[-1]})
        seen = node.chain.head
        node.commit("run", number, {A: 3})
        server.commit("run", number, {A: 3, B: 6}, {A: seen})
    return server.path, node.path, heads


def lose(path: Path, how: str) -> None:
    whole = path.read_bytes()
    for part in {"all": ("", ".head", ".key"), "file": ("",), "head": (".head",), "key": (".key",)}.get(how, ()):
        path.with_name(path.name + part).unlink()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    if how == "wrong key":
        path.with_name(path.name + ".key").write_bytes(bytes(32))
    if how == "edited":
        path.write_bytes(whole.replace(b'"steps":4', b'"steps":1', 1))


@pytest.mark.parametrize("how", ["all", "file", "head", "key", "wrong key", "cut", "edited", "nothing"])
@pytest.mark.parametrize("side", ["server", "node"])
def test_a_lost_ledger_comes_back_with_all_that_its_other_side_knows(tmp_path: Path, how: str, side: str) -> None:
    server, node, heads = pair(tmp_path)
    lost, peer = (server, node) if side == "server" else (node, server)
    before, seen = read(lost), read(peer).seen[A]
    last = before.chain.head
    lose(lost, how)
    kept = {path.name: path.read_bytes() for path in lost.parent.glob(f"{lost.name}*")}
    charged, aside = adopt(lost, [peer], ["a"])
    after = read(lost)
    assert after.accounts[A].history[STEP] >= 15
    assert [each.now for each in charged if each.account == A] == [after.accounts[A].history[STEP]]
    assert {path.read_bytes() for path in aside} == set(kept.values()), "nothing is deleted"
    assert (after.holds(seen), after.holds(Head(4, "0" * 64))) == (True, False), "what the peer saw of it is settled"
    if how in ("head", "key", "wrong key", "nothing"):
        assert after.holds(last)
        assert after.accounts[A].history == before.accounts[A].history
        terms = after.accounts[A]
        assert (terms.budget, terms.window) == (before.accounts[A].budget, before.accounts[A].window)
    if side == "server":
        assert all(after.holds(head) for head in heads), "a run folder's checkpoint has one of them"
    assert lost.with_name(lost.name + ".key").read_bytes() != bytes(32)
    assert after.reserve("run", 6, {A: (STEP, 1)}) == {}
    rows = {row["client"]: row["epsilon"] for row in recompute.accounts(recompute.records(lost))}
    assert rows["a"] == pytest.approx(read(lost).accounts[A].epsilon, rel=5e-3)


def test_a_device_takes_over_its_own_client_alone(tmp_path: Path) -> None:
    server, node, _ = pair(tmp_path)
    lose(node, "all")
    adopt(node, [server], ["a"])
    assert read(node).accounts.keys() == {A}
    assert read(node).accounts[A].budget == 20.0, "the peer's terms, where none of its own are left"
    with pytest.raises(Refused, match="reserved before"):  # what it answered then is never run again
        read(node).reserve("run", 5, {A: (STEP, 4)}, 1)


def test_a_server_gathers_its_accounts_from_every_device(tmp_path: Path) -> None:
    server, node, _ = pair(tmp_path)
    other = Ledger(tmp_path / "other" / "node.ledger")
    other.open({B: (None, DELTA)})
    other.reserve("run", 1, {B: (OTHER, 6)}, 1)
    lose(server, "all")
    adopt(server, [node, other.path])
    assert (history(server, A), history(server, B)) == ({STEP: 15}, {OTHER: 6})


def test_adopting_again_charges_nothing_twice(tmp_path: Path) -> None:
    server, node, _ = pair(tmp_path)
    lose(node, "cut")
    for _ in range(3):
        adopt(node, [server], ["a"])
    assert history(node) == {STEP: 15} or history(node)[STEP] <= 16  # one lost COMMIT may stay counted in full
    first = history(node)
    adopt(node, [server, server], ["a"])
    assert history(node) == first


COUNTS = st.lists(st.tuples(st.sampled_from([STEP, OTHER]), st.integers(1, 9), st.integers(0, 9)), max_size=5)


@settings(max_examples=20, deadline=None)
@given(COUNTS, COUNTS, COUNTS)
def test_no_account_is_ever_lowered(
    tmp_path_factory: pytest.TempPathFactory, both: list[Any], mine: list[Any], theirs: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("adopt")
    own, peer = Ledger(folder / "own.ledger"), Ledger(folder / "peer.ledger")
    for book, moves in ((own, both + mine), (peer, both + theirs)):
        book.open({A: (None, DELTA)})
        for number, (mechanism, steps, taken) in enumerate(moves, 1):
            book.reserve("run", number, {A: (mechanism, steps)})
            if taken <= steps:
                book.commit("run", number, {A: taken})
    before, other = history(own.path), history(peer.path)
    adopt(own.path, [peer.path])
    after = history(own.path)
    assert all(after[m] >= max(before[m], other[m]) for m in (STEP, OTHER))
    assert all(after[m] <= before[m] + other[m] for m in (STEP, OTHER))
    adopt(own.path, [peer.path])
    assert history(own.path) == after


def test_a_peer_that_is_no_good_changes_nothing(tmp_path: Path) -> None:
    server, node, _ = pair(tmp_path)
    lose(node, "cut")
    before = {path: path.read_bytes() for path in node.parent.iterdir()}
    with pytest.raises(Refused, match="there is no ledger"):
        adopt(node, [tmp_path / "nowhere.ledger"])
    for how in ("head", "cut"):
        shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{how}")
        peer = tmp_path.parent / f"{tmp_path.name}-{how}" / server.name
        lose(peer, how)
        with pytest.raises(Refused, match="head file"):
            adopt(node, [peer])
    assert {path: path.read_bytes() for path in node.parent.iterdir()} == before


def test_killed_at_any_line_it_is_refused_or_charged_in_full(tmp_path: Path) -> None:
    """SIGKILL at every line of adopt.py; a ledger that opens has all its steps, and adopting again mends the rest."""
    _, node, _ = pair(tmp_path / "whole", 3, alone=5)
    lose(node, "cut")
    lose(node, "key")

    def work(folder: Path, stop: int, count: list[int]) -> None:
        def trace(frame: Any, kind: str, _: Any) -> Any:
            if frame.f_code.co_filename != adoption.__file__:
                return None
            if kind == "line":
                count[0] += 1
                if count[0] == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            adopt(folder / "node" / "node.ledger", [folder / "devices.ledger"], ["a"])
        finally:
            sys.settrace(None)

    shutil.copytree(tmp_path / "whole", tmp_path / "counted")
    work(tmp_path / "counted", 0, total := [0])
    ends = range(total[0] - 45, total[0] + 1)  # the exchange of the files, where it matters, line by line
    for stop in {*range(1, total[0], 41), *ends}:
        shutil.copytree(tmp_path / "whole", folder := tmp_path / f"killed-{stop}")
        if (child := os.fork()) == 0:
            try:
                work(folder, stop, [0])
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        path = folder / "node" / "node.ledger"
        try:
            assert history(path)[STEP] >= 9, f"line {stop}"
            assert history(path)[OTHER] == 5, f"line {stop}"
        except Refused:
            adopt(path, [folder / "devices.ledger"], ["a"])
            assert history(path)[STEP] >= 9, f"line {stop}, adopted again"
            assert history(path)[OTHER] == 5, f"line {stop}, adopted again"
