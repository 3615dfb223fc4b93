"""Run folders as finished runs leave them, for the tests of everything that reads them."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from scenarios import Examples, Federation, Scenario, load
from scenarios.settings import Settings, knobs, override
from server import cli
from server import run as job
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder

WriteRun = Callable[..., Path]
RealRun = Callable[[str], Path]
SIZES = {f"site-{i:02}": 24 + 3 * i for i in range(6)}
REAL = {
    "none": "privacy.unit=none",
    "example": "local.batch=0 export.prune=0.5 export.recover_rounds=1",
    "sampled": "local.batch=12 privacy.epsilon=1.5",
    "seeded": "local.batch=0 privacy.noise_seed=3",
    "client": "privacy.unit=client privacy.epsilon=9 codec=int4",
    "secret": "privacy.unit=client privacy.epsilon=9 rounds.fraction=0.8 rounds.minimum=1",
    "adaptive": "privacy.unit=client privacy.epsilon=9 privacy.adapt=true codec=int16",
    "both": "privacy.unit=both privacy.client_epsilon=9 local.batch=0 evaluation.on=clients evaluation.epsilon=4",
    "local": "privacy.unit=local privacy.epsilon=30 codec=int12",
    "shares": "privacy.unit=client privacy.noise=shares privacy.epsilon=9 protect=masked",
    "encrypted-shares": "privacy.unit=client privacy.noise=shares privacy.epsilon=9 protect=encrypted",
    "trusted-shares": "privacy.unit=client privacy.noise=shares privacy.epsilon=9 codec=int8",
    "fixed": "privacy.unit=client privacy.sampling=fixed privacy.epsilon=30 rounds.fraction=0.5",
    "turns": "privacy.unit=client privacy.bands=2 privacy.epsilon=9",
    "masked": "privacy.unit=client privacy.epsilon=9 protect=masked",
    "masked-coordinates": "privacy.unit=client privacy.epsilon=9 protect=masked codec=shared-topk:0.3",
    "masked-secret": "privacy.unit=client privacy.epsilon=9 rounds.fraction=0.97 protect=masked",
    "masked-both": "privacy.unit=both privacy.client_epsilon=9 local.batch=0 rounds.fraction=0.97 protect=masked",
}
"""Settings of short real runs, one of every kind of statement."""


def real_scenario() -> Scenario:
    """A linear task, small enough to be run for real in every kind of privacy."""

    def examples(name: str) -> Examples:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        x = torch.randn(SIZES.get(name, 60), 5, generator=generator)
        return Examples(x, (x.sum(1) > 0).long())

    net = {"net": lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))}
    base = "rounds.number=3 local.rate=0.5 reference.no_privacy=false export.prune=0 privacy.unit=example"
    federation = Federation(SIZES, examples, examples("validation"), examples("test"), examples)
    return Scenario("made", override(Settings(), base), net, lambda _: federation, name="made")


def _run_real(path: Path, text: str, stop_after: int = 99, lose: int = 0) -> dict[str, Any]:
    """Begin the run in `path` or go on with it; raises Stopped after round `stop_after`.

    lose: first reserve this round and forget it, as a kill in it would.
    """
    scenario, again = real_scenario(), path.exists()
    settings = override(scenario.settings, f"{text} run.state={path.parent / 'state'}")
    with RunFolder.open(path) if again else RunFolder.create(path, "made", settings) as folder:

        def stop() -> bool:
            return len(folder.rows()) == stop_after

        prepared = job.prepare(scenario, settings, folder, EmbeddedFleet, Quiet(), stop)
        if lose:
            prepared.accounts.reserve(lose, {name: costs[0].steps for name, costs in prepared.accounts.asks.items()})
            prepared = job.prepare(scenario, settings, folder, EmbeddedFleet, Quiet(), stop)
        return job.run(prepared)


class Said(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def umbel(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """umbel(*words) -> what `umbel WORDS` comes to, in this process."""

    def said(*words: str) -> Said:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["umbel", *words])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return Said(int(ended.value.code or 0), *capsys.readouterr())

    return said


@pytest.fixture(scope="session")
def run_real() -> Callable[..., dict[str, Any]]:
    """run_real(path, settings, stop_after=99, lose=0) -> report.json of a real run; its ledger lies beside `path`."""
    return _run_real


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> RealRun:
    """real_run(kind) -> the folder of a real run of REAL[kind], the same for every test: to be read, not changed."""
    made: dict[str, Path] = {}

    def one(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            _run_real(made[kind], REAL[kind])
        return made[kind]

    return one


@pytest.fixture
def own_run(real_run: RealRun, tmp_path: Path) -> RealRun:
    """own_run(kind) -> a copy of such a run that a test may change; its ledger is still where it was."""

    def copied(kind: str) -> Path:
        shutil.copytree(real_run(kind), tmp_path / kind)
        return tmp_path / kind

    return copied


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """write_run(name="run", change="", clients=20, rounds=35, ...) -> a run folder in tmp_path."""
    return lambda name="run", **of: write(tmp_path / name, **of)


def write(
    folder: Path,
    *,
    scenario: str = "digits",
    change: str = "",
    clients: int = 20,
    rounds: int = 35,
    recover: int = 3,
    seed: int = 0,
    unit: str = "example",
    why_not: str = "",
    simulated: bool = False,
    accuracy: float | None = 0.931,
    status: str = "done",
    evaluated_by: str = "server",
    **patch: Any,
) -> Path:
    """A run of digits, shaped as such runs are; `patch` replaces whole sections of report.json."""
    rng = np.random.default_rng(seed)
    parameters = 4810
    initial = load("digits").settings
    settings = override(initial, f"privacy.unit={unit} rounds.number={rounds} fleet.clients={clients} {change}")
    changed = {n: v for (n, v, _), (_, old, _) in zip(knobs(settings), knobs(initial), strict=True) if v != old}
    names = [f"client-{i:0{len(str(clients - 1))}}" for i in range(clients)]
    folder.mkdir(parents=True)

    rows = []
    for number in range(1, rounds + recover + 1):
        late = [names[-1]] if simulated and clients > 1 and number % 3 == 0 else []
        skipped = [{"name": names[0], "reason": "offline"}] if simulated and clients > 1 and number % 2 == 0 else []
        rejected = (
            [{"name": names[clients // 2], "reason": "update holds NaN <b>"}] if number == 7 and clients > 2 else []
        )
        good = clients - len(late) - len(skipped) - len(rejected)
        best = accuracy or 0.9
        reached = (
            best - 0.75 * math.exp(-number / 6) + 0.008 * rng.standard_normal() if number <= rounds else best - 0.03
        )
        rows.append(
            {
                "round": number,
                "phase": "train" if number <= rounds else "recover",
                "cohort": names,
                "replies": good,
                "rejected": rejected,
                "late": late,
                "skipped": skipped,
                "applied": number != 11,
                "loss": None
                if accuracy is None
                else 0.3 + 2 * math.exp(-number / 8) + 0.01 * float(rng.standard_normal()),
                "accuracy": None if accuracy is None else float(np.clip(reached, 0, 1)),
                "worst_client_accuracy": None,
                "epsilon": settings.privacy.epsilon * math.sqrt(number / (rounds + recover))
                if unit != "none"
                else None,
                "bytes_up": good * parameters * 4,
                "bytes_down": (clients - len(skipped)) * parameters * 4,
                "simulated_seconds": 2.5 * number if simulated else None,
                "seconds": 0.41,
            }
        )
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    account = [
        {
            "name": name,
            "examples": int(20 + rng.integers(100)),
            "epsilon": settings.privacy.epsilon * (1 - 0.05 * float(rng.beta(1, 9))),
            "epsilon_rdp": 8.71,
            "delta": 0.001,
            "noise_multiplier": 4.213,
            "sampling_rate": 1.0,
            "steps": rounds + recover,
            "rounds": rounds + recover,
        }
        for name in names
    ]
    epsilons = sorted(client["epsilon"] for client in account)
    private = unit != "none"
    report = {
        "schema": 1,
        "umbel_version": "0.1.0",
        "status": status,
        "scenario": scenario,
        "summary": "handwritten digits, 20 clients, example-level DP at epsilon 8 (bundled data)",
        "model": "mlp",
        "seed": seed,
        "rounds": rounds,
        "parameters": parameters,
        "final": {
            "accuracy": accuracy,
            "loss": None if accuracy is None else 0.2841,
            "worst_client_accuracy": 0.71 if evaluated_by == "clients" else None,
            "evaluated_by": evaluated_by,
            "reason": None if accuracy is not None else "nobody holds test data",
        },
        "reference": {
            "central_accuracy": 0.9722,
            "central_reason": None,
            "no_privacy_accuracy": 0.9611 if private else None,
            "no_privacy_reason": None if private else "the run itself has no privacy",
        },
        "privacy": {
            "unit": unit,
            "guarantee": private and not why_not,
            "why_not": why_not or (None if private else "no privacy was asked for (privacy.unit=none)"),
            "epsilon": settings.privacy.epsilon if private else None,
            "accountant": "PLD of dp-accounting (pessimistic); Opacus' RDP beside it" if private else None,
            "adjacency": "data sets that differ by adding or removing one example" if private else None,
            "delta_rule": "1 / (10 x the client's examples)" if private else None,
            "clip": 0.5 if private else None,
            "clients": account if private else [],
            "worst_epsilon": epsilons[-1] if private else None,
            "median_epsilon": epsilons[len(epsilons) // 2] if private else None,
            "not_covered": [
                "The number of examples of each client, which the server sees.",
                "A person with many examples: each of them is protected, not all together.",
            ],
        },
        "bytes": {"up": sum(row["bytes_up"] for row in rows), "down": sum(row["bytes_down"] for row in rows)},
        "fleet": {
            "profile": "edge" if simulated else "equal",
            "clients": clients,
            "deadline": 2.5 if simulated else 0,
            "simulated_seconds": rows[-1]["simulated_seconds"],
            "left_out": [],
            "runtime": "embedded",
        },
        "edge": {
            "accuracy": 0.925,
            "rule": "the fastest of those that lose at most 0.02 validation accuracy against fp32",
            "variants": [
                variant("unpruned fp32", 21_400, 7.9, 0.931, "slower than pruned fp32", 3e-7),
                variant("unpruned int8", 9_870, 13.4, 0.928, "slower: quantizing costs more than it saves here", 0.31),
                variant("pruned fp32", 11_200, 6.1, 0.925, "fastest within the tolerance", 2e-7, chosen=True),
                variant("pruned int8", None, None, None, "not shipped: quantization failed", None),
            ],
            "recovery": "3 federated rounds after pruning, under the same account",
        },
        "versions": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "flwr": "1.41.0",
            "opacus": "1.6.0",
            "onnxruntime": "1.31.0",
        },
        "settings": {name: value for name, value, _ in knobs(settings)},
        "changed": changed,
        "seeds": "split, partition and initialization come from run.seed; privacy noise never does",
        "seconds": {"rounds": 15.6, "references": 8.2, "export": 6.9, "total": 31.4},
    }
    (folder / "report.json").write_text(json.dumps(report | patch))
    return folder


def variant(
    name: str,
    size: int | None,
    latency: float | None,
    accuracy: float | None,
    reason: str,
    difference: float | None,
    chosen: bool = False,
) -> dict[str, Any]:
    return {
        "name": name,
        "file": f"edge/{name.replace(' ', '-')}.onnx" if size else None,
        "bytes": size,
        "latency_us": latency,
        "load_ms": 1.4 if size else None,
        "accuracy": accuracy,
        "validation_accuracy": accuracy,
        "max_abs_diff": difference,
        "macs": 4736,
        "chosen": chosen,
        "reason": reason,
    }
