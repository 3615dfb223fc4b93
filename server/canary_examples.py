"""Canary examples: they train by DP-SGD beside a client's own, and leave their trace in what that client sends."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from clients import upload
from clients.steps import local_steps
from clients.task import Hello, Reply, Task
from clients.training import Node
from privacy import audit
from privacy.audit import Included
from privacy.ghost import Ghost, ghost_loss
from privacy.plan import Mechanism
from scenarios import Examples, Federation, build_model
from scenarios.settings import Settings, override
from scenarios.weights import Vector, flatten
from server.canaries import POST, PUSH, Run, Setup, Tick, Unrecorded, sign
from server.embedded import EmbeddedFleet
from server.rounds import rounds
from server.score import NOTHING
from server.state import first_state

_LEAST = 500
"""Canaries of one client, at least."""
_FLOATS = 500_000
"""Of one step's canary gradients; more canaries become another client of the same plan."""
_MOST_FLOATS = 2e10
"""Per-example gradients of the scenario's own model in the whole audit, beyond which it is left out."""
_NO_CLIP = 1e9
"""A norm that no update comes to."""


def by_example(setup: Setup, name: str, included: Included, tick: Tick) -> Run:
    """Each canary is one more example of a client, or is not there; read off what that client sends.

    Real: all that a client does, with DP-SGD by Opacus, on its own examples beside the canaries.
    """
    plan = setup.plans.get(name)
    mechanism = plan.mechanism if plan else Mechanism(1.0, 0.0)
    q, examples = mechanism.sampling_rate, setup.sizes[name]
    size = min(len(included), max(_LEAST, int(math.sqrt(_FLOATS / q))))
    blocks = np.array_split(np.arange(len(included)), -(-len(included) // size))
    steps = local_steps(setup.settings.local, examples, True)
    base = build_model(setup.scenario, setup.settings) if setup.data else None
    weights = flatten(base).size if base else 0
    if weights * setup.rounds * steps * len(blocks) * q * (examples + size / 2) > _MOST_FLOATS:
        base = None
    own = setup.data.client(name) if setup.data and base else None
    parts = {f"{name}+canaries-{i}": _examples(own, block, included) for i, block in enumerate(blocks)}
    change = f"{POST} model=ghost rounds.fraction=1 local.steps={steps}"
    if plan and plan.whole:  # that half comes after what is looked at here, and would rescale it
        change += f" privacy.update_clip={_NO_CLIP} privacy.adapt=false"
        plan = replace(plan, whole=replace(plan.whole, mechanism=Mechanism(1.0, 0.0)))
    settings = override(upload.everywhere(setup.settings), change)
    fleet = _CanaryExamples(setup, settings, parts, lambda: Ghost(base, own.x.shape[1:] if own else (), size))
    roster = fleet.hello()
    plans = dict.fromkeys(roster, plan) if plan else {}
    state = replace(first_state(fleet.template, settings), until=setup.rounds)
    scores = np.zeros(len(included))
    for _ in rounds(fleet, roster, plans, state, settings, Unrecorded(), lambda _: NOTHING):
        for part, block in zip(parts, blocks, strict=True):
            task, update = fleet.seen[part]
            unit = task.rate * (task.clip or 1.0) / (q * roster[part].examples)
            moved = -update[-size:][: len(block)].astype(np.float64) / unit * sign(task.round)
            scores[block] += audit.evidence(moved, mechanism, steps)
        tick()
    left_out = "the server's step, which comes after the noise"
    if plan and plan.whole:
        left_out += ", as do the clip of the whole update and the server's noise"
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
        for way in (1.0, -1.0):
            loss = ghost_loss(setup.scenario.loss, way * PUSH * settings.privacy.clip)
            scenario = replace(setup.scenario, models={"ghost": model}, loss=loss)
            self._nodes[way] = Node(scenario, settings, federation, setup.states)
        self._settings = settings
        self.seen: dict[str, tuple[Task, Vector]] = {}
        """By client: its last task and the update that it sent, decoded."""

    @property
    def template(self) -> nn.Module:
        return self._nodes[1.0].template

    def hello(self) -> Mapping[str, Hello]:
        return {part: Hello(part, size, "") for part, size in sorted(self._nodes[1.0].federation.sizes.items())}

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task in tasks:
            (reply,) = EmbeddedFleet(self._nodes[sign(task.round)]).ask([task])
            if reply.reason:
                raise RuntimeError(f"the audit cannot train client {task.client}: {reply.reason}")
            self.seen[task.client] = task, upload.decode(reply.payload, task, self._settings)
            yield reply


def _examples(own: Examples | None, block: Any, included: Included) -> Examples:
    """A client's own examples (N, D) with number 0, then the canaries of `block` that are in, numbered from 1."""
    numbers = torch.from_numpy(np.flatnonzero(included[block]) + 1)
    flat = own.x.reshape(len(own.y), -1) if own else torch.zeros(0, 0)
    canaries = torch.cat([torch.zeros(len(numbers), flat.shape[1]), numbers[:, None].float()], 1)
    x = torch.cat([torch.cat([flat, torch.zeros(len(flat), 1)], 1), canaries])
    labels = torch.zeros(len(numbers), dtype=torch.int64)
    return Examples(x, torch.cat([own.y, labels]) if own else labels)
