"""A search for people: in the terminal, its trials side by side or its winner alone, and what either may claim."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from privacy.ledger import TESTS
from server import plan_text, results, units
from server.plan_facts import Facts
from server.search import Trial
from server.search_costs import SearchCost, Sought, account_name

VALIDATION = "The best is chosen by the server's own validation data, which no client's promise covers."
CONDITIONS = (
    "The claim holds for whoever sees this model and its report and nothing else: not the ledger, start.json or "
    "checkpoint.safetensors, which tell how many trials there were, nor how long they took. The server sees every "
    "trial, and where clients noise (privacy.unit=example, both, local) so does the network; towards them the ledger's "
    "sum is what holds."
)
_WORST = ("worst_epsilon", "worst_whole_epsilon", "worst_tests_epsilon")


def trials(texts: Sequence[str], done: Sequence[Trial], sought: Sought, console: Console | None = None) -> None:
    """Prints every trial of a search that shows all of them, the best one by name, and what they cost together."""
    out, best = console or Console(highlight=False), max(done, key=lambda trial: trial.validation)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "settings", "validation", "accuracy", "ε", "run"):
        table.add_column(name, overflow="fold")
    totals: dict[str, float] = {}
    for trial in done:
        report = results.load(trial.folder)
        for name, total in _totals(report["privacy"]):
            totals[name] = max(total, totals.get(name, 0.0))
        table.add_row(
            "✓" if trial is best else "",
            Text(texts[trial.candidate].strip()),
            units.percent(trial.validation),
            units.percent(report["final"]["accuracy"]),
            " / ".join(units.epsilon(report["privacy"][key]) for key in _WORST if report["privacy"][key] is not None),
            Text(str(trial.folder)),
            style="green" if trial is best else "",
        )
    out.print()
    out.print(table)
    out.print()
    rows = [("Best on validation data", f"{texts[best.candidate].strip()} ({best.folder})")]
    for cost in sought.costs:
        text = f"ε {units.epsilon(cost.composition)} by plain composition"
        if cost.name in totals:
            text += f"; over the ledger ε {units.epsilon(totals[cost.name])}"
        few = f", charged by {cost.candidates} of {sought.count} settings" if cost.candidates < sought.count else ""
        rows.append((_of("These trials cost", cost, sought), f"{text}, worst client{few}"))
    out.print(plan_text.table(rows))
    out.print(Padding(Text(VALIDATION, style="dim"), (0, 2)))


def _of(said: str, cost: SearchCost, sought: Sought) -> str:
    """`said`, or the account's name where there are several."""
    return said if len(sought.costs) == 1 else cost.name


def _totals(privacy: Facts) -> Iterator[tuple[str, float]]:
    """(name of the account, epsilon over the ledger's life) of every account that a report knows."""
    unit = "example" if privacy["unit"] == "both" else privacy["unit"]
    for client in privacy["clients"]:
        parts = ((unit, "", client), ("client", "", client["whole"]), ("example", TESTS, client["tests"]))
        for kind, dataset, part in parts:
            if part and part["epsilon_total"] is not None:
                yield account_name(kind, dataset), part["epsilon_total"]


def winner(text: str, best: Trial, sought: Sought, console: Console | None = None) -> None:
    """Prints what a secret search may say: the winner, and what may be claimed of it."""
    out = console or Console(highlight=False)
    of = f"{sought.trials:g} trials on average ({sought.distribution})"
    rows = [("Winner", f"{text.strip()}, {units.percent(best.validation)} on validation data")]
    for cost in sought.costs:
        claim = f"ε {units.epsilon(cost.selection)} by RepeatAndSelect, {of}"
        rows.append((_of("Claim for it alone", cost, sought), f"no claim: {cost.reason}" if cost.reason else claim))
    rows.append(("Charged to the ledger", "every trial, by plain composition"))
    out.print()
    out.print(Text("Search", style="bold"))
    out.print(plan_text.table(rows))
    out.print(Padding(Text(f"{CONDITIONS} {VALIDATION}", style="dim"), (0, 2)))
