"""umbel ledger … as a privacy officer meets it: what is spent, whether the record is whole, the record itself."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy import accounting, heads
from privacy.ledger import Account, Head, Ledger, Window
from privacy.plan import Mechanism
from server import cli

KNOWN = Account("example", "ward-7", "wards")
MINE = """
import torch
from torch import nn
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override

def data(settings):
    held = Examples(torch.ones(20, 2), torch.arange(20) % 2)
    return Federation({"a": 20, "b": 20}, lambda name: held, held, held)

born = override(Settings(), "privacy.unit=example privacy.epsilon=2 rounds.number=2 local.batch=0 export.prune=0 "
                "reference.no_privacy=false")
SCENARIO = Scenario("for a test", born, {"linear": lambda: nn.Linear(2, 2)}, data)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = Ledger(tmp_path / "simulations" / "wards.ledger")
    made.open({KNOWN: (20.0, 1e-3)})
    made.reserve("run", 1, {KNOWN: (Mechanism(1.0, 5.0), 4)})
    made.commit("run", 1, {KNOWN: 3})
    return made.path


def umbel(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["umbel", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_show_names_every_account_with_what_is_left(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    opened = Ledger(path)
    opened.read()
    epsilon = opened.accounts[KNOWN].epsilon
    for words in (["--state", str(path.parents[1])], [str(path)]):
        code, out, _ = umbel(capsys, "ledger", "show", *words)
        assert code == 0
        assert out.splitlines()[1].split() == [
            *("wards", "ward-7", "example", f"{epsilon:.4g}", "20", f"{20 - epsilon:.4g}", "none", "0.001", "3", "0")
        ]


def test_export_prints_every_record(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    _, out, _ = umbel(capsys, "ledger", "export", str(path))
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["kind"] for record in records] == ["OPEN", "RESERVE", "COMMIT"]
    assert records[0]["time"].endswith("Z")


def test_verify_exits_with_0_for_a_whole_ledger_and_with_2_for_an_edited_or_a_missing_one(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    code, out, _ = umbel(capsys, "ledger", "verify", str(path))
    assert (code, "3 records, whole" in out) == (0, True)
    whole = path.read_bytes()
    for content in (whole.replace(b'"steps":3', b'"steps":1'), whole[:60], b"", None):
        path.write_bytes(content) if content is not None else path.unlink()
        for words in ([str(path)], ["--state", str(path.parents[1])]):
            code, out, err = umbel(capsys, "ledger", "verify", *words)
            assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_budget_says_what_is_left_and_how_many_rounds_that_pays_for(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    opened = Ledger(path)
    opened.open({KNOWN: (None, 1e-3)}, Window(30, 15.0))
    epsilon, other = opened.accounts[KNOWN].epsilon, Account("example", "ward-8", "wards")
    opened.open({other: (None, 1e-3)})
    code, out, _ = umbel(capsys, "ledger", "budget", "--ledger", str(path))
    first, second = out.splitlines()[1:]
    assert code == 0
    assert f"{15 - epsilon:.4g} of 15 in 30 d" in first
    rounds = int(first.split()[-1])  # of 4 steps at noise multiplier 5, as its last one
    step = Mechanism(1.0, 5.0)
    assert accounting.epsilon({step: 3 + 4 * rounds}, 1e-3) <= 15 < accounting.epsilon({step: 7 + 4 * rounds}, 1e-3)
    assert second.split()[1:] == ["ward-8", "example", "none", "0"]
    code, out, _ = umbel(capsys, "ledger", "budget", "ward-7", "--ledger", str(path), "--noise", "1", "--steps", "2")
    assert (code, len(out.splitlines())) == (0, 2)
    assert int(out.split()[-1]) < rounds


def test_budget_gives_one_to_who_has_none_and_never_changes_one(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    opened, other = Ledger(path), Account("example", "ward-8", "wards")
    opened.open({other: (None, 1e-3)})
    ledger = ["--ledger", str(path)]
    before = path.read_bytes()
    for words, why in (
        (["ward-7", "ward-8", "--set", "5"], "has a budget of 20 for good"),
        (["--set", "5"], "clients that are named"),
        (["ward-9"], "no account of client 'ward-9'"),
        (["ward-8", "--set", "0"], "budget above 0"),
        (["ward-8", "--noise", "0"], "--noise must be above 0"),
    ):
        code, out, err = umbel(capsys, "ledger", "budget", *words, *ledger)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert why in err
    assert path.read_bytes() == before
    code, out, _ = umbel(capsys, "ledger", "budget", "ward-8", "--set", "5", *ledger)
    assert (code, out.splitlines()[1].split()[3]) == (0, "5")
    again = Ledger(path)
    again.read()
    assert [terms.budget for terms in again.accounts.values()] == [20.0, 5.0]


def test_adopt_says_what_it_charges_and_keeps_the_damaged_files(
    capsys: pytest.CaptureFixture[str], path: Path, tmp_path: Path
) -> None:
    node = tmp_path / "node" / "node.ledger"
    peer = Ledger(node)
    peer.open({KNOWN: (None, 1e-3)})
    peer.reserve("run", 1, {KNOWN: (Mechanism(1.0, 5.0), 4)}, 1)
    peer.reserve("run", 2, {KNOWN: (Mechanism(1.0, 5.0), 4)}, 1)
    path.write_bytes(damaged := path.read_bytes()[:-200])
    assert umbel(capsys, "ledger", "verify", str(path))[0] == 2
    code, out, _ = umbel(capsys, "ledger", "adopt", str(path), "--from", str(node))
    assert code == 0
    assert out.splitlines()[1].split() == ["wards", "ward-7", "example", "0", "8", "8"]
    kept = [Path(line.removeprefix("kept ")) for line in out.splitlines()[2:]]
    assert damaged in [file.read_bytes() for file in kept]
    assert umbel(capsys, "ledger", "verify", str(path))[0] == 0
    assert len(umbel(capsys, "ledger", "show", "--state", str(path.parents[1]))[1].splitlines()) == 3, "wards and node"
    code, _, err = umbel(capsys, "ledger", "adopt", str(path), "--from", str(tmp_path / "no.ledger"))
    assert (code, len(err.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "ends after record"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"steps":3', b'"steps":1')), "is damaged"),
        (lambda path: path.write_bytes(b"umbel ledger 1\n" + path.read_bytes()[15:]), "of another version"),
        (lambda path: path.write_bytes(b"round,steps\n"), "is no ledger"),
        (lambda path: path.unlink(), "ends after record 0"),
        (lambda path: path.with_name(path.name + ".head").unlink(), "head file is missing"),
        (lambda path: path.with_name(path.name + ".key").unlink(), "is missing, so it could be anyone's"),
        (lambda path: path.with_name(path.name + ".key").write_bytes(b"\0" * 32), "not written with this ledger's key"),
    ],
)
def test_a_run_refuses_a_ledger_that_is_no_good_in_one_line_with_exit_code_2_and_leaves_all_as_it_was(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    state = tmp_path / "state"
    (tmp_path / "mine.py").write_text(MINE)
    words = ["run", str(tmp_path / "mine.py"), "--quiet", "--state", str(state), "--out"]
    (state / "simulations").mkdir(parents=True)
    made = Ledger(state / "simulations" / "mine.ledger")
    made.open({Account("example", "a", "mine"): (20.0, 1e-3)})
    made.reserve("run", 1, {Account("example", "a", "mine"): (Mechanism(1.0, 5.0), 4)})
    made.commit("run", 1, {Account("example", "a", "mine"): 3})
    made.seal()
    spoil(made.path)
    before = {file: file.read_bytes() for file in made.path.parent.iterdir()}
    code, out, err = umbel(capsys, *words, str(tmp_path / "run"))
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("umbel: ")]
    assert why in line
    assert {file: file.read_bytes() for file in made.path.parent.iterdir()} == before
    assert not (tmp_path / "run").exists()


def process(words: list[str], before: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{before}\nsys.argv = ['umbel', *{words!r}]\nfrom server.cli import main\nmain()"
    house = Path(cli.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=house, check=False, timeout=100, **options
    )


@pytest.mark.parametrize("how", ["full", "held", "read-only"])
def test_a_disk_that_is_full_or_read_only_and_a_lock_that_is_held_are_one_line_and_exit_code_2(
    path: Path, tmp_path: Path, how: str
) -> None:
    """Real processes: a file size limit stands for a full disk, EROFS from open for a read-only one."""
    other = Ledger(path)
    other.open({Account("example", "ward-8", "wards"): (None, 1e-3)})
    files = {file: file.read_bytes() for file in path.parent.iterdir()}
    words = ["ledger", "budget", "ward-8", "--set", "5", "--ledger", str(path)]
    if how == "full":
        size = path.stat().st_size
        before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 9}, {size + 9}))"
        done = process(words, before)
    elif how == "held":
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            done = process(words, "from privacy import chain; chain._PATIENCE = 0.2")
    else:
        before = (
            "import errno, os; real = os.open\n"
            "def refuse(path, flags, *more, **named):\n"
            "    if flags & (os.O_RDWR | os.O_WRONLY): raise OSError(errno.EROFS, 'Read-only file system')\n"
            "    return real(path, flags, *more, **named)\n"
            "os.open = refuse"
        )
        done = process(words, before)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    why = {"full": "File too large", "held": "held by another process", "read-only": "Read-only file system"}[how]
    assert why in done.stderr
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == files


def test_an_empty_state_folder_is_said_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = umbel(capsys, "ledger", "show", "--state", str(tmp_path))
    assert (code, len(err.splitlines())) == (2, 1)


def test_recompute_is_a_command_that_fails_on_an_edited_ledger(path: Path) -> None:
    command = [sys.executable, "-m", "privacy.recompute", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(cli.__file__).parents[1])
    (row,) = json.loads(done.stdout)
    assert row.keys() == {"unit", "client", "dataset", "epsilon", "delta"}
    opened = Ledger(path)
    opened.read()
    assert row["epsilon"] == pytest.approx(opened.accounts[KNOWN].epsilon, rel=5e-3)
    path.write_bytes(path.read_bytes()[:-200])
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(cli.__file__).parents[1])
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_forget_drops_what_is_kept_of_one_device_and_verify_refuses_heads_that_were_edited(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    opened = Ledger(path)
    opened.read()
    heads.keep(opened, {KNOWN: Head(7, "ab" * 32)})
    before, ledger = path.read_bytes(), ["--ledger", str(path)]
    assert umbel(capsys, "ledger", "export", str(path))[1].count("ab" * 32) == 0
    assert umbel(capsys, "ledger", "forget", "ward-7", *ledger)[:2] == (0, "forgot 1 of client ward-7\n")
    assert heads.read(opened) == {}
    code, out, err = umbel(capsys, "ledger", "forget", "ward-7", *ledger)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert path.read_bytes() == before
    heads.place(opened).write_bytes(b"edited")
    for words in (["verify", str(path)], ["forget", "ward-7", *ledger]):
        code, out, err = umbel(capsys, "ledger", *words)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert ".heads is damaged" in err
