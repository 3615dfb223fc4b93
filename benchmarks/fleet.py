"""What a fleet costs that is not asked: 1,000 clients a round of 1,000 to 1,000,000 that are registered.

    python benchmarks/fleet.py [--clients 1000,100000] [--set "privacy.unit=example"] [--rounds N] [--json FILE]

Each size is a run in a process of its own, embedded, from its start to its last committed round. The clients send 10
floats and do nothing else, so what is left is the server's. Seconds are of the CPU, the rounds' the median; bytes are
what the process takes at its peak beyond what it took before the run, over the clients.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients.task import Reply, Task
from scenarios import load
from scenarios.settings import override
from server import run as job
from server.embedded import EmbeddedFleet
from server.record import RunFolder
from server.rounds import rounds
from server.score import NOTHING
from server.state import Row, first_state

ASKED = 1_000
HOUSE = Path(__file__).resolve().parent.parent
NOOP = str(HOUSE / "benchmarks" / "noop.py")


class IdleFleet(EmbeddedFleet):
    """Clients that answer with an update of zeros at once."""

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task in tasks:
            yield Reply(task.round, task.client, bytes(task.weights.nbytes), 1, task.steps)


class Nobody:
    """Nobody watches."""

    def row(self, row: Row) -> None:
        """Says nothing."""

    def status(self, text: str) -> None:
        """Says nothing."""


def megabytes(what: str) -> float:
    """This process's VmRSS, or VmHWM: the most it ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def one(clients: int, number: int, text: str) -> dict[str, float]:
    """One run in this process."""
    scenario = load(NOOP)
    share = f"fleet.clients={clients} rounds.fraction={min(1, ASKED / clients)!r} rounds.number={number + 1}"
    with tempfile.TemporaryDirectory(prefix="umbel-fleet-") as place:
        settings = override(scenario.settings, f"{share} run.state={place}/state {text}")
        before, began, spent = megabytes("VmRSS"), time.process_time(), list[float]()
        with RunFolder.create(Path(place) / "run", NOOP, settings) as folder:
            met = job.prepare(scenario, settings, folder, IdleFleet, Nobody())
            start, state = time.process_time() - began, first_state(met.node.template, settings)
            began = time.process_time()
            for _, row in rounds(met.fleet, met.roster, met.plans, state, settings, met.accounts, lambda _: NOTHING):
                assert row["applied"], "a round failed: its time means nothing"
                spent.append(time.process_time() - began)
                began = time.process_time()
    peak = megabytes("VmHWM")
    return {
        "start_s": start,
        "round_s": statistics.median(spent[1:]),
        "peak_mb": peak,
        "bytes_a_client": (peak - before) * 2**20 / clients,
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1000,10000,100000,1000000", help="sizes of the fleet")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default 10)")
    parser.add_argument("--set", default="", help="settings, as of `umbel run`")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.one, chosen.rounds, chosen.set)))
        return
    found: dict[str, dict[str, float]] = {}
    print(f"{'registered':>12} {'start s':>9} {'round s':>9} {'peak MB':>9} {'bytes a client':>15}")
    for clients in map(int, chosen.clients.split(",")):
        words = ["--one", str(clients), "--rounds", str(chosen.rounds), "--set", chosen.set]
        command = [sys.executable, str(Path(__file__).resolve()), *words]
        done = subprocess.run(
            command, cwd=HOUSE, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        found[str(clients)] = row = json.loads(done.stdout.splitlines()[-1])
        cells = f"{row['start_s']:>9.2f} {row['round_s']:>9.4f} {row['peak_mb']:>9.0f} {row['bytes_a_client']:>15.0f}"
        print(f"{clients:>12,} {cells}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
