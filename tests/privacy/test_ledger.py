"""The ledger never forgets a reservation, whatever byte a crash cuts it at."""

from pathlib import Path

import pytest

from privacy.ledger import Ledger
from privacy.refused import Refused


def test_reservations_without_a_committed_round_count_as_spent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.reserve(1, {"a": 2, "b": 1})
    ledger.reserve(2, {"a": 2})
    ledger.reserve(2, {"a": 2, "b": 1})
    assert ledger.unanswered(2) == {}
    assert ledger.unanswered(1) == {"a": 4, "b": 1}
    assert ledger.unanswered(0) == {"a": 6, "b": 2}


def test_a_missing_ledger_has_nothing_to_answer(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger.jsonl").unanswered(0) == {}


def test_no_cut_of_the_last_line_loses_an_earlier_reservation(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).reserve(1, {"a": 3})
    first = path.read_bytes()
    Ledger(path).reserve(2, {"a": 5})
    whole = path.read_bytes()
    for cut in range(len(first), len(whole)):
        path.write_bytes(whole[:cut])
        assert Ledger(path).unanswered(0) == {"a": 3}
        Ledger(path).reserve(2, {"a": 7})
        assert Ledger(path).unanswered(0) == {"a": 10}


def test_a_damaged_whole_line_is_refused_and_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).reserve(1, {"a": 3})
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"a') + b'{"round": 2, "steps": {"a": 1}}\n')
    with pytest.raises(Refused, match="line 1 is damaged"):
        Ledger(path).unanswered(0)
