"""What a device's own settings say of a run, kept on its disk: a stage of a masked sum then needs no scenario.

On a device every message is a process of its own, and to load a scenario is to load torch. What comes before and after
training in a masked sum needs settings alone, and this node has known them since it said hello.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from privacy.durable import write_atomic
from scenarios.settings import Settings


@dataclass(frozen=True)
class Wanted:
    """What is kept."""

    settings: Settings
    folder: Path
    """Where this node keeps its states of this run."""


def keep(states: Path, run: str, wanted: Wanted) -> None:
    """Keep `wanted` in the folder `states`; `run`: a digest of all that it follows from."""
    if kept(states, run) != wanted:
        said = {"folder": str(wanted.folder), "settings": wanted.settings.model_dump(mode="json")}
        write_atomic(_file(states, run), json.dumps(said).encode(), private=True)


def kept(states: Path, run: str) -> Wanted | None:
    """What was kept for this `run`; None where it was not, or does not read."""
    try:
        said = json.loads(_file(states, run).read_text())
        return Wanted(Settings.model_validate(said["settings"]), Path(said["folder"]))
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def _file(states: Path, run: str) -> Path:
    return states / f"{run}.wanted"
