"""Where the key holder of a run lives, and who brings it and the run's server together before anyone trains."""

import secrets
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from clients import encrypting, upload
from clients.task import Hello
from privacy.holder import Holder, Remote, Unreachable
from privacy.keyholder_process import Process
from privacy.refused import Refused
from scenarios.settings import Settings
from server import select
from server.accounts import state_folder
from server.encrypted import Encrypted
from server.record import RunFolder


@runtime_checkable
class Reaches(Protocol):
    """A fleet one of whose nodes may be a key holder."""

    def exchange(self, request: bytes) -> bytes:
        """The key holder's answer to `request`. Raises Unreachable."""


def encrypted(
    fleet: object, simulated: bool, folder: RunFolder, roster: Mapping[str, Hello], settings: Settings, size: int
) -> Encrypted:
    """The encrypted sums of a run, its keys dealt. size: entries of an update (P,).

    A simulated run has a key holder of its own, a process beside the server's that ends when the run folder is let go
    of; its keys lie in the state folder, never in the run folder. Devices have theirs among the nodes of `fleet`.
    Raises Refused where keys are missing, open to others, or not to be had.
    """
    before = folder.read_json("protect.json")
    now = {"run": secrets.token_hex(16), "attempt": 0} | (before or {})
    now["attempt"] += 1
    try:
        if simulated:
            holder: Holder = _beside(now["run"], before is None, folder, roster, settings)
        else:
            assert isinstance(fleet, Reaches)
            holder = Remote(fleet.exchange)
        made = Encrypted(
            now["run"], now["attempt"], select.least_summed(len(roster), settings), settings.protect, holder
        )
        folder.at_close(made.close)
        made.meet(upload.encryption(settings, size), roster)
    except Unreachable as error:
        raise Refused(f"protect=encrypted: {error}") from None
    folder.write_json("protect.json", now)
    return made


def _beside(run: str, new: bool, folder: RunFolder, roster: Mapping[str, Hello], settings: Settings) -> Process:
    keys = state_folder(settings.run.state) / "keyholder" / run
    if not new and not keys.exists():
        raise Refused(f"the keys of this run are not in {keys.parent}: bring them back, or name its folder by --state")
    known, least = encrypting.simulated(folder.states, roster), select.least_summed(len(roster), settings)
    holder = Process(keys, known, select.cohort_size(len(roster), settings), least)
    folder.at_close(holder.close)
    encrypting.introduce(folder.states, holder.identity)
    return holder
