"""A round's sum under encryption: what the clients encrypt is added as it comes, and the key holder opens the sum."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from clients import encrypting, upload
from clients.task import Hello, Protection, Reply, Task, tests_of
from privacy import frames, packing
from privacy.bfv import Parameters
from privacy.cohort_noise import CohortNoise
from privacy.encrypted_sum import EncryptedSum
from privacy.expansion import Died, Worker
from privacy.holder import Deal, Holder, Unreachable
from privacy.integers import Grid
from privacy.refused import Refused
from scenarios.seeds import derive
from scenarios.settings import Protect
from server.combine import Summed
from server.gather import Ask, Good, summed


class Closed(Exception):
    """A round whose sum stays closed, and why."""


@dataclass
class Encrypted:
    """A `Gather`: the server reads what the key holder opens, one sum a round, and holds no key.

    Where the key holder refuses or is not there, the round is lost and the run goes on.
    """

    run: str
    """The run's name in the protocol."""
    attempt: int
    """Grows with each start of the server, so that no round is tried twice under one number."""
    minimum: int
    """Fewest clients whose sum is opened; the key holder has its own."""
    wanted: Protect
    holder: Holder
    noise: CohortNoise | None = None
    """What the key holder is to put on every sum, under client-level DP; None, too, where clients add it in shares."""
    noise_seed: int | None = None
    """privacy.noise_seed."""
    _deals: dict[Parameters, Deal] = field(default_factory=dict)
    _workers: dict[Parameters, Worker] = field(default_factory=dict)

    def __call__(self, ask: Ask, tasks: Sequence[Task], grid: Grid, good: Good, roster: Mapping[str, Hello]) -> Summed:
        """With a reason where too few came, or the key holder opened nothing."""
        try:
            return self._sum(ask, tasks, grid, good, roster)
        except (Closed, Died, Refused, Unreachable) as error:
            self._deals.clear()  # the next round begins by asking whether there is a key
            return Summed(np.zeros(grid.size), 0.0, 0.0, f"no encrypted sum: {error}")

    def tests(self, minimum: int) -> "Encrypted":
        """What sums the run's test results, of `minimum` clients at the fewest, under keys of their own."""
        assert self.noise is None, "refused by pairs.check"
        return Encrypted(tests_of(self.run), self.attempt, minimum, self.wanted, self.holder)

    def meet(self, parameters: Parameters, roster: Mapping[str, Hello]) -> None:
        """Have keys dealt before anyone trains. Raises Refused where there are none, or not for all of `roster`."""
        deal = self._deal(parameters)
        for name, hello in roster.items():
            if deal.recipients.get(name) != hello.recipient:
                raise Refused(f"protect=encrypted: the key holder knows another key for client {name}, or none")
        if deal.minimum > self.minimum:
            raise Refused(
                f"the key holder opens no sum over fewer than {deal.minimum} clients, the run would ask for one over "
                f"{self.minimum}: set protect.minimum={deal.minimum}"
            )
        if deal.noise != (asdict(self.noise) if self.noise else None):
            raise Refused(
                f"the key holder puts {_noise(deal.noise)} on a sum, this run is planned with "
                f"{_noise(asdict(self.noise) if self.noise else None)}: start `umbel keyholder` with that"
            )

    def close(self) -> None:
        """End the processes that expand seeds."""
        for worker in self._workers.values():
            worker.close()

    def _sum(self, ask: Ask, tasks: Sequence[Task], grid: Grid, good: Good, roster: Mapping[str, Hello]) -> Summed:
        parameters = encrypting.parameters(grid, self.wanted)
        try:
            if len(tasks) < self.minimum:
                raise Closed(f"{len(tasks)} clients were asked, {self.minimum} are the least of a sum that is opened")
            deal = self._deal(parameters)
        except (Closed, Refused, Unreachable) as error:
            list(good((Reply(task.round, task.client, reason=str(error)[:200]) for task in tasks), lambda *_: None))
            raise
        asked = [self._asked(task, grid, parameters, deal) for task in tasks if task.client in deal.letters]
        keys = {task.client: deal.mac_keys[task.client] for task in asked}
        run, number = encrypting.run_name(self.run, parameters), tasks[0].round
        total = EncryptedSum(parameters, deal.key_id, run, number, keys, self._worker(parameters))

        def replies() -> Iterator[Reply]:
            answers = iter(ask(asked))
            for task in tasks:
                stranger = Reply(task.round, task.client, reason="the key holder does not know this client")
                yield next(answers) if task.client in keys else stranger

        def read(task: Task, reply: Reply) -> Task:
            total.add(task.client, reply.payload)
            return task

        sent = list(good(replies(), read))
        if len(sent) < self.minimum:
            raise Closed(f"{len(sent)} updates came, {self.minimum} are the least of a sum that is opened")
        opened = self._open(total, run, tasks[0], grid, deal)
        if self.noise:
            if len(opened) != 8 * (grid.size + 1):
                raise Closed(f"the key holder published {len(opened)} bytes, a sum with noise has 8 a value")
            noisy = np.frombuffer(opened, "<f8")
            try:
                self.noise.check(noisy[:-1], float(noisy[-1]), grid.norm, len(sent))
            except ValueError as error:
                raise Closed(f"the key holder published {error}") from None
            return Summed(noisy[:-1], float(len(sent)), float(noisy[-1]), noised=True)
        try:
            found = packing.unpack(opened, grid.entries, grid.width)
        except ValueError as error:
            raise Closed(f"the key holder published what is no sum: {error}") from None
        said = sum(grid.weigh(upload.weight(task, roster[task.client].examples)) for task in sent)
        if int(found[-2]) != said:
            raise Closed(f"weights add up to {found[-2]}, those of the {len(sent)} clients to {said}: one of them lied")
        try:
            return summed(found, len(sent), grid)
        except ValueError as error:
            raise Closed(f"{error}: one of them lied") from None

    def _open(self, total: EncryptedSum, run: str, task: Task, grid: Grid, deal: Deal) -> bytes:
        """What the key holder publishes of the sum.

        A round that was opened before is not opened again: its answer holds where it is a sum over the same clients of
        updates to the same model, whatever the attempt.
        """
        seen = encrypting.shown(task, grid, self.attempt, self.minimum)
        seed = None if self.noise_seed is None else derive(self.noise_seed, "noise", task.round)
        opened = self.holder.open(run, task.round, total.roster, seen, total.seal(deal.link_key), seed)
        if not frames.verified(deal.identity, opened.signature, opened.statement(run, task.round)):
            raise Closed("the key holder published what it has not signed: it was changed on the way")
        if opened.roster != total.roster:
            raise Closed(f"round {task.round} was opened before, for {len(opened.roster)} other clients")
        known = (encrypting.shown(task, grid, one, self.minimum).hash for one in range(self.attempt, 0, -1))
        if opened.shown not in known:
            raise Closed(f"round {task.round} was opened before, for another model")
        return opened.published

    def _asked(self, task: Task, grid: Grid, parameters: Parameters, deal: Deal) -> Task:
        request = encrypting.request(self.attempt, deal.letters[task.client], deal.public)
        run = encrypting.run_name(self.run, parameters)
        return replace(task, protection=Protection(run, grid.entries, self.minimum, request))

    def _deal(self, parameters: Parameters) -> Deal:
        if parameters not in self._deals:
            run = encrypting.run_name(self.run, parameters)
            self._deals[parameters] = self.holder.deal(run, encrypting.ROUNDS, parameters)
        return self._deals[parameters]

    def _worker(self, parameters: Parameters) -> Worker | None:
        if parameters.trust == "split":
            return None
        if parameters not in self._workers:
            self.close()
            self._workers = {parameters: Worker(parameters)}
        return self._workers[parameters]


def _noise(fields: Mapping[str, float] | None) -> str:
    """As the options of `umbel keyholder`."""
    return (
        " ".join(f"--{name.replace('_', '-')} {value!r}" for name, value in (fields or {}).items())
        or "no noise of its own"
    )
