"""The scenario that docs/scenarios.md shows is at most 40 lines, and runs from outside the repository as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "scenarios.md"
SHORT = "rounds.number=2 reference.no_privacy=false export.prune=0"


@pytest.fixture(scope="module")
def text() -> str:
    """The one Python block of the page."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return block


def umbel(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "server.cli", *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)


def report(done: subprocess.CompletedProcess[str], cwd: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / done.stdout.strip() / "report.json").read_text())


def test_it_has_at_most_forty_lines(text: str) -> None:
    assert 20 < len(text.splitlines()) <= 40


def test_it_runs_by_path_and_its_report_is_its_own(text: str, tmp_path: Path) -> None:
    (tmp_path / "my_scenario.py").write_text(text)
    found = report(umbel("run", "./my_scenario.py", "--set", SHORT, "--quiet", cwd=tmp_path), tmp_path)
    assert found["scenario"] == "my_scenario"
    assert found["rounds"] == 2
    assert found["privacy"]["guarantee"] is True
    clients = found["privacy"]["clients"]
    assert sum(client["examples"] for client in clients) == 400
    assert len(clients) == 5
    assert all(7.9 < client["epsilon"] <= 8 for client in clients)
    assert found["final"]["accuracy"] > 0.7
    assert [variant["name"] for variant in found["edge"]["variants"] if variant["chosen"]]
    run = next((tmp_path / "runs").iterdir())
    assert b"malignant" in (run / "model.onnx").read_bytes()


@pytest.mark.slow
def test_it_runs_by_its_dotted_name_and_resumes_from_another_folder(text: str, tmp_path: Path) -> None:
    (tmp_path / "library" / "mine").mkdir(parents=True)
    (tmp_path / "library" / "mine" / "clinics.py").write_text(text)
    library = str(tmp_path / "library")
    words = ["run", "mine.clinics", "--set", SHORT, "--out", str(tmp_path / "run"), "--quiet"]
    found = report(umbel(*words, cwd=tmp_path, PYTHONPATH=library), tmp_path)
    assert found["scenario"] == "mine.clinics"
    assert found["summary"].startswith("breast cancer")
    without = umbel(*words[:2], cwd=tmp_path)
    assert without.returncode == 2
    assert without.stderr.startswith("umbel: there is no scenario 'mine.clinics'")
    (tmp_path / "run" / "report.html").unlink()
    resumed = umbel("resume", str(tmp_path / "run"), "--quiet", cwd=Path("/"), PYTHONPATH=library)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "run" / "report.html").exists()
