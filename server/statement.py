"""The privacy statement of a run that has ended: its seventeen groups (server/groups.py), filled in."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.task import Hello
from privacy import certificate, cohort_noise
from privacy.plan import Plan
from scenarios import Scenario
from scenarios.settings import Settings
from server import composition, exposure, groups, guarantee, outcome, provenance, select
from server.hazards import hazards
from server.state import Row
from server.wording import Wording, hidden, wording

Group = dict[str, Any]


@dataclass(frozen=True)
class Told:
    """What the statement is made from, beside report.json's other keys."""

    scenario: Scenario
    settings: Settings
    roster: Mapping[str, Hello]
    plans: Mapping[str, Plan]
    rows: Sequence[Row]
    folder: Path


def stated(report: Mapping[str, Any], told: Told) -> dict[str, Any]:
    """`report` with its `statement`; signature and digest are put in when it is written (server.report.publish)."""
    unit = report["privacy"]["unit"]
    why = None
    if not report["privacy"]["clients"]:
        why = "no privacy was asked for (privacy.unit=none)"
    elif _wording(told) is None:
        why = f"privacy.unit={unit} has no description here: what is known stands under privacy.*"
    ledger = report["privacy"]["ledger"]
    beside = composition.beside(ledger["path"], ledger["run"], ledger["sequence"] or 0)
    parts: dict[str, Group] = {
        "identity": _identity(report, told),
        **_words(unit, why, told, report),
        "mechanism": _mechanism(unit, why, told, report),
        "sampling": _sampling(unit, why, told),
        "steps": {
            "planned": guarantee.spread([plan.steps for plan in told.plans.values()]),
            "rounds": len(told.rows),
            "lost_rounds": beside.lost_rounds,
            "lost_rounds_reason": None if beside.lost_rounds is not None else ledger["reason"],
        },
        "delta": {
            "rule": report["privacy"]["delta_rule"],
            "chance": max(((plan.whole or plan).chance for plan in told.plans.values()), default=None),
        },
        "epsilon": _accountant(report),
        "composition": composition.group(report, told.plans, told.rows, told.settings, beside),
        "not_covered": {"items": report["privacy"]["not_covered"] or ["anything: no privacy was asked for"]},
        "post_processing": outcome.post_processing(report, told.folder),
        "audit": outcome.audit(told.folder),
        "utility": outcome.utility(report),
        "interpretation": {"reason": report["privacy"]["why_not"], "sentence": outcome.sentence(report["privacy"])},
        "reproduction": outcome.reproduction(report, told.folder),
    }
    whole = {**report, "statement": {name: _whole(name, part, why) for name, part in parts.items()}}
    for name, fields in guarantee.derived(whole).items():
        for key, value in fields.items():
            into = whole["statement"][name]
            into[key] = {**(into[key] or {}), **value} if key == "adaptive" else value
    whole["statement"]["interpretation"]["hazards"] = hazards(whole)
    return whole


def _whole(name: str, part: Mapping[str, Any], why: str | None) -> Group:
    """The group with every field of its shape; what is not filled is null, for the reason `why`."""
    shape: Any = groups.Statement.model_fields[name].annotation
    blank = {key: None if field.is_required() else field.default for key, field in shape.model_fields.items()}
    return {**blank, "reason": why, **part}


def _identity(report: Mapping[str, Any], told: Told) -> Group:
    ledger, wanted = report["privacy"]["ledger"], told.settings.report
    commit, no_commit = provenance.git_commit()
    head = None if ledger["path"] is None else {"sequence": ledger["sequence"], "hash": ledger["hash"]}
    said = {name: getattr(wanted, name) or None for name in ("curator", "intended_use", "product")}
    return {
        "report": str(uuid.uuid4()),
        "run": ledger["run"],
        "run_reason": ledger["reason"],
        "dataset": told.scenario.dataset or told.scenario.name,
        "data_digest": provenance.data_digest({name: hello.digest for name, hello in told.roster.items()}),
        "versions": report["versions"],
        "git_commit": commit,
        "git_commit_reason": no_commit,
        "settings_digest": provenance.sha256(provenance.canonical(report["settings"])),
        "ledger": head,
        "ledger_reason": ledger["reason"],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **said,
        **{f"{name}_reason": None if text else f"report.{name} is empty" for name, text in said.items()},
    }


def _words(unit: str, why: str | None, told: Told, report: Mapping[str, Any]) -> dict[str, Group]:
    words, by_whom = _wording(told), select.secret(told.settings)
    sees_update = words.server_sees if words else "each client's update, as privacy.* describes it"
    bare = words.server_before_noise if words else True
    protect, wanted = told.settings.protect, told.settings.privacy
    if words is None and protect.mode != "none":
        sees_update = "the exact sum of each round's updates, and no single update"
    parties = [
        ("client", "its own data and the weights of each round", False),
        ("server", sees_update + "; counts, sizes and timing of replies", bare),
        ("aggregator", "the server aggregates: what it sees", bare),
        (
            "key holder",
            *exposure.key_holder(protect, wanted.by_client and not wanted.by_shares, told.settings.sums_tests),
        ),
        ("other clients", *exposure.other_clients(protect, bare)),
        ("report reader", "the model, this report and rounds.jsonl", False),
    ]
    return {
        "unit": {
            "unit": unit,
            "means": words.means if words else None,
            "bound": words.bound if words else None,
            "enforced": words.enforced if words else None,
        },
        "adjacency": {"relation": report["privacy"]["adjacency"], "public": list(words.public) if words else []},
        "trust": {
            "parties": [{"party": who, "sees": sees, "before_noise": noise} for who, sees, noise in parties],
            "adversary": "honest-but-curious: everyone runs this program as it is and may keep and combine all they "
            "see; a server that sends other code is not stopped, a client that lies costs accuracy",
            "participation_secret": by_whom,
        },
        "outputs": {"covered": list(words.covered) if words and not why else []},
    }


def _mechanism(unit: str, why: str | None, told: Told, report: Mapping[str, Any]) -> Group:
    words, wanted = _wording(told), told.settings.privacy
    if why or words is None:
        return {"clip": wanted.clip if told.plans else None, "clip_at_end": report["privacy"]["clip"]}
    multipliers = [plan.mechanism.noise_multiplier for plan in told.plans.values()]
    votes, schedule, adapts = None, "fixed", wanted.by_client and wanted.adapt
    moves = adapts and unit == "client"
    reach = 2.0 if unit == "local" else 1.0  # the sensitivity of an update that may be any other, in clipping norms
    if unit == "client" and report["protect"]["norm"] is not None:
        reach = report["protect"]["norm"] / report["privacy"]["clip"]  # rounding to integers lengthens an update
    if adapts:
        plan = next(iter(told.plans.values()))
        first = (plan.whole or plan).mechanism
        expected = first.sampling_rate * len(told.plans)
        votes = cohort_noise.CohortNoise(first.noise_multiplier, expected, wanted.quantile, 1.0).vote_deviation
        schedule = "" if moves else "of gradients fixed; of updates "
        schedule += (
            f"geometric, towards the {wanted.quantile:g} quantile of the updates' lengths at rate "
            f"{wanted.adapt_rate:g} (Andrew et al. 2021); the noise is that of the norm which clipped"
        )
    return {
        "family": words.family,
        "noise_std": None if moves else guarantee.spread([z * wanted.clip * reach for z in multipliers]),
        "noise_std_reason": "it moves with the clipping norm" if moves else None,
        "clip": wanted.clip,
        "clip_at_end": report["privacy"]["clip"],
        "clip_schedule": schedule,
        "votes_std": votes,
        "votes_std_reason": None if adapts else "the clipping norm is fixed",
        "clip_scope": words.clip_scope,
        "weighting": words.weighting,
        "denominator": words.denominator,
        "dropout": words.dropout,
        "generator": "privacy.noise_seed" if wanted.noise_seed is not None else words.generator,
        "seeded": wanted.noise_seed is not None,
        "precision": words.precision,
    }


def _sampling(unit: str, why: str | None, told: Told) -> Group:
    words, settings = _wording(told), told.settings
    drawn = [len(row["cohort"]) for row in told.rows]
    secret = select.secret(settings)
    cohort = {
        "planned_cohort": float(select.cohort_size(len(told.roster), settings)),
        "actual_cohort": None if secret else guarantee.spread(drawn),
        "actual_cohort_reason": "the draw is a secret: it makes the rounds cheaper" if secret else None,
    }
    if why or words is None:
        return cohort
    return {
        **cohort,
        "kind": _kind(told),
        "empty_batches": words.empty,
        "truncated_batches": "none: a large draw is worked through in parts and noised once",
        "as_assumed": True,
        "assumption": words.assumption,
    }


def _wording(told: Told) -> Wording | None:
    wanted = told.settings.privacy
    words = wording(wanted.unit, wanted.sampling, wanted.bands, wanted.noise, told.settings.protect.mode)
    return words if words is None or wanted.by_shares else hidden(words, wanted.unit, told.settings.protect)


def _kind(told: Told) -> str:
    wanted, mechanisms = told.settings.privacy, [plan.mechanism for plan in told.plans.values()]
    if wanted.bands > 1:
        return f"by turns: every client once in {wanted.bands} rounds"
    if any(mechanism.population for mechanism in mechanisms):
        return "fixed size: so many of all clients, without replacement, anew each round"
    if all(mechanism.sampling_rate == 1 for mechanism in mechanisms):
        return "full: every unit in every step"
    return "Poisson: a coin of its own for every unit and step"


def _accountant(report: Mapping[str, Any]) -> Group:
    clients = report["privacy"]["clients"]
    drawn = "defined where every step is over all units; here they are drawn"
    none = "no privacy was asked for"
    gaussian = all(client["sampling_rate"] == 1 for client in clients)
    silent = "Opacus' PRV accountant gave no answer"
    if any(client["population"] for client in clients):
        silent = "Opacus knows no cohorts of a fixed size"
    apart = none if not clients else "the clients have one account each (privacy.unit=both gives them two)"
    untested = none if not clients else "the clients' test results are not noised (evaluation.epsilon does)"
    return {
        "accountant": report["privacy"]["accountant"],
        "accountant_version": report["versions"]["dp-accounting"] if clients else None,
        "interval": certificate.INTERVAL if clients else None,
        "prv_low_reason": silent if clients else none,
        "prv_high_reason": silent if clients else none,
        "rdp_reason": silent if clients else none,
        "whole_reason": apart,
        "tests_reason": untested,
        "zcdp_rho_reason": None if gaussian else drawn,
        "gdp_mu_reason": None if gaussian else drawn,
        "curve_accountant": guarantee.CURVE_ACCOUNTANT if clients else None,
        "adversaries": guarantee.adversaries(report),
    }
