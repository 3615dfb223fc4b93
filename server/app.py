"""The Flower ServerApp: the main job over the nodes of a Flower grid.

The app prints what it does in lines that begin with `umbel: `; the last of them is `umbel: exit CODE TEXT`, with the
exit codes of the command line. `server.flower` reads that line, and `flwr log` shows it to everyone else.
"""

import os
import threading
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.training import Node
from privacy.refused import Refused
from scenarios import Scenario, load
from scenarios.settings import Settings, override
from server.blocks import BlockFleet
from server.flower import STOP
from server.grid import GridFleet
from server.record import RunFolder
from server.rounds import Fleet
from server.run import Stopped, prepare, run
from server.state import Row
from server.superlink import PARENT

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario that the run config names, over the nodes of `grid`."""
    if parent := os.environ.get(PARENT):
        threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    try:
        _say(f"exit 0 {_run(grid, context)}")
    except Stopped as stopped:
        _say(f"exit 3 {stopped}")
    except Refused as refused:
        _say(f"exit 2 {refused}")
        raise  # so that Flower, too, calls the run failed
    except Exception as error:
        _say(f"exit 1 {type(error).__name__}: {error}")
        raise


def _run(grid: Grid, context: Context) -> Path:
    name = str(context.run_config["scenario"])
    scenario = load(name)
    settings = override(scenario.settings, str(context.run_config["set"]))
    folder = _folder(name, scenario, settings)
    _say(f"folder {folder.path}")
    stop = folder.path / STOP
    runtime = "simulation" if settings.fleet.clock == "simulated" else "deployment"

    def fleet(node: Node) -> Fleet:
        sizes, knobs = node.federation.sizes, settings.fleet
        if runtime == "simulation" and settings.local.engine == "cohort":
            return BlockFleet(node, grid, _say)
        return GridFleet(grid, sizes, number=knobs.clients, wait=knobs.wait, stop=stop.exists)

    with folder:  # let go of before the last line is said: this process takes a while to end
        run(prepare(scenario, settings, folder, fleet, _Log(), stop.exists, runtime))
    return folder.path


def _folder(name: str, scenario: Scenario, settings: Settings) -> RunFolder:
    """The run folder: run.out, else a new one under runs/ where the SuperLink was started."""
    path = Path(settings.run.out or f"runs/{scenario.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    if not settings.run.resume:
        return RunFolder.create(path, name, settings)
    (path / STOP).unlink(missing_ok=True)  # it was meant for the run before
    folder = RunFolder.open(path)
    _, before = folder.settings()
    told = {name: getattr(settings.run, name) for name in ("data", "out", "state", "resume", "processes")}
    if before.model_copy(update={"run": before.run.model_copy(update=told)}) != settings:
        folder.close()
        raise Refused(f"{path} was started with other settings: the nodes read `set`, so repeat it, or start a new run")
    return folder


def _end_with(parent: int) -> None:
    """End this process when `parent` is gone, even by SIGKILL: else the run would go on and be held."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(0.2)


class _Log:
    """Progress as lines of the run's log."""

    def row(self, row: Row) -> None:
        came = "a secret draw" if row["replies"] is None else f"{row['replies']} of {len(row['cohort'])} replies"
        parts = [f"round {row['round']}: {came}"]
        parts += [f"{name} {row[name]:.3f}" for name in ("accuracy", "epsilon") if row[name] is not None]
        _say(", ".join([*parts, f"{row['seconds']:.1f} s"]))

    def status(self, text: str) -> None:
        _say(text)

    def note(self, text: str) -> None:
        _say(text)


def _say(text: str) -> None:
    print("umbel: " + " ".join(text.split()), flush=True)
