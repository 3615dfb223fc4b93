"""The server's ledger and the devices' own, through the rounds of several runs: what one side loses the other finds."""

import json
import stat
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
from privacy import heads
from privacy.adopt import adopt
from privacy.ledger import Account, Head, Ledger
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import accounts, select
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
    assert steps(tmp_path / "server" / "devices.ledger", "a") == 2, "a refusal cannot be proved: too much, on purpose"


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


# ---- cohorts that nobody may know ----

SECRET = (
    "privacy.unit=both privacy.epsilon=20 privacy.client_epsilon=40 privacy.update_clip=0.3 rounds.fraction=0.5 "
    "rounds.minimum=0"
)


class Draws:
    """Stands in for the entropy of the draw; hears what the devices answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names, self.replies, answer = ["a"], list[Reply](), OwnLedger.answer

        def heard(own: OwnLedger, node: Node, task: Task) -> Reply:
            self.replies.append(answer(own, node, task))
            return self.replies[-1]

        monkeypatch.setattr(select.cohort_noise, "sample", lambda *_: self.names)
        monkeypatch.setattr(OwnLedger, "answer", heard)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    return Draws(monkeypatch)


def own_head(home: Path, name: str) -> Head:
    return Ledger(home / "nodes" / name / "node.ledger").read()


def private(home: Path) -> dict[str, Head]:
    """What the server keeps of the devices, by client."""
    return {account.client: head for account, head in heads.read(Ledger(home / "server" / "devices.ledger")).items()}


def test_where_the_draw_is_secret_the_heads_of_all_devices_lie_in_one_private_file(
    tmp_path: Path, draws: Draws
) -> None:
    run(tmp_path, "one", SECRET)
    kept = private(tmp_path)
    assert kept["b"] == own_head(tmp_path, "b"), "met, and never drawn"
    node = Ledger(tmp_path / "nodes" / "a" / "node.ledger")
    assert node.holds(kept["a"])
    assert kept["a"].sequence == node.chain.head.sequence - 1, "after the reservation of the last round"
    assert stat.S_IMODE((tmp_path / "server" / "devices.heads").stat().st_mode) == 0o600
    assert all(not reply.reason for reply in draws.replies)


@pytest.mark.parametrize("later", [SECRET, "privacy.epsilon=3"])
def test_neither_the_ledger_nor_the_run_folder_holds_a_head_of_a_device_even_in_later_open_runs(
    tmp_path: Path, draws: Draws, later: str
) -> None:
    run(tmp_path, "one", SECRET)
    run(tmp_path, "two", later)
    ledger = Ledger(tmp_path / "server" / "devices.ledger", keep=True)
    ledger.read()
    assert {record["kind"] for record in ledger.records or ()} == {"OPEN", "DATA", "RESERVE", "COMMIT"}
    said = {head.digest for head in private(tmp_path).values()}
    said |= {own_head(tmp_path, name).digest for name in "ab"}
    for name in "ab":
        node = Ledger(tmp_path / "nodes" / name / "node.ledger")
        node.read()
        said |= {node.chain._digest(at + 1).hex() for at in range(node.chain.head.sequence)}
    published = [path for run_ in ("one", "two") for path in (tmp_path / run_).rglob("*") if path.is_file()]
    assert len(said) > 10
    for path in [*published, ledger.path]:
        content = path.read_bytes()
        assert not [digest for digest in said if digest.encode() in content], path
    met = json.loads((tmp_path / "two" / "start.json").read_text())["clients"]
    assert {client[key] for client in met.values() for key in ("head", "seen")} == {None}


def test_what_is_published_is_the_same_whoever_was_drawn(
    tmp_path: Path, draws: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts.secrets, "token_hex", lambda _: "run")
    told = []
    for draws.names in (["a"], ["b"], ["a", "b"]):
        home = tmp_path / "".join(draws.names)
        rows = run(home, "one", SECRET)
        ledger = Ledger(home / "server" / "devices.ledger", keep=True)
        ledger.read()
        records = [{**record, "time": 0, "digest": ""} for record in ledger.records or ()]
        noisy = dict.fromkeys(("loss", "accuracy", "seconds", "seconds_evaluation"))
        length = len((home / "server" / "devices.heads").read_bytes())
        told.append((records, [row | noisy for row in rows], length))
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("how", ["rolled back", "lost"])
def test_a_device_that_was_rolled_back_is_named_before_anyone_is_drawn(tmp_path: Path, draws: Draws, how: str) -> None:
    run(tmp_path, "zero", f"{SECRET} rounds.number=1")
    old = kept(tmp_path / "nodes" / "a")
    run(tmp_path, "one", f"{SECRET} rounds.number=1")
    put_back(old) if how == "rolled back" else [path.unlink() for path in old]
    ledger, asked = (tmp_path / "server" / "devices.ledger").read_bytes(), len(draws.replies)
    with pytest.raises(Refused, match=r"own ledger of client a ends before .*`umbel ledger forget a`") as caught:
        run(tmp_path, "two", SECRET)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "two").exists()
    assert ((tmp_path / "server" / "devices.ledger").read_bytes(), len(draws.replies)) == (ledger, asked)

    adopt(tmp_path / "nodes" / "a" / "node.ledger", [tmp_path / "server" / "devices.ledger"], ["a"])
    assert steps(tmp_path / "nodes" / "a" / "node.ledger", "a") == 2
    assert heads.forget(Ledger(tmp_path / "server" / "devices.ledger"), "a") == 1
    run(tmp_path, "two", SECRET)
    assert all(not reply.reason for reply in draws.replies)
    assert steps(tmp_path / "nodes" / "a" / "node.ledger", "a") == 4


def test_a_device_that_is_rolled_back_in_the_middle_of_a_run_is_left_out_and_the_row_is_silent(
    tmp_path: Path, draws: Draws
) -> None:
    run(tmp_path, "zero", f"{SECRET} rounds.number=1")
    old = kept(tmp_path / "nodes" / "a")
    rows = run(tmp_path, "one", f"{SECRET} rounds.number=3", then=lambda: put_back(old))
    assert [bool(reply.reason) for reply in draws.replies] == [False, False, True, True]
    assert "its own ledger: does not go on" in draws.replies[2].reason
    assert not any(symbol.isdigit() for symbol in draws.replies[2].reason), "how often it was drawn"
    told = ("cohort", "replies", "rejected", "late", "skipped", "applied", "reason", "unevaluated")
    assert len({json.dumps([row[key] for key in told]) for row in rows}) == 1
    with pytest.raises(Refused, match="client a ends before"):
        run(tmp_path, "two", SECRET)


def test_a_crash_before_the_heads_are_written_accuses_nobody(
    tmp_path: Path, draws: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(Exception):
        pass

    run(tmp_path, "zero", SECRET)
    with monkeypatch.context() as patch:
        patch.setattr(heads, "_write", lambda *_: (_ for _ in ()).throw(Gone))
        with pytest.raises(Gone):
            run(tmp_path, "one", SECRET)
    before = private(tmp_path)["a"]
    with monkeypatch.context() as patch:
        patch.setattr(accounts.Accounts, "_keep", lambda *_: None)  # hello and rounds, and not one head is kept
        run(tmp_path, "one-more", SECRET)
    assert private(tmp_path)["a"] == before != own_head(tmp_path, "a")
    run(tmp_path, "two", SECRET)
    assert all(not reply.reason for reply in draws.replies)


def test_a_run_that_is_met_while_another_one_goes_on_accuses_nobody(tmp_path: Path, draws: Draws) -> None:
    inner, hello = Rows(), Devices.hello

    def slow(devices: Devices) -> Mapping[str, Hello]:
        found = hello(devices)
        patch.undo()
        inner.extend(run(tmp_path, "other", SECRET))
        return found

    run(tmp_path, "zero", SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Devices, "hello", slow)
        run(tmp_path, "one", SECRET)
    assert len(inner) == 2
    assert all(not reply.reason for reply in draws.replies)


def test_an_open_run_records_no_more_heads_once_another_run_draws_in_secret(tmp_path: Path, draws: Draws) -> None:
    run(tmp_path, "open", "privacy.epsilon=20 rounds.number=3", then=lambda: run(tmp_path, "secret", SECRET) and None)
    ledger = Ledger(tmp_path / "server" / "devices.ledger", keep=True)
    ledger.read()
    kinds = [record["kind"] for record in ledger.records or ()]
    last = len(kinds) - kinds[::-1].index("SEEN")
    assert kinds[:last].count("RESERVE") == 2, "round 1 of the open run alone"
    assert private(tmp_path)["b"].sequence > ledger.seen[Account("example", "b", "wards")].sequence


def test_heads_that_were_tampered_with_stop_a_run_before_it_leaves_anything(tmp_path: Path, draws: Draws) -> None:
    run(tmp_path, "one", SECRET)
    path = tmp_path / "server" / "devices.heads"
    whole, ledger = path.read_bytes(), (tmp_path / "server" / "devices.ledger").read_bytes()
    path.write_bytes(whole.replace(b"000", b"001", 1))
    with pytest.raises(Refused, match=r"devices\.heads is damaged"):
        run(tmp_path, "two", SECRET)
    assert not (tmp_path / "two").exists()
    assert (tmp_path / "server" / "devices.ledger").read_bytes() == ledger
    path.unlink()
    run(tmp_path, "two", SECRET)
    assert private(tmp_path).keys() == {"a", "b"}
