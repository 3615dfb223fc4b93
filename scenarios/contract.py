"""Scenario: a model, its data, its settings; one file a scenario, found by name, path or module."""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from privacy.refused import Refused
from scenarios.seeds import derive
from scenarios.settings import Settings

__all__ = ["Examples", "Federation", "Gathered", "Scenario", "build_model", "load", "names", "predict"]


T = TypeVar("T")


class Examples(NamedTuple):
    """x: float32 (N, ...), y: int64 (N,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Gathered:
    """`Federation.client` of data of which several clients' examples are read at once for less than each by itself."""

    several: Callable[[Sequence[str]], Examples]
    """The training examples of these clients, one client's after another's."""

    def __call__(self, name: str) -> Examples:
        return self.several([name])


@dataclass(frozen=True)
class Federation:
    """Who holds what. A client's examples are made when asked for, so a fleet of any size costs nothing until then."""

    sizes: Mapping[str, int]
    """Training examples of each client, by name; where a node holds its own data only, what it knows."""
    client: Callable[[str], Examples]
    """The training examples of one client; a `Gathered` where those of several can be read at once."""
    validation: Examples
    """Held by the server, neither test nor client data: calibrates and chooses edge models."""
    test: Examples | None = None
    """Held by the server; None: the clients evaluate, each on its own test data."""
    client_test: Callable[[str], Examples] | None = None
    """The test examples of one client."""


@dataclass(frozen=True)
class Scenario:
    """One learning task. `load` gives it its name; `models` are chosen by the setting `model`, the first by default."""

    summary: str
    settings: Settings
    models: Mapping[str, Callable[[], nn.Module]]
    data: Callable[[Settings], Federation]
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    """Mean loss of model outputs (N, classes) against labels (N,)."""
    classes: tuple[str, ...] = ()
    """Names of the classes, for the edge bundle; empty: their indices."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """What this scenario leaves out on purpose -> the reason: "pruned", "central", "no_privacy"."""
    dataset: str = ""
    """The declared name of the data, to which privacy spending is charged across scenarios; empty: `name`."""
    name: str = ""


def names() -> list[str]:
    """The bundled scenarios: modules of this package that define SCENARIO, sorted."""
    package = Path(__file__).parent
    modules = sorted(module.name for module in pkgutil.iter_modules([str(package)]))
    return [name for name in modules if "\nSCENARIO = " in (package / f"{name}.py").read_text()]


def load(name: str) -> Scenario:
    """The scenario called `name`: a bundled one, a path to a Python file, or a dotted module name.

    The module must define SCENARIO. Raises Refused when there is none, naming those that exist.
    """
    known = names()
    if name in known:
        module = importlib.import_module(f"scenarios.{name}")
    elif name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise Refused(f"there is no scenario file {name}: give the path of a Python file that defines SCENARIO")
        spec = importlib.util.spec_from_file_location(f"umbel_scenario_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        _run(lambda: spec.loader.exec_module(module), name)  # type: ignore[union-attr]
    elif "." in name and _exists(name):
        module = _run(lambda: importlib.import_module(name), name)
    else:
        raise Refused(f"there is no scenario {name!r}: choose one of {', '.join(known)}, a file.py, or a module.name")
    scenario = getattr(module, "SCENARIO", None)
    if not isinstance(scenario, Scenario):
        raise Refused(f"{name} defines no SCENARIO = Scenario(...): see docs/scenarios.md")
    return replace(scenario, name=name if name in known else Path(name).stem if name.endswith(".py") else name)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _run(code: Callable[[], T], name: str) -> T:
    try:
        return code()
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"scenario {name} does not load: {type(error).__name__}: {error}") from error


def build_model(scenario: Scenario, settings: Settings) -> nn.Module:
    """The model that `settings.model` names, initialized from the run's seed; torch's own generator stays untouched."""
    name = settings.model or next(iter(scenario.models))
    if name not in scenario.models:
        raise Refused(f"{scenario.name} has no model {name!r}: choose one of {', '.join(scenario.models)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.run.seed, "model"))
        return scenario.models[name]()


def predict(outputs: Tensor) -> Tensor:
    """Class indices (N,) of model outputs (N, classes); one column is the logit of class 1."""
    return (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
