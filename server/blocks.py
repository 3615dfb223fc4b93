"""BlockFleet: the clients of a simulation on Ray, in blocks: one message of many clients to each of Flower's nodes.

A node of such a simulation is a worker that can play any client, so Flower's cost of a node is paid for each worker,
whatever the fleet. Blocks, and the sums of their updates, are those of server/embedded.py; what comes back is checked
block by block. A process that dies at a block is named by its worker, and another one trains it again
(clients/workers.py); where the worker itself died, so does another worker.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from clients import blocks, cohort, messages
from clients.blocks import Block
from clients.records import ArrayRecord, RecordDict
from clients.roster import size
from clients.task import Hello, Reply, Task
from clients.training import Node
from privacy.refused import Refused
from server import embedded, replies
from server.grid import DEATHS, pulled

_ATTEMPTS = 3
"""How often blocks are sent whose worker dies, before their clients are given up for the round."""
_ROLLS, _WAVES = 5, 3
"""How often the living are counted before nobody is, and how often each node is asked then."""
_MOST = 1 << 26
"""Bytes of updates or sums in one answer, where not one block alone has more."""
_POLL, _TYPE = 0.01, f"{MessageType.QUERY}.blocks"
_OVER = 1e-5
"""What rounding may add to the length of a clipped update, as a share."""


@dataclass(frozen=True)
class _Part:
    """Blocks that follow one another, for one message; `first` is the number of the first."""

    first: int
    blocks: Sequence[Block]

    @property
    def clients(self) -> int:
        return sum(map(len, self.blocks))


@dataclass(frozen=True)
class _Sent:
    part: _Part
    node: int
    message: str
    limit: float
    """When, on the monotonic clock, it is too late for an answer."""


class BlockFleet:
    """The clients of `node`'s federation, on the simulated nodes of a Flower grid."""

    def __init__(self, node: Node, grid: Grid, say: Callable[[str], None]) -> None:
        """say: hears of processes that died."""
        self._node, self._settings, self._grid, self._say = node, node.settings, grid, say
        self._weigh = cohort.weigh(node.settings)
        self._roster: Mapping[str, Hello] = {}
        self._nodes, self._alive = list[int](), 0

    def hello(self) -> Mapping[str, Hello]:
        self._roster, self._nodes = embedded.met(self._node), list(self._grid.get_node_ids())
        if not self._nodes:
            raise Refused("there are no simulated nodes: add --federation-config num-supernodes=2")
        self._alive = len(self._nodes)
        return self._roster

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        """One reply a task, in the tasks' order. A node has one message at a time."""
        if not tasks:
            return
        cuts, arrays = cohort.cut(tasks, self._settings.local.block), messages.encode_arrays(tasks[0])
        waiting, tries, dead = deque(self._parts(cuts)), Counter[int](), False
        sent, done = list[_Sent](), dict[int, list[Reply]]()
        for at in range(len(cuts)):
            while at not in done:
                if dead and not sent:
                    dead, self._alive = False, self._living()
                while waiting and not dead and len(sent) < self._alive:
                    sent.append(self._send(waiting.popleft(), arrays, {one.node for one in sent}))
                for one in sent[:]:
                    answer = pulled(self._grid, one.message)
                    if answer is None and time.monotonic() < one.limit:
                        continue
                    sent.remove(one)
                    dead = dead or answer in DEATHS
                    if answer in DEATHS and self._again(one.part, tries):
                        waiting.appendleft(one.part)
                    else:
                        done |= self._read(one.part, answer)
                if at not in done:
                    time.sleep(_POLL)
            yield from done.pop(at)

    def _parts(self, cuts: Sequence[Block]) -> Iterator[_Part]:
        """As many as there are workers, of nearly equal numbers of blocks; more, where an answer would be too large."""
        largest = 8 * len(cuts[0][0].weights) * (1 if self._weigh else max(map(len, cuts)))
        number = max(min(self._alive, len(cuts)), -(-len(cuts) // max(1, _MOST // max(1, largest))))
        ends = [len(cuts) * i // number for i in range(number + 1)]
        for first, end in pairwise(ends):
            yield _Part(first, cuts[first:end])

    def _send(self, part: _Part, arrays: ArrayRecord, busy: Collection[int]) -> _Sent:
        node = next(node for node in self._nodes if node not in busy)
        seconds = self._settings.fleet.wait * part.clients  # as long as they would have one after another
        message = Message(blocks.encode_tasks(part.blocks, arrays), node, _TYPE, ttl=seconds)
        return _Sent(part, node, self._pushed([message])[0], time.monotonic() + seconds)

    def _again(self, part: _Part, tries: Counter[int]) -> bool:
        """Whether blocks whose worker died are sent to another one."""
        tries[part.first] += 1
        again = tries[part.first] < _ATTEMPTS
        what = "which are trained again" if again else "whose clients are left out of the round"
        self._say(f"worker of Ray died in its blocks, {what}")  # of how many clients, a secret draw does not tell
        return again

    def _living(self) -> int:
        """How many workers are alive; those who are not get no message from here on.

        Flower puts what is left of a dead worker back among the idle, on top of them, so that it would get the next
        message as well, and fail at once. Who is alive holds this question for a moment, comes back later than the
        dead, and lies above them: of as many messages as there are living none falls to the dead.
        """
        for _ in range(_ROLLS):
            question = blocks.encode_tasks([], ArrayRecord())
            sent = self._pushed([Message(question, node, _TYPE, ttl=60.0) for node in self._nodes * _WAVES])
            alive, limit = set[str](), time.monotonic() + 60
            while sent and time.monotonic() < limit:
                for message in sent[:]:
                    answer = pulled(self._grid, message)
                    if answer is not None:
                        sent.remove(message)
                    if isinstance(answer, RecordDict):
                        with suppress(ValueError):
                            alive |= set(blocks.decode_said(answer))
                time.sleep(_POLL)
            if alive:
                return min(len(alive), len(self._nodes))
        raise RuntimeError("every worker of the simulation has died")

    def _read(self, part: _Part, answer: RecordDict | str | None) -> dict[int, list[Reply]]:
        """The replies to each block of `part`; where they are garbage, its clients are named with the reason."""
        late = answer is None
        try:
            if not isinstance(answer, RecordDict):
                raise ValueError(answer or "no reply in time")
            for line in blocks.decode_said(answer):
                self._say(line)
        except ValueError as error:
            return {part.first + i: _refused(block, str(error), late) for i, block in enumerate(part.blocks)}
        return {part.first + i: self._block(answer, i, block) for i, block in enumerate(part.blocks)}

    def _block(self, answer: RecordDict, i: int, block: Block) -> list[Reply]:
        try:
            read = blocks.decode_replies(answer, i, block, self._weigh, self._settings)
            self._check_sum(block, read)
        except ValueError as error:
            return _refused(block, str(error))
        return read

    def _check_sum(self, block: Block, read: Sequence[Reply]) -> None:
        """Raises ValueError for a sum that cannot be read: one client in it is no good, or clipping would not allow it.

        Afterwards nobody could be left out of it alone.
        """
        held = [(task, reply) for task, reply in zip(block, read, strict=True) if reply.summand is not None]
        for task, reply in held:
            replies.check(task, reply, size(self._roster, task.client))
        if held and self._settings.privacy.by_client and (total := held[-1][1].summand) and total.total is not None:
            most = sum(task.update_clip for task, _ in held) * (1 + _OVER)
            if (long := float(np.linalg.norm(total.total))) > most:
                raise ValueError(f"a sum of length {long:.3g}, clipped updates make {most:.3g} at most")

    def _pushed(self, outgoing: Sequence[Message]) -> list[str]:
        """Push messages; their ids."""
        self._grid.push_messages(outgoing)
        return [message.metadata.message_id for message in outgoing]


def _refused(block: Block, reason: str, late: bool = False) -> list[Reply]:
    return [Reply(task.round, task.client, reason=reason, late=late) for task in block]
