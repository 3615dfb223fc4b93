"""Adopt: a ledger that was lost, damaged or rolled back, made anew from what of it can be read and what others saw.

Its other sides are read by their digests alone, since their keys are theirs: someone who forged a peer's file can only
raise what is charged here. Guarantee: no account comes out below the readable part of this ledger, nor below any peer.
"""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from privacy.chain import readable
from privacy.durable import secret
from privacy.ledger import Account, Head, Ledger, opening
from privacy.refused import Refused

_PARTS = ("", ".head", ".key")  # replaced in this order: in between, the ledger is refused, and all of it readable
_EXTRA = " adopted"  # the run to which the steps go that a peer counts beyond this ledger's own COMMIT


class Charged(NamedTuple):
    """Steps of one account: in the readable part, by the peer that counts most, and now."""

    account: Account
    own: int
    peers: int
    now: int


class _Key(NamedTuple):
    account: Account
    run: str
    round: int
    attempt: int
    mechanism: tuple[float, ...]


def adopt(path: Path, peers: Sequence[Path], clients: Collection[str] = ()) -> tuple[list[Charged], list[Path]]:
    """Make the ledger `path` anew; returns what each account is charged, and where the old files were put.

    Every reservation that this ledger or a peer knows is charged by whoever counts more of its steps, so each mechanism
    of each account is charged at least the larger count. The readable part stays record by record, so the heads that
    were seen of it still hold; the heads beyond it that the peers kept are written down as settled.
    clients: whose accounts to take over; none: all. Raises Refused where a peer's file, or this one's lock, is no good.
    """
    theirs = [_peer(peer) for peer in peers]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if path.exists():
                file = stack.enter_context(path.open("rb"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise Refused(f"{path} is held by another process: wait for it or stop it") from None
            made = path.with_name(path.name + ".adopting")
            for part in _PARTS:
                made.with_name(made.name + part).unlink(missing_ok=True)
            charged = _write(made, path, theirs, clients)
            return charged, _exchange(made, path)
    except OSError as error:
        raise Refused(f"{path} cannot be written ({error.strerror}): it is as it was") from None


def _peer(path: Path) -> Ledger:
    if not path.is_file():
        raise Refused(f"there is no ledger {path} to adopt from: name the other side's file, its .head beside it")
    peer = Ledger(path, keep=True, keyed=False)
    peer.read()
    return peer


def _write(made: Path, path: Path, peers: Sequence[Ledger], clients: Collection[str]) -> list[Charged]:
    """Write the new ledger at `made`."""
    bodies, key = readable(path)
    secret(made.with_name(made.name + ".key"), key)
    bodies = _following(bodies, made)
    new = Ledger(made, keep=True)
    with new.chain.held() as file:
        new.chain.append(file, bodies)
        own = {account: sum(standing.history.values()) for account, standing in new.accounts.items()}
        for peer in peers:
            taken = {name for name in peer.accounts if not clients or name.client in clients}
            new.chain.append(file, _opened(new, peer, taken))
            new.chain.append(file, [*_missing(new, peer, taken), *_seen(new, peer, taken)])
    most = dict.fromkeys(new.accounts, 0)
    for peer in peers:
        for account, standing in peer.accounts.items():
            if account in most:
                most[account] = max(most[account], sum(standing.history.values()))
    return [
        Charged(account, own.get(account, 0), most[account], sum(standing.history.values()))
        for account, standing in new.accounts.items()
    ]


def _following(bodies: Sequence[dict[str, Any]], made: Path) -> list[dict[str, Any]]:
    """As many of the records as follow from one another."""
    scratch, found = Ledger(made), list[dict[str, Any]]()
    for sequence, body in enumerate(bodies, 1):
        try:
            if found and body["time"] < found[-1]["time"]:
                break
            scratch._take(sequence, body)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
            break
        found.append(body)
    return found


def _opened(new: Ledger, peer: Ledger, taken: Collection[Account]) -> list[dict[str, Any]]:
    """Accounts that only the peer knows, on its terms; the others keep their own."""
    return list(
        opening(
            {
                account: {"budget": terms.budget, "delta": terms.delta, "window": terms.window}
                for account, terms in peer.accounts.items()
                if account in taken and account not in new.accounts
            }
        )
    )


def _missing(new: Ledger, peer: Ledger, taken: Collection[Account]) -> list[dict[str, Any]]:
    """What the peer counts beyond what is charged here, reservation by reservation."""
    mine, theirs = _steps(new), _steps(peer)
    known, alike = {key[:4] for key in mine}, dict[tuple[Any, ...], list[Account]]()
    for key, steps in theirs.items():
        if key.account in taken and (more := steps - mine[key]) > 0:
            run = key.run + _EXTRA if key[:4] in known else key.run
            alike.setdefault((run, key.round, key.attempt, key.mechanism, more), []).append(key.account)
    names = ("run", "round", "attempt", "mechanism", "steps")
    groups = [(accounts, dict(zip(names, rest, strict=True))) for rest, accounts in alike.items()]
    return list(new.charging("RESERVE", groups))


def _seen(new: Ledger, peer: Ledger, taken: Collection[Account]) -> list[dict[str, Any]]:
    """The heads of this ledger that the peer kept, as settled; and the peer's own head."""
    heads = [
        Head(*body["head"])
        for body in peer.records or ()
        if body["kind"] == "SEEN" and any(peer.accounts.account(at) in taken for at in peer.places(body))
    ]
    beyond = [head for head in dict.fromkeys(heads) if not new.chain.holds(head)]
    bodies: list[dict[str, Any]] = [
        {"kind": "ADOPT", "heads": beyond[at : at + 500]} for at in range(0, max(1, len(beyond)), 500)
    ]
    told = [account for account in taken if account not in new.seen or peer.chain.holds(new.seen[account])]
    return [*bodies, *new.charging("SEEN", [(told, {"head": peer.chain.head})])]


def _steps(ledger: Ledger) -> Counter[_Key]:
    """Steps of every reservation that count as spent."""
    found: Counter[_Key] = Counter()
    mechanisms: dict[tuple[int, str, int, int], tuple[tuple[float, ...], int]] = {}
    for body in ledger.records or ():
        if body["kind"] not in ("RESERVE", "COMMIT", "VOID"):
            continue
        run = body["run"].removesuffix(_EXTRA)
        for at in ledger.places(body):
            place = at, body["run"], body["round"], body["attempt"]
            if body["kind"] == "RESERVE":
                mechanisms[place] = tuple(body["mechanism"]), body["steps"]
            mechanism, reserved = mechanisms[place]
            key = _Key(ledger.accounts.account(at), run, body["round"], body["attempt"], mechanism)
            found[key] += reserved if body["kind"] == "RESERVE" else body.get("steps", 0) - reserved
    return found


def _exchange(made: Path, path: Path) -> list[Path]:
    """Put the new files in place of the old ones, which stay under other names."""
    when, aside = time.strftime("%Y%m%d-%H%M%S"), list[Path]()
    for part in _PARTS:
        old = path.with_name(path.name + part)
        if old.exists():
            number = 0
            while (
                kept := path.with_name(f"{path.name}.damaged-{when}{f'-{number}' if number else ''}{part}")
            ).exists():
                number += 1
            os.link(old, kept)
            aside.append(kept)
    for part in _PARTS:
        made.with_name(made.name + part).replace(path.with_name(path.name + part))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return aside
