"""Purses: what each client's account would pay of a planned run, read from the ledger that the run would charge.

Nothing is opened, reserved or written here; a ledger that a run would refuse is refused in the same words.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from privacy import accounting
from privacy.ledger import Account, Ledger
from privacy.plan import History, Plan
from scenarios import Scenario
from scenarios.settings import Settings


@dataclass(frozen=True)
class Purse:
    """One client's account before a run, and after it."""

    client: str
    history: History
    """What its ledger holds."""
    delta: float
    """What its account is accounted at: fixed when it was opened."""
    budget: float | None
    spent: float
    """Epsilon of `history`."""
    rounds: int
    """How many of the run's rounds it can be asked in, of `of`."""
    of: int
    after: float
    """Epsilon over the ledger's life once it took part in those rounds."""

    @property
    def pays(self) -> bool:
        return self.rounds == self.of

    @property
    def left(self) -> float | None:
        """Of the budget, as a difference of epsilons; None without a budget."""
        return None if self.budget is None else max(0.0, self.budget - self.spent)


def purses(
    scenario: Scenario, settings: Settings, path: Path, plans: Mapping[str, Plan], total: int
) -> dict[str, Purse]:
    """The purse of every client with a plan, for `total` rounds, recovery included.

    Raises Refused for a damaged ledger, and for a privacy.budget that is not the one an account was opened with.
    """
    ledger = Ledger(path)
    ledger.read()
    made: dict[str, Purse] = {}
    known: dict[object, tuple[int, float, float]] = {}
    for name, plan in plans.items():
        account = Account(settings.privacy.unit, name, scenario.dataset or scenario.name)
        history: History = Counter()
        delta, budget = plan.delta, settings.privacy.budget
        if (standing := ledger.accounts.get(account)) is not None:
            history = +standing.history
            budget, delta, _ = ledger.terms(account, budget, None)
        key = frozenset(history.items()), plan.mechanism, plan.steps, delta, budget
        if key not in known:
            rounds = _payable(history, plan, delta, budget, total)
            spent = accounting.epsilon(history, delta)
            known[key] = rounds, spent, accounting.epsilon(_with(history, plan, rounds * (plan.steps // total)), delta)
        rounds, spent, after = known[key]
        made[name] = Purse(name, history, delta, budget, spent, rounds, total, after)
    return made


def affordable(purse: Purse, plan: Plan, max_noise: float) -> float | None:
    """The largest epsilon of a run with as many steps as `plan` that `purse` pays in full; None if not even max_noise
    makes it cheap enough. Rounded down to three digits."""
    if purse.budget is None:
        return plan.epsilon

    def fits(noise: float) -> bool:
        louder = replace(plan, mechanism=replace(plan.mechanism, noise_multiplier=noise))
        return accounting.epsilon(_with(purse.history, louder, plan.steps), purse.delta) <= (purse.budget or 0)

    if not fits(max_noise):
        return None
    low, high = plan.mechanism.noise_multiplier, max_noise
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    louder = {replace(plan.mechanism, noise_multiplier=high): plan.steps}
    return rounded_down(accounting.epsilon(louder, plan.delta))


def refused(held: Mapping[str, Purse]) -> list[Purse]:
    """Those that cannot pay for every round, the poorest first."""
    return sorted((purse for purse in held.values() if not purse.pays), key=lambda p: (p.rounds, p.left, p.client))


def middle(values: Sequence[float]) -> dict[str, float]:
    """{min, median, max} of at least one value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def rounded_down(value: float) -> float:
    """To three significant digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit) * unit:.3g}")


def _with(history: History, plan: Plan, steps: int) -> History:
    return Counter(history) + Counter({plan.mechanism: steps})


def _payable(history: History, plan: Plan, delta: float, budget: float | None, total: int) -> int:
    """The most of `total` rounds of `plan` after `history` that keep the budget, as the gate of a run would count."""

    def fits(rounds: int) -> bool:
        after = accounting.epsilon(_with(history, plan, rounds * (plan.steps // total)), delta)
        return budget is None or after <= budget

    if fits(total):
        return total
    low, high = 0, total  # `low` fits or is no round at all
    while high - low > 1:
        half = (low + high) // 2
        low, high = (half, high) if fits(half) else (low, half)
    return low
