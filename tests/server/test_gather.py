"""Rounds that sum integers: the same mean and noise as with floats, of sums alone; bad clients, refused pairs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clients import upload
from clients.task import Hello, Reply, Task
from clients.training import Node
from privacy import cohort_noise, packing
from privacy.integers import Grid
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.seeds import derive
from scenarios.settings import Settings, override
from server import budget, gather, pairs, rounds, run
from server.combine import Summed
from server.embedded import EmbeddedFleet
from server.references import NoJournal
from server.state import Row, Score, ServerState, first_state

NAMES = [f"site-{i}" for i in range(8)]
SIZES = {name: 10 + 9 * i for i, name in enumerate(NAMES)}
BASE = "rounds.number=1 local.batch=8 local.rate=0.5 local.steps=4"
CLIENT = "privacy.unit=client privacy.epsilon=20 privacy.clip=0.2 privacy.noise_seed=4"


def examples(name: str) -> Examples:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(SIZES.get(name, 50), 5, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))


def node(settings: Settings, folder: Path) -> Node:
    federation = Federation(SIZES, examples, examples("validation"), examples("test"))
    scenario = Scenario("made", settings, {"net": net}, lambda _: federation, name="made")
    return Node(scenario, settings, federation, folder)


@dataclass
class Heard(NoJournal):
    """A journal and a fleet that remember, with replies passed through `bend`."""

    fleet: EmbeddedFleet
    bend: Callable[[Task, Reply], Reply]
    settings: Settings
    tasks: list[Task] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    states: list[ServerState] = field(default_factory=list)

    def hello(self) -> Mapping[str, Hello]:
        return self.fleet.hello()

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        for task, reply in zip(tasks, self.fleet.ask(tasks), strict=True):
            self.tasks.append(task)
            self.replies.append(self.bend(task, reply))
            yield self.replies[-1]

    def reserve(self, number: int, steps: Mapping[str, int]) -> dict[str, str]:
        return {}

    def commit(self, state: ServerState, row: Row, taken: Mapping[str, int]) -> None:
        self.rows.append(row)

    @property
    def grid(self) -> Grid:
        made = upload.grid_of(self.tasks[0], self.settings)
        assert made is not None
        return made


def federate(
    folder: Path,
    text: str,
    bend: Callable[[Task, Reply], Reply] = lambda _, reply: reply,
    state: ServerState | None = None,
    gathered: gather.Gather = gather.clear,
) -> tuple[ServerState, Heard]:
    settings = override(Settings(), f"{BASE} {text}")
    here = node(settings, folder)
    heard = Heard(EmbeddedFleet(here), bend, settings)
    plans, begin = budget.plans(heard.hello(), settings), state or first_state(here.template, settings)
    begin = replace(begin, until=settings.rounds.number)
    ran = rounds.rounds(heard, heard.hello(), plans, begin, settings, heard, lambda _: Score(1.0, 0.5), gathered)
    heard.states = [after for after, _ in ran]
    return heard.states[-1], heard


def moved(state: ServerState) -> np.ndarray:
    """How far the weights came from where they began."""
    start = first_state(node(override(Settings(), BASE), Path()).template, Settings()).weights
    return state.weights.astype(float) - start


def lost(task: Task, _: Reply) -> Reply:
    return Reply(task.round, task.client, reason="gone")


# ---- the mean ----


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("unit", ["none", "example"])
def test_the_update_is_the_weighted_mean_that_floats_give_up_to_the_step(
    tmp_path: Path, weighting: str, unit: str
) -> None:
    text = f"server.weighting={weighting} privacy.unit={unit} privacy.noise_seed=1"
    floats, _ = federate(tmp_path / "a", text)
    integers, heard = federate(tmp_path / "b", f"{text} codec=int20")
    np.testing.assert_allclose(moved(integers), moved(floats), atol=4 * heard.grid.step)
    other, _ = federate(
        tmp_path / "c", f"{text} server.weighting={'uniform' if weighting == 'examples' else 'examples'}"
    )
    assert np.abs(moved(other) - moved(floats)).max() > 100 * heard.grid.step
    assert heard.rows[0]["bytes_up"] == len(NAMES) * packing.size(len(heard.tasks[0].weights) + 2, 20)


def test_the_update_is_exactly_the_sum_of_the_integers_over_the_sum_of_their_weights(tmp_path: Path) -> None:
    state, heard = federate(tmp_path, "codec=int5")
    grid = heard.grid
    sums = [0] * grid.entries
    for reply in heard.replies:
        sums = [a + int(b) for a, b in zip(sums, packing.unpack(reply.payload, grid.entries, 5), strict=True)]
    mean = np.array([(one - len(NAMES) * grid.top) * grid.step for one in sums[:-2]]) / (sums[-2] / grid.heaviest)
    start = heard.tasks[0].weights
    assert (state.weights == start + mean.astype(np.float32)).all()


def test_replies_that_are_missing_leave_the_mean_of_the_others(tmp_path: Path) -> None:
    def few(task: Task, reply: Reply) -> Reply:
        return lost(task, reply) if task.client == NAMES[7] else reply

    floats, _ = federate(tmp_path / "a", "", few)
    integers, heard = federate(tmp_path / "b", "codec=int20", few)
    np.testing.assert_allclose(moved(integers), moved(floats), atol=4 * heard.grid.step)


def test_a_round_without_a_reply_is_not_applied(tmp_path: Path) -> None:
    state, heard = federate(tmp_path, "codec=int8", lost)
    assert not heard.rows[0]["applied"]
    assert not moved(state).any()


def test_a_run_goes_on_from_its_last_round_to_the_same_bits(tmp_path: Path) -> None:
    text = f"{CLIENT} codec=int6 privacy.adapt=true rounds.number=3"
    whole, heard = federate(tmp_path / "a", text)
    again, later = federate(tmp_path / "b", text, state=heard.states[0])
    assert {task.round for task in later.tasks} == {2, 3}
    assert (again.weights == whole.weights).all()
    assert again.clip == whole.clip


# ---- client-level DP ----


@pytest.mark.parametrize("codec", ["int4", "int9", "int16"])
def test_the_noise_is_z_times_the_norm_after_rounding(tmp_path: Path, codec: str) -> None:
    state, heard = federate(tmp_path, f"{CLIENT} codec={codec}", lost)
    plan = budget.plans(heard.hello(), heard.settings)[NAMES[0]]
    noise = cohort_noise.generator(derive(4, "noise", 1)).normal(size=heard.grid.size)
    expected = noise * plan.mechanism.noise_multiplier * heard.grid.norm / len(NAMES)
    np.testing.assert_allclose(moved(state), expected, atol=1e-6)
    assert heard.grid.norm > 0.2


def test_bands_take_the_norm_after_rounding_too(tmp_path: Path) -> None:
    text = f"{CLIENT} privacy.bands=2 rounds.number=2"
    floats, _ = federate(tmp_path / "a", text, lost)
    integers, heard = federate(tmp_path / "b", f"{text} codec=int4", lost)
    np.testing.assert_allclose(moved(integers), moved(floats) * heard.grid.norm / 0.2, atol=1e-6)


def test_the_update_is_the_clipped_sum_over_the_cohort_expected(tmp_path: Path) -> None:
    noise, _ = federate(tmp_path / "a", f"{CLIENT} codec=int20", lost)
    whole, heard = federate(tmp_path / "b", f"{CLIENT} codec=int20")
    floats, _ = federate(tmp_path / "c", CLIENT)
    nothing, _ = federate(tmp_path / "d", CLIENT, lost)
    np.testing.assert_allclose(moved(whole) - moved(noise), moved(floats) - moved(nothing), atol=8 * heard.grid.step)
    assert all(reply.within for reply in heard.replies)  # the bit is in the sum alone


def test_adaptive_clipping_counts_the_clip_bits_in_the_sum_and_moves_the_grid(tmp_path: Path) -> None:
    text = f"{CLIENT} privacy.adapt=true"
    floats, _ = federate(tmp_path / "a", text)
    integers, heard = federate(tmp_path / "b", f"{text} codec=int16")
    absent, _ = federate(tmp_path / "c", f"{text} codec=int16", lost)
    assert integers.clip == floats.clip != absent.clip
    _, heard = federate(tmp_path / "d", f"{text} codec=int16 rounds.number=2")
    limits = {task.round: upload.grid_of(task, heard.settings) for task in heard.tasks}
    assert limits[1] is not None
    assert limits[2] is not None
    assert limits[2].limit == integers.clip != limits[1].limit


def test_local_noise_travels_as_integers(tmp_path: Path) -> None:
    text = "privacy.unit=local privacy.epsilon=50 privacy.noise_seed=1 privacy.clip=0.2"
    floats, _ = federate(tmp_path / "a", text)
    integers, heard = federate(tmp_path / "b", f"{text} codec=int16")
    np.testing.assert_allclose(moved(integers), moved(floats), atol=4 * heard.grid.step)
    assert np.abs(moved(floats)).max() > 100 * heard.grid.step


# ---- bad clients ----


def bent(change: Callable[[np.ndarray, Grid], None]) -> Callable[[Task, Reply, Settings], Reply]:
    def by(task: Task, reply: Reply, settings: Settings) -> Reply:
        grid = upload.grid_of(task, settings)
        assert grid is not None
        entries = packing.unpack(reply.payload, grid.entries, grid.bits)
        change(entries, grid)
        return replace(reply, payload=packing.pack(entries, grid.bits))

    return by


def put(place: int, value: Callable[[Grid], int]) -> Callable[[np.ndarray, Grid], None]:
    def change(entries: np.ndarray, grid: Grid) -> None:
        entries[place] = value(grid)

    return change


def longest(entries: np.ndarray, grid: Grid) -> None:
    entries[:-2] = 2 * grid.top


LIES: dict[str, tuple[Callable[[np.ndarray, Grid], None], str]] = {
    "value": (put(0, lambda grid: 2 * grid.top + 1), "a value of"),
    "weight": (put(-2, lambda grid: 3), "a weight of"),
    "no weight": (put(-2, lambda grid: 0), "a weight of"),
    "clip bit": (put(-1, lambda grid: 2), "clip bit of"),
    "length": (longest, "the norm after rounding"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("codec", ["int9", "int16"])
def test_integers_that_no_honest_client_sends_cost_that_client_its_update(tmp_path: Path, lie: str, codec: str) -> None:
    settings, (change, reason) = override(Settings(), f"{BASE} {CLIENT} codec={codec}"), LIES[lie]

    def bad(task: Task, reply: Reply) -> Reply:
        return bent(change)(task, reply, settings) if task.client == NAMES[3] else reply

    def gone(task: Task, reply: Reply) -> Reply:
        return lost(task, reply) if task.client == NAMES[3] else reply

    state, heard = federate(tmp_path / "a", f"{CLIENT} codec={codec}", bad)
    without, _ = federate(tmp_path / "b", f"{CLIENT} codec={codec}", gone)
    assert [entry["name"] for entry in heard.rows[0]["rejected"]] == [NAMES[3]]
    assert reason in heard.rows[0]["rejected"][0]["reason"]
    assert (state.weights == without.weights).all()


@pytest.mark.parametrize("unit", ["privacy.unit=none", "privacy.unit=example privacy.noise_seed=1", CLIENT])
def test_a_sum_that_fails_costs_the_round_which_stays_charged(tmp_path: Path, unit: str) -> None:
    def fails(ask: gather.Ask, tasks: Sequence[Task], grid: Grid, good: gather.Good, _: Mapping[str, Hello]) -> Summed:
        came = list(good(ask(tasks), lambda task, reply: reply))
        assert len(came) == len(NAMES)
        return Summed(np.zeros(grid.size), 0.0, 0.0, "nobody opened it")

    state, heard = federate(tmp_path, f"{unit} codec=int8", gathered=fails)
    assert (heard.rows[0]["applied"], heard.rows[0]["reason"]) == (False, "nobody opened it")
    assert not moved(state).any()
    asked = {task.client: task.steps for task in heard.tasks}
    paid = asked if "client" not in unit else dict.fromkeys(NAMES, 1)
    assert {name: spent.steps for name, spent in state.clients.items()} == paid
    assert {spent.last for spent in state.clients.values()} == {0}


# ---- refused pairs ----


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("codec=int16 server.combine=median", "server.combine=median compares single updates, and with codec=int16"),
        ("codec=int16 server.combine=krum", "server.combine=krum compares"),
        ("codec=int16 server.normalize=true", "server.normalize=true"),
        ("protect=encrypted codec=qsgd8", "codec=qsgd8 would make others of them: set codec=int16"),
        ("protect=masked codec=topk:0.1", "each chooses its own: set codec=shared-topk:0.1"),
        ("protect=encrypted codec=topk:0.1", "each chooses its own: set codec=shared-topk:0.1"),
        ("protect=masked codec=shared-topk:0.1:qsgd8", "codec=shared-topk:0.1:qsgd8 would make others of them"),
        ("protect=masked codec=shared-topk:0.1:int9", "protect.bits=16, and codec=shared-topk:0.1:int9 would"),
        ("codec=shared-topk:0.1:int9 server.combine=median", "compares single updates, and with codec=shared-topk"),
        ("codec=shared-topk:0.1 server.normalize=true", "holds what earlier rounds left"),
        ("codec=shared-topk:0.1 local.scaffold=true", "together they count it twice"),
        ("codec=shared-topk:0.1 privacy.unit=client privacy.bands=2", "each round is of others"),
        ("protect=masked server.combine=krum", "server.combine=krum compares single updates, and with protect=masked"),
    ],
)
def test_what_needs_single_updates_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        pairs.check(override(Settings(), text))


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("", 8),
        ("rounds.fraction=0.5", 4),
        ("privacy.unit=client rounds.fraction=0.5", 8),
        ("privacy.unit=client rounds.fraction=0.5 privacy.sampling=fixed", 4),
        ("privacy.unit=client privacy.bands=3", 3),
    ],
)
def test_more_clients_in_a_round_than_a_sum_has_room_for_are_refused_with_the_nearest(text: str, most: int) -> None:
    roster = {name: Hello(name, 10, "") for name in NAMES}
    run.enough(roster, override(Settings(), f"codec=int16 {text} protect.max_clients={most}"))
    run.enough(roster, override(Settings(), f"{text} protect.max_clients=1"))  # floats carry nothing over
    with pytest.raises(Refused, match=f"may sum {most} clients.*set protect.max_clients={most}"):
        run.enough(roster, override(Settings(), f"codec=int16 {text} protect.max_clients={most - 1}"))
