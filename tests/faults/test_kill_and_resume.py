"""SIGKILL at any moment, `umbel resume`: the run ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from privacy.ledger import Ledger
from privacy.plan import Mechanism

SMALL = (
    "rounds.number=4 rounds.average=2 export.recover_rounds=2 codec=topk:0.3 fleet.clients=5 server.step=momentum "
    "reference.central_epochs=0 reference.no_privacy=false"
)
SEEDED = SMALL + " privacy.noise_seed=7"
UMBEL = [sys.executable, "-m", "server.cli"]
ROOT = Path(__file__).parents[2]


def umbel(*words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*UMBEL, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stderr
    return done


def rounds_of(run: Path) -> list[dict[str, Any]]:
    """The rows without wall times."""
    path = run / "rounds.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")} for line in lines]


def kill_after(run: Path, command: list[str], rounds: int, delay: float) -> None:
    """Start `command` and SIGKILL it `delay` seconds after round `rounds` stands in rounds.jsonl."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(rounds_of(run)) < rounds:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    umbel("run", "digits", "--out", str(run), "--set", SEEDED, "--quiet")
    return run


def test_a_run_killed_in_several_rounds_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_after(run, [*UMBEL, "run", "digits", "--out", str(run), "--set", SEEDED, "--quiet"], 1, 0.03)
    for rounds, delay in ((2, 0.0), (4, 0.05), (5, 0.02)):  # a training round, between the phases, a recovery round
        kill_after(run, [*UMBEL, "resume", str(run), "--quiet"], rounds, delay)
    umbel("resume", str(run), "--quiet")
    assert (run / "weights.safetensors").read_bytes() == (undisturbed / "weights.safetensors").read_bytes()
    assert (run / "edge/pruned-fp32.onnx").read_bytes() == (undisturbed / "edge/pruned-fp32.onnx").read_bytes()
    assert rounds_of(run) == rounds_of(undisturbed)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, undisturbed)]
    assert reports[0]["privacy"] == reports[1]["privacy"]
    assert reports[0]["final"] == reports[1]["final"]


@pytest.mark.slow
def test_a_masked_run_killed_in_several_rounds_loses_those_alone_that_were_unmasked(tmp_path: Path) -> None:
    text = f"{SEEDED} codec=int16 rounds.number=6 local.steps=12"
    umbel("run", "digits", "--out", str(tmp_path / "whole"), "--set", text, "--quiet")
    run, masked = tmp_path / "run", f"{text} protect=masked"
    kill_after(run, [*UMBEL, "run", "digits", "--out", str(run), "--set", masked, "--quiet"], 1, 0.02)
    for rounds, delay in ((2, 0.1), (4, 0.0), (7, 0.05)):  # training rounds, a recovery round
        kill_after(run, [*UMBEL, "resume", str(run), "--quiet"], rounds, delay)
    umbel("resume", str(run), "--quiet")
    rows, whole = rounds_of(run), rounds_of(tmp_path / "whole")
    assert json.loads((run / "protect.json").read_text())["attempt"] == 5
    assert [row["round"] for row in rows] == [row["round"] for row in whole]
    out = [entry["reason"] for row in rows for entry in row["rejected"]]
    assert all("is closed here" in reason or "no masked sum" in reason for reason in out)
    assert all(row["applied"] or row["reason"].startswith("no masked sum: ") for row in rows)
    if not out:
        assert (run / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()


def test_resuming_a_finished_run_changes_nothing(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    done = umbel("resume", str(undisturbed), "--quiet")
    assert done.stdout.strip() == str(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_with_real_noise_an_interrupted_round_counts_as_spent_and_its_clients_skip_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    real = SMALL + " local.steps=12"  # long rounds, so that the kill falls into one
    kill_after(run, [*UMBEL, "run", "digits", "--out", str(run), "--set", real, "--quiet"], 2, 0.0)
    start = json.loads((run / "start.json").read_text())["ledger"]
    ledger, committed = Ledger(Path(start["path"])), len(rounds_of(run))
    if not ledger.unanswered(start["run"], committed):  # killed between two rounds: begin the next one by hand
        step = Mechanism(**json.loads((run / "start.json").read_text())["plans"]["client-0"]["mechanism"])
        ledger.reserve(start["run"], committed + 1, dict.fromkeys(ledger.accounts, (step, 12)))
    umbel("resume", str(run), "--quiet")
    report = json.loads((run / "report.json").read_text())
    assert report["privacy"]["ledger"]["path"] == start["path"]
    rows = rounds_of(run)
    assert {entry["name"] for entry in rows[-1]["skipped"]} == {
        client["name"] for client in report["privacy"]["clients"]
    }
    assert all("budget" in entry["reason"] for entry in rows[-1]["skipped"])
    assert all(client["epsilon"] <= 8 for client in report["privacy"]["clients"])
    assert all(client["steps"] == 6 * 12 for client in report["privacy"]["clients"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_round_with_the_line_that_resumes_it(tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    text = SMALL + " rounds.number=400 export.recover_rounds=0 privacy.unit=none"
    process = subprocess.Popen(
        [*UMBEL, "run", "digits", "--out", str(run), "--set", text], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while len(rounds_of(run)) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert errors.splitlines()[-1].endswith(f"`umbel resume {run}` goes on")
    assert len(rounds_of(run)) < 400
    assert "Traceback" not in errors


def test_a_run_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = SMALL + " rounds.number=4000 privacy.unit=none"
    process = subprocess.Popen(
        [*UMBEL, "run", "digits", "--out", str(run), "--set", text, "--quiet"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        while len(rounds_of(run)) < 1:
            time.sleep(0.01)
        done = umbel("resume", str(run), expect=2)
        assert "held by another process" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_a_full_disk_ends_the_run_in_one_line_and_resume_ends_it_with_the_same_bits(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    limit = 60_000  # bytes a file: the checkpoint outgrows them in round 3, when the average joins it
    words = ["umbel", "run", "digits", "--out", str(run), "--set", SEEDED, "--quiet"]
    code = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        f"sys.argv = {words!r}; runpy.run_module('server.cli', run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert len(rounds_of(run)) == 2
    umbel("resume", str(run), "--quiet")
    assert (run / "weights.safetensors").read_bytes() == (undisturbed / "weights.safetensors").read_bytes()
    assert rounds_of(run) == rounds_of(undisturbed)
