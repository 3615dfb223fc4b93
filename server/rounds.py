"""One federation, top to bottom: a generator over rounds, each committed before it is yielded.

Legend: P is the number of weights; K the number of clients.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from clients import cohort, coordinates, scaffold, upload
from clients.coordinates import Coordinates
from clients.roster import Sizes, examples
from clients.task import Hello, Reply, Task
from privacy import cohort_noise, noise_shares
from privacy.matrix_noise import BandedNoise
from privacy.plan import Plan
from scenarios.numbered import named
from scenarios.seeds import derive
from scenarios.settings import Local, Settings
from server import combine, gather, replies, rows, select, step
from server.plans import planned
from server.spendings import Spendings, spendings
from server.state import Row, Score, ServerState


class Fleet(Protocol):
    """The clients, wherever they run."""

    def hello(self) -> Mapping[str, Hello]:
        """Every client by name, sorted; asked once."""

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        """One reply a task, in the tasks' order (client names, sorted); a failure is a reply with a reason."""


class Journal(Protocol):
    """What makes a round durable."""

    def reserve(self, number: int, steps: Mapping[str, int]) -> Mapping[str, str]:
        """Before data is touched: these clients may now run these steps under DP; not those returned, name -> why."""

    def charged(self, task: Task) -> Task:
        """The task with what was written down of it, for the ledger of the device that adds its noise."""

    def heard(self, reply: Reply) -> None:
        """What a device says of its own ledger is kept with the next commit."""

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        """All or nothing: weights, step state, account, metrics. taken: the steps of every good reply, by client."""


def rounds(
    fleet: Fleet,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    state: ServerState,
    settings: Settings,
    journal: Journal,
    score: Callable[[ServerState], Score],
    gathered: gather.Gather = gather.clear,
    alone: bool = False,
) -> Iterator[tuple[ServerState, Row]]:
    """Rounds state.round + 1 to state.until; yields (state, row) once a round is durable.

    plans: by client name; empty without DP. A client that is late, fails or answers garbage costs its own update and is
    named in the row. A round with fewer than settings.rounds.minimum good replies is committed and not applied.
    gathered: how sums of integers are read, where updates are protected. alone: every client is a device of its own.
    """
    names = named(roster)
    plans, sizes = planned(plans, names) if plans else {}, examples(roster)
    state = replace(state, clients=spendings(state.clients, names))
    worst = rows.worst_epsilon(state, plans)
    combined, server_step = combine.resolve(settings.server), step.resolve(settings.server)
    shares = gather.shares(settings, plans)
    central = central_noise(plans, settings) if settings.privacy.by_client and not shares else None
    largest = _largest(sizes, settings)
    engine = partial(cohort.told, settings, alone=alone)
    blocks = settings.local.engine == "cohort" and cohort.weigh(settings) is not None
    while state.round < state.until:
        began, number = time.monotonic(), state.round + 1

        # who is asked, and may they: what they could release is written down before any task goes out
        clip = state.clip or settings.privacy.update_norm
        grid, norm = gather.grid(settings, plans, len(state.weights), number, clip), clip
        shared = _shared(state, settings, number)
        down = state.download + (0 if shared is None else shared.nbytes)
        traffic = down, gather.sent(settings, len(state.weights), len(names), grid)
        chosen = select.cohort(names, roster, settings, number, traffic, plans, state.clients)
        for name, reason in (journal.reserve(number, chosen.paid) if plans and chosen.paid else {}).items():
            chosen.leave_out(name, reason)
        tasks = _tasks(state, plans, settings, number, chosen.steps, clip, largest, shared)
        tasks = [journal.charged(task) for task in tasks]

        # train; what comes back is decoded and checked one by one, and combined as it comes
        row = rows.begun(state, number, chosen, down * len(tasks)) | {"engine": engine(len(tasks))}
        accepted: dict[str, int] = {}
        ask = partial(replies.counted, fleet, row)
        good = partial(replies.good, tasks=tasks, roster=roster, journal=journal, row=row, accepted=accepted)
        tally = _tally(state, sizes, settings, number)
        if grid is not None or blocks:  # sums alone are read: of integers, or where blocks of clients are trained
            if grid is not None:
                summed, norm = gathered(ask, tasks, grid, good, roster), grid.norm
            else:
                summed = combine.of_parts(good(ask(tasks), replies.summand(settings)), len(state.weights))
            update, row["reason"] = summed.mean, summed.reason
            if summed.reason is not None:
                accepted.clear()
        elif central is not None:
            summed = combine.total(
                good(ask(tasks), replies.reader(settings)), upload.values(settings, len(state.weights))
            )
        else:
            single = good(ask(tasks), replies.reader(settings))
            update = combined(tally.through(single) if tally else single, settings.server)

        # noise, if central: on the sum, whoever replied; in shares it is there where enough did
        if isinstance(central, BandedNoise):
            update, noise = central.release(summed.total, norm, _random(settings, number), state.noise)
            state = replace(state, noise=noise)
        elif central is not None and summed.noised:
            update, clip = central.settled(summed.total, summed.votes, clip)
        elif central is not None:
            update, clip = central.release(summed.total, summed.votes, clip, _random(settings, number), norm)
        elif shares is not None:  # the clients added it
            update = noise_shares.released(summed.total, len(plans))

        # server step
        lost = None if select.secret(settings) else row["reason"]  # it would tell how many were drawn
        row["reason"] = lost or rows.too_few(chosen, accepted, len(names), settings)
        if update is not None and row["reason"] is None:
            try:
                whole = update if shared is None else coordinates.spread(update, shared, len(state.weights))
                weights, step_state = server_step.apply(state.step, state.weights, whole)
                control = tally.advanced() if tally else None
                pace = None if shared is None else coordinates.paced(state.pace, update, shared, len(whole), number)
                state = replace(state, weights=weights, step=step_state, clip=clip, control=control, pace=pace)
                row["applied"] = True
            except OverflowError as error:
                row["reason"] = str(error)

        # commit: all or nothing
        taken = accepted if settings.privacy.unit in ("none", "example") else chosen.paid  # a round is paid for whole
        state = _advance(state, settings, number, chosen, accepted, taken, row)
        if select.secret(settings):
            rows.withhold(row, traffic, select.cohort_size(len(names), settings) if chosen.paid else 0, engine)
        row |= rows.scored(score, state)
        row["epsilon"] = worst = rows.worst_epsilon(state, plans, chosen.paid, worst)
        row["seconds"] = time.monotonic() - began
        journal.commit(state, row, taken)
        yield state, row


def rate(local: Local, number: int, rounds_number: int) -> float:
    """The local learning rate of round `number`; recovery rounds after the last begin anew, without decay."""
    progress = (number - 1) / max(1, rounds_number - 1) if number <= rounds_number else 0.0
    return local.rate * (1 - local.decay * progress)


def _tasks(
    state: ServerState,
    plans: Mapping[str, Plan],
    settings: Settings,
    number: int,
    asked: Mapping[str, int],
    clip: float,
    largest: int,
    shared: Coordinates | None,
) -> list[Task]:
    """Of every client that is asked for so many steps."""
    assert isinstance(state.clients, Spendings)
    by_example, local = settings.privacy.by_example, settings.privacy.unit == "local"
    alike = partial(
        Task,
        kind="train",
        round=number,
        weights=state.weights,
        layout=state.layout,
        rate=rate(settings.local, number, settings.rounds.number),
        control=state.control,
        coordinates=shared,
        deadline=settings.fleet.deadline if settings.fleet.clock == "wall" else 0.0,
        update_clip=clip if settings.privacy.by_client or local else 0.0,
        shares=gather.shares(settings, plans),
        largest=largest,
    )
    tasks = []
    for (name, steps), last in zip(asked.items(), state.clients.last(asked), strict=True):
        plan = plans[name] if by_example else None  # under example-level DP there is no task without a plan
        tasks.append(
            alike(
                client=name,
                steps=steps,
                state_round=last,
                mechanism=plan.mechanism if plan else None,
                clip=plan.clip if plan else 0.0,
                update_noise=plans[name].mechanism.noise_multiplier if local else 0.0,
            )
        )
    return tasks


def _shared(state: ServerState, settings: Settings, number: int) -> Coordinates | None:
    """The coordinates that all clients of round `number` send, where they share them."""
    share, _ = coordinates.split(settings.codec)
    if share is None:
        return None
    return coordinates.of_round(share, len(state.weights), settings.run.seed, number, state.pace)


def _tally(state: ServerState, sizes: Sizes, settings: Settings, number: int) -> scaffold.Tally | None:
    """What sums the next control variate, where there is one; a client without examples never takes part."""
    if state.control is None:
        return None
    whole = sum(replies.weight(size, settings) for size in sizes[sizes > 0].tolist())
    return scaffold.Tally(state.control, rate(settings.local, number, settings.rounds.number), whole)


def _largest(sizes: Sizes, settings: Settings) -> int:
    """Examples of the largest client, by which integers are weighed; 0: each weighs 1, or they travel as floats."""
    alike = settings.server.weighting == "uniform" or settings.privacy.by_client
    return 0 if alike or upload.bits(settings) is None else int(sizes.max())


def central_noise(plans: Mapping[str, Plan], settings: Settings) -> cohort_noise.CohortNoise | BandedNoise:
    """The noise on a sum under client-level DP."""
    wanted = settings.privacy
    first = next(iter(plans.values()))
    plan = first.whole or first  # all share it
    if select.by_turns(settings):
        return BandedNoise(plan.mechanism.noise_multiplier, wanted.bands, len(plans) / wanted.bands)
    expected = plan.mechanism.sampling_rate * len(plans)
    moves = wanted.adapt_rate if wanted.adapt else 0.0
    return cohort_noise.CohortNoise(plan.mechanism.noise_multiplier, expected, wanted.quantile, moves)


def _random(settings: Settings, number: int) -> np.random.Generator:
    seed = settings.privacy.noise_seed
    return cohort_noise.generator(None if seed is None else derive(seed, "noise", number))


def _advance(
    state: ServerState,
    settings: Settings,
    number: int,
    chosen: select.Cohort,
    accepted: Mapping[str, int],
    taken: Mapping[str, int],
    row: Row,
) -> ServerState:
    """The state after round `number`: who was to pay has paid, whether a reply came or not; average; clock."""
    assert isinstance(state.clients, Spendings)
    paid, joined = state.clients.places(chosen.paid), state.clients.places(accepted if row["applied"] else ())
    steps = np.fromiter((min(asked, taken.get(name, asked)) for name, asked in chosen.paid.items()), np.int64)
    clients = state.clients.after(number, paid, steps, int(settings.privacy.unit == "both"), joined)
    average, averaged = state.average, state.averaged
    if state.phase == "train" and number > state.until - settings.rounds.average:
        average = state.weights.astype(np.float64) + (0 if average is None else average)
        averaged += 1
    clock = state.clock + chosen.seconds
    row["simulated_seconds"] = clock if clock else None
    return replace(state, round=number, clients=clients, average=average, averaged=averaged, clock=clock)
