"""What stands in two places of a report says the same in both."""

from collections.abc import Iterator, Mapping
from typing import Any

from server import provenance


def errors(report: Mapping[str, Any]) -> Iterator[str]:
    """Lines about what does not."""
    stated, privacy, settings = report["statement"], report["privacy"], report["settings"]
    identity, ledger = stated["identity"], privacy["ledger"]
    head = None if ledger["path"] is None else {"sequence": ledger["sequence"], "hash": ledger["hash"]}
    reached = {key: stated["utility"][key] for key in ("accuracy", "without_privacy", "central", "worst_client")}
    final, reference = report["final"], report["reference"]
    pairs: list[tuple[str, Any, Any]] = [
        (
            "statement.identity.settings_digest",
            identity["settings_digest"],
            provenance.sha256(provenance.canonical(settings)),
        ),
        ("statement.identity.ledger", identity["ledger"], head),
        ("statement.identity.run", identity["run"], ledger["run"]),
        ("statement.identity.versions", identity["versions"], report["versions"]),
        ("statement.unit.unit", stated["unit"]["unit"], privacy["unit"]),
        ("settings privacy.unit", settings["privacy.unit"], privacy["unit"]),
        ("seed", report["seed"], settings["run.seed"]),
        ("statement.adjacency.relation", stated["adjacency"]["relation"], privacy["adjacency"]),
        ("statement.delta.rule", stated["delta"]["rule"], privacy["delta_rule"]),
        ("statement.mechanism.clip_at_end", stated["mechanism"]["clip_at_end"], privacy["clip"]),
        ("statement.utility.accuracy", reached["accuracy"], final["accuracy"]),
        ("statement.utility.worst_client", reached["worst_client"], final["worst_client_accuracy"]),
        ("statement.utility.without_privacy", reached["without_privacy"], reference["no_privacy_accuracy"]),
        ("statement.utility.central", reached["central"], reference["central_accuracy"]),
    ]
    if privacy["clients"]:
        pairs += [
            ("statement.mechanism.clip", stated["mechanism"]["clip"], settings["privacy.clip"]),
            ("statement.not_covered.items", stated["not_covered"]["items"], privacy["not_covered"]),
            ("privacy.epsilon", privacy["epsilon"], settings["privacy.epsilon"]),
        ]
    if privacy["unit"] == "both" and not settings["privacy.adapt"]:
        pairs.append(("privacy.update_clip", privacy["update_clip"], settings["privacy.update_clip"]))
    chosen = [variant["accuracy"] for variant in report["edge"]["variants"] if variant["chosen"]]
    pairs.append(("edge.accuracy", report["edge"]["accuracy"], chosen[0] if chosen else None))
    drawn = max(1, round(settings["rounds.fraction"] * report["fleet"]["clients"]))
    if settings["privacy.bands"] > 1:
        drawn = report["fleet"]["clients"] // settings["privacy.bands"]
    pairs.append(("statement.sampling.planned_cohort", stated["sampling"]["planned_cohort"], drawn))
    for name, here, there in pairs:
        if here != there:
            yield f"{name} is {here!r}, elsewhere it is {there!r}"
    for name, value in report["changed"].items():
        if name not in settings or settings[name] != value:
            yield f"changed says {name}={value!r}, settings say otherwise"
    sizes = {entry["file"]: entry["bytes"] for entry in stated["post_processing"]["files"] or []}
    for variant in report["edge"]["variants"]:
        if variant["file"] is not None and sizes.get(variant["file"], variant["bytes"]) != variant["bytes"]:
            yield f"edge variant {variant['name']} has {variant['bytes']} bytes, the statement says otherwise"
