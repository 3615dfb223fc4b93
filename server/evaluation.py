"""Test results of the clients as one protected sum: the server reads how all do together, and nothing of any one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from clients import encrypting
from clients.task import Hello, Reply, Task
from privacy import exact_counts
from privacy.holder import Unreachable
from privacy.integers import Grid
from privacy.refused import Refused
from scenarios.numbered import named
from scenarios.settings import Settings
from server import select
from server.encrypted import Encrypted
from server.gather import Gather
from server.masked import Masked
from server.record import RunFolder
from server.rounds import Fleet
from server.state import Score, ServerState

Read = TypeVar("Read")


@dataclass(frozen=True)
class SummedTests:
    """How a state's weights do on the test examples of all clients."""

    gathered: Gather
    grid: Grid
    roster: Mapping[str, Hello]
    numbered: Callable[[], int]
    """The number of the next evaluation: no client answers one number twice."""

    def __call__(self, fleet: Fleet, state: ServerState) -> Score:
        """Loss and accuracy over all examples of the sum, without noise; of whom it is not, or why there is none."""
        number, sent, missing = self.numbered(), list[str](), dict[str, str]()
        tasks = [Task("evaluate", number, name, state.weights, state.layout) for name in named(self.roster)]

        def good(replies: Iterable[Reply], read: Callable[[Task, Reply], Read]) -> Iterator[Read]:
            for task, reply in zip(tasks, replies, strict=True):
                try:
                    if reply.reason:
                        raise ValueError(reply.reason)
                    one = read(task, reply)
                except ValueError as error:
                    missing[task.client] = str(error)
                    continue
                sent.append(task.client)
                yield one

        summed = self.gathered(fleet.ask, tasks, self.grid, good, self.roster)
        try:
            if summed.reason is not None:
                raise ValueError(summed.reason)
            found = exact_counts.read(self.grid, summed.total, len(sent), summed.votes)
            if found is None:
                raise ValueError("no test examples")
        except ValueError as error:
            return Score(None, None, missing=missing | dict.fromkeys(sent, str(error)))
        loss, accuracy = found
        return Score(loss, accuracy, missing=missing)


def summed(gathered: Gather, folder: RunFolder, roster: Mapping[str, Hello], settings: Settings) -> SummedTests | None:
    """How test results are summed where `gathered` sums updates; None where they travel without protection.

    Raises Refused where no keys are to be had for their sums.
    """
    if not settings.sums_tests:
        return None
    grid = exact_counts.grid(settings.protect.bits, settings.protect.max_clients)

    def numbered() -> int:
        said = folder.read_json("protect.json") or {}
        now = {**said, "evaluations": said.get("evaluations", 0) + 1}  # on disk before anyone is asked
        folder.write_json("protect.json", now)
        return int(now["evaluations"])

    assert isinstance(gathered, Masked | Encrypted)
    tests = gathered.tests(select.least_evaluated(len(roster), settings))
    if isinstance(tests, Encrypted):
        folder.at_close(tests.close)
        try:
            tests.meet(encrypting.parameters(grid, settings.protect), roster)
        except Unreachable as error:
            raise Refused(f"protect=encrypted: {error}") from None
    return SummedTests(tests, grid, roster, numbered)
