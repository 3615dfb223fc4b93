"""Seconds a round of the embedded and the simulation runtime: 100 and 1,000 no-op clients, and digits.

    python benchmarks/rounds.py [--rounds N] [--json FILE]

Every figure is the median over the rounds after the first, read from rounds.jsonl of real `umbel run`s made one after
another; the ratio is to `simulation`, Flower's own runtime, in the same call.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent
NOOP = str(Path(__file__).resolve().parent / "noop.py")
ALONE = "export.recover_rounds=0 export.prune=0 reference.central_epochs=0 reference.no_privacy=false rounds.average=1"
WORK = {
    "100 no-op clients": (NOOP, "fleet.clients=100"),
    "1,000 no-op clients": (NOOP, "fleet.clients=1000"),
    "digits, 20 clients": ("digits", ALONE),
}
RUNTIMES = ("embedded", "simulation")


def seconds_a_round(scenario: str, settings: str, runtime: str, rounds: int) -> list[float]:
    """Wall seconds of every round but the first."""
    with tempfile.TemporaryDirectory(prefix="umbel-bench-") as folder:
        run = Path(folder) / "run"
        words = ["run", scenario, "--runtime", runtime, "--out", str(run), "--quiet"]
        command = [sys.executable, "-m", "server.cli", *words, "--set", f"{settings} rounds.number={rounds + 1}"]
        subprocess.run(
            command, cwd=HOUSE, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert all(row["applied"] and not row["rejected"] for row in rows), "a round failed: its time means nothing"
    return [row["seconds"] for row in rows[1:]]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    print(f"{'seconds a round':22} {'embedded':>22} {'simulation':>22} {'ratio':>8}")
    for name, (scenario, settings) in WORK.items():
        times = {runtime: seconds_a_round(scenario, settings, runtime, chosen.rounds) for runtime in RUNTIMES}
        found[name] = {runtime: statistics.median(values) for runtime, values in times.items()}
        cells = [f"{statistics.median(v):.3f} ({min(v):.3f}-{max(v):.3f})" for v in times.values()]
        ratio = found[name]["simulation"] / found[name]["embedded"]
        print(f"{name:22} {cells[0]:>22} {cells[1]:>22} {ratio:7.1f}x", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
