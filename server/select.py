"""Who is asked: the cohort of a round, each client's steps, and who is left out before being asked, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clients import masking
from clients.device import step_seconds, transfer_seconds
from clients.roster import ability, examples
from clients.roster import size as held
from clients.steps import local_steps
from clients.task import Device, Hello
from privacy import cohort_noise, fixed_size, matrix_noise
from privacy.plan import Plan
from scenarios.numbered import named
from scenarios.seeds import derive
from scenarios.settings import Settings
from server.plans import planned
from server.spendings import spendings
from server.state import Spent


@dataclass
class Cohort:
    """What a round asks of whom, before any message goes out."""

    steps: dict[str, int] = field(default_factory=dict)
    """Clients to ask, in name order -> local steps."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """{name, reason}: no examples, offline, memory or budget."""
    late: list[str] = field(default_factory=list)
    """Cannot do a single step before the deadline, so they are not even asked."""
    seconds: float = 0.0
    """What the round takes on the simulated clock."""
    drawn: int = 0
    """How many were drawn, whether they could be asked or not."""
    paid: dict[str, int] = field(default_factory=dict)
    """Steps that the round costs, by client: those asked; under local DP and by turns one; under client-level DP else a
    whole round of every client, drawn or not."""
    reason: str | None = None
    """Why nobody could be asked, where that is so for all."""

    def leave_out(self, name: str, reason: str) -> None:
        """`name` is not asked and does not pay."""
        self.steps.pop(name, None)
        self.paid.pop(name, None)
        self.skipped.append({"name": name, "reason": reason})


def round_steps(settings: Settings, examples: int) -> int:
    """Steps of its account that a whole round costs a client: local ones, or the one in which the server adds noise."""
    return local_steps(settings.local, examples, True) if settings.privacy.by_example else 1


def cohort_size(clients: int, settings: Settings) -> int:
    """How many of `clients` are drawn each round; by Poisson draws on average, by turns at least."""
    if by_turns(settings):
        return clients // settings.privacy.bands
    return max(1, round(settings.rounds.fraction * clients))


def most_asked(clients: int, settings: Settings) -> int:
    """The most of `clients` that one round may ask: a coin for each may come out heads for all."""
    if by_turns(settings):
        return -(-clients // settings.privacy.bands)
    by_coins = secret(settings) and settings.privacy.sampling == "poisson"
    return clients if by_coins else cohort_size(clients, settings)


def least_summed(clients: int, settings: Settings) -> int:
    """Fewest clients whose sum may be read where updates are protected: protect.minimum, or half the cohort, but 3."""
    return settings.protect.minimum or max(masking.LEAST, -(-cohort_size(clients, settings) // 2))


def least_evaluated(clients: int, settings: Settings) -> int:
    """Fewest clients whose test results may be summed there: all are asked, drawn or not."""
    return settings.protect.minimum or max(masking.LEAST, -(-clients // 2))


def evaluated(names: Sequence[str], settings: Settings, number: int) -> Sequence[str]:
    """Who is asked for test results after round `number`: all, or a draw that everybody may know."""
    if settings.evaluation.fraction == 1:
        return names
    size = max(1, round(settings.evaluation.fraction * len(names)))
    random = np.random.default_rng(derive(settings.run.seed, "evaluation", number))
    return [names[at] for at in sorted(random.choice(len(names), size, replace=False).tolist())]


def honest(clients: int, settings: Settings) -> int:
    """Fewest honest clients in such a sum: their noise is what is charged where noise comes in shares."""
    return least_summed(clients, settings) - settings.privacy.colluding


def by_turns(settings: Settings) -> bool:
    """Whether clients take turns that everybody may know: the noise is correlated (privacy/matrix_noise.py)."""
    return settings.privacy.unit == "client" and settings.privacy.bands > 1


def secret(settings: Settings) -> bool:
    """Whether nobody may know who was drawn: the draw makes client-level DP cheaper only then."""
    return settings.privacy.by_client and settings.rounds.fraction < 1


def cohort(
    names: Sequence[str],
    roster: Mapping[str, Hello],
    settings: Settings,
    number: int,
    traffic: tuple[int, int],
    plans: Mapping[str, Plan],
    spent: Mapping[str, Spent],
) -> Cohort:
    """The cohort of round `number`, drawn from the run's seed; from the operating system's entropy where it is secret.

    names: all clients, sorted. traffic: bytes (down, up) a client. plans: empty without DP. spent: by client, so far.
    """
    chosen, fleet = Cohort(), settings.fleet
    by_example = settings.privacy.by_example
    by_client = settings.privacy.by_client and not by_turns(settings)  # all pay alike
    whole_round: dict[str, int] = {}
    if by_client:
        if not able(roster, plans, spent, settings).all():
            chosen.reason = "budget: epsilon does not allow another round"
            return chosen
        whole_round = _whole_rounds(roster, settings, plans)
    drawn = _drawn(names, settings, number)
    chosen.drawn = len(drawn)
    simulated = fleet.clock == "simulated"
    for name in drawn:
        device, size = ability(roster, name), held(roster, name)
        if not size:
            chosen.skipped.append({"name": name, "reason": "no examples"})
            continue
        steps = local_steps(settings.local, size, by_example)
        batch = min(settings.local.batch or size, size)
        gradients = batch if by_example else 0  # one an example
        variates = 2 if settings.local.scaffold else 0  # the server's, and its difference to the client's
        weights = traffic[0] // 2 if variates else traffic[0]
        velocity = 1 if settings.local.momentum else 0
        memory = weights * (4 + variates + velocity + gradients)  # weights, gradient, update, start
        if simulated and device.availability < 1:
            online = np.random.default_rng(derive(settings.run.seed, "online", number, name))
            if online.random() >= device.availability:
                chosen.skipped.append({"name": name, "reason": "offline"})
                continue
        if device.memory and memory > device.memory:
            reason = f"memory: needs {memory / 2**20:.0f} MiB, has {device.memory / 2**20:.0f}"
            chosen.skipped.append({"name": name, "reason": reason})
            continue
        if simulated and device != Device():
            link, step = transfer_seconds(device, *traffic), step_seconds(device, batch)
            if fleet.deadline and link + steps * step > fleet.deadline:
                steps = int((fleet.deadline - link) / step) if step and link < fleet.deadline else 0
                if steps < 1:
                    chosen.late.append(name)
                    chosen.seconds = fleet.deadline
                    continue
            chosen.seconds = max(chosen.seconds, link + steps * step)
        cost = steps if by_example else 1
        if plans and not by_client and not can_pay(plans[name], spent.get(name, Spent()), cost):
            reason = f"budget: epsilon {plans[name].epsilon:g} does not allow another round"
            chosen.skipped.append({"name": name, "reason": reason})
            continue
        chosen.steps[name] = steps
    asked = dict.fromkeys(chosen.steps, 1) if plans and not by_example else chosen.steps
    chosen.paid = whole_round if by_client else asked
    return chosen


def _whole_rounds(roster: Mapping[str, Hello], settings: Settings, plans: Mapping[str, Plan]) -> dict[str, int]:
    """Steps that a whole round costs every client with a plan."""
    if not settings.privacy.by_example:
        return dict.fromkeys(plans, 1)
    kinds, back = np.unique(examples(roster), return_inverse=True)
    cost = [round_steps(settings, size) if size else 0 for size in kinds.tolist()]
    names = named(roster)
    return {name: cost[back[names.place(name)]] for name in plans}


def can_pay(plan: Plan, spent: Spent, steps: int) -> bool:
    """Whether a client that has spent so much can pay for a round of `steps` steps."""
    return spent.steps + steps <= plan.steps and (plan.whole is None or spent.whole < plan.whole.steps)


def able(
    roster: Mapping[str, Hello], plans: Mapping[str, Plan], spent: Mapping[str, Spent], settings: Settings
) -> NDArray[np.bool_]:
    """Of each client with a plan, in the order of their names: whether it can pay for one more whole round."""
    table, sizes = planned(plans, named(roster)), examples(roster)
    held = np.flatnonzero(table.which >= 0)
    rows, which = spendings(spent, table.names).rows[held], table.which[held]
    kinds, back = np.unique(sizes[held], return_inverse=True)
    cost = np.array([round_steps(settings, size) for size in kinds.tolist()], np.int64)[back]
    wholes = np.array([plan.whole.steps if plan.whole else np.iinfo(np.int64).max for plan in table.kinds], np.int64)
    able: NDArray[np.bool_] = (rows["steps"] + cost <= table.steps[which]) & (rows["whole"] < wholes[which])
    return able


def _drawn(names: Sequence[str], settings: Settings, number: int) -> Sequence[str]:
    if secret(settings):
        seed = settings.privacy.noise_seed
        random = cohort_noise.generator(None if seed is None else derive(seed, "cohort", number))
        if settings.privacy.sampling == "fixed":
            return fixed_size.draw(names, cohort_size(len(names), settings), random)
        return cohort_noise.sample(names, settings.rounds.fraction, random)
    if by_turns(settings):
        dealt = np.random.default_rng(derive(settings.run.seed, "turns"))
        return matrix_noise.turns(names, settings.privacy.bands, number, dealt)
    size = cohort_size(len(names), settings)
    if size == len(names):
        return names
    rng = np.random.default_rng(derive(settings.run.seed, "cohort", number))
    return [names[i] for i in sorted(rng.choice(len(names), size, replace=False))]
