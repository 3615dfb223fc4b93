"""Purses: what each account of a client would pay of a planned run, read from the ledger that the run would charge.

Nothing is opened, reserved or written here; a ledger that a run would refuse is refused in the same words.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from privacy import accounting
from privacy.ledger import Account, Ledger, Standing, Window
from privacy.plan import History, Plan
from server.costs import Cost

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
    window: Window | None = None
    recent: History = field(default_factory=Counter)
    """Of `history`, what its window holds now: a run is planned as if none of it passed before the end."""
    ready: float | None = 0.0
    """Seconds since 1970 from which it pays for all rounds, its window having passed; 0: it does now; None: never."""

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

    @property
    def window_left(self) -> float | None:
        """Of the window, as it is now; None without one."""
        if self.window is None:
            return None
        return max(0.0, self.window.epsilon - accounting.epsilon(self.recent, self.delta))

    @property
    def least_left(self) -> float:
        """Of the limit that is nearer; infinity where there is none."""
        return min((left for left in (self.left, self.window_left) if left is not None), default=math.inf)

    def fits(self, more: History) -> bool:
        """Whether `more` keeps every limit of the account, as the gate of a run would count."""
        return all(
            accounting.epsilon(Counter(spent) + Counter(more), self.delta) <= limit
            for spent, limit in ((self.history, self.budget), (self.recent, self.window and self.window.epsilon))
            if limit is not None
        )


Held = Mapping[str, tuple[Purse, ...]]
"""Every client's purses, in the order of its plan's parts: it takes part where all of them pay."""


def purses(path: Path, budget: float | None, window: Window | None, charges: Iterable[Charge]) -> dict[Account, Purse]:
    """The purse of every account, for as many rounds as its plan is made for.

    Raises Refused for a damaged ledger, and for a budget or window that is not the one an account was opened with.
    """
    ledger = Ledger(path)
    ledger.read()
    made: dict[Account, Purse] = {}
    known: dict[object, Purse] = {}
    now = ledger.chain.now
    for cost, plan in charges:
        standing = Standing(budget, plan.delta, window)
        if (opened := ledger.accounts.get(cost.account)) is not None:
            limit, delta, kept = ledger.terms(cost.account, budget, window)
            standing = replace(opened, budget=limit, delta=delta, window=kept)
            accounting.one_adjacency([cost.mechanism, *+standing.history])
        dated = frozenset(standing.dated.items()) if standing.window else None
        terms = standing.budget, standing.delta, standing.window, frozenset(standing.history.items()), dated
        key = terms, plan.mechanism, plan.steps, cost.steps
        if key not in known:
            known[key] = _purse(standing, cost, plan, now)
        made[cost.account] = replace(known[key], account=cost.account)
    return made


def affordable(purse: Purse, plan: Plan, max_noise: float) -> float | None:
    """The largest epsilon, at most the plan's own, of a run with as many steps that `purse` pays in full; None if not
    even max_noise makes it cheap enough. Rounded down to three digits where it is less than the plan's."""

    def fits(noise: float) -> bool:
        return purse.fits({replace(plan.mechanism, noise_multiplier=noise): plan.steps})

    low, high = plan.mechanism.noise_multiplier, max_noise
    if fits(low):
        return plan.epsilon
    if not fits(high):
        return None
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
        key=lambda purse: (purse.rounds, purse.least_left, purse.account),
    )


def middle(values: Sequence[float]) -> dict[str, float]:
    """{min, median, max} of at least one value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def rounded_down(value: float) -> float:
    """To three significant digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit) * unit:.3g}")


def _purse(standing: Standing, cost: Cost, plan: Plan, now: int) -> Purse:
    """What an account of this standing pays of a run whose rounds cost `cost`, if all of them came at once."""
    history, delta, of = +standing.history, standing.delta, plan.steps // cost.steps
    spent = accounting.epsilon(history, delta)
    bare = Purse(
        cost.account, history, delta, standing.budget, spent, 0, of, spent, standing.window, standing.recent(now)
    )
    rounds = _payable(bare, cost)
    after = accounting.epsilon(Counter(history) + Counter({cost.mechanism: rounds * cost.steps}), delta)
    ready: float | None = 0.0
    if rounds < of:
        later, whole = replace(bare, window=None), (cost.mechanism, of * cost.steps)
        waits = standing.window is not None and later.fits(Counter(dict([whole])))
        ready = standing.pays_from(whole, now) if waits else None
    return replace(bare, rounds=rounds, after=after, ready=ready)


def _payable(purse: Purse, cost: Cost) -> int:
    """The most of its rounds that keep its limits."""

    def fits(rounds: int) -> bool:
        return purse.fits({cost.mechanism: rounds * cost.steps})

    if fits(purse.of):
        return purse.of
    low, high = 0, purse.of  # `low` fits or is no round at all
    while high - low > 1:
        half = (low + high) // 2
        low, high = (half, high) if fits(half) else (low, half)
    return low
