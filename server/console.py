"""The terminal when a run is done: its summary, on stdout."""

from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from server import results, units


def summary(run: results.Report, folder: Path, console: Console | None = None) -> None:
    """Prints what a run came to, from its report.json, on stdout: accuracy, privacy, edge models, where to go on."""
    out = console or Console(highlight=False)
    out.print()
    out.print(Text.assemble((run["scenario"], "bold"), "  ", (units.printable(run["summary"]), "dim")))
    if run["status"] != "done":
        out.print(Text(f"stopped before its last round, after {run['rounds']}", style="yellow"))
    parts = [
        ("Accuracy", _accuracy(run)),
        ("Privacy", _privacy(run)),
        ("Cost", _cost(run)),
        ("Edge models", _edge(run)),
    ]
    for title, body in parts:
        out.print()
        out.print(Text(title, style="bold"))
        out.print(body)
    out.print()
    out.print(_onward(run, folder))


def _accuracy(run: results.Report) -> RenderableType:
    final = run["final"]
    table = _facts()
    table.add_column()
    for bar in results.accuracies(run):
        value = units.percent(bar["accuracy"])
        if bar["accuracy"] is None:
            note = bar["reason"] or "not measured"
        elif bar["accuracy"] is final["accuracy"] or final["accuracy"] is None:
            note = ""
        else:
            note = units.points(bar["accuracy"], final["accuracy"])
        table.add_row(bar["name"], value, Text(units.printable(note), style="dim"))
    if final["worst_client_accuracy"] is not None:
        table.add_row("Worst client", units.percent(final["worst_client_accuracy"]), "")
    if final["evaluated_by"] == "clients":
        noised = run["privacy"].get("worst_tests_epsilon") is not None  # a report of an older Umbel has none
        said = "which noised what they say of it" if noised else "not covered by differential privacy"
        table.add_row("", "", Text(f"evaluated by the clients; {said}", style="dim"))
    return table


def _privacy(run: results.Report) -> RenderableType:
    privacy = run["privacy"]
    parts: list[RenderableType] = []
    if not privacy["guarantee"]:
        warning = Text(units.printable(f"{results.alarm(run)}: {privacy['why_not']}"), style="bold red")
        parts.append(Padding(warning, (0, 2)))
    table = _facts(align="left")
    if privacy["unit"] != "none":
        worst, allowed = units.epsilon(privacy["worst_epsilon"]), units.epsilon(privacy["epsilon"])
        table.add_row("Worst client", f"ε {worst} of {allowed} allowed")
        table.add_row("Median client", f"ε {units.epsilon(privacy['median_epsilon'])}")
        for key, name in (("worst_whole_epsilon", "Worst client as a whole"), ("worst_tests_epsilon", "Test examples")):
            if privacy.get(key) is not None:
                table.add_row(name, f"ε {units.epsilon(privacy[key])}")
        table.add_row("δ", privacy["delta_rule"])
        if against := privacy.get("against"):  # a report of an older Umbel has none
            table.add_row("Holds against", against)
        if "statement" in run:
            against = run["statement"]["epsilon"]["adversaries"]
            known = (("reader", "report_reader"), ("other client", "other_client"), ("server", "server"))
            bounds = (
                f"{who} {'no bound' if against[k] is None else f'ε {units.epsilon(against[k])}'}" for who, k in known
            )
            table.add_row("Against each", ", ".join(bounds))
    if run.get("protect", {"mode": "none"})["mode"] != "none":
        table.add_row("Updates", results.protection(run))
    return Group(*parts, *([table] if table.row_count else []))


def _cost(run: results.Report) -> RenderableType:
    fleet = run["fleet"]
    table = _facts(align="left")
    table.add_row("Bytes", f"{units.size(run['bytes']['up'])} up, {units.size(run['bytes']['down'])} down")
    clock = fleet["simulated_seconds"]
    wall = units.duration(run["seconds"]["total"])
    table.add_row("Time", wall if clock is None else f"{wall} here, {units.duration(clock)} on the fleet's clock")
    if (share := results.evaluation_share(run)) is not None:
        table.add_row("Evaluation", f"{units.percent(share)} of it")
    if left_out := fleet["left_out"]:
        most = ", ".join(f"{e['name']} {e['times']}x ({units.printable(e['reason'])})" for e in left_out[:3])
        more = f" and {len(left_out) - 3} more in the report" if len(left_out) > 3 else ""
        table.add_row("Left out most often", Text(most + more))
    if aside := fleet.get("left_out_file"):
        table.add_row("Left out", f"{aside['rows']} clients and reasons: {aside['file']}")
    return table


def _edge(run: results.Report) -> RenderableType:
    if not run["edge"]["variants"]:
        return Padding(Text("none was made", style="dim"), (0, 2))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(no_wrap=True)
    table.add_column("model", no_wrap=True)
    for name in ("size", "latency", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why")
    for variant in run["edge"]["variants"]:
        table.add_row(
            "✓" if variant["chosen"] else " ",
            variant["name"],
            units.size(variant["bytes"]),
            units.micros(variant["latency_us"]),
            units.percent(variant["accuracy"]),
            Text(units.printable(variant["reason"])),
            style="green" if variant["chosen"] else "",
        )
    rule = Text(f"Rule: {run['edge']['rule']}", style="dim")
    return Group(table, Padding(rule, (0, 2))) if run["edge"]["rule"] else table


def _onward(run: results.Report, folder: Path) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = [("Report", str(folder / "report.html"))]
    if results.chosen(run):
        rows += [
            ("Edge model", str(folder / "model.onnx")),
            ("Use it", f"python -m edge_export.infer {folder / 'model.onnx'} input.npy"),
        ]
    if "digest" in run:
        signed = run["statement"]["reproduction"]["signed_by"]
        by = f"signed by {signed}" if signed else "unsigned"
        rows.insert(1, ("Check it", f"umbel report --check {folder}  ({by}, digest {run['digest'][:16]}…)"))
    rows += [("Export again", f"umbel export {folder}"), ("Compare", f"umbel compare {folder} OTHER_RUN")]
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text))
    return table


def _facts(align: Literal["left", "right"] = "right") -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(min_width=24, no_wrap=True)
    table.add_column(justify=align, no_wrap=align == "right")
    return table
