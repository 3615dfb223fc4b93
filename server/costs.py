"""Costs: what a round, or an evaluation, costs each account of every client."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from clients.roster import examples
from clients.task import Hello
from privacy.ledger import TESTS, Account
from privacy.plan import Mechanism, Plan
from scenarios import Scenario
from scenarios.numbered import named
from scenarios.settings import Settings
from server.select import round_steps


class Cost(NamedTuple):
    """What one round costs one account."""

    account: Account
    mechanism: Mechanism
    steps: int
    """Of a whole round."""
    by_round: bool = False
    """Whether a round costs `steps` however many local steps the client takes."""
    delta: float = 0.0
    """At which the account is opened, where it is not yet."""

    def of(self, taken: int) -> int:
        """What a round of so many local steps costs."""
        return self.steps if self.by_round else taken


class Asks(Mapping[str, tuple[Cost, ...]]):
    """What a round costs the accounts of every client, in the order of its plan's parts; computed when it is asked."""

    def __init__(self, plans: Mapping[str, Plan], costs: Callable[[str, Plan], tuple[Cost, ...]]) -> None:
        self._plans, self._costs = plans, costs

    def __getitem__(self, name: str) -> tuple[Cost, ...]:
        return self._costs(name, self._plans[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def __contains__(self, name: object) -> bool:
        return name in self._plans


def round_costs(scenario: Scenario, settings: Settings, roster: Mapping[str, Hello], plans: Mapping[str, Plan]) -> Asks:
    """What a round costs the accounts of every client."""
    data = scenario.dataset or scenario.name
    unit = "example" if settings.privacy.unit == "both" else settings.privacy.unit
    names, sizes = named(roster), examples(roster)

    @lru_cache
    def steps_of(size: int) -> int:
        return round_steps(settings, size)

    def of(name: str, plan: Plan) -> tuple[Cost, ...]:
        steps = steps_of(int(sizes[names.place(name)]) if settings.privacy.by_example else 0)
        first = Cost(Account(unit, name, data), plan.mechanism, steps, delta=plan.delta)
        if plan.whole is None:
            return (first,)
        return first, Cost(Account("client", name, data), plan.whole.mechanism, 1, True, plan.whole.delta)

    return Asks(plans, of)


def test_costs(scenario: Scenario, tests: Mapping[str, Plan]) -> dict[str, Cost]:
    """What a noised evaluation costs every client's test examples, which are others than those it trains on."""
    data = (scenario.dataset or scenario.name) + TESTS
    return {
        name: Cost(Account("example", name, data), plan.mechanism, 1, True, plan.delta) for name, plan in tests.items()
    }
