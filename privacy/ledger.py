"""Ledger: what may have left a client, written down and fsynced before its data is touched.

Guarantee: a round whose result was lost still counts. `reserve` is durable before any task goes out; whoever reopens
the ledger after a crash finds every reservation that no committed round answers for.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from privacy.refused import Refused


class Ledger:
    """One append-only file of reservations, a JSON object a line: {"round": 3, "steps": {"client-01": 4}}."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def reserve(self, round_number: int, steps: Mapping[str, int]) -> None:
        """Record, durably, that each client may now run that many steps of its mechanism in this round."""
        line = json.dumps({"round": round_number, "steps": dict(sorted(steps.items()))}) + "\n"
        whole = self._path.read_bytes() if self._path.exists() else b""
        with self._path.open("r+b" if whole else "wb") as file:
            file.seek(whole.rfind(b"\n") + 1)  # a line torn by a crash was never durable: no task went out for it
            file.truncate()
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self._path.parent)

    def unanswered(self, committed: int) -> Counter[str]:
        """Steps by client that were reserved for rounds after the last committed one: they count as spent.

        Raises Refused when a whole line cannot be read: a damaged ledger must not forget.
        """
        spent: Counter[str] = Counter()
        if not self._path.exists():
            return spent
        *lines, _torn = self._path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if entry["round"] > committed:
                    spent.update({str(name): int(count) for name, count in entry["steps"].items()})
            except (ValueError, KeyError, TypeError, AttributeError):
                raise Refused(f"{self._path} line {number} is damaged: what was spent cannot be known") from None
        return spent


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
