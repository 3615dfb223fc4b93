"""The command line as its user meets it: one clear line and exit code 2 for what can be mended, and no traceback."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients import masking, memory

BLOCKS = "local.engine=cohort"
QUICK = (
    "rounds.number=1 rounds.average=1 export.recover_rounds=0 export.prune=0 "
    "reference.central_epochs=0 reference.no_privacy=false"
)


WRONG = {
    "misspelt setting": (["run", "digits", "--set", "rounds.numbr=3"], "'rounds.number'"),
    "bad value": (["run", "digits", "--set", "rounds.number=many"], "rounds.number"),
    "unknown scenario": (["run", "digit"], "digits, heart, mnist"),
    "missing file": (["run", "./nowhere.py"], "nowhere.py"),
    "missing data": (["run", "mnist", "--data", "/nonexistent"], "umbel data get mnist"),
    "epsilon out of reach": (["run", "digits", "--set", "privacy.epsilon=0.01"], "smallest epsilon"),
    "unknown runtime": (["run", "digits", "--runtime", "cloud"], "embedded, simulation or deployment"),
    "deployment without superlink": (["run", "digits", "--runtime", "deployment"], "--superlink"),
    "no superlink there": (["run", "digits", "--runtime", "deployment", "--superlink", "127.0.0.1:9"], "127.0.0.1:9"),
    "negative seed": (["run", "digits", "--seed", "-1"], "run.seed"),
    "unknown command": (["rum"], "rum"),
    "unknown option": (["run", "digits", "--colour"], "--colour"),
    "no argument": (["run"], "SCENARIO"),
    "no run folder": (["resume", "/nonexistent"], "no run folder"),
    "nothing to report": (["report", "/nonexistent"], "report.json"),
    "a client's name without end": (["key", "node", "state", "n" * 65], "1 to 64 bytes"),
    "a state folder that cannot be one": (["key", "node", "/dev/null/state", "a"], "/dev/null/state cannot be used"),
    "a GPU in two processes": (["run", "digits", "--set", "local.device=cuda run.processes=2"], "set local.device=cpu"),
    "a sum of two": (["run", "digits", "--set", "protect=masked protect.minimum=2"], "greater than or equal to 3"),
    "unknown data set": (["data", "get", "imagenet"], "imagenet"),
    "blocks that only one by one can be": (
        ["run", "digits", "--set", f"{BLOCKS} local.fallback=fused fleet.clock=wall fleet.deadline=60"],
        "set local.fallback=single",
    ),
    "passes that no client can share": (
        ["run", "digits", "--set", f"{BLOCKS} local.fallback=none privacy.unit=none local.steps=50"],
        "set local.fallback=fused",
    ),
    "a precision that acts nowhere": (
        ["run", "digits", "--set", f"{BLOCKS} local.precision=bf16"],
        "local.precision=bf16",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_input_gives_one_line_and_exit_code_2_and_writes_nothing(
    umbel: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    words, named = WRONG[kind]
    monkeypatch.chdir(tmp_path)
    code, out, err = umbel(*words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_more_processes_than_memory_holds_give_one_line_and_exit_code_2(
    umbel: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: 30 << 20)
    code, out, err = umbel("run", "digits", "--set", f"{BLOCKS} run.processes=9 local.block=2")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "9 processes for blocks of 2 clients take about" in err
    assert "30 MiB are free here: set run.processes=1" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_truncated_run_folder_gives_one_line_and_exit_code_2(umbel: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert umbel("run", "digits", "--quiet", "--out", str(run), "--set", QUICK)[0] == 0
    (run / "report.json").unlink()
    whole = (run / "checkpoint.safetensors").read_bytes()
    (run / "checkpoint.safetensors").write_bytes(whole[:100])
    code, out, err = umbel("resume", str(run))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "damaged" in err


def test_quiet_prints_the_run_folder_alone(umbel: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = umbel("run", "digits", "--quiet", "--seed", "3", "--out", str(run), "--set", QUICK)
    assert (code, out, err) == (0, f"{run}\n", "")
    report = json.loads((run / "report.json").read_text())
    assert report["seed"] == 3
    assert report["changed"]["rounds.number"] == 1
    code, out, err = umbel("run", "digits", "--out", str(run))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "not empty" in err


def test_results_go_to_stdout_and_progress_to_stderr(umbel: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = umbel("run", "digits", "--out", str(tmp_path / "run"), "--set", QUICK)
    assert code == 0
    assert "round 1" in err
    assert "round 1" not in out
    assert "report.html" in out


def test_settings_lists_every_one_with_its_default(umbel: Callable[..., Any]) -> None:
    code, out, _ = umbel("settings", "digits", "--set", "rounds.number=5")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("rounds.number"))
    assert line.split()[1:3] == ["5", "50"]
    assert "federated rounds" in line


def test_scenarios_has_a_line_for_each(umbel: Callable[..., Any]) -> None:
    code, out, _ = umbel("scenarios")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line[:1].strip()] == ["digits", "heart", "mnist"]


def test_export_changes_export_settings_alone(umbel: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    umbel("run", "digits", "--quiet", "--out", str(run), "--set", QUICK)
    code, _, err = umbel("export", str(run), "--set", "privacy.epsilon=9")
    assert (code, len(err.splitlines())) == (2, 1)
    code, out, _ = umbel("export", str(run), "--quiet", "--set", "export.prune=0.5")
    assert (code, out) == (0, f"{run}\n")
    variants = json.loads((run / "report.json").read_text())["edge"]["variants"]
    assert {variant["name"] for variant in variants if variant["file"]} >= {"pruned-fp32", "unpruned-fp32"}
    assert "prune = 0.5" in (run / "settings.toml").read_text()


def test_the_installed_command_is_this_one() -> None:
    done = subprocess.run([Path(sys.executable).parent / "umbel", "--help"], capture_output=True, text=True, check=True)
    for command in ("run", "resume", "export", "report", "compare", "scenarios", "settings", "data"):
        assert command in done.stdout


def test_a_node_prints_the_line_that_others_know_it_by_and_always_the_same(
    umbel: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["key", "node", str(tmp_path / "state"), "hospital-1"]
    (code, out, err), again = umbel(*words), umbel(*words)
    assert (code, err, again) == (0, "", (0, out, ""))
    (tmp_path / "peers.toml").write_text(out)
    peers = masking.read_peers(tmp_path / "peers.toml")
    assert masking.introduced(tmp_path / "state", "hospital-1", peers) == peers["hospital-1"].hex()
