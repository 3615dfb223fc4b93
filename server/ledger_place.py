"""Where a run's ledger lies, and with it the secret that keys the digests of the run's data."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privacy.durable import secret
from privacy.refused import Refused
from scenarios import Scenario
from scenarios.settings import Settings
from server.record import RunFolder


def of_run(scenario: Scenario, settings: Settings, runtime: str, start: Mapping[str, Any] | None) -> Path:
    """Where the run's ledger lies; a resumed one's where it was, if it is not told elsewhere."""
    if start is None or settings.run.state or start["ledger"]["path"] is None:
        return ledger_path(scenario, settings, runtime)
    return Path(start["ledger"]["path"])


def state_folder(named: str) -> Path:
    """Where ledgers lie: `named` (--state), else UMBEL_STATE, else the platform's folder for state."""
    if chosen := named or os.environ.get("UMBEL_STATE", ""):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/umbel").expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "umbel"


def ledger_path(scenario: Scenario, settings: Settings, runtime: str) -> Path:
    """One ledger for all real devices; simulated ones have one for each data set and scenario, as they are made up."""
    folder = state_folder(settings.run.state)
    if runtime == "deployment":
        return folder / "devices.ledger"
    name = "-".join(dict.fromkeys([scenario.dataset or scenario.name, scenario.name]))
    return folder / "simulations" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.ledger"


def lend_key(folder: RunFolder, settings: Settings) -> None:
    """Key the digests of this run's data by the state folder's secret, so that the ledger can tell when data change."""
    if settings.privacy.unit == "none" or settings.privacy.noise_seed is not None:
        return
    state = state_folder(settings.run.state)
    try:
        secret(folder.states / "key", secret(state / "key"))
    except OSError as error:
        raise Refused(f"{state} cannot be written ({error.strerror}): name another folder by --state") from None
