"""The main job, top to bottom: rounds, references, pruning and recovery, export, report; each part resumes."""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from clients import masking, placement, upload
from clients.device import profile
from clients.task import Hello
from clients.training import Node, digest
from privacy import cohort_noise, dp_sgd, local_noise
from privacy.plan import Plan
from privacy.refused import Refused
from scenarios import Scenario, build_model
from scenarios.numbered import named
from scenarios.settings import Settings
from scenarios.weights import Vector, flatten, layout, unflatten
from server import (
    accounts,
    budget,
    capacity,
    combine,
    engine,
    evaluation,
    key_home,
    ledger_place,
    pairs,
    select,
    signature,
    step,
)
from server import start as start_of_run
from server.accounts import Accounts, Exhausted
from server.gather import Gather, clear, grid
from server.masked import Masked
from server.record import RunFolder, save_named
from server.references import references
from server.rounds import Fleet, rounds
from server.score import NOTHING, scorer
from server.score import check as check_score
from server.spendings import spendings
from server.state import Row, Score, ServerState, final_weights, first_state


class Progress(Protocol):
    """Who watches."""

    def row(self, row: Row) -> None:
        """A round was committed."""

    def status(self, text: str) -> None:
        """What the run does now, between rounds."""

    def note(self, text: str) -> None:
        """What is to be known of the run, and stays to be seen."""


class Stopped(Exception):
    """The run stopped on purpose and can be resumed; the message says why."""


@dataclass(frozen=True)
class Job:
    """What stays the same from the first round of a run to its report."""

    node: Node
    folder: RunFolder
    fleet: Fleet
    roster: Mapping[str, Hello]
    plans: Mapping[str, Plan]
    tests: Mapping[str, Plan]
    """The plans of the clients' test examples, where what is said of them is noised."""
    accounts: Accounts
    committed: ServerState | None
    """The last committed state; None before round 1."""
    progress: Progress
    score: Callable[[ServerState], Score]
    stop: Callable[[], bool]
    runtime: str
    gathered: Gather = clear
    """How sums of integers are read, where updates are protected."""


def run(job: Job) -> dict[str, Any]:
    """Go from the last committed round to the report, report.json, and return it. Raises Stopped when asked to."""
    state = job.committed or first_state(job.node.template, job.node.settings)
    state = _with_lost_rounds(job, state)
    if state.phase == "train":
        if line := engine.said(job.node, job.roster):
            job.progress.note(line)
        state = _federate(job, state)
    _save_weights(job, state)
    compared = job.folder.read_json("references.json")
    if compared is None:
        began = time.monotonic()
        compared = references(job.node, job.runtime, job.progress.status) | {"seconds": time.monotonic() - began}
        job.folder.write_json("references.json", compared)
    if job.stop():
        raise Stopped(f"stopped before the export: `umbel resume {job.folder.path}` goes on")
    return _ship(job, state, compared)


def export(job: Job) -> dict[str, Any]:
    """Prune, recover and ship a finished run's weights again, with what is left of its budget; returns report.json.

    From here to its end the run is unfinished again, and `run` goes on with it: a report that stayed would claim less
    than the recovery rounds of an export that is cut off have spent.
    """
    state, compared = job.committed, job.folder.read_json("references.json")
    if state is None or compared is None:
        raise Refused(f"{job.folder.path} has not come to its export: `umbel resume {job.folder.path}` goes on with it")
    state = replace(state, phase="train", until=state.round)
    job.folder.checkpoint(state, job.folder.rows()[-1], job.folder.ledger_head())
    for name in ("report.html", "report.pdf", "report.json.sig", "report.json"):
        (job.folder.path / name).unlink(missing_ok=True)
    return _ship(job, _with_lost_rounds(job, state), compared)


def prepare(
    scenario: Scenario,
    settings: Settings,
    folder: RunFolder,
    fleet_of: Callable[[Node], Fleet],
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    runtime: str = "embedded",
) -> Job:
    """Meet the fleet and calibrate its noise, or check that a resumed run meets the same fleet with the same data.

    stop: asked after every round. Raises Refused for what cannot work; a new run then leaves nothing behind.
    """
    start, committed = start_of_run.read(folder), folder.committed()
    if start is None and committed is not None:
        raise Refused(f"{folder.path / 'start.json'} is missing: what the run began with cannot be known")
    if start is not None:
        start_of_run.same_settings(start, settings)
    try:
        check(scenario, settings, runtime)
        ledger_place.lend_key(folder, settings)
        node = Node(scenario, settings, scenario.data(settings), folder.states)
        placement.try_out(scenario, settings, node.federation.validation)
        fleet = fleet_of(node)
        progress.status("waiting for the clients' first word")
        before = accounts.heads_before(scenario, settings, runtime, start)
        roster = fleet.hello()
        enough(roster, settings)
        engine.check(node, roster)
        if runtime == "embedded":
            capacity.check(node, roster)
        check_score(node)
        if settings.privacy.by_example:
            dp_sgd.check_apart(node.template, scenario.loss, *node.federation.validation)
        held = {"validation": node.federation.validation, "test": node.federation.test}
        server_data = {name: digest(folder.states, part) for name, part in held.items() if part is not None}
        if start is None:
            progress.status("calibrating noise")
            plans = budget.plans(roster, settings)
            tests = budget.test_plans(roster, settings)
            charged = accounts.prepared(scenario, settings, folder, roster, plans, runtime, None, tests, before)
            roster = start_of_run.write(folder, roster, plans, server_data, settings, charged.evidence())
        else:
            plans = start_of_run.plans(start)
            roster = start_of_run.met_again(start, roster, server_data)
            tests = budget.test_plans(roster, settings)
            charged = accounts.prepared(scenario, settings, folder, roster, plans, runtime, start, tests, before)
        tell = progress.status if runtime == "deployment" else lambda text: None  # elsewhere a stage is over at once
        gathered = _gathered(node, folder, fleet, roster, plans, runtime, tell)
        summed = evaluation.summed(gathered, folder, roster, settings)
        score = scorer(node, fleet, named(roster), tests, charged, summed)
    except Refused:
        if start is None:
            folder.discard()
        raise
    return Job(node, folder, fleet, roster, plans, tests, charged, committed, progress, score, stop, runtime, gathered)


def check(scenario: Scenario, settings: Settings, runtime: str = "embedded") -> None:
    """Refuse names and pairs of settings that cannot work, before anyone is asked."""
    placement.check(settings, runtime)
    upload.check(settings)
    combine.resolve(settings.server)
    step.resolve(settings.server)
    profile(settings.fleet.profile)
    signature.operator_key(settings.report.key)
    model = build_model(scenario, settings)
    if settings.privacy.by_example:
        dp_sgd.check(model)
    pairs.check(settings)
    accounts.check(settings)
    if settings.privacy.unit == "local":
        local_noise.check(model)
    if settings.privacy.by_client:
        cohort_noise.check(model, settings.server.combine, settings.server.normalize)


def enough(roster: Mapping[str, Hello], settings: Settings) -> None:
    """Refuse rounds that could never be applied."""
    drawn = select.cohort_size(len(roster), settings)
    if not drawn:
        raise Refused(f"privacy.bands={settings.privacy.bands} deals {len(roster)} clients into more groups: lower it")
    if drawn < settings.rounds.minimum:
        raise Refused(
            f"rounds.minimum={settings.rounds.minimum} is more than the {drawn} clients a round asks: lower it"
        )
    most = select.most_asked(len(roster), settings)
    if upload.bits(settings) is not None and most > settings.protect.max_clients:
        raise Refused(
            f"a round may sum {most} clients, more than protect.max_clients={settings.protect.max_clients} leaves room "
            f"for: set protect.max_clients={most}"
        )
    if settings.sums_tests and len(roster) > settings.protect.max_clients:
        raise Refused(
            f"an evaluation sums the test results of all {len(roster)} clients (evaluation.on=clients), more than "
            f"protect.max_clients={settings.protect.max_clients} leaves room for: set protect.max_clients={len(roster)}"
        )
    hidden, least = settings.protect.mode != "none", select.least_summed(len(roster), settings)
    if hidden and drawn < masking.LEAST:
        raise Refused(
            f"protect={settings.protect.mode} sums {masking.LEAST} clients or more, of two each knows the other's "
            f"update, and a round asks {drawn}: raise fleet.clients or rounds.fraction, or set protect=none"
        )
    if (hidden or settings.privacy.by_shares) and drawn < least:
        raise Refused(f"protect.minimum={least} is more than the {drawn} clients a round asks: the nearest is {drawn}")
    if settings.privacy.by_shares and select.honest(len(roster), settings) < 1:
        raise Refused(
            f"privacy.colluding={settings.privacy.colluding} leaves no honest client of the {least} that a sum has at "
            f"the fewest (protect.minimum): the nearest is {least - 1}"
        )
    if drawn < (least := combine.least(settings.server)):
        raise Refused(f"server.combine={settings.server.combine} needs {least} replies, a round asks {drawn} clients")


def _gathered(
    node: Node,
    folder: RunFolder,
    fleet: Fleet,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    runtime: str,
    tell: Callable[[str], None],
) -> Gather:
    """How sums are read; every start of the server is an attempt of its own at the rounds to come."""
    settings, size = node.settings, len(flatten(node.template))
    if settings.protect.mode == "encrypted":
        return key_home.encrypted(fleet, runtime != "deployment", folder, roster, plans, settings, size)
    grid(settings, plans, size, 1, settings.privacy.update_norm)  # refused now where no field has room for its noise
    if settings.protect.mode == "none":
        return clear
    before = folder.read_json("protect.json") or {"run": secrets.token_hex(16), "attempt": 0}
    now = {**before, "attempt": before["attempt"] + 1}
    folder.write_json("protect.json", now)
    return Masked(now["run"], now["attempt"], select.least_summed(len(roster), settings), tell)


def _federate(job: Job, state: ServerState) -> ServerState:
    """The rounds of the state's phase; a client that cannot afford one skips it, by name.

    Raises Stopped when the ledger has too few clients left that can pay; recovery then ends early instead.
    """
    settings = job.node.settings

    def score(state: ServerState) -> Score:
        return NOTHING if state.round % settings.evaluation.every else job.score(state)

    try:
        alone = job.runtime == "deployment"
        ran = rounds(job.fleet, job.roster, job.plans, state, settings, job.accounts, score, job.gathered, alone)
        for state, row in ran:
            job.progress.row(row)
            if job.stop():
                raise Stopped(f"stopped after round {state.round}: `umbel resume {job.folder.path}` goes on")
    except Exhausted as who:
        if state.phase == "train":
            raise Stopped(f"stopped before round {state.round + 1}, the budget is spent: {who}") from None
    return state


def _ship(job: Job, state: ServerState, compared: Mapping[str, Any]) -> dict[str, Any]:
    """Prune, recover, export, choose, report."""
    from server import edge, facts, report  # with onnx, matplotlib and accountants: 100 MB that no round needs
    from server.publish import publish
    from server.statement import Told, stated

    began, final = time.monotonic(), final_weights(state)
    recovered, recovery = _recover(job, state, final)
    shipped = edge.ship(job.node, job.folder.path, final, recovered, recovery, job.progress.status)
    after = recovered or state
    scoring = time.monotonic()
    at_end = job.score(replace(after, weights=final, layout=layout(job.node.template)))
    scoring, rows = time.monotonic() - scoring, job.folder.rows()
    seconds = {
        "evaluation": scoring + sum(row.get("seconds_evaluation", 0.0) for row in rows),
        "rounds": sum(row["seconds"] for row in rows),
        "references": compared["seconds"],
        "export": time.monotonic() - began - sum(row["seconds"] for row in rows if row["round"] > state.round),
    }
    job.progress.status("writing the report")
    whole = facts.collect(
        job.node,
        after,
        job.roster,
        job.plans,
        job.tests,
        job.accounts,
        rows,
        at_end,
        compared,
        shipped,
        seconds,
        job.runtime,
    )
    told = Told(job.node.scenario, job.node.settings, job.roster, job.plans, rows, job.folder.path)
    whole = publish(job.folder.path, stated(whole, told), signature.operator_key(job.node.settings.report.key))
    report.write(job.folder.path)
    return whole


def _recover(job: Job, state: ServerState, final: Vector) -> tuple[ServerState | None, str]:
    """(the state after pruning and its recovery rounds, or None where nothing is pruned; what was done, in words)."""
    from server import edge

    wanted, paid = job.node.settings.export.recover_rounds, True
    if state.phase == "train":
        paid = edge.affordable(job.roster, job.plans, state.clients, job.node.settings)
        try:
            state = edge.pruned_state(job.node, state, final, wanted if paid else 0)
        except Refused as reason:
            return None, str(reason)
    if not paid:
        return state, "pruned without recovery: no privacy budget is left"
    if not wanted:
        return state, "pruned without recovery: export.recover_rounds is 0"
    state, first = _federate(job, state), state.until - wanted
    done = sum(row["applied"] for row in job.folder.rows() if row["round"] > first)
    count = f"{done} federated rounds" if done == wanted else f"{done} of {wanted} federated rounds"
    return state, f"pruned, then {count} under the same privacy account"


def _with_lost_rounds(job: Job, state: ServerState) -> ServerState:
    """What an interrupted round may have released counts as spent; seeded noise only repeats the same release."""
    lost = {name: counts for name, counts in job.accounts.unanswered(state.round).items() if any(counts)}
    if not lost:
        return state
    spent = spendings(state.clients, named(job.roster))
    steps, whole = np.array(list(lost.values()), np.int64).T
    clients = spent.lost(spent.places(lost), steps, whole)
    return replace(state, clients=clients, noise=None)  # a new block: privacy/matrix_noise.py


def _save_weights(job: Job, state: ServerState) -> None:
    named = unflatten(final_weights(state), layout(job.node.template))
    save_named(job.folder.path / "weights.safetensors", {name: value.numpy() for name, value in named.items()})
