"""The Ray on which Flower simulates: a running cluster, where RAY_ADDRESS names one, else one of the run's own.

Only Ray's public command is used, as of Flower; both find the cluster by the same variable.
"""

import os
import re
import socket
import subprocess
import time
from dataclasses import dataclass

from clients.workers import available
from privacy.refused import Refused
from scenarios.settings import Settings
from server.superlink import COMMANDS

_PATIENCE = 15.0
"""Seconds in which a cluster that listens has to say what it has."""


@dataclass(frozen=True)
class Cluster:
    """Where the workers of a simulation live."""

    address: str = ""
    """HOST:PORT of a running cluster; empty: a Ray of the run's own, on this machine."""
    cpus: int = 0
    """Of a running cluster."""

    def workers(self, settings: Settings) -> int:
        """How many work at blocks, one CPU each: run.processes, or as many as there are CPUs."""
        if not self.address:
            return available(settings.run.processes)
        if settings.run.processes > self.cpus:
            raise Refused(
                f"run.processes={settings.run.processes} is more than the {self.cpus} CPUs of the Ray cluster at "
                f"{self.address}: the nearest is {self.cpus}; 0 takes them all"
            )
        return settings.run.processes or self.cpus


def found(settings: Settings) -> Cluster:
    """The cluster that RAY_ADDRESS names, which must answer and have room for a run of these settings.

    Raises Refused, within seconds, for one that does not.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Cluster()
    host, _, port = address.rpartition(":")
    if "://" in address or not (address == "auto" or (host and port.isdigit())):
        raise Refused(
            f"RAY_ADDRESS={address} is no address of a Ray cluster: set HOST:PORT, as `ray start --head` prints it, or "
            "leave it empty for a Ray of the run's own"
        )
    if address != "auto":
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise Refused(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start it with `ray start --head`, or "
                "unset RAY_ADDRESS"
            ) from None
    if not (cpus := int(_cpus(address))):
        raise Refused(f"the Ray cluster at RAY_ADDRESS={address} has no CPU for a worker: join a machine to it")
    cluster = Cluster(address, cpus)
    if settings.local.engine == "cohort":
        cluster.workers(settings)
    return cluster


def _cpus(address: str) -> float:
    """The CPUs of the cluster, by `ray status`; one that has just been started does not know at once."""
    limit, said = time.monotonic() + _PATIENCE, "nothing"
    environment = {**os.environ, "NO_COLOR": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    while (left := limit - time.monotonic()) > 0:
        command = [str(COMMANDS / "ray"), "status", "--address", address]
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            break
        if match := re.search(r"[\d.]+/([\d.]+) CPU", done.stdout):
            return float(match[1])
        said = " ".join((done.stdout + done.stderr).split())[-200:] or said
        if done.returncode:
            break
        time.sleep(0.5)
    raise Refused(f"no Ray cluster answers at RAY_ADDRESS={address}: `ray status` says: {said}")
