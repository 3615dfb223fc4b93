"""umbel ledger …: what every client has spent over all runs, whether the record is whole, and the record itself."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from privacy.refused import Refused

ledger_app = typer.Typer(help="What clients have spent over all runs: show, verify, export.", no_args_is_help=True)

File = Annotated[Path | None, typer.Argument(metavar="[LEDGER]", help="A ledger file (default: all of the folder).")]
State = Annotated[str, typer.Option(help="Folder of the privacy ledgers, else UMBEL_STATE, else the platform's own.")]


@ledger_app.command()
def show(ledger: File = None, state: State = "") -> None:
    """Print every account: its budget, what is spent and left over the ledger's life."""
    from rich.console import Console
    from rich.table import Table

    from privacy.ledger import Ledger

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("data set", "client", "unit"):
        table.add_column(column, no_wrap=True)
    for column in ("epsilon", "budget", "left", "delta", "steps"):
        table.add_column(column, justify="right", no_wrap=True)
    for path in _paths(ledger, state):
        opened = Ledger(path)
        opened.read()
        for account, standing in sorted(opened.accounts.items()):
            epsilon, budget = standing.epsilon, standing.budget
            left = "" if budget is None else f"{max(0.0, budget - epsilon):.4g}"
            cells = [f"{epsilon:.4g}", "none" if budget is None else f"{budget:g}", left, f"{standing.delta:.3g}"]
            table.add_row(account.dataset, account.client, account.unit, *cells, str(sum(standing.history.values())))
    Console(width=None if sys.stdout.isatty() else 180, highlight=False).print(table)


@ledger_app.command()
def verify(ledger: File = None, state: State = "") -> None:
    """Check every record against those before it and against the head file; exit code 2 if one does not fit."""
    from privacy.ledger import Ledger

    for path in _paths(ledger, state):
        head = Ledger(path).read()
        print(f"{path}: {head.sequence} records, whole; head {head.digest}")


@ledger_app.command()
def export(ledger: File = None, state: State = "") -> None:
    """Print every record as a line of JSON: when, whose, of which run and round, which mechanism and how many steps."""
    from privacy.ledger import Ledger

    for path in _paths(ledger, state):
        opened = Ledger(path, keep=True)
        opened.read()
        for record in opened.records or ():
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record["time"]))
            print(json.dumps({**record, "time": when}))


def _paths(ledger: Path | None, state: str) -> list[Path]:
    from server.accounts import state_folder

    if ledger is not None:
        if not ledger.is_file():
            raise Refused(f"there is no ledger {ledger}: `umbel ledger show` lists those of the state folder")
        return [ledger]
    folder = state_folder(state)
    # a head whose ledger is gone is found as well, and refused
    if not (
        found := sorted({path.with_suffix("") for path in folder.rglob("*.ledger.head")} | {*folder.rglob("*.ledger")})
    ):
        raise Refused(f"there is no ledger in {folder}: a run with DP makes one, --state names another folder")
    return found
