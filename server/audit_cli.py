"""umbel audit: attack a scenario's or a run's own privacy code and say whether its claim survives."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privacy.refused import Refused
from server.options import Data

if TYPE_CHECKING:
    from server.audit import Progress, Result

Seed = Annotated[int | None, typer.Option(help="Seed of the canaries' coins, split and shadows (run.seed).")]


def audit(
    what: Annotated[
        str, typer.Argument(metavar="SCENARIO|RUN", help="A scenario as for `umbel run`, or a run folder.")
    ],
    set_: Annotated[str, typer.Option("--set", help='Settings by name, as in "privacy.unit=client".')] = "",
    seed: Seed = None,
    data: Data = None,
    attacks: Annotated[str, typer.Option(help="Of canaries, membership, inversion, with commas.")] = "canaries",
    canaries: Annotated[int, typer.Option(help="How many: each is in by a fair coin.")] = 5000,
    shadows: Annotated[int, typer.Option(help="membership: federations trained, and as many without privacy.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the verdict alone, no progress.")] = False,
) -> None:
    """Attack the real clip, codec, sum and noise, and hold what leaks against the epsilon that is claimed.

    Spends nothing of any privacy budget. A run folder also gets audit.json. Exit codes: 0 pass, or nothing is claimed;
    1 fail; 2 bad input.

    Example: umbel audit digits --attacks canaries,membership,inversion
    """
    import shlex

    from privacy.durable import write_atomic
    from scenarios import load
    from scenarios.settings import override
    from server import audit as auditor

    chosen = tuple(dict.fromkeys(word.strip() for word in attacks.split(",") if word.strip()))
    auditor.check(chosen, canaries, shadows)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise Refused(f"--out {out} is no file in a folder that exists: choose another")
    folder = Path(what) if Path(what).is_dir() else None
    start: dict[str, Any] | None = None
    if folder is not None and set_.strip():
        raise Refused(f"--set would audit another run than {folder}: name its scenario in place of the folder for that")
    if folder is not None:
        name, settings, start = auditor.begun(folder)
        scenario = load(name)
    else:
        scenario = load(what)
        settings = override(
            scenario.settings, f"{set_} run.seed={scenario.settings.run.seed if seed is None else seed}"
        )
    settings = override(settings, "" if data is None else shlex.quote(f"run.data={data}"))
    if {"membership", "inversion"} & set(chosen):
        print(f"umbel: {auditor.RELEASE}", file=sys.stderr)
    try:
        with _progress(quiet) as progress:
            found = auditor.run(scenario, settings, start, chosen, canaries, shadows, progress, seed)
    except KeyboardInterrupt:
        print("umbel: the audit was stopped: nothing was written", file=sys.stderr)
        raise typer.Exit(3) from None
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    if folder is not None:
        auditor.keep(folder, text)
    if out is not None:
        write_atomic(out, text.encode())
    if as_json:
        print(text, end="")
    elif quiet:
        print(found["verdict"])
    else:
        _show(found)
    if found["verdict"] == "fail":
        raise typer.Exit(1)


class _Silent:
    def start(self, text: str, total: int) -> Callable[[], None]:
        return lambda: None


@contextmanager
def _progress(quiet: bool) -> "Iterator[Progress]":
    """Bars on stderr, one a part, each with the time that is left."""
    if quiet:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    bars = Bars(*columns, console=Console(stderr=True))

    class Shown:
        def start(self, text: str, total: int) -> Callable[[], None]:
            bars.start()  # not before: what is refused stays one line
            task = bars.add_task(text, total=total)
            return lambda: bars.advance(task)

    try:
        yield Shown()
    finally:
        if bars.tasks:  # off a terminal, what never started would end in an empty line
            bars.stop()


def _show(found: "Result") -> None:
    """The result for people, on stdout."""
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from server import units

    out = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(min_width=22, no_wrap=True)
    table.add_column(overflow="fold")
    claim = found["claimed_epsilon"]
    at = "" if claim is None else f" at δ {units.scientific(found['delta'])}"
    table.add_row("Claimed", "nothing" if claim is None else f"ε {units.epsilon(claim)}{at}")
    if found["histogram"] is not None:
        table.add_row("Estimate", _estimate(found))
        bound, sure = found["lower_bound"], round(100 * found["confidence"])
        table.add_row(
            "Lower bound", units.MISSING if bound is None else f"ε {bound:.2f}, with {sure} % confidence{_weak(found)}"
        )
        table.add_row("Canaries", f"{found['canaries']:,} in {found['rounds']} rounds, seed {found['seed']}")
        table.add_row("In words", in_words(found["histogram"]))
        table.add_row("What was real", found["real"])
    for heading, body in (("Membership", _membership(found)), ("Inversion", _inversion(found))):
        if body:
            table.add_row(heading, body)
    colour = {"pass": "green", "fail": "bold red"}.get(found["verdict"], "yellow")
    verdict = Text(f"{found['verdict']}: {found['reason']}", style=colour)
    title = Text.assemble(("Audit of ", "dim"), (units.printable(found["scenario"]), "bold"), f"  unit {found['unit']}")
    out.print(Group(Text(), title, table, Text(), Padding(verdict, (0, 2))))
    out.print(Padding(Text("A pass means that these attacks found nothing, not that there is nothing.", "dim"), (0, 2)))


def _weak(found: "Result") -> str:
    """Each canary may be given away with chance delta, and the bound allows for all of them."""
    return "; at so large a δ it can say little" if 2 * found["canaries"] * found["delta"] > 1 else ""


def _estimate(found: "Result") -> str:
    if found["estimate"] is not None:
        return f"ε {found['estimate']:.2f}"
    return "no finite ε: the canaries come out without noise" if found["verdict"] != "none" else "–"


def in_words(histogram: "dict[str, list[float]]") -> str:
    """What the histogram of scores shows, in a sentence."""
    inside, outside = histogram["in"], histogram["out"]
    overlap = sum(min(a / sum(inside), b / sum(outside)) for a, b in zip(inside, outside, strict=True))
    at = len(outside)
    while at and sum(outside[at - 1 :]) <= sum(outside) / 100:
        at -= 1
    caught = sum(inside[at:]) / sum(inside)
    return (
        f"the scores of canaries that were in and of those held out overlap by {100 * overlap:.0f} %; "
        f"{100 * caught:.0f} % of those that were in lie above all but 1 % of those held out"
    )


def _membership(found: "Result") -> str:
    if (attack := found["membership"]) is None:
        return "" if "--attacks" in found["membership_reason"] else f"not done: {found['membership_reason']}"
    free = attack["without_privacy"]
    return (
        f"{attack['shadows']} shadow federations, {attack['targets']} {attack['unit']}s: AUC {attack['auc']:.3f} "
        f"(0.5 is guessing), {100 * attack['tpr_at_1pct_fpr']:.1f} % found at 1 % false alarms; without privacy "
        f"AUC {free['auc']:.3f}, {100 * free['tpr_at_1pct_fpr']:.1f} %"
    )


def _inversion(found: "Result") -> str:
    if (attack := found["inversion"]) is None:
        return "" if "--attacks" in found["inversion_reason"] else f"not done: {found['inversion_reason']}"
    free = attack["without_privacy"]
    return (
        f"{attack['examples']} examples: mean squared error {attack['mse']:.3g} ({attack['psnr']:.1f} dB), without "
        f"privacy {free['mse']:.3g} ({free['psnr']:.1f} dB), guessing the mean of the class "
        f"{attack['class_mean_mse']:.3g} ({attack['class_mean_psnr']:.1f} dB). {attack['note']}"
    )
