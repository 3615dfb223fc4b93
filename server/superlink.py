"""SuperLinks: one of our own for a simulation, with all that it starts and stops, or the one that the user runs."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from privacy.refused import Refused

PARENT = "UMBEL_PARENT"
"""The environment variable that tells a simulated run whose it is, so that it ends when that process does."""

COMMANDS = Path(sys.executable).parent
"""Where Flower's commands lie: in the environment that Umbel is installed in."""


@dataclass(frozen=True)
class SuperLink:
    """Where runs are submitted."""

    address: str
    """HOST:PORT."""
    insecure: bool = False
    root_certificates: Path | None = None
    """PEM file with which to check the SuperLink's certificate; None: the system's."""

    @property
    def local(self) -> bool:
        """Whether it runs on this machine, so that its run folders can be read here."""
        return self.address.rpartition(":")[0].strip("[]") in ("127.0.0.1", "localhost", "::1")


@contextmanager
def own(home: Path, ray: str = "") -> Iterator[SuperLink]:
    """A SuperLink for simulations on a free port of this machine, its files in `home`; gone after the block.

    ray: the cluster that they join; empty: a Ray of their own, whatever else runs on this machine.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    link = SuperLink(f"127.0.0.1:{port}", insecure=True)
    command = [str(COMMANDS / "flower-superlink"), "--simulation", "--insecure", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    log = home / "superlink.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**environment(home), PARENT: str(os.getpid()), "RAY_ADDRESS": ray or "local"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C is ours to hear: the run ends its round first
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        limit = time.monotonic() + 60
        while not _healthy(link.address):
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"the SuperLink did not start: {log.read_text(errors='replace')[-300:]}")
            time.sleep(0.1)
        yield link
    finally:
        _end(process, home)


def running(text: str) -> SuperLink:
    """The SuperLink that the user runs: HOST:PORT, or http://HOST:PORT where it has no TLS.

    On this machine a SuperLink without TLS is found out; elsewhere it must be asked for. Its certificate is checked
    with the file that UMBEL_ROOT_CERTIFICATES names, if any. Raises Refused when none answers.
    """
    scheme, separator, rest = text.rpartition("://")
    link = SuperLink(rest.rstrip("/"), insecure=scheme == "http")
    host, _, port = link.address.rpartition(":")
    if scheme not in ("", "http", "https") or bool(scheme) != bool(separator) or not (host and port.isdigit()):
        raise Refused(f"{text!r} is no SuperLink: write HOST:PORT, or http://HOST:PORT where it has no TLS")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise Refused(f"no SuperLink answers at {link.address} ({error}): start it first") from None
    if link.insecure or (link.local and not scheme and _healthy(link.address)):
        return SuperLink(link.address, insecure=True)
    certificates = os.environ.get("UMBEL_ROOT_CERTIFICATES")
    if certificates and not Path(certificates).is_file():
        raise Refused(f"UMBEL_ROOT_CERTIFICATES names {certificates}, which is no file")
    return SuperLink(link.address, root_certificates=Path(certificates).resolve() if certificates else None)


def environment(home: Path) -> dict[str, str]:
    """The variables for Flower and Ray: at home in `home`, quiet, one thread a client, nothing sent to anyone."""
    return {
        **os.environ,
        "PATH": f"{COMMANDS}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _healthy(address: str) -> bool:
    with suppress(OSError, ValueError), urllib.request.urlopen(f"http://{address}/health", timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _die_with_parent() -> None:
    """In the child: be asked to end when the parent dies, even by SIGKILL (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes], home: Path) -> None:
    """End the SuperLink and what it started: they have `home` in their environment (on Linux it can be read)."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    mark, limit = f"FLWR_HOME={home}".encode(), time.monotonic() + 5
    while left := [int(entry.parent.name) for entry in Path("/proc").glob("[0-9]*/environ") if _holds(entry, mark)]:
        if time.monotonic() > limit:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _holds(environ: Path, mark: bytes) -> bool:
    try:
        return mark in environ.read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False
