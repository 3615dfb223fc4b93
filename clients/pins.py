"""Pins: what the owner of a device demands of every run, in its node config; a server can loosen none of it."""

import re
from collections.abc import Mapping

from clients.task import Task
from privacy.refused import Refused
from scenarios.settings import Protect

Config = Mapping[str, object]

_MODES = ("masked", "encrypted")


def hold_to(config: Config, wanted: Protect) -> None:
    """Refuse settings that hide this node's updates otherwise, or in smaller sums, than its owner allows."""
    if "protect" in config:
        allowed = str(config["protect"]).split()
        if not allowed or not set(allowed) <= set(_MODES):
            raise Refused(f"protect={config['protect']} of the node config is none of {', '.join(_MODES)}, or both")
        if wanted.mode not in allowed:
            raise Refused(
                f"this node's owner lets only {' or '.join(allowed)} updates leave, the run has protect={wanted.mode}"
            )
    _least(config, wanted.minimum)
    if "minimum" in config and wanted.mode == "none":
        raise Refused(
            f"this node's owner lets updates leave in sums of {config['minimum']} clients alone, and the run has "
            "protect=none"
        )


def hold_task_to(config: Config, task: Task) -> None:
    """Refuse a task whose sum may be opened over fewer clients than the owner allows; settings may leave that open."""
    _least(config, task.protection.minimum if task.protection else None)


def _least(config: Config, asked: int | None) -> None:
    if "minimum" not in config:
        return
    least = config["minimum"]
    if type(least) is not int or least < 1:
        raise Refused(f"minimum={least} of the node config is no number of clients: write minimum=10, or leave it out")
    if asked is not None and asked < least:
        raise Refused(f"the server would open a sum of {asked} clients, this node's owner allows {least} at the fewest")


def key_holder(said: str) -> bytes:
    """The public key of the key holder, as this device's owner has it (`keyholder`)."""
    if not re.fullmatch("[0-9a-f]{64}", said):
        raise Refused('protect=encrypted: put what `umbel keyholder` prints, keyholder="KEY", into this node\'s config')
    return bytes.fromhex(said)
