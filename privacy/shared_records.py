"""Records that many accounts share: opened on the same terms, or charged alike by one round, in one line for all.

Up to `ALONE` accounts of a call have a record each, which names the account by the number of the record
that opened it (`account`). Of more, those that differ in nothing but whose they are share one: OPEN has `clients` for
`client`, all others have `accounts` for `account`: ranges [first, last] of accounts in the order in which they were
opened, from 0. A reader that knows single records alone fails on them: it cannot count less than was spent.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Body = dict[str, Any]

ALONE = 100
_ROOM = 48_000
"""Characters of the longest list in a record; privacy.chain reads records of 65,536 bytes at most."""


def opening(unit: str, dataset: str, clients: Sequence[str], terms: Body) -> Iterator[Body]:
    """Shared OPEN records."""
    for part in _cut(clients):
        yield {"kind": "OPEN", "unit": unit, "clients": part, "dataset": dataset, **terms}


def seeing(digests: Mapping[int, str]) -> Iterator[Body]:
    """Shared DATA records: digests by account."""
    for part in _cut([([at, at], digest) for at, digest in digests.items()]):
        yield {"kind": "DATA", "accounts": ranges(at for (at, _), _ in part), "digests": [digest for _, digest in part]}


def charging(kind: str, places: Iterable[int], rest: Body) -> Iterator[Body]:
    """Shared records of any other kind."""
    for part in _cut(ranges(places)):
        yield {"kind": kind, "accounts": part, **rest}


def ranges(places: Iterable[int]) -> list[list[int]]:
    """[first, last] of what follows one another, in their order."""
    found: list[list[int]] = []
    for at in places:
        if found and at == found[-1][1] + 1:
            found[-1][1] = at
        else:
            found.append([at, at])
    return found


def places(accounts: Any, most: int) -> list[int]:
    """The accounts that ranges stand for, of `most` in all. Raises ValueError where one is not there, or is twice."""
    found = list[int]()
    for first, last in accounts:
        if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last < most):
            raise ValueError("no such accounts")
        found += range(first, last + 1)
        if len(found) > most:
            break
    if not found or len(set(found)) < len(found):
        raise ValueError("accounts are missing, or there twice")
    return found


def _cut(entries: Sequence[Any]) -> Iterator[list[Any]]:
    part, room = list[Any](), _ROOM
    for entry in entries:
        size = len(json.dumps(entry)) + 1
        if part and size > room:
            yield part
            part, room = [], _ROOM
        part.append(entry)
        room -= size
    if part:
        yield part
