"""Ledger: what may have left every client, over all runs, written down and fsynced before its data is touched.

Guarantee: whatever byte or moment a crash cuts it at, the account that is read back is never below what was released.
Where a step was reserved and nobody said what came of it, it counts as spent.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from privacy import shared_records, standing
from privacy.book import Book, Charge, Places
from privacy.chain import Chain, Head
from privacy.plan import Mechanism
from privacy.refused import Refused
from privacy.standing import TESTS, Account, Standing, Window

__all__ = ["TESTS", "Account", "Head", "Ledger", "Standing", "Window"]

_NUMBERS = 1 << 53


class _Run:
    """What a run has charged, by account: 24 bytes for each that was open when it last charged one."""

    def __init__(self) -> None:
        self.steps, self.rounds, self.attempts = array("q"), array("q"), array("q")

    def make_room(self, places: Places) -> None:
        more = max(places) + 1 - len(self.steps)
        if more > 0:
            for one in (self.steps, self.rounds, self.attempts):
                one.extend([0] * more)


class Ledger:
    """One file (privacy.chain) that several processes may share; each holds its lock for one call.

    Every method raises Refused, and leaves the file as it was, when it is damaged, of another version or out of reach.
    """

    def __init__(self, path: Path, keep: bool = False, keyed: bool = True) -> None:
        """keep: also keep the bodies of all records, in `records`. keyed: see privacy.chain.Chain."""
        self.path = path
        self.accounts = Book()
        self.records: list[dict[str, Any]] | None = [] if keep else None
        self._numbers: dict[int, int] = {}  # of the record that opened an account by itself -> its place
        self._openings: dict[int, int] = {}  # and back
        self._runs: dict[str, _Run] = {}
        self._open: dict[tuple[str, int, int], dict[int, tuple[Charge, ...]]] = {}
        """Reservations without COMMIT or VOID, by run, round and attempt."""
        self.seen: dict[Account, Head] = {}
        """The last head of the ledger at the other side of each account."""
        self._adopted: set[Head] = set()  # heads beyond what could be read, whose spending was charged by `adopt`
        self._untouched: dict[tuple[str, int], set[Account]] = {}  # reserved here: their data cannot have been touched
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
        durable: bool = True,
    ) -> None:
        """Open each account with (budget, delta) and `window`. They stay as they are from then on; an account that was
        opened without a budget, or without a window, takes the first one it is given. Raises Refused for another one.

        data: keyed digests of the accounts' data; each that is not the last one seen is written down as evidence.
        durable: False where a reservation follows, which is.
        """
        with self.chain.held() as file:
            wanted: dict[Account, dict[str, Any]] = {}
            for account, (budget, delta) in accounts.items():
                if not standing.valid(budget, delta, window):
                    raise Refused(
                        f"an account needs a budget above 0 and a delta between 0 and 1, not {budget}, {delta}"
                        + (f" (in a window: {window})" if window else "")
                    )
                limit = window
                if account in self.accounts:
                    known = self.accounts.standing(account)
                    terms = self.terms(account, budget, window)
                    if (known.budget, known.delta, known.window) == terms:
                        continue
                    budget, delta, limit = terms
                wanted[account] = {"budget": budget, "delta": delta, "window": limit}
            self.chain.append(file, list(opening(wanted)), durable)
            changed = {
                account: digest
                for account, digest in data.items()
                if account in self.accounts and digest != self.accounts.digest(account)
            }
            self.chain.append(file, list(self._seeing(changed)), durable)

    def over(self, asks: Mapping[Account, tuple[Mechanism, int]]) -> dict[Account, str]:
        """The accounts that cannot pay for these steps now, each with what is left of it."""
        with self.chain.held(write=False):
            return standing.over(self.accounts.of(asks), asks, self.chain.now)

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
        not come after all that were reserved, and for numbers that no record holds. seen: heads of the ledgers at the
        other side, kept with it.
        """
        if not 0 < number < _NUMBERS or not 0 <= attempt < _NUMBERS:
            raise Refused(f"round {number}, attempt {attempt}: a ledger counts from 1 to {_NUMBERS - 1}")
        if wrong := [steps for _, steps in asks.values() if not 0 < steps < _NUMBERS]:
            raise Refused(f"{wrong[0]} steps cannot be reserved: a ledger counts from 1 to {_NUMBERS - 1}")
        with self.chain.held() as file:
            refused, bodies = standing.over(self.accounts.of(asks), asks, self.chain.now), self._heads(seen)
            alike: dict[tuple[int, Mechanism, int], list[Account]] = {}
            for account, (mechanism, steps) in asks.items():
                if account in refused:
                    continue
                last = self.attempt(run, account)
                if attempt and (number, attempt) <= last:
                    raise Refused(f"attempt {attempt} of round {number} was reserved before: it cannot be asked again")
                name = attempt or (last[1] + 1 if last[0] == number else 1)
                alike.setdefault((name, mechanism, steps), []).append(account)
            groups = [
                (
                    accounts,
                    {"run": run, "round": number, "attempt": name, "mechanism": mechanism.figures, "steps": steps},
                )
                for (name, mechanism, steps), accounts in alike.items()
            ]
            self.chain.append(file, [*bodies, *self.charging("RESERVE", groups)])
        self._untouched.setdefault((run, number), set()).update(asks.keys() - refused.keys())
        return refused

    def attempt(self, run: str, account: Account) -> tuple[int, int]:
        """(round, attempt) of what the account last reserved for `run`; (0, 0): nothing yet."""
        owner, (at,) = self._runs.get(run), self.accounts.places([account]) if account in self.accounts else (-1,)
        if owner is None or not 0 <= at < len(owner.rounds):
            return 0, 0
        return owner.rounds[at], owner.attempts[at]

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
        if not self._untouched.get((run, number), set()).issuperset(accounts):
            raise Refused(f"round {number} of run {run} may have touched data: what it reserved stays spent")
        self._settle("VOID", run, number, dict.fromkeys(accounts, 0), True, [])

    def of_run(self, run: str, account: Account) -> int:
        """Steps that `run` has charged to the account, as far as was read; void ones not counted."""
        if run not in self._runs or account not in self.accounts:
            return 0
        (at,), steps = self.accounts.places([account]), self._runs[run].steps
        return steps[at] if at < len(steps) else 0

    def unanswered(self, run: str, committed: int) -> Counter[Account]:
        """Steps by account that `run` reserved for rounds after `committed`: they count as spent."""
        spent: Counter[Account] = Counter()
        with self.chain.held(write=False):
            for (owner, number, _), pending in self._open.items():
                if owner == run and number > committed:
                    for at, charges in pending.items():
                        spent[self.accounts.account(at)] += sum(charge.steps for charge in charges)
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
        known = self.accounts.standing(account)
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
            body
            for account, head in seen.items()
            if head != self.seen.get(account)
            for body in self.charging("SEEN", [([account], {"head": head})])
        ]

    def places(self, body: Mapping[str, Any]) -> Places:
        """The accounts that a record is about. Raises ValueError or KeyError where they are not open."""
        if "account" in body:
            return [self._numbers[body["account"]]]
        return shared_records.places(body["accounts"], len(self.accounts))

    def charging(
        self, kind: str, groups: Iterable[tuple[Collection[Account], dict[str, Any]]]
    ) -> Iterator[dict[str, Any]]:
        """Records of that kind: what is alike for the accounts of each group, in their order."""
        known = [(self.accounts.places(accounts), rest) for accounts, rest in groups]
        numbers = self._own_numbers([at for places, _ in known for at in places])
        for places, rest in known:
            if numbers is None:
                yield from shared_records.charging(kind, places, rest)
            else:
                yield from ({"kind": kind, "account": numbers[at], **rest} for at in places)

    def _seeing(self, digests: Mapping[Account, str]) -> Iterator[dict[str, Any]]:
        places = self.accounts.places(digests)
        if (numbers := self._own_numbers(places)) is None:
            yield from shared_records.seeing(dict(zip(places, digests.values(), strict=True)))
        else:
            for at, digest in zip(places, digests.values(), strict=True):
                yield {"kind": "DATA", "account": numbers[at], "digest": digest}

    def _own_numbers(self, places: Places) -> dict[int, int] | None:
        """Each account's number, where all are few enough for records of their own, and have one; else None."""
        if len(places) > shared_records.ALONE:
            return None
        if any(at not in self._openings for at in places):
            return None
        return {at: self._openings[at] for at in places}

    def _settle(
        self, kind: str, run: str, number: int, taken: Mapping[Account, int], durable: bool, more: list[dict[str, Any]]
    ) -> None:
        with self.chain.held() as file:
            alike: dict[tuple[int, int], list[Account]] = {}
            for account, steps in taken.items():
                if not (attempt := self.attempt(run, account)[1]):
                    raise KeyError(account)
                alike.setdefault((attempt, steps), []).append(account)
            groups = [
                (
                    accounts,
                    {"run": run, "round": number, "attempt": attempt} | ({"steps": steps} if kind == "COMMIT" else {}),
                )
                for (attempt, steps), accounts in alike.items()
            ]
            self.chain.append(file, [*more, *self.charging(kind, groups)], durable)
        if left := self._untouched.get((run, number)):
            left.difference_update(taken)
            if not left:
                del self._untouched[run, number]

    def _take(self, sequence: int, body: dict[str, Any]) -> None:
        """Take one record in. Raises ValueError or KeyError when it does not follow from those before it."""
        match body["kind"]:
            case "OPEN":
                self._take_open(sequence, body)
            case "DATA":
                digests = [body["digest"]] if "digest" in body else body["digests"]
                for at, digest in zip(self.places(body), digests, strict=True):
                    self.accounts.see(at, digest)
            case "SEEN":
                for at in self.places(body):
                    self.seen[self.accounts.account(at)] = Head(*body["head"])
            case "ADOPT":
                self._adopted |= {Head(*head) for head in body["heads"]}
            case kind:
                self._take_spending(kind, body)
        if self.records is not None:
            self.records.append(body)

    def _take_open(self, sequence: int, body: dict[str, Any]) -> None:
        budget, delta = body["budget"], body["delta"]
        window = None if body["window"] is None else Window(*body["window"])
        if not standing.valid(budget, delta, window):
            raise ValueError("no terms")
        alone = "client" in body
        for client in [body["client"]] if alone else body["clients"]:
            account = Account(body["unit"], client, body["dataset"])
            if account in self.accounts:
                known = self.accounts.standing(account)
                if known.delta != delta or (known.budget or budget, known.window or window) != (budget, window):
                    raise ValueError("terms are fixed")
                self.accounts.open(account, budget, delta, window)
            else:
                at = self.accounts.open(account, budget, delta, window)
                if alone:
                    self._numbers[sequence], self._openings[at] = at, sequence

    def _take_spending(self, kind: str, body: dict[str, Any]) -> None:
        places, run, key = self.places(body), body["run"], (body["run"], body["round"], body["attempt"])
        if kind == "RESERVE" and body["steps"] > 0:
            charge = Charge(Mechanism(*body["mechanism"]), body["steps"], body["time"])
            pending, owner = self._open.setdefault(key, {}), self._runs.setdefault(run, _Run())
            owner.make_room(places)
            for at in places:
                pending[at] = (*pending.get(at, ()), charge)
                owner.steps[at] += charge.steps
                owner.rounds[at], owner.attempts[at] = max((owner.rounds[at], owner.attempts[at]), key[1:])
            self.accounts.charge(places, charge, charge.steps, last=True)
            return
        taken, pending = body.get("steps", 0), self._open.get(key, {})
        alike: dict[Charge, list[int]] = {}
        for at in places:
            (charge,) = pending.get(at, ())
            alike.setdefault(charge, []).append(at)
        if kind not in ("COMMIT", "VOID") or any(not 0 <= taken <= charge.steps for charge in alike):
            raise ValueError("no such record")
        for charge, settled in alike.items():
            self.accounts.charge(settled, charge, taken - charge.steps)
            for at in settled:
                del pending[at]
                self._runs[run].steps[at] += taken - charge.steps
        if not pending:
            del self._open[key]


def opening(wanted: Mapping[Account, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """OPEN records of these accounts on these terms."""
    if len(wanted) <= shared_records.ALONE:
        yield from ({"kind": "OPEN", **account._asdict(), **terms} for account, terms in wanted.items())
        return
    alike: dict[tuple[Any, ...], list[str]] = {}
    for account, terms in wanted.items():
        alike.setdefault((account.unit, account.dataset, *terms.values()), []).append(account.client)
    for (unit, dataset, budget, delta, window), clients in alike.items():
        terms = {"budget": budget, "delta": delta, "window": window}
        yield from shared_records.opening(unit, dataset, clients, terms)
