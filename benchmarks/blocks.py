"""Seconds a round of Flower's simulation on Ray: one client a node, or a block of them a worker (local.engine=cohort).

    python benchmarks/blocks.py [--work noop-100,noop-1000,fifty] [--repeats N] [--rounds N] [--json FILE]

Beside them the embedded runtime, which trains the same clients with no Flower between: `single` what one client a node
trains, `cohort` what blocks train. Every figure is the median over the rounds after the first of all repeats, read from
rounds.jsonl of real `umbel run`s made in turn; `rest` is what a run takes besides them: start, first round, report.
Ratios are to `blocks`, in the same call. RAY_ADDRESS names a cluster to measure on; else every run starts its own Ray.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOOP, FIFTY = str(HERE / "noop.py"), str(HERE / "fifty.py")
WORK = {
    "noop-100": (NOOP, "fleet.clients=100"),
    "noop-1000": (NOOP, "fleet.clients=1000"),
    "fifty": (FIFTY, ""),
}
WAYS = {
    "one a node": ("simulation", "local.engine=single"),
    "blocks": ("simulation", "local.engine=cohort"),
    "embedded single": ("embedded", "local.engine=single"),
    "embedded cohort": ("embedded", "local.engine=cohort"),
}


def measured(scenario: str, settings: str, runtime: str, rounds: int) -> tuple[float, list[float]]:
    """(wall seconds of all but the timed rounds, those of every round after the first)."""
    with tempfile.TemporaryDirectory(prefix="umbel-blocks-") as folder:
        run, began = Path(folder) / "run", time.monotonic()
        words = ["run", scenario, "--runtime", runtime, "--out", str(run), "--state", f"{folder}/state", "--quiet"]
        command = [sys.executable, "-m", "server.cli", *words, "--set", f"{settings} rounds.number={rounds + 1}"]
        told = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL, env=told)
        whole = time.monotonic() - began
        rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert all(row["applied"] and not row["rejected"] for row in rows), "a round failed: its time means nothing"
    seconds = [float(row["seconds"]) for row in rows]
    return whole - sum(seconds[1:]), seconds[1:]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=",".join(WORK), help=f"of {','.join(WORK)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn (default 3)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds a run (default 10)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for work in chosen.work.split(","):
        scenario, settings = WORK[work]
        runs: dict[str, list[tuple[float, list[float]]]] = {way: [] for way in WAYS}
        for _ in range(chosen.repeats):
            for way, (runtime, engine) in WAYS.items():
                runs[way].append(measured(scenario, f"{settings} {engine}", runtime, chosen.rounds))
        print(f"{work:18} {'s a round':>10} {'least':>8} {'most':>8} {'rest s':>8} {'of blocks':>10}")
        found[work] = {}
        for way, made in runs.items():
            times = [seconds for _, rounds in made for seconds in rounds]
            told = {"median": statistics.median(times), "min": min(times), "max": max(times)}
            found[work][way] = told | {"rest": statistics.median(rest for rest, _ in made)}
        for way, row in found[work].items():
            times_blocks = row["median"] / found[work]["blocks"]["median"]
            cells = f"{row['median']:>10.3f} {row['min']:>8.3f} {row['max']:>8.3f} {row['rest']:>8.1f}"
            print(f"{way:18} {cells} {times_blocks:>9.2f}x", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
