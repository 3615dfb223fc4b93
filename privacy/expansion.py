"""Expansion: the seeds of `shared` become a sum of polynomials in a process of its own, which may die alone.

It is given seeds, 64 bytes each, and SEAL reads them inside bytes that are built there, so nothing a client sends is
known to crash it. It is native code that reads what came from a stranger all the same. When it dies, the client whose
seeds it had is refused; the sum is kept here, with the seeds that came after it was last fetched.
"""

import contextlib
import sys

import numpy as np

from privacy import coefficients
from privacy.bfv import DEGREE, Integers, Parameters
from privacy.child import Child
from privacy.coefficients import SEED

_EVERY = 16
"""Clients after which the sum is fetched: 200 kB of seeds at 1.7 M entries, and a sixteenth of the cost each."""
_SECONDS = 120.0
_ADD, _TAKE, _CLEAR, _DONE = b"A", b"T", b"C", b"."
_SERVE = "from privacy.expansion import serve; serve()"


class Died(RuntimeError):
    """The worker ended or did not answer; the next call has a new one."""


class Worker:
    """The sum of one round at a time. The process is started at first use; `close` ends it."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._process: Child | None = None
        self.clear()

    @property
    def pid(self) -> int | None:
        """None: there is none at present."""
        return self._process.pid if self._process else None

    def clear(self) -> None:
        """Begin a round."""
        self._total = np.zeros((self._parameters.count, DEGREE), np.uint64)
        self._since: list[bytes] = []
        if self._process:
            with contextlib.suppress(Died):
                self._ask(_CLEAR, len(_DONE))

    def add(self, seeds: bytes) -> None:
        """seeds: K x SEED bytes of one client. Raises Died, and then the sum is what it was."""
        if len(self._since) >= _EVERY:
            self._fetch()
        self._replay()
        self._ask(_ADD + seeds, len(_DONE))
        self._since.append(seeds)

    def total(self) -> Integers:
        """(K, N). Raises Died where two processes in a row died of seeds that were added before."""
        self._fetch()
        return self._total

    def close(self) -> None:
        if self._process:
            self._process.close()
            self._process = None

    def _fetch(self) -> None:
        for last in (False, True):
            try:
                self._replay()
                sums = np.frombuffer(self._ask(_TAKE, self._total.nbytes), "<u8").reshape(self._total.shape)
                break
            except Died:
                if last:
                    raise
        coefficients.add(self._total, sums, self._parameters)
        self._since = []

    def _replay(self) -> None:
        """Have a process that knows what came since the last fetch."""
        if self._process is None:
            self._process = Child(_SERVE, self._parameters.to_bytes().hex())
            for seeds in self._since:
                self._ask(_ADD + seeds, len(_DONE))

    def _ask(self, question: bytes, length: int) -> bytearray:
        assert self._process
        try:
            self._process.write(question)
            return self._process.read(length, _SECONDS)
        except OSError as error:
            self.close()
            raise Died("the process that expands seeds died of this update") from error


def serve() -> None:
    """The worker's side, until its input ends."""
    from privacy.encryption import SeedSum

    parameters = Parameters.from_bytes(bytes.fromhex(sys.argv[1]))
    total = SeedSum(parameters)
    while question := sys.stdin.buffer.read(1):
        if question == _ADD:
            total.add(sys.stdin.buffer.read(parameters.count * SEED))
            sys.stdout.buffer.write(_DONE)
        elif question == _CLEAR:
            total.take()
            sys.stdout.buffer.write(_DONE)
        else:
            sys.stdout.buffer.write(total.take().astype("<u8", copy=False).tobytes())
        sys.stdout.buffer.flush()
