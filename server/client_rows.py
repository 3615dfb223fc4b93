"""clients.jsonl: the report's rows of single clients where they are many; report.json then has the file's digest."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privacy.durable import sync_folder
from privacy.refused import Refused
from server.spent_file import LISTED

FILE = "clients.jsonl"


def put_aside(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """`report` as report.json is to hold it: of more clients than LISTED the rows go into the file, before it."""
    rows = report["privacy"]["clients"]
    if len(rows) <= LISTED:
        return {**report}
    partial, digest, size = folder / f"{FILE}.partial", hashlib.sha256(), 0
    with partial.open("wb") as file:
        for row in rows:
            line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
            digest.update(line)
            size += file.write(line)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / FILE)
    sync_folder(folder)
    aside = {"file": FILE, "rows": len(rows), "bytes": size, "sha256": digest.hexdigest()}
    return {**report, "privacy": {**report["privacy"], "clients": [], "clients_file": aside}}


def whole(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`report` with the rows that were put aside. Raises Refused where the file is missing or another one."""
    if (aside := report["privacy"].get("clients_file")) is None:  # an older Umbel does not say
        return report
    path, digest, rows = folder / FILE, hashlib.sha256(), list[Any]()
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                rows.append(json.loads(line))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} does not read ({type(error).__name__}): it has the report's rows of clients") from None
    if digest.hexdigest() != aside["sha256"] or len(rows) != aside["rows"]:
        raise Refused(f"{path} is not the file that the report speaks of: it was changed, or is of another run")
    return {**report, "privacy": {**report["privacy"], "clients": rows, "clients_file": None}}
