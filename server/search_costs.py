"""What a search for settings costs each kind of account: its trials composed, and less where the winner alone is seen.

One person's data lie under several accounts (an example, a client as a whole, test examples), each for neighbours of
its own. Under one kind of neighbours a trial is the composition of that account's mechanism: all the rest of it does
not depend on what differs, the choice of the winner included, which looks at the server's validation data. So
RepeatAndSelect holds account by account, for each by itself. A trial takes a candidate at random, whatever the data,
so at every order its divergence is at most the worst candidate's (privacy.search.best_of); a candidate that does not
touch the account's data adds none. One that does and promises nothing leaves no claim: the winner may be that one.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from privacy import search
from privacy.ledger import TESTS, Account
from privacy.plan import History, Plan
from privacy.refused import Refused
from privacy.search import Repetitions
from scenarios.settings import Settings, override
from server.costs import round_costs, test_costs
from server.planner import Answer

_Kind = tuple[str, str]
"""(unit, dataset) of an account, whoever the client."""


@dataclass(frozen=True)
class SearchCost:
    """What a search costs the accounts of one kind, of the client that pays most."""

    unit: str
    dataset: str
    candidates: int
    """How many of the candidates charge such an account."""
    composition: float
    """Epsilon of all trials, each of them seen, as the ledger adds up what they charge."""
    selection: float
    """Epsilon of the winner alone; infinity where nothing can be claimed."""
    reason: str = ""
    """Why nothing can be claimed for the winner alone."""

    @property
    def name(self) -> str:
        """What the account is of, for people."""
        return account_name(self.unit, self.dataset)


class Sought:
    """What a search of `trials` runs costs, each kind of account by itself."""

    def __init__(self, trials: float, distribution: str, answers: Sequence[Answer]) -> None:
        """trials: on average, of a secret search; of one that shows all of them, so many, rounded up.

        Raises Refused for candidates of different fleets.
        """
        self.trials, self.distribution, self.count = trials, distribution, len(answers)
        self.repetitions = Repetitions.named(distribution, trials)
        fleets = {tuple((name, hello.examples) for name, hello in sorted(one.roster.items())) for one in answers}
        if len(fleets) > 1:
            raise Refused(
                "candidates of one search share one fleet, as accounts go by a client's name: these split the data "
                "differently; search each split by itself"
            )
        charged: dict[_Kind, dict[str, list[Plan | None]]] = defaultdict(dict)
        for i, one in enumerate(answers):
            for account, plan in _accounts(one).items():
                kind = charged[account.unit, account.dataset]
                kind.setdefault(account.client, [None] * len(answers))[i] = plan
        settings = [one.settings for one in answers]
        self.costs = [self._cost(kind, list(plans.values()), settings) for kind, plans in charged.items()]

    def _cost(self, kind: _Kind, clients: Sequence[list[Plan | None]], settings: Sequence[Settings]) -> SearchCost:
        """clients: the plans of each client's account of this kind, by candidate; None: it is not charged."""
        charge = [any(plans[i] for plans in clients) for i in range(self.count)]
        bare = [one for one, charges in zip(settings, charge, strict=True) if not charges and not _spares(one, kind)]
        reason = _bare(bare[0], kind) if bare else ""
        composition, selection = 0.0, math.inf if bare else 0.0
        for plans in dict.fromkeys(tuple(plans) for plans in clients):
            composition = max(composition, self._composed(plans))
            try:
                selection = selection if reason else max(selection, self._selected(plans))
            except Refused as refusal:
                selection, reason = math.inf, str(refusal)
        if math.isinf(selection) and not reason:
            reason = "so many trials leave nothing of delta: each may draw too few clients"
        return SearchCost(*kind, sum(charge), composition, selection, reason)

    def _composed(self, plans: Sequence[Plan | None]) -> float:
        """Epsilon of the trials that cost most, if each candidate takes its turn."""
        number, delta, chance = -int(-self.trials // 1), *_delta(plans)
        histories, after = _histories(plans), delta - number * chance
        if after <= 0:
            return math.inf
        turns = [histories[i % len(histories)] for i in range(max(number, len(histories)))]
        return search.composed(sorted(turns, key=lambda one: -search.composed([one], delta))[:number], after)

    def _selected(self, plans: Sequence[Plan | None]) -> float:
        delta, chance = _delta(plans)
        after = delta - self.trials * chance  # every trial may draw too few clients
        return search.best_of(_histories(plans), after, self.repetitions) if after > 0 else math.inf


def account_name(unit: str, dataset: str) -> str:
    """What an account is of, for people."""
    if dataset.endswith(TESTS):
        return "Test examples"
    return {"example": "Training examples", "local": "Client, from the server too"}.get(unit, "Client as a whole")


def candidates(settings: Settings, text: str) -> list[Settings]:
    """The settings of every candidate of "privacy.clip=0.2 | privacy.clip=0.35"; those given where there is none."""
    return [override(settings, part) for part in text.split("|")] if text.strip() else [settings]


def _accounts(one: Answer) -> dict[Account, Plan]:
    """Every account that a run of this plan charges, with what is promised to it."""
    asks = round_costs(one.scenario, one.settings, one.roster, one.plans)
    tests = test_costs(one.scenario, one.tests)
    made = {cost.account: part for name in asks for cost, part in zip(asks[name], one.plans[name].parts, strict=True)}
    return made | {cost.account: one.tests[name] for name, cost in tests.items()}


def _delta(plans: Sequence[Plan | None]) -> tuple[float, float]:
    """(the least delta of the candidates that charge the account, the largest chance that they take off it)."""
    known = [plan for plan in plans if plan]
    return min(plan.delta + plan.chance for plan in known), max(plan.chance for plan in known)


def _histories(plans: Sequence[Plan | None]) -> list[History]:
    return [{plan.mechanism: plan.steps} if plan else {} for plan in plans]


def _spares(settings: Settings, kind: _Kind) -> bool:
    """Whether a run that does not charge such accounts leaves their data alone."""
    return kind[1].endswith(TESTS) and settings.evaluation.on == "server"


def _bare(settings: Settings, kind: _Kind) -> str:
    if kind[1].endswith(TESTS):
        return "a candidate that may win publishes test results as they are: set evaluation.epsilon for all, or none"
    return f"a candidate that may win, of privacy.unit={settings.privacy.unit}, promises nothing here"
