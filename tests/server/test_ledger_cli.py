"""umbel ledger … as a privacy officer meets it: what is spent, whether the record is whole, the record itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from server import cli

KNOWN = Account("example", "ward-7", "wards")


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
            *("wards", "ward-7", "example", f"{epsilon:.4g}", "20", f"{20 - epsilon:.4g}", "0.001", "3")
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
