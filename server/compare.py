"""Several runs side by side: in the terminal and on one offline page; the seeds of one setting as mean and spread."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from privacy.refused import Refused
from server import figures, page, results, units
from server.figures import Series
from server.proof import Drawn
from server.results import Report, Row

_NO_DIFFERENCE = ("run.seed", "run.out", "run.data", "run.resume")


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    folder: Path
    report: Report
    rounds: list[Row]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `count` runs; no deviation of fewer than two, no mean of none."""

    mean: float | None
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        known = [value for value in values if value is not None]
        deviation = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known) if known else None, deviation, len(known))


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, and what sets them apart from the other groups."""

    runs: Sequence[Run]
    differs: dict[str, Any]
    """Setting -> value, those in which the groups differ."""

    def spread(self, of: Callable[[Report], float | None]) -> Spread:
        return Spread.of([of(run.report) for run in self.runs])


COLUMNS: dict[str, tuple[Callable[[Report], float | None], Callable[[float | None], str]]] = {
    "accuracy": (lambda run: run["final"]["accuracy"], units.percent),
    "worst ε": (lambda run: run["privacy"]["worst_epsilon"], units.epsilon),
    "bytes sent": (lambda run: run["bytes"]["up"] + run["bytes"]["down"], units.size),
    "edge accuracy": (lambda run: run["edge"]["accuracy"], units.percent),
    "edge size": (lambda run: (results.chosen(run) or {"bytes": None})["bytes"], units.size),
    "time": (lambda run: run["seconds"]["total"], units.duration),
}


def compare(folders: Sequence[Path], out: Path | None = None, console: Console | None = None) -> Path:
    """Prints the runs side by side on stdout, draws them on one page at `out` (./compare.html) and returns its path.

    Runs that differ only in seed become one row: mean ± sample standard deviation, and their number.
    Raises Refused for fewer than two runs, a run given twice, or a folder that is no whole run.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise Refused("compare takes two or more different run folders: name each run once")
    groups = _groups([Run(folder, results.load(folder), results.load_rounds(folder)) for folder in folders])
    path = page.save(
        out or Path("compare.html"),
        page.render(
            "compare",
            version=groups[0].runs[0].report["umbel_version"],
            groups=groups,
            columns=COLUMNS,
            cell=cell,
            stroke=figures.stroke,
            drawings=list(_drawings(groups)),
        ),
    )
    terminal = console or Console(highlight=False)
    terminal.print(_key(groups), _table(groups))
    for group in groups:
        for run in group.runs:
            if not run.report["privacy"]["guarantee"]:
                warning = f"{run.folder}: {results.alarm(run.report)}: {run.report['privacy']['why_not']}"
                terminal.print(Text(units.printable(warning), style="red"))
    terminal.print(Text(f"Drawn in {path}"))
    return path


def cell(spread: Spread, text: Callable[[float | None], str]) -> str:
    """ "93.1 ± 0.4 %". One run has no spread; one under a thousandth of the mean is not shown."""
    mean, deviation = text(spread.mean), text(spread.deviation)
    if not spread.mean or not spread.deviation or spread.deviation < spread.mean / 1000:
        return mean
    unit = " " + deviation.rpartition(" ")[2]
    return f"{mean.removesuffix(unit)} ± {deviation}"


def _groups(runs: Sequence[Run]) -> list[Group]:
    """In the order in which the runs were named."""
    values: list[dict[str, Any]] = []
    for run in runs:
        own = {"scenario": run.report["scenario"], **run.report["settings"]}
        values.append({name: value for name, value in own.items() if name not in _NO_DIFFERENCE})
    together: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        together.setdefault(repr(sorted(value.items())), []).append(index)
    firsts = [values[members[0]] for members in together.values()]
    names = dict.fromkeys(name for first in firsts for name in first)
    apart = [name for name in names if len({repr(first.get(name)) for first in firsts}) > 1]
    return [
        Group([runs[index] for index in members], {name: first.get(name) for name in apart})
        for members, first in zip(together.values(), firsts, strict=True)
    ]


def _key(groups: Sequence[Group]) -> Table:
    key = Table.grid(padding=(0, 2, 0, 0))
    for number, group in enumerate(groups, 1):
        scenario = group.runs[0].report["scenario"]
        differs = "  ".join(f"{name}={page.setting(value)}" for name, value in group.differs.items())
        key.add_row(Text(str(number), style="bold"), Text(differs or f"{scenario}, nothing but seeds differs"))
    return key


def _table(groups: Sequence[Group]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    for name in ("", "runs", *COLUMNS):
        title = name.replace(" ", "\n")
        table.add_column(title, justify="right" if name else "left", overflow="fold", vertical="bottom")
    for number, group in enumerate(groups, 1):
        cells = [cell(group.spread(of), text) for of, text in COLUMNS.values()]
        table.add_row(Text(str(number), style="bold"), str(len(group.runs)), *cells)
    return table


def _drawings(groups: Sequence[Group]) -> Iterator[Drawn]:
    drawings: list[tuple[str, _Axis, str, str, Callable[[float], str], Callable[[float], str] | None]] = [
        ("Accuracy by round.", _by_round, "accuracy", "round", units.percent, None),
        ("Loss by round.", _by_round, "loss", "round", units.number, None),
        ("ε spent by round, worst client.", _by_round, "epsilon", "round", units.number, None),
        ("Accuracy by bytes.", results.traffic, "accuracy", "bytes sent", units.percent, units.size),
        (
            "Accuracy by simulated time.",
            _by_time,
            "accuracy",
            "time on the fleet's clock",
            units.percent,
            units.duration,
        ),
    ]
    for title, axis, key, x_label, y_text, x_text in drawings:
        lines = [line for style, group in enumerate(groups) if (line := _line(group, style, axis, key))]
        if lines:
            yield Drawn(title, "", figures.curves(title, lines, x_label, y_text, x_text, from_zero=key == "epsilon"))


_Axis = Callable[[Sequence[Row]], Sequence[float | None]]


def _by_round(rows: Sequence[Row]) -> list[float | None]:
    return [row["round"] for row in rows]


def _by_time(rows: Sequence[Row]) -> list[float | None]:
    return [row["simulated_seconds"] for row in rows]


def _line(group: Group, style: int, axis: _Axis, key: str) -> Series | None:
    """Mean and deviation over the group's runs, point by point, as far as all of them go; None without a point."""
    parts = []
    for run in group.runs:
        rows = [row for row in run.rounds if row["phase"] == "train"]
        parts.append(list(zip(*results.over(rows, axis(rows), key), strict=True)))
    x, y, band = [], [], []
    for points in zip(*parts, strict=False):
        spread = Spread.of([value for _, value in points])
        assert spread.mean is not None
        x.append(statistics.fmean(at for at, _ in points))
        y.append(spread.mean)
        band.append(spread.deviation or 0.0)
    return Series(x, y, band if len(parts) > 1 else (), style) if x else None
