"""A model's weights as one flat float32 vector, and back.

Legend: P is the number of floating-point entries of a model's state (parameters and buffers).
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privacy.refused import Refused

if TYPE_CHECKING:  # what only names a vector or a layout, as messages do, loads no torch
    import torch
    from torch import nn

Vector = NDArray[np.float32]
Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""(name, shape) of every floating-point entry of a state, in the order in which they lie in the vector."""


def layout(model: "nn.Module") -> Layout:
    """The layout of `model`: its floating-point state entries in `state_dict` order. Counters stay where they are."""
    return tuple((name, tuple(value.shape)) for name, value in model.state_dict().items() if value.is_floating_point())


def flatten(model: "nn.Module") -> Vector:
    """The state of `model` as a new vector of shape (P,)."""
    import torch

    entries = [v.detach().reshape(-1) for v in model.state_dict().values() if v.is_floating_point()]
    return torch.cat(entries).to(torch.float32).cpu().numpy().copy()


def unflatten(vector: Vector, shapes: Layout) -> "dict[str, torch.Tensor]":
    """Named tensors, copies of the parts of `vector` (P,). Raises Refused if the lengths differ."""
    import torch

    sizes = [int(np.prod(shape, dtype=np.int64)) for _, shape in shapes]
    if vector.shape != (sum(sizes),):
        raise Refused(f"a weight vector of shape {vector.shape} came where the model has {sum(sizes)} entries")
    flat = torch.from_numpy(np.array(vector, dtype=np.float32))
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes, torch.split(flat, sizes), strict=True)}


def load(model: "nn.Module", vector: Vector) -> None:
    """Copy `vector` (P,) into `model`, in place."""
    model.load_state_dict(unflatten(vector, layout(model)), strict=False)


def fit(model: "nn.Module", shapes: Layout) -> None:
    """Give the layers of `model` the shapes of a pruned one, in place; the values are undefined until `load`.

    Knows the layers whose channels pruning removes: linear, convolution, batch, layer and group norm.
    Raises Refused when the names differ, a shape is no part of the model's, or a layer of another kind would have to
    change.
    """
    import torch
    from torch import nn

    whole = layout(model)
    if whole == shapes:
        return
    if [name for name, _ in whole] != [name for name, _ in shapes]:
        raise Refused("the weights are of another model: their names differ")
    for (name, full), (_, part) in zip(whole, shapes, strict=True):
        if len(part) != len(full) or not all(0 < size <= most for size, most in zip(part, full, strict=True)):
            raise Refused(f"the weights are of another model: {name} has shape {part}, no part of {full}")
    wanted = dict(shapes)
    for prefix, module in model.named_modules():
        entries = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        new = {name: wanted.get(f"{prefix}.{name}" if prefix else name) for name, _ in entries}
        changed = {name: new[name] for name, old in entries if new[name] not in (None, tuple(old.shape))}
        if not changed:
            continue
        for name, shape in changed.items():
            assert shape is not None
            if name in module._parameters:
                setattr(module, name, nn.Parameter(torch.empty(shape)))
            else:
                setattr(module, name, torch.empty(shape))
        shape = new.get("weight") or next(iter(changed.values()))  # a norm without affine has running statistics only
        assert shape is not None
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if module.groups == module.out_channels:  # depthwise: each channel is its own group
                module.groups = shape[0]
            module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.num_features = shape[0]
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = shape[0]
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = shape
        else:
            raise Refused(f"layer {prefix!r} ({type(module).__name__}) has another shape and cannot be fitted to it")
