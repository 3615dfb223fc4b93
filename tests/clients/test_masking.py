"""A client of a masked sum: who it is, whom it believes, and what it refuses of a server that does not keep to it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from clients import masking, upload
from clients.masking import Member
from clients.task import Protection, Task
from privacy import masked_sum
from privacy.frames import Attempt, Rules, Stage, run_id
from privacy.integers import Grid
from privacy.refused import Refused
from scenarios.settings import Settings, override

NAMES = ["a", "b", "c", "d"]
WANTED = override(Settings(), "protect=masked protect.max_clients=4")


@pytest.fixture(autouse=True)
def _no_disk_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash would leave is the matter of other tests."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# ---- who it is, and whom it knows ----


def test_an_identity_lasts_as_long_as_its_state_folder_and_is_of_one_name(tmp_path: Path) -> None:
    first = masking.public(masking.identity(tmp_path / "one", "a"))
    assert masking.public(masking.identity(tmp_path / "one", "a")) == first
    others = [masking.identity(tmp_path / "one", "b"), masking.identity(tmp_path / "two", "a")]
    assert len({first, *map(masking.public, others)}) == 3
    assert (tmp_path / "one" / "key").stat().st_mode & 0o777 == 0o600


def test_lines_that_nodes_print_make_the_list_of_clients_of_all(tmp_path: Path) -> None:
    names = ["hospital-1", "St. Mary's", 'a "b"', "Zürich\\1"]
    states = {name: tmp_path / f"state-{i}" for i, name in enumerate(names)}
    lines = [masking.introduction(folder, name) for name, folder in states.items()]
    assert lines[0].startswith('hospital-1 = "')
    (tmp_path / "peers.toml").write_text("\n".join(lines))
    peers = masking.read_peers(tmp_path / "peers.toml")
    assert list(peers) == names
    for name, folder in states.items():
        assert masking.introduced(folder, name, peers) == peers[name].hex()


KEY = "5e" * 32


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a", "is no list of clients"),
        (f"a = {KEY}", "is no list of clients"),
        ('a = "no"', "is no list of clients"),
        ("a = 5", "is no list of clients"),
        (f'[a]\nkey = "{KEY}"', "is no list of clients"),
        (f'a = ["{KEY}"]', "is no list of clients"),
        (f'a = "{KEY}"\na = "{KEY}"', "is no list of clients"),
        (f'a = "{KEY[2:]}"', "the key of a has 31 bytes"),
        ('a = ""', "the key of a has 0 bytes"),
        ("\xff", "is no list of clients"),
    ],
)
def test_a_file_that_is_no_list_of_clients_is_one_line(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(Refused, match=why) as error:
        masking.read_peers(path)
    assert "\n" not in str(error.value)
    with pytest.raises(Refused, match="is no list of clients"):
        masking.read_peers(tmp_path / "nowhere.toml")


def test_a_client_that_its_owners_list_does_not_show_as_it_is_does_not_take_part(tmp_path: Path) -> None:
    for peers, why in (({}, "no key for a"), ({"a": bytes(32)}, "another key for a")):
        with pytest.raises(Refused, match=f"{why}: put in what `umbel key node` prints"):
            masking.introduced(tmp_path, "a", peers)


def test_a_name_that_does_not_fit_the_protocol_is_refused_before_round_1(tmp_path: Path) -> None:
    name = "n" * 65
    with pytest.raises(Refused, match="1 to 64 bytes"):
        masking.introduction(tmp_path, name)
    with pytest.raises(Refused, match="1 to 64 bytes"):
        masking.introduced(tmp_path, name, {name: bytes(32)})


# ---- what it answers ----

Change = Callable[[Task], Task]


@dataclass
class Round:
    """Four members on one disk, and a server that can send each of them something else than it should."""

    folder: Path
    settings: Settings = WANTED

    def __post_init__(self) -> None:
        self.peers = masking.simulated(self.folder, NAMES)
        self.task = Task(
            "train", 1, "a", np.linspace(-1, 1, 6, dtype=np.float32), (("w", (6,)),), 0.1, 2, update_clip=0.5, largest=9
        )
        self.rules = Rules(self.grid().entries, self.grid().width, 3)
        self.server = self.attempt(1)

    def grid(self, task: Task | None = None) -> Grid:
        made = upload.grid_of(task or self.task, self.settings)
        assert made is not None
        return made

    def attempt(self, number: int) -> masked_sum.Server:
        seen = masking.view(self.task, self.grid())
        self.requests: Mapping[str, bytes] = {}
        return masked_sum.Server(Attempt(run_id("r", self.rules), 1, number, seen), self.rules, self.peers, NAMES)

    def values(self, name: str) -> np.ndarray:
        return np.full(self.rules.entries, 1 + NAMES.index(name), np.uint64)

    def asked(self, name: str) -> Task:
        """The task that carries the server's request."""
        masked = self.server.stage is Stage.MASK
        said = Protection("r", self.rules.entries, 3, self.requests[name])
        return replace(self.task, kind="train" if masked else "protect", client=name, protection=said)

    def answer(self, name: str, change: Change = lambda task: task) -> bytes:
        task = change(self.asked(name))
        member = Member(self.folder, self.peers, self.settings.protect)
        if task.kind != "train":
            return member.answer(task, upload.grid_of(task, self.settings))
        return member.answer(task, self.grid(task), self.values(name))

    def until(self, stage: Stage | None) -> None:
        """Go on to the requests of `stage`, which nobody has answered; None: to the end."""
        while True:
            for name in self.requests:
                self.server.hear(name, self.answer(name))
            self.requests = self.server.ask()
            if not self.requests or self.server.stage is stage:
                return


def test_members_add_up_to_the_exact_sum_and_keep_no_secret_of_a_round_that_is_over(tmp_path: Path) -> None:
    members = Round(tmp_path)
    members.until(Stage.UNMASK)
    stored = list(tmp_path.glob("*/masks-*/secrets"))
    assert len(stored) == len(NAMES)
    assert {path.stat().st_mode & 0o777 for path in stored} == {0o600}
    members.until(None)
    assert (members.server.result().values == 1 + 2 + 3 + 4).all()
    assert {path.name for path in tmp_path.glob("*/masks-*/*")} == {"latest", "lock"}


def of(**changes: object) -> Change:
    return lambda task: replace(task, **changes)  # type: ignore[arg-type]


def saying(**changes: object) -> Change:
    return lambda task: replace(task, protection=replace(task.protection, **changes))  # type: ignore[type-var]


LIES: dict[str, tuple[Stage, Change, str]] = {
    "no protection": (Stage.MASK, of(protection=None), "without the protection"),
    "a sum of two": (Stage.ADVERTISE, saying(minimum=2), "a sum of 2 clients, this node's least is 3"),
    "a sum of one": (Stage.UNMASK, saying(minimum=1), "a sum of 1 clients"),
    "a higher minimum, later on": (Stage.SIGN, saying(minimum=4), "of another run, or under other rules"),
    "another length": (Stage.SHARE, saying(entries=7), "of another run, or under other rules"),
    "no entries": (Stage.SHARE, saying(entries=0), "an update of -2 values"),
    "another run": (Stage.MASK, saying(run="s"), "of another run"),
    "no request": (Stage.SIGN, saying(request=b""), "shorter than a header"),
    "another model": (Stage.MASK, of(weights=np.ones(6, np.float32)), "have not been shown this model"),
    "another largest client": (Stage.MASK, of(largest=10), "have not been shown this model, or not with"),
    "another learning rate": (Stage.MASK, of(rate=9.0), "have not been shown this model, or not with"),
    "another norm": (Stage.MASK, of(update_clip=0.6), "have not been shown this model, or not with"),
    "a vector in a task that trains nothing": (Stage.MASK, of(kind="protect"), "mask of .* has no place"),
    "training at another stage": (Stage.SIGN, of(kind="train"), "sign of .* has no place"),
    "another round": (Stage.SHARE, of(round=2), "share of .* has no place"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_does_not_keep_to_the_protocol_is_refused_and_costs_nothing(lie: str, tmp_path: Path) -> None:
    stage, change, why = LIES[lie]
    members = Round(tmp_path)
    members.until(stage)
    with pytest.raises(Refused, match=why):
        members.answer("b", change)
    members.until(None)  # what is asked rightly is answered still
    assert (members.server.result().values == 1 + 2 + 3 + 4).all()


@pytest.mark.parametrize("asked", [3, 5])
def test_a_minimum_that_the_owner_has_set_is_held_to(asked: int, tmp_path: Path) -> None:
    members = Round(tmp_path, override(WANTED, "protect.minimum=4"))
    members.until(Stage.ADVERTISE)
    with pytest.raises(Refused, match=f"a sum of {asked} clients, this node's least is 4"):
        members.answer("a", saying(minimum=asked))


@pytest.mark.parametrize(
    ("run", "minimum", "round_", "why"),
    [
        ("s", 3, 1, "another name than before"),
        ("s", 3, 2, "another name than before"),
        ("r", 4, 1, "round 1 is to be summed under other rules than round 1 was"),
        ("r", 4, 2, ""),
    ],
)
def test_one_update_goes_into_no_two_sums_under_two_names_or_rules(
    run: str, minimum: int, round_: int, why: str, tmp_path: Path
) -> None:
    members = Round(tmp_path)
    members.until(None)
    rules = replace(members.rules, minimum=minimum)
    task = replace(members.task, round=round_, client="a")
    grid, view = members.grid(task), masking.view(task, members.grid(task))
    server = masked_sum.Server(Attempt(run_id(run, rules), round_, 1, view), rules, members.peers, NAMES)
    said = Protection(run, rules.entries, minimum, server.ask()["a"])
    asked = replace(task, kind="protect", protection=said)
    member = Member(tmp_path, members.peers, WANTED.protect)
    if why:
        with pytest.raises(Refused, match=why):
            member.answer(asked, grid)
    else:
        server.hear("a", member.answer(asked, grid))


def test_stages_out_of_their_order_are_refused(tmp_path: Path) -> None:
    members = Round(tmp_path)
    members.until(Stage.SHARE)
    early = members.requests["a"]
    members.until(Stage.SIGN)
    late = members.requests["a"]
    with pytest.raises(Refused, match="asked twice, and not for the same, at share"):
        members.answer("a", saying(request=early[:-1] + bytes([early[-1] ^ 1])))
    other = Round(tmp_path / "other")
    other.until(Stage.SHARE)
    with pytest.raises(Refused, match="has not been asked here"):
        other.answer("a", saying(request=late))


def test_the_same_question_gets_the_same_bytes_and_never_a_second_vector(tmp_path: Path) -> None:
    members = Round(tmp_path)
    members.until(Stage.MASK)
    first = members.answer("a")
    members.values = lambda name: np.zeros(members.rules.entries, np.uint64)  # type: ignore[method-assign]
    assert members.answer("a") == first


def test_who_has_unmasked_takes_part_in_no_other_attempt_at_the_round(tmp_path: Path) -> None:
    members = Round(tmp_path)
    members.until(Stage.UNMASK)
    members.answer("a")
    members.server = members.attempt(2)
    members.until(Stage.ADVERTISE)
    with pytest.raises(Refused, match="round 1 is closed here"):
        members.answer("a")
    members.answer("b")


def test_a_list_of_clients_that_lacks_one_of_the_cohort_stops_its_owner_before_it_shares_anything(
    tmp_path: Path,
) -> None:
    members = Round(tmp_path)
    members.until(Stage.SHARE)
    known = {name: key for name, key in members.peers.items() if name != "c"}
    with pytest.raises(Refused, match="a roster of 1028 bytes for 4 of 3 known clients"):
        Member(tmp_path, known, WANTED.protect).answer(members.asked("a"), members.grid())
    with pytest.raises(Refused, match="the keys of c in the roster: not signed by its identity key"):
        Member(tmp_path, {**members.peers, "c": known["b"]}, WANTED.protect).answer(members.asked("a"), members.grid())


def test_two_names_on_one_disk_have_records_of_their_own_whatever_they_are_called(tmp_path: Path) -> None:
    members = Round(tmp_path / "states")
    members.until(Stage.ADVERTISE)
    members.peers |= masking.simulated(tmp_path / "states", ["../../a"])
    members.answer("a", of(client="../../a"))
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
