"""Stack: a model that is a chain of linear layers with functions between them that have no weights.

Such a model can be trained without ever forming its gradients (clients/gram.py), and the length of one example's
gradient follows from what its layers see (clients/private_stack.py).

Legend: P is the number of weights, N of examples.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scenarios.weights import layout

Function = Callable[[Tensor], Tensor]

BETWEEN = (
    nn.Flatten,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Hardtanh,
)
"""Modules that have no weights, draw nothing, and treat every example by itself."""


@dataclass(frozen=True)
class Layer:
    """Where one linear layer lies in a vector of weights (P,)."""

    outputs: int
    inputs: int
    weight: int
    """Index of the first entry of its weight (outputs, inputs)."""
    bias: int | None
    """Index of the first entry of its bias (outputs,)."""

    def of(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Views of weight (outputs, inputs) and bias (outputs,) in `flat` (P,)."""
        weight = flat[self.weight : self.weight + self.outputs * self.inputs].view(self.outputs, self.inputs)
        return weight, None if self.bias is None else flat[self.bias : self.bias + self.outputs]


@dataclass(frozen=True)
class Stack:
    """functions[0], layers[0], functions[1], ..., layers[-1], functions[-1], in the order in which they act."""

    layers: tuple[Layer, ...]
    functions: tuple[Function, ...]
    """Each takes (N, width) and gives (N, width'); the first takes examples as they are."""
    size: int
    """P."""


def passed(function: Function, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """(a layer's outputs, forgetful of where they came from; what `function` makes of them, and remembers)."""
    with torch.enable_grad():
        outputs = outputs.detach().requires_grad_()
        return outputs, function(outputs)


def back_through(passed: tuple[Tensor, Tensor], back: Tensor) -> Tensor:
    """What comes back to the outputs of a layer of what came `back` to what a function made of them."""
    outputs, made = passed
    if made is outputs:
        return back
    with torch.enable_grad():  # of the sum: given `back` by itself, torch loads sympy, 40 MB in every worker
        return torch.autograd.grad((made * back).sum(), outputs)[0]


def slopes(loss: Callable[[Tensor, Tensor], Tensor], made: Tensor, y: Tensor) -> Tensor:
    """The gradient (N, classes) of every example's own loss, where `loss` is their mean."""
    with torch.enable_grad():
        ends = made.detach().requires_grad_()
        return torch.autograd.grad(loss(ends, y) * len(y), ends)[0]


def obstacle(model: nn.Module) -> str:
    """What keeps `model` from being a stack, in words; empty where it is one."""
    modules, names = list(chain(model)), {id(module): name for name, module in model.named_modules()}
    for module in modules:
        which = f"layer {names[id(module)]!r} ({type(module).__name__})"
        if type(module) not in (nn.Linear, *BETWEEN):
            what = "is no linear layer and no function without weights"
            return f"{which} {what}" if names[id(module)] else f"a {type(module).__name__} is no chain of layers"
        if hooked(module):
            return f"{which} has a hook"
        if isinstance(module, nn.Flatten) and module.start_dim != 1:
            return f"{which} takes examples apart"
    if not all(parameter.requires_grad for parameter in model.parameters()):
        return "some of the model's weights are frozen"
    if not any(type(module) is nn.Linear for module in modules):
        return "the model has no linear layer"
    if len(linear(model)) < sum(type(module) is nn.Linear for module in modules):
        return "a linear layer of the model is used twice"
    return ""


def read(model: nn.Module) -> Stack | None:
    """`model` as a stack; None where it is none."""
    if obstacle(model):
        return None
    modules = list(chain(model))
    places, size = {}, 0
    for name, shape in layout(model):
        places[name] = size
        size += math.prod(shape)
    names = {id(module): name for name, module in model.named_modules()}
    layers, functions, between = [], [], nn.Sequential()
    for module in modules:
        if type(module) is not nn.Linear:
            between.append(module)
            continue
        prefix = f"{names[id(module)]}." if names[id(module)] else ""
        bias = places[f"{prefix}bias"] if module.bias is not None else None
        layers.append(Layer(module.out_features, module.in_features, places[f"{prefix}weight"], bias))
        functions.append(between)
        between = nn.Sequential()
    return Stack(tuple(layers), (*functions, between), size)


def place(model: nn.Module, layer: nn.Linear) -> Layer:
    """Where `layer`, of `model`, lies in a vector of its weights."""
    places, size = {}, 0
    for entry in model.state_dict(keep_vars=True).values():
        if entry.is_floating_point():
            places[id(entry)], size = size, size + entry.numel()
    bias = None if layer.bias is None else places[id(layer.bias)]
    return Layer(layer.out_features, layer.in_features, places[id(layer.weight)], bias)


def linear(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of a chain that are used just once in it, and whose weights nothing else uses."""
    modules = list(chain(model))
    used = [id(parameter) for module in modules for parameter in module.parameters()]
    found = [module for module in modules if type(module) is nn.Linear and not hooked(module)]
    once = [module for module in found if all(used.count(id(parameter)) == 1 for parameter in module.parameters())]
    return once if all(parameter.requires_grad for one in once for parameter in one.parameters()) else []


def chain(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that act one after another; one that is no plain sequence stands for itself."""
    if type(module) is not nn.Sequential:
        yield module
        return
    for part in module:
        yield from chain(part)


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to what the module sees or makes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
