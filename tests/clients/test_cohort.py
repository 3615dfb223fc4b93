"""Blocks of clients against clients one by one: the same updates for every model and every way to train."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients import cohort, fused, gram, private_stack, sgd, stack
from clients.task import Reply, Task
from clients.training import Node, answer
from clients.ways import Ways
from privacy import dp_sgd
from privacy.key_stream import KeyStream
from privacy.plan import Mechanism
from scenarios import Examples, Federation, Scenario, build_model
from scenarios.settings import Settings, override
from scenarios.weights import Vector, flatten, layout

LOSS = nn.functional.cross_entropy
SIZES = {"a": 24, "b": 7, "c": 31, "d": 16, "e": 20}
BF16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a processor with bf16")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x.flatten(1).view(len(x), 8, 8))[0][:, -1])


class Branching(nn.Module):
    """What it computes depends on the batch, one of its layers may not be used, and another is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.rare, self.last = (nn.Linear(*s) for s in ((64, 8), (8, 8), (8, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x.flatten(1))))))
        return self.last(self.rare(h) if float(h.detach().mean()) > 0 else h)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    model[1].requires_grad_(False)
    return model


def reused() -> nn.Module:
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(8, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    "relu": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)
    ),
    "nested without bias": lambda: nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(64, 30, bias=False), nn.Tanh(), nn.Identity()), nn.Linear(30, 3)
    ),
    "functions": lambda: nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Hardtanh()),
        nn.Linear(64, 20),
        nn.GELU(),
        nn.Softplus(),
        nn.Linear(20, 3),
        nn.Tanh(),
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    ),
    "batch norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Dropout(0.3), nn.ReLU(), nn.Linear(9, 3)),
    "recurrent": Recurrent,
    "branching": Branching,
    "frozen": frozen,
    "reused": reused,
}
STACKS = ["linear", "relu", "nested without bias", "functions"]
WAYS = {
    "epochs": "local.batch=8 local.epochs=3",
    "one batch": "local.batch=0 local.steps=3",
    "steps": "local.batch=7 local.steps=9",
    "proximal": "local.batch=8 local.epochs=2 local.proximal=0.5",
    "weight decay": "local.batch=8 local.epochs=2 local.weight_decay=0.3",
    "both pulls": "local.batch=8 local.epochs=2 local.proximal=0.4 local.weight_decay=0.3",
    "momentum": "local.batch=8 local.epochs=2 local.momentum=0.9",
    "momentum and pulls": "local.batch=8 local.epochs=2 local.momentum=0.9 local.proximal=0.4 local.weight_decay=0.3",
}
"""Clients of different sizes take different steps, in batches that differ, in all of them but one."""


def examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 40), 1, 8, 8, generator=generator)
    return Examples(x, (x[:, 0, 0, 0] > 0).long() + (x[:, 0, 1, 1] > 0.5).long())


def made_node(folder: Path, model: str, text: str, loss: Callable[[Tensor, Tensor], Tensor] = LOSS) -> Node:
    federation = Federation(SIZES, examples, examples("validation"), examples("test"))
    scenario = Scenario("made", Settings(), {"net": MODELS[model]}, lambda _: federation, loss, name="made")
    return Node(scenario, override(Settings(), f"local.engine=cohort {text}"), federation, folder)


def made_tasks(node: Node, **changes: object) -> list[Task]:
    model, local = build_model(node.scenario, node.settings), node.settings.local

    def steps(size: int) -> int:
        return local.steps or local.epochs * -(-size // (local.batch or size))

    weights, shapes = flatten(model), layout(model)
    tasks = [Task("train", 1, name, weights, shapes, rate=0.1, steps=steps(size)) for name, size in SIZES.items()]
    return [replace(task, **changes) for task in tasks]  # type: ignore[arg-type]


def decoded(replies: Sequence[Reply]) -> list[Vector]:
    assert [reply.reason for reply in replies] == [""] * len(SIZES)
    return [np.frombuffer(reply.payload, "<f4") for reply in replies]


def apart(found: Sequence[Vector], truth: Sequence[Vector]) -> float:
    """The largest difference, in units of the largest entry."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_a_block_gives_every_client_the_update_that_it_has_by_itself(tmp_path: Path, model: str, way: str) -> None:
    node = made_node(tmp_path, model, WAYS[way])
    tasks = made_tasks(node)
    replies = cohort.answer(node, tasks)
    assert apart(decoded(replies), decoded([answer(node, task) for task in tasks])) < 2e-5
    assert [(r.client, r.steps, r.examples) for r in replies] == [(t.client, t.steps, SIZES[t.client]) for t in tasks]


def ways(replies: Sequence[Reply]) -> dict[str, str]:
    return {reply.client: "" if reply.way is None else reply.way.name for reply in replies}


SMALL, MANY = dict.fromkeys(SIZES, "gram"), dict.fromkeys(SIZES, "fused")
TRAINED = {
    "relu": ("local.batch=8", {}, SMALL, ""),
    "linear": ("local.batch=0 local.steps=1", {"deadline": 60.0}, dict.fromkeys(SIZES, "single"), "wall clock"),
    "functions": ("local.scaffold=true", {}, MANY, "local.scaffold"),
    "nested without bias": ("local.batch=0 local.steps=4", {}, MANY | {"b": "gram"}, "more than 63 ex"),
    "convolutions": ("", {}, MANY, "layer '0' (Conv2d)"),
    "batch norm": ("", {}, MANY, "layer '2' (BatchNorm1d)"),
    "branching": ("", {}, MANY, "a Branching is no chain"),
    "reused": ("", {}, MANY, "used twice"),
    "frozen": ("", {}, MANY, "frozen"),
}
"""By model: settings, what is in the tasks, how each client is trained, and what is said of those who share no pass."""


@pytest.mark.parametrize("model", TRAINED)
@pytest.mark.parametrize("weigh", [None, float])
def test_a_reply_says_how_its_client_was_trained_and_why(
    tmp_path: Path, model: str, weigh: Callable[[int], float] | None
) -> None:
    text, changes, expected, why = TRAINED[model]
    node = made_node(tmp_path, model, text)
    control = np.zeros(len(flatten(node.template)), np.float32) if node.settings.local.scaffold else None
    replies = cohort.answer(node, made_tasks(node, control=control, **changes), weigh)
    assert ways(replies) == expected
    assert {reply.way.why for reply in replies if reply.way and reply.way.name != "gram"} != {""}
    assert all(why in reply.way.why for reply in replies if reply.way and reply.way.name != "gram")


@pytest.mark.parametrize(("model", "way"), [("relu", "rows"), ("convolutions", "single")])
def test_a_reply_under_dp_says_how_its_client_was_trained(tmp_path: Path, model: str, way: str) -> None:
    node = made_node(tmp_path, model, "local.batch=0 privacy.unit=example privacy.clip=0.5")
    replies = cohort.answer(node, made_tasks(node, mechanism=Mechanism(1.0, 1.0), clip=0.5, steps=1))
    assert ways(replies) == dict.fromkeys(SIZES, way)


def test_clients_of_a_pass_that_failed_say_so_and_who_failed_says_nothing(tmp_path: Path) -> None:
    def data(name: str) -> Examples:
        x, y = examples(name)
        return Examples(x, y + 9 if name == "c" else y)

    node = made_node(tmp_path, "relu", "local.batch=0 local.steps=1")
    broken = replace(node, federation=replace(node.federation, client=data))
    found = {reply.client: reply.way for reply in cohort.answer(broken, made_tasks(node), float)}
    assert found["c"] is None
    assert found["a"] is not None
    assert (found["a"].name, found["a"].why) == ("fused", "a client beside it failed")


@BF16
def test_a_reply_says_which_precision_its_client_was_trained_in(tmp_path: Path) -> None:
    for model, precision in (("convolutions", "bf16"), ("relu", "float32")):
        node = made_node(tmp_path / model, model, "local.precision=bf16")
        replies = cohort.answer(node, made_tasks(node))
        assert {reply.way.precision for reply in replies if reply.way} == {precision}


def test_a_device_without_bf16_trains_in_no_other_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = made_node(tmp_path, "convolutions", "local.precision=bf16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert {reply.reason for reply in cohort.answer(node, made_tasks(node))} == {
        "local.precision=bf16 needs a processor with bf16 (AVX-512): this one has float32 alone"
    }


@pytest.mark.parametrize("model", ["relu", "convolutions", "recurrent"])
def test_a_blocks_sum_is_the_weighted_sum_of_its_updates(tmp_path: Path, model: str) -> None:
    node = made_node(tmp_path, model, WAYS["epochs"])
    tasks = made_tasks(node)
    *others, last = cohort.answer(node, tasks, lambda count: count / 10)
    assert last.summand is not None
    assert last.summand.total is not None
    assert all(reply.summand is not None and reply.summand.total is None for reply in others)
    single = decoded([answer(node, task) for task in tasks])
    truth = sum(size / 10 * update.astype(float) for size, update in zip(SIZES.values(), single, strict=True))
    assert apart([last.summand.total], [truth]) < 2e-5
    assert last.summand.whole == pytest.approx(sum(SIZES.values()) / 10)


def test_who_fails_is_named_and_not_in_the_sum(tmp_path: Path) -> None:
    def data(name: str) -> Examples:
        if name == "e":
            raise OSError("the disk of e")
        return examples(name)

    node = made_node(tmp_path, "relu", WAYS["epochs"])
    broken = replace(node, federation=replace(node.federation, client=data))
    *good, bad = cohort.answer(broken, made_tasks(node), float)
    assert (bad.reason, bad.summand) == ("failed with OSError", None)
    assert good[-1].summand is not None
    assert good[-1].summand.whole == sum(SIZES.values()) - SIZES["e"]


def test_an_update_that_is_not_finite_costs_its_own_client_alone(tmp_path: Path) -> None:
    def data(name: str) -> Examples:
        x, y = examples(name)
        return Examples(x * torch.inf if name == "c" else x, y)

    node = made_node(tmp_path, "relu", WAYS["epochs"])
    broken = replace(node, federation=replace(node.federation, client=data))
    replies = cohort.answer(broken, made_tasks(node), float)
    assert [reply.client for reply in replies if "finite" in reply.reason] == ["c"]
    summand = replies[-1].summand
    assert summand is not None
    assert summand.total is not None
    assert np.isfinite(summand.total).all()
    assert summand.whole == sum(SIZES.values()) - SIZES["c"]


def test_a_client_whose_batches_the_model_cannot_take_costs_itself_alone(tmp_path: Path) -> None:
    node = made_node(tmp_path, "batch norm", "local.batch=6")  # b's second batch has one example
    replies = cohort.answer(node, made_tasks(node))
    assert {reply.client: reply.reason for reply in replies if reply.reason} == {
        name: "failed with ValueError" for name, size in SIZES.items() if size % 6 == 1
    }


def test_a_client_whose_labels_do_not_exist_costs_itself_alone(tmp_path: Path) -> None:
    def data(name: str) -> Examples:
        x, y = examples(name)
        return Examples(x, y + 9 if name == "c" else y)

    node = made_node(tmp_path, "relu", WAYS["epochs"])
    broken = replace(node, federation=replace(node.federation, client=data))
    replies = cohort.answer(broken, made_tasks(node), float)
    assert [(reply.client, reply.reason) for reply in replies if reply.reason] == [("c", "failed with IndexError")]


def test_updates_are_clipped_before_they_are_summed(tmp_path: Path) -> None:
    node = made_node(tmp_path, "relu", f"{WAYS['epochs']} privacy.unit=client privacy.clip=0.01")
    replies = cohort.answer(node, made_tasks(node, update_clip=0.01), lambda _: 1.0)
    assert not any(reply.within for reply in replies)
    summand = replies[-1].summand
    assert summand is not None
    assert summand.total is not None
    assert np.linalg.norm(summand.total) <= 0.01 * len(SIZES)


def test_a_loss_that_weighs_examples_against_each_other_is_not_taken_apart(tmp_path: Path) -> None:
    def weighted(outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y, weight=torch.tensor([1.0, 5.0, 2.0]))

    node = made_node(tmp_path, "relu", WAYS["epochs"], weighted)
    tasks = made_tasks(node)
    assert not node.apart
    assert apart(decoded(cohort.answer(node, tasks)), decoded([answer(node, task) for task in tasks])) < 2e-5


@pytest.mark.parametrize("pulls", ["", "local.momentum=0.9", "local.momentum=0.9 local.proximal=0.4"])
@pytest.mark.parametrize("model", ["relu", "nested without bias", "convolutions"])
def test_under_example_level_dp_a_block_draws_the_same_samples_and_noise_and_clips_alike(
    tmp_path: Path, model: str, pulls: str
) -> None:
    text = f"local.batch=8 local.steps=6 privacy.unit=example privacy.clip=0.5 privacy.noise_seed=3 {pulls}"
    node = made_node(tmp_path, model, text)
    tasks = [
        replace(
            task,
            steps=3 + SIZES[task.client] % 4,
            mechanism=Mechanism(8 / SIZES[task.client] if SIZES[task.client] > 8 else 1.0, 1.3),
            clip=0.5,
        )
        for task in made_tasks(node)
    ]
    assert apart(decoded(cohort.answer(node, tasks)), decoded([answer(node, task) for task in tasks])) < 2e-5


@pytest.mark.parametrize("model", STACKS)
def test_clipped_sums_are_those_of_opacus(model: str) -> None:
    torch.manual_seed(0)
    net, (x, y) = MODELS[model](), examples("c")
    chain = stack.read(net)
    assert chain is not None
    flat = torch.from_numpy(flatten(net))
    layers = private_stack.weights(chain, [flat])
    for clip in (0.05, 1.0, 50.0):
        rows = private_stack.clipped(chain, layers, chain.functions[0](x), y, [len(y)], LOSS, clip)
        truth = dp_sgd.PrivateGradient(net, LOSS, Mechanism(1.0, 0.0), clip, torch.Generator())
        next(truth.batches(len(y), 1))
        truth.step(x, y)
        made = [d.T @ a for d, a in rows]
        expected = [
            m.weight.grad * len(y) for m in net.modules() if isinstance(m, nn.Linear) and m.weight.grad is not None
        ]
        truth.close()
        for one, other in zip(made, expected, strict=True):
            assert float((one - other).abs().max()) <= 1e-6 * max(1.0, float(other.abs().max()))


def test_an_example_whose_gradient_is_not_finite_counts_as_zero_in_a_clipped_sum() -> None:
    net, (x, y) = MODELS["relu"](), examples("c")
    chain = stack.read(net)
    assert chain is not None
    layers, rest = private_stack.weights(chain, [torch.from_numpy(flatten(net))]), len(y) - 1
    x = chain.functions[0](x.clone())
    without = private_stack.clipped(chain, layers, x[1:], y[1:], [rest], LOSS, 1.0)
    x[0] = torch.nan
    made = private_stack.clipped(chain, layers, x, y, [rest + 1], LOSS, 1.0)
    for (d, a), (d_1, a_1) in zip(made, without, strict=True):
        assert torch.allclose(d.T @ a, d_1.T @ a_1, atol=1e-6)


Source = Callable[[], dp_sgd.Source]


def noise(multiplier: float, source: Source) -> Tensor:
    """20 draws of the noise of 3 steps, in units of what multiplier 1 makes of it: the gradient is zero throughout."""
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    chain = stack.read(net)
    assert chain is not None
    start, x, y = torch.zeros(chain.size), torch.zeros(10, 20), torch.zeros(10, dtype=torch.long)

    def flat(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs * 0).sum(1).mean()

    mechanism, pulls = Mechanism(0.5, multiplier), fused.Pulls(0.1)
    clients = [private_stack.Private(x, y, 3, mechanism, source(), dp_sgd.noise_generator(None)) for _ in range(20)]
    drawn = private_stack.train(chain, start, clients, flat, pulls, 2.0)
    return torch.cat(drawn) / (0.1 * 2.0 / 5 * 3**0.5)


@pytest.mark.parametrize("source", [KeyStream, lambda: dp_sgd.noise_generator(None)], ids=["key stream", "torch"])
def test_the_noise_of_a_block_has_the_deviation_that_is_charged(source: Source) -> None:
    drawn = noise(1.4, source).double()
    assert len(drawn) > 14_000
    spread = float(drawn.square().mean().sqrt()) / 1.4
    assert abs(spread - 1) < 4 / (2 * len(drawn)) ** 0.5
    assert not abs(spread * 1.05 - 1) < 4 / (2 * len(drawn)) ** 0.5
    assert len(drawn.unique()) > 0.99 * len(drawn)


Kernel = Callable[[Tensor, list[Examples], list[list[Tensor]]], list[Tensor]]


def one_by_one(model: nn.Module, text: str, start: Tensor, data: Examples, name: str) -> Tensor:
    """The update by clients/sgd.py, in float64."""
    settings = override(Settings(), text)
    task = Task("train", 1, name, flatten(model), layout(model), rate=0.1, steps=6)
    twin = MODELS["relu"]().double()
    nn.utils.vector_to_parameters(start.clone(), twin.parameters())
    sgd.train(twin, data, LOSS, task, settings.local, settings)
    return nn.utils.parameters_to_vector(twin.parameters()).detach() - start


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kernel", ["gram", "fused"])
def test_in_float64_a_whole_run_differs_by_less_than_a_billionth(kernel: str, momentum: float) -> None:
    text = f"local.batch=5 local.proximal=0.3 local.weight_decay=0.1 local.momentum={momentum}"
    settings, model = override(Settings(), text), MODELS["relu"]()
    chain, pulls = stack.read(model), fused.Pulls.of(0.1, 0.3, 0.1, momentum)
    assert chain is not None
    data = {name: Examples(examples(name).x.double(), examples(name).y) for name in ("a", "c", "d", "e")}
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().double()
    truth = weights.clone()
    for _ in range(12):
        truth = truth + sum(one_by_one(model, text, truth, data[name], name) for name in data) / len(data)
        batches = {}
        for name in data:
            task = Task("train", 1, name, flatten(model), layout(model), rate=0.1, steps=6)
            batches[name] = list(sgd.shuffled(len(data[name].y), task, settings))
        if kernel == "fused":
            trainer = fused.Trainer(MODELS["relu"]().double(), pulls)
            updates = [trainer.train(weights, *data[name], batches[name], LOSS)[0].clone() for name in data]
            weights = weights + sum(updates) / len(updates)
        else:
            made = gram.train(chain, weights, padded(data, batches), LOSS, pulls)
            weights = weights + made.total([1 / len(data)] * len(data))
    assert float((weights - truth).abs().max()) <= 1e-9 * float(truth.abs().max())


def padded(data: dict[str, Examples], batches: dict[str, list[Tensor]]) -> gram.Batches:
    """Batches of at most 5 in 6 steps, filled up with rows that would show."""
    x, y, live = (
        torch.full((len(data), 30, 1, 8, 8), 7.0).double(),
        torch.zeros(len(data), 30).long(),
        torch.zeros(len(data), 6, 5),
    )
    for k, name in enumerate(data):
        for t, batch in enumerate(batches[name]):
            x[k, 5 * t : 5 * t + len(batch)] = data[name].x[batch]
            y[k, 5 * t : 5 * t + len(batch)] = data[name].y[batch]
            live[k, t, : len(batch)] = 1
    return gram.Batches(x, y, live.bool(), (6,) * len(data), 5)


@pytest.mark.parametrize(("model", "whole"), [(name, name in STACKS) for name in MODELS])
def test_a_stack_is_what_is_nothing_but_linear_layers_and_functions(model: str, whole: bool) -> None:
    assert (stack.read(MODELS[model]()) is not None) == whole


def test_a_layer_with_a_hook_is_left_alone() -> None:
    model = MODELS["relu"]()
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    assert stack.read(model) is None
    assert model[1] not in stack.linear(model)


@pytest.mark.parametrize("count", [1, 2, 3, 25, 26, 49, 50, 51, 100, 1000])
def test_blocks_of_open_size_are_even_in_number_and_size(count: int) -> None:
    tasks = [Task("train", 1, f"{i:04}", np.zeros(0, np.float32), ()) for i in range(count)]
    blocks = cohort.cut(tasks, 0)
    sizes = [len(block) for block in blocks]
    assert [task for block in blocks for task in block] == tasks
    assert len(blocks) % 2 == 0 or count == 1
    assert max(sizes) <= 25
    assert max(sizes) - min(sizes) <= 1


def test_blocks_of_a_given_size_leave_the_rest_to_the_last() -> None:
    tasks = [Task("train", 1, f"{i:04}", np.zeros(0, np.float32), ()) for i in range(10)]
    assert [len(block) for block in cohort.cut(tasks, 4)] == [4, 4, 2]


@BF16
def test_bf16_computes_in_bf16_and_keeps_weights_in_float32(tmp_path: Path) -> None:
    exact, rough = (
        made_node(tmp_path, "convolutions", f"{WAYS['epochs']} local.precision={p}") for p in ("float32", "bf16")
    )
    tasks = made_tasks(exact)
    difference = apart(decoded(cohort.answer(rough, tasks)), decoded(cohort.answer(exact, tasks)))
    assert 1e-5 < difference < 0.3


def test_a_relu_in_front_of_a_pooling_of_maxima_acts_behind_it_with_the_same_bits() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2, padding=1), nn.Flatten(), nn.Linear(64, 3))
    heard = copy.deepcopy(net)
    heard[1].register_forward_hook(lambda *_: None)  # so it stays where it is
    start, (x, y) = torch.from_numpy(flatten(net)), examples("a")
    batches = [torch.arange(0, 12), torch.arange(12, 24)]
    swapped, plain = (fused.Trainer(one, fused.Pulls(0.1)) for one in (net, heard))
    assert [type(part) for part in swapped.model.children()][1:3] == [nn.MaxPool2d, nn.ReLU]
    assert [type(part) for part in plain.model.children()][1:3] == [nn.ReLU, nn.MaxPool2d]
    assert torch.equal(swapped.train(start, x, y, batches, LOSS)[0], plain.train(start, x, y, batches, LOSS)[0])


def test_a_weight_that_outgrows_the_cache_takes_the_same_step() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9000), nn.Tanh(), nn.Linear(9000, 3))
    start, (x, y) = torch.from_numpy(flatten(net)), examples("a")
    update, _ = fused.Trainer(copy.deepcopy(net), fused.Pulls(0.1)).train(start, x, y, [torch.arange(24)], LOSS)
    LOSS(net(x), y).backward()
    truth = torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None]) * -0.1
    assert net[1].weight.numel() >= fused.OUTGROWN
    assert torch.allclose(update, truth, atol=1e-6)


@pytest.mark.parametrize("text", ["privacy.unit=none", "privacy.unit=example privacy.clip=0.5 privacy.noise_seed=3"])
def test_a_layer_that_sees_an_example_as_several_rows_shares_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    sequence = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    monkeypatch.setitem(MODELS, "sequence", lambda: copy.deepcopy(sequence))
    node = made_node(tmp_path, "sequence", f"local.batch=8 {text}")
    assert "several rows" in Ways.of(node, sequence).obstacle
    private = {"mechanism": Mechanism(0.5, 1.3), "clip": 0.5} if "example" in text else {}
    tasks = [replace(task, **private) for task in made_tasks(node)]
    assert apart(decoded(cohort.answer(node, tasks)), decoded([answer(node, task) for task in tasks])) < 2e-5
