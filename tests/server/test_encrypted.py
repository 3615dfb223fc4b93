"""Rounds under encryption: the weights of integers in the clear, whoever drops; what goes wrong costs what it must."""

import base64
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients import encrypting, upload
from clients.task import Hello, Reply, Task
from clients.training import Node
from privacy import holder as messages
from privacy import packing
from privacy.cohort_noise import CohortNoise
from privacy.holder import Opened, Remote, Unreachable
from privacy.keyholder import KeyHolder
from privacy.keyholder_process import Process
from privacy.noise_shares import Shares
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import budget, facts, gather, rounds, select
from server import run as job
from server.combine import Summed
from server.embedded import EmbeddedFleet
from server.encrypted import Encrypted
from server.launch import Quiet
from server.record import RunFolder
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

NAMES = [f"site-{i}" for i in range(6)]
SIZES = {name: 10 + 9 * i for i, name in enumerate(NAMES)}
BASE = "rounds.number=2 local.batch=8 local.rate=0.5 local.steps=2 protect.max_clients=8"
CLIENT = "privacy.unit=client privacy.epsilon=20 privacy.clip=0.2 privacy.noise_seed=4"
SHARES = f"{CLIENT} privacy.noise=shares"
SECRET = f"{CLIENT} rounds.fraction=0.9 privacy.sampling=fixed rounds.minimum=0"


def examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 50), 5, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())


def made(text: str) -> Scenario:
    net = {"net": lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))}
    federation = Federation(SIZES, examples, examples("validation"), examples("test"))
    settings = override(Settings(), f"{BASE} reference.no_privacy=false export.prune=0 {text}")
    return Scenario("made", settings, net, lambda _: federation, name="made")


@dataclass
class Heard(NoJournal):
    """A fleet, and a journal that remembers, with replies passed through `bend`."""

    fleet: EmbeddedFleet
    bend: Callable[[Task, Reply], Reply]
    rows: list[Row] = field(default_factory=list)
    states: list[ServerState] = field(default_factory=list)

    def hello(self) -> Mapping[str, Hello]:
        return self.fleet.hello()

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task, reply in zip(tasks, self.fleet.ask(tasks), strict=True):
            yield self.bend(task, reply)

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        return {}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.rows.append(row)
        self.states.append(state)


@dataclass
class Site:
    """One disk with clients and a key holder, and servers that come and go."""

    folder: Path
    node: Node
    keys: KeyHolder
    gathers: list[Encrypted] = field(default_factory=list)

    def gathered(self, attempt: int = 1, exchange: Callable[[bytes], bytes] | None = None) -> Encrypted:
        settings = self.node.settings
        plans = budget.plans(EmbeddedFleet(self.node).hello(), settings)
        shares = settings.privacy.by_shares  # then the clients add it
        noise = rounds.central_noise(plans, settings) if settings.privacy.by_client and not shares else None
        answers = partial(messages.answer, self.keys, noise=noise, seeded=settings.privacy.noise_seed is not None)
        told = settings.protect, Remote(exchange or answers), noise, settings.privacy.noise_seed
        self.gathers.append(Encrypted("run", attempt, self.keys.minimum, *told))
        return self.gathers[-1]

    def federate(
        self,
        gathered: gather.Gather,
        bend: Callable[[Task, Reply], Reply] = lambda _, reply: reply,
        state: ServerState | None = None,
    ) -> tuple[ServerState, Heard]:
        heard, settings = Heard(EmbeddedFleet(self.node), bend), self.node.settings
        plans = budget.plans(heard.hello(), settings)
        begin = replace(state or first_state(self.node.template, settings), until=settings.rounds.number)
        ran = rounds.rounds(heard, heard.hello(), plans, begin, settings, heard, lambda _: Score(1.0, 0.5), gathered)
        return [after for after, _ in ran][-1], heard


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """site(settings) -> Site."""
    sites: list[Site] = []

    def new(text: str = "") -> Site:
        scenario, folder = made(f"protect=encrypted {text}"), tmp_path / str(len(sites))
        node = Node(scenario, scenario.settings, scenario.data(scenario.settings), folder / "clients")
        keys = KeyHolder(
            folder / "keys",
            encrypting.simulated(node.states, NAMES),
            select.cohort_size(len(NAMES), node.settings),
            select.least_summed(len(NAMES), node.settings),
        )
        encrypting.introduce(node.states, keys.identity)
        sites.append(Site(folder, node, keys))
        return sites[-1]

    yield new
    for each in sites:
        each.keys.close()
        for gathered in each.gathers:
            gathered.close()


def in_the_clear(folder: Path, text: str) -> ServerState:
    """The same rounds, of the same integers, which the server reads."""
    scenario = made(f"codec=int{override(Settings(), text).protect.bits} {text}")
    node = Node(scenario, scenario.settings, scenario.data(scenario.settings), folder / "clear")
    state, _ = Site.federate(Site(folder, node, None), gather.clear)  # type: ignore[arg-type]
    return state


def exact_sum(folder: Path, text: str) -> np.ndarray:
    """What the server reads in the clear in round 1, (P,)."""
    sums, scenario = list[np.ndarray](), made(f"codec=int16 rounds.number=1 {text}")

    def kept(*given: Any) -> Summed:
        sums.append((summed := gather.clear(*given)).total)
        return summed

    node = Node(scenario, scenario.settings, scenario.data(scenario.settings), folder / "exact")
    Site.federate(Site(folder, node, None), kept)  # type: ignore[arg-type]
    return sums[0]


# ---- the sum ----


@pytest.mark.parametrize(
    "text",
    [
        "",
        "faults.dropout=0.2",
        "protect.trust=shared",
        "protect.trust=shared faults.dropout=0.2",
        "privacy.unit=example privacy.noise_seed=1 server.step=adam protect.bits=9 rounds.fraction=0.7",
        f"{CLIENT} privacy.adapt=true protect.bits=4",
        SECRET,
        f"{SHARES} faults.dropout=0.2",
        f"{SHARES} faults.dropout=0.2 protect.trust=shared protect.bits=4",
        "privacy.unit=local privacy.epsilon=50 privacy.noise_seed=1 privacy.clip=0.2",
        "codec=shared-topk:0.2:int16 faults.dropout=0.2",
        f"{CLIENT} codec=shared-topk:0.2:int16 protect.trust=split server.step=adam",
    ],
)
def test_the_weights_are_those_of_integers_in_the_clear_to_the_bit(site: Any, tmp_path: Path, text: str) -> None:
    here = site(text)
    state, heard = here.federate(here.gathered())
    assert (state.weights == in_the_clear(tmp_path, text).weights).all()
    assert all(row["applied"] for row in heard.rows)
    if "dropout" in text:
        assert [entry["reason"] for row in heard.rows for entry in row["rejected"]]


@pytest.mark.parametrize("trust", ["split", "shared"])
def test_the_report_says_parameters_security_and_the_bytes_that_a_client_really_sends(site: Any, trust: str) -> None:
    here = site(f"protect.trust={trust} rounds.number=1")
    state, heard = here.federate(here.gathered())
    told = facts._protect(here.node, state, {}, len(NAMES), "embedded")
    assert (told["mode"], told["trust"]) == ("encrypted", trust)
    assert told["parameters"].startswith("BFV, degree 4096")
    assert told["security_bits"] == {"split": 192, "shared": 192}[trust]
    assert heard.rows[0]["bytes_up"] == len(NAMES) * told["upload_bytes_per_client"]


def test_the_server_never_has_a_sum_without_the_noise_that_is_due(site: Any) -> None:
    here, seen = site(f"{CLIENT} privacy.noise_seed= rounds.number=1"), list[np.ndarray]()
    gathered = here.gathered()
    ask = gathered.holder._exchange

    def watched(request: bytes) -> bytes:
        said, parts = messages.unpack(answer := ask(request))
        if "roster" in said:
            seen.append(np.frombuffer(parts[1], "<f8"))
        return bytes(answer)

    gathered.holder._exchange = watched
    begin = first_state(here.node.template, here.node.settings).weights
    state, heard = here.federate(gathered)
    plans = budget.plans(heard.hello(), here.node.settings)
    noise = rounds.central_noise(plans, here.node.settings)
    assert isinstance(noise, CohortNoise)
    np.testing.assert_allclose(seen[0][:-1] / noise.expected, state.weights - begin, atol=1e-6)
    spread = np.std(seen[0][:-1] - exact_sum(here.folder, CLIENT)) / (noise.multiplier * 0.2)
    assert 0.75 < spread < 1.3
    again, _ = here.federate(here.gathered(2))  # as after a kill: the stored sum, never fresh noise
    assert (again.weights == state.weights).all()


def test_a_seed_for_the_noise_is_taken_from_nobody_where_the_key_holder_was_not_told_so(site: Any) -> None:
    sums = []
    for _ in range(2):
        here = site(f"{CLIENT} rounds.number=1")
        plans = budget.plans(EmbeddedFleet(here.node).hello(), here.node.settings)
        noise = rounds.central_noise(plans, here.node.settings)
        gathered = here.gathered(exchange=partial(messages.answer, here.keys, noise=noise, seeded=False))
        sums.append(here.federate(gathered)[0].weights)
    assert (sums[0] != sums[1]).any()


# ---- noise in shares ----


def opened(site: Site, seen: list[bytes]) -> Encrypted:
    """A gather of `site` that keeps in `seen` what its key holder publishes."""
    gathered = site.gathered()
    ask = gathered.holder._exchange

    def watched(request: bytes) -> bytes:
        said, parts = messages.unpack(answer := ask(request))
        seen.extend(parts[1:2] if "roster" in said else [])  # the signature comes after it
        return bytes(answer)

    gathered.holder._exchange = watched
    return gathered


@pytest.mark.parametrize("trust", ["split", "shared"])
def test_a_key_holder_adds_nothing_to_what_clients_noised(site: Any, trust: str) -> None:
    text = f"{SHARES} protect.trust={trust} rounds.number=1"
    here, seen = site(text), list[bytes]()
    begin = first_state(here.node.template, here.node.settings).weights
    state, heard = here.federate(opened(here, seen))
    plans = budget.plans(heard.hello(), here.node.settings)
    grid = gather.grid(here.node.settings, plans, len(begin), 1, 0.2)
    assert grid is not None
    total, weight, _ = grid.read(packing.unpack(seen[0], grid.entries, grid.width), len(NAMES))
    assert (total == exact_sum(here.folder, text)).all()
    assert weight == len(NAMES)
    np.testing.assert_allclose(total / len(NAMES), state.weights - begin, atol=1e-6)


@pytest.mark.parametrize(("factor", "right"), [(1, True), (4, False), (0.25, False)])
@pytest.mark.parametrize("trust", ["split", "shared"])
def test_the_noise_on_an_opened_sum_is_the_one_charged_and_not_another(
    site: Any, monkeypatch: pytest.MonkeyPatch, trust: str, factor: float, right: bool
) -> None:
    variance = Shares.variance
    monkeypatch.setattr(Shares, "variance", lambda self, grid: int(factor * variance(self, grid)))
    text = f"{SHARES} privacy.noise_seed= protect.trust={trust} rounds.number=40"
    here, seen = site(f"{text} local.rate=1e-9 privacy.colluding=0"), list[bytes]()  # noise alone
    _, heard = here.federate(opened(here, seen))
    assert all(row["applied"] for row in heard.rows)
    plans = budget.plans(heard.hello(), here.node.settings)
    grid = gather.grid(here.node.settings, plans, 130, 1, 0.2)
    assert grid is not None
    sums = [grid.read(packing.unpack(one, grid.entries, grid.width), len(NAMES))[0] / grid.norm for one in seen]
    charged = next(iter(plans.values())).mechanism.noise_multiplier
    expected = charged * math.sqrt(len(NAMES) / 3)  # 3 would do: of more clients there is more of it
    error = 5 / math.sqrt(2 * np.size(sums))
    assert (abs(float(np.std(sums)) / expected - 1) < error) is right
    assert error < 0.06


def test_too_few_encrypted_shares_open_nothing_and_the_round_stays_charged(site: Any) -> None:
    here, seen = site(f"{SHARES} rounds.number=1"), list[bytes]()

    def gone(task: Task, reply: Reply) -> Reply:
        return Reply(task.round, task.client, reason="gone") if task.client in NAMES[2:] else reply

    state, heard = here.federate(opened(here, seen), gone)
    assert not seen
    assert heard.rows[0]["reason"] == "no encrypted sum: 2 updates came, 3 are the least of a sum that is opened"
    assert {name: spent.steps for name, spent in state.clients.items()} == dict.fromkeys(NAMES, 1)
    assert (state.weights == first_state(here.node.template, here.node.settings).weights).all()


def test_a_key_holder_that_has_noise_of_its_own_opens_no_sum_of_shares(site: Any) -> None:
    here = site(f"{SHARES} rounds.number=1")
    gathered = here.gathered(exchange=partial(messages.answer, here.keys, noise=CohortNoise(1.0, 6.0)))
    _, heard = here.federate(gathered)
    assert not heard.rows[0]["applied"]
    assert "the clients noised their integers (privacy.noise=shares)" in heard.rows[0]["reason"]
    assert here.keys.opened("run:132", 1) is None


class TellsMore(EmbeddedFleet):
    """A server's words to its clients are changed: so many come at the fewest, so less noise of each will do."""

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        return super().ask([self._told(task) for task in tasks])

    def _told(self, task: Task) -> Task:
        assert task.protection
        assert task.shares
        return replace(task, protection=replace(task.protection, minimum=6), shares=replace(task.shares, honest=5))


@pytest.mark.parametrize(
    ("claimed", "said"), [(6, "its clients were told of 6 at least"), (3, "is not the sum of its roster's updates")]
)
def test_a_server_that_promises_clients_more_survivors_than_it_sums_gets_no_sum(
    site: Any, monkeypatch: pytest.MonkeyPatch, claimed: int, said: str
) -> None:
    here, shown = site(f"{SHARES} rounds.number=1"), encrypting.shown

    def claims(task: Task, grid: Any, attempt: int, minimum: int) -> Any:
        less = replace(task, shares=replace(task.shares, honest=5))
        grid = upload.grid_of(less, here.node.settings)
        return shown(less, grid, attempt, claimed)

    def gone(task: Task, reply: Reply) -> Reply:
        return Reply(task.round, task.client, reason="gone") if task.client == NAMES[2] else reply

    monkeypatch.setattr("server.encrypted.encrypting", SimpleNamespace(**vars(encrypting) | {"shown": claims}))
    heard = Heard(TellsMore(here.node), gone)
    state = replace(first_state(here.node.template, here.node.settings), until=1)
    plans = budget.plans(heard.hello(), here.node.settings)
    [(_, row)] = rounds.rounds(
        heard, heard.hello(), plans, state, here.node.settings, heard, lambda _: Score(1.0, 0.5), here.gathered()
    )
    assert row["replies"] == 5
    assert said in row["reason"]
    assert here.keys.opened("run:132", 1) is None


def test_a_node_encrypts_for_no_sum_of_other_clients_than_its_settings_say(site: Any) -> None:
    here, tasks = site("protect.minimum=4 rounds.number=1"), dict[str, Task]()

    def keep(task: Task, reply: Reply) -> Reply:
        return tasks.setdefault(task.client, task) and reply

    here.federate(here.gathered(), keep)
    task = tasks[NAMES[0]]
    assert task.protection
    fewer = replace(task, protection=replace(task.protection, minimum=3))
    said = next(EmbeddedFleet(here.node).ask([fewer])).reason
    assert said == "the server would open a sum of 3 clients, this node's least is 4"


# ---- a key holder's word ----


@pytest.mark.parametrize("text", [f"{CLIENT} privacy.adapt=true", "privacy.unit=none"])
@pytest.mark.parametrize("published", [b"", b"123", b"\xff" * 8 * 131, np.full(131, -1e300).tobytes()])
def test_a_key_holder_that_publishes_no_sum_costs_the_round(site: Any, text: str, published: bytes) -> None:
    here = site(f"{text} rounds.number=1")
    gathered = here.gathered()
    ask = gathered.holder._exchange

    def garbled(request: bytes) -> bytes:
        said, parts = messages.unpack(answer := ask(request))
        if "roster" not in said:
            return bytes(answer)
        asked, opened = messages.unpack(request)[0], Opened(tuple(said["roster"]), parts[0], published, b"")
        signature = here.keys._identity.sign(opened.statement(asked["run"], asked["round"]))
        return messages.pack(said, parts[0], published, signature)

    gathered.holder._exchange = garbled
    _, heard = here.federate(gathered)
    assert not heard.rows[0]["applied"]
    assert "the key holder published" in heard.rows[0]["reason"]
    assert "not signed" not in heard.rows[0]["reason"]


@pytest.mark.parametrize("text", [CLIENT, "privacy.unit=none"])
def test_a_sum_that_was_changed_after_it_was_published_costs_the_round(site: Any, text: str) -> None:
    here = site(f"{text} rounds.number=1")
    gathered = here.gathered()
    ask = gathered.holder._exchange

    def flipped(request: bytes) -> bytes:
        said, parts = messages.unpack(answer := ask(request))
        if "roster" not in said:
            return bytes(answer)
        return messages.pack(said, parts[0], bytes([parts[1][0] ^ 1]) + parts[1][1:], parts[2])

    gathered.holder._exchange = flipped
    _, heard = here.federate(gathered)
    assert not heard.rows[0]["applied"]
    assert "published what it has not signed" in heard.rows[0]["reason"]


@pytest.mark.parametrize("text", [CLIENT, SHARES, "privacy.unit=none"])
def test_a_key_holder_with_other_noise_than_planned_is_refused_before_anyone_trains(site: Any, text: str) -> None:
    here = site(text)
    wrong = CohortNoise(0.5, 6.0) if text == CLIENT else CohortNoise(1.0, 6.0)
    gathered = here.gathered(exchange=partial(messages.answer, here.keys, noise=wrong))
    with pytest.raises(Refused, match=r"puts --multiplier .* on a sum, this run is planned with"):
        gathered.meet(upload.encryption(here.node.settings, 130), EmbeddedFleet(here.node).hello())


# ---- bad clients ----


def flipped(task: Task, reply: Reply, others: dict[str, bytes]) -> bytes:
    return reply.payload[:-40] + bytes([reply.payload[-40] ^ 1]) + reply.payload[-39:]


LIES: dict[str, tuple[Callable[[Task, Reply, dict[str, bytes]], bytes], str]] = {
    "a flipped bit": (flipped, "its MAC is not the sender's"),
    "another's": (lambda task, reply, others: others[NAMES[0]], "another sender"),
    "too few bytes": (lambda task, reply, others: reply.payload[:-1], "bytes came"),
    "nothing": (lambda task, reply, others: b"", "0 bytes came"),
    "noise": (lambda task, reply, others: os.urandom(len(reply.payload)), "another kind"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_client_garbles_is_named_and_costs_itself_alone(site: Any, tmp_path: Path, lie: str) -> None:
    (change, reason), sent = LIES[lie], dict[str, bytes]()

    def bad(task: Task, reply: Reply) -> Reply:
        sent[task.client] = reply.payload
        return replace(reply, payload=change(task, reply, sent)) if task.client == NAMES[2] else reply

    def gone(task: Task, reply: Reply) -> Reply:
        return Reply(task.round, task.client, reason="gone") if task.client == NAMES[2] else reply

    here, there = site("rounds.number=1"), site("rounds.number=1")
    state, heard = here.federate(here.gathered(), bad)
    without, _ = there.federate(there.gathered(), gone)
    assert [entry["name"] for entry in heard.rows[0]["rejected"]] == [NAMES[2]]
    assert f"the update of {NAMES[2]} was refused" in heard.rows[0]["rejected"][0]["reason"]
    assert reason in heard.rows[0]["rejected"][0]["reason"]
    assert heard.rows[0]["applied"]
    assert (state.weights == without.weights).all()


def test_a_client_that_weighs_more_than_it_says_costs_the_round(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here, honest = site("rounds.number=1"), upload.integers

    def heavy(update: Any, within: bool, number: int, task: Task, *rest: Any) -> Any:
        entries = honest(update, within, number, task, *rest)
        entries[-2] += 5 if task.client == NAMES[0] else 0
        return entries

    monkeypatch.setattr(upload, "integers", heavy)
    _, heard = here.federate(here.gathered())
    assert not heard.rows[0]["applied"]
    assert "one of them lied" in heard.rows[0]["reason"]


# ---- bad servers ----


def test_a_server_that_shows_one_client_another_model_gets_no_sum(site: Any) -> None:
    here = site("rounds.number=1")
    gathered = here.gathered()

    class Tells(EmbeddedFleet):
        def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
            return super().ask([replace(tasks[0], weights=tasks[0].weights * 0), *tasks[1:]])

    heard = Heard(Tells(here.node), lambda _, reply: reply)
    state = replace(first_state(here.node.template, here.node.settings), until=1)
    [(_, row)] = rounds.rounds(
        heard, heard.hello(), {}, state, here.node.settings, heard, lambda _: Score(1.0, 0.5), gathered
    )
    assert row["replies"] == len(NAMES)
    assert "is not the sum of its roster's updates" in row["reason"]


def test_a_client_answers_a_round_once_in_an_attempt_and_one_run_alone(site: Any) -> None:
    here = site("rounds.number=1")
    tasks: dict[str, Task] = {}

    def keep(task: Task, reply: Reply) -> Reply:
        return tasks.setdefault(task.client, task) and reply

    here.federate(here.gathered(), keep)
    fleet, task = EmbeddedFleet(here.node), tasks[NAMES[0]]
    assert task.protection
    assert "was answered already" in next(fleet.ask([task])).reason
    deal = here.keys.deal("other:132", encrypting.ROUNDS, upload.encryption(here.node.settings, 130))
    request = encrypting.request(2, deal.letters[task.client], deal.public)
    another = replace(task, protection=replace(task.protection, run="other:132", request=request))
    assert "another name than before" in next(fleet.ask([another])).reason


@pytest.mark.parametrize("what", ["none", "garbage", "letter", "key"])
def test_a_client_encrypts_under_no_key_that_its_key_holder_did_not_sign(site: Any, what: str) -> None:
    here, tasks = site("rounds.number=1"), dict[str, Task]()

    def keep(task: Task, reply: Reply) -> Reply:
        return tasks.setdefault(task.client, task) and reply

    here.federate(here.gathered(), keep)
    task, other = tasks[NAMES[0]], tasks[NAMES[1]]
    assert task.protection
    assert other.protection
    _, (letter, public) = messages.unpack(task.protection.request)
    requests = {
        "garbage": b"\0" * 7,
        "letter": other.protection.request,
        "key": encrypting.request(2, letter, public[:-1] + bytes([public[-1] ^ 1])),
    }
    said = None if what == "none" else replace(task.protection, request=requests[what])
    reply = next(EmbeddedFleet(here.node).ask([replace(task, protection=said)]))
    assert not reply.payload
    assert any(words in reply.reason for words in ("without the protection", "cannot be read", "is not signed"))


def test_a_server_that_claims_a_narrower_grid_to_get_less_noise_gets_no_sum(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, shown = site(f"{CLIENT} rounds.number=1"), encrypting.shown

    def narrower(task: Task, grid: Any, *rest: int) -> Any:
        return replace(true := shown(task, grid, *rest), grid=replace(true.grid, limit=grid.limit / 100))

    monkeypatch.setattr("server.encrypted.encrypting", SimpleNamespace(**vars(encrypting) | {"shown": narrower}))
    _, heard = here.federate(here.gathered())
    assert not heard.rows[0]["applied"]
    assert "is not the sum of its roster's updates" in heard.rows[0]["reason"]


# ---- a key holder that knows others, or is not there ----


def test_a_client_that_is_removed_costs_a_round_then_there_are_new_keys_without_it(site: Any) -> None:
    here = site("rounds.number=3")
    least, fewer = here.keys.minimum, NAMES[:-1]
    deals = list[bytes]()

    def remove(task: Task, reply: Reply) -> Reply:
        if (task.round, task.client) == (2, NAMES[0]):
            here.keys.close()
            here.keys = KeyHolder(here.folder / "keys", encrypting.simulated(here.node.states, fewer), minimum=least)
        return reply

    def exchange(request: bytes) -> bytes:
        said, parts = messages.unpack(answer := messages.answer(here.keys, request))
        deals.extend(parts[:1] if "recipients" in said else [])
        return answer

    _, heard = here.federate(here.gathered(exchange=exchange), remove)
    assert [row["applied"] for row in heard.rows] == [True, False, True]
    assert f"{NAMES[-1]} is not among the clients that this key holder knows" in heard.rows[1]["reason"]
    assert [entry["name"] for entry in heard.rows[2]["rejected"]] == [NAMES[-1]]
    assert heard.rows[2]["rejected"][0]["reason"] == "the key holder does not know this client"
    assert len(set(deals)) == len(deals) == 2


def test_a_key_holder_killed_in_a_round_costs_that_round_and_is_started_again(site: Any) -> None:
    here = site("rounds.number=3")
    process = Process(here.folder / "own", encrypting.simulated(here.node.states, NAMES), len(NAMES), 3)
    encrypting.introduce(here.node.states, process.identity)
    gathered = Encrypted("run", 1, 3, here.node.settings.protect, process)
    here.gathers.append(gathered)

    def kill(task: Task, reply: Reply) -> Reply:
        if (task.round, task.client) == (2, NAMES[3]) and process.pid:
            os.kill(process.pid, signal.SIGKILL)
        return reply

    try:
        before = process.pid
        _, heard = here.federate(gathered, kill)
        assert [row["applied"] for row in heard.rows] == [True, False, True]
        assert "the key holder's process is gone" in heard.rows[1]["reason"]
        assert heard.rows[1]["replies"] == len(NAMES)
        assert process.pid != before
    finally:
        process.close()
    assert process.pid is None


def test_where_there_is_no_key_holder_any_more_nobody_is_asked(site: Any) -> None:
    here, asked = site("rounds.number=2"), list[int]()

    def unreachable(_: bytes) -> bytes:
        raise Unreachable("nobody answers")

    def note(task: Task, reply: Reply) -> Reply:
        asked.append(task.round)
        return reply

    state, heard = here.federate(here.gathered(exchange=unreachable), note)
    assert not asked
    assert [row["reason"] for row in heard.rows] == ["no encrypted sum: nobody answers"] * 2
    assert (state.weights == first_state(here.node.template, here.node.settings).weights).all()


def test_a_lost_sum_of_a_secret_draw_does_not_tell_who_was_drawn(site: Any) -> None:
    here = site(SECRET)

    def unreachable(_: bytes) -> bytes:
        raise Unreachable("nobody answers")

    _, heard = here.federate(here.gathered(exchange=unreachable))
    for row in heard.rows:
        assert (row["cohort"], row["replies"], row["rejected"], row["reason"]) == ([], None, [], None)
        assert row["applied"]


# ---- a server that was killed ----


def test_a_round_that_was_opened_and_not_committed_is_repeated_and_not_opened_again(site: Any) -> None:
    here, before = site(), site()
    undisturbed, _ = before.federate(before.gathered())
    whole, first = here.federate(here.gathered())
    assert (whole.weights == undisturbed.weights).all()
    again, heard = here.federate(here.gathered(2), state=first.states[0])  # the commit of round 2 never happened
    assert [row["applied"] for row in heard.rows] == [True]
    assert (again.weights == whole.weights).all()


def test_a_round_that_was_opened_for_others_is_lost(site: Any) -> None:
    here = site("rounds.number=1")
    here.federate(here.gathered())

    def without(task: Task, reply: Reply) -> Reply:
        return Reply(task.round, task.client, reason="gone") if task.client == NAMES[0] else reply

    _, heard = here.federate(here.gathered(2), without)
    assert not heard.rows[0]["applied"]
    assert "opened before, for 6 other clients" in heard.rows[0]["reason"]


def test_a_round_that_was_opened_for_another_model_is_lost(site: Any) -> None:
    here = site("rounds.number=1")
    here.federate(here.gathered())
    start = first_state(here.node.template, here.node.settings)
    _, heard = here.federate(here.gathered(2), state=replace(start, weights=start.weights * 2))
    assert not heard.rows[0]["applied"]
    assert "opened before, for another model" in heard.rows[0]["reason"]


def run(path: Path, text: str, stop_after: int = 99) -> dict[str, Any]:
    """Begin the run in `path`, or go on with it."""
    scenario = made(f"protect=encrypted run.state={path.parent / 'state'} {text}")
    with RunFolder.open(path) if path.exists() else RunFolder.create(path, "made", scenario.settings) as folder:
        prepared = job.prepare(
            scenario, scenario.settings, folder, EmbeddedFleet, Quiet(), lambda: len(folder.rows()) == stop_after
        )
        return job.run(prepared)


def test_a_run_goes_on_with_its_key_holder_and_leaves_no_secret_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(job.Stopped):
        run(tmp_path / "run", "", stop_after=1)
    [keys] = (path.read_bytes() for path in (tmp_path / "state").rglob("key"))
    with pytest.raises(job.Stopped):
        run(tmp_path / "run", "", stop_after=2)
    assert [path.read_bytes() for path in (tmp_path / "state").rglob("key")] == [keys]
    report = run(tmp_path / "run", "")
    assert report["protect"]["mode"] == "encrypted"
    assert not list((tmp_path / "state" / "keyholder").rglob("key"))  # the run is over, and so is its key
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for secret in (json.loads(keys)["secret"], json.loads(keys)["weight_secret"]):
        assert not any(secret.encode() in each or base64.b64decode(secret) in each for each in written)
    rows = RunFolder.open(tmp_path / "run")
    assert [row["applied"] for row in rows.rows()] == [True, True]
    rows.close()


def test_an_export_after_the_end_of_a_run_opens_its_sums_under_new_keys(tmp_path: Path) -> None:
    run(tmp_path / "run", "export.prune=0.5")
    scenario = made(f"protect=encrypted run.state={tmp_path / 'state'} export.prune=0.5 export.recover_rounds=2")
    with RunFolder.open(tmp_path / "run") as folder:
        job.export(job.prepare(scenario, scenario.settings, folder, EmbeddedFleet, Quiet()))
        assert [(row["phase"], row["applied"]) for row in folder.rows()[2:]] == [("recover", True)] * 2
        assert len(list((tmp_path / "state" / "keyholder").rglob("key"))) == 2  # of the whole model, and of the pruned
    assert not list((tmp_path / "state" / "keyholder").rglob("key"))


# ---- refusals ----


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("protect.bits=24 protect.max_clients=1000000000", "cannot sum fields of 54 bits over 1000000000 clients"),
        ("protect.minimum=7", "protect.minimum=7 is more than the 6 clients a round asks: the nearest is 6"),
        ("protect.minimum=2", "Input should be greater than or equal to 3"),
        ("protect.max_clients=5", "set protect.max_clients=6"),
        ("privacy.unit=client protect.trust=shared", "set privacy.noise=shares, with which clients noise what they"),
        ("privacy.unit=both protect.trust=shared", "set privacy.unit=client privacy.noise=shares"),
        (f"{SHARES} protect.bits=24 protect.max_clients=10000 privacy.epsilon=0.02", "protect.bits=22 is the nearest"),
        (f"{SHARES} protect.minimum=3 privacy.colluding=3", "privacy.colluding=3 leaves no honest client of the 3"),
        ("privacy.unit=client privacy.bands=2", "privacy.bands correlates the noise of rounds"),
        ("server.combine=median", "server.combine=median compares single updates"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anyone_trains(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        run(tmp_path / "run", text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_key_folder_that_others_can_read_is_refused_and_so_is_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(job.Stopped):
        run(tmp_path / "run", "", stop_after=1)
    [folder] = (tmp_path / "state" / "keyholder").iterdir()
    folder.chmod(0o755)
    with pytest.raises(Refused, match="others can read the key folder"):
        run(tmp_path / "run", "")
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(Refused, match=r"the keys of this run are not in .*: bring them back"):
        run(tmp_path / "run", "")


def test_a_key_holder_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "keyholder").write_text("no folder")
    with pytest.raises(Refused, match="Not a directory"):
        run(tmp_path / "run", "")
    assert not (tmp_path / "run").exists()


def test_a_client_of_another_key_than_the_key_holder_knows_is_named_before_anyone_trains(site: Any) -> None:
    here = site()
    roster = dict(EmbeddedFleet(here.node).hello())
    here.gathered().meet(upload.encryption(here.node.settings, 130), roster)
    roster[NAMES[4]] = replace(roster[NAMES[4]], recipient="00" * 32)
    with pytest.raises(Refused, match=f"another key for client {NAMES[4]}"):
        here.gathered().meet(upload.encryption(here.node.settings, 130), roster)


def test_a_run_without_encryption_does_not_load_tenseal() -> None:
    code = "import server.run, clients.training, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tenseal" not in done.stdout.split()
    assert "server.encrypted" in done.stdout.split()
