"""GridFleet: the clients on the nodes of a Flower grid, simulated ones or real devices."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from clients import greetings, messages
from clients.task import Hello, KeyNode, Reply, Task
from privacy.holder import Unreachable
from privacy.refused import Refused
from server.run import Stopped

_Key = TypeVar("_Key")

_AHEAD = 32
"""Replies that may wait for their turn, so that memory holds so many payloads and not a whole cohort's."""

_TYPES = {
    "train": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
    "protect": f"{MessageType.QUERY}.protect",
    "keyholder": f"{MessageType.QUERY}.keyholder",
}

# Flower's error codes (ErrorCode); a node's own text may quote its data, so it is not passed on.
_ERRORS = {
    1: "its node cannot load Umbel: is the same version of its dependencies installed there?",
    2: "Umbel failed on its node",
    3: "its node did not fetch the task in time",
    4: "its reply is lost",
    5: "its node is gone",
    8: "its process died",
}
_FAILED = "its node failed"
DEATHS = (_ERRORS[8], _FAILED)
"""What is said of a process that died: on devices the first, of Flower's simulation the second."""


@dataclass
class _Sent:
    """A task on its way."""

    task: Task
    limit: float
    """When, on the monotonic clock, it is too late for a reply."""
    message: str = ""
    """The id of its message; empty while its node is not there."""


class GridFleet:
    """The clients on the nodes of a Flower grid; node ids are known here and nowhere else.

    expected: the names of the clients, or none where only the nodes know them; then `number` of them are waited for.
    wait: seconds to wait for the nodes at first, and for a reply to a task that has no deadline.
    stop: asked while waiting for the nodes.
    """

    def __init__(
        self,
        grid: Grid,
        expected: Collection[str],
        number: int,
        wait: float,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._grid, self._expected, self._wait, self._stop = grid, frozenset(expected), wait, stop
        self._number = len(self._expected) or number
        self._nodes: dict[str, int] = {}  # client -> its node
        self._roster: dict[str, Hello] = {}
        self._greeted: dict[int, str] = {}  # node -> the message that greets it, "" once it is answered
        self._absent: dict[int, str] = {}  # node -> why it cannot take part
        self._here: frozenset[int] = frozenset()
        self._holders: dict[int, str] = {}  # node of a key holder, in the order in which they came -> its public key
        self._simulated = 0  # how many nodes Flower simulates; 0: they are devices

    def hello(self) -> Mapping[str, Hello]:
        """Every client by name. Raises Refused when they are not there in time, Stopped when asked to stop."""
        limit, pause = time.monotonic() + self._wait, _Pause()
        while len(self._roster) < self._number:
            heard = self._greet(limit - time.monotonic())
            if self._simulated and self._simulated < self._number:
                raise Refused(
                    f"there are {self._number} clients but {self._simulated} simulated nodes: "
                    f"add --federation-config num-supernodes={self._number}, or set fleet.clients={self._simulated}"
                )
            settled = len(self._here - self._holders.keys()) >= self._number and not any(
                self._greeted.get(node, "?") for node in self._here
            )
            if len(self._roster) < self._number and (settled or time.monotonic() > limit):
                raise Refused(self._missing())
            if self._stop():
                raise Stopped("stopped while it waited for nodes")
            pause.after(heard)
        return {name: self._roster[name] for name in sorted(self._roster)}

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        """One reply a task, in the tasks' order; a missing one has a reason, and is late when its time ran out.

        A device that comes back, restarted, while the round runs still gets its task.
        """
        began = greeted = time.monotonic()
        self._greet(self._wait)
        sent = {task.client: _Sent(task, began + (task.deadline or self._wait)) for task in tasks}
        self._push(sent)
        ready: dict[str, Reply] = {}
        pause = _Pause()
        for position, task in enumerate(tasks):
            while task.client not in ready:
                near = (other.client for other in tasks[position : position + _AHEAD])
                heard = self._collect([sent[client] for client in near if client in sent], ready)
                for client in ready.keys() & sent.keys():
                    del sent[client]
                if not self._simulated and time.monotonic() > greeted + 2:
                    greeted = time.monotonic()
                    if self._greet(self._wait):
                        self._push(sent)
                if (ready or position) and not any(waiting.message for waiting in sent.values()):
                    for client in sent:  # everyone else has answered: the absent alone are not waited for
                        ready[client] = Reply(task.round, client, reason="its node is not connected")
                    sent = {}
                if task.client not in ready:
                    pause.after(heard)
            yield ready.pop(task.client)

    def exchange(self, request: bytes) -> bytes:
        """The answer of the key holder's node. Raises Unreachable where there is none, or it leaves, or takes too long.

        A key holder that comes, or comes back, within `wait` seconds is waited for; one that is started again is asked
        again, since it gives the answer of before.
        """
        limit, pause, message, asked = time.monotonic() + self._wait, _Pause(), "", 0
        while (left := limit - time.monotonic()) > 0:
            self._greet(left)
            node = self._key_node()
            if message and not node:
                raise Unreachable("the key holder's node is gone")
            if node and not (message and node == asked):
                asked = node
                question = Message(messages.encode_bytes(request), node, _TYPES["keyholder"], ttl=max(0.1, left))
                message = self._pushed({"": question}).get("", "")
            content = pulled(self._grid, message) if message else None
            if content is not None:
                try:
                    return messages.decode_bytes(_good(content))
                except ValueError as error:
                    raise Unreachable(f"the key holder: {error}") from None
            if not message and self._stop():
                raise Unreachable("stopped while it waited for the key holder")
            pause.after(news=False)
        why = "did not answer" if message else "is not among the nodes: start `umbel keyholder`, or wait longer"
        raise Unreachable(f"the key holder {why} (fleet.wait={self._wait:g})")

    def _key_node(self) -> int:
        """The node of the key holder; 0: none is here.

        A node that was killed stays listed for a minute, and what was started again in its place is another node: of
        those with the key of the one that came first, the last.
        """
        here = {node: key for node, key in self._holders.items() if node in self._here}
        return [node for node, key in here.items() if key == next(iter(here.values()))][-1] if here else 0

    def _push(self, sent: Mapping[str, _Sent]) -> None:
        """Send the tasks that are not on their way and whose nodes are there; the weights they share travel once."""
        now = time.monotonic()
        shared: dict[tuple[int, int, int], ArrayRecord] = {}
        outgoing: dict[str, Message] = {}
        for client, waiting in sent.items():
            if waiting.message or self._nodes.get(client) not in self._here:
                continue
            task = waiting.task
            same = id(task.weights), id(task.control), id(task.coordinates)
            if same not in shared:
                shared[same] = messages.encode_arrays(task)
            outgoing[client] = Message(
                messages.encode_task(task, shared[same]),
                self._nodes[client],
                _TYPES[task.kind],
                ttl=max(0.1, waiting.limit - now),
                group_id=str(task.round),
            )
        for client, message in self._pushed(outgoing).items():
            sent[client].message = message

    def _pushed(self, outgoing: Mapping[_Key, Message]) -> dict[_Key, str]:
        """Push messages; the ids of those that were accepted. A node that left has "" or none, by the runtime."""
        accepted = set(self._grid.push_messages(list(outgoing.values()))) if outgoing else set()
        ids = {key: message.metadata.message_id for key, message in outgoing.items()}
        return {key: message for key, message in ids.items() if message in accepted}

    def _collect(self, waiting: Sequence[_Sent], ready: dict[str, Reply]) -> bool:
        """Fetch the replies that have come, and give up those whose time ran out; True if there was any."""
        before = len(ready)
        for sent in waiting:
            task, late = sent.task, time.monotonic() > sent.limit
            content = pulled(self._grid, sent.message) if sent.message else None
            if content is None and not late:
                continue
            try:
                if content is None:
                    raise ValueError("no reply in time")
                ready[task.client] = messages.decode_reply(_good(content), task)
            except ValueError as error:
                ready[task.client] = Reply(task.round, task.client, reason=str(error), late=late)
        return len(ready) > before

    def _greet(self, ttl: float) -> bool:
        """Say hello to new nodes and hear the answers; True if a client has come, or come back."""
        self._here = frozenset(self._grid.get_node_ids())
        new = self._here - self._greeted.keys()
        hello = {node: Message(greetings.question(), node, MessageType.QUERY, ttl=max(1.0, ttl)) for node in new}
        self._greeted |= self._pushed(hello)
        before = dict(self._nodes)
        for node, message in self._greeted.items():
            content = pulled(self._grid, message) if message else None
            if content is not None:
                self._greeted[node] = ""
                self._welcome(node, content)
        return self._nodes != before

    def _welcome(self, node: int, content: RecordDict | str) -> None:
        """Take in the node that `content` is from, or note why not."""
        try:
            hello, nodes = greetings.decode_hello(_good(content))
            self._simulated = nodes or self._simulated
            if isinstance(hello, str):
                raise ValueError(hello)
            if isinstance(hello, KeyNode):
                self._holders[node] = hello.identity
                return
            if self._expected and hello.name not in self._expected:
                raise ValueError(f"there is no client {hello.name!r}")
        except ValueError as error:
            self._absent[node] = str(error)
            return
        known = self._roster.get(hello.name)
        if known and len(self._roster) < self._number and self._nodes[hello.name] in self._here:
            raise Refused(f"two nodes say that they are client {hello.name!r}: give each its own name")
        if known and (known.digest, known.identity) != (hello.digest, hello.identity):
            other = "another key" if known.digest == hello.digest else "other data"
            print(f"umbel: a node says that it is client {hello.name!r} but has {other}: it is left out", flush=True)
            return
        self._nodes[hello.name] = node
        self._roster.setdefault(hello.name, hello)

    def _missing(self) -> str:
        names = sorted(self._expected - set(self._roster))
        text = f"{len(self._roster)} of {self._number} clients are here"
        if names:
            text += f", missing {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        if self._absent:
            return f"{text}; a node cannot take part: {next(iter(self._absent.values()))}"
        return f"{text} after {self._wait:.0f} s: start the other nodes, or wait longer with fleet.wait"


def pulled(grid: Grid, message: str) -> RecordDict | str | None:
    """The answer to the message of this id, or the reason why there will be none; None while it is not here.

    One message a call: Flower decodes what a client wrote before we see it, and what it stumbles over shall cost
    that client its reply and nobody else theirs. A lost SuperLink shows in the next call.
    """
    try:
        answers = list(grid.pull_messages([message]))
    except Exception as error:
        return f"sent what Flower cannot read ({type(error).__name__})"
    for answer in answers:
        if answer.metadata.reply_to_message_id == message:
            return _ERRORS.get(answer.error.code, _FAILED) if answer.has_error() else answer.content
    return None


def _good(content: RecordDict | str) -> RecordDict:
    if isinstance(content, str):
        raise ValueError(content)
    return content


class _Pause:
    """Sleeps between polls: 20 ms after news, then longer, up to half a second."""

    _seconds = 0.02

    def after(self, news: bool) -> None:
        self._seconds = 0.02 if news else min(0.5, self._seconds * 1.5)
        time.sleep(self._seconds)
