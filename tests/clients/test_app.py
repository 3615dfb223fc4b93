"""The ClientApp: which client a node is, whose data and state it uses, and what it says when it cannot work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file

from clients import app as client_app
from clients import encrypting, greetings, masking, messages, training
from clients.app import app
from clients.task import Charge, Hello, KeyNode, Protection, Task
from privacy import bfv, holder
from privacy.chain import Head
from privacy.plan import Mechanism
from scenarios import build_model, load
from scenarios.settings import override
from scenarios.weights import flatten, layout

SCENARIO = """
import torch
from torch import nn
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings

def data(settings):
    def client(name):
        if name == "ill":
            raise RuntimeError("patient 17 has 3.5")
        return Examples(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
    if settings.run.data == "gone":
        raise Refused("there is no data here")
    held = Examples(torch.ones(2, 2), torch.zeros(2, dtype=torch.long))
    return Federation(sizes={"a": 4, "b": 4, "ill": 4}, client=client, validation=held, test=held)

SCENARIO = Scenario("for a test", Settings(), {"linear": lambda: nn.Linear(2, 2)}, data)
"""


@pytest.fixture(autouse=True)
def _inside_a_flower_process(flower_process: None) -> None:
    client_app._node.cache_clear()


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(SCENARIO)
    return str(path)


def context(scenario: str, set_: str = "", /, **node_config: Any) -> Context:
    config = {name.replace("_", "-"): value for name, value in node_config.items()}
    return Context(5, 1, config, RecordDict(), {"scenario": scenario, "set": set_})


def ask(kind: str, content: RecordDict, context: Context) -> RecordDict:
    message = Message(content, 1, kind)
    message.metadata.__dict__["_message_id"] = "1"
    return app(message, context).content


def hello(context: Context) -> Hello | KeyNode | str:
    return greetings.decode_hello(ask("query", greetings.question(), context))[0]


def a_task(client: str, scenario: str = "digits") -> Task:
    settings = override(load(scenario).settings, "")
    model = build_model(load(scenario), settings)
    return Task("train", 1, client, flatten(model), layout(model), rate=0.1, steps=1)


def test_a_device_is_the_client_that_its_owner_names(scenario: str, tmp_path: Path) -> None:
    said = hello(context(scenario, client="b", state=str(tmp_path / "state")))
    assert isinstance(said, Hello)
    assert (said.name, said.examples) == ("b", 4)


def test_a_device_says_the_link_and_memory_that_its_owner_named(scenario: str, tmp_path: Path) -> None:
    owner = {"client": "a", "state": str(tmp_path / "state"), "down": 1000, "up": 500, "memory_mb": 3}
    said = hello(context(scenario, "fleet.clock=wall", **owner))
    assert isinstance(said, Hello)
    assert (said.device.down, said.device.up, said.device.memory) == (1000.0, 500.0, 3 * 2**20)
    assert said.device.speed > 0
    owner["down"] = "fast"
    assert "node config" in str(hello(context(scenario, "fleet.clock=wall", **owner)))


def test_the_time_on_the_link_is_taken_off_a_devices_deadline(scenario: str, tmp_path: Path) -> None:
    task = replace(a_task("a", scenario), deadline=20.0)
    for down, late in ((0, False), (1, True)):  # 24 bytes of weights at 1 byte a second
        device = context(scenario, client="a", state=str(tmp_path / "state"), down=down)
        reply = messages.decode_reply(ask("train", messages.encode_task(task), device), task)
        assert reply.late is late
        assert bool(reply.payload) is not late


def key_node(folder: Path, **more: Any) -> Context:
    keys = {name: bytes([i + 1] * 32).hex() for i, name in enumerate("abc")}
    (folder / "clients.toml").write_text("".join(f'{name} = "{key}"\n' for name, key in keys.items()))
    return context("no such scenario", keys=str(folder / "keys"), clients=str(folder / "clients.toml"), **more)


def asked(context: Context, **fields: Any) -> tuple[dict[str, Any], list[bytes]]:
    content = ask("query.keyholder", messages.encode_bytes(holder.pack(fields)), context)
    return holder.unpack(messages.decode_bytes(content))


def test_a_node_with_keys_is_the_key_holder_and_no_client(tmp_path: Path) -> None:
    said = hello(key_node(tmp_path))
    assert isinstance(said, KeyNode)
    parameters = bfv.fit("split", 10, 20, 3).to_bytes().hex()
    deal = {"do": "deal", "run": "run", "rounds": 5, "parameters": parameters}
    dealt, parts = asked(key_node(tmp_path, multiplier=1.5, expected=3.0, quantile=0.5, adapt_rate=0.0), **deal)
    assert list(dealt["recipients"]) == ["a", "b", "c"]
    assert dealt["noise"] == {"multiplier": 1.5, "expected": 3.0, "quantile": 0.5, "adapt_rate": 0.0}
    again, same = asked(key_node(tmp_path), **deal)
    assert again["noise"] is None
    assert same[0] == parts[0]
    assert "neither deal nor open" in asked(key_node(tmp_path), do="sign")[0]["refused"]


def test_a_key_holder_says_why_it_is_none(scenario: str, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o755)
    assert "others can read the key folder" in str(hello(key_node(tmp_path)))
    assert "others can read the key folder" in asked(key_node(tmp_path), do="deal")[0]["refused"]
    assert "is no key holder" in asked(context(scenario, client="a"), do="deal")[0]["refused"]


@pytest.mark.parametrize("said", ["", "ab", "key"])
def test_a_device_without_the_key_of_its_key_holder_takes_no_part(scenario: str, tmp_path: Path, said: str) -> None:
    refused = hello(context(scenario, "protect=encrypted", client="a", state=str(tmp_path), keyholder=said))
    assert "what `umbel keyholder` prints" in str(refused)
    told = hello(context(scenario, "protect=encrypted", client="a", state=str(tmp_path), keyholder="ab" * 32))
    assert isinstance(told, Hello)
    assert told.recipient == encrypting.simulated(tmp_path, ["a"])["a"].hex()


@pytest.mark.parametrize(
    ("pins", "run", "reason"),
    [
        ({"protect": "masked"}, "", "lets only masked updates leave, the run has protect=none"),
        ({"protect": "encrypted"}, "", "lets only encrypted updates leave, the run has protect=none"),
        ({"protect": "masked encrypted"}, "codec=int16", "masked or encrypted updates leave, the run has protect=none"),
        ({"protect": "encrypted"}, "protect=masked", "lets only encrypted updates leave, the run has protect=masked"),
        ({"protect": "masks"}, "protect=masked", "protect=masks of the node config is none of masked, encrypted"),
        ({"protect": ""}, "protect=masked", "is none of masked, encrypted"),
        ({"minimum": 10}, "protect=masked protect.minimum=4", "a sum of 4 clients, this node's owner allows 10"),
        ({"minimum": 10}, "", "lets updates leave in sums of 10 clients alone, and the run has protect=none"),
        ({"minimum": "ten"}, "protect=masked", "minimum=ten of the node config is no number"),
        ({"minimum": True}, "", "minimum=True of the node config is no number"),
        ({"protect": "masked", "minimum": 3}, "protect=masked protect.minimum=4", ""),
        ({"protect": "masked encrypted"}, "protect=masked", ""),
    ],
)
def test_a_device_takes_part_in_no_run_that_its_owners_pins_forbid(
    scenario: str, tmp_path: Path, pins: dict[str, Any], run: str, reason: str
) -> None:
    (tmp_path / "peers.toml").write_text(masking.introduction(tmp_path / "state", "a"))
    owner = {
        "client": "a",
        "state": str(tmp_path / "state"),
        "peers": str(tmp_path / "peers.toml"),
        "keyholder": "ab" * 32,
    }
    told = context(scenario, run, **owner, **pins)
    said = hello(told)
    assert isinstance(said, Hello) if not reason else reason in str(said)
    task = a_task("a", scenario)
    answer = messages.decode_reply(ask("train", messages.encode_task(task), told), task).reason
    assert reason in answer if reason else "without the protection" in answer


@pytest.mark.parametrize("kind", ["train", "protect"])
def test_a_device_adds_to_no_sum_over_fewer_clients_than_its_owner_pins(
    scenario: str, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "peers.toml").write_text(masking.introduction(tmp_path / "state", "a"))
    owner = {"client": "a", "state": str(tmp_path / "state"), "peers": str(tmp_path / "peers.toml")}
    for least, refused in ((10, True), (9, False)):
        told = context(scenario, "protect=masked", minimum=least, **owner)
        assert isinstance(hello(told), Hello)
        task = replace(a_task("a", scenario), kind=kind, protection=Protection("run", 8, 9, b"a request"))
        said = messages.decode_reply(
            ask(kind if kind == "train" else "query.protect", messages.encode_task(task), told), task
        )
        assert ("of 9 clients, this node's owner allows 10 at the fewest" in said.reason) is refused


@pytest.mark.parametrize(("number", "name"), [(0, "a"), (1, "b")])
def test_a_simulated_node_is_the_client_of_its_number(number: int, name: str, scenario: str, tmp_path: Path) -> None:
    said = hello(context(scenario, f"run.out={tmp_path}/run", partition_id=number, num_partitions=3))
    assert isinstance(said, Hello)
    assert said.name == name


@pytest.mark.parametrize(
    ("node_config", "reason"),
    [
        ({}, "does not say which client it is"),
        ({"client": "nobody"}, "this node is client 'nobody', but the scenario has a, b, ill"),
        ({"partition_id": 0, "num_partitions": 2}, "there are 3 clients, but 2 nodes"),
        ({"partition_id": 3, "num_partitions": 4}, "number 3 from 0, is one too many"),
        ({"client": "a", "data": "gone"}, "there is no data here"),
        ({"client": "ill"}, "failed with RuntimeError"),
    ],
)
def test_a_node_that_cannot_take_part_says_why_and_quotes_no_data(
    node_config: dict[str, Any], reason: str, scenario: str, tmp_path: Path
) -> None:
    said = hello(context(scenario, state=str(tmp_path / "state"), **node_config))
    assert isinstance(said, str)
    assert reason in said
    assert "patient" not in said


def test_a_server_cannot_choose_the_data_folder_of_a_device_but_of_a_simulated_node(
    scenario: str, tmp_path: Path
) -> None:
    device = context(scenario, "run.data=gone", client="a", state=str(tmp_path / "state"))
    assert isinstance(hello(device), Hello)
    assert hello(context(scenario, "run.data=gone", partition_id=0, num_partitions=3)) == "there is no data here"


def test_the_owners_own_scenario_file_is_used_where_the_run_asks_for_one_of_that_name(
    scenario: str, tmp_path: Path
) -> None:
    asked = "/where/the/server/has/it/mine.py"
    state = str(tmp_path / "state")
    assert isinstance(hello(context(asked, client="a", scenario=scenario, state=state)), Hello)
    assert "no scenario file" in str(hello(context("/elsewhere/other.py", client="a", scenario=scenario, state=state)))


def test_a_device_trains_as_the_embedded_runtime_does(scenario: str, tmp_path: Path) -> None:
    task = a_task("a", scenario)
    told = context(scenario, client="a", state=str(tmp_path / "state"))
    over_flower = messages.decode_reply(ask("train", messages.encode_task(task), told), task)
    chosen = load(scenario)
    node = training.Node(chosen, chosen.settings, chosen.data(chosen.settings), tmp_path / "here")
    assert over_flower == training.answer(node, task)
    assert over_flower.reason == ""


def test_a_device_charges_its_own_ledger_under_its_owners_budget_and_a_simulated_node_keeps_none(
    scenario: str, tmp_path: Path
) -> None:
    private, state = "privacy.unit=example privacy.epsilon=50 local.batch=0 local.steps=20", tmp_path / "state"
    owner = {"client": "a", "state": str(state), "budget": 2}
    told = context(scenario, private, **owner)
    said = hello(told)
    assert isinstance(said, Hello)
    assert said.head is not None
    charge = Charge("run", 1, Head(3, "5e" * 32), said.head)
    task = replace(a_task("a", scenario), mechanism=Mechanism(1.0, 5.0), clip=1.0, charge=charge)
    for number, paid in ((1, True), (2, False)):
        asked = replace(task, round=number, steps=20)
        reply = messages.decode_reply(ask("train", messages.encode_task(asked), told), asked)
        assert bool(reply.payload) is paid
        assert reply.reason.startswith("its own ledger: epsilon 0") is not paid
    assert "budget=lots" in str(hello(context(scenario, private, client="a", state=str(state), budget="lots")))
    assert "owner's budget of 2" in str(hello(context(scenario, "", **owner)))
    simulated = context(scenario, f"{private} run.out={tmp_path}/run", partition_id=0, num_partitions=3)
    said = hello(simulated)
    assert isinstance(said, Hello)
    assert (said.head, list((tmp_path / "run").rglob("node.ledger"))) == (None, [])


def test_a_device_refuses_the_task_of_another_client(scenario: str, tmp_path: Path) -> None:
    task = a_task("b", scenario)
    told = context(scenario, client="a", state=str(tmp_path / "state"))
    reply = messages.decode_reply(ask("train", messages.encode_task(task), told), task)
    assert reply.reason == "this node is a, the task is for b"
    assert reply.payload == b""


def test_a_garbled_task_is_answered_with_a_reason(scenario: str, tmp_path: Path) -> None:
    told = context(scenario, client="a", state=str(tmp_path / "state"))
    reply = messages.decode_reply(ask("train", RecordDict(), told), a_task("a", scenario))
    assert reply.reason == "failed with ValueError"


def test_client_state_outlives_the_process_and_belongs_to_one_run(tmp_path: Path) -> None:
    """Error feedback of top-k is kept on the node's disk, by run folder, whatever number Flower gives the run."""
    state = tmp_path / "state"

    def folder(out: str, run: int) -> set[Path]:
        told = context(
            "digits",
            f"codec=topk:0.1 privacy.unit=none run.out={out} fleet.clients=3",
            client="client-0",
            state=str(state),
        )
        told.run_id = run
        client_app._node.cache_clear()  # a new process
        before = set(state.rglob("1.safetensors"))
        task = a_task("client-0")
        reply = messages.decode_reply(ask("train", messages.encode_task(task), told), task)
        assert reply.reason == ""
        return set(state.rglob("1.safetensors")) - before

    first = folder("one", 1)
    assert len(first) == 1
    assert load_file(first.pop())["residual"].any()
    assert folder("one", 2) == set()
    assert len(folder("two", 2)) == 1


def test_state_lies_where_umbel_state_says(monkeypatch: pytest.MonkeyPatch, scenario: str, tmp_path: Path) -> None:
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "elsewhere"))
    assert isinstance(hello(context(scenario, client="a")), Hello)
    assert list((tmp_path / "elsewhere").glob("*/key"))


def test_a_device_shows_the_key_that_its_owners_list_has_whatever_the_run_and_refuses_without(
    scenario: str, tmp_path: Path
) -> None:
    masked, state = "protect=masked", tmp_path / "state"
    (tmp_path / "peers.toml").write_text(masking.introduction(state, "a"))
    owner = {"client": "a", "state": str(state), "peers": str(tmp_path / "peers.toml")}
    for run in ("one", "two"):
        said = hello(context(scenario, f"{masked} run.out=/nowhere/{run}", **owner))
        assert isinstance(said, Hello)
        assert said.identity == masking.public(masking.identity(state, "a")).hex()
    assert "no key for a" in str(hello(context(scenario, masked, client="a", state=str(state))))
    assert "another key for a" in str(hello(context(scenario, masked, **owner | {"state": str(tmp_path / "new")})))
    client_app._node.cache_clear()
    (tmp_path / "peers.toml").write_text("a = 5")
    said = str(hello(context(scenario, masked, **owner)))
    assert said.startswith("peers.toml is no list of clients"), "nor where the file lies"


def test_a_stage_of_the_protocol_that_no_honest_server_sends_is_refused_by_the_device(
    scenario: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    (tmp_path / "peers.toml").write_text(masking.introduction(state, "a"))
    device = context(scenario, "protect=masked", client="a", state=str(state), peers=str(tmp_path / "peers.toml"))
    bare = replace(a_task("a", scenario), kind="protect", weights=np.empty(0, np.float32), layout=())
    for task, why in (
        (bare, "without the protection"),
        (replace(bare, protection=Protection("r", 6, 2, b"")), "a sum of 2 clients"),
        (replace(bare, protection=Protection("r", 6, 3, b"x" * 200)), "another version of the protocol"),
        (a_task("a", scenario), "without the protection"),
    ):
        kind = "train" if task.kind == "train" else "query.protect"
        reply = messages.decode_reply(ask(kind, messages.encode_task(task), device), task)
        assert why in reply.reason
        assert reply.payload == b""
