"""What runs add up to: other runs that a ledger has on a report's accounts, lost rounds, and what is claimed of all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from privacy.ledger import TESTS, Account, Ledger
from privacy.plan import Mechanism, Plan
from scenarios.settings import Settings
from server import groups, guarantee

Record = dict[str, Any]
_CLAIM = (
    "where steps or the end of this run were chosen by what it released; for runs whose settings were chosen by what "
    "other runs released, such a filter would have to span all of them, and none does"
)


class Beside(NamedTuple):
    """Null where there is no ledger."""

    other_runs: int | None
    """Runs other than this one that reserved anything on its accounts before its report."""
    lost_rounds: int | None
    """Rounds of this run that were reserved and of which nothing was committed: cut off, or no reply was good."""


def beside(path: str | None, run: str | None, sequence: int) -> Beside:
    """Reads the ledger at `path` up to its record `sequence`. Raises Refused for one that does not fit together."""
    if path is None or run is None:
        return Beside(None, None)
    ledger = Ledger(Path(path), keep=True)
    ledger.read()
    reserved = [record for record in (ledger.records or [])[:sequence] if record["kind"] == "RESERVE"]
    mine = {at for record in reserved if record["run"] == run for at in ledger.places(record)}
    theirs = (record for record in reserved if record["run"] != run)
    others = {record["run"] for record in theirs if not mine.isdisjoint(ledger.places(record))}
    return Beside(len(others), _lost(ledger, sequence, run))


def _lost(ledger: Ledger, sequence: int, run: str) -> int:
    """A round's clients are committed together: an attempt of which none was, nor all made void, was cut off."""
    kinds: dict[tuple[int, int], Counter[str]] = {}
    for record in (ledger.records or [])[:sequence]:
        if record.get("run") == run:
            of = [ledger.accounts.account(at) for at in ledger.places(record)]
            if count := sum(not account.dataset.endswith(TESTS) for account in of):  # an evaluation is no round
                kinds.setdefault((record["round"], record["attempt"]), Counter())[record["kind"]] += count
    return sum(not found["COMMIT"] and found["VOID"] < found["RESERVE"] for found in kinds.values())


def histories(ledger: Ledger, sequence: int) -> dict[Account, Counter[Mechanism]]:
    """What every account had spent after that record: each reservation in full, or what settled it says.

    ledger: read, with its records kept.
    """
    found: dict[int, Counter[Mechanism]] = {}
    pending: dict[tuple[Any, ...], tuple[Mechanism, int]] = {}
    for record in (ledger.records or [])[:sequence]:
        if (kind := record["kind"]) not in ("RESERVE", "COMMIT", "VOID"):
            continue  # terms and evidence cost nothing
        name = record["run"], record["round"], record["attempt"]
        for at in ledger.places(record):
            if kind == "RESERVE":
                pending[at, *name] = mechanism, steps = Mechanism(*record["mechanism"]), record["steps"]
                found.setdefault(at, Counter())[mechanism] += steps
            else:
                mechanism, steps = pending.pop((at, *name))
                found[at][mechanism] -= steps - record.get("steps", 0)
    return {ledger.accounts.account(at): history for at, history in found.items()}


def refusals(rows: Sequence[Record]) -> list[Record]:
    """{name, reason, times}: who was refused a round by a budget, most often first. Empty where draws are secret."""
    times: Counter[tuple[str, str]] = Counter(
        (entry["name"], entry["reason"].split(":")[0])
        for row in rows
        for entry in row["skipped"]
        if entry["reason"].startswith(("budget:", "ledger:"))
    )
    ordered = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "reason": reason, "times": count} for (name, reason), count in ordered]


def group(
    report: Mapping[str, Any],
    plans: Mapping[str, Plan],
    rows: Sequence[Record],
    settings: Settings,
    beside: Beside,
) -> Record:
    """The statement's group of that name: this run, the runs beside it, and what may be claimed of all."""
    privacy = report["privacy"]
    no_ledger, refused = privacy["ledger"]["reason"], refusals(rows)
    worst = guarantee.costliest(privacy["clients"])
    plan = plans.get(worst["name"]) if worst else None
    filled: Record = dict.fromkeys(groups.Adaptive.model_fields)
    filled["reason"] = None if plan else "no privacy was asked for"
    if plan:
        filled |= {
            "delta": plan.delta + plan.chance,
            "budget": plan.epsilon,
            "noise_multiplier": plan.mechanism.noise_multiplier,
            "sampling_rate": plan.mechanism.sampling_rate,
            "population": plan.mechanism.population,
            "steps": plan.steps,
            "claim": _CLAIM,
        }
    return {
        "earlier_runs": beside.other_runs,
        "earlier_runs_reason": no_ledger,
        "epsilon_total_reason": no_ledger,
        "budget_reason": no_ledger or "privacy.budget is unset: spending is recorded and nobody refused",
        "left_reason": no_ledger or "there is no budget over runs",
        "refused": refused,
        "refused_reason": None if refused else "nobody was refused, or who was is a secret",
        "evaluation": "nothing: the server evaluated on data of its own"
        if settings.evaluation.on == "server"
        else "the sums of the clients' test results were read without noise and are not covered"
        if settings.sums_tests
        else "the clients' test results left without noise and are not covered"
        if settings.evaluation.epsilon is None
        else "the clients' test results were noised and charged to accounts of their test examples",
        "search": "settings tried in earlier runs on the same ledger are added up one by one in epsilon_total, all "
        "others are not covered; `umbel search` and `umbel plan --trials` say what a search costs",
        "adaptive": filled,
    }
