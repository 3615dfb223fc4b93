"""Child: a process of its own that answers on its standard input and output, and ends with the one that started it."""

import os
import select
import subprocess
import sys
import time
import weakref


class Child:
    """Runs `code` with `arguments`, this process's import path and one byte stream each way.

    When this process ends, by whatever cause, the child's input ends, which is its sign to end. It is in a session of
    its own: Ctrl-C at a terminal is for its parent, which may want to finish a round with it.
    """

    def __init__(self, code: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
            bufsize=0,
            start_new_session=True,
        )
        self.close = weakref.finalize(self, _end, self._process)
        """End it now; else it ends when nobody holds it any more."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def write(self, data: bytes) -> None:
        """All of it. Raises OSError where the child has ended."""
        assert self._process.stdin
        left = memoryview(data)
        while left:
            left = left[self._process.stdin.write(left) :]

    def read(self, length: int, seconds: float) -> bytearray:
        """So many bytes. Raises OSError where the child ends first, or the time is over."""
        assert self._process.stdout
        data, deadline = bytearray(length), time.monotonic() + seconds
        left = memoryview(data)
        while left:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("no answer")
            if not (got := os.readv(self._process.stdout.fileno(), [left])):
                raise BrokenPipeError("it ended")
            left = left[got:]
        return data


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
