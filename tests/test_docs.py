"""The words are held against the program: links resolve, commands run, pages that are made are current."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer

from privacy import accounting
from privacy.plan import Mechanism
from scenarios.settings import Settings, override
from server import units
from server.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for folder in (ROOT, ROOT / "docs", ROOT / "docs" / "decisions") for path in folder.glob("*.md"))

# What makes a run of a few seconds of one of minutes: appended to the settings of every `umbel run` of the README.
SHORT = "rounds.number=2 rounds.average=1 export.recover_rounds=0 reference.central_epochs=0 reference.no_privacy=false"
ELSEWHERE = ("heart", "mnist", "data get", "--runtime")  # needs data that is not bundled, or is run by tests/parity

# A run in which something of everything happens: a client that fails, others that are late or offline.
EVENTFUL = '''"""Digits with a client that fails after its first word."""
from collections import Counter
from dataclasses import replace
from scenarios.digits import SCENARIO as digits

asked = Counter()

def data(settings):
    federation = digits.data(settings)
    def client(name):
        asked[name] += 1
        if name == "client-4" and asked[name] > 1:
            raise OSError("its disk is gone")
        return federation.client(name)
    def test(name):
        return federation.client("client-0") if name == "client-0" else client(name)
    return replace(federation, client=client, client_test=test)

SCENARIO = replace(digits, data=data)
'''
EVENTS = (
    "rounds.number=2 rounds.average=1 export.recover_rounds=1 reference.central_epochs=0 reference.no_privacy=false "
    "fleet.clients=8 fleet.profile=edge fleet.deadline=0.5 evaluation.on=clients local.engine=cohort run.processes=1"
)


def umbel(*words: str, cwd: Path) -> str:
    command = [sys.executable, "-P", "-m", "server.cli", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"umbel {shlex.join(words)}: {done.stderr}"
    return done.stdout


def commands(text: str) -> list[list[str]]:
    """The lines of the fenced or indented blocks that begin with `umbel` or `python`, as words."""
    found = re.findall(r"^(?: {4})?((?:umbel|python) .*)$", text, re.MULTILINE)
    return [words for line in found if (words := shlex.split(line, comments=True))]


def paths(value: Any, at: str = "") -> Iterator[str]:
    """Every key of a JSON value as a.b[].c; what maps names to values of any kind is one key."""
    if isinstance(value, dict) and at not in ("versions", "settings", "changed", "statement"):
        for key, inner in value.items():
            yield from paths(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from paths(inner, f"{at}[]")
    else:
        yield at


def documented(heading: str) -> set[str]:
    """The keys in the first column of the table under a heading of docs/runs.md."""
    section = (ROOT / "docs" / "runs.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {key.removesuffix("[]") for key in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)}


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eventful")
    (folder / "eventful.py").write_text(EVENTFUL)
    umbel("run", "eventful.py", "--set", EVENTS, "--out", "run", "--quiet", cwd=folder)
    return folder / "run"


def test_every_key_of_a_report_is_documented_and_every_documented_key_is_there(eventful: Path) -> None:
    assert set(paths(json.loads((eventful / "report.json").read_text()))) == documented("report.json")


def test_every_key_of_a_round_is_documented_and_every_documented_key_is_there(eventful: Path) -> None:
    rows = [json.loads(line) for line in (eventful / "rounds.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    lists = {"rejected", "skipped", "unevaluated", "engine.trained"}  # with entries or without
    assert {path for row in rows for path in paths(row)} | lists == documented("rounds.jsonl")


def test_every_file_of_a_run_folder_is_documented(eventful: Path) -> None:
    known = documented("The folder")
    found = {path.name + "/" * path.is_dir() for path in eventful.iterdir()}
    assert found <= known
    sometimes = {"references.json", "flower.log", "stop", "report.json.sig", "report.pdf", "audit.json"}
    large = {"fleet/", "clients.jsonl", "left_out.jsonl", "unevaluated.jsonl"}
    assert known - found == (sometimes | large) - found


def maker(name: str) -> Any:
    """docs/NAME.py, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_that_are_made_are_what_the_program_says_now() -> None:
    for name, page in maker("generate").PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"docs/{name} is not current: `make docs` makes it anew"


def test_the_figures_are_what_the_accountants_say_now_and_each_is_on_a_page() -> None:
    figures, shown = maker("figures"), " ".join(page.read_text() for page in PAGES)
    made = {path.name for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert made == set(figures.FIGURES)
    for name in made:
        assert (ROOT / "docs/images" / name).read_text() == figures.drawn(name), f"{name} is not current: `make docs`"
        assert f"images/{name})" in shown


def up(value: float) -> str:
    """Three significant digits, rounded up."""
    step = Decimal(10) ** (Decimal(value).adjusted() - 2)
    return str(Decimal(value).quantize(step, ROUND_CEILING))


def test_the_numbers_of_the_sharp_edges_are_what_the_accountants_say_now() -> None:
    page, client = " ".join((ROOT / "docs" / "sharp-edges.md").read_text().split()), maker("figures")
    told = "The client's epsilon is {} after one run, {} after two, {} after three, {} after five, {} after ten."
    spent = [accounting.epsilon({client.CLIENT: 500 * runs}, client.DELTA) for runs in (1, 2, 3, 5, 10)]
    assert told.format(*map(up, spent)) in page
    at = [units.epsilon(accounting.epsilon({client.CLIENT: 500}, delta)) for delta in (1e-2, 5e-4, 1e-5, 1e-7)]
    assert "{} at delta 1e-2, {} at 1 / 2000, {} at 1e-5, {} at 1e-7".format(*at) in page
    for epsilon in (1, 3, 8):  # a group of k is one example of k times the norm where no example is drawn
        noise = accounting.calibrate(1.0, 53, epsilon, 1 / 700, 1e4)
        group = [accounting.epsilon({Mechanism(1.0, noise / size): 53}, 1 / 700) for size in (2, 5, 10)]
        assert "| {} | {} | {} | {} |".format(epsilon, *map(up, group)) in page
    for noise in (4.0, 1.0):  # exchanging moves the sum by two norms
        pair = [up(accounting.epsilon({Mechanism(1.0, noise / moved): 1}, 1e-5)) for moved in (1, 2)]
        assert all(value in page for value in pair), pair
    sizes = (20, 70, 200, 1000, 10_000)
    noises = [accounting.calibrate(1.0, 53, 8.0, 1 / (10 * n), 1e4) / n for n in sizes]
    assert "| noise | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.4f} |".format(*noises) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in (link for link in links if not link.startswith(("http", "#"))):
        assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_umbel_command_has_options_and_settings_that_exist(page: Path) -> None:
    for _, *words in (words for words in commands(page.read_text()) if words[0] == "umbel"):
        command: click.Command = typer.main.get_command(app)
        context = click.Context(command)
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
            context = click.Context(command, context)
        given, _, _ = command.make_parser(context).parse_args(words)
        override(Settings(), given.get("set_") or "")


def test_every_test_that_a_page_names_exists() -> None:
    named = re.findall(r"`((?:\w+/)?test_\w+\.py): (test_\w+)`", (ROOT / "docs" / "pitfalls.md").read_text())
    assert len(named) > 50
    for file, name in named:
        path = ROOT / "tests" / (file if "/" in file else f"privacy/{file}")
        assert f"def {name}(" in path.read_text(), f"{file} has no {name}"


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make (\w+)`|^make (\w+)", page.read_text(), re.MULTILINE)}
    words = {one or other for one, other in named}
    assert words <= targets
    assert {"demo", "test", "check"} <= words


def test_the_commands_of_the_readme_run_in_their_order(tmp_path: Path) -> None:
    (scenario,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scenarios.md").read_text(), re.DOTALL)
    (tmp_path / "my_scenario.py").write_text(scenario)
    np.save(tmp_path / "input.npy", np.zeros((3, 64), np.float32))
    ran = []
    for program, *words in commands((ROOT / "README.md").read_text()):
        if any(word in shlex.join(words) for word in ELSEWHERE):
            continue
        if words[0] == "run":
            given = words.index("--set") if "--set" in words else len(words)
            words[given : given + 2] = ["--set", " ".join([*words[given + 1 : given + 2], SHORT])]
        if program == "umbel":
            umbel(*words, cwd=tmp_path)
        else:
            done = subprocess.run(
                [sys.executable, "-P", *words], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert len(done.stdout.splitlines()) == 3, done.stderr
        ran.append(words[0])
    assert {"run", "scenarios", "settings", "resume", "report", "export", "compare", "-m"} <= set(ran)
