"""One run from the terminal: on which runtime, who watches it, how it is asked to stop, what is shown at its end."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from privacy.refused import Refused
from scenarios import Scenario
from scenarios.settings import Settings
from server import results
from server import run as job
from server.console import summary
from server.embedded import EmbeddedFleet
from server.live import Live
from server.record import RunFolder


def go(
    scenario: Scenario,
    reference: str,
    settings: Settings,
    path: Path,
    runtime: str,
    superlink: str,
    quiet: bool,
    new: bool,
) -> None:
    """Run, or go on with, `scenario` (which the user calls `reference`) in `path`, and show what came of it.

    Raises Refused for what the user can mend, Stop when the run stopped on purpose.
    """
    if runtime not in ("embedded", "simulation", "deployment"):
        raise Refused(f"there is no runtime {runtime!r}: choose embedded, simulation or deployment")
    if (runtime == "deployment") != bool(superlink):
        raise Refused("--superlink HOST:PORT goes with --runtime deployment, and is needed there")
    job.check(scenario, settings)
    with signals() as stop:
        try:
            if runtime == "embedded":
                reference = str(Path(reference).resolve()) if reference.endswith(".py") else reference
                with (
                    RunFolder.create(path, reference, settings) if new else RunFolder.open(path) as folder,
                    prepared_job(scenario, settings, folder, stop, quiet) as prepared,
                ):
                    job.run(prepared)
            else:
                from server import flower, ray_cluster
                from server.superlink import running

                _ = running(superlink) if superlink else scenario.data(settings)  # refused, if at all, in one line
                cluster = ray_cluster.Cluster() if superlink else ray_cluster.found(settings)
                with _live(scenario, settings, quiet) as progress:
                    path = flower.run(
                        reference, scenario, settings, path, progress, stop, superlink, resume=not new, cluster=cluster
                    )
        except job.Stopped as reason:
            raise Stop(str(reason)) from None
    show(path, quiet)


@contextmanager
def prepared_job(
    scenario: Scenario, settings: Settings, folder: RunFolder, stop: Callable[[], bool], quiet: bool
) -> Iterator[job.Job]:
    """The embedded fleet met, then its live table: what is refused at the meeting stays one line."""
    with Console(stderr=True, quiet=quiet).status("meeting the clients, calibrating noise"):
        prepared = job.prepare(scenario, settings, folder, EmbeddedFleet, Quiet(), stop)
    with _live(scenario, settings, quiet) as progress:
        yield replace(prepared, progress=progress)


class Stop(click.exceptions.Exit):
    """Stopped on purpose: one line, exit code 3."""

    def __init__(self, line: str) -> None:
        print(f"umbel: {line}", file=sys.stderr)
        super().__init__(3)


@contextmanager
def _live(scenario: Scenario, settings: Settings, quiet: bool) -> Iterator[job.Progress]:
    """The live table, or nothing when quiet."""
    if quiet:
        yield Quiet()
        return
    total = settings.rounds.number + settings.export.recover_rounds
    with Live(total, f"{scenario.name}: {scenario.summary}") as live:
        yield live


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has asked to stop after the running round; a second one ends at once."""
    asked: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("umbel: stopping after this round; once more ends at once", file=sys.stderr)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Quiet:
    """A `Progress` that nobody watches."""

    def row(self, row: dict[str, Any]) -> None:
        """Says nothing."""

    def status(self, text: str) -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""


def show(path: Path, quiet: bool) -> None:
    if quiet or not path.exists():  # the SuperLink of a deployment may be on another machine, and so the run folder
        print(path)
    else:
        summary(results.load(path), path)
