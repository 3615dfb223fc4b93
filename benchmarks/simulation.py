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
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "contenders"))

import table
import torch
from agreement import LARGEST, MEDIAN, MEDIAN_BF16
from catalogue import WORKLOADS
from comparison import Comparison
from lineup import LAYOUTS, LINEUP, shown

from privacy.refused import Refused

PEERS = tuple(contender.name for contender in LINEUP if contender.peer)


def machine(device: str) -> dict[str, Any]:
    """On what the figures were measured."""
    cpu = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    found = {"cpu": cpu or platform.processor(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    return found | ({"device": torch.cuda.get_device_name()} if device == "cuda" else {})


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


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
    known = {shown(layout): layout for layout in LAYOUTS}
    if unknown := [name for name in chosen.layouts.split(",") if name not in known]:
        parser.error(f"there is no layout {unknown[0]!r}: choose of {', '.join(known)}")
    chosen.layouts = [known[name] for name in chosen.layouts.split(",")]
    if min(chosen.repeats, chosen.rounds, chosen.scale) < 1 or chosen.warmup < 0:
        parser.error("--repeats, --rounds and --scale take at least 1, --warmup at least 0")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise Refused("simulation.py: torch finds no CUDA device on this machine: leave --device out")
    return chosen


def main() -> None:
    """Run, print, write."""
    chosen = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contender that runs is ended as by Ctrl-C
    comparison, out = Comparison(chosen), sys.stderr if chosen.json == "-" else sys.stdout
    found: dict[str, Any] = {"machine": machine(chosen.device), "absent": comparison.absent}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), file=out)
    print(f"{chosen.warmup} + {chosen.rounds} rounds, {chosen.repeats} repeats; p x t: processes x threads", file=out)
    print(f"apart: max|dw| / max|w| after one noise-free round; for a ratio at most {LARGEST:g}, and", file=out)
    print(f"       the median of |dw| / max|w| at most {MEDIAN:g}; in bf16 {MEDIAN_BF16:g}", file=out)
    print("/ limit: times what the workload's arithmetic or traffic takes at this machine's best rates\n", file=out)
    for name, why in comparison.absent.items():
        print(f"{name} takes no part: {why}", file=out)
    found |= {"workloads": {}, "ratios": {}, "limits": {}, "about": {}}
    with tempfile.TemporaryDirectory(prefix="umbel-bench-") as folder:
        for name in chosen.workloads:
            result = comparison.of(name, Path(folder))
            found["workloads"][name], found["limits"][name] = result.rows, result.limit
            found["ratios"][name] = table.ratios(result.rows) | table.beside_noise(found["workloads"], name)
            found["about"][name] = {"summary": result.written.summary, "data": result.written.data}
            summary = f"{result.written.summary} ({result.written.data})"
            print("\n".join(table.lines(name, summary, result.rows, result.limit)), file=out)
            print("\n".join(table.notes(name, result.rows, found["ratios"][name], result.limit)), end="\n\n", file=out)
    if chosen.json:
        text = json.dumps(found, indent=2)
        print(text) if chosen.json == "-" else Path(chosen.json).write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        print(error, file=sys.stderr)
        sys.exit(2)
