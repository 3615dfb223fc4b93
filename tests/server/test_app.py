"""The ServerApp: what it says at its end, which folder it takes, and that it ends with the process it works for."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from privacy.refused import Refused
from scenarios import load
from scenarios.settings import override
from server import app as server_app
from server.flower import STOP, settings_text
from server.run import Stopped


def context(scenario: str = "digits", set_: str = "") -> Context:
    return Context(1, 1, {}, RecordDict(), {"scenario": scenario, "set": set_})


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (Refused("no such\nsetting"), "umbel: exit 2 no such setting"),
        (ValueError("shapes"), "umbel: exit 1 ValueError: shapes"),
        (Stopped("stopped after round 3"), "umbel: exit 3 stopped after round 3"),
        (Path("/runs/mine"), "umbel: exit 0 /runs/mine"),
    ],
)
def test_the_last_line_says_how_it_ended(
    end: Exception | Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*_: object) -> Path:
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(server_app, "_run", ended)
    if isinstance(end, Refused | ValueError):
        with pytest.raises(type(end)):  # so that Flower calls the run failed
            server_app.app(None, context())  # type: ignore[arg-type]
    else:
        server_app.app(None, context())  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("scenario", "set_", "reason"),
    [
        ("digitz", "", "there is no scenario 'digitz'"),
        ("digits", "rounds.numbr=3", "the nearest is 'rounds.number'"),
        ("digits", "run.resume=true run.out=/nowhere/at/all", "is no run folder"),
    ],
)
def test_bad_input_is_refused_before_any_node_is_asked(
    scenario: str, set_: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Refused):
        server_app.app(None, context(scenario, set_))  # type: ignore[arg-type]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("umbel: exit 2 ")
    assert reason in last


def test_a_resumed_run_keeps_its_settings_or_is_refused(tmp_path: Path) -> None:
    scenario, path = load("digits"), tmp_path / "run"
    first = override(scenario.settings, f"local.rate=3 run.seed=4 run.out={path}")
    server_app._folder("digits", scenario, first).close()
    again = override(scenario.settings, settings_text(scenario, first, path, resume=True, clock="simulated"))
    (path / STOP).touch()
    server_app._folder("digits", scenario, again).close()
    assert not (path / STOP).exists()
    for other in ("run.seed=5", "local.rate=2"):
        with pytest.raises(Refused, match="started with other settings"):
            server_app._folder("digits", scenario, override(again, other))


def test_a_new_run_without_a_folder_gets_one_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = server_app._folder("digits", load("digits"), load("digits").settings)
    assert folder.path.parent == tmp_path / "runs"
    assert folder.path.name.startswith("digits-")
    folder.close()


def test_it_ends_with_the_process_that_it_works_for_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit  # what os._exit does to a process, to the thread alone

    monkeypatch.setattr(os, "_exit", end)
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def watched() -> None:
        with suppress(SystemExit):
            server_app._end_with(parent.pid)

    watch = threading.Thread(target=watched, daemon=True)
    watch.start()
    time.sleep(0.5)
    assert ended == []
    parent.kill()
    parent.wait()
    watch.join(10)
    assert ended == [1]
