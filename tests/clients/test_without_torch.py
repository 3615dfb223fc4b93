"""What a device answers without torch: each message is a process of its own, and torch is most of its start."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from flwr.supercore.task_identity import TaskIdentity

from clients import app as client_app
from clients import greetings, masking, messages, upload, wanted
from clients.task import Hello, KeyNode, Protection, Task
from privacy.frames import Attempt, Rules, run_id
from privacy.masked_sum import Server
from scenarios import load
from scenarios.settings import Settings, override

RUN = 7
SET = "protect=masked fleet.clients=3"
NAMES = ("client-0", "client-1", "client-2")
HEAVY = ("torch", "opacus", "tenseal", "sklearn", "onnx")
PROCESS = """
import sys
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from flwr.supercore.task_identity import TaskIdentity

for name in ("run_id", "node_id", "task_id"):
    setattr(TaskIdentity, f"_{name}", 1)
from clients.app import app

kind, config, run, content = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3]), bytes.fromhex(sys.argv[4])
message = Message(recorddict_from_proto(Proto.FromString(content)), 1, kind)
message.metadata.__dict__["_message_id"] = "1"
reply = app(message, Context(run[0], 1, config, RecordDict(), run[1]))
print(recorddict_to_proto(reply.content).SerializeToString().hex())
print(*(name for name in HEAVY if name in sys.modules))
"""


def answered(kind: str, node: Mapping[str, Any], content: RecordDict, set_: str = SET) -> tuple[RecordDict, list[str]]:
    """(what a node with this config answers in a process of its own, the heavy libraries that it loaded)."""
    said = recorddict_to_proto(content).SerializeToString().hex()
    run = (RUN, {"scenario": "digits", "set": set_})
    program = PROCESS.replace("HEAVY", repr(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", program, kind, repr(dict(node)), repr(run), said],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    reply, loaded = done.stdout.splitlines()[-2:]
    return recorddict_from_proto(Proto.FromString(bytes.fromhex(reply))), loaded.split()


@pytest.fixture
def node(tmp_path: Path) -> dict[str, Any]:
    """The config of a device which knows the keys of all three clients, itself the first."""
    lines = [masking.introduction(tmp_path / name, name) for name in NAMES]
    (tmp_path / "peers.toml").write_text("\n".join(lines))
    return {"client": NAMES[0], "state": str(tmp_path / NAMES[0]), "peers": str(tmp_path / "peers.toml")}


@pytest.fixture
def greeted(node: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same device, which has said hello in this process."""
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1, raising=False)
    client_app._node.cache_clear()
    message = Message(greetings.question(), 1, "query")
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(RUN, 1, node, RecordDict(), {"scenario": "digits", "set": SET})
    hello, _ = greetings.decode_hello(client_app.app(message, context).content)
    assert isinstance(hello, Hello), hello
    return node


def first_stage(peers: Path) -> tuple[Task, Server]:
    """The first stage of a masked sum as its server asks the first client for it."""
    settings = override(load("digits").settings, SET)
    asked = Task("protect", 1, NAMES[0], np.empty(0, np.float32), (), protection=Protection("r", 12, 3, b""))
    grid = upload.grid_of(asked, settings)
    assert grid is not None
    rules = Rules(grid.entries, grid.width, 3)
    server = Server(Attempt(run_id("r", rules), 1, 1, bytes(32)), rules, masking.read_peers(peers), NAMES)
    request = server.ask()[NAMES[0]]
    return Task("protect", 1, NAMES[0], np.empty(0, np.float32), (), protection=Protection("r", 12, 3, request)), server


def test_a_device_that_has_said_hello_answers_a_stage_of_a_masked_sum_without_torch(greeted: dict[str, Any]) -> None:
    task, server = first_stage(Path(greeted["peers"]))
    content, loaded = answered("query.protect", greeted, messages.encode_task(task))
    server.hear(NAMES[0], messages.decode_reply(content, task).payload)
    assert loaded == []


def test_a_device_that_keeps_no_settings_of_the_run_loads_its_scenario_and_answers(node: dict[str, Any]) -> None:
    task, server = first_stage(Path(node["peers"]))
    content, loaded = answered("query.protect", node, messages.encode_task(task))
    server.hear(NAMES[0], messages.decode_reply(content, task).payload)
    assert "torch" in loaded


def test_settings_that_are_kept_are_those_of_one_run_and_one_config(greeted: dict[str, Any]) -> None:
    """Other settings of the same run, which a server may send, are not taken for those that were agreed to."""
    task, _ = first_stage(Path(greeted["peers"]))
    content, _ = answered("query.protect", greeted, messages.encode_task(task), f"{SET} protect.minimum=4")
    assert "this node's least is 4" in messages.decode_reply(content, task).reason


def test_the_task_of_another_client_is_refused_without_torch_too(greeted: dict[str, Any]) -> None:
    task = Task("protect", 1, NAMES[1], np.empty(0, np.float32), (), protection=Protection("r", 12, 3, b""))
    content, loaded = answered("query.protect", greeted, messages.encode_task(task))
    assert messages.decode_reply(content, task).reason == "this node is client-0, the task is for client-1"
    assert loaded == []


def test_the_node_of_a_key_holder_says_hello_without_torch(tmp_path: Path) -> None:
    (tmp_path / "clients.toml").write_text("".join(f'{name} = "{"5e" * 32}"\n' for name in NAMES))
    config = {"keys": str(tmp_path / "keys"), "clients": str(tmp_path / "clients.toml")}
    content, loaded = answered("query", config, greetings.question())
    assert isinstance(greetings.decode_hello(content)[0], KeyNode)
    assert "torch" not in loaded


@pytest.mark.parametrize("said", ["", "protect=masked privacy.epsilon=3 privacy.delta=1e-5 run.seed=4"])
def test_what_is_kept_is_what_comes_back(said: str, tmp_path: Path) -> None:
    settings = override(load("digits").settings, said)
    wanted.keep(tmp_path, "run", wanted.Wanted(settings, tmp_path / "here"))
    assert wanted.kept(tmp_path, "run") == wanted.Wanted(settings, tmp_path / "here")
    assert wanted.kept(tmp_path, "another") is None


@pytest.mark.parametrize("content", ["", "[]", '{"folder": "here"}', '{"folder": 5, "settings": {}}', "\x00"])
def test_what_does_not_read_is_not_kept(content: str, tmp_path: Path) -> None:
    wanted.keep(tmp_path, "run", wanted.Wanted(Settings(), tmp_path))
    next(tmp_path.glob("run*")).write_text(content)
    assert wanted.kept(tmp_path, "run") is None
