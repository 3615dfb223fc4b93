"""umbel: the command line. Results go to stdout, progress to stderr; bad input is one line and exit code 2."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import click
import typer

from privacy.refused import Refused
from server.audit_cli import audit
from server.keyholder_cli import register as register_keyholder
from server.ledger_cli import ledger_app
from server.options import Data, ScenarioName, Seed, Set, State
from server.plan_cli import register
from server.report_cli import key_app
from server.scenario_cli import data_app
from server.scenario_cli import register as register_scenarios

app = typer.Typer(
    name="umbel",
    help="Train one model across devices that keep their data, under a privacy budget, and ship it as ONNX.\n\n"
    "Start with `umbel run digits`. Exit codes: 0 done, 2 bad input, 3 stopped on purpose and resumable, 1 else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")
app.add_typer(ledger_app, name="ledger")
app.add_typer(key_app, name="key")
app.command()(audit)

Runtime = Annotated[
    str,
    typer.Option(
        help="embedded (this process), simulation (Flower on Ray; RAY_ADDRESS joins a cluster), deployment (nodes)."
    ),
]
Superlink = Annotated[str, typer.Option(help="HOST:PORT of the running SuperLink, for --runtime deployment.")]
Key = Annotated[
    str, typer.Option("--key", metavar="FILE", help="PEM file of the Ed25519 key that signs, else UMBEL_KEY.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the run folder's path alone.")]


@app.command()
def run(
    scenario: ScenarioName,
    set_: Set = "",
    seed: Seed = None,
    data: Data = None,
    state: State = None,
    out: Annotated[
        str | None, typer.Option(help="Run folder, new or empty (run.out; default runs/SCENARIO-TIME).")
    ] = None,
    runtime: Runtime = "embedded",
    superlink: Superlink = "",
    key: Key = "",
    quiet: Quiet = False,
) -> None:
    """Run a scenario: federated rounds, references, pruning, export to ONNX, report.

    Example: umbel run digits --set "privacy.epsilon=3" --seed 7 --out runs/mine

    Hide single updates from the server: --set "protect=masked", or encrypted; docs/protected.md says from whom.
    """
    from scenarios import load
    from scenarios.settings import override
    from server import launch

    chosen = load(scenario)
    settings = override(chosen.settings, " ".join([set_, *_flags(seed, data, out, state, key)]))
    folder = Path(settings.run.out or f"runs/{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    launch.go(chosen, scenario, settings, folder, runtime, superlink, quiet, new=True)


@app.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was stopped or killed.")],
    data: Data = None,
    state: State = None,
    runtime: Runtime = "embedded",
    superlink: Superlink = "",
    quiet: Quiet = False,
) -> None:
    """Go on with a run from its last committed round. A finished run is left as it is."""
    from scenarios import load
    from scenarios.settings import override
    from server import launch
    from server.record import RunFolder

    with RunFolder.open(run_folder) as folder:
        name, settings = folder.settings()
        finished = folder.finished
    if finished:
        print(run_folder, "has finished already: nothing to do", file=sys.stderr)
        launch.show(run_folder, quiet)
        return
    settings = override(settings, " ".join(_flags(None, data, None, state)))
    launch.go(load(name), name, settings, run_folder, runtime, superlink, quiet, new=False)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    set_: Annotated[str, typer.Option("--set", help='Export settings, as in "export.prune=0.7".')] = "",
    data: Data = None,
    state: State = None,
    quiet: Quiet = False,
) -> None:
    """Prune, recover, quantize, check and choose again, with what is left of the run's privacy budget."""
    from scenarios import load
    from scenarios.settings import knobs, override
    from server import launch
    from server import run as job
    from server.record import RunFolder

    with RunFolder.open(run_folder) as folder, launch.signals() as stop:
        name, before = folder.settings()
        settings = override(before, " ".join([set_, *_flags(None, data, None, state)]))
        old = {knob: value for knob, value, _ in knobs(before)}
        for knob, value, _ in knobs(settings):
            if value != old[knob] and not knob.startswith(("export.", "run.data", "run.state")):
                raise Refused(f"umbel export changes export.* alone, not {knob}: start a new run for that")
        with launch.prepared_job(load(name), settings, folder, stop, quiet) as prepared:
            folder.write_settings(name, settings)  # before: `umbel resume` goes on with an export that is cut off
            try:
                job.export(prepared)
            except job.Stopped as reason:
                raise launch.Stop(str(reason)) from None
    launch.show(run_folder, quiet)


@app.command()
def report(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run; for --check also a report.json.")
    ],
    check: Annotated[bool, typer.Option("--check", help="Print what is not true of it: exit code 2, else 0.")] = False,
    verify_key: Annotated[
        Path | None, typer.Option(metavar="PUB.pem", help="With --check: demand a signature by this public key.")
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Also write report.pdf (pip install '.\\[pdf]').")] = False,
    key: Key = "",
    quiet: Quiet = False,
) -> None:
    """Draw report.html again from report.json and rounds.jsonl, and print the summary; or check what it says.

    Example: umbel report --check runs/mine/report.json --verify-key operator.pem
    """
    from server import report_cli

    if check or verify_key is not None:
        report_cli.check(run_folder, verify_key)
    else:
        report_cli.draw(run_folder, key, pdf, quiet)


@app.command()
def compare(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN …", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Where to draw the page.")] = Path("compare.html"),
) -> None:
    """Print and draw runs side by side; seeds of one setting become one row with mean and spread."""
    from server import compare as side_by_side

    side_by_side.compare(run_folders, out)


register_scenarios(app)
register(app)
register_keyholder(app, key_app)


def main() -> None:
    """The `umbel` command."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        _check_house()
        code = typer.main.get_command(app).main(standalone_mode=False)
    except Refused as error:
        code = _fail(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        code = 2
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "umbel"
        code = _fail(f"{error.format_message()} (see `{where} --help`)", 2)
    except (click.Abort, KeyboardInterrupt):
        code = _fail("interrupted in the middle of a round: `umbel resume RUN` goes on from the last committed one", 3)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (RuntimeError, OSError) as error:  # a full disk, for one: what was committed stays
        if os.environ.get("UMBEL_TRACEBACK"):
            raise
        code = _fail(f"{error} (UMBEL_TRACEBACK=1 shows where)", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _flags(seed: int | None, data: str | None, out: str | None, state: str | None, key: str = "") -> list[str]:
    import shlex

    kept = _absolute(state) if state else state  # a run must find it from anywhere
    given = {"run.seed": seed, "run.data": data, "run.out": out, "run.state": kept, "report.key": _absolute(key)}
    return [shlex.quote(f"{name}={value}") for name, value in given.items() if value is not None]


def _absolute(path: str) -> str | None:
    return str(Path(path).expanduser().absolute()) if path else None


def _fail(line: str, code: int) -> int:
    print(f"umbel: {line}", file=sys.stderr)
    return code


def _check_house() -> None:
    """Another distribution's package of one of our plain names would be imported in our place: name the culprit."""
    import importlib.util

    house = Path(__file__).resolve().parent.parent
    for name in ("clients", "edge_export", "privacy", "scenarios"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != house / name:
            raise Refused(f"package {name!r} is {found or 'missing'}, not {house / name}: uninstall what provides it")


if __name__ == "__main__":
    main()
