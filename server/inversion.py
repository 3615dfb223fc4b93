"""Gradient inversion: what an example can be rebuilt from, when an attacker sees the one gradient that it left.

Two attacks: the ratio of weight and bias gradients of a first linear layer (Phong et al. 2018, section 3.1), and the
search for an input with the same gradient (DLG, Zhu et al. 2019) whose label is read off the last bias (iDLG).
"""

import copy
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from clients.sgd import train
from clients.task import Hello, Task
from clients.training import Node, protected
from privacy import cohort_noise
from privacy.plan import Mechanism
from scenarios import Examples
from scenarios.seeds import derive
from scenarios.settings import Local, Settings, override
from scenarios.weights import flatten, layout, load
from server.canaries import Setup, Tick, Unrecorded
from server.embedded import EmbeddedFleet
from server.rounds import rounds
from server.score import NOTHING
from server.state import first_state

_ROUNDS = 3
"""Before the attack: some models begin with a layer of zeros, through which no gradient passes."""
_SEARCH = 60
_FINITE = (nn.Tanh, nn.Sigmoid, nn.Flatten, nn.Linear, nn.Sequential, nn.Identity, nn.GELU, nn.SiLU, nn.Softplus)


def inversion(setup: Setup, examples: int, tick: Tick) -> tuple[dict[str, object] | None, str | None]:
    """({examples, mse, psnr, analytic_mse, ..., without_privacy}, None), or (None, why it cannot be done).

    Of each of some clients' examples the real training code makes a step on that example alone, with the plan's clip
    and noise and without; errors are means over examples, in the units of the scenario's inputs.
    """
    if setup.data is None:
        return None, "the training data are not on this machine"
    model = _trained(setup)
    if reason := _unsuitable(model, setup.data.validation):
        return None, reason
    names = sorted(name for name, size in setup.sizes.items() if size)
    random = np.random.default_rng(derive(setup.seed, "audit", "inversion"))
    chosen = [setup.data.client(names[i % len(names)]) for i in range(examples)]
    some = [Examples(e.x[i : i + 1], e.y[i : i + 1]) for e in chosen for i in [int(random.integers(len(e.y)))]]
    bare = override(setup.settings, "privacy.unit=none privacy.budget= privacy.adapt=false")
    free = _errors(setup, bare, model, some, tick)
    held = free if setup.settings.privacy.unit == "none" else _errors(setup, setup.settings, model, some, tick)
    guess, range_ = _guess(setup.data.validation, some), _range(setup.data.validation)
    guessed = {"class_mean_mse": guess, "class_mean_psnr": _psnr(guess, range_)}
    return {"examples": examples, **held, **guessed, "without_privacy": free}, None


def _trained(setup: Setup) -> nn.Module:
    """The model after a few real rounds of the scenario without privacy."""
    assert setup.data is not None
    change = (
        "privacy.unit=none privacy.budget= privacy.adapt=false fleet.profile=equal fleet.clock=wall fleet.deadline=0 "
    )
    settings = override(setup.settings, change + setup.settings.reference.no_privacy_set)
    node = Node(setup.scenario, settings, setup.data, setup.states / "inversion")
    roster = {name: Hello(name, size, "") for name, size in sorted(setup.sizes.items())}
    first = replace(first_state(node.template, settings), until=min(_ROUNDS, settings.rounds.number))
    *_, (last, _) = rounds(EmbeddedFleet(node), roster, {}, first, settings, Unrecorded(), lambda _: NOTHING)
    model = copy.deepcopy(node.template)
    load(model, last.weights)
    return model


def _unsuitable(model: nn.Module, held: Examples) -> str | None:
    layers = [module for module in model.modules() if next(module.children(), None) is None]
    if other := next((module for module in model.modules() if not isinstance(module, _FINITE)), None):
        return f"the attacks are for nets of linear layers and smooth activations, this one has {type(other).__name__}"
    linear = [module for module in layers if isinstance(module, nn.Linear)]
    if not linear or linear[0].bias is None or linear[-1].bias is None:
        return "the attacks need a bias in the first and last linear layer"
    if linear[-1].out_features < 2:
        return "the attacks read the label off a last layer of one output a class, this model has a single output"
    return None if linear[0].in_features == held.x[0].numel() else "the first linear layer does not see the whole input"


def _errors(setup: Setup, settings: Settings, model: nn.Module, some: list[Examples], tick: Tick) -> dict[str, float]:
    """Means over examples of what both attacks get wrong; `mse` is that of the better one of each example."""
    assert setup.data is not None
    analytic, searched, best, labels = [], [], [], 0
    low, high = float(setup.data.validation.x.min()), float(setup.data.validation.x.max())
    for number, example in enumerate(some):
        gradient = _seen(setup, settings, model, example, number)
        label = int(gradient[-1].argmin())
        labels += label == int(example.y)
        rebuilt = [
            _analytic(gradient, example.x.shape),
            _searched(setup, model, gradient, label, setup.data.validation),
        ]
        errors = [float(((x.clamp(low, high) - example.x) ** 2).mean()) for x in rebuilt]
        analytic.append(errors[0])
        searched.append(errors[1])
        best.append(min(errors))
        tick()
    mse, range_ = float(np.mean(best)), _range(setup.data.validation)
    return {
        "mse": mse,
        "psnr": _psnr(mse, range_),
        "analytic_mse": float(np.mean(analytic)),
        "dlg_mse": float(np.mean(searched)),
        "labels_right": labels / len(some),
    }


def _seen(setup: Setup, settings: Settings, model: nn.Module, example: Examples, number: int) -> list[Tensor]:
    """The gradient, by parameter, that the attacker of the unit's promise sees of a step on one example alone.

    That is the server, which sees what is sent; under `client`, where it sees all, a reader who knows all others.
    """
    unit, plan = settings.privacy.unit, next(iter(setup.plans.values()), None)
    multiplier = plan.mechanism.noise_multiplier if plan else 0.0
    mechanism = Mechanism(1.0, multiplier) if plan and settings.privacy.by_example else None
    whole = plan is not None and (settings.privacy.by_client or unit == "local")
    norm = settings.privacy.update_norm if whole else 0.0
    task = Task(
        "train", number + 1, "target", flatten(model), layout(model), rate=1.0, steps=1, mechanism=mechanism,
        clip=settings.privacy.clip if mechanism else 0.0, update_clip=norm,
        update_noise=multiplier if unit == "local" else 0.0,
    )  # fmt: skip
    twin = copy.deepcopy(model)
    train(twin, example, setup.scenario.loss, task, Local(batch=0), settings)
    update, within = protected(flatten(twin) - task.weights, task, settings)
    if plan and unit == "client":  # who knows all others sees this one's update with the noise of the sum
        noise = cohort_noise.CohortNoise(multiplier, 1.0)
        random = cohort_noise.generator(settings.privacy.noise_seed)
        update, _ = noise.release(update.astype(np.float64), 0.5 if within else -0.5, norm, random)
    load(twin, -update)  # the parameters of `twin` are now the gradient
    return [parameter.detach().clone() for parameter in twin.parameters()]


def _analytic(gradient: list[Tensor], shape: torch.Size) -> Tensor:
    """Row i of the weight's gradient is the input times entry i of the bias' gradient."""
    row = int(gradient[1].abs().argmax())
    scale = gradient[1][row]
    return torch.nan_to_num(gradient[0][row] / scale, nan=0.0, posinf=0.0, neginf=0.0).reshape(shape)


def _searched(setup: Setup, model: nn.Module, gradient: list[Tensor], label: int, held: Examples) -> Tensor:
    """From the mean input on, an input whose gradient points the same way (a clip hides the length)."""
    twin, y = copy.deepcopy(model).eval(), torch.tensor([label])
    wanted = torch.cat([part.reshape(-1) for part in gradient])
    x = held.x.mean(0, keepdim=True).clone().requires_grad_()
    search = torch.optim.LBFGS([x], max_iter=_SEARCH, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def distance() -> Tensor:
        search.zero_grad()
        loss = setup.scenario.loss(twin(x), y)
        found = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(loss, list(twin.parameters()), create_graph=True)]
        )
        apart = 1 - torch.cosine_similarity(found, wanted, dim=0)
        torch.autograd.backward(apart, inputs=[x])
        return apart

    search.step(distance)  # type: ignore[no-untyped-call]
    return torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0)


def _guess(held: Examples, some: list[Examples]) -> float:
    """The error of whoever answers with the mean of the class, knowing the label and nothing else."""
    errors = []
    for example in some:
        mine = held.x[held.y == example.y]
        mean = (mine if len(mine) else held.x).mean(0, keepdim=True)
        errors.append(float(((mean - example.x) ** 2).mean()))
    return float(np.mean(errors))


def _range(held: Examples) -> float:
    return float(held.x.max() - held.x.min())


def _psnr(mse: float, range_: float) -> float:
    """Decibels; an error below float32's own counts as that."""
    return 10 * math.log10(max(range_, 1e-6) ** 2 / max(mse, 1e-12))
