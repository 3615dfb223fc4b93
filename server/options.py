"""Options that several commands of umbel have, each written once."""

from typing import Annotated

import typer

ScenarioName = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="A name of `umbel scenarios`, a file.py, or a module.name.")
]
Set = Annotated[str, typer.Option("--set", help='Settings by name, as in "rounds.number=5 privacy.epsilon=3".')]
Seed = Annotated[int | None, typer.Option(help="Seed of split, partition, initialization and cohorts (run.seed).")]
Data = Annotated[str | None, typer.Option(help="Folder of data sets that are not bundled, else UMBEL_DATA (run.data).")]
State = Annotated[str | None, typer.Option(help="Folder of the privacy ledgers, else UMBEL_STATE (run.state).")]
