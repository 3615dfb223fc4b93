"""Canary clients: each pushes a ghost coordinate of its own, and is in, or out, as the promise's adjacency says.

Add or remove one: a canary that is out does not answer; with noise in shares it sends its share alone, since who takes
part is known there. Replace one: it pushes the other way, so that the two cases lie
twice the clipping norm apart. Legend: k canaries, P coordinates of a federation, one a canary, T rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clients import upload
from clients.task import Hello, Reply, Task
from clients.training import protected
from privacy import audit, matrix_noise
from privacy.audit import Included, Scores
from privacy.plan import Plan
from scenarios.settings import Settings, override
from scenarios.weights import Vector
from server import select
from server.canaries import POST, PUSH, Run, Setup, Tick, Unrecorded, seeded, sign
from server.rounds import rounds
from server.score import NOTHING
from server.state import Row, ServerState

_CLIENTS = 500
"""Canary clients of one federation: each sends as many ghost coordinates, all but its own zero."""
_EXAMPLES = 1000
"""What a canary client says that it has: whoever weighed updates by it would be found out."""
_UNPAID = 10**12
"""Steps that the plan of a canary's examples allows: it has none, and the plan of the client alone counts."""

Array = NDArray[np.float64]


def by_client(setup: Setup, name: str, included: Included, tick: Tick) -> Run:
    """Each canary is a client; read off the model after every round.

    Real: the drawing of cohorts, the clip by client and by server, the codec, the sum, the noise and its denominator.
    """
    plan = setup.plans[name]
    mechanism = (plan.whole or plan).mechanism
    bands = setup.settings.privacy.bands if select.by_turns(setup.settings) else 1
    out, group, change = 0.0, bands, ""
    if mechanism.population:  # so many times the real fleet that the share drawn is the real one
        out, group, change = -1.0, mechanism.population, f"rounds.fraction={mechanism.sampling_rate!r}"
    scores = np.zeros(len(included))
    for one in _federations(setup, plan, included, tick, out, group, change):
        expected = mechanism.sampling_rate * one.clients / bands
        clip, moved_TP, turns_TP = setup.settings.privacy.update_norm, [], []
        for before, after, row in one.rounds:
            moved_TP.append((after.weights.astype(np.float64) - before.weights) * expected / clip)
            turns_TP.append(one.pushed(row) if bands > 1 else np.full(len(one.block), sign(row["round"])))
            clip = after.clip or clip
        if bands > 1:
            scores[one.block] = _by_turns(np.array(moved_TP), np.array(turns_TP), bands)
        else:
            scores[one.block] = sum(
                audit.evidence(moved * turn, mechanism, 1) for moved, turn in zip(moved_TP, turns_TP, strict=True)
            )
    return Run(
        scores,
        "drawing, both clips, codec, sum and noise of the run's own rounds; left out: the model and its training, "
        "which touch no ghost coordinate, and the server's step, which comes after the noise",
    )


def by_local(setup: Setup, name: str, included: Included, tick: Tick) -> Run:
    """Each canary is a client that noises its own update; read off what it sends, as the server could."""
    plan = setup.plans[name]
    distance, scores = 2 * setup.settings.privacy.clip, np.zeros(len(included))
    for one in _federations(setup, plan, included, tick, -1.0, 1, "rounds.fraction=1"):
        for _, _, row in one.rounds:
            sent = (one.fleet.seen(client)[i] for client, (i, _) in one.fleet.pushes.items())
            moved = np.fromiter(sent, np.float64, len(one.block)) / distance
            scores[one.block] += audit.evidence(moved * sign(row["round"]), plan.mechanism, 1)
    return Run(
        scores,
        "the clip, the noise and the codec of every client in the run's own rounds; left out: the model and its "
        "training, which touch no ghost coordinate, and all that the server does, which comes after the noise",
    )


def _by_turns(moved_TP: Array, pushed_TP: Array, bands: int) -> Scores:
    """(P,) scores from increments with correlated noise; pushed: +1 or -1 where it was the canary's turn, else 0.

    C times the increments has independent noise, and in it a canary is a column of C a turn. What fits that best, in
    units of a canary, no test tells better apart (Neyman and Pearson 1933).
    """
    band = matrix_noise.coefficients(bands)

    def times_c(rows_TP: Array) -> Array:
        return np.array([sum(band[i] * rows_TP[t - i] for i in range(min(bands, t + 1))) for t in range(len(rows_TP))])

    seen_TP, mark_TP = times_c(moved_TP), times_c(pushed_TP)
    weight = (mark_TP**2).sum(0)
    return np.asarray((seen_TP * mark_TP).sum(0) / np.where(weight > 0, weight, 1.0))


@dataclass(frozen=True)
class _Federation:
    block: NDArray[np.int64]
    """(P,) which of the audit's canaries are its clients."""
    clients: int
    fleet: "_CanaryClients"
    rounds: Iterator[tuple[ServerState, ServerState, Row]]
    """(before, after, what it did) of each."""

    def pushed(self, row: Row) -> Array:
        """(P,) which way the canaries push whose turn it was, were they in; 0 for others. Who is asked is no secret."""
        asked = set(row["cohort"])
        way = self.fleet.way(row["round"])
        return np.array([way if client in asked else 0.0 for client in self.fleet.pushes])


def _federations(
    setup: Setup, plan: Plan, included: Included, tick: Tick, out: float, group: int, change: str
) -> Iterator[_Federation]:
    """Federations of canaries, the next one once the rounds of the one before are over.

    out: what part of its push a canary that is out makes; 0: it does not answer. group: clients come in multiples of
    it; those that are no canaries never answer.
    """
    parts = -(-len(included) // _CLIENTS)
    plan = replace(plan, steps=_UNPAID) if plan.whole else plan
    bands = setup.settings.privacy.bands if select.by_turns(setup.settings) else 1
    for part, block in enumerate(np.array_split(np.arange(len(included)), parts)):
        if setup.settings.privacy.by_shares:  # as few as are charged for: of more, the noise would be more
            change = f"protect.minimum={len(block)} privacy.colluding=0"
        settings = override(upload.everywhere(setup.settings), f"{POST} {change} {seeded(setup.settings, part)}")
        pushes = {f"canary-{i:06}": (i, 1.0 if there else out) for i, there in enumerate(included[block])}
        names = [*pushes, *(f"other-{i:06}" for i in range(-len(block) % group))]
        fleet = _CanaryClients({name: Hello(name, _EXAMPLES, "") for name in names}, pushes, settings, bands)
        yield _Federation(block, len(names), fleet, _ran(setup, plan, fleet, len(block), tick, part, parts))


def _ran(
    setup: Setup, plan: Plan, fleet: "_CanaryClients", size: int, tick: Tick, part: int, parts: int
) -> Iterator[tuple[ServerState, ServerState, Row]]:
    roster = fleet.hello()
    before = ServerState(np.zeros(size, np.float32), (("ghost", (size,)),), {}, setup.rounds)
    plans = dict.fromkeys(roster, plan)
    for after, row in rounds(fleet, roster, plans, before, fleet.settings, Unrecorded(), lambda _: NOTHING):
        yield before, after, row
        before = after
        if (row["round"] + part * setup.rounds) % parts == 0:  # once for a round of all blocks
            tick()


class _CanaryClients:
    """A fleet whose clients each push their own coordinate; what is sent twice alike is made once, noise never."""

    def __init__(
        self, roster: Mapping[str, Hello], pushes: Mapping[str, tuple[int, float]], settings: Settings, bands: int
    ) -> None:
        """pushes: client -> (its coordinate, 1, -1, or 0: it does not answer). bands: rounds to its next turn."""
        self.pushes, self.settings = pushes, settings
        self._roster, self._bands = roster, bands
        self._sent: dict[str, tuple[Task, bytes]] = {}
        """By client: its last task and what it sent."""
        self._made: dict[tuple[str, float, float, int], bytes] = {}

    def hello(self) -> Mapping[str, Hello]:
        return self._roster

    def way(self, number: int) -> float:
        """Up and down in turn, from one of a client's turns to its next."""
        return sign(number // self._bands)

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task in tasks:
            coordinate, part = self.pushes.get(task.client, (0, 0.0))
            if not part and task.shares is None:
                yield Reply(task.round, task.client, reason="is not there")
                continue
            payload = self._payload(task, coordinate, part * self.way(task.round))
            self._sent[task.client] = task, payload
            yield Reply(task.round, task.client, payload, _EXAMPLES, 1, within=False)

    def seen(self, client: str) -> Vector:
        """What the server can read of the last update of `client`."""
        task, payload = self._sent[client]
        return upload.decode(payload, task, self.settings)

    def _payload(self, task: Task, coordinate: int, way: float) -> bytes:
        turned = upload.bits(self.settings) is not None  # integers of each round lie on a grid of their own
        key = task.client, task.update_clip, way, task.round if turned else 0
        if not task.update_noise and task.shares is None and key in self._made:
            return self._made[key]
        wanted = np.zeros(len(task.weights), np.float32)
        wanted[coordinate] = PUSH * task.update_clip * way
        update, _ = protected(wanted, task, self.settings)
        self._made[key] = payload = upload.encode(update, None, False, _EXAMPLES, task, self.settings)[0]
        return payload
