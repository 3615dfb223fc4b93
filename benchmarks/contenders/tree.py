"""A process and all that descend from it: their CPU time and their memory, from /proc."""

import os
from collections import defaultdict
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def members(root: int) -> dict[int, str]:
    """`root` and its living descendants -> when each was started, which tells it from a later one of its number."""
    children = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            children[int(fields[1])].append(int(folder.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return {pid: started(pid) for pid in found}


def started(pid: int) -> str:
    """When a process was started, in ticks; empty where it is gone."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def cpu(root: int) -> float:
    """CPU seconds of the tree so far, those of its members' dead children included."""
    used = [fields[11:15] for pid in members(root) if (fields := _stat(pid))]
    return sum(int(ticks) for four in used for ticks in four) / _TICK


def memory(root: int) -> float:
    """MB of the tree now: what a page that several processes share costs is divided among them (PSS)."""
    return sum(proportional(pid) for pid in members(root))


def proportional(pid: int | str = "self") -> float:
    """MB (PSS) of one process; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
