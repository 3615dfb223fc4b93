"""The server's ledger and the devices' own, through the rounds of several runs: what one side loses the other finds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clients import training
from clients.own_ledger import OwnLedger
from clients.task import Hello, Reply, Task
from clients.training import Node
from privacy.adopt import adopt
from privacy.ledger import Account, Ledger
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import run as job
from server.record import RunFolder
from server.state import first_state

BASE = (
    "rounds.number=2 local.batch=0 local.rate=1 export.recover_rounds=0 export.prune=0 reference.no_privacy=false "
    "privacy.unit=example privacy.epsilon=2"
)
Rows = list[dict[str, Any]]


class Devices:
    """Clients with a state folder each, as SuperNodes have them, in this process."""

    def __init__(self, home: Path, budgets: Mapping[str, float]) -> None:
        self.home, self.budgets, self.node = home, budgets, None

    def __call__(self, node: Node) -> "Devices":
        self.node = node  # type: ignore[assignment]
        return self

    def own(self, name: str) -> tuple[OwnLedger, Node]:
        assert self.node is not None
        folder = self.home / name
        return OwnLedger.of(folder, self.budgets.get(name)), replace(self.node, states=folder / "run")

    def hello(self) -> Mapping[str, Hello]:
        assert self.node is not None
        found = {}
        for name in self.node.federation.sizes:
            own, node = self.own(name)
            found[name] = own.greet(node, training.hello(node, name))
        return found

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task in tasks:
            own, node = self.own(task.client)
            yield own.answer(node, task)


class Watch:
    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.rows, self.then = Rows(), then

    def row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.then and len(self.rows) == 1:
            self.then()

    def status(self, text: str) -> None:
        pass


def run(
    home: Path, name: str, text: str = "", budgets: Mapping[str, float] = {}, then: Callable[[], None] | None = None
) -> Rows:
    data = Examples(torch.randn(30, 6, generator=torch.Generator().manual_seed(2)), torch.arange(30) % 2)
    federation = Federation(dict.fromkeys("ab", 30), lambda client: data, data, data)
    settings = override(Settings(), f"{BASE} run.state={home / 'server'} {text}")
    scenario = Scenario("made", settings, {"net": lambda: nn.Linear(6, 2)}, lambda _: federation, dataset="wards")
    scenario, watch, path = replace(scenario, name="made"), Watch(then), home / name
    with RunFolder.open(path) if path.exists() else RunFolder.create(path, "made", settings) as folder:
        devices = Devices(home / "nodes", budgets)
        prepared = job.prepare(scenario, settings, folder, devices, watch, runtime="deployment")
        begin = prepared.committed or first_state(prepared.node.template, settings)
        job._federate(prepared, job._with_lost_rounds(prepared, begin))  # rounds alone: no export, no report
    return watch.rows


def steps(path: Path, client: str) -> int:
    found = Ledger(path)
    found.read()
    return sum(found.accounts[Account("example", client, "wards")].history.values())


def kept(folder: Path) -> dict[Path, bytes]:
    """File, head and key of a ledger."""
    found = {path: path.read_bytes() for path in folder.glob("*.ledger*")}
    assert len(found) == 3
    return found


def put_back(old: Mapping[Path, bytes]) -> None:
    for path, content in old.items():
        path.write_bytes(content)


def test_both_sides_write_down_the_same_steps_and_each_others_heads(tmp_path: Path) -> None:
    run(tmp_path, "one")
    run(tmp_path, "two")
    server = Ledger(tmp_path / "server" / "devices.ledger")
    server.read()
    for name in "ab":
        node = Ledger(tmp_path / "nodes" / name / "node.ledger")
        assert steps(node.path, name) == steps(server.path, name) == 4
        node.read()
        known = Account("example", name, "wards")
        assert node.holds(server.seen[known])
        assert server.holds(node.seen[known])
        assert server.seen[known].sequence > 4


def test_a_devices_budget_ends_its_part_and_the_others_go_on(tmp_path: Path) -> None:
    rows = run(tmp_path, "one", budgets={"a": 1.6})
    assert [[entry["name"] for entry in row["rejected"]] for row in rows] == [[], ["a"]]
    assert "its own ledger: epsilon 0." in rows[1]["rejected"][0]["reason"]
    assert [row["applied"] for row in rows] == [True, True]
    assert steps(tmp_path / "nodes" / "a" / "node.ledger", "a") == 1


def test_a_device_whose_ledger_head_and_key_were_rolled_back_is_found_out_by_the_server(tmp_path: Path) -> None:
    run(tmp_path, "one", "rounds.number=1")
    old = kept(tmp_path / "nodes" / "a")
    run(tmp_path, "two", "rounds.number=1")
    put_back(old)
    (row,) = run(tmp_path, "three", "rounds.number=1")
    assert [entry["name"] for entry in row["rejected"]] == ["a"]
    assert "was rolled back" in row["rejected"][0]["reason"]
    adopt(tmp_path / "nodes" / "a" / "node.ledger", [tmp_path / "server" / "devices.ledger"], ["a"])
    (row,) = run(tmp_path, "four", "rounds.number=1")
    assert row["rejected"] == []
    assert steps(tmp_path / "nodes" / "a" / "node.ledger", "a") == 4, "one and two, three as charged there, four"


@pytest.mark.parametrize("how", ["rolled back", "lost"])
def test_a_server_whose_ledger_head_and_key_are_gone_is_found_out_by_its_devices(tmp_path: Path, how: str) -> None:
    run(tmp_path, "one")
    old = kept(tmp_path / "server")
    run(tmp_path, "two")
    put_back(old) if how == "rolled back" else [path.unlink() for path in old]
    with pytest.raises(Refused, match=r"which client a saw.*umbel ledger adopt") as caught:
        run(tmp_path, "three")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "three").exists()
    adopt(tmp_path / "server" / "devices.ledger", [tmp_path / "nodes" / name / "node.ledger" for name in "ab"])
    assert {name: steps(tmp_path / "server" / "devices.ledger", name) for name in "ab"} == {"a": 4, "b": 4}
    assert all(not row["rejected"] for row in run(tmp_path, "three"))


def test_a_run_goes_on_after_its_servers_ledger_was_lost_and_adopted(tmp_path: Path) -> None:
    class Gone(Exception):
        pass

    def die() -> None:
        raise Gone

    with pytest.raises(Gone):
        run(tmp_path, "one", then=die)
    for path in kept(tmp_path / "server"):
        path.unlink()
    with pytest.raises(Refused, match="does not go on"):
        run(tmp_path, "one")
    adopt(tmp_path / "server" / "devices.ledger", [tmp_path / "nodes" / name / "node.ledger" for name in "ab"])
    rows = run(tmp_path, "one")
    assert [row["round"] for row in rows] == [2]
    assert steps(tmp_path / "server" / "devices.ledger", "a") == 2


def test_a_round_that_is_asked_again_after_a_crash_is_a_new_attempt_on_both_sides(tmp_path: Path) -> None:
    class Gone(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit", lambda *_: (_ for _ in ()).throw(Gone))
        with pytest.raises(Gone):
            run(tmp_path, "one")
    rows = run(tmp_path, "one")
    assert rows[0]["rejected"] == []
    for ledger in (tmp_path / "server" / "devices.ledger", tmp_path / "nodes" / "a" / "node.ledger"):
        assert steps(ledger, "a") == 2, "round 1 twice; its loss leaves nothing for round 2"
