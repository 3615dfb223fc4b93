"""Accounts: a run's side of the ledger; where it lies, what each client may still release, what each round released."""

import os
import re
import secrets
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clients.task import Hello
from privacy import accounting
from privacy.chain import Head
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios import Scenario
from scenarios.settings import Settings
from server.record import RunFolder
from server.select import round_steps
from server.state import Row, ServerState


class Exhausted(Exception):
    """Fewer than rounds.minimum clients can pay for a round; the message says who has how much left."""


class Charge(NamedTuple):
    """What one round costs one account."""

    account: Account
    mechanism: Mechanism
    steps: int
    """Of a whole round."""
    by_round: bool = False
    """Whether a round costs `steps` however many local steps the client takes."""

    def of(self, taken: int) -> int:
        """What a round of so many local steps costs."""
        return self.steps if self.by_round else taken


@dataclass(frozen=True)
class Accounts:
    """What makes a round durable: its reservations in the ledger, its outcome in the run folder.

    Without a ledger (no DP, or seeded noise, which claims nothing) nothing is reserved and nobody is refused.
    """

    folder: RunFolder
    minimum: int = 1
    """rounds.minimum, and at least 1."""
    ledger: Ledger | None = None
    run: str = ""
    """The run's name in the ledger."""
    asks: Mapping[str, tuple[Charge, ...]] = field(default_factory=dict)
    """What a round charges to every client."""
    tests: Mapping[str, tuple[Charge, int]] = field(default_factory=dict)
    """What an evaluation charges to every client's test examples, and how many the run may make."""

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        """Before data is touched (Journal): who cannot pay -> why; for all others the steps are reserved, durably.

        Where fewer than rounds.minimum of them could, nothing stays reserved and nobody may go; Exhausted is raised
        where that holds for the whole fleet.
        """
        if self.ledger is None:
            return {}
        charges = {charge.account: charge for name in steps for charge in self.asks[name]}
        wanted = {account: (charge.mechanism, charge.of(steps[account.client])) for account, charge in charges.items()}
        refused = self.ledger.reserve(self.run, number, wanted)
        why = {account.client: f"ledger: epsilon {left}" for account, left in refused.items()}
        if refused and len(steps) - len(why) < self.minimum:
            self.ledger.void(self.run, number, wanted.keys() - refused.keys())
            everyone = [charge for charges in self.asks.values() for charge in charges]
            over = self.ledger.over({charge.account: (charge.mechanism, charge.steps) for charge in everyone})
            if len(self.asks) - len({account.client for account in over}) < self.minimum:
                raise Exhausted(_who(over))
            return {name: why.get(name, f"ledger: fewer than {self.minimum} of this round can pay") for name in steps}
        if halves := {account for account in wanted.keys() - refused.keys() if account.client in why}:
            self.ledger.void(self.run, number, halves)  # one account of the client can pay, the other cannot
        return why

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        """All or nothing (Journal), and then what these clients really released, which may be less than was reserved.

        In this order: a crash in between leaves more spent than was, never less.
        """
        if self.ledger is None:
            self.folder.commit(state, row)
            return
        self.folder.commit(state, row, self.ledger.chain.head)
        spent = {charge.account: charge.of(count) for name, count in taken.items() for charge in self.asks[name]}
        self.ledger.commit(self.run, row["round"], spent)

    def reserve_tests(self, number: int, names: Collection[str]) -> Collection[str]:
        """Before test data is touched: those of `names` whose test examples can pay for one more noised evaluation."""
        if self.ledger is None or not self.tests:
            return names
        charges = {name: self.tests[name] for name in names if name in self.tests}
        paying = {charge for charge, most in charges.values() if self.ledger.of_run(self.run, charge.account) < most}
        refused = self.ledger.reserve(self.run, number, {c.account: (c.mechanism, c.steps) for c in paying})
        self.ledger.commit(self.run, number, {c.account: c.steps for c in paying if c.account not in refused})
        return [c.account.client for c in sorted(paying) if c.account not in refused]

    def unanswered(self, committed: int) -> dict[str, tuple[int, int]]:
        """(steps, rounds of the client as a whole) by client, of this run's rounds begun after the last committed one.

        The second is 0 where a client has one account.
        """
        if self.ledger is None:
            return {}
        lost = self.ledger.unanswered(self.run, committed)
        return {
            name: (lost[charges[0].account], sum(lost[charge.account] for charge in charges[1:]))
            for name, charges in self.asks.items()
        }

    def charge(self, client: str, which: int = 0, tests: bool = False) -> Charge | None:
        """What the client's account, its second one, or that of its test examples is charged; None without a ledger."""
        if tests:
            return self.tests[client][0] if client in self.tests else None
        return self.asks[client][which] if client in self.asks else None

    def evaluations(self, client: str, planned: int) -> int:
        """How many noised evaluations this run charged to a client's test examples; `planned` without a ledger."""
        charge = self.charge(client, tests=True)
        return planned if self.ledger is None or charge is None else self.ledger.of_run(self.run, charge.account)

    def total(self, charge: Charge | None) -> dict[str, float | None]:
        """{epsilon_total, delta_total, budget}: an account over the ledger's life; null without a ledger."""
        if self.ledger is None or charge is None:
            return {"epsilon_total": None, "delta_total": None, "budget": None}
        standing = self.ledger.accounts[charge.account]
        return {"epsilon_total": standing.epsilon, "delta_total": standing.delta, "budget": standing.budget}

    def evidence(self) -> dict[str, Any]:
        """{path, run, sequence, hash, reason}: the ledger as it is now, or why there is none."""
        if self.ledger is None:
            reason = "nothing is charged to a ledger without privacy, or with noise that is seeded"
            return {"path": None, "run": None, "sequence": None, "hash": None, "reason": reason}
        head = self.ledger.seal()
        at = {"path": str(self.ledger.path), "run": self.run}
        return {**at, "sequence": head.sequence, "hash": head.digest, "reason": None}


def prepared(
    scenario: Scenario,
    settings: Settings,
    folder: RunFolder,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    runtime: str,
    start: Mapping[str, Any] | None,
    tests: Mapping[str, Plan],
) -> Accounts:
    """The accounts of a new run (start: None), opened in the ledger, or those that a resumed run goes on with.

    start: start.json. tests: the plans of the clients' test examples. Raises Refused for a ledger that cannot be used,
    another budget than an account was opened with, and a ledger that does not go on from what the run folder saw of it.
    """
    if not plans or settings.privacy.noise_seed is not None:
        return Accounts(folder)
    path, run = ledger_path(scenario, settings, runtime), secrets.token_hex(8)
    if start is not None:
        known = start["ledger"]
        path, run = path if settings.run.state else Path(known["path"]), known["run"]
        if not Ledger(path).holds(folder.ledger_head() or Head(known["sequence"], known["hash"])):
            raise Refused(
                f"{path} does not go on from what this run wrote into its ledger: bring that file back, or name its "
                "folder by --state"
            )
    ledger, opened = Ledger(path), dict[Account, tuple[float | None, float]]()
    asks: dict[str, tuple[Charge, ...]] = {}
    data, budget = scenario.dataset or scenario.name, settings.privacy.budget
    unit = "example" if settings.privacy.unit == "both" else settings.privacy.unit
    for name, plan in plans.items():
        first = Charge(Account(unit, name, data), plan.mechanism, round_steps(settings, roster[name].examples))
        opened[first.account] = budget, plan.delta
        asks[name] = (first,)
        if plan.whole:
            whole = Charge(Account("client", name, data), plan.whole.mechanism, 1, by_round=True)
            opened[whole.account] = budget, plan.whole.delta
            asks[name] = first, whole
    examined = {}
    for name, plan in tests.items():  # other examples than those it trains on, so an account of their own
        charge = Charge(Account("example", name, f"{data} (test)"), plan.mechanism, 1, by_round=True)
        opened[charge.account] = budget, plan.delta
        examined[name] = charge, plan.steps
    ledger.read()
    for charge in (charge for charges in asks.values() for charge in charges):
        known = ledger.accounts.get(charge.account)
        accounting.one_adjacency([charge.mechanism, *(+known.history if known else ())])
    ledger.open(opened)
    return Accounts(folder, max(1, settings.rounds.minimum), ledger, run, asks, examined)


def state_folder(named: str) -> Path:
    """Where ledgers lie: `named` (--state), else UMBEL_STATE, else the platform's folder for state."""
    if chosen := named or os.environ.get("UMBEL_STATE", ""):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/umbel").expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "umbel"


def ledger_path(scenario: Scenario, settings: Settings, runtime: str) -> Path:
    """One ledger for all real devices; simulated ones have one for each data set and scenario, as they are made up."""
    folder = state_folder(settings.run.state)
    if runtime == "deployment":
        return folder / "devices.ledger"
    name = "-".join(dict.fromkeys([scenario.dataset or scenario.name, scenario.name]))
    return folder / "simulations" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.ledger"


def _who(over: Mapping[Account, str]) -> str:
    """The first few accounts with what is left of each."""
    named = [f"{account.client}: epsilon {left}" for account, left in list(over.items())[:5]]
    return "; ".join([*named, *([f"and {len(over) - 5} more"] if len(over) > 5 else [])])
