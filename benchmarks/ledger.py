"""What the ledger costs: a record, a round of reservations and commits, and opening it again with every check.

    python benchmarks/ledger.py [--rounds N] [--folder DIR] [--json FILE]

A group is the reservations of one round: so many records in one write and one fsync, then the head file, with its own
fsync and rename. The baseline is a bare append with one fsync for every client, the way such a file is usually
written. Disks differ: --folder chooses where to write. No account has a budget, so that the accountant is not measured.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism

STEP = Mechanism(1.0, 10.0)


def median_ms(rounds: int, work: Callable[[int], object]) -> float:
    """Milliseconds of one call."""
    times = []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        work(number)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def measure(clients: int, rounds: int, folder: Path) -> dict[str, float]:
    """Milliseconds of a round's reservations, its commits and the baseline; of opening all again; bytes a record."""
    accounts = [Account("example", f"client-{i:04d}", "data") for i in range(clients)]
    ledger = Ledger(folder / f"{clients}.ledger")
    ledger.open(dict.fromkeys(accounts, (None, 1e-5)))

    def reserve(number: int) -> None:
        ledger.reserve("run", number, dict.fromkeys(accounts, (STEP, 1)))

    def commit(number: int) -> None:
        ledger.commit("run", number, dict.fromkeys(accounts, 1))

    def bare(number: int) -> None:
        with (folder / f"{clients}.bare").open("ab") as file:
            for account in accounts:
                file.write(json.dumps([number, account.client, 1]).encode())
                file.flush()
                os.fsync(file.fileno())

    groups, commits = [], []
    for number in range(1, rounds + 1):  # in turns, as a run writes them
        groups.append(median_ms(1, lambda _, number=number: reserve(number)))
        commits.append(median_ms(1, lambda _, number=number: commit(number)))
    found = {"group, durable": statistics.median(groups), "its commits": statistics.median(commits)}
    found["an fsync a client"] = median_ms(min(rounds, 5), bare)
    found["a record"] = (found["group, durable"] + found["its commits"]) / (2 * clients)
    began = time.perf_counter()
    records = Ledger(ledger.path).read().sequence
    found["open and verify"] = 1e3 * (time.perf_counter() - began)
    found["records"] = records
    found["bytes a record"] = ledger.path.stat().st_size / records
    return found


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default 20)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="umbel-bench-", dir=chosen.folder) as folder:
        found = {f"{clients:,} clients": measure(clients, chosen.rounds, Path(folder)) for clients in (1, 20, 1000)}
    print(f"{'milliseconds':14} " + " ".join(f"{name:>18}" for name in next(iter(found.values()))))
    for name, values in found.items():
        print(f"{name:14} " + " ".join(f"{value:18.3f}" for value in values.values()))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
