"""umbel plan and umbel search: what reaches a target, and what trying several settings costs."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from privacy.refused import Refused
from server.options import Data, ScenarioName, Seed, State

if TYPE_CHECKING:
    from scenarios import Scenario
    from scenarios.settings import Settings
    from server.forecast import Forecast
    from server.planner import Answer
    from server.search_costs import Sought

Set = Annotated[str, typer.Option("--set", help='Settings by name, as in "local.batch=32 privacy.unit=client".')]
Candidates = Annotated[str, typer.Option(help='Settings to try, as in "privacy.clip=0.2 | privacy.clip=0.5".')]
Law = Annotated[str, typer.Option(help="How a secret number of trials is drawn: poisson, geometric, logarithmic.")]


def plan(
    scenario: ScenarioName,
    epsilon: Annotated[float | None, typer.Option(help="Target (privacy.epsilon); unset: the scenario's.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds (rounds.number); unset: the scenario's.")] = None,
    delta: Annotated[float | None, typer.Option(help="privacy.delta.")] = None,
    cohort: Annotated[float | None, typer.Option(help="Share of the clients asked a round (rounds.fraction).")] = None,
    clip: Annotated[float | None, typer.Option(help="privacy.clip.")] = None,
    set_: Set = "",
    seed: Seed = None,
    data: Data = None,
    state: State = None,
    curve: Annotated[bool, typer.Option("--curve/--no-curve", help="Predict accuracy by quick federations.")] = True,
    seconds: Annotated[float, typer.Option(help="What the forecast may take; with less it is coarser.")] = 60.0,
    trials: Annotated[float | None, typer.Option(help="Also say what a search of so many trials costs.")] = None,
    candidates: Candidates = "",
    distribution: Law = "poisson",
    out: Annotated[Path | None, typer.Option(help="Also draw the plan on a page, FILE.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON, for scripts.")] = False,
) -> None:
    """Plan a run: which noise reaches a target, what it costs every client, what accuracy to expect.

    What is left open gives way where the rest is out of reach. A target that cannot be reached ends with exit code 2
    and the nearest one that can.

    Example: umbel plan digits --epsilon 3 --rounds 50
    """
    from server import plan_facts, plan_page, plan_text, planner

    named = {
        "privacy.epsilon": epsilon,
        "rounds.number": rounds,
        "privacy.delta": delta,
        "rounds.fraction": cohort,
        "privacy.clip": clip,
    }
    chosen, settings = _settings(
        scenario, set_, {**named, "run.seed": seed, "run.data": data, "run.state": _place(state)}
    )
    given = {word.partition("=")[0] for word in shlex.split(set_)} | {name for name, value in named.items() if value}
    found = planner.answer(chosen, settings, "privacy.epsilon" not in given, "rounds.number" not in given)
    sought: Sought | str = "no search was asked for: --trials does"
    if trials is not None or candidates:
        sought = _sought(chosen, found, trials, candidates, distribution)
    foreseen: Forecast | str = "--no-curve was given" if not curve else found.reason
    if curve and found.feasible:
        foreseen = _forecast(found, seconds)
    facts = plan_facts.collect(scenario, found, foreseen, sought)
    if as_json:
        print(json.dumps(facts, indent=2))
    if not found.feasible:
        raise Refused(found.reason)
    if not as_json:
        plan_text.show(facts)
    if out is not None:
        print(plan_page.write(facts, out), file=sys.stderr if as_json else sys.stdout)


def search(
    scenario: ScenarioName,
    candidates: Candidates,
    trials: Annotated[
        float | None, typer.Option(help="How many runs (default: each candidate once); with --secret on average.")
    ] = None,
    secret: Annotated[
        bool, typer.Option("--secret", help="A secret number of runs; the winner alone is kept.")
    ] = False,
    distribution: Law = "poisson",
    set_: Set = "",
    seed: Seed = None,
    data: Data = None,
    state: State = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs (default runs/SCENARIO-search-TIME).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the winner's run folder alone.")] = False,
) -> None:
    """Run several settings under DP, charge every run to the ledger, and name the best by the server's validation data.

    Without --secret all runs are kept, and what they cost is all of them composed. With --secret the number of runs is
    drawn from the system's entropy, each takes a random candidate, and nothing but the winner is kept or shown: then
    the smaller RepeatAndSelect figure may be claimed for the winner alone.

    Example: umbel search digits --candidates "privacy.clip=0.2 | privacy.clip=0.35 | privacy.clip=0.6"
    """
    from server import launch, search_text
    from server import run as job
    from server import search as trying
    from server.search_costs import Sought
    from server.search_costs import candidates as parsed

    flags = {"run.seed": seed, "run.data": data, "run.state": _place(state)}
    chosen, settings = _settings(scenario, f"{trying.ALONE} {set_}", flags)
    tried = parsed(settings, candidates)
    if trials is not None and not secret and not (trials >= 1 and float(trials).is_integer()):
        raise Refused(f"--trials {trials:g} is no number of runs: give 1 or more, or --secret for a mean")
    sought = Sought(trials or float(len(tried)), distribution, [_within_reach(chosen, one) for one in tried])
    if secret and all(one.reason for one in sought.costs):
        raise Refused(f"a secret search of these could claim nothing for its winner: {sought.costs[0].reason}")
    folder = out or Path(f"runs/{chosen.name}-search-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} is not empty: choose another --out")
    reference, texts = str(Path(scenario).resolve()) if scenario.endswith(".py") else scenario, candidates.split("|")
    if secret:
        with _spinner("a secret search: how long it takes is all that can be seen", quiet):
            try:
                best = trying.secret(chosen, reference, tried, sought.repetitions, folder)
            except job.Stopped:
                raise launch.Stop("a trial of the search stopped: nothing is kept, what was spent is spent") from None
        if best is None:
            raise launch.Stop("the secret number of trials was 0: nothing was trained and nothing spent; search again")
        launch.show(best.folder, quiet)
        if not quiet:
            search_text.winner(texts[best.candidate], best, sought)
        return
    done, stopped = [], ""
    try:
        for trial in trying.shown(chosen, reference, tried, int(sought.trials), folder, quiet):
            done.append(trial)
    except job.Stopped as reason:
        stopped = str(reason)
    if done and quiet:
        print(max(done, key=lambda trial: trial.validation).folder)
    elif done:
        search_text.trials(texts, done, sought)
    if stopped:
        raise launch.Stop(stopped)


def _settings(scenario: str, set_: str, named: "Mapping[str, float | str | None]") -> "tuple[Scenario, Settings]":
    """The scenario with the settings of --set, and over them those that have a flag of their own."""
    from scenarios import load
    from scenarios.settings import override

    chosen = load(scenario)
    words = [shlex.quote(f"{name}={value}") for name, value in named.items() if value is not None]
    return chosen, override(chosen.settings, " ".join([set_, *words]))


def _place(folder: str | None) -> str | None:
    return str(Path(folder).expanduser().absolute()) if folder else folder


def _sought(chosen: "Scenario", found: "Answer", trials: float | None, text: str, distribution: str) -> "Sought | str":
    """What the search costs; each candidate must be within reach by itself."""
    from server.search_costs import Sought, candidates

    if not found.plans:
        return found.reason
    answers = [
        found if one == found.settings else _within_reach(chosen, one) for one in candidates(found.settings, text)
    ]
    return Sought(trials or float(len(answers)), distribution, answers)


def _within_reach(chosen: "Scenario", settings: "Settings") -> "Answer":
    from server import planner

    found = planner.answer(chosen, settings)
    if not found.plans:
        raise Refused(f"a candidate is out of reach: {found.reason}")
    return found


@contextmanager
def _spinner(text: str, quiet: bool) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True, quiet=quiet).status(text):
        yield


def _forecast(found: "Answer", seconds: float) -> "Forecast | str":
    from server.forecast import forecast

    try:
        with _bar("federations that predict accuracy") as progress:
            return forecast(found, progress, seconds)
    except KeyboardInterrupt:
        return "the forecast was interrupted"
    except Refused as reason:
        return str(reason)


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def register(app: typer.Typer) -> None:
    """Adds the commands to `umbel`."""
    app.command()(plan)
    app.command()(search)
