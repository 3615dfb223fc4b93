"""Where the key holder of a run lives, and who brings it and the run's server together before anyone trains."""

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Protocol, runtime_checkable

from clients import encrypting, upload
from clients.task import Hello
from privacy.bfv import Parameters
from privacy.cohort_noise import CohortNoise
from privacy.holder import Holder, Remote, Unreachable
from privacy.integers import FEWEST
from privacy.keyholder_process import Process
from privacy.matrix_noise import BandedNoise
from privacy.plan import Plan
from privacy.refused import Refused
from scenarios.settings import Settings, override
from server import gather, select
from server.encrypted import Encrypted
from server.ledger_place import state_folder
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
    Raises Refused where keys are missing, open to others, or not to be had, and for a field that no sum bears.
    """
    parameters = _parameters(settings, plans, size)
    before = folder.read_json("protect.json")
    now = {"run": secrets.token_hex(16), "attempt": 0} | (before or {})
    now["attempt"] += 1
    by_holder = settings.privacy.by_client and not settings.privacy.by_shares
    noise = central_noise(plans, settings) if by_holder else None
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
        made.meet(parameters, roster)
    except Unreachable as error:
        raise Refused(f"protect=encrypted: {error}") from None
    folder.write_json("protect.json", now)
    return made


def _parameters(settings: Settings, plans: Mapping[str, Plan], size: int) -> Parameters:
    """Those of the first round, whose grid has room for the noise of a share, where clients add it.

    Raises Refused with the most protect.bits that fit, where noise makes the difference.
    """

    def fitted(bits: int) -> Parameters:
        fewer = override(settings, f"protect.bits={bits}")
        return upload.encryption(fewer, size, gather.grid(fewer, plans, size, 1, fewer.privacy.update_norm))

    refused = None
    for bits in range(settings.protect.bits, FEWEST - 1, -1):
        try:
            made = fitted(bits)
        except Refused as error:
            refused = refused or error
            continue
        if refused is None:
            return made
        raise Refused(f"{refused}; with room for the noise protect.bits={bits} is the nearest")
    assert refused
    raise refused


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

    def let_go() -> None:
        holder.close()
        for key in keys.glob("*/key") if folder.finished else ():  # an export that opens more sums has new ones dealt
            key.unlink()

    folder.at_close(let_go)
    encrypting.introduce(folder.states, holder.identity)
    return holder
