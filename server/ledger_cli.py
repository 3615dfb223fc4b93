"""umbel ledger …: what every client has spent and may spend, whether the record is whole, and how to mend it."""

import json
import math
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privacy.refused import Refused

if TYPE_CHECKING:
    from privacy.ledger import Ledger, Standing

ledger_app = typer.Typer(
    help="What clients have spent over all runs, and what they may: show, budget, verify, export, adopt, forget.",
    no_args_is_help=True,
)

File = Annotated[Path | None, typer.Argument(metavar="[LEDGER]", help="A ledger file (default: all of the folder).")]
State = Annotated[str, typer.Option(help="Folder of the privacy ledgers, else UMBEL_STATE, else the platform's own.")]


@ledger_app.command()
def show(ledger: File = None, state: State = "") -> None:
    """Print every account: what is spent and left over the ledger's life, and how often its data changed."""
    columns = ("epsilon", "budget", "left", "window", "delta", "steps", "data changed")
    rows = []
    for opened in _opened(ledger, state):
        for account, standing in sorted(opened.accounts.items()):
            epsilon, budget, window = standing.epsilon, standing.budget, standing.window
            cells = [f"{epsilon:.4g}", "none" if budget is None else f"{budget:g}", _left(budget, epsilon)]
            cells += ["none" if window is None else f"{window.epsilon:g}/{window.days:g}d", f"{standing.delta:.3g}"]
            cells += [str(sum(standing.history.values())), str(standing.changes)]
            rows.append([account.dataset, account.client, account.unit, *cells])
    _print(columns, rows)


@ledger_app.command()
def budget(
    client: Annotated[list[str] | None, typer.Argument(help="Clients (default: all).")] = None,
    ledger: Annotated[Path | None, typer.Option(help="A ledger file (default: all of the folder).")] = None,
    state: State = "",
    set_: Annotated[
        float | None, typer.Option("--set", help="Give the named clients, who have none, this budget, for good.")
    ] = None,
    noise: Annotated[float | None, typer.Option(help="Noise multiplier of the rounds that are counted.")] = None,
    rate: Annotated[float, typer.Option(help="Sampling rate of their steps, with --noise.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Steps a round, with --noise.")] = 1,
) -> None:
    """Print what each account may still spend, in all and in its window, and how many more rounds that pays for.

    Rounds are counted as the account's last one was, or as --noise, --rate and --steps say. A budget is fixed once an
    account has one: --set never changes it. Example: umbel ledger budget ward-7 --set 10
    """
    from privacy.plan import Mechanism
    from privacy.standing import rounds_left

    if noise is not None and not (0 < noise < math.inf and 0 < rate <= 1 and steps >= 1):
        raise Refused("--noise must be above 0, --rate above 0 and at most 1, --steps at least 1")
    books = _opened(ledger, state)
    named = {
        (book.path, account) for book in books for account in book.accounts if not client or account.client in client
    }
    if unknown := set(client or ()) - {account.client for _, account in named}:
        raise Refused(f"there is no account of client {min(unknown)!r}: `umbel ledger show` lists all")
    if set_ is not None:
        if not client:
            raise Refused("--set is for clients that are named: umbel ledger budget CLIENT --set 10")
        _set(books, {account.client for _, account in named}, set_)
    rows = []
    for book in books:
        for account, standing in sorted(book.accounts.items()):
            if (book.path, account) not in named:
                continue
            ask = standing.last if noise is None else (Mechanism(rate, noise), steps)
            more = None if ask is None else rounds_left(standing, ask, book.chain.now)
            cells = ["none" if standing.budget is None else f"{standing.budget:g}", f"{standing.epsilon:.4g}"]
            cells += [_left(standing.budget, standing.epsilon), _window_left(standing, book.chain.now)]
            cells += ["" if ask is None else "no limit" if more is None else str(more)]
            rows.append([account.dataset, account.client, account.unit, *cells])
    _print(("budget", "spent", "left", "left in window", "more rounds"), rows)


@ledger_app.command()
def adopt(
    ledger: Annotated[Path, typer.Argument(help="The ledger that was lost, damaged or rolled back.")],
    from_: Annotated[
        list[Path], typer.Option("--from", metavar="PEER", help="A copy of the other side's ledger and its .head.")
    ],
    client: Annotated[list[str] | None, typer.Option(help="Take over this client's accounts alone.")] = None,
) -> None:
    """Make a ledger anew from what of it can be read and what the other side wrote down; keeps the old files.

    A device's other side is the server's devices.ledger (take over its own client alone: --client NAME); the server's
    other sides are the node.ledger of each device. Each account is charged the larger count of every mechanism, so none
    is lowered. Example: umbel ledger adopt node.ledger --from devices.ledger --client ward-7
    """
    from privacy import adopt as adoption

    charged, aside = adoption.adopt(ledger, from_, client or ())
    _print(
        ("readable steps", "steps the other side has", "charged now"),
        [[c.account.dataset, c.account.client, c.account.unit, str(c.own), str(c.peers), str(c.now)] for c in charged],
    )
    for path in aside:
        print(f"kept {path}")


@ledger_app.command()
def forget(
    client: Annotated[str, typer.Argument(help="The client whose device has made its own ledger anew.")],
    ledger: Annotated[Path | None, typer.Option(help="A ledger file (default: all of the folder).")] = None,
    state: State = "",
) -> None:
    """Forget how far a device's own ledger had come, where cohorts are drawn in secret; no account changes.

    For after `umbel ledger adopt` on the device: its new ledger does not end where the old one did, and would be taken
    for one that was rolled back. Example: umbel ledger forget ward-7
    """
    from privacy import heads

    books = _opened(ledger, state)
    gone = sum(heads.forget(book, client) for book in books)
    if not gone:
        raise Refused(f"nothing is kept of the own ledger of a client {client!r}: there is nothing to forget")
    print(f"forgot {gone} of client {client}")


@ledger_app.command()
def verify(ledger: File = None, state: State = "") -> None:
    """Check every record against those before it and against the head file; exit code 2 if one does not fit."""
    from privacy import heads
    from privacy.ledger import Ledger

    for path in _paths(ledger, state):
        opened = Ledger(path)
        head = opened.read()
        heads.read(opened)
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


def _opened(ledger: Path | None, state: str) -> "list[Ledger]":
    from privacy.ledger import Ledger

    books = [Ledger(path) for path in _paths(ledger, state)]
    for book in books:
        book.read()
    return books


def _set(books: "Sequence[Ledger]", clients: Collection[str], value: float) -> None:
    for book in books:
        chosen = {account: terms for account, terms in book.accounts.items() if account.client in clients}
        for account, terms in chosen.items():
            if terms.budget is not None:
                raise Refused(f"client {account.client} has a budget of {terms.budget:g} for good: none was changed")
    for book in books:
        mine = {account: (value, terms.delta) for account, terms in book.accounts.items() if account.client in clients}
        if mine:
            book.open(mine)


def _left(budget: float | None, epsilon: float) -> str:
    return "" if budget is None else f"{max(0.0, budget - epsilon):.4g}"


def _window_left(standing: "Standing", now: int) -> str:
    from privacy import accounting

    if standing.window is None:
        return ""
    spent = accounting.epsilon(standing.recent(now), standing.delta)
    return (
        f"{max(0.0, standing.window.epsilon - spent):.4g} of {standing.window.epsilon:g} in {standing.window.days:g} d"
    )


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("data set", "client", "unit"):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 180, highlight=False).print(table)


def _paths(ledger: Path | None, state: str) -> list[Path]:
    from server.ledger_place import state_folder

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
