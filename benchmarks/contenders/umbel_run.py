"""umbel, umbel-cohort: rounds of a real run in a run folder of its own, ledger included, without the export."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from trial import Trial

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from privacy.plan import Plan  # noqa: E402
from scenarios import load  # noqa: E402
from scenarios.settings import override  # noqa: E402
from server import launch  # noqa: E402
from server.record import RunFolder  # noqa: E402
from server.rounds import rounds  # noqa: E402
from server.score import NOTHING  # noqa: E402
from server.state import first_state  # noqa: E402


def noiseless(plan: Plan) -> Plan:
    """The plan with nothing drawn on top of the clipped sum, to compare weights by; it promises nothing."""
    return replace(plan, mechanism=replace(plan.mechanism, noise_multiplier=0.0))


def main(trial: Trial) -> None:
    workload, out = trial.workload, trial.out
    os.environ["UMBEL_STATE"] = str(out / "state")
    reference = str(HERE / "umbel_scenario.py")
    scenario = load(reference)
    own = trial.told.settings.format(processes=trial.told.processes, threads=trial.told.threads)
    asked = f"{workload.settings} {own} rounds.number={trial.rounds} model={workload.model}"
    settings = override(scenario.settings, f"{asked} run.data={trial.told.workload.absolute()}")
    with (
        RunFolder.create(out / "run", reference, settings) as folder,
        launch.prepared_job(scenario, settings, folder, lambda: False, True) as job,
    ):
        plans = job.plans
        if workload.unit != "none" and not workload.noise:
            plans = {name: noiseless(plan) for name, plan in plans.items()}
        first = last = first_state(job.node.template, settings)
        if not np.array_equal(first.weights, workload.array("start")):
            raise RuntimeError("the first weights are not those of the other contenders")
        trial.begin()
        journal, nobody = job.accounts, lambda _: NOTHING
        for last, row in rounds(job.fleet, job.roster, plans, first, settings, journal, nobody, job.gathered):  # noqa: B007
            if not row["applied"] or row["rejected"]:
                raise RuntimeError(f"round {row['round']} failed: {row['reason'] or row['rejected'][0]}")
            trial.mark()
        began = time.monotonic()
        accuracy = job.score(last).accuracy
        evaluation = {"seconds": time.monotonic() - began, "accuracy": accuracy or 0.0}
        np.save(out / "weights.npy", last.weights)
        drawn = max((plan.mechanism.noise_multiplier for plan in plans.values()), default=0.0)
        trial.finish(evaluation, noise=drawn)


if __name__ == "__main__":
    main(Trial())
