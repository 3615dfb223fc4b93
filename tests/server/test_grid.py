"""GridFleet against nodes that behave, fail, leave, come back and lie."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from clients import greetings, messages
from clients.task import Hello, KeyNode, Reply, Task
from privacy.holder import Unreachable
from privacy.refused import Refused
from server import grid as grid_module
from server.grid import GridFleet
from server.run import Stopped

Behaviour = Callable[[Message], Message | Exception | None]


pytestmark = pytest.mark.usefixtures("flower_process")


class FakeGrid:
    """Of a grid what a fleet uses; its nodes are functions."""

    def __init__(self, nodes: dict[int, Behaviour], refusal: str | None = "") -> None:
        self.nodes, self.refusal = nodes, refusal
        self.answers: dict[str, Message | Exception | None] = {}
        self.pushed: list[Message] = []
        self.pulled_twice: list[str] = []
        self._done: set[str] = set()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            number = str(len(self.pushed) + 1)
            self.pushed.append(message)
            message.metadata.__dict__["_message_id"] = number
            node = self.nodes.get(message.metadata.dst_node_id)
            if node is None:
                ids += [] if self.refusal is None else [self.refusal]
                continue
            self.answers[number] = node(message)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for number in message_ids:
            self.pulled_twice += [number] if number in self._done else []
            answer = self.answers.get(number)
            if answer is None:
                continue
            self._done.add(number)
            if isinstance(answer, Exception):
                raise answer
            yield answer


def client(
    name: str, work: Behaviour | None = None, digest: str = "d", nodes: int = 0, identity: str = ""
) -> Behaviour:
    """A node of client `name` that says hello and does `work` (by default: replies with its name as payload)."""

    def behave(message: Message) -> Message | Exception | None:
        if message.metadata.message_type == "query":
            return Message(greetings.encode_hello(Hello(name, 5, digest, identity=identity), nodes), reply_to=message)
        if work is not None:
            return work(message)
        task = messages.decode_task(message.content)
        reply = Reply(task.round, task.client, name.encode(), 5, task.steps)
        return Message(messages.encode_reply(reply), reply_to=message)

    return behave


def silent(message: Message) -> None:
    """Never answers."""


def error(code: int) -> Behaviour:
    def behave(message: Message) -> Message:
        answer = Message(Error(code=code, reason="patient 17 has 3.5"), reply_to=message)
        answer.metadata.__dict__["_src_node_id"] = 1  # as Flower's own error replies have it
        return answer

    return behave


def answering(change: Callable[[Reply], Reply]) -> Behaviour:
    def behave(message: Message) -> Message:
        task = messages.decode_task(message.content)
        return Message(messages.encode_reply(change(Reply(task.round, task.client, b"x", 5, 1))), reply_to=message)

    return behave


def tasks(*names: str, deadline: float = 0.0) -> list[Task]:
    weights = np.arange(3, dtype=np.float32)
    return [Task("train", 4, name, weights, (("w", (3,)),), 0.1, 2, deadline=deadline) for name in names]


def fleet(nodes: dict[int, Behaviour], names: str = "", wait: float = 0.3, refusal: str | None = "") -> GridFleet:
    return GridFleet(FakeGrid(nodes, refusal), names.split(), number=len(nodes), wait=wait)


def test_replies_come_one_a_task_in_the_tasks_order_whatever_the_order_of_nodes() -> None:
    some = fleet({9: client("a"), 3: client("c"), 7: client("b")}, "a b c")
    assert list(some.hello()) == ["a", "b", "c"]
    assert [(r.client, r.payload, r.reason) for r in some.ask(tasks("a", "b", "c"))] == [
        ("a", b"a", ""),
        ("b", b"b", ""),
        ("c", b"c", ""),
    ]
    assert [r.client for r in some.ask(tasks("b"))] == ["b"]


def test_names_are_learnt_from_the_nodes_where_the_server_knows_none() -> None:
    assert list(fleet({9: client("north"), 3: client("south")}).hello()) == ["north", "south"]


def key_holder(said: bytes | None = b"sum", keyholder: str = "ab" * 32) -> Behaviour:
    """A node that says it is a key holder, and answers what it is asked with `said`."""

    def behave(message: Message) -> Message | None:
        if message.metadata.message_type == "query":
            return Message(greetings.encode_key_node(KeyNode(keyholder)), reply_to=message)
        assert message.metadata.message_type == "query.keyholder"
        asked = messages.decode_bytes(message.content)
        return None if said is None else Message(messages.encode_bytes(asked + said), reply_to=message)

    return behave


def test_a_key_holder_among_the_nodes_is_asked_and_is_no_client() -> None:
    some = fleet({9: client("a"), 3: key_holder(), 7: client("b")}, "a b")
    assert list(some.hello()) == ["a", "b"]
    assert some.exchange(b"the ") == b"the sum"
    assert [reply.client for reply in some.ask(tasks("a", "b"))] == ["a", "b"]


def test_clients_are_waited_for_though_a_key_holder_is_there() -> None:
    grid = FakeGrid({3: key_holder(), 9: client("a")})
    some = GridFleet(grid, ["a", "b"], number=2, wait=5.0)

    def late() -> bool:
        grid.nodes[8] = client("b")
        return False

    some._stop = late
    assert list(some.hello()) == ["a", "b"]


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ({}, "is not among the nodes: start `umbel keyholder`"),
        ({3: key_holder(said=None)}, "did not answer"),
        ({3: key_holder(keyholder="no key")}, "is not among the nodes"),
    ],
)
def test_a_key_holder_that_cannot_be_reached_is_one_line(nodes: dict[int, Behaviour], why: str) -> None:
    some = fleet({9: client("a"), **nodes}, "a")
    some.hello()
    with pytest.raises(Unreachable, match=why):
        some.exchange(b"")


def test_a_key_holder_that_leaves_costs_its_answer_and_one_that_comes_back_is_found() -> None:
    def leaves(message: Message) -> Message | None:
        if message.metadata.message_type == "query":
            return key_holder()(message)
        del grid.nodes[3]
        return None

    grid = FakeGrid({9: client("a"), 3: leaves})
    some = GridFleet(grid, ["a"], number=1, wait=5.0)
    some.hello()
    with pytest.raises(Unreachable, match="node is gone"):
        some.exchange(b"")
    grid.nodes[4] = key_holder()
    assert some.exchange(b"") == b"sum"


def test_a_key_holder_that_is_started_again_is_asked_though_its_dead_node_is_still_listed() -> None:
    def dies(message: Message) -> Message | None:
        if message.metadata.message_type == "query":
            return key_holder()(message)
        grid.nodes[4] = key_holder()
        return None

    grid = FakeGrid({9: client("a"), 3: dies, 5: key_holder(b"of another's", "cd" * 32)})
    some = GridFleet(grid, ["a"], number=1, wait=5.0)
    some.hello()
    assert some.exchange(b"") == b"sum"
    assert some.exchange(b"") == b"sum"
    del grid.nodes[3], grid.nodes[4]
    assert some.exchange(b"") == b"of another's"


def test_who_asks_to_stop_gets_the_running_round_opened_all_the_same() -> None:
    grid = FakeGrid({9: client("a"), 3: key_holder()})
    some = GridFleet(grid, ["a"], number=1, wait=5.0)
    some.hello()
    some._stop = lambda: True
    assert some.exchange(b"") == b"sum"


def test_a_big_cohort_is_answered_in_order_and_no_reply_is_fetched_twice() -> None:
    names = [f"c{number:03}" for number in range(3 * grid_module._AHEAD)]
    some = fleet({number: client(name) for number, name in enumerate(reversed(names))}, " ".join(names))
    some.hello()
    assert [reply.payload.decode() for reply in some.ask(tasks(*names))] == names
    assert some._grid.pulled_twice == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (error(1), "cannot load Umbel"),
        (error(2), "failed on its node"),
        (error(5), "its node is gone"),
        (error(8), "its process died"),
        (error(99), "its node failed"),
        (answering(lambda reply: replace(reply, round=3)), "answered for round 3"),
        (answering(lambda reply: replace(reply, client="a")), "answered for round 4 of 'a'"),
        (answering(lambda reply: replace(reply, reason="out of memory")), "out of memory"),
        (answering(lambda reply: replace(reply, payload=bytes(70_000))), "a payload of 70000 bytes"),
        (
            lambda message: Message(RecordDict({"x": ConfigRecord()}), reply_to=message),
            "a message with the records 'x'",
        ),
        (lambda message: AttributeError("'NoneType' object has no attribute 'endswith'"), "Flower cannot read"),
    ],
)
def test_what_goes_wrong_on_one_node_costs_its_reply_alone(work: Behaviour, reason: str) -> None:
    some = fleet({1: client("a"), 2: client("b", work), 3: client("c")}, "a b c")
    some.hello()
    a, b, c = some.ask(tasks("a", "b", "c"))
    assert (a.payload, c.payload) == (b"a", b"c")
    assert reason in b.reason
    assert "patient" not in b.reason
    assert (b.round, b.client, b.payload, b.late) == (4, "b", b"", False)


def test_a_node_that_does_not_answer_by_the_deadline_is_late() -> None:
    some = fleet({1: client("a"), 2: client("b", silent)}, "a b", wait=60)
    some.hello()
    a, b = some.ask(tasks("a", "b", deadline=0.2))
    assert (a.late, b.late, b.reason) == (False, True, "no reply in time")


@pytest.mark.parametrize("refusal", ["", None])
def test_a_node_that_left_is_not_waited_for(refusal: str | None) -> None:
    some = fleet({1: client("a"), 2: client("b")}, "a b", wait=60, refusal=refusal)
    some.hello()
    del some._grid.nodes[2]  # type: ignore[attr-defined]
    a, b = some.ask(tasks("a", "b"))
    assert a.payload == b"a"
    assert (b.reason, b.late) == ("its node is not connected", False)


@pytest.mark.parametrize("refusal", ["", None])
def test_a_node_that_leaves_while_it_is_asked_is_not_waited_for(refusal: str | None) -> None:
    some = fleet({1: client("a"), 2: client("b")}, "a b", wait=60, refusal=refusal)
    some.hello()
    listed = list(some._grid.nodes)  # type: ignore[attr-defined]
    del some._grid.nodes[1]  # type: ignore[attr-defined]
    some._grid.get_node_ids = lambda: listed  # type: ignore[method-assign]
    a, b = some.ask(tasks("a", "b"))
    assert a.reason == "its node is not connected"
    assert b.payload == b"b"


def test_all_nodes_gone_is_waited_out_and_then_late() -> None:
    some = fleet({1: client("a"), 2: client("b")}, "a b")
    some.hello()
    some._grid.nodes.clear()  # type: ignore[attr-defined]
    assert next(some.ask(tasks("a", "b"))).late


def test_a_node_that_comes_back_restarted_is_its_client_again() -> None:
    some = fleet({1: client("a"), 2: client("b")}, "a b")
    some.hello()
    nodes = some._grid.nodes  # type: ignore[attr-defined]
    del nodes[2]
    nodes[77] = client("b")
    assert [reply.payload for reply in some.ask(tasks("a", "b"))] == [b"a", b"b"]


@pytest.mark.parametrize("other", [{"digest": "other"}, {"identity": "6f" * 32}])
def test_a_node_with_other_data_or_another_key_does_not_become_a_client_that_left(other: dict[str, str]) -> None:
    some = fleet({1: client("a"), 2: client("b", identity="5e" * 32)}, "a b")
    some.hello()
    nodes = some._grid.nodes  # type: ignore[attr-defined]
    del nodes[2]
    nodes[77] = client("b", **({"identity": "5e" * 32} | other))  # type: ignore[arg-type]
    assert [reply.reason for reply in some.ask(tasks("a", "b"))] == ["", "its node is not connected"]


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(Refused, match="two nodes say that they are client 'a'"):
        fleet({1: client("a"), 2: client("a", digest="other")}, "a b").hello()


def test_too_few_nodes_are_refused_after_the_wait_naming_who_is_missing() -> None:
    some = GridFleet(FakeGrid({1: client("a")}), ["a", "b", "c"], number=3, wait=0.2)
    with pytest.raises(Refused, match="1 of 3 clients are here, missing b, c after 0 s: start the other nodes"):
        some.hello()


def test_too_few_simulated_nodes_are_refused_at_once() -> None:
    some = GridFleet(FakeGrid({1: client("a", nodes=2), 2: client("b", nodes=2)}), "abc", number=3, wait=60)
    with pytest.raises(Refused, match="3 clients but 2 simulated nodes: add --federation-config num-supernodes=3"):
        some.hello()


def test_a_node_that_cannot_take_part_says_why_at_once_when_all_have_spoken() -> None:
    def without_data(message: Message) -> Message:
        return Message(greetings.encode_refusal("there is no data set heart here"), reply_to=message)

    some = GridFleet(FakeGrid({1: client("a"), 2: without_data}), "ab", number=2, wait=60)
    with pytest.raises(Refused, match="missing b; a node cannot take part: there is no data set heart here"):
        some.hello()


def test_a_client_that_nobody_expects_does_not_take_part() -> None:
    some = GridFleet(FakeGrid({1: client("a"), 2: client("z")}), "ab", number=2, wait=60)
    with pytest.raises(Refused, match="there is no client 'z'"):
        some.hello()


def test_more_nodes_than_clients_do_no_harm() -> None:
    def too_many(message: Message) -> Message:
        return Message(greetings.encode_refusal("one too many", nodes=3), reply_to=message)

    some = GridFleet(FakeGrid({1: too_many, 2: client("a", nodes=3), 3: client("b", nodes=3)}), "ab", 2, wait=60)
    assert list(some.hello()) == ["a", "b"]


def test_waiting_for_nodes_ends_when_asked_to_stop() -> None:
    some = GridFleet(FakeGrid({}), "ab", number=2, wait=60, stop=lambda: True)
    with pytest.raises(Stopped):
        some.hello()


def test_weights_travel_as_one_object_for_all_and_the_ttl_is_the_deadline() -> None:
    some = fleet({1: client("a"), 2: client("b")}, "a b")
    some.hello()
    list(some.ask(tasks("a", "b", deadline=5.0)))
    sent = [m for m in some._grid.pushed if m.metadata.message_type == "train"]  # type: ignore[attr-defined]
    assert sent[0].content["arrays"] is sent[1].content["arrays"]
    assert all(4.5 < message.metadata.ttl <= 5.0 for message in sent)
