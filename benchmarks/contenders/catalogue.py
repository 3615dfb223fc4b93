"""The benchmark's workloads, and how each is written to a folder from which every contender reads the same."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

HOUSE = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(HOUSE))

from workload import CHARACTERS, MODELS, Workload  # noqa: E402

from clients.sgd import _shuffled  # noqa: E402
from privacy import accounting  # noqa: E402
from privacy.plan import Mechanism  # noqa: E402
from privacy.refused import Refused  # noqa: E402
from scenarios import Scenario, build_model, sources  # noqa: E402
from scenarios.seeds import derive  # noqa: E402
from scenarios.settings import Settings, override  # noqa: E402
from scenarios.weights import flatten  # noqa: E402
from server.select import _drawn  # noqa: E402

Arrays = tuple[np.ndarray[Any, Any], ...]
"""x, y, x_test, y_test."""
_A = Workload("A", "2nn", clients=1000, cohort=50, examples=60, batch=10, steps=6, rate=0.1, scale=255.0)
_N = Workload("N", "linear", clients=1000, cohort=1000, examples=1, batch=1, steps=1, rate=0.1, shared=True)
WORKLOADS = {
    "A": _A,
    "B": Workload("B", "cnn", clients=100, cohort=10, examples=100, batch=10, steps=10, rate=0.1, scale=255.0),
    "C": replace(_A, name="C", unit="example", noise=1.0),
    "D": replace(_A, name="D", unit="client", noise=1.0),
    "E": Workload("E", "gru", clients=100, cohort=10, examples=50, batch=10, steps=5, rate=0.1),
    **{f"N-{size}": replace(_N, name=f"N-{size}", clients=size) for size in (1_000, 10_000, 100_000, 1_000_000)},
}
_TIGHT = 0.1
"""Clipping norm of the noise-free round: at 1 the first updates of A are within it, and nobody would have to clip."""
_SUMMARIES = {
    "A": "2NN, 199,210 weights, {clients} clients x {examples} examples, {cohort} a round, E=1, B=10, SGD 0.1",
    "B": "CNN, 1,663,370 weights, {clients} clients x {examples}, {cohort} a round, E=1, B=10, SGD 0.1",
    "C": "A with example-level DP: clip 1, noise 1, Poisson samples q=1/6, 6 steps, divisor 10",
    "D": "A with client-level DP: clip 1, noise 1, drawn once on the sum",
    "E": "GRU of 128 units, 80 characters, {clients} clients x {examples}, {cohort} a round, E=1, B=10, SGD 0.1",
    "N": "no-op clients, {cohort} asked of {clients}, updates of 10 floats",
}


@dataclass(frozen=True)
class Written:
    """A workload's files: as it is timed, and without noise, with every example in every step, to compare weights."""

    workload: Workload
    timed: Path
    noiseless: Path
    data: str
    """Where the examples come from."""

    @property
    def summary(self) -> str:
        workload = self.workload
        sizes = {"clients": workload.clients, "cohort": workload.cohort, "examples": workload.examples}
        return _SUMMARIES[workload.name[0]].format(**{name: f"{size:,}" for name, size in sizes.items()})


def scaled(workload: Workload, divisor: int) -> Workload:
    """`workload` with fewer clients, for a trial of the benchmark itself."""
    cohort = max(2, workload.cohort // divisor)
    return replace(workload, clients=max(cohort + 1, workload.clients // divisor), cohort=cohort)


def write(workload: Workload, rounds: int, folder: Path) -> Written:
    """Everything that contenders of `rounds` rounds need."""
    folder.mkdir(parents=True)
    settings = _settings(workload, rounds)
    known = override(Settings(), settings)
    arrays, data = _DATA[workload.model](workload)
    for name, array in zip(("x", "y", "x_test", "y_test"), arrays, strict=True):
        np.save(folder / f"{name}.npy", array)
    nobody = Scenario("", known, MODELS, lambda _: None)  # type: ignore[arg-type, return-value]
    np.save(folder / "start.npy", flatten(build_model(nobody, override(known, f"model={workload.model}"))))
    seeded = override(known, "privacy.noise_seed=0")  # else a draw under client-level DP is Umbel's secret
    cohorts = np.array([_drawn(range(workload.clients), seeded, i + 1) for i in range(rounds)])  # type: ignore[arg-type]
    np.save(folder / "cohorts.npy", cohorts)
    width = len(str(workload.clients - 1))
    orders = [[_order(workload, i + 1, f"client-{c:0{width}}") for c in cohort] for i, cohort in enumerate(cohorts)]
    np.save(folder / "orders.npy", np.array(orders, np.uint16))
    timed, noiseless = folder / "timed.json", folder / "noiseless.json"
    replace(workload, settings=settings).write(timed)
    whole, words = workload.batch, f"{settings} privacy.noise_seed=0 privacy.clip={_TIGHT}"
    if workload.unit == "example":
        whole, words = 0, f"{words} local.batch=0 local.steps={workload.steps} privacy.epsilon=1000"
    replace(workload, noise=0.0, clip=_TIGHT, batch=whole, settings=words).write(noiseless)
    return Written(workload, timed, noiseless, data)


def _order(workload: Workload, number: int, client: str) -> np.ndarray[Any, Any]:
    """The order in which Umbel lets `client` take its examples in the one epoch of round `number`."""
    batches = _shuffled(workload.examples, workload.examples, derive(0, "batches", number, client))
    return next(islice(batches, 1)).numpy()


def _settings(workload: Workload, rounds: int) -> str:
    """What makes Umbel do the workload; its own epsilon is chosen so that the noise multiplier is the workload's."""
    fraction = workload.cohort / workload.clients
    words = f"rounds.fraction={fraction} fleet.clients={workload.clients}"
    words += f" local.batch={workload.batch} local.rate={workload.rate} privacy.clip={workload.clip}"
    if workload.unit == "example":
        once = Mechanism(workload.batch / workload.examples, workload.noise)
        epsilon = accounting.epsilon({once: rounds * workload.steps}, accounting.default_delta(workload.examples))
        words += f" privacy.unit=example privacy.epsilon={epsilon}"
    if workload.unit == "client":
        once = Mechanism(fraction, workload.noise, workload.clients)
        epsilon = accounting.epsilon({once: rounds}, accounting.default_delta(workload.clients))
        words += f" privacy.unit=client privacy.sampling=fixed privacy.epsilon={epsilon}"
    return words


def _images(workload: Workload) -> tuple[Arrays, str]:
    """MNIST, dealt to the clients at random; noise of its shape where it is not there."""
    wanted, random = workload.clients * workload.examples, np.random.default_rng(0)
    if not os.environ.get("UMBEL_DATA"):
        x = random.integers(0, 256, (wanted, 1, 28, 28), np.uint8)
        x_test = random.integers(0, 256, (10_000, 1, 28, 28), np.uint8)
        return (x, random.integers(0, 10, wanted), x_test, random.integers(0, 10, 10_000)), "random, MNIST's shape"
    folder = sources.find("mnist")
    parts = [sources.read_idx(folder, f"{part}-images-idx3-ubyte")[:, None] for part in ("train", "t10k")]
    labels = [sources.read_idx(folder, f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    if len(labels[0]) < wanted:
        raise Refused(f"{folder} holds {len(labels[0])} training images, {wanted} are needed: unset UMBEL_DATA")
    dealt = random.permutation(len(labels[0]))[:wanted]
    return (parts[0][dealt], labels[0][dealt], parts[1], labels[1]), "MNIST / 255"


def _characters(workload: Workload) -> tuple[Arrays, str]:
    """Windows of 80 characters of Shakespeare and the next one; random ones where the text is not there."""
    wanted, tests, random = workload.clients * workload.examples, 1000, np.random.default_rng(0)
    path = Path(os.environ.get("UMBEL_DATA", "")) / "tinyshakespeare" / "input.txt"
    if not os.environ.get("UMBEL_DATA") or not path.is_file():
        numbers, data = random.integers(0, CHARACTERS, 1_000_000, np.uint8), "random characters"
    else:
        letters = np.frombuffer(path.read_bytes(), np.uint8)
        numbers, data = np.searchsorted(np.unique(letters), letters).astype(np.uint8), "tinyshakespeare"
        if numbers.max() >= CHARACTERS:
            raise Refused(f"{path} holds {numbers.max() + 1} distinct characters, not {CHARACTERS}: fetch it again")
    starts = random.choice(len(numbers) - 81, wanted + tests, replace=False)
    x, y = numbers[starts[:, None] + np.arange(80)], numbers[starts + 80]
    return (x[:wanted], y[:wanted], x[wanted:], y[wanted:]), data


def _nothing(workload: Workload) -> tuple[Arrays, str]:
    one = np.ones((1, 4), np.float32), np.zeros(1, np.int64)
    return (*one, *one), "one example for all"


_DATA: dict[str, Callable[[Workload], tuple[Arrays, str]]] = {
    "2nn": _images,
    "cnn": _images,
    "gru": _characters,
    "linear": _nothing,
}
