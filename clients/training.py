"""One client's local work: what it says at first, how it trains, how it evaluates; the same on every runtime."""

import copy
import hmac
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from clients import (
    admission,
    codecs,
    coordinates,
    device,
    encrypting,
    masking,
    placement,
    reading,
    scaffold,
    sgd,
    state,
    upload,
)
from clients.task import Device, Hello, Reply, Task
from privacy import accounting, cohort_noise, dp_sgd, durable, exact_counts, local_noise, noisy_counts
from privacy.integers import Grid, Integers
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario, build_model, predict
from scenarios.seeds import derive
from scenarios.settings import Settings
from scenarios.weights import Layout, Vector, fit, flatten, load

Made = TypeVar("Made")

_SMALL = 1 << 20
"""Bytes of data up to which a copy of them costs nothing worth saving."""


@dataclass(frozen=True)
class Node:
    """What the process has in which clients run: the scenario, the data it can reach, a folder for client states."""

    scenario: Scenario
    settings: Settings
    federation: Federation
    states: Path
    peers: Mapping[str, bytes] | None = None
    """Ed25519 public keys of all clients by name, as this device's owner knows them; None: all are simulated."""
    keyholder: bytes | None = None
    """Ed25519 public key of the key holder, as this device's owner knows it; None: it is simulated on this disk."""

    @cached_property
    def identities(self) -> Mapping[str, bytes]:
        """The public keys by which clients know one another where updates are protected."""
        return masking.simulated(self.states, self.federation.sizes) if self.peers is None else self.peers

    @cached_property
    def template(self) -> nn.Module:
        """The model as the scenario builds it; copied for every task."""
        return build_model(self.scenario, self.settings)

    @cached_property
    def carries(self) -> bool:
        """Whether clients carry something from round to round (clients/state.py)."""
        kept = coordinates.split(self.settings.codec)[0] is not None or self.settings.local.scaffold
        return kept or (upload.bits(self.settings) is None and upload.codec(self.settings).feedback)

    @cached_property
    def ways(self) -> dict[Layout, Any]:
        """How clients/ways.py found that models of these shapes are trained in blocks."""
        return {}

    @cached_property
    def apart(self) -> bool:
        """Whether a batch's loss is the mean of what its examples have for themselves, as most losses are."""
        return dp_sgd.apart(self.template, self.scenario.loss, *self.federation.validation)


def hello(node: Node, name: str, said: Device = Device()) -> Hello:
    """What client `name` says before round 1. said: what a real device's owner says of it."""
    examples = node.federation.client(name)
    if node.settings.fleet.clock == "simulated":
        ability = device.draw(node.settings.fleet.profile, name, node.settings.run.seed)
    else:
        ability = device.measure(copy.deepcopy(node.template), examples.x[:32], said)
    mode = node.settings.protect.mode
    identity = masking.introduced(node.states, name, node.identities) if mode == "masked" else ""
    recipient = encrypting.simulated(node.states, [name])[name].hex() if mode == "encrypted" else ""
    seen = digest(node.states, examples)
    return Hello(name, len(examples.y), seen, ability, identity=identity, recipient=recipient)


def digest(states: Path, examples: Examples) -> str:
    """A fingerprint of data, keyed by the node's own secret: it shows a change, and identifies nothing to others."""
    return fingerprint(durable.secret(states / "key"), examples).hex()


def fingerprint(key: bytes, examples: Examples) -> bytes:
    """The 32 bytes of `digest` under the secret `key`."""
    said = [
        piece
        for part in examples
        for piece in (f"{part.dtype} {tuple(part.shape)} ".encode(), part.contiguous().numpy().data)
    ]
    if (
        sum(part.nbytes for part in examples) < _SMALL
    ):  # a million clients have little each: one call is three times faster
        return hmac.digest(key, b"".join(said), "sha256")
    found = hmac.new(key, digestmod="sha256")
    for piece in said:
        found.update(piece)
    return found.digest()


def answer(node: Node, task: Task) -> Reply:
    """Do what `task` asks of its client. Never raises: a failure is a Reply with a reason that quotes no data."""
    with one_thread():
        return guarded(task, lambda: _answer(node, task))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch a client: sums in another order would be other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def guarded(task: Task, work: Callable[[], Made]) -> Made | Reply:
    """What `work` makes of `task`; where it raises, a Reply with a reason that quotes no data."""
    try:
        return work()
    except (Refused, codecs.CodecError) as error:
        return Reply(task.round, task.client, reason=str(error)[:200])
    except torch.AcceleratorError:  # a GPU that failed is lost to everybody, whoever was being trained
        raise
    except Exception as error:  # a message of torch may quote values of the client's data: its kind alone may leave
        return Reply(task.round, task.client, reason=f"failed with {type(error).__name__}")


def _answer(node: Node, task: Task) -> Reply:
    if task.kind == "protect":
        return Reply(task.round, task.client, _member(node).answer(task, upload.grid_of(task, node.settings)))
    return _train(node, task) if task.kind == "train" else _evaluate(node, task)


@dataclass(frozen=True)
class Admitted:
    """A task to train that this node takes on, with all that its client brings to it."""

    task: Task
    held: reading.Held
    before: state.ClientState
    correction: Vector | None
    """(P,) added to every gradient (clients/scaffold.py); None: without."""

    @property
    def examples(self) -> Examples:
        return self.held.examples

    @property
    def count(self) -> int:
        """Of the client's examples."""
        return self.held.count


def _train(node: Node, task: Task) -> Reply:
    mine = admitted(node, task)
    return finished(node, mine, *trained(node, mine))


def trained(node: Node, mine: Admitted) -> tuple[Vector, int]:
    """(the update (P,) of a task by SGD on the client's own copy of the model, the steps taken)."""
    settings, task, there = node.settings, mine.task, placement.of(node.settings)
    model = placement.moved(_model(node, task), there)
    examples = Examples(*placement.sent(there, *mine.examples))
    with drawing(settings, task), placement.exactly(there):
        steps = sgd.train(model, examples, node.scenario.loss, task, settings.local, settings, mine.correction)
    return flatten(model) - task.weights, steps


@contextmanager
def drawing(settings: Settings, task: Task) -> Iterator[None]:
    """What layers draw from torch's own generator (dropout) follows from the task; the generator stays untouched."""
    with placement.drawing(placement.of(settings), derive(settings.run.seed, "layers", task.round, task.client)):
        yield


def admitted(node: Node, task: Task, read: reading.Read | None = None) -> Admitted:
    """`task`, with its client's data and state. Raises Refused where it is not what this node's settings ask for.

    read: where its block's examples are; None: it is by itself.
    """
    settings, held = node.settings, read(task.client) if read else reading.alone(node.federation, task.client)
    admission.check(task, settings, held.count)
    if _drops_out(settings, task):
        raise Refused("dropped out, as faults.dropout asks")
    before = state.load(node.states, task) if node.carries else state.ClientState()
    correction = scaffold.correction(task, before.control) if settings.local.scaffold else None
    return Admitted(task, held, before, correction)


def finished(node: Node, mine: Admitted, whole: Vector, steps: int) -> Reply:
    """What leaves of the update `whole` (P,) that came of so many steps; the client's state is kept for the next."""
    settings, task, before, count = node.settings, mine.task, mine.before, mine.count
    if not steps:
        return Reply(task.round, task.client, reason="the deadline came before its first step", late=True)
    update, carried, left = whole, before.residual, None
    if task.coordinates is not None:  # before the clip, which is of all that leaves
        (update, left), carried = coordinates.picked(update, carried, task.coordinates), None
    update, within = protected(update, task, settings)
    if settings.protect.mode != "none":
        grid = upload.grid_of(task, settings)
        assert grid is not None
        entries = upload.integers(update, within, count, task, settings, grid)
        payload = _hidden(node, task, grid, entries)
        state.save(node.states, task, state.ClientState(residual=left))
        return Reply(task.round, task.client, payload, count, steps)
    payload, residual = upload.encode(update, carried, within, count, task, settings)
    after = state.ClientState(residual=left if residual is None else residual)
    if mine.correction is not None:  # the variate does what a residual would: clients/scaffold.py
        sent = upload.decode(payload, task, settings)
        after = state.ClientState(control=scaffold.advanced(task, before.control, sent, steps))
    state.save(node.states, task, after)
    told = within or upload.bits(settings) is not None  # integers carry it themselves
    return Reply(task.round, task.client, payload, count, steps, within=told)


def _member(node: Node) -> masking.Member:
    return masking.Member(node.states, node.identities, node.settings.protect)


def _hidden(node: Node, task: Task, grid: Grid, entries: Integers) -> bytes:
    """entries (P + 2,) as they leave, where updates are protected."""
    if node.settings.protect.mode == "masked":
        return _member(node).answer(task, grid, entries)
    keyholder = node.keyholder or encrypting.introduced(node.states)
    return encrypting.Member(node.states, keyholder, node.settings.protect).encrypt(task, grid, entries)


def _drops_out(settings: Settings, task: Task) -> bool:
    chance = settings.faults.dropout
    return (
        chance > 0
        and np.random.default_rng(derive(settings.run.seed, "dropout", task.round, task.client)).random() < chance
    )


def protected(update: Vector, task: Task, settings: Settings) -> tuple[Vector, bool]:
    """(what may leave of `update` (k,): clipped and, under local DP, noised; whether it was within the norm)."""
    if task.update_noise:
        wanted = settings.privacy.noise_seed
        random = cohort_noise.generator(None if wanted is None else derive(wanted, "noise", task.round, task.client))
        return local_noise.noised(update, task.update_clip, task.update_noise, random), True
    return cohort_noise.clipped(update, task.update_clip) if task.update_clip else (update, True)


def evaluate(model: nn.Module, examples: Examples, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, int]:
    """(mean loss, number classified right) of `model` on `examples`, in eval mode, 1024 at a time, where `model` is."""
    model.eval()
    there = next(iter(model.state_dict().values()), examples.x).device
    found = torch.zeros(2, dtype=torch.float64, device=there)
    with torch.no_grad(), placement.exactly(there):
        for some in zip(torch.split(examples.x, 1024), torch.split(examples.y, 1024), strict=True):
            x, y = placement.sent(there, *some)
            outputs = model(x)
            found[0] += loss(outputs, y).double() * len(y)
            found[1] += (predict(outputs) == y).sum()
    total, correct = placement.fetched(found).tolist()
    return total / max(1, len(examples.y)), int(correct)


def _evaluate(node: Node, task: Task) -> Reply:
    if node.federation.client_test is None:
        raise Refused(f"scenario {node.scenario.name} gives its clients no test data: set evaluation.on=server")
    held = len(node.federation.client(task.client).y) if task.mechanism is not None else 0
    admission.check(task, node.settings, held)
    examples = node.federation.client_test(task.client)
    if task.mechanism is not None:
        _few_enough(node, held, len(examples.y))
    loss, correct = evaluate(
        placement.moved(_model(node, task), placement.of(node.settings)), examples, node.scenario.loss
    )
    if node.settings.hides_tests:
        grid = upload.grid_of(task, node.settings)
        assert grid is not None
        told = exact_counts.entries(grid, len(examples.y), correct, loss)
        return Reply(task.round, task.client, _hidden(node, task, grid, told))
    if task.mechanism is None:
        return Reply(task.round, task.client, examples=len(examples.y), loss=loss, correct=correct)
    seed = node.settings.privacy.noise_seed
    random = cohort_noise.generator(None if seed is None else derive(seed, "tests", task.round, task.client))
    right, count = noisy_counts.noised(correct, len(examples.y), task.mechanism, random)
    return Reply(task.round, task.client, examples=count, correct=right)


def _few_enough(node: Node, examples: int, tests: int) -> None:
    """Refuse noised test results whose delta would allow to publish one: the server knows the training part alone."""
    delta = node.settings.privacy.delta or accounting.default_delta(examples)
    if delta * tests >= 1:
        raise Refused(f"its test examples are too many for delta={delta:.3g}: set a smaller privacy.delta")


def fitted(node: Node, task: Task) -> nn.Module:
    """A model of its own for `task`, of the shapes of its weights; the values are undefined."""
    model = copy.deepcopy(node.template)
    fit(model, task.layout)
    return model


def _model(node: Node, task: Task) -> nn.Module:
    model = fitted(node, task)
    load(model, task.weights)
    return model
