"""The audit of a scenario's or a run's claim: canaries through its own rounds, and attacks on its own data."""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clients import upload
from clients.task import Hello
from privacy import accounting, audit
from privacy.durable import write_atomic
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Scenario
from scenarios.seeds import derive
from scenarios.settings import Settings
from server import budget, report
from server import run as job
from server import start as start_of_run
from server.canaries import Setup
from server.inversion import inversion
from server.membership import membership
from server.probes import PROBES, promised
from server.record import RunFolder
from server.select import round_steps

ATTACKS = ("canaries", "membership", "inversion")
_LEAST, _MOST = 100, 1_000_000
_REBUILT = 10
_METHOD = (
    "one run, canaries in ghost coordinates, each in by a fair coin; estimate after Andrew et al. 2023, lower bound "
    "after Steinke, Nasr and Jagielski 2023 (Bonferroni over the numbers of guesses)"
)
_SAMPLED = "; under sampling the estimate is optimistic: the truth may lie well above it"
RELEASE = (
    "membership and inversion work on the scenario's own examples, on this machine: what they find out is itself a "
    "release, not covered by any epsilon; think before it is published"
)
INVERSION_NOTE = "A failed inversion is no evidence of privacy: noise stops it long before epsilon is small."

Result = dict[str, Any]
"""What `umbel audit --json` prints; docs/audit.md lists its keys."""


class Progress(Protocol):
    """Who watches."""

    def start(self, text: str, total: int) -> Callable[[], None]:
        """A part begins; what is returned is called after each of its `total` steps."""


def begun(folder: Path) -> tuple[str, Settings, dict[str, Any] | None]:
    """(scenario, settings, start.json or None where no round has begun) of a run."""
    with RunFolder.open(folder) as opened:
        name, settings = opened.settings()
        return name, settings, start_of_run.read(opened)


def keep(folder: Path, text: str) -> None:
    """Put the result into the run's folder as audit.json, whole or not; a finished run's report is drawn again."""
    with RunFolder.open(folder) as opened:
        write_atomic(opened.path / "audit.json", text.encode())
        if (folder / "report.json").exists():
            report.write(folder)


def run(
    scenario: Scenario,
    settings: Settings,
    start: Mapping[str, Any] | None,
    attacks: tuple[str, ...],
    canaries: int,
    shadows: int,
    progress: Progress,
    seed: int | None = None,
) -> Result:
    """Audit the claim of `settings`; with start (a run's start.json) that of the run's own plans.

    seed: of coins and shadows, else run.seed. Noise is the system's, as in the run, unless privacy.noise_seed is set.

    Opens no account and spends nothing of any: canaries are nobody's data. Raises Refused for what cannot be audited.
    """
    check(attacks, canaries, shadows)
    job.check(scenario, settings)
    if (unit := settings.privacy.unit) not in PROBES:
        raise Refused(f"there is no audit of privacy.unit={unit}: choose {', '.join(PROBES)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="umbel-audit-") as states:
        setup = _setup(
            scenario, upload.in_the_clear(settings), start, Path(states), settings.run.seed if seed is None else seed
        )
        found = _canaries(setup, canaries if "canaries" in attacks else 0, progress)
        skipped = "not asked for: --attacks canaries,membership,inversion"
        for attack in ("membership", "inversion"):
            found[attack], found[f"{attack}_reason"] = None, skipped
        if "membership" in attacks:
            federations = shadows * (1 if settings.privacy.unit == "none" else 2)
            tick = progress.start(f"membership: {federations} shadow federations", federations)
            found["membership"], found["membership_reason"] = membership(setup, shadows, tick)
        if "inversion" in attacks:
            rebuilt = _REBUILT * (1 if settings.privacy.unit == "none" else 2)
            tick = progress.start("inversion: rebuilding examples", rebuilt)
            found["inversion"], found["inversion_reason"] = inversion(setup, _REBUILT, tick)
            if found["inversion"] is not None:
                found["inversion"]["note"] = INVERSION_NOTE
    return found | {"seconds": time.monotonic() - began}


def check(attacks: tuple[str, ...], canaries: int, shadows: int) -> None:
    """Refuse options that cannot work, before anything is loaded."""
    if unknown := [attack for attack in attacks if attack not in ATTACKS]:
        raise Refused(f"there is no attack {unknown[0]!r}: choose of {', '.join(ATTACKS)}")
    if not attacks:
        raise Refused(f"no attack was named: choose of {', '.join(ATTACKS)}")
    if not _LEAST <= canaries <= _MOST:
        raise Refused(f"--canaries {canaries} is out of range: at least {_LEAST}, at most {_MOST}")
    if not 4 <= shadows <= 1024:
        raise Refused(f"--shadows {shadows} is out of range: at least 4, at most 1024")


def _setup(scenario: Scenario, settings: Settings, start: Mapping[str, Any] | None, states: Path, seed: int) -> Setup:
    """The fleet and its plans: a run's own, or those that a new run would begin with."""
    try:
        data = scenario.data(settings)
    except Refused:
        if start is None:
            raise
        data = None  # a run may have been on devices; its plans are enough for canaries
    if start is not None:
        sizes, plans = dict(start_of_run.sizes(start)), dict(start_of_run.plans(start))
        data = data if data is not None and dict(data.sizes) == sizes else None
    else:
        assert data is not None
        sizes = dict(data.sizes)
        plans = dict(budget.plans({name: Hello(name, size, "") for name, size in sizes.items()}, settings))
    return Setup(scenario, settings, sizes, plans, data, states, seed)


def _history(setup: Setup, name: str, half: str) -> dict[Mechanism, int]:
    """All steps of client `name`'s plan that the rounds come to; by turns they are fewer than the rounds."""
    plan = promised(setup.plans[name], half)
    each = round_steps(setup.settings, setup.sizes[name]) if half == "example" else 1
    return {plan.mechanism: min(plan.steps, setup.rounds * each)}


def _claimed(setup: Setup, name: str, half: str) -> float:
    return accounting.epsilon(_history(setup, name, half), promised(setup.plans[name], half).delta)


def _costliest(setup: Setup, half: str) -> str:
    """The client whose claim is the largest: what the run claims is its epsilon."""
    held = sorted(name for name, size in setup.sizes.items() if size)
    if not held:
        raise Refused(f"no client of {setup.scenario.name} has examples: there is nothing to audit")
    if not setup.plans:
        return held[0]
    if half != "example":  # all share a plan
        return min(setup.plans)
    return max(sorted(setup.plans), key=lambda name: _claimed(setup, name, half))


def _canaries(setup: Setup, count: int, progress: Progress) -> Result:
    """The stable part of the result: the claim, what the canaries say of it, and the verdict.

    Of two promises the one that looks worse comes first, and both stand under `halves`; it fails if either does.
    """
    halves = {half: _half(setup, half, count, progress) for half in PROBES[setup.settings.privacy.unit]}
    if len(halves) == 1:
        return {**next(iter(halves.values())), "halves": None}
    worst = max(halves, key=lambda half: _ratio(halves[half]))
    failed = [half for half in sorted(halves, key=lambda half: half != worst) if halves[half]["verdict"] == "fail"]
    found = {**halves[worst], "unit": setup.settings.privacy.unit, "halves": halves}
    if failed:
        found |= {"verdict": "fail", "reason": f"{failed[0]}: {halves[failed[0]]['reason']}"}
    elif count:
        found["reason"] = f"{worst}: {halves[worst]['reason']}"
    return found


def _ratio(found: Result) -> float:
    """Estimate over claim; before canaries 0."""
    if found["verdict"] == "none":
        return 0.0
    return math.inf if found["estimate"] is None else float(found["estimate"] / found["claimed_epsilon"])


def _half(setup: Setup, half: str, count: int, progress: Progress) -> Result:
    """One promise and its canaries."""
    name = _costliest(setup, half)
    plan = promised(setup.plans[name], half) if setup.plans else None
    claimed = _claimed(setup, name, half) if plan else None
    found: Result = {
        "scenario": setup.scenario.name,
        "unit": half if plan else setup.settings.privacy.unit,
        "client": name if half == "example" else None,
        "claimed_epsilon": claimed,
        "delta": plan.delta if plan else None,
        "estimate": None,
        "lower_bound": None,
        "confidence": audit.CONFIDENCE,
        "verdict": "none",
        "reason": "no canaries were asked for",
        "method": _METHOD,
        "real": None,
        "canaries": count,
        "rounds": setup.rounds,
        "sampling_rate": plan.mechanism.sampling_rate if plan else None,
        "noise_multiplier": plan.mechanism.noise_multiplier if plan else None,
        "seed": setup.seed,
        "histogram": None,
    }
    if not count:
        return found
    coins = np.random.default_rng(derive(setup.seed, "audit", "coins"))
    included = coins.random(count) < 0.5
    which = f"{half} canaries" if len(PROBES[setup.settings.privacy.unit]) > 1 else "canaries"
    tick = progress.start(f"{which}: {count} through {setup.rounds} rounds", setup.rounds)
    ran = PROBES[setup.settings.privacy.unit][half](setup, name, included, tick)
    found |= {"real": ran.real, "histogram": audit.histogram(ran.scores, included)}
    if plan is None or claimed is None:
        separation = audit.separation(ran.scores, included)
        told = "tell all" if math.isinf(separation) else f"lie {separation:.3g} deviations apart"
        return found | {"reason": f"nothing is claimed (privacy.unit=none), and nothing protects: the canaries {told}"}
    said = audit.verdict(ran.scores, included, claimed, plan.delta)
    return found | {
        "estimate": said.estimate if math.isfinite(said.estimate) else None,
        "lower_bound": said.lower_bound,
        "verdict": "pass" if said.passed else "fail",
        "reason": said.reason + (_SAMPLED if plan.mechanism.sampling_rate < 1 else ""),
    }
