"""Expansion: the seeds of `shared` become polynomials in a process of its own, which may die alone.

What it is given are seeds, 64 bytes each, and SEAL reads them inside bytes that are built here, so nothing a client
sends is known to crash it. It is native code that reads what came from a stranger all the same.
"""

import os
import select
import subprocess
import sys
import time

import numpy as np

from privacy.bfv import DEGREE, Integers, Parameters
from privacy.encryption import SEED, Expander

_POLYNOMIAL = 8 * DEGREE
_SECONDS = 120.0
_SERVE = "from privacy.expansion import serve; serve()"


class Died(RuntimeError):
    """The worker ended or did not answer; the next call has a new one."""


class Worker:
    """One process, started at first use; `close` ends it."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """None: there is none at present."""
        return self._process.pid if self._process else None

    def expand(self, seeds: bytes) -> Integers:
        """seeds: K x SEED bytes -> (K, N). Raises Died."""
        process = self._process = self._process or self._started()
        assert process.stdin
        assert process.stdout
        data = bytearray(self._parameters.count * _POLYNOMIAL)
        try:
            process.stdin.write(seeds)
            _fill(process.stdout.fileno(), memoryview(data), time.monotonic() + _SECONDS)
        except OSError as error:
            self.close()
            raise Died("the process that expands seeds died of this update") from error
        return np.frombuffer(data, "<u8").reshape(-1, DEGREE).astype(np.uint64, copy=False)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
        return subprocess.Popen(
            [sys.executable, "-c", _SERVE, self._parameters.to_bytes().hex()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )


def serve() -> None:
    """The worker's side: K seeds in, K polynomials out, until its input ends."""
    parameters = Parameters.from_bytes(bytes.fromhex(sys.argv[1]))
    expander = Expander(parameters)
    while seeds := sys.stdin.buffer.read(parameters.count * SEED):
        for start in range(0, len(seeds), SEED):
            sys.stdout.buffer.write(expander.expand(seeds[start : start + SEED]).astype("<u8").tobytes())
        sys.stdout.buffer.flush()


def _fill(pipe: int, data: memoryview, deadline: float) -> None:
    """Read until `data` is full. Raises OSError where the other end closes or the time is over."""
    while data:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError("no answer")
        if not (got := os.readv(pipe, [data])):
            raise BrokenPipeError("it ended")
        data = data[got:]
