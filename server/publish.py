"""report.json on disk: its audit brought up to date, its digest, its signature; replaced whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.durable import write_atomic
from privacy.refused import Refused
from server import client_rows, outcome, provenance, signature
from server.hazards import hazards


def publish(folder: Path, report: Mapping[str, Any], key: Ed25519PrivateKey | None) -> dict[str, Any]:
    """Write report.json with `digest`, and report.json.sig where there is a key; returns the report as it was written.

    A signature of other bytes is taken away first, so no moment shows a report beside a signature that is not its own.
    """
    path, report = folder / "report.json", client_rows.put_aside(folder, report)
    signed = None if key is None else signature.public_half(key)
    reproduction = {
        **report["statement"]["reproduction"],
        "signed_by": signed,
        "signed_by_reason": None if signed else outcome.UNSIGNED,
    }
    whole = {**report, "statement": {**report["statement"], "reproduction": reproduction}}
    whole.pop("digest", None)
    whole["digest"] = provenance.digest(whole)
    _write(path, (json.dumps(whole, indent=2) + "\n").encode(), key)
    return whole


def renew(folder: Path, named_key: str = "") -> bool:
    """Take over audit.json, and sign where a key is at hand; True if report.json was written anew.

    named_key: else the run's own report.key, else UMBEL_KEY. A report without a statement, of an older Umbel, stays as
    it is; with a key its bytes are signed.
    Raises Refused for a key that cannot be used, or a report whose digest does not fit: nothing is signed unseen.
    """
    path = folder / "report.json"
    try:
        content = path.read_bytes()
        report = json.loads(content)
        stated = report.get("statement")
    except (OSError, ValueError, AttributeError):
        return False  # whoever reads it next says what is wrong with it
    key = signature.operator_key(named_key or str(report.get("settings", {}).get("report.key", "")))
    if not isinstance(stated, dict):
        if key is not None:
            _write(path, content, key)
        return False
    if report.get("digest") != provenance.digest(report):
        raise Refused(
            f"{path} was changed after it was written, its digest does not fit: `umbel report --check` says more"
        )
    found = outcome.audit(folder)
    fresh = {name: value for name, value in found.items() if name != "command"}
    if all(stated["audit"].get(name) == value for name, value in fresh.items()) and key is None:
        return False
    whole = {**report, "statement": {**stated, "audit": found}}
    checked = hazards(client_rows.whole(whole, folder))
    whole["statement"]["interpretation"] = {**stated["interpretation"], "hazards": checked}
    publish(folder, whole, key)
    return True


def _write(path: Path, content: bytes, key: Ed25519PrivateKey | None) -> None:
    place = signature.beside(path)
    old = path.read_bytes() if path.exists() else None
    if old != content:
        place.unlink(missing_ok=True)
        write_atomic(path, content)
    if key is not None:
        write_atomic(place, signature.sign(content, key))
