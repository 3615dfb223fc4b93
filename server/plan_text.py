"""A plan for people: in the terminal, in words, small tables and bars."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from server import units
from server.plan_facts import Facts
from server.search_costs import account_name

MOST_SIZES = 9
UNITS: dict[str, str] = {
    "example": "one training example",
    "client": "one whole client",
    "both": "one training example, and one whole client",
    "local": "one whole client, also from the server",
}
CURVE_WARNING = (
    "The forecast trained on the data it was given and charged no ledger. Made-up or public data lose nothing by that. "
    "On real people's data, settings chosen by it are a search: it would have spent {} itself; --no-curve trains on "
    "nothing."
)
SEARCH_TERMS = (
    "The second may be claimed only where the number of trials is drawn in secret and nobody ever sees more than the "
    "winner (umbel search --secret); in every other case the first."
)


def show(facts: Facts, console: Console | None = None) -> None:
    """Prints an answer on stdout."""
    out = console or Console(highlight=False)
    unit = UNITS.get(facts["unit"], facts["unit"])
    out.print()
    out.print(Text.assemble((facts["scenario"], "bold"), (f"  a plan; what is protected: {unit}", "dim")))
    _part(out, "Plan", _plan(facts))
    if len(facts["per_size"]) > 1:
        _part(out, "Clients by size", _sizes(facts["per_size"]))
    if facts["spent"]["ledger"]:
        _part(out, "Ledger", _ledger(facts["spent"]))
    if facts["curve"]:
        _part(out, "Accuracy", _curve(facts))
        out.print(Padding(Text(CURVE_WARNING.format(forecast_cost(facts)), style="dim"), (0, 2)))
    if sought := facts["search"]:
        _part(out, "Search", _search(sought))
        out.print(Padding(Text(SEARCH_TERMS, style="dim"), (0, 2)))
    out.print()
    out.print(Text("Run it  ", style="bold"), Text(facts["command"]), sep="", soft_wrap=True)


def forecast_cost(facts: Facts) -> str:
    """What a forecast would have spent, on each account: "ε 3.00 (a client as a whole: ε 8.00)"."""
    parts = {"a client as a whole": "curve_cost_whole_epsilon", "test examples": "curve_cost_tests_epsilon"}
    more = [f"{name}: ε {units.epsilon(facts[key])}" for name, key in parts.items() if facts[key] is not None]
    return f"ε {units.epsilon(facts['curve_cost_epsilon'])}" + (f" ({', '.join(more)})" if more else "")


def _part(out: Console, title: str, body: Table) -> None:
    out.print()
    out.print(Text(title, style="bold"))
    out.print(body)


def _plan(facts: Facts) -> Table:
    recovery = f", and {facts['recover_rounds']} of recovery" if facts["recover_rounds"] else ""
    noise = units.number(facts["noise_multiplier"])
    one = len({row["noise_multiplier"] for row in facts["per_size"]}) == 1
    whose = "of every client" if one else f"the most; {facts['client']} needs it"
    steps = "1 step" if facts["local_steps"] == 1 else f"{facts['local_steps']} steps"
    count, forecast = facts["clients"]["count"], _predicted(facts)
    by_client = facts["whole"] or (facts if facts["unit"] == "client" else None)
    drawn = " on average" if by_client and by_client["sampling_rate"] < 1 else ""
    return table(
        [
            ("Noise multiplier", f"{noise}, {whose}"),
            ("Clip", f"{facts['clip']:g}"),
            ("Cohort", f"{facts['cohort']} of {count} clients a round{drawn}"),
            ("Rounds", f"{facts['rounds']}{recovery}; at most {facts['most_rounds']:,}"),
            ("Local work", f"{steps} a round, sampling rate {units.number(facts['sampling_rate'])}"),
            ("ε", f"{units.epsilon(facts['epsilon'])} of {facts['target']['epsilon']:g}, worst client"),
            ("δ", units.scientific(facts["delta"])),
            *_second("Client as a whole", facts["whole"]),
            *_second("Test examples", facts["tests"]),
            ("Predicted accuracy", forecast),
        ]
    )


def _second(name: str, promise: Facts | None) -> list[tuple[str, str]]:
    """The promise beside that to the training examples, in a row."""
    if promise is None:
        return []
    noise, epsilon = units.number(promise["noise_multiplier"]), units.epsilon(promise["epsilon"])
    times = f", {promise['evaluations']} evaluations" if "evaluations" in promise else ""
    clip, delta = f"clip {promise['clip']:.4g}", units.scientific(promise["delta"])
    rows = [(name, f"ε {epsilon}, δ {delta}, noise multiplier {noise}, {clip}{times}")]
    if out := promise.get("refused"):
        rows.append(("", f"{len(out)} cannot pay for every evaluation; {out[0]['client']}: {_short_of(out[0])}"))
    return rows


def _predicted(facts: Facts) -> str:
    if facts["predicted_accuracy"] is None:
        return f"not known: {facts['predicted_accuracy_reason']}"
    spread = _spread(facts["predicted_spread"])
    short = facts["curve_rounds"] < facts["rounds"]
    how = f"federations shortened to {facts['curve_rounds']} rounds" if short else "federations of all rounds"
    return f"{units.percent(facts['predicted_accuracy'])}{spread}, from {how}"


def _spread(deviation: float | None) -> str:
    return "" if deviation is None else f" ± {100 * deviation:.1f}"


def _sizes(rows: Sequence[dict[str, Any]]) -> Table:
    """The smallest, the largest and some between; all of them in --json."""
    last = len(rows) - 1
    shown = (
        sorted({round(i * last / (MOST_SIZES - 1)) for i in range(MOST_SIZES)})
        if last >= MOST_SIZES
        else range(last + 1)
    )
    columns = ("examples", "clients", "rate", "noise", "δ", "ε before", "ε run", "ε after")
    table = Table(box=None, padding=(0, 1, 0, 1), header_style="dim")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in (rows[i] for i in shown):
        table.add_row(
            units.number(row["examples"]),
            units.number(row["clients"]),
            units.number(row["sampling_rate"]),
            units.number(row["noise_multiplier"]),
            units.scientific(row["delta"]),
            *(_epsilon(row[key]) for key in ("spent", "epsilon", "epsilon_total")),
        )
    return table


def _ledger(spent: Facts) -> Table:
    def three(of: dict[str, float]) -> str:
        return " / ".join(_epsilon(of[key]) for key in ("min", "median", "max"))

    rows = [
        ("Spent so far", f"ε {three(spent)} (least, median, most)"),
        ("After this run", f"ε {three(spent['epsilon_total'])}"),
    ]
    if out := spent["refused"]:
        ways, second = spent["affordable_epsilon"], spent["affordable_client_epsilon"]
        whole = f" with privacy.client_epsilon={second:g}" if second else ""
        rows += [
            (f"{one['client']} cannot pay", f"{_short_of(one)} ({one['unit']}, {one['dataset']})")
            for one in out[:MOST_SIZES]
        ]
        rows += [("", f"and {len(out) - MOST_SIZES} more")] if len(out) > MOST_SIZES else []
        rows.append(("Everyone can pay", f"at ε {ways:g}{whole}" if ways else "at no ε: someone has nothing left"))
    else:
        rows.append(("Who cannot pay", "nobody"))
    return table([*rows, ("File", spent["ledger"])])


def _short_of(one: Facts) -> str:
    left = []
    if one["budget"] is not None:
        left.append(f"ε {one['left']:.3g} of {one['budget']:g} left")
    if window := one["window"]:
        left.append(f"ε {window['left']:.3g} of {window['epsilon']:g} in {window['days']:g} days left")
    ready = f", all from {one['ready']} on" if one["ready"] else ""
    return f"{', '.join(left)}: {one['rounds']} of {one['of']} rounds{ready}"


def _curve(facts: Facts) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for point in facts["curve"]:
        target = point["epsilon"] == facts["target"]["epsilon"]
        bar = "█" * round(40 * point["accuracy"])
        text = units.percent(point["accuracy"]) + _spread(point["spread"])
        table.add_row(f"ε {point['epsilon']:.3g}", text, bar, style="bold" if target else "")
    return table


def _search(sought: Facts) -> Table:
    trials = f"{sought['trials']:g} trials" + (
        f" of {sought['candidates']} settings" if sought["candidates"] > 1 else ""
    )
    drawn = f"{sought['trials']:g} on average ({sought['distribution']})"
    rows = []
    for one in sought["accounts"]:
        all_of, winner = units.epsilon(one["composition_epsilon"]), units.epsilon(one["repeat_and_select_epsilon"])
        few = one["candidates"] < sought["candidates"]
        charged = f", charged by {one['candidates']} of {sought['candidates']} settings" if few else ""
        if len(sought["accounts"]) > 1:
            rows.append((account_name(one["unit"], one["dataset"]), ""))
        rows += [
            (f"All of {trials} seen", f"ε {all_of} by plain composition{charged}"),
            (
                "The winner alone",
                f"no claim: {one['reason']}" if one["reason"] else f"ε {winner} by RepeatAndSelect, {drawn}",
            ),
        ]
    return table(rows)


def _epsilon(value: float | None) -> str:
    return "0" if value == 0 else units.epsilon(value)


def table(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values side by side."""
    made = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    made.add_column(min_width=24, no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(units.printable(name)), Text(units.printable(value)))
    return made
