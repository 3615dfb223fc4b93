"""A trial: one contender's run of one workload in a process of its own, seen from inside: its clock and its commits.

The process prints nothing that counts: what it measured goes to result.json and weights.npy in its own folder.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

_BEGAN = time.monotonic()
import torch  # noqa: E402

_TORCH_SECONDS = time.monotonic() - _BEGAN
import tree  # noqa: E402
from workload import Workload  # noqa: E402

_TORCH_MEMORY = tree.proportional()
TIMING = "timing"
"""A file that exists while rounds are timed: whoever measures memory keeps away."""


class Trial:
    """begin, then committed or mark after every round, then finish."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("workload", type=Path)
        parser.add_argument("out", type=Path)
        parser.add_argument("--contender", required=True)
        parser.add_argument("--settings", default="")
        parser.add_argument("--processes", type=int, default=1)
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--rounds", type=int, default=1)
        parser.add_argument("--warmup", type=int, default=0)
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--began", type=float, default=_BEGAN, help="when the process was asked for")
        parser.add_argument("--rank", type=int, default=0, help="of a contender that starts its own processes so")
        self.told = parser.parse_args()
        self.workload = Workload.read(self.told.workload)
        self.out: Path = self.told.out
        self.rounds: int = self.told.warmup + self.told.rounds
        self._marks: list[float] = []
        self._cpu = self._start = 0.0
        self._measured: dict[str, float] = {}
        torch.set_num_threads(self.told.threads)
        if self.told.device == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # float32 for all alike, as on the processor

    def begin(self) -> None:
        """The first round begins."""
        self._measured["start_up"] = time.monotonic() - self.told.began
        if not self.told.warmup:
            self._start_clock()

    def committed(self, weights: np.ndarray) -> None:
        """The round's weights are there: keep them as durably as Umbel keeps its own."""
        partial = self.out / "weights.partial"
        with partial.open("wb") as file:
            np.save(file, weights)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.out / "weights.npy")
        folder = os.open(self.out, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self.mark()

    def mark(self) -> None:
        """A round is over, durably."""
        self._wait()
        self._marks.append(time.monotonic())
        done = len(self._marks)
        if done == self.rounds:
            self._measured["seconds"] = (self._marks[-1] - self._start) / self.told.rounds
            self._measured["cpu"] = (tree.cpu(os.getpid()) - self._cpu) / self.told.rounds
            (self.out / TIMING).unlink()
        (self.out / "done").write_text(f"{done} {self._marks[-1] - self._marks[0]}")
        if done == self.told.warmup:
            self._start_clock()

    def finish(self, evaluation: dict[str, float], **more: float | str) -> None:
        """Everything is over; evaluation: {seconds, accuracy}."""
        if len(self._marks) != self.rounds:
            raise RuntimeError(f"{len(self._marks)} rounds were committed where {self.rounds} were asked for")
        rounds = np.diff([self._start, *self._marks[self.told.warmup :]])
        found = self._measured | {f"evaluation_{name}": value for name, value in evaluation.items()}
        found |= {"import_torch": _TORCH_SECONDS, "torch_mb": _TORCH_MEMORY, **more}
        if self.told.device == "cuda":
            found["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        (self.out / "result.json").write_text(json.dumps({**found, "rounds": list(rounds)}))

    def _wait(self) -> None:
        """Until the device has done what it was asked to."""
        if self.told.device == "cuda":
            torch.cuda.synchronize()

    def _start_clock(self) -> None:
        self._wait()
        (self.out / TIMING).touch()
        self._cpu = tree.cpu(os.getpid())
        self._start = time.monotonic()
