"""Ledger: what may have left every client, over all runs, written down and fsynced before its data is touched.

Guarantee: whatever byte or moment a crash cuts it at, the account that is read back is never below what was released.
Where a step was reserved and nobody said what came of it, it counts as spent.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from privacy import accounting
from privacy.chain import Chain, Head
from privacy.plan import Mechanism
from privacy.refused import Refused


class Account(NamedTuple):
    """Whose spending is added up, whatever run it comes from."""

    unit: str
    client: str
    dataset: str
    """The declared name of the data; its content may change."""


@dataclass
class Standing:
    """What an account may spend and has spent."""

    budget: float | None
    """Epsilon over the ledger's life; None: no limit."""
    delta: float
    history: Counter[Mechanism] = field(default_factory=Counter)
    """Steps that may have been released."""

    @property
    def epsilon(self) -> float:
        return accounting.epsilon(self.history, self.delta)


class _Attempt(NamedTuple):
    number: int
    round: int
    mechanism: Mechanism
    steps: int


class Ledger:
    """One file (privacy.chain) that several processes may share; each holds its lock for one call.

    Every method raises Refused, and leaves the file as it was, when it is damaged, of another version or out of reach.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        """keep: also keep the bodies of all records, in `records`."""
        self.path = path
        self.accounts: dict[Account, Standing] = {}
        self.records: list[dict[str, Any]] | None = [] if keep else None
        self._numbers: dict[Account, int] = {}  # the sequence number of an account's first OPEN: its short name
        self._names: dict[int, Account] = {}
        self._open: dict[tuple[str, Account], list[_Attempt]] = {}  # reservations without COMMIT or VOID, by run
        self._charged: Counter[tuple[str, Account]] = Counter()
        self._last: dict[tuple[str, Account], tuple[int, int]] = {}  # (round, attempt) of the newest reservation
        self._untouched: set[tuple[str, int, Account]] = set()  # reserved here: their data cannot have been touched
        self.chain = Chain(path, self._take)

    def read(self) -> Head:
        """Check every record that was not yet read; the head of a ledger that was never written is 0."""
        with self.chain.held(write=False):
            return self.chain.head

    def open(self, accounts: Mapping[Account, tuple[float | None, float]]) -> None:
        """Open each account with (budget, delta). Both stay as they are from then on; an account that was opened
        without a budget takes the first one it is given. Raises Refused for another budget than the account's.
        """
        with self.chain.held() as file:
            bodies = []
            for account, (budget, delta) in accounts.items():
                if not (0 < delta < 1 and (budget is None or 0 < budget < math.inf)):
                    raise Refused(
                        f"an account needs a budget above 0 and a delta between 0 and 1, not {budget}, {delta}"
                    )
                known = self.accounts.get(account)
                if known and budget is not None and known.budget not in (None, budget):
                    raise Refused(
                        f"the account of client {account.client} on {account.dataset} was opened with a budget of "
                        f"{known.budget:g} ({self.path}) and keeps it: set privacy.budget={known.budget:g} or omit it"
                    )
                if known is None or (known.budget is None and budget is not None):
                    delta = known.delta if known else delta
                    bodies.append({"kind": "OPEN", **account._asdict(), "budget": budget, "delta": delta})
            self.chain.append(file, bodies)

    def over(self, asks: Mapping[Account, tuple[Mechanism, int]]) -> dict[Account, str]:
        """The accounts that cannot pay for these steps now, each with what is left of it."""
        with self.chain.held(write=False):
            return self._over(asks)

    def reserve(self, run: str, number: int, asks: Mapping[Account, tuple[Mechanism, int]]) -> dict[Account, str]:
        """Gate and RESERVE under one lock: durable on return for every account but those returned, which cannot pay.

        asks: the mechanism and its steps in round `number` of `run`. The value of a refused account says what is left.
        """
        with self.chain.held() as file:
            refused, bodies = self._over(asks), []
            for account, (mechanism, steps) in asks.items():
                if account in refused:
                    continue
                last, attempt = self._last.get((run, account), (0, 0))
                key = {"account": self._numbers[account], "run": run, "round": number}
                attempt = attempt + 1 if last == number else 1
                bodies.append(
                    {"kind": "RESERVE", **key, "attempt": attempt, "mechanism": mechanism.figures, "steps": steps}
                )
            self.chain.append(file, bodies)
        self._untouched |= {(run, number, account) for account in asks if account not in refused}
        return refused

    def commit(self, run: str, number: int, taken: Mapping[Account, int]) -> None:
        """COMMIT: of what these accounts last reserved, `taken` steps were released and no more can be.

        Not fsynced before the next reservation: a COMMIT that a power cut loses leaves the whole reservation spent.
        """
        self._settle("COMMIT", run, number, taken, durable=False)

    def void(self, run: str, number: int, accounts: Collection[Account]) -> None:
        """VOID: these reservations of this very object were never acted upon, so nothing of them is spent.

        Raises Refused for a reservation that was made by another process or is settled: its data may be touched.
        """
        if any((run, number, account) not in self._untouched for account in accounts):
            raise Refused(f"round {number} of run {run} may have touched data: what it reserved stays spent")
        self._settle("VOID", run, number, dict.fromkeys(accounts, 0), durable=True)

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
        return self.chain.holds(head)

    def _settle(self, kind: str, run: str, number: int, taken: Mapping[Account, int], durable: bool) -> None:
        with self.chain.held() as file:
            bodies = []
            for account, steps in taken.items():
                attempt = self._last[run, account][1]
                key = {"account": self._numbers[account], "run": run, "round": number, "attempt": attempt}
                bodies.append({"kind": kind, **key, **({"steps": steps} if kind == "COMMIT" else {})})
            self.chain.append(file, bodies, durable)
        self._untouched -= {(run, number, account) for account in taken}

    def _over(self, asks: Mapping[Account, tuple[Mechanism, int]]) -> dict[Account, str]:
        refused = {}
        for account, (mechanism, steps) in asks.items():
            standing = self.accounts[account]
            accounting.one_adjacency([mechanism, *+standing.history])
            if standing.budget is not None:
                after = standing.history + Counter({mechanism: steps})
                if not accounting.epsilon(after, standing.delta) <= standing.budget:
                    left = max(0.0, standing.budget - standing.epsilon)
                    refused[account] = f"{left:.3g} of its {standing.budget:g} is left, which does not pay for a round"
        return refused

    def _take(self, sequence: int, body: dict[str, Any]) -> None:
        """Take one record in. Raises ValueError or KeyError when it does not follow from those before it."""
        kind = body["kind"]
        if kind == "OPEN":
            account = Account(body["unit"], body["client"], body["dataset"])
            if account in self.accounts:
                if self.accounts[account].budget is not None:
                    raise ValueError("a budget is fixed")
                self.accounts[account].budget = body["budget"]
            else:
                self.accounts[account] = Standing(body["budget"], body["delta"])
                self._numbers[account], self._names[sequence] = sequence, account
        else:
            account, number, name = self._names[body["account"]], body["round"], body["attempt"]
            history, pending = self.accounts[account].history, self._open.setdefault((body["run"], account), [])
            if kind == "RESERVE" and body["steps"] > 0:
                attempt = _Attempt(name, number, Mechanism(*body["mechanism"]), body["steps"])
                pending.append(attempt)
                history[attempt.mechanism] += attempt.steps
                self._charged[body["run"], account] += attempt.steps
                self._last[body["run"], account] = number, name
            else:
                (attempt,) = (each for each in pending if (each.number, each.round) == (name, number))
                if kind not in ("COMMIT", "VOID") or not 0 <= (taken := body.get("steps", 0)) <= attempt.steps:
                    raise ValueError("no such record")
                pending.remove(attempt)
                history[attempt.mechanism] -= attempt.steps - taken
                self._charged[body["run"], account] -= attempt.steps - taken
        if self.records is not None:
            self.records.append(body)
