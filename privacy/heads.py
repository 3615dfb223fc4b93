"""Heads: the last head of every device's own ledger, in one private file beside the server's, without a history.

For where nobody may know who was drawn: a head moves when its device trains, so a record of it in the append-only
ledger would name the cohort, and how far it moved would tell how often. Layout: a tag under the ledger's key, in hex,
and a line of JSON an account, in their order and of constant length. Replaced as a whole, under the ledger's lock.

Guarantee: a head that is read here was durable on its device before; an older file, or none, accuses nobody.
"""

import hmac
import json
from collections.abc import Mapping
from pathlib import Path

from privacy.durable import write_atomic
from privacy.ledger import Account, Head, Ledger
from privacy.refused import Refused

_KIND = b"heads of devices\n"


def place(ledger: Ledger) -> Path:
    """Where the file of `ledger` lies: devices.heads beside devices.ledger."""
    return ledger.path.with_suffix(".heads")


def read(ledger: Ledger) -> dict[Account, Head]:
    """What is known; nothing where there is no file. Raises Refused for one that is damaged or another ledger's."""
    if not place(ledger).exists():
        return {}
    with ledger.chain.held(write=False):
        return _read(ledger)


def keep(ledger: Ledger, heard: Mapping[Account, Head]) -> dict[Account, Head]:
    """Take these heads in, durably; returns all that are known then, of other runs on this ledger, too.

    The further one stays: of two runs at a time the one that commits last may have heard from a device first.
    """
    with ledger.chain.held():
        known = _read(ledger)
        if heard or known:  # a fleet without ledgers of its own has no such file
            further = {
                one: head for one, head in heard.items() if one not in known or head.sequence > known[one].sequence
            }
            known |= further
            _write(ledger, known)
        return known


def forget(ledger: Ledger, client: str) -> int:
    """Forget what was heard from this client, whose ledger was made anew; how many heads that were."""
    with ledger.chain.held():
        known = _read(ledger)
        rest = {account: head for account, head in known.items() if account.client != client}
        if rest != known:
            _write(ledger, rest)
        return len(known) - len(rest)


def _read(ledger: Ledger) -> dict[Account, Head]:
    path = place(ledger)
    try:
        tag, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return {}
    expected = ledger.chain.tag(_KIND + body)
    if not expected or not hmac.compare_digest(expected.hex().encode(), tag):
        raise Refused(
            f"{path} is damaged, or was not written with the key of {ledger.path}: bring both back from one copy; or "
            "delete it, and until a device is heard from again nothing tells that its ledger was rolled back"
        )
    lines = [json.loads(line) for line in body.splitlines()]
    return {Account(*who): Head(int(sequence), digest) for *who, sequence, digest in lines}


def _write(ledger: Ledger, heads: Mapping[Account, Head]) -> None:
    body = b"".join(
        json.dumps([*account, f"{head.sequence:020d}", head.digest]).encode() + b"\n"
        for account, head in sorted(heads.items())
    )
    write_atomic(place(ledger), ledger.chain.tag(_KIND + body).hex().encode() + b"\n" + body, private=True)
