"""Accounts: a run's side of the ledger, what each client may still release and what each round released."""

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from clients.task import Charge, Hello, Reply, Task
from privacy import accounting, heads
from privacy.chain import Head
from privacy.ledger import Account, Ledger, Window
from privacy.plan import Plan
from privacy.refused import Refused
from scenarios import Scenario
from scenarios.numbered import named
from scenarios.settings import Settings
from server import ledger_place, peers
from server.costs import Cost, round_costs, test_costs
from server.record import RunFolder
from server.select import secret as secret_draw
from server.spent_file import large
from server.state import Row, ServerState


class Exhausted(Exception):
    """Fewer than rounds.minimum clients can pay for a round; the message says who has how much left."""


@dataclass(frozen=True)
class Late:
    """What an account is opened with when it is charged first: a fleet of a million is never asked all of it."""

    budget: float | None
    window: Window | None
    digest: Callable[[Account], str]
    """Of the data that the account is about; empty where another account of the client has it."""

    def open(self, ledger: Ledger, run: str, costs: Collection[Cost]) -> None:
        """Open, or hold to its terms, each of these accounts that `run` has not charged yet.

        Raises Refused for one that another run has opened with another budget since this one began.
        """
        new = {cost.account: (self.budget, cost.delta) for cost in costs if not any(ledger.attempt(run, cost.account))}
        data = {one: digest for one in new if (digest := self.digest(one))}
        ledger.open(new, self.window, data, durable=False)


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
    asks: Mapping[str, tuple[Cost, ...]] = field(default_factory=dict)
    """What a round costs every client."""
    tests: Mapping[str, tuple[Cost, int]] = field(default_factory=dict)
    """What an evaluation costs every client's test examples, and how many the run may make."""
    private: bool = False
    """Nobody may know who was drawn: heads of the devices' own ledgers go into privacy.heads, not into records."""
    late: Late | None = None
    """How accounts are opened by the first round that charges them; None: all are open."""
    _heard: dict[str, Head] = field(default_factory=dict)
    """Heads of the devices' own ledgers since the last commit, by client."""
    _kept: dict[Account, Head] = field(default_factory=dict)
    """What privacy.heads held at the last commit, where they go there."""

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        """Before data is touched (Journal): who cannot pay -> why; for all others the steps are reserved, durably.

        Where fewer than rounds.minimum of them could, nothing stays reserved and nobody may go; Exhausted is raised
        where that holds for the whole fleet.
        """
        if self.ledger is None:
            return {}
        costs = {cost.account: cost for name in steps for cost in self.asks[name]}
        self._open(costs.values())
        wanted = {account: (cost.mechanism, cost.of(steps[account.client])) for account, cost in costs.items()}
        refused = self.ledger.reserve(self.run, number, wanted)
        why = {account.client: f"ledger: epsilon {left}" for account, left in refused.items()}
        if refused and len(steps) - len(why) < self.minimum:
            self.ledger.void(self.run, number, wanted.keys() - refused.keys())
            everyone = [cost for costs in self.asks.values() for cost in costs]
            self._open(everyone)
            over = self.ledger.over({cost.account: (cost.mechanism, cost.steps) for cost in everyone})
            if len(self.asks) - len({account.client for account in over}) < self.minimum:
                raise Exhausted(_who(over))
            return {name: why.get(name, f"ledger: fewer than {self.minimum} of this round can pay") for name in steps}
        if halves := {account for account in wanted.keys() - refused.keys() if account.client in why}:
            self.ledger.void(self.run, number, halves)  # one account of the client can pay, the other cannot
        return why

    def charged(self, task: Task) -> Task:
        """The task with its reservation, for the ledger of the device that adds its noise (Journal)."""
        if self.ledger is None or not (task.mechanism or task.update_noise):
            return task
        cost = self.tests[task.client][0] if task.kind == "evaluate" else self.asks[task.client][0]
        _, attempt = self.ledger.attempt(self.run, cost.account)
        account = self.asks[task.client][0].account
        known = self._kept.get(account, self.ledger.seen.get(account))
        return replace(task, charge=Charge(self.run, attempt, self.ledger.chain.head, known))

    def heard(self, reply: Reply) -> None:
        """The head of a device's own ledger joins the next commit (Journal)."""
        if reply.head is not None:
            self._heard[reply.client] = reply.head

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        """All or nothing (Journal), and then what these clients really released, which may be less than was reserved.

        In this order: a crash in between leaves more spent than was, never less.
        """
        if self.ledger is None:
            self.folder.commit(state, row)
            return
        self.folder.commit(state, row, self.ledger.chain.head)
        spent = {cost.account: cost.of(count) for name, count in taken.items() for cost in self.asks[name]}
        seen = {self.asks[name][0].account: head for name, head in self._heard.items() if name in self.asks}
        private = self.private or heads.place(self.ledger).exists()  # a run that began meanwhile draws in secret
        self.ledger.commit(self.run, row["round"], spent, {} if private else seen)
        if private:
            self._keep(seen)
        self._heard.clear()

    def _open(self, costs: Collection[Cost]) -> None:
        if self.late is not None and self.ledger is not None:
            self.late.open(self.ledger, self.run, costs)

    def _keep(self, heard: Mapping[Account, Head]) -> None:
        assert self.ledger is not None
        known = heads.keep(self.ledger, heard)
        self._kept.clear()  # what another process was told to forget is forgotten here, too
        self._kept.update(known)

    def reserve_tests(self, number: int, names: Collection[str]) -> dict[str, str]:
        """Before test data is touched: whose test examples cannot pay for one more noised evaluation -> why."""
        if self.ledger is None:
            return {}
        known = {name: self.tests[name] for name in names}
        why = {
            name: f"budget: all {most} evaluations of this run were made"
            for name, (cost, most) in known.items()
            if self.ledger.of_run(self.run, cost.account) >= most
        }
        costs = {cost.account: cost for name, (cost, _) in known.items() if name not in why}
        self._open(costs.values())
        refused = self.ledger.reserve(self.run, number, {a: (c.mechanism, c.steps) for a, c in costs.items()})
        paid = costs.keys() - refused.keys()
        self.ledger.commit(self.run, number, {account: costs[account].steps for account in paid})
        return why | {account.client: f"ledger: epsilon {left}" for account, left in refused.items()}

    def unanswered(self, committed: int) -> dict[str, tuple[int, int]]:
        """(steps, rounds of the client as a whole) by client, of this run's rounds begun after the last committed one.

        The second is 0 where a client has one account.
        """
        if self.ledger is None:
            return {}
        lost = self.ledger.unanswered(self.run, committed)
        return {
            name: (lost[costs[0].account], sum(lost[cost.account] for cost in costs[1:]))
            for name in sorted({account.client for account in lost} & self.asks.keys())
            if (costs := self.asks[name])
        }

    def cost(self, client: str, which: int = 0, tests: bool = False) -> Cost | None:
        """What the client's account, its second one, or that of its test examples is charged; None without a ledger."""
        if tests:
            return self.tests[client][0] if client in self.tests else None
        return self.asks[client][which] if client in self.asks else None

    def evaluations(self, client: str, planned: int) -> int:
        """How many noised evaluations this run charged to a client's test examples; `planned` without a ledger."""
        cost = self.cost(client, tests=True)
        return planned if self.ledger is None or cost is None else self.ledger.of_run(self.run, cost.account)

    def total(self, cost: Cost | None) -> dict[str, float | None]:
        """{epsilon_total, delta_total, budget}: an account over the ledger's life; null without a ledger."""
        if self.ledger is None or cost is None:
            return {"epsilon_total": None, "delta_total": None, "budget": None}
        if cost.account not in self.ledger.accounts:  # it was never charged
            budget = self.late.budget if self.late else None
            return {"epsilon_total": 0.0, "delta_total": cost.delta, "budget": budget}
        standing = self.ledger.accounts[cost.account]
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
    before: Mapping[Account, Head] = {},
) -> Accounts:
    """The accounts of a new run (start: None), opened in the ledger, or those that a resumed run goes on with.

    start: start.json. tests: the plans of the clients' test examples. before: `heads_before` the clients said hello.
    Raises Refused for a ledger that cannot be used, another budget than an account was opened with, a ledger that does
    not go on from what the run folder or a device saw of it, and a device's that falls behind `before`.
    """
    if not plans or settings.privacy.noise_seed is not None:
        return Accounts(folder)
    path, run = ledger_place.of_run(scenario, settings, runtime, start), secrets.token_hex(8)
    if start is not None:
        known = start["ledger"]
        run = known["run"]
        if not Ledger(path).holds(folder.ledger_head() or Head(known["sequence"], known["hash"])):
            raise Refused(
                f"{path} does not go on from what this run wrote into its ledger: bring that file back, or name its "
                "folder by --state"
            )
    ledger, asks = Ledger(path), round_costs(scenario, settings, roster, plans)
    examined = {name: (cost, tests[name].steps) for name, cost in test_costs(scenario, tests).items()}
    ledger.read()
    many, met = large(named(roster)), dict[Account, Head]()
    if many:  # they keep no ledgers of their own; one account is opened, so that the ledger has a head to be held to
        known = {account.client for account in ledger.accounts}
        who = [*(name for name in known if name in plans), *([] if known & plans.keys() else islice(plans, 1))]
    else:
        who = list(plans)
        met = {asks[name][0].account: head for name in plans if (head := roster[name].head) is not None}
        peers.check(ledger, roster, before, met)
    paid = [cost for name in who for cost in asks[name]]
    for cost in paid:
        known_one = ledger.accounts.get(cost.account)
        accounting.one_adjacency([cost.mechanism, *(+known_one.history if known_one else ())])
    opened = {cost.account: (settings.privacy.budget, cost.delta) for cost in paid}
    opened |= {
        cost.account: (settings.privacy.budget, cost.delta)
        for name, (cost, _) in examined.items()
        if not many or cost.account in ledger.accounts
    }
    ledger.open(opened, window(settings), {asks[name][0].account: roster[name].digest for name in who})
    private = secret_draw(settings) or peers.once_secret(ledger)

    def digest(account: Account) -> str:
        return roster[account.client].digest if account == asks[account.client][0].account else ""

    late = Late(settings.privacy.budget, window(settings), digest) if many else None
    made = Accounts(folder, max(1, settings.rounds.minimum), ledger, run, asks, examined, private, late)
    if private:
        made._keep(met)
    return made


def heads_before(
    scenario: Scenario, settings: Settings, runtime: str, start: Mapping[str, Any] | None
) -> dict[Account, Head]:
    """What privacy.heads holds before the clients are met: none of their ledgers ends before that.

    Read earlier than they say hello, since another run on this ledger may hear of later heads at any time.
    """
    if settings.privacy.unit == "none" or settings.privacy.noise_seed is not None:
        return {}
    return heads.read(Ledger(ledger_place.of_run(scenario, settings, runtime, start)))


def check(settings: Settings) -> None:
    """Refuse settings of a window that cannot be kept."""
    wanted = settings.privacy
    if (limit := window(settings)) is None:
        return
    if wanted.unit == "none" or wanted.noise_seed is not None:
        raise Refused(
            "privacy.window_epsilon limits what is spent under DP with real noise: leave it out, or set those"
        )
    if wanted.budget is not None and limit.epsilon > wanted.budget:
        raise Refused(
            f"privacy.window_epsilon={limit.epsilon:g} is more than privacy.budget={wanted.budget:g}, which it never "
            "replaces: lower it, or leave it out"
        )


def window(settings: Settings) -> Window | None:
    """The window of time that these settings ask for; raises Refused for half of one."""
    days, epsilon = settings.privacy.window_days, settings.privacy.window_epsilon
    if (days is None) != (epsilon is None):
        raise Refused("privacy.window_days and privacy.window_epsilon go together: set both or none")
    return None if days is None or epsilon is None else Window(days, epsilon)


def _who(over: Mapping[Account, str]) -> str:
    """The first few accounts with what is left of each."""
    named = [f"{account.client}: epsilon {left}" for account, left in list(over.items())[:5]]
    return "; ".join([*named, *([f"and {len(over) - 5} more"] if len(over) > 5 else [])])
