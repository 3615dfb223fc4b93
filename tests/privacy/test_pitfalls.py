"""What goes wrong with Opacus in federated use, shown in the library itself, and that Umbel does not have it.

Each fact was measured with Opacus 1.6.0 and torch 2.13; docs/pitfalls.md says which test holds which.
"""

import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant
from opacus.accountants.analysis import gdp
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clients.sgd import train
from clients.steps import local_steps, sampling_rate
from clients.task import Task
from clients.training import Node, answer
from privacy import accounting, cohort_noise, dp_sgd, fourier
from privacy.certificate import certify
from privacy.dp_sgd import PrivateGradient, check, noise_generator
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario, build_model
from scenarios.seeds import derive
from scenarios.settings import Local, Settings, override
from scenarios.weights import flatten, layout

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for name in ("clients", "edge_export", "privacy", "scenarios", "server") for path in ROOT.glob(name + "/*.py")
]
LOSS = nn.functional.cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore")  # Opacus and torch warn of much that is shown here on purpose


def examples(size: int, seed: int = 0, width: int = 6) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(torch.randn(size, width, generator=generator), torch.randint(0, 3, (size,), generator=generator))


def net(width: int = 6, hidden: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 3))


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).clone()


def opacus_engine(engine: PrivacyEngine, data: Examples, batch: int, noise: float = 1.0, poisson: bool = True):  # type: ignore[no-untyped-def]
    """Opacus as its examples use it: (model, optimizer, loader)."""
    model = net()
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*data), batch_size=batch),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        poisson_sampling=poisson,
    )


def one_epoch(engine: PrivacyEngine, data: Examples, batch: int) -> nn.Module:
    model, optimizer, loader = opacus_engine(engine, data, batch)
    for x, y in loader:
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    return model


# 1. A privacy engine that is made anew in every round reports the price of one round (2.793 where 9.670 is true).


def test_an_account_adds_up_over_rounds_and_restarts_where_a_new_engine_a_round_forgets(tmp_path: Path) -> None:
    rounds, delta = 6, 1e-3
    for _ in range(rounds):
        engine = PrivacyEngine(accountant="rdp")
        one_epoch(engine, examples(40), 8)
    forgetful = engine.get_epsilon(delta)

    account, mechanism = Account("example", "a", "made"), Mechanism(0.2, 1.0)
    for number in range(1, rounds + 1):
        ledger = Ledger(tmp_path / "ledger")  # a process of its own a round
        ledger.open({account: (None, delta)})
        ledger.reserve("run", number, {account: (mechanism, 5)})
        ledger.commit("run", number, {account: 5})
    last = Ledger(tmp_path / "ledger")
    last.read()
    assert last.accounts[account].history == {mechanism: 5 * rounds}
    spent, interval = last.accounts[account].epsilon, dp_sgd.epsilon_prv({mechanism: 5 * rounds}, delta)
    assert interval is not None
    assert interval[0] <= spent <= interval[1]
    assert spent > 1.5 * forgetful


# 2. Rate and batch from the loader's length: 1 / ceil(n / B), expected batch int(n / ceil(n / B)), int(1 / q) steps.


@pytest.mark.parametrize("size", [49, 98, 103])
def test_batches_of_one_example_train_where_the_engines_expected_batch_rounds_to_zero(size: int) -> None:
    broken = one_epoch(PrivacyEngine(), examples(size), 1)
    assert not all(torch.isfinite(p).all() for p in broken.parameters())

    local, data, model = Local(batch=1), examples(size), net()
    rate = sampling_rate(local, size)
    task = Task("train", 1, "a", flatten(model), layout(model), 0.1, 20, mechanism=Mechanism(rate, 1.0), clip=1.0)
    assert rate == 1 / size
    assert train(model, data, LOSS, task, local, Settings()) == 20
    assert np.isfinite(flatten(model)).all()


def test_an_example_is_drawn_with_the_chance_that_is_accounted_where_the_engine_halves_it() -> None:
    engine = PrivacyEngine(accountant="rdp")
    one_epoch(engine, examples(65), 64)
    assert engine.accountant.history[0][1] == 0.5
    assert sampling_rate(Local(batch=64), 65) == 64 / 65
    private = PrivateGradient(net(), LOSS, Mechanism(64 / 65, 1.0), 1.0, noise_generator(1))
    drawn = sum(len(batch) for batch in private.batches(65, 400)) / (65 * 400)
    assert abs(drawn - 64 / 65) < 0.01


@pytest.mark.parametrize("size", [93, 99, 105])
def test_an_epoch_has_as_many_steps_as_the_rate_says_where_opacus_is_one_short(size: int) -> None:
    _, _, loader = opacus_engine(PrivacyEngine(), examples(size), 1)
    assert len(loader) == size - 1
    assert local_steps(Local(batch=1), size, private=True) == size


# 3. Empty batches: a third of all at n = 4, B = 1. Expanded weights and adaptive clipping crash on them.


def test_every_empty_sample_is_noised_and_counted_where_adaptive_clipping_of_opacus_crashes() -> None:
    data, model = examples(4), net()
    wrapped = GradSampleModule(model)
    adaptive = AdaClipDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        expected_batch_size=1,
        max_grad_norm=1.0,
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=10.0,
        min_clipbound=0.1,
        unclipped_num_std=1.0,
    )
    LOSS(wrapped(data.x[:0]), data.y[:0]).backward()
    with pytest.raises(RuntimeError):
        adaptive.step()

    model = net()
    private = PrivateGradient(model, LOSS, Mechanism(0.25, 1.0), 1.0, noise_generator(None))
    empty, found = 0, set()
    for batch in private.batches(4, 180):
        private.step(data.x[batch], data.y[batch])
        empty += not batch
        found.add(gradient(model).numpy().tobytes())
        assert torch.isfinite(gradient(model)).all()
    assert abs(empty - 180 * 0.75**4) < 5 * math.sqrt(180 * 0.75**4 * (1 - 0.75**4))
    assert len(found) == 180
    assert local_steps(Local(batch=1, epochs=45), 4, private=True) == 180


# 4. Terms of the loss outside layers are lost: the optimizer overwrites `parameter.grad` (FedProx: 1.90 for 0.20).


def trained(proximal: float, noise: float, clip: float, steps: int) -> Tensor:
    settings = override(Settings(), f"local.proximal={proximal} privacy.noise_seed=1")
    model = net()
    start, mechanism = flatten(model), Mechanism(1.0, noise)
    task = Task("train", 1, "a", start, layout(model), 0.2, steps, mechanism=mechanism, clip=clip)
    train(model, examples(30), LOSS, task, settings.local, settings)
    return torch.from_numpy(flatten(model) - start)


def test_the_pull_of_fedprox_is_whole_under_clip_and_noise_where_opacus_drops_it_from_the_loss() -> None:
    data, found = examples(30), []
    for mu in (0.0, 5.0):
        model = net()
        far = [p.detach() - 1 for p in model.parameters()]
        wrapped = GradSampleModule(model)
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=1e6, expected_batch_size=30
        )
        pull = sum(((p - f) ** 2).sum() for p, f in zip(model.parameters(), far, strict=True)) * mu / 2
        (LOSS(wrapped(data.x), data.y) + pull).backward()
        optimizer.pre_step()
        found.append(gradient(model))
    assert torch.allclose(found[0], found[1], atol=1e-6)  # mu changed nothing

    # In Umbel the second step differs by exactly rate * mu * (what the first step moved): neither clipped nor noised.
    moved = trained(5.0, 2.0, 0.01, 1)
    difference = trained(5.0, 2.0, 0.01, 2) - trained(0.0, 2.0, 0.01, 2)
    assert torch.equal(moved, trained(0.0, 2.0, 0.01, 1))
    assert torch.allclose(difference, -0.2 * 5.0 * moved, atol=1e-6)
    assert float(difference.norm()) > 10 * 0.2 * 0.01 / 30  # more than a clipped sum could have moved


class Failing(nn.Module):
    """Passes its input on, but not the third."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return x


# 5. A step that is cut off between the parts of a large batch stays in the sum: sensitivity 2C, accounted as C.


def test_a_step_that_was_cut_off_adds_nothing_to_the_next_where_opacus_counts_it_again() -> None:
    data = examples(32)
    model, optimizer, loader = opacus_engine(PrivacyEngine(), data, 32, noise=0.0)
    sums = []
    for cut in (True, False):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=8, optimizer=optimizer) as parts:
            for x, y in parts:
                optimizer.zero_grad()
                LOSS(model(x), y).backward()
                if not optimizer.pre_step() and cut:
                    break  # a deadline, say
        sums.append(gradient(model))
    clean, optimizer, _ = opacus_engine(PrivacyEngine(), data, 32, noise=0.0)
    LOSS(clean(data.x), data.y).backward()
    optimizer.pre_step()
    assert float((sums[1] - gradient(clean)).norm()) * 32 > 1.5  # in units of C

    # Umbel, cut off after two parts of a step: the next step is what it would have been.
    private = PrivateGradient(nn.Sequential(Failing(), *net()), LOSS, Mechanism(1.0, 0.0), 1.0, noise_generator(1))
    private._chunk = 8
    private.batches(32, 2)
    with pytest.raises(KeyboardInterrupt):
        private.step(*data)
    private.step(data.x[:20], data.y[:20])
    model = net()
    undisturbed = PrivateGradient(model, LOSS, Mechanism(1.0, 0.0), 1.0, noise_generator(1))
    undisturbed.batches(32, 1)
    undisturbed.step(data.x[:20], data.y[:20])
    assert float((gradient(private._model) - gradient(model)).norm()) * 32 < 1e-4


# 6. Shuffled batches are accounted as Poisson samples all the same.


def test_every_batch_under_dp_is_a_poisson_sample_where_opacus_accounts_shuffled_ones_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = opacus_engine(engine, examples(40), 8, poisson=False)
    x, y = next(iter(loader))
    LOSS(model(x), y).backward()
    optimizer.step()
    assert {len(y) for _, y in loader} == {8}
    assert engine.accountant.history[-1][:2] == (1.0, 0.2)  # what it would say of Poisson samples

    sizes: list[int] = []
    monkeypatch.setattr(PrivateGradient, "step", lambda self, x, y: sizes.append(len(y)))
    model = net()
    task = Task("train", 1, "a", flatten(model), layout(model), 0.1, 2000, mechanism=Mechanism(0.2, 1.0), clip=1.0)
    train(model, examples(40), LOSS, task, Local(batch=8), Settings())
    assert abs(np.mean(sizes) - 8) < 5 * math.sqrt(6.4 / 2000)
    assert abs(np.var(sizes) / 6.4 - 1) < 0.2


# 7. Noise from a generator that someone seeds with what is public: the server computes it and takes it away.

NAME, SEED, ROUND, Z, SIZE = "site-1", 7, 3, 4.0, 20


def big() -> nn.Module:
    return net(64, 64)  # so many weights that a mean gradient is lost in the noise


def wide() -> Examples:
    return examples(SIZE, 5, 64)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=0))


def release(multiplier: float, generator: torch.Generator, data: Examples) -> Tensor:
    """The noised gradient of one step over all data."""
    model = big()
    private = PrivateGradient(model, LOSS, Mechanism(1.0, multiplier), 1.0, generator)
    for batch in private.batches(len(data.y), 1):
        private.step(data.x[batch], data.y[batch])
    return gradient(model)


def public_seeds() -> list[int]:
    """Whatever a server could try: run.seed, names, rounds, and every seed that a program derives of them."""
    labels = ("noise", "layers", "batches", "codec", "cohort", "online", "split")
    derived = [derive(SEED, label, *rest) for label in labels for rest in ((), (ROUND,), (ROUND, NAME), (NAME,))]
    named = [int.from_bytes(NAME.encode(), "big") % 2**63, sum(map(ord, NAME))]
    return [SEED, ROUND, SEED + ROUND, 0, 1, 42, *named, *derived, *(seed % 2**32 for seed in derived)]


def replayed(sent: Tensor, true: Tensor) -> float:
    """The best cosine with the true gradient after taking away the noise of every public seed, global or own."""
    public = examples(SIZE, 99, 64)  # noise does not depend on data
    without, best = release(0.0, noise_generator(1), public), cosine(sent, true)
    for seed in public_seeds():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            best = max(best, cosine(sent - (release(Z, torch.default_generator, public) - without), true))
        best = max(best, cosine(sent - (release(Z, noise_generator(seed), public) - without), true))
    return best


def private_node(folder: Path, text: str = "") -> tuple[Node, Task]:
    federation = Federation({NAME: SIZE}, lambda name: wide(), wide(), wide())
    scenario = Scenario("made", Settings(), {"net": big}, lambda _: federation, name="made")
    settings = override(Settings(), f"run.seed={SEED} local.batch=0 privacy.unit=example {text}")
    node = Node(scenario, settings, federation, folder)
    model = build_model(scenario, settings)
    task = Task("train", ROUND, NAME, flatten(model), layout(model), rate=1.0, steps=1)
    return node, Task(**{**vars(task), "mechanism": Mechanism(1.0, Z), "clip": 1.0})


def sent_by(node: Node, task: Task) -> Tensor:
    reply = answer(node, task)
    assert not reply.reason
    return -torch.from_numpy(np.frombuffer(reply.payload, "<f4").copy())


@pytest.mark.parametrize("seeded", [True, False])
def test_no_public_seed_takes_the_noise_of_a_real_run_away(tmp_path: Path, seeded: bool) -> None:
    node, task = private_node(tmp_path, f"privacy.noise_seed={SEED}" if seeded else "")
    true = release(0.0, noise_generator(1), wide())
    torch.manual_seed(SEED)  # what a careless program does
    sent = sent_by(node, task)
    assert cosine(sent, true) < 0.1
    assert (replayed(sent, true) > 0.999) is seeded
    assert seeded or replayed(sent, true) < 0.1


def opacus_release(noise: float, data: Examples) -> Tensor:
    """The noised gradient of one step over all data, by Opacus' own engine."""
    model = big()
    wrapped, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*data), batch_size=SIZE),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for x, y in loader:
        LOSS(wrapped(x), y).backward()
        optimizer.pre_step()
    return gradient(model)


def test_a_seeded_torch_gives_the_noise_of_opacus_away() -> None:
    public = examples(SIZE, 99, 64)
    seen = []
    for data in (wide(), public):  # at the site, then at the server
        torch.manual_seed(sum(map(ord, NAME)))  # the pattern of a tutorial of NVFLARE: torch seeded by the site's name
        seen.append(opacus_release(Z, data))
    sent, true = seen[0], opacus_release(0.0, wide())
    assert cosine(sent, true) < 0.1
    assert cosine(sent - (seen[1] - opacus_release(0.0, public)), true) > 0.999


def test_no_public_seed_takes_the_noise_of_a_cohort_away() -> None:
    true = np.random.default_rng(5).normal(size=4810)
    true *= 10 / np.linalg.norm(true)  # ten clients of one mind, each at the norm
    noise = cohort_noise.CohortNoise(Z, 10.0)

    def best(sent: np.ndarray) -> float:
        guesses = [np.zeros(4810)]
        for seed in public_seeds():
            guesses += [
                np.random.default_rng(seed).normal(size=4810),
                np.random.RandomState(seed % 2**32).normal(size=4810),
            ]
        return max(cosine(torch.from_numpy(sent * 10.0 - Z * guess), torch.from_numpy(true)) for guess in guesses)

    np.random.seed(SEED)
    real, _ = noise.release(true, 0.0, 1.0, cohort_noise.generator(None))
    seeded, _ = noise.release(true, 0.0, 1.0, cohort_noise.generator(derive(SEED, "noise", ROUND)))
    assert best(real) < 0.1
    assert best(seeded) > 0.999


def test_which_examples_are_drawn_does_not_follow_the_global_seed() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        private = PrivateGradient(net(), LOSS, Mechanism(0.5, 1.0), 1.0, noise_generator(None))
        draws.append(list(private.batches(50, 4)))
    assert draws[0] != draws[1]


FORKS = """
import os, sys, torch
sys.path[:0] = {paths!r}
from test_pitfalls import noise_generator, private_node, sent_by
from pathlib import Path
node, task = private_node(Path({folder!r}))
torch.manual_seed(0)
for kind in ("torch", "generator", "client"):
    for _ in range(2):
        if os.fork() == 0:
            drawn = (
                sent_by(node, task) if kind == "client"
                else torch.randn(8, generator=noise_generator(None) if kind == "generator" else None)
            )
            print(kind, drawn[:8].numpy().tobytes().hex(), flush=True)
            os._exit(0)
        os.wait()
"""


def test_two_forked_workers_draw_different_noise_where_torchs_own_generator_repeats(tmp_path: Path) -> None:
    script = FORKS.format(paths=[str(ROOT), str(Path(__file__).parent)], folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        kind, value = line.split()
        drawn.setdefault(kind, []).append(value)
    assert {kind: len(set(values)) for kind, values in drawn.items()} == {"torch": 1, "generator": 2, "client": 2}
    assert all(len(values) == 2 for values in drawn.values())


# 8. Batch norms that are frozen, not affine or derived pass Opacus' check, and mix the examples of a batch.


class Derived(nn.BatchNorm1d):
    pass


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(5).requires_grad_(False), Derived(5)]
)
def test_batch_norms_that_pass_the_validator_of_opacus_are_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 5), layer, nn.Linear(5, 3))
    assert ModuleValidator.validate(model, strict=False) == []
    found = []
    for seed in (1, 2) if type(layer) is nn.BatchNorm1d else ():  # it cannot run derived ones
        # the first example stays, its peers change
        x, y = torch.cat([examples(1).x, examples(7, seed).x]), torch.cat([examples(1).y, examples(7, seed).y])
        wrapped = GradSampleModule(nn.Sequential(*model), strict=False)
        LOSS(wrapped(x), y).backward()
        found.append(model[0].weight.grad_sample[0].clone())  # type: ignore[union-attr, index]
        wrapped.to_standard_module()
        model[0].weight.grad_sample = None  # type: ignore[union-attr, assignment]
    if found:
        assert float((found[0] - found[1]).norm()) > 0.1 * float(found[0].norm())
    with pytest.raises(Refused, match="GroupNorm"):
        check(model)


# Layers that another grad-sample mode of Opacus cannot handle: each example's gradient is still its own.


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((6,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.tanh(self.linear(x)))
        return out


@pytest.mark.parametrize(
    "layer", [nn.RMSNorm(6), nn.PReLU(), Raw(), Twice(), nn.LayerNorm(6)], ids=lambda each: type(each).__name__
)
def test_layers_that_other_modes_cannot_handle_give_the_clipped_sum_of_a_loop(layer: nn.Module) -> None:
    model, data = nn.Sequential(layer, nn.Linear(6, 3)), examples(9)
    check(model)
    total = torch.zeros(())
    for i in range(9):
        model.zero_grad()
        LOSS(model(data.x[i : i + 1]), data.y[i : i + 1]).backward()
        one = gradient(model)
        total = total + one * min(1.0, 0.4 / float(one.norm()))
    private = PrivateGradient(model, LOSS, Mechanism(1.0, 0.0), 0.4, noise_generator(1))
    private.batches(9, 1)
    private.step(*data)
    assert torch.allclose(gradient(model) * 9, total, atol=1e-5)


# 9. Adaptive clipping that divides by the drawn batch makes the norm a function of a private count.


def test_the_next_norm_is_the_votes_over_the_cohort_expected_and_not_over_those_who_came() -> None:
    noise = cohort_noise.CohortNoise(1.0, 40.0, 0.5, 0.2)

    def moves(came: int) -> float:  # all that came were within: over those who came the share would always be 1
        return math.log(noise.release(np.zeros(1), came * 0.5, 1.0, cohort_noise.generator(1))[1])

    assert moves(10) - moves(0) == pytest.approx(-0.2 * 5 / 40)
    assert moves(40) - moves(0) == pytest.approx(-0.2 * 20 / 40)


# 11. Equal steps are merged only where they are neighbours: 30 mechanisms in turn cost 1000 entries and minutes.


def test_a_thousand_rounds_of_thirty_mechanisms_in_turn_are_thirty_entries_and_thirty_transforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [Mechanism((0.005, 0.01, 0.02)[i % 3], round(0.8 + 0.1 * (i % 10), 1)) for i in range(1000)]
    opacus_s = RDPAccountant()
    for mechanism in turns:
        opacus_s.step(noise_multiplier=mechanism.noise_multiplier, sample_rate=mechanism.sampling_rate)
    assert len(opacus_s.history) == 1000

    account, ledger = Account("client", "a", "made"), Ledger(tmp_path / "ledger")
    ledger.open({account: (None, 1e-5)})
    for number, mechanism in enumerate(turns[:60], 1):
        ledger.reserve("run", number, {account: (mechanism, 1)})
    assert len(ledger.accounts[account].history) == 30
    history = {mechanism: turns.count(mechanism) for mechanism in turns}
    composed: list[Mechanism] = []
    real = fourier._transform
    monkeypatch.setattr(fourier, "_transform", lambda m, *rest: composed.append(m) or real(m, *rest))
    accounting._epsilon.cache_clear()
    accounting.epsilon(history, 1e-5)
    assert len(set(composed)) == 30
    assert len(composed) == 60  # once for each direction, whatever the counts


# Accountants


def test_the_gaussian_accountant_of_opacus_underestimates_and_nothing_here_uses_it() -> None:
    history = {Mechanism(0.001, 0.8): 2000}
    claimed = gdp.compute_eps_poisson(steps=2000, noise_multiplier=0.8, sample_rate=0.001, delta=1e-7)
    interval = dp_sgd.epsilon_prv(history, 1e-7)
    assert interval is not None
    assert claimed < 0.6 * interval[0]  # below what is proven to have been spent
    assert certify(history, 1e-7).epsilon >= interval[0]
    assert GaussianAccountant.mechanism() == "gdp"
    for path in SOURCES:
        words = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert not {"GaussianAccountant", "gdp", "create_accountant", "PrivacyEngine"} & (words | names), path


def test_a_history_of_nothing_costs_nothing_where_opacus_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN to integer"):
        PRVAccountant().get_epsilon(1e-5)
    account, ledger = Account("example", "a", "made"), Ledger(tmp_path / "ledger")
    ledger.open({account: (1.0, 1e-5)})
    assert ledger.accounts[account].epsilon == 0
    assert certify({}, 1e-5).epsilon == accounting.epsilon({}, 1e-5) == 0


# load_checkpoint unpickles; Umbel reads nothing that can run.


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("torch.load", "pickle.load", "pickle.loads", "joblib.load"), path
            if called == "np.load":
                assert "allow_pickle=False" in ast.unparse(node), path
