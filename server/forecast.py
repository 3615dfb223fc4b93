"""The forecast: accuracy against epsilon, predicted by federations that really train, clipped and noised as planned.

It trains on the data it is given and charges no ledger. On made-up or public data that costs nobody anything; on real
data it releases what it trained, and `Forecast.cost` says how much that would spend.
"""

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sklearn.isotonic import IsotonicRegression

from clients import upload
from clients.training import Node
from privacy import accounting, renyi
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios.settings import Settings, override
from server import budget, planner, purses
from server.embedded import EmbeddedFleet
from server.planner import Answer
from server.references import NoJournal
from server.rounds import Fleet, rounds
from server.score import NOTHING, scorer
from server.state import final_weights, first_state

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Epsilons that are tried, in units of the target."""
_FEW = (0.5, 1.0, 2.0)
REPEATS = 2
SECONDS = 60.0
"""What a forecast may take before its federations are shortened."""
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Point:
    """The federations of one epsilon."""

    epsilon: float
    accuracies: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of one federation; None of a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Forecast:
    """A curve, and what it says at the target."""

    points: tuple[Point, ...]
    rounds: int
    """That each federation ran."""
    planned: int
    """That the run would."""
    accuracy: float | None
    """Predicted at the target."""
    spread: float | None
    """Standard deviation of one run about it."""
    cost: float
    """Epsilon that all these federations would spend together, of the client that pays most."""
    reason: str = ""
    """Why there is no accuracy."""
    whole: float | None = None
    """The cost to a client as a whole, where it has a promise of its own."""
    tests: float | None = None
    """The cost to a client's test examples, where what is said of them is noised."""


@dataclass(frozen=True)
class _Unkept(NoJournal):
    """A journal (server.rounds) that keeps nothing, and leaves out whom the ledger would refuse."""

    payable: Mapping[str, int]
    """Rounds that a client can be asked in; who is missing can pay for all."""
    asked: Counter[str]

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        out = {name: "ledger" for name in steps if self.asked[name] >= self.payable.get(name, number)}
        self.asked.update(steps.keys() - out.keys())
        return out


def forecast(found: Answer, progress: Callable[[int, int], None], seconds: float = SECONDS) -> Forecast:
    """Run federations at some epsilons about the target of a feasible plan, two at each, with noise nobody can replay.

    Where all rounds would take longer than `seconds`, each federation is `shortened`. progress: called with
    (rounds done, rounds in all). Raises Refused where not even a few short ones fit.
    """
    found = replace(found, settings=upload.in_the_clear(found.settings))
    with tempfile.TemporaryDirectory(prefix="umbel-forecast-") as states:
        settings = found.settings
        node = Node(found.scenario, settings, found.scenario.data(settings), Path(states))
        fleet = EmbeddedFleet(node)
        examined = {name: plan for name, plan in found.tests.items() if _evaluates(found, name)}
        score = scorer(node, fleet, sorted(found.roster), examined)
        per_round = _seconds_a_round(fleet, found, node, seconds)
        if (fits := schedule(per_round, settings.rounds.number, seconds)) is None:
            raise Refused(
                f"a round takes {per_round:.2g} s here, so no forecast fits into {seconds:g} s: --seconds gives it more"
            )
        factors, number = fits
        tried = list(_plans(found, factors, number))
        total, done, began = len(tried) * REPEATS * number, 0, time.monotonic()
        reached: dict[float, list[float]] = {epsilon: [] for epsilon, _, _ in tried}
        spent: dict[str, Counter[Mechanism]] = {name: Counter() for name in found.plans}
        wholes: Counter[Mechanism] = Counter()
        nearest = sorted(tried, key=lambda one: abs(math.log(one[0] / settings.privacy.epsilon)))
        for epsilon, short, plans in nearest * REPEATS:
            enough = all(reached.values()) and len(reached[nearest[0][0]]) >= REPEATS
            if enough and time.monotonic() - began > seconds:
                break  # slower than it looked at first: the epsilons farther from the target are tried once
            first, journal = first_state(node.template, short), _Unkept(_payable(found, epsilon, short), Counter())
            last = first
            held_to = EmbeddedFleet(replace(node, settings=short))  # a node that asked for more noise would refuse
            for state, _ in rounds(held_to, found.roster, plans, first, short, journal, lambda _: NOTHING):
                last, done = state, done + 1
                progress(done, total)
            if (accuracy := score(replace(last, weights=final_weights(last))).accuracy) is not None:
                reached[epsilon].append(accuracy)
            for name, client in last.clients.items():
                spent[name][plans[name].mechanism] += client.steps
            if (one := next(iter(plans.values())).whole) is not None:  # all share it, and each pays every round at most
                wholes[one.mechanism] += max(client.whole for client in last.clients.values())
    points = [Point(epsilon, tuple(known)) for epsilon, known in reached.items() if known]
    predicted, spread = at(points, settings.privacy.epsilon)
    cost = _together([(spent[name], plan.delta) for name, plan in found.plans.items()])
    reason = "" if points else "nobody could evaluate a model: no test data, or nothing finite came of it"
    shared = next(iter(found.plans.values())).whole
    whole = None if shared is None else accounting.epsilon(wholes, shared.delta)
    times = sum(len(known) for known in reached.values())
    said = [(Counter({plan.mechanism: times}), plan.delta) for plan in examined.values()]
    tests = _together(said) if said else None
    return Forecast(tuple(points), number, settings.rounds.number, predicted, spread, cost, reason, whole, tests)


def at(points: Sequence[Point], epsilon: float) -> tuple[float | None, float | None]:
    """(accuracy, standard deviation of one run) at `epsilon`: a curve that never falls, through the points' means.

    Isotonic regression over log epsilon, straight between points; the deviation is pooled over those within a factor
    of 2, as it grows where noise drowns the signal.
    """
    if not points:
        return None, None
    x, y = [math.log(point.epsilon) for point in points], [point.accuracy for point in points]
    curve = IsotonicRegression(out_of_bounds="clip").fit(x, y)
    repeated = [(point.epsilon, point.spread) for point in points if point.spread is not None]
    near = [spread for at, spread in repeated if epsilon / 2.001 < at < epsilon * 2.001]
    pooled = math.sqrt(statistics.fmean(spread**2 for spread in near)) if near else None
    return float(curve.predict([math.log(epsilon)])[0]), pooled


def schedule(per_round: float, planned: int, seconds: float) -> tuple[tuple[float, ...], int] | None:
    """(factors, rounds): which epsilons are tried and in how many rounds, in `seconds` at `per_round` seconds a round.

    All factors where at least five rounds of each fit, else the three in the middle; None where even those do not.
    """
    for factors in (FACTORS, _FEW):
        fits = int(seconds / per_round / (len(factors) * REPEATS))
        if fits >= min(_LEAST_ROUNDS, planned):
            return factors, min(planned, fits)
    return None


def _seconds_a_round(fleet: Fleet, found: Answer, node: Node, seconds: float) -> float:
    """By the clock of the second round, as the first has more to set up; of the first where it is long."""
    first = replace(first_state(node.template, found.settings), until=2)
    began = time.monotonic()
    took = 0.0
    for _ in rounds(fleet, found.roster, found.plans, first, found.settings, _Unkept({}, Counter()), lambda _: NOTHING):
        took, began = time.monotonic() - began, time.monotonic()
        if took > seconds / 3:
            break
    return took


def shortened(settings: Settings, number: int) -> Settings:
    """Settings of a federation of `number` rounds that stands for the whole.

    The local rate grows by as much as the rounds shrink: noise calibrated for fewer rounds is smaller by the square
    root of that, so all updates together go as far, and all noise together adds up to as much, as over all rounds. Of
    the ways that were measured this comes closest (docs/decisions/012).
    """
    share = number / settings.rounds.number
    recovery = math.ceil(settings.export.recover_rounds * share)
    average = max(1, round(settings.rounds.average * share))
    rate = settings.local.rate / share
    return override(
        settings,
        f"rounds.number={number} rounds.average={average} export.recover_rounds={recovery} local.rate={rate!r}",
    )


def _plans(
    found: Answer, factors: Sequence[float], number: int
) -> Iterator[tuple[float, Settings, Mapping[str, Plan]]]:
    """(epsilon, settings, plans) of every epsilon that is within reach; the target always is."""
    short = found.settings if number == found.settings.rounds.number else shortened(found.settings, number)
    for factor in factors:
        settings = override(short, f"privacy.epsilon={found.settings.privacy.epsilon * factor!r}")
        try:
            yield settings.privacy.epsilon, settings, budget.plans(found.roster, settings)
        except Refused:
            continue


def _payable(found: Answer, epsilon: float, short: Settings) -> dict[str, int]:
    """Rounds of a short federation that each client with a budget, or a window of time, can be asked in."""
    if all(purse.budget is None and purse.window is None for owned in found.held.values() for purse in owned):
        return {}
    whole = override(found.settings, f"privacy.epsilon={epsilon!r}")
    try:
        plans = budget.plans(found.roster, whole)
    except Refused:
        return {}
    held = planner.hold(replace(found, settings=whole, plans=plans)).held
    share = short.rounds.number / found.settings.rounds.number
    able = purses.able(held)
    return {
        name: math.floor(min(purse.rounds for purse in owned) * share)
        for name, owned in held.items()
        if name not in able
    }


def _evaluates(found: Answer, name: str) -> bool:
    """Whether the client's test examples pay for the run's last evaluation, which the forecast stands for."""
    return name not in found.examined or found.examined[name].pays


def _together(spent: Sequence[tuple[Counter[Mechanism], float]]) -> float:
    """The most that anyone spent; for many different clients the looser Renyi bound."""
    if len({(frozenset(history.items()), delta) for history, delta in spent}) > 40:
        histories, deltas = zip(*spent, strict=True)
        return float(renyi.epsilons(histories, deltas).max())
    return max(accounting.epsilon(history, delta) for history, delta in spent)
