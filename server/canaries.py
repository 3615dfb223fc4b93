"""Canaries in ghost coordinates: the real rounds, with contributions whose trace in what is released can be read off.

A ghost coordinate is one more weight that a single canary moves, as far as its clipping norm allows and in turn up and
down: noise that repeats itself from round to round would cancel. Legend: k is the number of canaries.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clients import codecs
from clients.task import Hello, Reply, Task
from clients.training import Node
from privacy import audit, cohort_noise
from privacy.audit import Included, Scores
from privacy.ghost import Ghost, ghost_loss
from privacy.plan import Mechanism, Plan
from scenarios import Examples, Federation, Scenario, build_model
from scenarios.seeds import derive
from scenarios.settings import Settings, override
from scenarios.weights import Vector, flatten
from server.embedded import EmbeddedFleet
from server.references import NoJournal
from server.rounds import rounds
from server.score import NOTHING
from server.select import local_steps
from server.state import ServerState, first_state

_PUSH = 20.0
"""How many clipping norms a canary would like to move its coordinate: a clip ten times too wide must show."""
_CLIENTS = 500
"""Canary clients of one federation: each sends as many ghost coordinates, all but its own zero."""
_FLOATS = 500_000
"""Of one step's canary gradients; more canaries become another client of the same plan."""
_MOST_FLOATS = 2e10
"""Per-example gradients of the scenario's own model in the whole audit, beyond which it is left out."""
_EXAMPLES = 1000
"""What a canary client says that it has: whoever weighed updates by it would be found out."""
_POST = (
    "server.step=sgd server.rate= server.beta1= server.beta2= server.tau= server.combine=mean server.normalize=false "
    "server.weighting=uniform rounds.average=1 rounds.minimum=0 local.proximal=0 local.weight_decay=0 "
    "fleet.profile=equal fleet.clock=wall fleet.deadline=0"
)
"""What is done with an update after its noise cannot add to epsilon, nor can devices: both are left out."""

Tick = Callable[[], None]


@dataclass(frozen=True)
class Setup:
    """What is audited: a scenario's settings, with the plans that its claim rests on."""

    scenario: Scenario
    settings: Settings
    sizes: Mapping[str, int]
    """Training examples of each client, by name."""
    plans: Mapping[str, Plan]
    """By client; empty without DP."""
    data: Federation | None
    """None: the data are elsewhere, and the canaries stand alone."""
    states: Path
    """A folder for client states."""
    seed: int
    """Of what the attacker draws."""

    @property
    def rounds(self) -> int:
        """All that the plans allow: training and recovery."""
        return self.settings.rounds.number + self.settings.export.recover_rounds


@dataclass(frozen=True)
class Run:
    """The canaries' scores (k,), and in words what was real and what was left out."""

    scores: Scores
    real: str


Probe = Callable[[Setup, str, Included, Tick], Run]
"""(what is audited, the client whose plan it is, which canaries are in, called once a round) -> what they left."""


def by_client(setup: Setup, name: str, included: Included, tick: Tick) -> Run:
    """Each canary is a client, or is not there; read off the model after every round.

    Real: the drawing of cohorts, the clip by client and by server, the codec, the sum, the noise and its denominator.
    """
    plan, scores, parts = setup.plans[name], np.zeros(len(included)), -(-len(included) // _CLIENTS)
    expected = plan.mechanism.sampling_rate * len(setup.plans)
    for part, block in enumerate(np.array_split(np.arange(len(included)), parts)):
        settings = override(setup.settings, f"{_POST} {_seed(setup.settings, part)}")
        coordinates = {f"canary-{i:06}": i for i in np.flatnonzero(included[block]).tolist()}
        roster = {client: Hello(client, _EXAMPLES, "") for client in coordinates}
        state = ServerState(np.zeros(len(block), np.float32), (("ghost", (len(block),)),), {}, setup.rounds)
        fleet = _CanaryClients(roster, coordinates, codecs.resolve(settings.codec))
        clip = settings.privacy.clip
        for after, row in rounds(fleet, roster, setup.plans, state, settings, Unrecorded(), lambda _: NOTHING):
            moved = (after.weights.astype(np.float64) - state.weights) * expected / clip * _sign(row["round"])
            scores[block] += audit.evidence(moved, plan.mechanism, 1)
            state, clip = after, after.clip or clip
            if (row["round"] + part * setup.rounds) % parts == 0:  # once for a round of all blocks
                tick()
    return Run(
        scores,
        "drawing, both clips, codec, sum and noise of the run's own rounds; left out: the model and its training, "
        "which touch no ghost coordinate, and the server's step, which comes after the noise",
    )


class _CanaryClients:
    """A fleet whose clients each push their own coordinate; what is sent twice alike is made once."""

    def __init__(self, roster: Mapping[str, Hello], coordinates: Mapping[str, int], codec: codecs.Codec) -> None:
        self._roster, self._coordinates, self._codec = roster, coordinates, codec
        self._sent: dict[tuple[str, float, float], bytes] = {}

    def hello(self) -> Mapping[str, Hello]:
        return self._roster

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task in tasks:
            yield Reply(task.round, task.client, self._payload(task), _EXAMPLES, 1, within=False)

    def _payload(self, task: Task) -> bytes:
        key = task.client, task.update_clip, _sign(task.round)
        if key not in self._sent:
            wanted = np.zeros(len(task.weights), np.float32)
            wanted[self._coordinates[task.client]] = _PUSH * task.update_clip * _sign(task.round)
            update, _ = cohort_noise.clipped(wanted, task.update_clip)
            self._sent[key] = self._codec.encode(update, None, 0)[0]
        return self._sent[key]


def by_example(setup: Setup, name: str, included: Included, tick: Tick) -> Run:
    """Each canary is one more example of a client, or is not there; read off what that client sends.

    Real: all that a client does, with DP-SGD by Opacus, on its own examples beside the canaries.
    """
    plan = setup.plans.get(name)
    mechanism = plan.mechanism if plan else Mechanism(1.0, 0.0)
    q, examples = mechanism.sampling_rate, setup.sizes[name]
    size = min(len(included), max(_CLIENTS, int(math.sqrt(_FLOATS / q))))
    blocks = np.array_split(np.arange(len(included)), -(-len(included) // size))
    steps = local_steps(setup.settings.local, examples, True)
    base = build_model(setup.scenario, setup.settings) if setup.data else None
    weights = flatten(base).size if base else 0
    if weights * setup.rounds * steps * len(blocks) * q * (examples + size / 2) > _MOST_FLOATS:
        base = None
    own = setup.data.client(name) if setup.data and base else None
    parts = {f"{name}+canaries-{i}": _examples(own, block, included) for i, block in enumerate(blocks)}
    settings = override(setup.settings, f"{_POST} model=ghost rounds.fraction=1 local.steps={steps}")
    fleet = _CanaryExamples(setup, settings, parts, lambda: Ghost(base, own.x.shape[1:] if own else (), size))
    roster = fleet.hello()
    plans = dict.fromkeys(roster, plan) if plan else {}
    state = replace(first_state(fleet.template, settings), until=setup.rounds)
    scores = np.zeros(len(included))
    for _ in rounds(fleet, roster, plans, state, settings, Unrecorded(), lambda _: NOTHING):
        for part, block in zip(parts, blocks, strict=True):
            task, update = fleet.seen[part]
            unit = task.rate * (task.clip or 1.0) / (q * roster[part].examples)
            moved = -update[-size:][: len(block)].astype(np.float64) / unit * _sign(task.round)
            scores[block] += audit.evidence(moved, mechanism, steps)
        tick()
    left_out = "the server's step, which comes after the noise"
    if base is None:
        left_out += ", and the model and the client's own examples, which touch no ghost coordinate"
    return Run(
        scores,
        f"all that client {name} does in its rounds: draw, clip, noise, local steps, codec; left out: {left_out}",
    )


class _CanaryExamples:
    """A fleet of one client under several names, each with other canaries among its examples; keeps what they send."""

    def __init__(
        self, setup: Setup, settings: Settings, parts: Mapping[str, Examples], model: Callable[[], nn.Module]
    ) -> None:
        sizes = {part: len(examples.y) for part, examples in parts.items()}
        federation = Federation(sizes, lambda part: parts[part], next(iter(parts.values())))
        self._nodes = {}
        for sign in (1.0, -1.0):
            loss = ghost_loss(setup.scenario.loss, sign * _PUSH * settings.privacy.clip)
            scenario = replace(setup.scenario, models={"ghost": model}, loss=loss)
            self._nodes[sign] = Node(scenario, settings, federation, setup.states)
        self._codec = codecs.resolve(settings.codec)
        self.seen: dict[str, tuple[Task, Vector]] = {}
        """By client: its last task and the update that it sent, decoded."""

    @property
    def template(self) -> nn.Module:
        return self._nodes[1.0].template

    def hello(self) -> Mapping[str, Hello]:
        return {part: Hello(part, size, "") for part, size in sorted(self._nodes[1.0].federation.sizes.items())}

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task in tasks:
            (reply,) = EmbeddedFleet(self._nodes[_sign(task.round)]).ask([task])
            if reply.reason:
                raise RuntimeError(f"the audit cannot train client {task.client}: {reply.reason}")
            self.seen[task.client] = task, self._codec.decode(reply.payload, len(task.weights))
            yield reply


def _examples(own: Examples | None, block: Any, included: Included) -> Examples:
    """A client's own examples (N, D) with number 0, then the canaries of `block` that are in, numbered from 1."""
    numbers = torch.from_numpy(np.flatnonzero(included[block]) + 1)
    flat = own.x.reshape(len(own.y), -1) if own else torch.zeros(0, 0)
    canaries = torch.cat([torch.zeros(len(numbers), flat.shape[1]), numbers[:, None].float()], 1)
    x = torch.cat([torch.cat([flat, torch.zeros(len(flat), 1)], 1), canaries])
    labels = torch.zeros(len(numbers), dtype=torch.int64)
    return Examples(x, torch.cat([own.y, labels]) if own else labels)


class Unrecorded(NoJournal):
    """Canaries are nobody's data: nothing is charged to a ledger, nothing is kept."""

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        return {}


def _sign(number: int) -> float:
    """Up in odd rounds, down in even ones."""
    return 1.0 if number % 2 else -1.0


def _seed(settings: Settings, part: int) -> str:
    """Seeded noise must differ between federations of one audit; noise of a real run always does."""
    seed = settings.privacy.noise_seed
    return "" if seed is None else f"privacy.noise_seed={derive(seed, 'canaries', part)}"


PROBES: dict[str, Probe] = {"client": by_client, "example": by_example, "none": by_example}
"""By privacy.unit."""
