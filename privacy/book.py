"""Book: where every account of a ledger stands; those that are charged together and stand alike share one standing."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from privacy.plan import Mechanism
from privacy.standing import Account, Standing, Window

Places = Sequence[int]
"""Accounts by the order in which they were opened, from 0."""

_SHORT = 64
"""Entries of a history up to which accounts that are charged together share it; a longer one belongs to one alone."""


class Charge(NamedTuple):
    """Steps that an account has reserved."""

    mechanism: Mechanism
    steps: int
    time: int


class Book(Mapping[Account, Standing]):
    """By account, in the order of their opening; some 300 bytes each, most of them for its name."""

    def __init__(self) -> None:
        self._places: dict[Account, int] = {}
        self._accounts: list[Account] = []
        self._standings: list[Standing] = []  # none of the shared ones is ever changed
        self._alike: WeakValueDictionary[Any, Standing] = WeakValueDictionary()
        self._own: set[int] = set()  # whose standing is shared with nobody
        self._digests: list[str | bytes] = []
        self._changes = array("i")

    def __getitem__(self, account: Account) -> Standing:
        """For reading alone."""
        at = self._places[account]
        digest = self._digests[at]
        known = digest.hex() if isinstance(digest, bytes) else digest
        return replace(self._standings[at], digest=known, changes=self._changes[at])

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts)

    def __len__(self) -> int:
        return len(self._accounts)

    def __contains__(self, account: object) -> bool:
        return account in self._places

    def account(self, at: int) -> Account:
        return self._accounts[at]

    def places(self, accounts: Iterable[Account]) -> Places:
        """Raises KeyError for one that is not open."""
        return [self._places[account] for account in accounts]

    def standing(self, account: Account) -> Standing:
        """As in the book, shared with all that stand alike, without the account's own digest."""
        return self._standings[self._places[account]]

    def of(self, accounts: Iterable[Account]) -> dict[Account, Standing]:
        """The same of each of these."""
        return {account: self.standing(account) for account in accounts}

    def digest(self, account: Account) -> str:
        """Of the account's data when it was last seen; empty: never."""
        digest = self._digests[self._places[account]]
        return digest.hex() if isinstance(digest, bytes) else digest

    def distinct(self) -> Iterable[tuple[str, Standing]]:
        """Every unit and standing that occurs."""
        found = {
            (account.unit, id(standing)): standing
            for account, standing in zip(self._accounts, self._standings, strict=True)
        }
        return [(unit, standing) for (unit, _), standing in found.items()]

    def open(self, account: Account, budget: float | None, delta: float, window: Window | None) -> int:
        """A new account, or other terms of one that is open; its place."""
        if (at := self._places.get(account)) is None:
            at = self._places[account] = len(self._accounts)
            self._accounts.append(account)
            fresh = self._alike.get((budget, delta, window, frozenset(), frozenset(), None))
            self._standings.append(fresh or self._shared(Standing(budget, delta, window)))
            self._digests.append("")
            self._changes.append(0)
            return at
        self._put(at, replace(self._standings[at], budget=budget, delta=delta, window=window))
        return at

    def see(self, at: int, digest: str) -> None:
        """The account's data were seen."""
        before = self._digests[at]
        packed = _packed(digest)
        self._changes[at] += before not in ("", packed)
        self._digests[at] = packed

    def charge(self, places: Places, charge: Charge, by: int, last: bool = False) -> None:
        """`by` more steps of what was charged, or fewer; last: it is what these accounts reserved last."""
        if not by and not last:
            return
        seen: dict[int, tuple[Standing, Standing]] = {}  # keeps what it names by its id
        for at in places:
            old = self._standings[at]
            if at in self._own:
                old.add(charge.mechanism, by, charge.time)
                old.last = (charge.mechanism, charge.steps) if last else old.last
                continue
            if (known := seen.get(id(old))) is None:
                new = replace(old, history=Counter(old.history), dated=Counter(old.dated))
                new.add(charge.mechanism, by, charge.time)
                new.last = (charge.mechanism, charge.steps) if last else old.last
                if len(places) == 1 or len(new.dated) > _SHORT:  # to look for others costs more than it takes
                    self._standings[at] = new
                    self._own.add(at)
                    continue
                known = seen[id(old)] = old, self._shared(new)
            self._standings[at] = known[1]

    def _put(self, at: int, standing: Standing) -> None:
        self._standings[at] = standing if at in self._own else self._shared(standing)

    def _shared(self, made: Standing) -> Standing:
        history, dated = frozenset(made.history.items()), frozenset(made.dated.items())
        return self._alike.setdefault((made.budget, made.delta, made.window, history, dated, made.last), made)


def _packed(digest: str) -> str | bytes:
    """A digest in half the room, where it is one of 64 figures."""
    return bytes.fromhex(digest) if re.fullmatch("[0-9a-f]{64}", digest) else digest
