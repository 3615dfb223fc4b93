"""Purses: what each account of a client would pay of a planned run, read from the ledger that the run would charge.

Nothing is opened, reserved or written here; a ledger that a run would refuse is refused in the same words.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from privacy import accounting
from privacy.ledger import Account, Ledger
from privacy.plan import History, Plan
from server.accounts import Cost

Charge = tuple[Cost, Plan]
"""What a round (an evaluation) costs an account, and the promise that is kept to it."""


@dataclass(frozen=True)
class Purse:
    """One account before a run, and after it."""

    account: Account
    history: History
    """What its ledger holds."""
    delta: float
    """What it is accounted at: fixed when it was opened."""
    budget: float | None
    spent: float
    """Epsilon of `history`."""
    rounds: int
    """How many of the run's rounds (evaluations) it can be asked in, of `of`."""
    of: int
    after: float
    """Epsilon over the ledger's life once it took part in those rounds."""

    @property
    def client(self) -> str:
        return self.account.client

    @property
    def pays(self) -> bool:
        return self.rounds == self.of

    @property
    def left(self) -> float | None:
        """Of the budget, as a difference of epsilons; None without a budget."""
        return None if self.budget is None else max(0.0, self.budget - self.spent)


Held = Mapping[str, tuple[Purse, ...]]
"""Every client's purses, in the order of its plan's parts: it takes part where all of them pay."""


def purses(path: Path, budget: float | None, charges: Iterable[Charge]) -> dict[Account, Purse]:
    """The purse of every account, for as many rounds as its plan is made for.

    Raises Refused for a damaged ledger, and for a budget that is not the one an account was opened with.
    """
    ledger = Ledger(path)
    ledger.read()
    made: dict[Account, Purse] = {}
    known: dict[object, tuple[int, float, float]] = {}
    for cost, plan in charges:
        history: History = Counter()
        delta, limit, of = plan.delta, budget, plan.steps // cost.steps
        if (standing := ledger.accounts.get(cost.account)) is not None:
            history = +standing.history
            limit, delta, _ = ledger.terms(cost.account, budget, None)
            accounting.one_adjacency([cost.mechanism, *history])
        key = frozenset(history.items()), plan.mechanism, plan.steps, cost.steps, delta, limit
        if key not in known:
            rounds = _payable(history, cost, delta, limit, of)
            spent = accounting.epsilon(history, delta)
            known[key] = rounds, spent, accounting.epsilon(_with(history, cost, rounds * cost.steps), delta)
        rounds, spent, after = known[key]
        made[cost.account] = Purse(cost.account, history, delta, limit, spent, rounds, of, after)
    return made


def affordable(purse: Purse, plan: Plan, max_noise: float) -> float | None:
    """The largest epsilon of a run with as many steps as `plan` that `purse` pays in full; None if not even max_noise
    makes it cheap enough. Rounded down to three digits."""
    if purse.budget is None:
        return plan.epsilon

    def fits(noise: float) -> bool:
        louder = Counter({replace(plan.mechanism, noise_multiplier=noise): plan.steps})
        return accounting.epsilon(Counter(purse.history) + louder, purse.delta) <= (purse.budget or 0)

    if not fits(max_noise):
        return None
    low, high = plan.mechanism.noise_multiplier, max_noise
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    louder = {replace(plan.mechanism, noise_multiplier=high): plan.steps}
    return rounded_down(accounting.epsilon(louder, plan.delta))


def able(held: Held) -> list[str]:
    """The clients of which every account pays for all its rounds."""
    return [name for name, owned in held.items() if all(purse.pays for purse in owned)]


def refused(held: Held) -> list[Purse]:
    """Those that cannot pay for every round, the poorest first."""
    return sorted(
        (purse for owned in held.values() for purse in owned if not purse.pays),
        key=lambda purse: (purse.rounds, purse.left, purse.account),
    )


def middle(values: Sequence[float]) -> dict[str, float]:
    """{min, median, max} of at least one value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def rounded_down(value: float) -> float:
    """To three significant digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit) * unit:.3g}")


def _with(history: History, cost: Cost, steps: int) -> History:
    return Counter(history) + Counter({cost.mechanism: steps})


def _payable(history: History, cost: Cost, delta: float, budget: float | None, of: int) -> int:
    """The most of `of` rounds after `history` that keep the budget, as the gate of a run would count."""

    def fits(rounds: int) -> bool:
        return budget is None or accounting.epsilon(_with(history, cost, rounds * cost.steps), delta) <= budget

    if fits(of):
        return of
    low, high = 0, of  # `low` fits or is no round at all
    while high - low > 1:
        half = (low + high) // 2
        low, high = (half, high) if fits(half) else (low, half)
    return low
