"""One call of the benchmark: who takes part, in which layout, whether all do the same work, and their runs in turn."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pfl_environment
import table
from agreement import agrees, apart
from catalogue import WORKLOADS, Written, scaled, write
from lineup import LINEUP, TRUTH, Contender, Layout, shown
from running import Asked, Outcome, run

from clients import cohort, placement
from privacy.refused import Refused
from scenarios.settings import Settings, override

Entry = tuple[Contender, Layout]


@dataclass(frozen=True)
class Result:
    """What came of one workload."""

    written: Written
    rows: dict[str, table.Row]
    limit: dict[str, Any] | None
    """As limit.py prints it; None for no-op clients, whose arithmetic is nothing."""


class Comparison:
    """Who runs, by the flags that `simulation.py` read."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self.absent = {contender.name: why for contender in LINEUP if (why := self._missing(contender))}
        self._pythons: dict[str, str] = {}
        if "pfl" not in self.absent:
            try:
                self._pythons["pfl"] = pfl_environment.python()
            except RuntimeError as reason:
                self.absent["pfl"] = str(reason)
        self._too_slow: set[str] = set()
        """Who did not come to an end with fewer no-op clients."""

    def _missing(self, contender: Contender) -> str:
        """Why a contender takes no part in this call; empty: it does."""
        if contender.peer and contender.name not in self._chosen.peers:
            return "not among --peers"
        if self._chosen.device not in contender.devices:
            return f"does not run on {self._chosen.device}"
        try:
            told = contender.settings.format(processes=1, threads=1, device=self._chosen.device)
            settings = override(Settings(), told)
            cohort.check(settings.local)
            placement.check(settings)
        except Refused as reason:
            return str(reason)
        return ""

    def of(self, name: str, folder: Path) -> Result:
        """Time everybody who can do the workload `name`."""
        workload = scaled(WORKLOADS[name], self._chosen.scale) if self._chosen.scale > 1 else WORKLOADS[name]
        tell(f"{name}: writing the workload")
        written = write(workload, self._chosen.warmup + self._chosen.rounds, folder / name)
        entered = [one for one in LINEUP if one.name not in self.absent and name[0] in one.workloads]
        ready = {one: self._ready(one, written) for one in entered if one.compared}
        fit = {one: layout for one, (layout, noiseless) in ready.items() if noiseless.weights is not None}
        entries = [
            *fit.items(),
            *((one, layout) for one in entered if not one.compared for layout in set(fit.values())),
        ]
        outcomes = self._in_turn(entries, written)
        return Result(written, _rows(ready, outcomes), None if name[0] == "N" else self._limit(written))

    def _ready(self, one: Contender, written: Written) -> tuple[Layout, Outcome]:
        """(its layout, its noise-free round in that layout); an outcome with a reason if it cannot take part."""
        no_op = written.workload.name[0] == "N"
        if no_op and one.name in self._too_slow:
            return one.layouts[0], Outcome(reason="not asked: it did not come to an end with fewer clients")
        layout, outcome = self._layout(one, written)
        if not outcome.reason:
            tell(f"{written.workload.name}: {one.name} {shown(layout)}, one noise-free round")
            outcome = self._run(one, written.noiseless, layout, 1, 0)
        if outcome.reason:
            tell(f"{one.name}: {outcome.reason}")
            self._too_slow |= {one.name} if no_op else set()
        return layout, outcome

    def _in_turn(self, entries: Sequence[Entry], written: Written) -> dict[Entry, list[Outcome]]:
        """Every entry's runs: all of them once, then all again."""
        outcomes: dict[Entry, list[Outcome]] = {entry: [] for entry in entries}
        for repeat in range(self._chosen.repeats):
            for one, layout in entries:
                turn = f"repeat {repeat + 1} of {self._chosen.repeats}"
                tell(f"{written.workload.name}: {one.name} {shown(layout)}, {turn}")
                outcomes[one, layout].append(self._run(one, written.timed, layout))
        return outcomes

    def _run(self, one: Contender, workload: Path, layout: Layout, rounds: int = 0, warmup: int = -1) -> Outcome:
        chosen = self._chosen
        asked = Asked(one, workload, layout, rounds or chosen.rounds, chosen.warmup if warmup < 0 else warmup)
        python = self._pythons.get(one.name, sys.executable)
        return run(replace(asked, device=chosen.device, limit=chosen.limit, python=python))

    def _layout(self, contender: Contender, written: Written) -> tuple[Layout, Outcome]:
        """The layout in which a short trial was fastest, with what came of it; or the one in which it failed."""
        layouts = [one for one in contender.layouts if one in self._chosen.layouts] or list(contender.layouts[:1])
        if self._chosen.device != "cpu":
            layouts = list(contender.layouts[:1])  # 1x1: one process has the device
        if len(layouts) == 1:
            return layouts[0], Outcome()
        found: dict[Layout, Outcome] = {}
        for layout in layouts:
            tell(f"{written.workload.name}: {contender.name} {shown(layout)}, trial")
            rounds, warmup = min(5, self._chosen.rounds), min(1, self._chosen.warmup)
            found[layout] = self._run(contender, written.timed, layout, rounds, warmup)
            if found[layout].reason:
                return layout, found[layout]
        best = min(found, key=lambda layout: found[layout].seconds)
        return best, found[best]

    def _limit(self, written: Written) -> dict[str, Any] | None:
        """What the machine could do at best; None, and a line, where that cannot be measured."""
        tell(f"{written.workload.name}: the machine's limit")
        file = Path(__file__).with_name("limit.py")
        command = [sys.executable, str(file), str(written.timed), "--device", self._chosen.device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            tell(f"no limit: {done.stderr.strip().splitlines()[-1]}")
            return None
        return dict(json.loads(done.stdout))


def _rows(
    ready: Mapping[Contender, tuple[Layout, Outcome]], outcomes: Mapping[Entry, Sequence[Outcome]]
) -> dict[str, table.Row]:
    """Every contender's row; whoever trains something is held against the truth first."""
    weights = {one.name: found.weights for one, (_, found) in ready.items() if found.weights is not None}
    truth = next((one for one in TRUTH if one in weights), None)
    distances = apart(weights, truth) if truth else {}
    rows: dict[str, table.Row] = {}
    for one, (layout, noiseless) in ready.items():
        far = distances.get(one.name)
        rows[one.name] = table.row(
            outcomes.get((one, layout), [noiseless]), layout, far, far is not None and agrees(far, one.precision)
        ) | {"precision": one.precision}
    noise = {name: {at: found for (one, at), found in outcomes.items() if one.name == name} for name in table.NOISE}
    rows |= {one.name: table.fastest(noise[one.name]) for one, _ in outcomes if not one.compared}
    return table.without_noise(rows, noise)


def tell(line: str) -> None:
    """What goes on, beside the results."""
    print(line, file=sys.stderr, flush=True)
