"""A search: real runs of several settings, each charged to the ledger; the best on the server's validation data wins.

Validation data are the server's own and no client's, so the score says nothing that the trial's weights do not. In a
secret search the number of trials comes from the system's entropy and all but the winner's folder is deleted.
"""

import copy
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from clients.training import evaluate
from privacy import cohort_noise
from privacy.refused import Refused
from privacy.search import Repetitions
from scenarios import Scenario
from scenarios.settings import Settings
from server import client_rows, launch, planner, report, results, signature
from server import run as job
from server.hazards import hazards
from server.publish import publish
from server.record import RunFolder

ALONE = "reference.central_epochs=0 reference.no_privacy=false"
"""Trials are compared with one another; --set can turn references on again."""
UNTOLD = "a secret search: it would tell how many trials there were"


@dataclass(frozen=True)
class Trial:
    """One run that came to its end."""

    candidate: int
    folder: Path
    validation: float
    """Accuracy of its final weights on the server's validation data."""


def shown(
    scenario: Scenario, reference: str, candidates: Sequence[Settings], trials: int, folder: Path, quiet: bool
) -> Iterator[Trial]:
    """`trials` ordinary runs in folder/1, folder/2 …, the candidates in turn; all are kept.

    Raises job.Stopped where one of them stops, for want of budget or because it was asked to.
    """
    with launch.signals() as stop:
        for number in range(trials):
            candidate = number % len(candidates)
            path = folder / str(number + 1)
            validation = _run(scenario, reference, candidates[candidate], path, stop, quiet)
            yield Trial(candidate, path, validation)


def secret(
    scenario: Scenario, reference: str, candidates: Sequence[Settings], repetitions: Repetitions, folder: Path
) -> Trial | None:
    """A secret number of runs, each of a random candidate; the best of them in `folder`, the others gone.

    None where the number drawn is 0. Raises job.Stopped, and keeps nothing, where a trial stops, or where one begins
    that some account could not pay in full: to show the best so far would be another law of their number, and whom
    the ledger leaves out makes a trial another mechanism, and tells how many came before. Raises Refused for seeded
    noise, which promises nothing, and where an account cannot pay for one trial of some candidate.
    """
    for settings in candidates:
        if settings.privacy.noise_seed is not None:
            raise Refused("privacy.noise_seed promises nothing, so nothing can be claimed for a winner: leave it out")
        if poor := planner.short(scenario, settings):
            raise Refused(
                f"the account of client {poor[0].client} ({poor[0].account.unit}, {poor[0].account.dataset}) pays for "
                f"{poor[0].rounds} of {poor[0].of} rounds of one trial, and a secret search needs all accounts to pay "
                "for every trial in full: lower privacy.epsilon, or search without --secret"
            )
    random = cohort_noise.generator(None)
    workshop, best = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}"), None
    try:
        with launch.signals() as stop:
            for number in range(repetitions.draw(random)):
                candidate = int(random.integers(len(candidates)))
                if planner.short(scenario, candidates[candidate]):
                    raise job.Stopped("a trial could not be paid in full")
                path = workshop / str(number)
                trial = Trial(candidate, path, _run(scenario, reference, candidates[candidate], path, stop, True))
                worse = trial if best and trial.validation <= best.validation else best
                best = best if worse is trial else trial
                if worse:
                    shutil.rmtree(worse.folder)
        if best is None:
            return None
        _withhold(best.folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        best.folder.rename(folder)
        return Trial(best.candidate, folder, best.validation)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _run(
    scenario: Scenario, reference: str, settings: Settings, path: Path, stop: Callable[[], bool], quiet: bool
) -> float:
    """An ordinary run in `path`; returns the validation accuracy of its final weights."""
    with (
        RunFolder.create(path, reference, settings) as folder,
        launch.prepared_job(scenario, settings, folder, stop, quiet) as prepared,
    ):
        job.run(prepared)
        model, held = copy.deepcopy(prepared.node.template), prepared.node.federation.validation
        model.load_state_dict(load_file(path / "weights.safetensors"))
        return evaluate(model, held, scenario.loss)[1] / max(1, len(held.y))


def _withhold(folder: Path) -> None:
    """What in a winner's report adds up over all trials, and so would tell their number, becomes null."""
    whole = client_rows.whole(results.load(folder), folder)
    for client in whole["privacy"]["clients"]:
        for account in (client, client.get("whole"), client.get("tests")):
            if account:
                account.update(epsilon_total=None, delta_total=None)
    if "ledger" in whole["privacy"]:
        whole["privacy"]["ledger"] = {**dict.fromkeys(whole["privacy"]["ledger"]), "reason": UNTOLD}
    untold = {"ledger": None, "ledger_reason": UNTOLD, "run": None, "run_reason": UNTOLD}
    sums = ("earlier_runs", "epsilon_total", "budget", "left")
    stated: dict[str, Any] = whole["statement"]
    stated["identity"] |= untold
    stated["steps"] |= {"lost_rounds": None, "lost_rounds_reason": UNTOLD}
    stated["composition"] |= dict.fromkeys(sums) | {f"{name}_reason": UNTOLD for name in sums}
    stated["reproduction"] |= {"verify_ledger": None, "recompute": None, "reason": UNTOLD}
    stated["interpretation"]["hazards"] = hazards(whole)
    publish(folder, whole, signature.operator_key(whole["settings"]["report.key"]))
    report.write(folder)
