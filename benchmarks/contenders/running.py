"""Running a contender: a fresh process with a folder of its own, watched, measured from outside, ended in time."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tree
from lineup import Contender, Layout

_TIMING = "timing"
"""As in trial.py."""
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Asked:
    """One run that a contender is to make."""

    contender: Contender
    workload: Path
    layout: Layout
    rounds: int
    warmup: int
    device: str = "cpu"
    limit: float = 600.0
    """Seconds after which it is ended."""
    python: str = sys.executable


@dataclass(frozen=True)
class Outcome:
    """What came of it; with a reason nothing did."""

    seconds: float = float("nan")
    """A round, on the clock; the mean of the run's timed rounds."""
    peak_mb: float = float("nan")
    """PSS of the process tree, sampled whenever rounds are not timed."""
    reason: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    """cpu, start_up, import_torch, torch_mb, evaluation_seconds, evaluation_accuracy, rounds …"""
    weights: np.ndarray[Any, Any] | None = None


def run(asked: Asked) -> Outcome:
    """Start it, wait for it, and leave no process behind."""
    with tempfile.TemporaryDirectory(prefix="umbel-bench-", ignore_cleanup_errors=True) as name:
        out, began = Path(name), time.monotonic()
        log = out / "log"
        with log.open("wb") as file:
            command, environment = _command(asked, out, began), _environment(asked)
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
            peak, late = _watched(process, out, began + asked.limit)
        result = out / "result.json"
        if late:
            return Outcome(reason=_reached(out, asked, began), peak_mb=peak)
        if process.returncode or not result.exists():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            return Outcome(reason=f"failed: {lines[-1][:300] if lines else f'exit code {process.returncode}'}")
        more = json.loads(result.read_text())
        return Outcome(more.pop("seconds"), peak, more=more, weights=np.load(out / "weights.npy"))


def _command(asked: Asked, out: Path, began: float) -> list[str]:
    processes, threads = asked.layout
    told = {
        "contender": asked.contender.name,
        "settings": asked.contender.settings,
        "processes": processes,
        "threads": threads,
        "rounds": asked.rounds,
        "warmup": asked.warmup,
        "device": asked.device,
        "began": began,
    }
    flags = [f"--{name}={value}" for name, value in told.items()]
    return [asked.python, str(asked.contender.path), str(asked.workload), str(out), *flags]


def _environment(asked: Asked) -> dict[str, str]:
    threads = str(asked.layout[1])
    sizes = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return {**os.environ, **_QUIET, **sizes, "PFL_PYTORCH_DEVICE": asked.device, "PYTHONWARNINGS": "ignore"}


def _watched(process: subprocess.Popen[bytes], out: Path, end: float) -> tuple[float, bool]:
    """(peak MB of the tree, whether it had to be given up); what is left of the tree in the end is killed."""
    peak, known = 0.0, dict[int, str]()
    try:
        while process.poll() is None and time.monotonic() < end:
            if not (out / _TIMING).exists():
                known |= tree.members(process.pid)
                peak = max(peak, tree.memory(process.pid))
            time.sleep(0.02)
        return peak, process.poll() is None
    finally:
        for pid, started in (known | tree.members(process.pid)).items():
            if started and tree.started(pid) == started:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()


def _reached(out: Path, asked: Asked, began: float) -> str:
    """How far it came in its time."""
    done = out / "done"
    if not done.exists():
        return f"no round in {time.monotonic() - began:.0f} s, start-up included"
    count, seconds = done.read_text().split()
    each = f", {float(seconds) / (int(count) - 1):.2f} s a round" if int(count) > 1 else ""
    return f"{count} of {asked.rounds + asked.warmup} rounds in {time.monotonic() - began:.0f} s{each}"
