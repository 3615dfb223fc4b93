"""Where the key holder of a run lives, and who brings it and the run's server together before anyone trains."""

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Protocol, runtime_checkable

from clients import encrypting, upload
from clients.task import Hello
from privacy.cohort_noise import CohortNoise
from privacy.holder import Holder, Remote, Unreachable
from privacy.keyholder_process import Process
from privacy.matrix_noise import BandedNoise
from privacy.plan import Plan
from privacy.refused import Refused
from scenarios.settings import Settings
from server import select
from server.accounts import state_folder
from server.encrypted import Encrypted
from server.record import RunFolder
from server.rounds import central_noise


@runtime_checkable
class Reaches(Protocol):
    """A fleet one of whose nodes may be a key holder."""

    def exchange(self, request: bytes) -> bytes:
        """The key holder's answer to `request`. Raises Unreachable."""


def encrypted(
    fleet: object,
    simulated: bool,
    folder: RunFolder,
    roster: Mapping[str, Hello],
    plans: Mapping[str, Plan],
    settings: Settings,
    size: int,
) -> Encrypted:
    """The encrypted sums of a run, its keys dealt. size: entries of an update (P,).

    A simulated run has a key holder of its own, a process beside the server's that ends when the run folder is let go
    of; its keys lie in the state folder, never in the run folder. Devices have theirs among the nodes of `fleet`.
    Raises Refused where keys are missing, open to others, or not to be had.
    """
    before = folder.read_json("protect.json")
    now = {"run": secrets.token_hex(16), "attempt": 0} | (before or {})
    now["attempt"] += 1
    noise = central_noise(plans, settings) if settings.privacy.by_client else None
    assert not isinstance(noise, BandedNoise), "refused by pairs.check"
    try:
        if simulated:
            holder: Holder = _beside(now["run"], before is None, folder, roster, settings, noise)
        else:
            assert isinstance(fleet, Reaches)
            holder = Remote(fleet.exchange)
        made = Encrypted(
            now["run"],
            now["attempt"],
            select.least_summed(len(roster), settings),
            settings.protect,
            holder,
            noise,
            settings.privacy.noise_seed,
        )
        folder.at_close(made.close)
        made.meet(upload.encryption(settings, size), roster)
    except Unreachable as error:
        raise Refused(f"protect=encrypted: {error}") from None
    folder.write_json("protect.json", now)
    return made


def _beside(
    run: str,
    new: bool,
    folder: RunFolder,
    roster: Mapping[str, Hello],
    settings: Settings,
    noise: CohortNoise | None,
) -> Process:
    keys = state_folder(settings.run.state) / "keyholder" / run
    if not new and not keys.exists():
        raise Refused(f"the keys of this run are not in {keys.parent}: bring them back, or name its folder by --state")
    known, least = encrypting.simulated(folder.states, roster), select.least_summed(len(roster), settings)
    told, seeded = asdict(noise) if noise else None, settings.privacy.noise_seed is not None
    holder = Process(keys, known, select.cohort_size(len(roster), settings), least, told, seeded)
    folder.at_close(holder.close)
    encrypting.introduce(folder.states, holder.identity)
    return holder
