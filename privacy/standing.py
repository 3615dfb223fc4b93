"""Standing: what an account may spend and has spent, over its life and in a window of time; who cannot pay, and why."""

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from privacy import accounting
from privacy.plan import History, Mechanism

_GRAIN = 3600
"""Seconds: the time of a reservation is kept rounded up to this, so it leaves a window late, never early."""


TESTS = " (test)"
"""Ends the name of the data of an account for a client's test examples, which are others than those it trains on."""


class Account(NamedTuple):
    """Whose spending is added up, whatever run it comes from."""

    unit: str
    client: str
    dataset: str
    """The declared name of the data; its content may change."""


class Window(NamedTuple):
    """Any stretch of `days` days may cost at most `epsilon`, at the account's delta."""

    days: float
    epsilon: float


@dataclass
class Standing:
    """What an account may spend and has spent."""

    budget: float | None
    """Epsilon over the ledger's life; None: no limit."""
    delta: float
    window: Window | None = None
    history: Counter[Mechanism] = field(default_factory=Counter)
    """Steps that may have been released."""
    dated: Counter[tuple[int, Mechanism]] = field(default_factory=Counter)
    """The same by the time of their reservation."""
    last: tuple[Mechanism, int] | None = None
    """What was reserved last: its mechanism and its steps."""
    digest: str = ""
    """Keyed digest of the client's data when it was last seen; evidence alone, spending stays when it changes."""
    changes: int = 0
    """How often the digest has changed."""

    @property
    def epsilon(self) -> float:
        return accounting.epsilon(self.history, self.delta)

    def add(self, mechanism: Mechanism, steps: int, at: int) -> None:
        """Charge steps that were reserved at `at`; negative: of those, so many were not taken."""
        self.history[mechanism] += steps
        self.dated[-(-at // _GRAIN) * _GRAIN, mechanism] += steps

    def recent(self, now: float) -> Counter[Mechanism]:
        """The steps in the account's window that ends at `now`."""
        since = -math.inf if self.window is None else now - self.window.days * 86_400
        found: Counter[Mechanism] = Counter()
        for (at, mechanism), steps in self.dated.items():
            if at >= since:
                found[mechanism] += steps
        return found

    def pays_from(self, ask: tuple[Mechanism, int], now: float) -> float | None:
        """When, at the earliest, enough of the window will have passed to pay for `ask`; None: never."""
        if self.window is None:
            return now
        ends = [now, *sorted(at + self.window.days * 86_400 + 1 for at, _ in self.dated)]
        ends = [end for end in ends if end >= now]

        def pays(end: float) -> bool:
            return self.window is not None and _fits(self.recent(end), ask, self.delta, self.window.epsilon)

        first = bisect_left(ends, True, key=pays)  # the later, the less is left in the window
        return ends[first] if first < len(ends) else None


def over(
    standings: Mapping[Account, Standing], asks: Mapping[Account, tuple[Mechanism, int]], now: float
) -> dict[Account, str]:
    """Who cannot pay for these steps now -> what is left of it.

    Accounts that share a standing and ask alike are asked once; all at once by Renyi's bound, and only whom it would
    refuse exactly (accounting.may_join).
    """
    kinds: dict[tuple[int, tuple[Mechanism, int]], Standing] = {}
    for account, ask in asks.items():
        standing = standings[account]
        kinds.setdefault((id(standing), ask), standing)
    claims: list[tuple[tuple[int, tuple[Mechanism, int]], History, float, float]] = []
    for kind, standing in kinds.items():
        mechanism, steps = kind[1]
        more = Counter({mechanism: steps})
        accounting.one_adjacency([mechanism, *+standing.history])
        if standing.budget is not None:
            claims.append((kind, standing.history + more, standing.delta, standing.budget))
        if standing.window is not None:
            claims.append((kind, standing.recent(now) + more, standing.delta, standing.window.epsilon))
    _, histories, deltas, limits = zip(*claims, strict=True) if claims else ((), (), (), ())
    granted = accounting.may_join(histories, deltas, limits)
    short = {kind: "" for (kind, *_), fits in zip(claims, granted, strict=True) if not fits}
    short = {kind: _why(kinds[kind], kind[1], now) for kind in short}
    if not short:
        return {}
    return {account: short[kind] for account, ask in asks.items() if (kind := (id(standings[account]), ask)) in short}


def rounds_left(standing: Standing, ask: tuple[Mechanism, int], now: float) -> int | None:
    """How many more times the account pays for `ask` if all were asked for now; None: no limit."""
    limits = [(standing.history, standing.budget)] if standing.budget is not None else []
    if standing.window is not None:
        limits.append((standing.recent(now), standing.window.epsilon))
    counts = [_most(history, ask, standing.delta, limit) for history, limit in limits if limit is not None]
    return min(counts, default=None)


def _most(history: Counter[Mechanism], ask: tuple[Mechanism, int], delta: float, limit: float) -> int:
    low, high = 0, 1
    while high < 1 << 20 and _fits(history, (ask[0], high * ask[1]), delta, limit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(history, (ask[0], middle * ask[1]), delta, limit) else (low, middle)
    return low


def _fits(history: Counter[Mechanism], ask: tuple[Mechanism, int], delta: float, limit: float) -> bool:
    return accounting.epsilon(history + Counter(dict([ask])), delta) <= limit


def _why(standing: Standing, ask: tuple[Mechanism, int], now: float) -> str:
    if standing.budget is not None and not _fits(standing.history, ask, standing.delta, standing.budget):
        left = max(0.0, standing.budget - standing.epsilon)
        return f"{left:.3g} of its {standing.budget:g} is left, which does not pay for a round"
    assert standing.window is not None
    days, epsilon = standing.window
    left = max(0.0, epsilon - accounting.epsilon(standing.recent(now), standing.delta))
    when = standing.pays_from(ask, now)
    until = "" if when is None else time.strftime(" before %Y-%m-%d %H:%M UTC", time.gmtime(when + 59))
    return f"{left:.3g} of its {epsilon:g} in {days:g} days is left, which does not pay for a round{until}"


def valid(budget: float | None, delta: float, window: Window | None) -> bool:
    """Whether these are terms that an account can be opened with."""
    limits: Iterable[float | None] = (budget, *(window or ()))
    return 0 < delta < 1 and all(limit is None or 0 < limit < math.inf for limit in limits)
