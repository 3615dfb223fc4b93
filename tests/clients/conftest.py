"""A device of the tests' own, for what must not be mixed with the processor's memory, nor looked at on the way.

Its tensors call themselves `meta` and hold their values here. An operation that mixes them with the processor's raises,
as on a GPU; one that would make a GPU's caller wait is counted.
"""

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from clients import placement
from privacy import dp_sgd, on_device

_META = torch.device("meta")


class Held(Tensor):
    """A tensor that calls its device `meta`, and whose values lie here."""

    values: Tensor

    @staticmethod
    def __new__(cls: Any, values: Tensor) -> "Held":
        told = {"dtype": values.dtype, "device": _META, "strides": values.stride()}
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, storage_offset=values.storage_offset(), requires_grad=False, **told
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Elsewhere.now().__torch_dispatch__(func, types, args, kwargs)


class Elsewhere(TorchDispatchMode):
    """What a device of its own would do, and what it would be asked to wait for."""

    _open: ClassVar[list["Elsewhere"]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    @classmethod
    def now(cls) -> "Elsewhere":
        return cls._open[-1]

    def __enter__(self) -> "Elsewhere":
        self._open.append(self)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._open.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        there = [one for one in flat if isinstance(one, Held)]
        asked, name = kwargs.get("device"), func.overloadpacket.__name__
        goes = asked is not None and torch.device(asked) == _META
        comes = bool(there) and asked is not None and not goes
        if not there and not goes:
            return func(*args, **kwargs)
        if name == "copy_" and len(there) == 1:
            raise AssertionError("a copy between devices that names none")
        if there and any(one.dim() for one in flat if not isinstance(one, Held)):
            raise RuntimeError(f"{name}: tensors on meta and on cpu")
        kinds = {one.dtype for one in there if one.is_floating_point() and one.dim()}
        if len(kinds) > 1:
            raise RuntimeError(f"{name}: tensors of {kinds}")
        if goes and flat and not there and not kwargs.get("non_blocking"):
            self.waits[f"{name} there"] += 1
        if comes or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.waits[name] += 1
        if goes:
            kwargs["device"] = torch.device("cpu")
        kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
        inner_args, inner_kwargs = tree_map_only(Held, lambda one: one.values, (args, kwargs))
        made = func(*inner_args, **inner_kwargs)
        mine = {id(one.values): one for one in there}
        if comes:
            return made
        return tree_map_only(Tensor, lambda one: mine[id(one)] if id(one) in mine else Held(one), made)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """Clients are trained on the device of `with away:`."""
    monkeypatch.setattr(placement, "of", lambda settings: _META)
    monkeypatch.setattr(on_device, "_there", lambda seed, device: dp_sgd.noise_generator(seed))
    return Elsewhere()
