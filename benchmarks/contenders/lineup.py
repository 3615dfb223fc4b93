"""Who is timed at what, and in which layouts: processes x threads."""

from dataclasses import dataclass
from pathlib import Path

Layout = tuple[int, int]
"""(processes, threads of each)."""
LAYOUTS: tuple[Layout, ...] = ((1, 1), (1, 2), (2, 1))


def shown(layout: Layout) -> str:
    """As it is written in tables."""
    return f"{layout[0]}x{layout[1]}"


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    name: str
    file: str
    workloads: str
    """Letters of those that it can do."""
    layouts: tuple[Layout, ...] = LAYOUTS
    settings: str = ""
    """Umbel's, over those of the workload; {processes} and {threads} stand for the layout's, {device} for its own."""
    peer: bool = False
    devices: tuple[str, ...] = ("cpu",)
    precision: str = "float32"
    """In which it takes products; weights and their steps are in float32 whatever it is."""
    compared: bool = True
    """Whether it trains anything whose weights could be compared; else it runs in the layouts of those that do."""

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(self.file)


LINEUP = (
    Contender("umbel", "umbel_run.py", "ABCDEN", ((1, 1),), "local.device={device}", devices=("cpu", "cuda")),
    Contender(
        "umbel-cohort",
        "umbel_run.py",
        "ABCDEN",
        ((1, 1), (2, 1)),
        "local.engine=cohort run.processes={processes} local.device={device}",
        devices=("cpu", "cuda"),
    ),
    Contender(
        "umbel-cohort-bf16",
        "umbel_run.py",
        "B",
        ((1, 1), (2, 1)),
        "local.engine=cohort run.processes={processes} local.device={device} local.precision=bf16",
        devices=("cpu", "cuda"),
        precision="bf16",
    ),
    Contender("torch-loop", "torch_loop.py", "ABDEN", devices=("cpu", "cuda")),
    Contender("opacus-hooks", "opacus_loop.py", "C", devices=("cpu", "cuda")),
    Contender("opacus-ghost", "opacus_loop.py", "C", devices=("cpu", "cuda")),
    Contender("noise-only", "noise_only.py", "C", devices=("cpu", "cuda"), compared=False),
    Contender("noise-own", "noise_only.py", "C", compared=False),
    Contender("flower", "flower_run.py", "ABDEN", peer=True),
    Contender("pfl", "pfl_run.py", "ABDEN", peer=True),
)
TRUTH = "torch-loop", "opacus-hooks"
"""With whose weights all others are compared: whichever does the workload."""
