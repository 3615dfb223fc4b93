"""What a ledger says beside a report: which other runs were charged to its accounts, and which rounds were lost."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from privacy.ledger import Ledger

Record = dict[str, Any]


class Beside(NamedTuple):
    """Null where there is no ledger."""

    other_runs: int | None
    """Runs other than this one that reserved anything on its accounts before its report."""
    lost_rounds: int | None
    """Rounds of this run that were reserved and neither committed nor void, and then begun anew."""


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
    """A round that was begun anew has a later attempt; what was lost are the attempts before, unless they were void."""
    of_run = [record for record in records if record.get("run") == run]
    tries = {(record["round"], record["attempt"]) for record in of_run if record["kind"] == "RESERVE"}
    void = Counter((record["round"], record["attempt"]) for record in of_run if record["kind"] == "VOID")
    kept = Counter((record["round"], record["attempt"]) for record in of_run if record["kind"] == "RESERVE")
    last: dict[int, int] = {}
    for number, attempt in tries:
        last[number] = max(attempt, last.get(number, 0))
    return sum(attempt < last[number] and void[number, attempt] < kept[number, attempt] for number, attempt in tries)


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
