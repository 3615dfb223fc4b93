"""Rows of single clients beside the report where they are many; report.json then has their file's digest."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from privacy.durable import sync_folder
from privacy.refused import Refused
from server.spent_file import LISTED

LISTS = (("privacy", "clients"), ("fleet", "left_out"), ("fleet", "unevaluated"))
"""Section and name of each list; its file is NAME.jsonl, of which the section says in NAME_file."""


def put_aside(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """`report` as report.json is to hold it: a list of more than LISTED rows goes into its file, before it."""
    made = {**report}
    for section, name in LISTS:
        if len(rows := made[section][name]) > LISTED:
            aside = _written(folder, f"{name}.jsonl", rows)
            made[section] = {**made[section], name: [], f"{name}_file": aside}
    return made


def whole(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`report` with the rows that were put aside. Raises Refused where a file is missing or another one."""
    made = {**report}
    for section, name in LISTS:
        if (aside := made[section].get(f"{name}_file")) is not None:  # an older Umbel does not say
            made[section] = {**made[section], name: _read(folder / f"{name}.jsonl", aside), f"{name}_file": None}
    return made


def _written(folder: Path, name: str, rows: Sequence[Any]) -> dict[str, Any]:
    partial, digest, size = folder / f"{name}.partial", hashlib.sha256(), 0
    with partial.open("wb") as file:
        for row in rows:
            line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
            digest.update(line)
            size += file.write(line)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / name)
    sync_folder(folder)
    return {"file": name, "rows": len(rows), "bytes": size, "sha256": digest.hexdigest()}


def _read(path: Path, aside: Mapping[str, Any]) -> list[Any]:
    digest, rows = hashlib.sha256(), list[Any]()
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                rows.append(json.loads(line))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} does not read ({type(error).__name__}): it has the report's rows of clients") from None
    if digest.hexdigest() != aside["sha256"] or len(rows) != aside["rows"]:
        raise Refused(f"{path} is not the file that the report speaks of: it was changed, or is of another run")
    return rows
