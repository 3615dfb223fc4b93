"""Processes that train blocks, as processes: they end with whoever started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import os, signal
import numpy as np
from clients.task import Reply, Task
from clients.workers import Workers

def work(tasks, _):
    return [Reply(1, task.client, str(os.getpid()).encode()) for task in tasks]

workers = Workers(work, 2, print)
block = [[Task("train", 1, name, np.zeros(3, np.float32), ())] for name in "ab"]
print(*{reply.payload.decode() for replies in workers.map(block) for reply in replies}, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    workers, limit = done.stdout.split(), time.monotonic() + 5
    assert workers
    while (left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < limit:
        time.sleep(0.05)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []
