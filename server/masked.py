"""A round's sum under pairwise masks: the stages of privacy/masks.py as tasks of a fleet."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clients import upload
from clients.masking import view
from clients.task import Hello, Protection, Reply, Task, tests_of
from privacy import masked_sum
from privacy.dealing import Lost
from privacy.frames import Attempt, Rules, Stage, run_id
from privacy.integers import Grid
from server.combine import Summed
from server.gather import Ask, Good, summed

_DOING = {
    Stage.ADVERTISE: "clients show their keys",
    Stage.REVEAL: "clients draw who masks with whom",
    Stage.SHARE: "clients share out what opens their masks",
    Stage.MASK: "clients train and mask",
    Stage.SIGN: "clients sign whose updates are in the sum",
    Stage.UNMASK: "clients take the masks off the sum",
}


@dataclass(frozen=True)
class Masked:
    """A `Gather`: the server reads one sum over all who sent a vector, and nothing of any one of them."""

    run: str
    """The run's name in the protocol."""
    attempt: int
    """Grows with each start of the server, so that no round is tried twice under one number."""
    minimum: int
    """Fewest clients whose sum may be read."""
    tell: Callable[[str], None] = lambda text: None
    """Hears of each stage as it begins; never how many take part, which may be secret."""

    def tests(self, minimum: int) -> "Masked":
        """What sums the run's test results, of `minimum` clients at the fewest."""
        return replace(self, run=tests_of(self.run), minimum=minimum)

    def __call__(self, ask: Ask, tasks: Sequence[Task], grid: Grid, good: Good, roster: Mapping[str, Hello]) -> Summed:
        """With a reason where too few came to the end, or what they sent is no sum of what they were to send."""
        try:
            return self._sum(ask, tasks, grid, good, roster)
        except Lost as error:
            return Summed(np.zeros(grid.size), 0.0, 0.0, f"no masked sum: {error}")

    def _sum(self, ask: Ask, tasks: Sequence[Task], grid: Grid, good: Good, roster: Mapping[str, Hello]) -> Summed:
        gone: dict[str, Reply] = {}
        """What those said who fell out before it was their turn to send a vector."""
        requests: Mapping[str, bytes] = {}
        lost = None
        try:
            if len(tasks) < self.minimum:
                raise Lost(f"{len(tasks)} clients were asked, {self.minimum} are the least of a masked sum")
            rules = Rules(grid.entries, grid.width, self.minimum)
            seen = view(tasks[0], grid)
            attempt = Attempt(run_id(self.run, rules), tasks[0].round, self.attempt, seen)
            identities = {task.client: bytes.fromhex(roster[task.client].identity) for task in tasks}
            server = masked_sum.Server(attempt, rules, identities, list(identities))
            while (requests := server.ask()) and server.stage is not Stage.MASK:
                gone |= self._stage(server, ask, tasks, requests, grid)
        except Lost as error:
            requests, lost = {}, error

        def vectors() -> Iterator[Reply]:
            asked = [self._asked(task, requests, grid) for task in tasks if task.client in requests]
            if asked:
                self._say(tasks, Stage.MASK)
            answers = iter(ask(asked))
            for task in tasks:
                why = str(lost or "it shared keys with too few others")[:200]
                missing = gone.get(task.client) or Reply(task.round, task.client, reason=why)
                yield next(answers) if task.client in requests else missing

        def hear(task: Task, reply: Reply) -> Task:
            server.hear(task.client, reply.payload)
            return task

        sent = list(good(vectors(), hear))
        if lost:
            raise lost
        after: dict[str, Reply] = {}
        """What those said who fell out with their vectors in the sum: if it is opened, nothing is lost."""
        try:
            while requests := server.ask():
                after |= self._stage(server, ask, tasks, requests, grid)
            found = server.result().values
        except Lost as error:
            silent = [f"{name}: {reply.reason}" for name, reply in after.items()]
            raise Lost("; ".join([str(error), *silent[:3]])) from None
        said = sum(grid.weigh(upload.weight(task, roster[task.client].examples)) for task in sent)
        if int(found[-2]) != said:
            raise Lost(f"weights add up to {found[-2]}, those of the {len(sent)} clients to {said}: one of them lied")
        try:
            return summed(found, len(sent), grid)
        except ValueError as error:
            raise Lost(f"{error}: one of them lied") from None

    def _stage(
        self, server: masked_sum.Server, ask: Ask, tasks: Sequence[Task], requests: Mapping[str, bytes], grid: Grid
    ) -> dict[str, Reply]:
        """Send a stage's requests and hear the answers; what those said who gave none, or a bad one, with the reason.

        Who fell out is asked nothing more, so that a node that died costs one wait a round.
        """
        assert server.stage is not None
        self._say(tasks, server.stage)
        nothing = np.empty(0, np.float32)
        bare = [
            replace(task, kind="protect", weights=nothing, layout=(), control=None, coordinates=None, charge=None)
            for task in tasks
            if task.client in requests
        ]
        failed = {}
        for task, reply in zip(bare, ask([self._asked(task, requests, grid) for task in bare]), strict=True):
            try:
                if reply.reason or reply.late:
                    raise ValueError(reply.reason)
                server.hear(task.client, reply.payload)
            except ValueError as error:
                failed[task.client] = Reply(task.round, task.client, reason=str(error)[:200], late=reply.late)
        return failed

    def _say(self, tasks: Sequence[Task], stage: Stage) -> None:
        number, doing = tasks[0].round, _DOING[stage]
        if tasks[0].kind == "evaluate":
            self.tell(f"{doing.replace('train', 'evaluate')}, evaluation {number}")
        else:
            self.tell(f"{doing}, round {number}")

    def _asked(self, task: Task, requests: Mapping[str, bytes], grid: Grid) -> Task:
        said = Protection(self.run, grid.entries, self.minimum, requests[task.client])
        return replace(task, protection=said)
