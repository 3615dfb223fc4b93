"""Blocks on a device other than the processor: the same updates, nothing mixed, nothing looked at on the way.

No GPU is needed for it: `away` is a device of the tests' own (conftest.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients import cohort, fused, gram, placement, private_stack, stack, training
from clients.task import Reply, Task
from clients.training import Node, answer
from privacy import cohort_noise, dp_sgd, on_device
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.seeds import derive
from scenarios.settings import Settings, override
from scenarios.weights import flatten, layout
from server.embedded import EmbeddedFleet

LOSS = nn.functional.cross_entropy
SIZES = {"a": 24, "b": 18, "c": 31, "d": 20}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.flatten(1).view(len(x), 8, 8).transpose(0, 1))[0][-1])


def chain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))


def convolutions() -> nn.Module:
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))


def forgetful() -> nn.Module:
    hidden = [nn.Linear(64, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(9, 3))


MODELS = {"chain": chain, "convolutions": convolutions, "forgetful": forgetful, "recurrent": Recurrent}
WAYS = {
    "few rows": "local.batch=8 local.epochs=2",
    "many rows": "local.batch=8 local.epochs=5",
    "both pulls": "local.batch=8 local.epochs=2 local.proximal=0.4 local.weight_decay=0.3",
    "momentum": "local.batch=8 local.epochs=2 local.momentum=0.9",
    "scaffold": "local.batch=8 local.scaffold=true",
}


def examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 40), 1, 8, 8, generator=generator)
    return Examples(x, (x[:, 0, 0, 0] > 0).long() + (x[:, 0, 1, 1] > 0.5).long())


def made_node(
    folder: Path, model: str, text: str, loss: Any = LOSS, data: Callable[[str], Examples] = examples
) -> Node:
    federation = Federation(SIZES, data, examples("validation"), examples("test"))
    scenario = Scenario("made", Settings(), {"net": MODELS[model]}, lambda _: federation, loss, name="made")
    return Node(scenario, override(Settings(), f"local.engine=cohort {text}"), federation, folder)


def made_tasks(node: Node, **changes: Any) -> list[Task]:
    local, model = node.settings.local, node.template
    weights, shapes, steps = flatten(model), layout(model), {n: local.epochs * -(-s // 8) for n, s in SIZES.items()}
    if local.scaffold:
        changes["control"] = np.full_like(weights, 0.01)
    tasks = [Task("train", 1, name, weights, shapes, rate=0.1, steps=steps[name]) for name in SIZES]
    return [replace(task, **changes) for task in tasks]


def off(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def payloads(replies: Sequence[Reply]) -> np.ndarray[Any, Any]:
    assert [reply.reason for reply in replies] == [""] * len(SIZES)
    return np.stack([np.frombuffer(reply.payload, "<f4") for reply in replies])


def total(replies: Sequence[Reply]) -> np.ndarray[Any, Any]:
    assert [reply.reason for reply in replies] == [""] * len(SIZES)
    summand = replies[-1].summand
    assert summand is not None
    assert summand.total is not None
    return summand.total


def trained(
    away: Any, patch: pytest.MonkeyPatch, node: Node, tasks: Sequence[Task], weigh: Callable[[int], float] | None = None
) -> tuple[list[Reply], list[Reply]]:
    """The replies to `tasks` (there, here). node.states: of the first; the second has a folder beside it."""
    with away:
        there = cohort.answer(node, tasks, weigh)
    patch.undo()
    return there, cohort.answer(replace(node, states=node.states / "here"), tasks, weigh)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_a_device_gives_every_client_the_processors_update_and_is_waited_for_once(
    tmp_path: Path, away: Any, monkeypatch: pytest.MonkeyPatch, model: str, way: str
) -> None:
    node = made_node(tmp_path, model, WAYS[way])
    assert node.apart
    if model == "chain" and way in ("few rows", "both pulls", "momentum"):
        monkeypatch.setattr(fused, "Trainer", None)  # where a failure of Gram matrices would go unnoticed
    there, here = trained(away, monkeypatch, node, made_tasks(node))
    assert off(payloads(there), payloads(here)) < 1e-6
    assert away.waits == {"_to_copy": 1}


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("model", MODELS)
def test_a_sum_is_made_where_its_updates_lie_and_comes_at_once(
    tmp_path: Path, away: Any, monkeypatch: pytest.MonkeyPatch, model: str, clip: float
) -> None:
    words = f"privacy.unit=client privacy.clip={clip}" if clip else ""
    node = made_node(tmp_path, model, f"{WAYS['few rows']} {words}")
    assert node.apart
    there, here = trained(away, monkeypatch, node, made_tasks(node, update_clip=clip), lambda count: count / 10)
    assert off(total(there), total(here)) < 1e-6
    assert [reply.within for reply in there] == [reply.within for reply in here] == [not clip] * len(SIZES)
    assert away.waits == {"_to_copy": 1}


def test_noise_of_the_clients_own_is_put_on_the_updates_of_a_device(
    tmp_path: Path, away: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "privacy.unit=local privacy.epsilon=500 privacy.noise_seed=1 rounds.number=1"
    node = made_node(tmp_path, "convolutions", f"{WAYS['few rows']} {words}")
    tasks = made_tasks(node, update_clip=1.0, update_noise=5.0)
    there, here = trained(away, monkeypatch, node, tasks, lambda _: 1.0)
    assert off(total(there), total(here)) < 1e-6
    assert away.waits == {"_to_copy": 1}


@pytest.mark.parametrize("model", ["chain", "convolutions"])
def test_who_fails_on_a_device_is_named_and_not_in_the_sum(tmp_path: Path, away: Any, model: str) -> None:
    def data(name: str) -> Examples:
        x, y = examples(name)
        return Examples(x * torch.inf if name == "c" else x, y + 9 if name == "d" else y)

    node = made_node(tmp_path, model, WAYS["few rows"], data=data)
    assert node.apart
    with away:
        replies = cohort.answer(node, made_tasks(node), float)
    assert {reply.client: reply.reason.split(":")[0] for reply in replies if reply.reason} == {
        "c": "an update must be finite",
        "d": "failed with IndexError",
    }
    summand = replies[1].summand
    assert summand is not None
    assert summand.total is not None
    assert np.isfinite(summand.total).all()
    assert summand.whole == SIZES["a"] + SIZES["b"]


def under_dp(node: Node) -> list[Task]:
    return [replace(task, mechanism=Mechanism(0.4, 1.3), clip=0.5) for task in made_tasks(node)]


def test_under_example_level_dp_a_block_is_waited_for_once_and_takes_the_steps_that_are_charged(
    tmp_path: Path, away: Any
) -> None:
    words = "local.batch=8 privacy.unit=example privacy.clip=0.5 privacy.noise_seed=3"
    node = made_node(tmp_path, "chain", f"{words} local.proximal=0.3")
    assert node.apart
    made, tasks = stack.read(node.template), under_dp(node)
    assert made is not None
    with away:
        found = payloads(cohort.answer(node, tasks))
    assert away.waits == {"_to_copy": 1}
    clients = []
    for task in tasks:
        random = [dp_sgd.noise_generator(derive(3, "noise", 1, task.client)) for _ in ("noise", "samples")]
        clients.append(private_stack.Private(*examples(task.client), task.steps, Mechanism(0.4, 1.3), *random))
    pulls = fused.Pulls.of(0.1, 0.3, 0.0)
    truth = private_stack.train(made, torch.from_numpy(tasks[0].weights), clients, LOSS, pulls, 0.5)
    assert off(found, torch.stack(truth).numpy()) < 1e-6


@pytest.mark.parametrize("words", ["", "privacy.unit=example privacy.clip=0.5 privacy.noise_seed=3"])
@pytest.mark.parametrize("model", ["chain", "convolutions"])
def test_single_trains_on_a_device_too(
    tmp_path: Path, away: Any, monkeypatch: pytest.MonkeyPatch, model: str, words: str
) -> None:
    node = made_node(tmp_path, model, f"local.batch=8 local.proximal=0.1 local.engine=single {words}")
    tasks = under_dp(node) if words else made_tasks(node)
    if words:  # with noise the draws of samples would be others
        tasks = [replace(task, mechanism=Mechanism(1.0, 0.0)) for task in tasks]
    with away:
        there = [answer(node, task) for task in tasks]
    monkeypatch.undo()
    assert off(payloads(there), payloads([answer(node, task) for task in tasks])) < 1e-6


def test_weights_are_evaluated_on_a_device_with_the_processors_result(away: Any) -> None:
    model, (x, y) = chain(), examples("test")
    many = Examples(x.repeat(60, 1, 1, 1), y.repeat(60))
    here = training.evaluate(model, many, LOSS)
    with away:
        assert training.evaluate(placement.moved(model, torch.device("meta")), many, LOSS) == here
    assert away.waits == {"_to_copy": 1}


def weighing(outputs: Tensor, y: Tensor) -> Tensor:
    return LOSS(outputs, y, weight=torch.tensor([1.0, 5.0, 2.0]))


def test_a_loss_that_stays_on_the_processor_is_refused_before_anyone_trains(tmp_path: Path, away: Any) -> None:
    node = made_node(tmp_path, "chain", "", weighing)
    with away, pytest.raises(Refused, match="loss of scenario made does not work on meta"):
        placement.try_out(node.scenario, node.settings, examples("validation"))
    node = made_node(tmp_path, "chain", "")
    with away:
        placement.try_out(node.scenario, node.settings, examples("validation"))


def test_what_lies_on_two_devices_or_is_of_two_types_is_refused() -> None:
    made, start = stack.read(chain()), torch.from_numpy(flatten(chain()))
    assert made is not None
    trainer = fused.Trainer(convolutions(), fused.Pulls(0.1))
    x, y = examples("a")
    flat = torch.from_numpy(flatten(convolutions()))

    def by_gram(x: Tensor, y: Tensor) -> object:
        return gram.train(made, start, gram.Batches(x[None], y[None], None, (3,), 8), LOSS, fused.Pulls(0.1))

    def by_rows(x: Tensor, y: Tensor) -> object:
        client = private_stack.Private(x, y, 1, Mechanism(0.5, 1.0), torch.Generator(), torch.Generator())
        return private_stack.train(made, start, [client], LOSS, fused.Pulls(0.1), 1.0)

    def by_fused(x: Tensor, y: Tensor) -> object:
        return trainer.train(flat, x, y, [torch.arange(8)], LOSS)

    for way in (by_gram, by_rows, by_fused):
        way(x, y)
        with pytest.raises(Refused, match="examples on meta and weights on cpu do not go together"):
            way(x.to("meta"), y)
        with pytest.raises(Refused, match="labels on meta and weights on cpu do not go together"):
            way(x, y.to("meta"))
        with pytest.raises(Refused, match=r"examples of torch\.float64 and weights"):
            way(x.double(), y)
    with pytest.raises(Refused, match="a model on cpu and weights on meta do not go together"):
        trainer.train(flat.to("meta"), x.to("meta"), y.to("meta"), [], LOSS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match=r"local.device=cuda needs an NVIDIA GPU, .* here: set local.device=cpu$"):
        placement.check(override(Settings(), "local.device=cuda"))


@pytest.mark.parametrize(
    ("words", "runtime", "line"),
    [
        ("", "simulation", "local.device=cuda is for the embedded runtime, .*, not for simulation"),
        ("run.processes=2", "embedded", "trains in one process, not in run.processes=2: set run.processes=1"),
        ("local.precision=bf16", "embedded", "needs a GPU that has it, Old GPU has not"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, words: str, runtime: str, line: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    placement.check(override(Settings(), "local.device=cuda"))
    with pytest.raises(Refused, match=line):
        placement.check(override(Settings(), f"local.engine=cohort local.device=cuda {words}"), runtime)


def test_a_gpu_trains_in_one_process_however_many_cores_there_are() -> None:
    assert placement.processes(override(Settings(), "local.engine=cohort local.device=cuda")) == 1


@pytest.mark.parametrize("engine", ["single", "cohort"])
def test_a_gpu_that_fails_ends_the_run_and_is_no_clients_fault(tmp_path: Path, engine: str) -> None:
    def failing(outputs: Tensor, y: Tensor) -> Tensor:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore lines")

    node = made_node(tmp_path, "chain", f"local.batch=8 local.engine={engine} run.processes=1")
    tasks = made_tasks(node)
    assert node.apart
    broken = Node(replace(node.scenario, loss=failing), node.settings, node.federation, tmp_path)
    broken.__dict__["apart"] = True
    with pytest.raises(Refused, match=r"the GPU failed \(CUDA error: device-side assert triggered\), .*`umbel resume`"):
        list(EmbeddedFleet(broken).ask(tasks))


@pytest.mark.parametrize("clip", [1e-3, 1.0, 1e6])
def test_what_is_clipped_on_a_device_is_what_the_processor_clips(clip: float) -> None:
    random = np.random.default_rng(0)
    for scale in (0.0, 1e-30, 1e-3, 1.0, 1e3, 1e30):
        update = (random.standard_normal(1000) * scale).astype(np.float32)
        found, within = on_device.clipped(torch.from_numpy(update), clip)
        truth, short = cohort_noise.clipped(update, clip)
        assert np.linalg.norm(found.double().numpy()) <= clip
        assert np.allclose(found.numpy(), truth, rtol=1e-6, atol=0)
        assert bool(within) == short
    for wrong in (np.nan, np.inf):
        update[7] = wrong
        found, within = on_device.clipped(torch.from_numpy(update), clip)
        assert not found.any()
        assert within


def test_a_gpus_generator_has_its_state_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.stack([on_device.philox_state() for _ in range(400)])
    assert states.shape == (400, 16)
    assert states.dtype == torch.uint8
    assert states.unique(dim=0).shape == states.shape
    bits = (states[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).double().mean(0).flatten()
    free = torch.ones(128, dtype=torch.bool)
    free[[64, 65, 126, 127]] = False  # the offset is a multiple of 4, and below 2^62
    assert not bits[~free].any()
    assert ((bits[free] - 0.5).abs() < 6 * 0.5 / 400**0.5).all()
    monkeypatch.setattr(on_device.os, "urandom", lambda count: bytes(range(1, count + 1)))
    assert on_device.philox_state().tolist()[:8] == list(range(1, 9))


@contextmanager
def impatient(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """What waits for the GPU raises, but for the one place that may."""

    def fetched(tensor: Tensor) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return right(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    right = placement.fetched
    torch.zeros(1, device="cuda")
    patch.setattr(placement, "fetched", fetched)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@needs_gpu
@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_gives_every_client_the_processors_update_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    for way, words in WAYS.items():
        nodes = (made_node(tmp_path / way / one, model, f"{words} local.device={one}") for one in ("cpu", "cuda"))
        here, there = nodes
        assert there.apart
        with impatient(monkeypatch):
            found = cohort.answer(there, made_tasks(here))
        if model != "forgetful":  # its dropout draws by the GPU's own generator
            assert off(payloads(found), payloads(cohort.answer(here, made_tasks(here)))) < 1e-3


@needs_gpu
def test_a_gpu_draws_noise_of_the_deviation_that_is_charged_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs * 0).sum(1).mean()

    words = "local.batch=8 privacy.unit=example privacy.clip=0.5 local.device=cuda"
    node = made_node(tmp_path, "chain", words, flat)
    assert node.apart
    tasks = under_dp(node)
    with impatient(monkeypatch):
        replies = cohort.answer(node, tasks)
    for task, sent in zip(tasks, payloads(replies), strict=True):
        deviation = 1.3 * 0.5 * 0.1 * task.steps**0.5 / (0.4 * SIZES[task.client])
        assert abs(sent.std() / deviation - 1) < 4 / (2 * sent.size) ** 0.5
        assert len(np.unique(sent)) > 0.99 * sent.size
