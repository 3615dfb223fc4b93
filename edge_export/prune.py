"""Structured pruning: whole channels of the least weight are removed, so that fewer multiply-accumulates remain."""

import copy
from dataclasses import dataclass

import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from privacy.refused import Refused
from scenarios import weights


@dataclass(frozen=True)
class Pruned:
    """What pruning did: multiply-accumulates of one example and parameters, before and after."""

    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int


def macs(model: nn.Module, example_x: Tensor) -> int:
    """Multiply-accumulates of `model` in matrix products and convolutions, for the one example (1, ...)."""
    still = copy.deepcopy(model).eval()  # in training, batch norm would learn from the example
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        still(example_x)
    return int(counter.get_total_flops()) // 2  # it counts a multiply-accumulate as two operations


def prune(model: nn.Module, example_x: Tensor, share: float) -> tuple[nn.Module, Pruned]:
    """A copy of `model` without the `share` of each hidden layer's channels that has the least L2 norm.

    Channels that depend on each other go together (Fang et al. 2023, DepGraph), the outputs stay. example_x: (1, ...).
    The copy's layout fits into a newly built model by `weights.fit`, which is how clients rebuild it.
    Raises Refused when there is nothing to prune, or what remains is not a working, cheaper model.
    """
    if not 0 < share < 1:
        raise Refused(f"a share of {share} channels cannot be pruned: set export.prune above 0 and below 1")
    if len([*model.named_parameters(remove_duplicate=False)]) > len([*model.parameters()]):
        raise Refused("layers of the model share parameters, which pruning would part: set export.prune=0")
    small = copy.deepcopy(model).eval().requires_grad_(True)  # the dependencies are found by tracing gradients
    with torch.no_grad():
        expected = tuple(small(example_x).shape)
    try:
        outputs = _output_layers(small, example_x)
        _remove_channels(small, example_x, share, outputs)
        with torch.no_grad():
            found = tuple(small(example_x).shape)
    except Exception as error:  # torch-pruning raises whatever its graph search stumbles on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(f"the model's channels cannot be traced ({reason}): set export.prune=0") from None
    done = Pruned(macs(model, example_x), macs(small, example_x), _parameters(model), _parameters(small))
    if weights.layout(small) == weights.layout(model):
        raise Refused("there is nothing to prune: the model has no hidden channels, or too few for this share")
    if found != expected:
        raise Refused(f"pruning changed the outputs from {expected} to {found}: set export.prune=0")
    if done.macs_after >= done.macs_before:
        raise Refused(f"pruning saved nothing ({done.macs_before} multiply-accumulates before and after)")
    _rebuild(model, small, example_x)
    small.train(model.training)
    for new, old in zip(small.parameters(), model.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return small, done


def _output_layers(model: nn.Module, example_x: Tensor) -> list[nn.Module]:
    """The layers whose channels are the model's outputs: those whose channels depend on a node with no successor."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example_x)
    found: list[nn.Module] = []
    for group in graph.get_all_groups():
        for dependency, _ in group:
            node = dependency.target
            if not node.outputs and graph.is_out_channel_pruning_fn(dependency.handler):
                found.append(group[0].dep.target.module)
    return found


def _remove_channels(model: nn.Module, example_x: Tensor, share: float, outputs: list[nn.Module]) -> None:
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example_x,
        importance=torch_pruning.importance.MagnitudeImportance(p=2, normalizer="mean"),
        pruning_ratio=share,
        ignored_layers=outputs,
        in_channel_groups={},  # its default dicts are shared between calls
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()


def _rebuild(model: nn.Module, small: nn.Module, example_x: Tensor) -> None:
    """Raises Refused unless a client that holds `model` can rebuild `small` from its layout and weights."""
    twin = copy.deepcopy(model).eval()
    weights.fit(twin, weights.layout(small))
    weights.load(twin, weights.flatten(small))
    with torch.no_grad():
        if not torch.equal(twin(example_x), small(example_x)):
            raise Refused("the pruned model cannot be rebuilt from its layout: set export.prune=0")


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
