"""Run folder -> report.html: what was learned, how well, at what price, and what ships to the edge."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from server import client_rows, figures, page, paper, proof, units
from server.figures import Series
from server.proof import Drawn
from server.publish import renew
from server.results import (
    Report,
    Row,
    accuracies,
    alarm,
    chosen,
    command,
    evaluation_share,
    load,
    load_rounds,
    over,
    protection,
    traffic,
)

__all__ = ["load", "write"]

MOST_CLIENTS = 50


def write(folder: Path, key: str = "", pdf: bool = False) -> Path:
    """Renders report.html from report.json and rounds.jsonl, atomically, and returns its path.

    First report.json takes over what audit.json says, and is signed where there is a key (server/publish.py).
    key: of --key. pdf: also report.pdf. Raises Refused, and writes nothing, when a file is missing or not whole.
    """
    report, rows = load(folder), load_rounds(folder)
    if renew(folder, key):
        report = load(folder)
    rows_file = report["privacy"].get("clients_file")
    report = client_rows.whole(report, folder)
    spent = sorted(report["privacy"]["clients"], key=lambda client: (-(client["epsilon"] or 0), client["name"]))
    worst = report["privacy"]["worst_epsilon"]
    text = page.render(
        "report",
        version=report["umbel_version"],
        run=report,
        rows=rows,
        verdict=" ".join(_verdict(report)),
        bars=accuracies(report),
        evaluated=evaluation_share(report),
        alarm=alarm(report),
        chosen=chosen(report),
        progress=list(_progress(report, rows)),
        price=list(_price(rows)),
        histogram=_histogram(report),
        clients=spent[:MOST_CLIENTS],
        rows_file="report.json" if rows_file is None else rows_file["file"],
        odds=_odds(worst) if worst is not None and worst < 12 else None,  # beyond, no one can picture it
        unapplied=sum(not row["applied"] for row in rows),
        left_out=_left_out(rows, report),
        command=command(report),
        protection=protection(report),
        **(_statement(report) if "statement" in report else {}),  # an older Umbel wrote none
    )
    if pdf:
        paper.write(folder / "report.pdf", text)
    return page.save(folder / "report.html", text)


def _statement(report: Report) -> dict[str, Any]:
    return {
        "parties": list(proof.parties(report)),
        "proof": list(proof.drawings(report)),
        "budgets": proof.budgets(report),
        "groups": proof.fields(report),
        "signers": proof.signers(report),
    }


def _verdict(report: Report) -> Iterator[str]:
    """The run in a few sentences for a reader who knows none of the terms."""
    final, reference, privacy, clients = (report[key] for key in ("final", "reference", "privacy", "fleet"))
    count = clients["clients"]
    who = "One client" if count == 1 else f"{count:,} clients"
    rounds = "one round" if report["rounds"] == 1 else f"{report['rounds']:,} rounds"
    together = "" if count == 1 else " together"
    yield f"{who} trained one model{together} in {rounds}, and the training data stayed where it was."
    if report["status"] != "done":
        yield "The run stopped before its last round; what follows is what was reached until then."
    if final["accuracy"] is None:
        yield f"How well it does is not known: {final['reason'] or 'it was not measured'}."
    else:
        sentence = f"It gets {units.percent(final['accuracy'])} of the test examples right"
        known = [
            f"{units.percent(reference[key])} {what}"
            for key, what in (
                ("no_privacy_accuracy", "for the same federation without privacy"),
                ("central_accuracy", "for a model trained on all the data in one place"),
            )
            if reference[key] is not None
        ]
        yield sentence + (f", against {' and '.join(known)}." if known else ".")
    if privacy["unit"] == "none":
        yield "No privacy was asked for, so nothing limits what the updates tell about single examples."
    elif not privacy["guarantee"]:
        yield "Its privacy account is shown below, but it guarantees nothing in this run."
    else:
        spent, allowed = units.epsilon(privacy["worst_epsilon"]), units.epsilon(privacy["epsilon"])
        whom, what = "anyone", "one example of a client"
        if privacy["unit"] == "client":
            whom, what = "anyone but the server", "one client, all its examples together,"
            if "statement" in report and report["statement"]["epsilon"]["adversaries"]["other_client"] is None:
                whom += " and other clients"
        if privacy["unit"] == "local":
            what = "one client, all its examples together,"
        yield (
            f"What {whom} can learn about {what} is bounded: "
            f"no client spent more than ε {spent} of the {allowed} allowed; smaller is safer."
        )
    ships = chosen(report)
    if ships is not None:
        right = "" if ships["accuracy"] is None else f" and is right on {units.percent(ships['accuracy'])}"
        right += " of the server's validation data" if right and final["evaluated_by"] == "clients" else ""
        yield (
            f"To the edge ships the {ships['name']} model: it takes {units.size(ships['bytes'])}, "
            f"answers in {units.micros(ships['latency_us'])}{right}."
        )


def _progress(report: Report, rows: Sequence[Row]) -> Iterator[Drawn]:
    averaged = report["settings"].get("rounds.average", 1)
    after = "After each round, on the test data"
    if averaged > 1:
        after += f" (final weights: the mean of the last {averaged})"
    if any(row["phase"] == "recover" for row in rows):
        after += "; orange: pruned, recovering"
    drawings: list[tuple[str, str, str, Callable[[float], str], bool]] = [
        ("accuracy", "Accuracy by round.", f"{after}.", units.percent, False),
        ("loss", "Loss by round.", "What training lowers; smaller is better.", units.number, False),
        ("epsilon", "ε spent by round.", "The worst client's account so far; it only grows.", units.number, True),
    ]
    for key, title, text, y_text, from_zero in drawings:
        if lines := _lines(rows, [row["round"] for row in rows], key):
            yield Drawn(title, text, figures.curves(title, lines, "round", y_text, from_zero=from_zero))


def _price(rows: Sequence[Row]) -> Iterator[Drawn]:
    time = [row["simulated_seconds"] for row in rows]
    drawings: list[tuple[str, str, Sequence[float | None], str, Callable[[float], str]]] = [
        ("Accuracy by bytes.", "All that was sent, both ways.", traffic(rows), "bytes sent", units.size),
        ("Accuracy by simulated time.", "On the fleet's clock.", time, "time on the fleet's clock", units.duration),
    ]
    for title, text, x, x_label, x_text in drawings:
        if lines := _lines(rows, x, "accuracy"):
            yield Drawn(title, text, figures.curves(title, lines, x_label, units.percent, x_text))


def _lines(rows: Sequence[Row], x: Sequence[float | None], y: str) -> list[Series]:
    """One line for training, one for recovery (another model, so the lines do not meet), those that hold a point."""
    lines = []
    for style, phase in enumerate(("train", "recover")):
        part = [(a, row) for a, row in zip(x, rows, strict=True) if row["phase"] == phase]
        xs, ys = over([row for _, row in part], [a for a, _ in part], y)
        if xs:
            lines.append(Series(xs, ys, style=style))
    return lines


def _histogram(report: Report) -> Markup | None:
    known = [client["epsilon"] for client in report["privacy"]["clients"] if client["epsilon"] is not None]
    spent = [epsilon for epsilon in known if math.isfinite(epsilon)]
    if len(spent) < 2:
        return None
    return figures.histogram("Clients by epsilon spent", spent, "ε", report["privacy"]["epsilon"])


def _left_out(rows: Sequence[Row], report: Report) -> list[dict[str, Any]]:
    """Who was not asked, late, rejected or not evaluated, why, and how often; most often first."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        seen.update((entry["name"], "not asked", entry["reason"]) for entry in row["skipped"])
        seen.update((entry["name"], "rejected", entry["reason"]) for entry in row["rejected"])
        seen.update((name, "late", "its reply missed the deadline") for name in row["late"])
    for entry in report["fleet"].get("unevaluated", ()):  # an older Umbel does not say
        seen[entry["name"], "not evaluated", entry["reason"]] += entry["times"]
    order = sorted(seen.items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "what": what, "reason": why, "times": times} for (name, what, why), times in order]


def _odds(epsilon: float) -> str:
    """e^epsilon to two digits."""
    return f"{float(f'{math.exp(epsilon):.1e}'):,g}"
