"""Where clients are trained, the processor or a GPU: what goes there, what comes back, and what may not be mixed.

A transfer that waits costs as much as many of a small model's steps. So all that goes to a GPU is pinned and goes
without waiting, nothing there is looked at from here, and what comes back comes once a block, by `fetched`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clients import workers
from privacy.refused import Refused
from scenarios import Examples, Scenario, build_model
from scenarios.settings import Settings

Made = TypeVar("Made")
_CPU = torch.device("cpu")


def check(settings: Settings, runtime: str = "embedded") -> None:
    """Raises Refused for a device that this machine or runtime lacks, and for processes that cannot share it."""
    if settings.local.device == "cpu":
        return
    asked, instead = f"local.device={settings.local.device}", "set local.device=cpu"
    if runtime != "embedded":
        raise Refused(f"{asked} is for the embedded runtime, where all clients share it, not for {runtime}: {instead}")
    if not torch.cuda.is_available():
        build = "finds no GPU" if torch.version.cuda else "is a build without CUDA"
        raise Refused(f"{asked} needs an NVIDIA GPU, and torch {torch.__version__} {build} here: {instead}")
    if (count := settings.run.processes) > 1:
        raise Refused(f"{asked} trains in one process, not in run.processes={count}: set run.processes=1, or {instead}")
    if settings.local.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Refused(f"local.precision=bf16 needs a GPU that has it, {name(settings)} has not: set float32")


def of(settings: Settings) -> torch.device:
    """The device on which clients are trained and weights evaluated."""
    return torch.device(settings.local.device)


def name(settings: Settings) -> str:
    """The device as rows and reports call it: `cpu`, or the model of the GPU."""
    return "cpu" if settings.local.device == "cpu" else torch.cuda.get_device_name()


def processes(settings: Settings) -> int:
    """How many processes train blocks: a GPU that a process has begun to use is lost to its forks."""
    return workers.available(settings.run.processes) if settings.local.device == "cpu" else 1


def sent(there: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors` of this machine's memory on the device; on the processor they themselves."""
    return tuple(_pinned(tensor, there).to(there, non_blocking=True) for tensor in tensors)


def moved(model: nn.Module, there: torch.device) -> nn.Module:
    """`model`, whose tensors lie on the device from here on; on the processor nothing is done."""
    return model.to(there, non_blocking=True)


def _pinned(tensor: Tensor, there: torch.device) -> Tensor:
    return tensor.pin_memory() if there.type == "cuda" else tensor


def indices(batches: Iterable[Any], there: torch.device) -> Iterator[Any]:
    """The indices of each batch, on the device, in one transfer; on the processor each when it is asked for."""
    if there == _CPU:
        return iter(batches)
    parts = [torch.as_tensor(batch, dtype=torch.int64) for batch in batches]
    (whole,) = sent(there, torch.cat([torch.zeros(0, dtype=torch.int64), *parts]))
    return iter(torch.split(whole, [len(part) for part in parts]))


def fetched(tensor: Tensor) -> NDArray[Any]:
    """`tensor` in this machine's memory: the one place that waits for a device."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy()
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    here.copy_(tensor, non_blocking=True)
    wait(tensor.device)
    return here.numpy()


def wait(there: torch.device) -> None:
    """Until the device has done all that it was asked to."""
    if there.type == "cuda":
        torch.cuda.current_stream(there).synchronize()


def agree(weights: Tensor, x: Tensor, y: Tensor, model: torch.device | None = None) -> None:
    """Raises Refused where not all lie on one device, or examples are of another floating-point type than weights."""
    for what, device in (("examples", x.device), ("labels", y.device), ("a model", model or weights.device)):
        if device != weights.device:
            raise Refused(f"{what} on {device} and weights on {weights.device} do not go together: move one of them")
    if x.is_floating_point() and x.dtype != weights.dtype:
        raise Refused(f"examples of {x.dtype} and weights of {weights.dtype} do not go together: convert one of them")


@contextmanager
def exactly(there: torch.device) -> Iterator[None]:
    """On a GPU: convolutions in whole float32, as everywhere else, and by algorithms that repeat their bits."""
    exact = {"enabled": True, "deterministic": True, "allow_tf32": False}
    with torch.backends.cudnn.flags(**exact) if there.type == "cuda" else nullcontext():
        yield


@contextmanager
def drawing(there: torch.device, seed: int) -> Iterator[None]:
    """What layers draw from torch's own generators (dropout) follows from `seed`; the generators stay untouched."""
    gpus = [torch.cuda.current_device()] if there.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed(seed)
        yield


def try_out(scenario: Scenario, settings: Settings, examples: Examples) -> None:
    """Raises Refused where the model or the loss makes tensors of its own that lie on the processor.

    examples: not a client's, as what torch says of them is shown.
    """
    if (there := of(settings)) == _CPU:
        return
    try:
        x, y = sent(there, examples.x[:2], examples.y[:2])
        with torch.no_grad():
            fetched(scenario.loss(moved(build_model(scenario, settings).eval(), there)(x), y))
    except RuntimeError as error:
        raise Refused(
            f"the model or the loss of scenario {scenario.name} does not work on {there} ({_first_line(error)}): let "
            "the tensors that it makes be on the device of its inputs, or set local.device=cpu"
        ) from None


def watched(replies: Iterable[Made]) -> Iterator[Made]:
    """`replies`; where the GPU fails, which is then lost to this process, the run ends in one line."""
    try:
        yield from replies
    except torch.AcceleratorError as error:
        raise Refused(
            f"the GPU failed ({_first_line(error)}), as it does over a label that does not exist: the same run with "
            "local.device=cpu names the client; `umbel resume` goes on from the last committed round"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
