"""umbel scenarios, settings, data: what there is to run, with which settings, on which data sets."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from privacy.refused import Refused
from server.options import ScenarioName, Set

data_app = typer.Typer(help="Data sets that are not bundled: list and download them.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to `umbel`."""
    app.command()(scenarios)
    app.command()(settings)


def scenarios() -> None:
    """List the bundled scenarios, one line each."""
    from rich.console import Console
    from rich.table import Table

    from scenarios import load, names

    table = Table.grid(padding=(0, 3))
    for name in names():
        table.add_row(f"[bold]{name}[/]", load(name).summary)
    Console().print(table)


def settings(
    scenario: ScenarioName,
    set_: Set = "",
) -> None:
    """Print every setting of a scenario: name, value, default (where it differs) and meaning."""
    from rich.console import Console
    from rich.table import Table

    from scenarios import load
    from scenarios.settings import knobs, override

    chosen = load(scenario)
    defaults = {name: value for name, value, _ in knobs(chosen.settings)}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("setting", "value", "default"):
        table.add_column(column, no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for name, value, meaning in knobs(override(chosen.settings, set_)):
        changed = value != defaults[name]
        table.add_row(name, _shown(value), _shown(defaults[name]), meaning, style="bold" if changed else "")
    Console(width=None if sys.stdout.isatty() else 180, highlight=False).print(table)


@data_app.command("list")
def data_list() -> None:
    """List the data sets that scenarios use and where they were found."""
    from rich.console import Console
    from rich.table import Table

    from scenarios import sources

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "what", "licence", "found in"):
        table.add_column(column)
    for name, source in sources.SOURCES.items():
        try:
            where = str(sources.find(name, ""))
        except Refused:
            where = f"missing: umbel data get {name}"
        table.add_row(name, source.description, source.licence, where)
    Console().print(table)


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="A name of `umbel data list`.")],
    to: Annotated[Path | None, typer.Option(help="Folder to keep it in (default: where `umbel run` looks).")] = None,
    origin: Annotated[str, typer.Option(help="Base URL of a mirror in place of the public origin.")] = "",
) -> None:
    """Download a data set from its public origin; goes on where an earlier try stopped, and checks every digest."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from scenarios import sources

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    if name not in sources.SOURCES:
        raise Refused(f"there is no data set {name!r}: choose one of {', '.join(sources.SOURCES)}")
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def progress(done: int, total: int, filename: str) -> None:
            if filename not in tasks:
                tasks[filename] = bar.add_task(filename, total=total or None)
            bar.update(tasks[filename], completed=done, total=total or None)

        folder = sources.get(name, to, progress, origin or None)
    print(folder)


def _shown(value: Any) -> str:
    return "unset" if value is None else "''" if value == "" else str(value)
