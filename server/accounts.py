"""Accounts: a run's side of the ledger; where it lies, what each client may still release, what each round released."""

import os
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clients.task import Charge, Hello, Reply, Task
from privacy.chain import Head
from privacy.durable import secret
from privacy.ledger import Account, Ledger, Window
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios import Scenario
from scenarios.settings import Settings
from server.record import RunFolder
from server.select import local_steps
from server.state import Row, ServerState


class Exhausted(Exception):
    """Fewer than rounds.minimum clients can pay for a round; the message says who has how much left."""


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
    asks: Mapping[str, tuple[Account, Mechanism, int]] = field(default_factory=dict)
    """Every client's account, mechanism, and steps of a whole round."""
    _heard: dict[str, Head] = field(default_factory=dict)
    """Heads of the devices' own ledgers since the last commit, by client."""

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        """Before data is touched (Journal): who cannot pay -> why; for all others the steps are reserved, durably.

        Where fewer than rounds.minimum of them could, nothing stays reserved and nobody may go; Exhausted is raised
        where that holds for the whole fleet.
        """
        if self.ledger is None:
            return {}
        wanted = {self.asks[name][0]: (self.asks[name][1], count) for name, count in steps.items()}
        refused = self.ledger.reserve(self.run, number, wanted)
        why = {account.client: f"ledger: epsilon {left}" for account, left in refused.items()}
        if refused and len(steps) - len(why) < self.minimum:
            self.ledger.void(self.run, number, wanted.keys() - refused.keys())
            over = self.ledger.over({account: (mechanism, count) for account, mechanism, count in self.asks.values()})
            if len(self.asks) - len(over) < self.minimum:
                raise Exhausted(_who(over))
            why = {name: why.get(name, f"ledger: fewer than {self.minimum} of this round can pay") for name in steps}
        return why

    def charged(self, task: Task) -> Task:
        """The task with its reservation, for the ledger of the device that adds its noise (Journal)."""
        if self.ledger is None or task.mechanism is None:
            return task
        account = self.asks[task.client][0]
        _, attempt = self.ledger.attempt(self.run, account)
        known = self.ledger.seen.get(account)
        return replace(task, charge=Charge(self.run, attempt, self.ledger.chain.head, known))

    def heard(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        """The replies, as they come; the heads of the devices' own ledgers join the next commit (Journal)."""
        for reply in replies:
            if reply.head is not None:
                self._heard[reply.client] = reply.head
            yield reply

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        """All or nothing (Journal), and then what these clients really released, which may be less than was reserved.

        In this order: a crash in between leaves more spent than was, never less.
        """
        if self.ledger is None:
            self.folder.commit(state, row)
            return
        self.folder.commit(state, row, self.ledger.chain.head)
        seen = {self.asks[name][0]: head for name, head in self._heard.items() if name in self.asks}
        self.ledger.commit(self.run, row["round"], {self.asks[name][0]: count for name, count in taken.items()}, seen)
        self._heard.clear()

    def unanswered(self, committed: int) -> Counter[str]:
        """Steps by client of rounds of this run that were begun after the last committed one."""
        return self.ledger.unanswered(self.run, committed) if self.ledger else Counter()

    def total(self, client: str) -> dict[str, float | None]:
        """{epsilon_total, delta_total, budget}: a client over the ledger's life; null without a ledger."""
        if self.ledger is None:
            return {"epsilon_total": None, "delta_total": None, "budget": None}
        standing = self.ledger.accounts[self.asks[client][0]]
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
) -> Accounts:
    """The accounts of a new run (start: None), opened in the ledger, or those that a resumed run goes on with.

    start: start.json. Raises Refused for a ledger that cannot be used, another budget than an account was opened with,
    and a ledger that does not go on from what the run folder saw of it.
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
    ledger, asks = Ledger(path), {}
    for name, plan in plans.items():
        account = Account(settings.privacy.unit, name, scenario.dataset or scenario.name)
        by_client = settings.privacy.unit == "client"  # one mechanism a round, whatever the client does locally
        steps = 1 if by_client else local_steps(settings.local, roster[name].examples, True)
        asks[name] = account, plan.mechanism, steps
    _seen_by_devices(ledger, roster)
    data = {asks[name][0]: roster[name].digest for name in plans}
    window = _window(settings)
    ledger.open({asks[name][0]: (settings.privacy.budget, plan.delta) for name, plan in plans.items()}, window, data)
    return Accounts(folder, max(1, settings.rounds.minimum), ledger, run, asks)


def check(settings: Settings) -> None:
    """Refuse settings of a window that cannot be kept."""
    wanted = settings.privacy
    if (window := _window(settings)) is None:
        return
    if wanted.unit == "none" or wanted.noise_seed is not None:
        raise Refused(
            "privacy.window_epsilon limits what is spent under DP with real noise: leave it out, or set those"
        )
    if wanted.budget is not None and window.epsilon > wanted.budget:
        raise Refused(
            f"privacy.window_epsilon={window.epsilon:g} is more than privacy.budget={wanted.budget:g}, which it never "
            "replaces: lower it, or leave it out"
        )


def lend_key(folder: RunFolder, settings: Settings) -> None:
    """Key the digests of this run's data by the state folder's secret, so that the ledger can tell when data change."""
    if settings.privacy.unit == "none" or settings.privacy.noise_seed is not None:
        return
    state = state_folder(settings.run.state)
    try:
        secret(folder.states / "key", secret(state / "key"))
    except OSError as error:
        raise Refused(f"{state} cannot be written ({error.strerror}): name another folder by --state") from None


def _window(settings: Settings) -> Window | None:
    days, epsilon = settings.privacy.window_days, settings.privacy.window_epsilon
    if (days is None) != (epsilon is None):
        raise Refused("privacy.window_days and privacy.window_epsilon go together: set both or none")
    return None if days is None or epsilon is None else Window(days, epsilon)


def _seen_by_devices(ledger: Ledger, roster: Mapping[str, Hello]) -> None:
    """Refuse a ledger that does not go on from what a device saw of it."""
    for name, hello in roster.items():
        if hello.seen is not None and not ledger.holds(hello.seen):
            raise Refused(
                f"{ledger.path} does not go on from its record {hello.seen.sequence}, which client {name} saw: it was "
                "rolled back, or is another ledger; bring it back, or charge what the devices wrote down by "
                "`umbel ledger adopt`"
            )


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
