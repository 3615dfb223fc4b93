"""Where the key holder of a run lives, and who brings it and the run's server together before anyone trains."""

import secrets
from collections.abc import Mapping

from clients import encrypting, upload
from clients.task import Hello
from privacy.holder import Unreachable
from privacy.keyholder_process import Process
from privacy.refused import Refused
from scenarios.settings import Settings
from server import select
from server.accounts import state_folder
from server.encrypted import Encrypted
from server.record import RunFolder


def beside(folder: RunFolder, roster: Mapping[str, Hello], settings: Settings, size: int) -> Encrypted:
    """The encrypted sums of a simulated run, whose key holder is a process beside the server's.

    Its keys lie in the state folder, never in the run folder; both processes end when the run folder is let go of.
    size: entries of an update (P,). Raises Refused where keys are missing, open to others, or not to be had.
    """
    before = folder.read_json("protect.json")
    now = {"run": secrets.token_hex(16), "attempt": 0} | (before or {})
    now["attempt"] += 1
    keys = state_folder(settings.run.state) / "keyholder" / now["run"]
    if before and not keys.exists():
        raise Refused(f"the keys of this run are not in {keys.parent}: bring them back, or name its folder by --state")
    public = encrypting.simulated(folder.states, roster)
    least = select.least_summed(len(roster), settings)
    try:
        holder = Process(keys, public, select.cohort_size(len(roster), settings), least)
    except Unreachable as error:
        raise Refused(f"protect=encrypted: {error}") from None
    folder.at_close(holder.close)
    encrypting.introduce(folder.states, holder.identity)
    made = Encrypted(now["run"], now["attempt"], least, settings.protect, holder)
    folder.at_close(made.close)
    made.meet(upload.encryption(settings, size), roster)
    folder.write_json("protect.json", now)
    return made
