"""Where the time of Umbel's own rounds goes: a flame graph and a table of one workload of simulation.py.

    python benchmarks/flame.py C [--engine cohort|single] [--rounds N] [--svg FILE] [--json]

One process and one thread, the run folder and the ledger included; the parent's part of a run with workers is what is
not below `answer`. Every few milliseconds of CPU time the stack of Python calls is looked at, so what torch does is
counted to the line that asked for it. The table has, for each of Umbel's functions, the time in it and in what it calls
of libraries; the figure has whole stacks, widest first, the outermost call on top.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent / "contenders"))

import umbel_run
from catalogue import HOUSE, WORKLOADS, write
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from trial import Trial

Stack = tuple[str, ...]
"""Of calls, the outermost first: "file:function", of Umbel's files by their paths, else "library"."""
INTERVAL = 0.001
"""Seconds of CPU time; most kernels look every 4 ms at best."""
COLORS = {"clients": "#c2570c", "server": "#1f6fb2", "privacy": "#7c4bab", "scenarios": "#2a7f55"}
_LEAST = 0.004
"""Of a whole: what is narrower stands in no figure and no table."""


class Sampled(Trial):
    """A trial whose timed rounds are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: Counter[Stack] = Counter()

    def _start_clock(self) -> None:
        super()._start_clock()
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)

    def mark(self) -> None:
        """A round is over; after the last one nobody looks any more."""
        if len(self._marks) + 1 == self.rounds:
            signal.setitimer(signal.ITIMER_PROF, 0)
        super().mark()

    def _look(self, _: int, frame: FrameType | None) -> None:
        self.stacks[stack_of(frame)] += 1


def stack_of(frame: FrameType | None) -> Stack:
    """The calls that led to `frame`, from the round loop on; what libraries call each other stands once."""
    calls = list[str]()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inside = path.is_relative_to(HOUSE) and ".venv" not in path.parts
        name = f"{path.relative_to(HOUSE)}:{frame.f_code.co_name}" if inside else "library"
        if not calls or calls[-1] != name or inside:
            calls.append(name)
        frame = frame.f_back
    calls.reverse()
    begin = next((i for i, name in enumerate(calls) if name == "server/rounds.py:rounds"), 0)
    return tuple(calls[begin:])


def shares(stacks: Counter[Stack]) -> dict[str, float]:
    """Of each of Umbel's functions, the part of all time that was in it and in what it called of libraries."""
    own: Counter[str] = Counter()
    for stack, count in stacks.items():
        own[next(name for name in (*reversed(stack), "library") if name != "library" or stack == ("library",))] += count
    return {name: count / stacks.total() for name, count in own.most_common()}


def drawn(stacks: Counter[Stack], title: str) -> Figure:
    """The flame graph, upside down: one row a call."""
    deepest = max(map(len, stacks))
    figure = Figure(figsize=(12, 0.6 + 0.27 * deepest), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(deepest, 0), title=title, yticks=[], xlabel="share of a round's CPU time")

    def below(part: Counter[Stack], depth: int, left: float) -> None:
        calls: Counter[str] = Counter()
        for stack, count in part.items():
            if len(stack) > depth:
                calls[stack[depth]] += count
        for name, count in calls.most_common():
            width = count / stacks.total()
            if width < _LEAST:
                break
            color = COLORS.get(name.split("/")[0], "#9aa5b1")
            axes.add_patch(Rectangle((left, depth), width, 0.94, facecolor=color, edgecolor="white", linewidth=0.5))
            label = f"{name.rpartition('/')[2].replace('.py:', '.')} {width:.0%}"
            if width * 150 > len(label):
                axes.text(left + width / 2, depth + 0.47, label, ha="center", va="center", fontsize=7, color="white")
            kept = {stack: n for stack, n in part.items() if len(stack) > depth and stack[depth] == name}
            below(Counter(kept), depth + 1, left)
            left += width

    below(stacks, 0, 0.0)
    return figure


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--engine", default="cohort", choices=("cohort", "single"))
    parser.add_argument("--rounds", type=int, default=50, help="rounds that are looked at, after two (default 50)")
    parser.add_argument("--svg", type=Path, help="write the flame graph here")
    parser.add_argument("--json", action="store_true", help="print the shares as JSON")
    parser.add_argument("--set", default="", help="further settings, as of umbel run")
    chosen = parser.parse_args()
    workload = WORKLOADS[chosen.workload]
    with tempfile.TemporaryDirectory(prefix="umbel-flame-") as folder:
        written = write(workload, chosen.rounds + 2, Path(folder) / "workload")
        own = "" if chosen.engine == "single" else "local.engine=cohort run.processes=1"
        out = Path(folder) / "run"
        out.mkdir()
        told = ["--contender", "umbel", "--settings", f"{own} {chosen.set}", "--warmup", "2"]
        sys.argv = [sys.argv[0], str(written.timed), str(out), *told, "--rounds", str(chosen.rounds)]
        trial = Sampled()
        umbel_run.main(trial)
        spent = json.loads((out / "result.json").read_text())["cpu"]
    found = shares(trial.stacks)
    if chosen.json:
        print(json.dumps({"workload": chosen.workload, "cpu": spent, "shares": found}, indent=2))
    else:
        print(f"{chosen.workload}, {chosen.engine}, 1x1: {written.summary} ({written.data})")
        print(
            f"{spent * 1e3:.1f} ms of CPU time a round, seen {trial.stacks.total()} times in {chosen.rounds} rounds\n"
        )
        print(f"{'share':>6} {'ms':>7}  function, with what it calls of libraries")
        for name, share in found.items():
            if share >= _LEAST:
                print(f"{share:6.1%} {share * spent * 1e3:7.2f}  {name}")
    if chosen.svg:
        title = f"{chosen.workload}, local.engine={chosen.engine}: {spent * 1e3:.1f} ms of CPU time a round"
        drawn(trial.stacks, title).savefig(chosen.svg, metadata={"Date": None})


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
