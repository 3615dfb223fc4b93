"""The terminal while a run goes on: a live table of its rounds, on stderr."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import rich.live
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from server import units

MOST_ROWS = 12


class Live:
    """A running federation on stderr: its last rounds, a bar with the time left, and what it does besides.

    Where stderr is no terminal, one plain line a round. A context manager; `row` takes a line of rounds.jsonl.
    """

    def __init__(
        self,
        total_rounds: int,
        title: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._total, self._title, self._clock = total_rounds, units.printable(title), clock
        self._rows: tuple[Mapping[str, Any], ...] = ()
        self._sent, self._seen, self._status = 0, 0, ""
        self._start = clock()
        drawn = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = (
            rich.live.Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4, redirect_stdout=False
            )
            if drawn
            else None
        )

    def __enter__(self) -> Self:
        self._start = self._clock()
        if self._live:
            self._live.start(refresh=True)
        else:
            self._plain(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status = ""
        if self._live:
            self._live.stop()

    def row(self, row: Mapping[str, Any]) -> None:
        """Shows one committed round."""
        self._rows = (*self._rows, row)[-MOST_ROWS:]  # replaced, never changed: another thread draws it
        self._sent += row["bytes_up"] + row["bytes_down"]
        self._seen += 1
        self._status = ""
        if not self._live:
            cells = ", ".join(
                f"{name} {text}" for name, text in zip(_COLUMNS[1:], _cells(row)[1:], strict=True) if text
            )
            self._plain(f"round {row['round']} of {max(self._total, row['round'])}: {cells}")

    def status(self, text: str) -> None:
        """Says what is going on besides rounds, until the next round or status."""
        self._status = units.printable(text)
        if not self._live:
            self._plain(self._status)

    def note(self, text: str) -> None:
        """One line that stays, above the table."""
        self._plain(units.printable(text))

    def _plain(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _render(self) -> RenderableType:
        gap = 2 if self._console.width >= 100 else 1
        table = Table(box=None, padding=(0, gap, 0, 0), header_style="bold")
        for name in _COLUMNS[:-1]:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(_COLUMNS[-1])  # the one that gives way where the terminal is narrow
        room = max(1, min(MOST_ROWS, self._console.height - 6))
        for row in self._rows[-room:]:
            table.add_row(*_cells(row), style="" if row["applied"] else "dim")
        parts: list[RenderableType] = (
            [Text(self._title, style="bold"), table] if self._rows else [Text(self._title, style="bold")]
        )
        parts.append(self._bar())
        if self._status:
            parts.append(Spinner("dots", Text(self._status)))
        return Group(*parts)

    def _bar(self) -> RenderableType:
        done = self._rows[-1]["round"] if self._rows else 0
        total = max(self._total, done)
        elapsed = self._clock() - self._start
        words = [f"{done} of {total} rounds", f"{units.duration(elapsed)}"]
        if self._seen and done < total:
            words.append(f"about {units.duration(elapsed / self._seen * (total - done))} left")
        words.append(f"{units.size(self._sent)} sent")
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(total, done, width=20), Text(" · ".join(words), style="dim", no_wrap=True))
        return line


_COLUMNS = ("round", "cohort", "loss", "accuracy", "ε so far", "up", "down", "time", "note")


def _cells(row: Mapping[str, Any]) -> list[str]:
    asked, good = len(row["cohort"]), row["replies"]
    cohort = "secret" if good is None else str(asked) if asked == good else f"{good}/{asked}"
    notes = [
        f"{len(row[key])} {word}"
        for key, word in (("rejected", "rejected"), ("late", "late"), ("skipped", "out"))
        if row[key]
    ]
    alone = sum(one["clients"] for one in row.get("engine", {}).get("trained", ()) if one["way"] == "single")
    notes += [f"{alone} one by one"] if alone else []
    notes += [] if row["applied"] else ["not applied"]
    notes += ["recovery"] if row["phase"] == "recover" else []
    clock = row["simulated_seconds"]
    notes += [f"fleet clock {units.duration(clock)}"] if clock is not None else []
    return [
        str(row["round"]),
        cohort,
        units.MISSING if row["loss"] is None else f"{row['loss']:.4f}",
        units.percent(row["accuracy"]),
        units.epsilon(row["epsilon"]),
        units.size(row["bytes_up"]),
        units.size(row["bytes_down"]),
        units.duration(row["seconds"]),
        ", ".join(notes),
    ]
