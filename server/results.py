"""A run that has ended, read back from its folder, and what is said about it in more than one place."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from privacy.refused import Refused
from server import units

Report = dict[str, Any]
"""report.json."""
Row = dict[str, Any]
"""One line of rounds.jsonl."""

SCHEMA = 1
_REPORT_KEYS = {
    "": "status scenario summary model seed rounds parameters umbel_version seeds",
    "final": "accuracy loss worst_client_accuracy evaluated_by reason",
    "reference": "central_accuracy central_reason no_privacy_accuracy no_privacy_reason",
    "privacy": "unit guarantee why_not epsilon worst_epsilon median_epsilon clients "
    "accountant adjacency delta_rule clip not_covered",
    "bytes": "up down",
    "fleet": "profile clients deadline simulated_seconds left_out runtime",
    "edge": "accuracy rule variants",
    "seconds": "rounds references export total",
    "versions": "",
    "settings": "",
    "changed": "",
}
_CLIENT_KEYS = "name examples epsilon epsilon_rdp delta noise_multiplier sampling_rate steps rounds"
_VARIANT_KEYS = "name file bytes latency_us load_ms accuracy validation_accuracy max_abs_diff chosen reason"
_ROW_KEYS = (
    "round phase cohort replies rejected late skipped applied loss accuracy epsilon "
    "bytes_up bytes_down simulated_seconds"
)


def evaluation_share(report: Report) -> float | None:
    """Of a run's time; None in a report of an older Umbel."""
    seconds = report["seconds"]
    known = seconds.get("evaluation") is not None and seconds["total"] > 0
    return seconds["evaluation"] / seconds["total"] if known else None


def load(folder: Path) -> Report:
    """report.json of a run folder, whole. Raises Refused when it is missing, truncated or of another schema."""
    path = folder / "report.json"
    report = _parse(_read(path), str(path))
    if report.get("schema") != SCHEMA:
        raise Refused(
            f"{path} has schema {report.get('schema')}, this Umbel reads {SCHEMA}: use the Umbel that wrote it"
        )
    for section, keys in _REPORT_KEYS.items():
        _require(report.get(section) if section else report, keys, f"{path}: {section or 'report'}")
    for where, keys in (("privacy.clients", _CLIENT_KEYS), ("edge.variants", _VARIANT_KEYS)):
        section, _, name = where.partition(".")
        for entry in report[section][name]:
            _require(entry, keys, f"{path}: {where}")
    return report


def load_rounds(folder: Path) -> list[Row]:
    """The lines of rounds.jsonl in order. Raises Refused when it is missing or one of its lines is not whole."""
    path = folder / "rounds.jsonl"
    rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        rows.append(_parse(line, f"{path} line {number}"))
        _require(rows[-1], _ROW_KEYS, f"{path} line {number}")
    return rows


def chosen(report: Report) -> dict[str, Any] | None:
    """The edge variant that ships as model.onnx; None when there is none."""
    return next((variant for variant in report["edge"]["variants"] if variant["chosen"]), None)


def alarm(report: Report) -> str:
    """What to say in red when privacy.guarantee is false; privacy.why_not says why."""
    return (
        "This run has no differential privacy"
        if report["privacy"]["unit"] == "none"
        else "The privacy guarantee does not hold"
    )


def accuracies(report: Report) -> list[dict[str, Any]]:
    """{name, accuracy, reason} of this run, what it is measured against, and its edge model; None has a reason."""
    final, reference, edge = report["final"], report["reference"], report["edge"]
    held = ", on validation data" if final["evaluated_by"] == "clients" else ""  # the server has no test set
    bars = [
        ("This federation", final["accuracy"], final["reason"]),
        ("The same without privacy", reference["no_privacy_accuracy"], reference["no_privacy_reason"]),
        ("Central, without privacy", reference["central_accuracy"], reference["central_reason"]),
        (f"Edge model{held}", edge["accuracy"], "no edge model was made" if not edge["variants"] else ""),
    ]
    return [{"name": name, "accuracy": accuracy, "reason": reason} for name, accuracy, reason in bars]


def protection(report: Mapping[str, Any]) -> str:
    """How updates travelled and whom that keeps from reading one, in one line; empty for an older Umbel's report."""
    said = report.get("protect")
    if said is None:
        return ""
    each = f"{units.size(said['upload_bytes_per_client'])} a client and round"
    if said["mode"] == "none":
        return f"none: the server reads each update; {each}"
    whose = {"split": ", opened by a key holder", "shared": ", opened by a client: all have the key", None: ""}
    least = f"the server reads sums over at least {said['minimum']} clients{whose[said['trust']]}"
    return f"{said['mode']}: {least}; {said['bits']} bits a value, {each}"


def command(report: Mapping[str, Any]) -> str:
    """The command that makes such a run again, with its seed and what differs from the scenario's own settings."""
    changed = {name: value for name, value in report["changed"].items() if not name.startswith(("run.", "report."))}
    words = " ".join(f"{name}={'' if value is None else shlex.quote(str(value))}" for name, value in changed.items())
    return shlex.join(
        ["umbel", "run", report["scenario"], "--seed", str(report["seed"]), *(["--set", words] if words else [])]
    )


def over(rows: Sequence[Row], x: Sequence[float | None], y: str) -> tuple[list[float], list[float]]:
    """x and row[y] where both are known and finite."""
    pairs = [(at, row[y]) for at, row in zip(x, rows, strict=True) if at is not None and row[y] is not None]
    finite = [(at, value) for at, value in pairs if math.isfinite(value)]
    return [at for at, _ in finite], [value for _, value in finite]


def traffic(rows: Sequence[Row]) -> list[float]:
    """Bytes sent in both directions up to and with each round."""
    return list(accumulate(row["bytes_up"] + row["bytes_down"] for row in rows))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise Refused(
            f"{path} cannot be read ({why}): name the folder of a run that has ended, or `umbel resume` it first"
        ) from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise Refused(
            f"{where} is cut off or damaged ({error.msg}): bring the run folder back from a copy, or run anew"
        ) from None
    if not isinstance(value, dict):
        raise Refused(f"{where} is no JSON object: is this a run folder?")
    return value


def _constant(name: str) -> float | None:
    return math.inf if name == "Infinity" else None  # an epsilon may be infinite; NaN is nothing


def _require(entry: object, keys: str, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise Refused(f"{where} is missing: bring the run folder back from a copy, or run anew")
    missing = [key for key in keys.split() if key not in entry]
    if missing:
        raise Refused(f"{where} lacks {', '.join(missing)}: bring the run folder back from a copy, or run anew")
