"""Ledger: what may have left every client, over all runs, written down and fsynced before its data is touched.

Guarantee: whatever byte or moment a crash cuts it at, the account that is read back is never below what was released.
Where a step was reserved and nobody said what came of it, it counts as spent.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from privacy import standing
from privacy.chain import Chain, Head
from privacy.plan import Mechanism
from privacy.refused import Refused
from privacy.standing import TESTS, Account, Standing, Window

__all__ = ["TESTS", "Account", "Head", "Ledger", "Standing", "Window"]


class _Attempt(NamedTuple):
    number: int
    round: int
    mechanism: Mechanism
    steps: int
    time: int


class Ledger:
    """One file (privacy.chain) that several processes may share; each holds its lock for one call.

    Every method raises Refused, and leaves the file as it was, when it is damaged, of another version or out of reach.
    """

    def __init__(self, path: Path, keep: bool = False, keyed: bool = True) -> None:
        """keep: also keep the bodies of all records, in `records`. keyed: see privacy.chain.Chain."""
        self.path = path
        self.accounts: dict[Account, Standing] = {}
        self.records: list[dict[str, Any]] | None = [] if keep else None
        self._numbers: dict[Account, int] = {}  # the sequence number of an account's first OPEN: its short name
        self._names: dict[int, Account] = {}
        self._open: dict[tuple[str, Account], list[_Attempt]] = {}  # reservations without COMMIT or VOID, by run
        self._charged: Counter[tuple[str, Account]] = Counter()
        self._last: dict[tuple[str, Account], tuple[int, int]] = {}  # (round, attempt) of the newest reservation
        self.seen: dict[Account, Head] = {}
        """The last head of the ledger at the other side of each account."""
        self._adopted: set[Head] = set()  # heads beyond what could be read, whose spending was charged by `adopt`
        self._untouched: set[tuple[str, int, Account]] = set()  # reserved here: their data cannot have been touched
        self.chain = Chain(path, self._take, keyed)

    def read(self) -> Head:
        """Check every record that was not yet read; the head of a ledger that was never written is 0."""
        with self.chain.held(write=False):
            return self.chain.head

    def open(
        self,
        accounts: Mapping[Account, tuple[float | None, float]],
        window: Window | None = None,
        data: Mapping[Account, str] = {},
    ) -> None:
        """Open each account with (budget, delta) and `window`. They stay as they are from then on; an account that was
        opened without a budget, or without a window, takes the first one it is given. Raises Refused for another one.

        data: keyed digests of the accounts' data; each that is not the last one seen is written down as evidence.
        """
        with self.chain.held() as file:
            bodies: list[dict[str, Any]] = []
            for account, (budget, delta) in accounts.items():
                if not standing.valid(budget, delta, window):
                    raise Refused(
                        f"an account needs a budget above 0 and a delta between 0 and 1, not {budget}, {delta}"
                        + (f" (in a window: {window})" if window else "")
                    )
                known = self.accounts.get(account)
                if known is not None:
                    terms = self.terms(account, budget, window)
                    if (known.budget, known.delta, known.window) == terms:
                        continue
                    budget, delta, limit = terms
                else:
                    limit = window
                bodies.append({"kind": "OPEN", **account._asdict(), "budget": budget, "delta": delta, "window": limit})
            self.chain.append(file, bodies)
            self.chain.append(
                file,
                [
                    {"kind": "DATA", "account": self._numbers[account], "digest": digest}
                    for account, digest in data.items()
                    if account in self.accounts and digest != self.accounts[account].digest
                ],
            )

    def over(self, asks: Mapping[Account, tuple[Mechanism, int]]) -> dict[Account, str]:
        """The accounts that cannot pay for these steps now, each with what is left of it."""
        with self.chain.held(write=False):
            return standing.over(self.accounts, asks, self.chain.now)

    def reserve(
        self,
        run: str,
        number: int,
        asks: Mapping[Account, tuple[Mechanism, int]],
        attempt: int = 0,
        seen: Mapping[Account, Head] = {},
    ) -> dict[Account, str]:
        """Gate and RESERVE under one lock: durable on return for every account but those returned, which cannot pay.

        asks: the mechanism and its steps in round `number` of `run`. The value of a refused account says what is left.
        attempt: the one that the other side's ledger calls it by; 0: the next one. Raises Refused for one that does
        not come after all that were reserved. seen: heads of the ledgers at the other side, kept with it.
        """
        with self.chain.held() as file:
            refused, bodies = standing.over(self.accounts, asks, self.chain.now), self._heads(seen)
            for account, (mechanism, steps) in asks.items():
                if account in refused:
                    continue
                last = self._last.get((run, account), (0, 0))
                if attempt and (number, attempt) <= last:
                    raise Refused(f"attempt {attempt} of round {number} was reserved before: it cannot be asked again")
                name = attempt or (last[1] + 1 if last[0] == number else 1)
                key = {"account": self._numbers[account], "run": run, "round": number, "attempt": name}
                bodies.append({"kind": "RESERVE", **key, "mechanism": mechanism.figures, "steps": steps})
            self.chain.append(file, bodies)
        self._untouched |= {(run, number, account) for account in asks if account not in refused}
        return refused

    def attempt(self, run: str, account: Account) -> tuple[int, int]:
        """(round, attempt) of what the account last reserved for `run`; (0, 0): nothing yet."""
        return self._last.get((run, account), (0, 0))

    def commit(self, run: str, number: int, taken: Mapping[Account, int], seen: Mapping[Account, Head] = {}) -> None:
        """COMMIT: of what these accounts last reserved, `taken` steps were released and no more can be.

        seen: heads of the ledgers at the other side. Not fsynced before the next reservation: a COMMIT that a power cut
        loses leaves the whole reservation spent.
        """
        self._settle("COMMIT", run, number, taken, False, self._heads(seen))

    def void(self, run: str, number: int, accounts: Collection[Account]) -> None:
        """VOID: these reservations of this very object were never acted upon, so nothing of them is spent.

        Raises Refused for a reservation that was made by another process or is settled: its data may be touched.
        """
        if any((run, number, account) not in self._untouched for account in accounts):
            raise Refused(f"round {number} of run {run} may have touched data: what it reserved stays spent")
        self._settle("VOID", run, number, dict.fromkeys(accounts, 0), True, [])

    def of_run(self, run: str, account: Account) -> int:
        """Steps that `run` has charged to the account, as far as was read; void ones not counted."""
        return self._charged[run, account]

    def unanswered(self, run: str, committed: int) -> Counter[Account]:
        """Steps by account that `run` reserved for rounds after `committed`: they count as spent."""
        spent: Counter[Account] = Counter()
        with self.chain.held(write=False):
            for (owner, account), attempts in self._open.items():
                if owner == run:
                    spent[account] += sum(attempt.steps for attempt in attempts if attempt.round > committed)
        return +spent

    def seal(self) -> Head:
        """Make the last COMMITs durable, too; returns the head, which anyone may keep as evidence."""
        with self.chain.held() as file:
            self.chain.seal(file)
        return self.chain.head

    def holds(self, head: Head) -> bool:
        """Whether this ledger goes on from `head`; False when it was rolled back behind it, or is another one."""
        self.read()
        return self.chain.holds(head) or head in self._adopted

    def terms(
        self, account: Account, budget: float | None, window: Window | None
    ) -> tuple[float | None, float, Window | None]:
        """(budget, delta, window) of an open account once it is asked for these. Raises Refused for others than its."""
        known = self.accounts[account]
        for what, has, asked in (("budget", known.budget, budget), ("window", known.window, window)):
            if None not in (has, asked) and has != asked:
                shown = f"{has.epsilon:g} in {has.days:g} days" if isinstance(has, Window) else f"{has:g}"
                raise Refused(
                    f"the account of client {account.client} on {account.dataset} was opened with a {what} of {shown} "
                    f"({self.path}) and keeps it: ask for the same {what}, or for none"
                )
        return known.budget or budget, known.delta, known.window or window

    def _heads(self, seen: Mapping[Account, Head]) -> list[dict[str, Any]]:
        return [
            {"kind": "SEEN", "account": self._numbers[account], "head": head}
            for account, head in seen.items()
            if head != self.seen.get(account)
        ]

    def _settle(
        self, kind: str, run: str, number: int, taken: Mapping[Account, int], durable: bool, more: list[dict[str, Any]]
    ) -> None:
        with self.chain.held() as file:
            bodies = list(more)
            for account, steps in taken.items():
                attempt = self._last[run, account][1]
                key = {"account": self._numbers[account], "run": run, "round": number, "attempt": attempt}
                bodies.append({"kind": kind, **key, **({"steps": steps} if kind == "COMMIT" else {})})
            self.chain.append(file, bodies, durable)
        self._untouched -= {(run, number, account) for account in taken}

    def _take(self, sequence: int, body: dict[str, Any]) -> None:
        """Take one record in. Raises ValueError or KeyError when it does not follow from those before it."""
        match body["kind"]:
            case "OPEN":
                self._take_open(sequence, body)
            case "DATA":
                account = self.accounts[self._names[body["account"]]]
                account.changes += account.digest not in ("", body["digest"])
                account.digest = body["digest"]
            case "SEEN":
                self.seen[self._names[body["account"]]] = Head(*body["head"])
            case "ADOPT":
                self._adopted |= {Head(*head) for head in body["heads"]}
            case kind:
                self._take_spending(kind, body)
        if self.records is not None:
            self.records.append(body)

    def _take_open(self, sequence: int, body: dict[str, Any]) -> None:
        account, budget = Account(body["unit"], body["client"], body["dataset"]), body["budget"]
        window = None if body["window"] is None else Window(*body["window"])
        if not standing.valid(budget, body["delta"], window):
            raise ValueError("no terms")
        if (known := self.accounts.get(account)) is None:
            self.accounts[account] = Standing(budget, body["delta"], window)
            self._numbers[account], self._names[sequence] = sequence, account
        elif known.delta != body["delta"] or (known.budget or budget, known.window or window) != (budget, window):
            raise ValueError("terms are fixed")
        else:
            known.budget, known.window = budget, window

    def _take_spending(self, kind: str, body: dict[str, Any]) -> None:
        account, number, name = self._names[body["account"]], body["round"], body["attempt"]
        spent, pending = self.accounts[account], self._open.setdefault((body["run"], account), [])
        if kind == "RESERVE" and body["steps"] > 0:
            attempt = _Attempt(name, number, Mechanism(*body["mechanism"]), body["steps"], body["time"])
            pending.append(attempt)
            spent.add(attempt.mechanism, attempt.steps, attempt.time)
            spent.last = attempt.mechanism, attempt.steps
            self._charged[body["run"], account] += attempt.steps
            self._last[body["run"], account] = max(self.attempt(body["run"], account), (number, name))
        else:
            (attempt,) = (each for each in pending if (each.number, each.round) == (name, number))
            if kind not in ("COMMIT", "VOID") or not 0 <= (taken := body.get("steps", 0)) <= attempt.steps:
                raise ValueError("no such record")
            pending.remove(attempt)
            spent.add(attempt.mechanism, taken - attempt.steps, attempt.time)
            self._charged[body["run"], account] += taken - attempt.steps
