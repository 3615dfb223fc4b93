"""Seconds a round of Umbel's embedded runtime beside a bare torch loop, Opacus, Flower's simulation and pfl-research.

    python benchmarks/simulation.py [--workloads A,C] [--peers none|flower,pfl] [--repeats N] [--json [FILE]]

Workloads: A 2NN, B CNN, C is A with example-level DP, D is A with client-level DP, E GRU, N no-op clients of 1,000 to
1,000,000. Everybody trains the same model from the same weights on the same clients in the same order, each in a fresh
process, in turn. Timed: from the selection of a cohort to the durable commit of its round, ledger included; start-up
and evaluation are printed apart. Every contender runs in the best of its layouts (processes x threads), which a short
trial finds. No ratio is given to a contender whose weights after one noise-free round differ. See docs/performance.md.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "contenders"))

import pfl_environment
import table
import torch
from agreement import TOLERANCE, agrees, apart
from catalogue import WORKLOADS, Written, scaled, write
from lineup import LAYOUTS, LINEUP, TRUTH, Contender, Layout
from running import Asked, Outcome, run

from privacy.refused import Refused
from scenarios.settings import Settings, override

PEERS = tuple(contender.name for contender in LINEUP if contender.peer)


class Bench:
    """One call of the benchmark: what was asked for, and who is to run."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self._slow: set[str] = set()
        """Who did not come to an end with fewer no-op clients."""
        self.absent = {contender.name: why for contender in LINEUP if (why := self._missing(contender))}
        self._pythons = {"pfl": pfl_environment.python()} if "pfl" in chosen.peers else {}

    def _missing(self, contender: Contender) -> str:
        """Why a contender takes no part in this call; empty: it does."""
        if contender.peer and contender.name not in self.chosen.peers:
            return "not among --peers"
        if self.chosen.device not in contender.devices:
            return f"does not run on {self.chosen.device}"
        try:
            override(Settings(), contender.settings.format(processes=1, threads=1))
        except Refused as reason:
            return str(reason)
        return ""

    def compare(self, name: str, folder: Path) -> tuple[Written, dict[str, table.Row]]:
        """Time everybody who can do the workload `name`."""
        workload, rounds = WORKLOADS[name], self.chosen.warmup + self.chosen.rounds
        if self.chosen.scale > 1:
            workload = scaled(workload, self.chosen.scale)
        tell(f"{name}: writing the workload")
        written = write(workload, rounds, folder / name)
        entered = [one for one in LINEUP if one.name not in self.absent and name[0] in one.workloads]
        entered = [one for one in entered if one.name not in self._slow]
        best: dict[Contender, Layout] = {}
        failed: dict[str, Outcome] = {}
        for contender in entered:
            best[contender], reason = self._layout(contender, written)
            if reason:
                failed[contender.name] = Outcome(reason=reason)
                self._slow |= {contender.name} if name[0] == "N" else set()
        running = [one for one in entered if one.name not in failed]
        distances = self._distances(running, written, best)
        outcomes: dict[str, list[Outcome]] = {one.name: [] for one in running}
        for repeat in range(self.chosen.repeats):
            for one in running:
                tell(f"{name}: {one.name} {_shown(best[one])}, repeat {repeat + 1} of {self.chosen.repeats}")
                outcomes[one.name].append(self._run(one, written.timed, best[one]))
        rows = {}
        for one in entered:
            distance = distances.get(one.name)
            same = one.compared and distance is not None and agrees(distance)
            found = [failed[one.name]] if one.name in failed else outcomes[one.name]
            rows[one.name] = table.row(found, _shown(best[one]), distance, same)
        return written, rows

    def _run(self, one: Contender, workload: Path, layout: Layout, rounds: int = 0, warmup: int = -1) -> Outcome:
        chosen = self.chosen
        asked = Asked(one, workload, layout, rounds or chosen.rounds, chosen.warmup if warmup < 0 else warmup)
        python = self._pythons.get(one.name, sys.executable)
        return run(replace(asked, device=chosen.device, limit=chosen.limit, python=python))

    def _layout(self, contender: Contender, written: Written) -> tuple[Layout, str]:
        """(the layout in which a short trial was fastest, why there is none)."""
        layouts = [one for one in contender.layouts if one in self.chosen.layouts] or list(contender.layouts[:1])
        if len(layouts) == 1:
            return layouts[0], ""
        seconds: dict[Layout, float] = {}
        for layout in layouts:
            tell(f"{written.workload.name}: {contender.name} {_shown(layout)}, trial")
            warmup = min(1, self.chosen.warmup)
            outcome = self._run(contender, written.timed, layout, min(5, self.chosen.rounds), warmup)
            if outcome.reason:
                return layout, outcome.reason
            seconds[layout] = outcome.seconds
        return min(seconds, key=seconds.__getitem__), ""

    def _distances(
        self, running: Sequence[Contender], written: Written, best: dict[Contender, Layout]
    ) -> dict[str, float]:
        """How far the weights of each are from the truth's after one noise-free round."""
        weights = {}
        for one in running:
            if one.compared:
                tell(f"{written.workload.name}: {one.name}, one noise-free round")
                outcome = self._run(one, written.noiseless, best[one], 1, 0)
                if outcome.weights is not None:
                    weights[one.name] = outcome.weights
                else:
                    tell(f"{one.name}: {outcome.reason}")
        truth = next((name for name in TRUTH if name in weights), None)
        return apart(weights, truth) if truth else {}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, Any]:
    """On what the figures were measured."""
    cpu = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    found = {"cpu": cpu or platform.processor(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    return found | ({"device": torch.cuda.get_device_name()} if device == "cuda" else {})


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _shown(layout: Layout) -> str:
    return f"{layout[0]}x{layout[1]}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="A,B,C,D,E,N", help="letters, or N-SIZE (default: all)")
    parser.add_argument("--peers", default="none", help=f"none, or of {','.join(PEERS)} (default none)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender, in turn (default 3)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds a run (default 20)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layouts", default="1x1,1x2,2x1", help="processes x threads to choose from")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a run is given up (default 300)")
    parser.add_argument("--json", nargs="?", const="-", help="write the figures to a file, or print them alone")
    parser.add_argument("--scale", type=int, default=1, help=argparse.SUPPRESS)  # fewer clients, to try this file
    chosen = parser.parse_args()
    names = chosen.workloads.split(",")
    chosen.workloads = [one for name in names for one in WORKLOADS if one == name or one.startswith(f"{name}-")]
    if unknown := [name for name in names if not any(one.split("-")[0] == name or one == name for one in WORKLOADS)]:
        parser.error(
            f"there is no workload {unknown[0]!r}: choose of {', '.join(WORKLOADS)}, or N for all of its sizes"
        )
    chosen.peers = [] if chosen.peers == "none" else chosen.peers.split(",")
    if unknown := [name for name in chosen.peers if name not in PEERS]:
        parser.error(f"there is no peer {unknown[0]!r}: choose of none, {', '.join(PEERS)}")
    known = {_shown(layout): layout for layout in LAYOUTS}
    if unknown := [name for name in chosen.layouts.split(",") if name not in known]:
        parser.error(f"there is no layout {unknown[0]!r}: choose of {', '.join(known)}")
    chosen.layouts = [known[name] for name in chosen.layouts.split(",")]
    if min(chosen.repeats, chosen.rounds, chosen.scale) < 1 or chosen.warmup < 0:
        parser.error("--repeats, --rounds and --scale take at least 1, --warmup at least 0")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device on this machine: leave --device out")
    return chosen


def main() -> None:
    """Run, print, write."""
    chosen = options()
    bench, out = Bench(chosen), sys.stderr if chosen.json == "-" else sys.stdout
    found: dict[str, Any] = {"machine": machine(chosen.device), "absent": bench.absent}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), file=out)
    print(f"{chosen.warmup} + {chosen.rounds} rounds, {chosen.repeats} repeats; p x t: processes x threads", file=out)
    print(f"apart: max|dw| / max|w| after one noise-free round, at most {TOLERANCE:g} for a ratio\n", file=out)
    for name, why in bench.absent.items():
        print(f"{name} takes no part: {why}", file=out)
    found |= {"workloads": {}, "ratios": {}, "about": {}}
    with tempfile.TemporaryDirectory(prefix="umbel-bench-") as folder:
        for name in chosen.workloads:
            written, rows = bench.compare(name, Path(folder))
            found["workloads"][name], found["ratios"][name] = rows, table.ratios(rows)
            found["about"][name] = {"summary": written.summary, "data": written.data}
            print("\n".join(table.lines(name, f"{written.summary} ({written.data})", rows)), end="\n\n", file=out)
    if chosen.json:
        text = json.dumps(found, indent=2)
        print(text) if chosen.json == "-" else Path(chosen.json).write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        print(error, file=sys.stderr)
        sys.exit(2)
