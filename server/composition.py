"""What a ledger says beside a report: which other runs were charged to its accounts, and which rounds were lost."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from privacy.ledger import TESTS, Account, Ledger
from privacy.plan import Mechanism

Record = dict[str, Any]


class Beside(NamedTuple):
    """Null where there is no ledger."""

    other_runs: int | None
    """Runs other than this one that reserved anything on its accounts before its report."""
    lost_rounds: int | None
    """Rounds of this run that were reserved and of which nothing was committed: cut off, or no reply was good."""


def beside(path: str | None, run: str | None, sequence: int) -> Beside:
    """Reads the ledger at `path` up to its record `sequence`. Raises Refused for one that does not fit together."""
    if path is None or run is None:
        return Beside(None, None)
    ledger = Ledger(Path(path), keep=True)
    ledger.read()
    records = (ledger.records or [])[:sequence]
    reserved = [record for record in records if record["kind"] == "RESERVE"]
    mine = {record["account"] for record in reserved if record["run"] == run}
    others = {record["run"] for record in reserved if record["account"] in mine} - {run}
    return Beside(len(others), _lost(records, run))


def _lost(records: Sequence[Record], run: str) -> int:
    """A round's clients are committed together: an attempt of which none was, nor all made void, was cut off."""
    tests = {
        number
        for number, record in enumerate(records, 1)
        if record["kind"] == "OPEN" and record["dataset"].endswith(TESTS)  # an evaluation is no round
    }
    kinds: dict[tuple[int, int], Counter[str]] = {}
    for record in records:
        if record.get("run") == run and record["account"] not in tests:
            kinds.setdefault((record["round"], record["attempt"]), Counter())[record["kind"]] += 1
    return sum(not found["COMMIT"] and found["VOID"] < found["RESERVE"] for found in kinds.values())


def histories(records: Sequence[Record]) -> dict[Account, Counter[Mechanism]]:
    """What every account had spent after these records: each reservation in full, or what settled it says."""
    accounts: dict[int, Account] = {}
    spent: dict[tuple[Any, ...], tuple[Mechanism, int]] = {}
    for sequence, record in enumerate(records, 1):
        if record["kind"] == "OPEN":
            accounts[sequence] = Account(record["unit"], record["client"], record["dataset"])
        if record["kind"] not in ("RESERVE", "COMMIT", "VOID"):
            continue  # terms and evidence cost nothing
        key = record["account"], record["run"], record["round"], record["attempt"]
        if record["kind"] == "RESERVE":
            spent[key] = Mechanism(*record["mechanism"]), record["steps"]
        elif key in spent:
            spent[key] = spent[key][0], record.get("steps", 0)
    found: dict[Account, Counter[Mechanism]] = {}
    for (number, *_), (mechanism, steps) in spent.items():
        found.setdefault(accounts[number], Counter())[mechanism] += steps
    return found


def refusals(rows: Sequence[Record]) -> list[Record]:
    """{name, reason, times}: who was refused a round by a budget, most often first. Empty where draws are secret."""
    times: Counter[tuple[str, str]] = Counter(
        (entry["name"], entry["reason"].split(":")[0])
        for row in rows
        for entry in row["skipped"]
        if entry["reason"].startswith(("budget:", "ledger:"))
    )
    ordered = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "reason": reason, "times": count} for (name, reason), count in ordered]
