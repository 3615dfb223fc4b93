"""What came of a run, for its statement: exported files, audit, utility, the meaning in words, how to do it again."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server import groups, guarantee, provenance, results
from server.wording import UNITS

Group = dict[str, Any]
UNSIGNED = "no operator's key was given (--key, report.key, UMBEL_KEY)"


def post_processing(report: Mapping[str, Any], folder: Path) -> Group:
    """Digests of the files with a model in them, and what was done to make them."""
    privacy = report["privacy"]
    holds = bool(privacy["guarantee"])
    why = "made of noised weights and the server's own data" if holds else privacy["why_not"]
    files = [
        {
            "file": path.relative_to(folder).as_posix(),
            "sha256": provenance.sha256(path.read_bytes()),
            "bytes": path.stat().st_size,
            "inherits": holds,
            "why": why,
        }
        for path in provenance.exported(folder)
    ]
    return {
        "files": files,
        "files_reason": None if files else "no model was exported",
        "touched_private_data": False,
        "validation_part": "pruning looks at weights alone; the server's validation part sets the ranges of int8 "
        "models and chooses between variants, without noise. It is the server's own, no client's data: a person "
        "whose example lies in it is not protected by this guarantee",
        "recovery": report["edge"]["recovery"],
    }


def audit(folder: Path) -> Group:
    """The audit group of a run folder: from its audit.json, or null with the reason."""
    keys = [field.alias or name for name, field in groups.Audit.model_fields.items()]
    blank: Group = {**dict.fromkeys(keys), "command": "umbel audit RUN"}
    try:
        found = json.loads((folder / "audit.json").read_bytes())
        known = blank | {key: found.get(key) for key in keys if key not in ("command", "reason")}
        silent = [key for key, value in known.items() if value is None and key != "reason"]
        known["reason"] = f"audit.json does not say: {', '.join(silent)}" if silent else None
        groups.Audit.model_validate(known)
    except FileNotFoundError:
        return blank | {"reason": "not audited"}
    except (OSError, ValueError, AttributeError, RecursionError):
        return blank | {"reason": "audit.json is damaged: audit the run again"}
    return known


def utility(report: Mapping[str, Any]) -> Group:
    """How well it learned, and what was not measured."""
    final, reference = report["final"], report["reference"]
    return {
        "accuracy": final["accuracy"],
        "reason": final["reason"],
        "without_privacy": reference["no_privacy_accuracy"],
        "without_privacy_reason": reference["no_privacy_reason"],
        "central": reference["central_accuracy"],
        "central_reason": reference["central_reason"],
        "worst_client": final["worst_client_accuracy"],
        "worst_client_reason": "known where the clients evaluate and each says how it does (evaluation.on=clients, "
        "protect=none, no evaluation.epsilon)",
        "subgroup_gap_reason": "a scenario does not declare subgroups",
    }


def sentence(privacy: Mapping[str, Any]) -> str:
    """What the account means, for a reader who knows none of the terms."""
    worst = guarantee.costliest(privacy["clients"])
    if worst is None:
        return "Nothing limits what can be learned about anyone's data: no privacy was asked for."
    if not privacy["guarantee"]:
        return f"Nothing is promised: {privacy['why_not']}."
    words = UNITS.get(privacy["unit"])
    whose = words.owner if words else f"one {privacy['unit']}"
    odds = math.exp(min(worst["epsilon"], 700))
    return (
        f"Whoever it holds against and thought it as likely as not that {whose} was in the data can be at most "
        f"{100 * guarantee.posterior(worst['epsilon']):.4g} % sure after seeing everything it covers (the odds change "
        f"by a factor of at most {odds:.3g}), except with a chance of {worst['delta']:.2g}. It is a limit, not a "
        "forecast."
    )


def reproduction(report: Mapping[str, Any], folder: Path) -> Group:
    """Commands that run, verify, recompute and check; publish says who signed."""
    ledger = report["privacy"]["ledger"]
    path = ledger["path"]
    return {
        "run": results.command(report),
        "verify_ledger": None if path is None else shlex.join(["umbel", "ledger", "verify", path]),
        "recompute": None if path is None else shlex.join(["python", "-m", "privacy.recompute", path]),
        "check": shlex.join(["umbel", "report", "--check", f"{folder.name}/report.json"]),
        "reason": ledger["reason"],
        "signed_by_reason": UNSIGNED,
    }
