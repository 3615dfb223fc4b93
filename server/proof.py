"""The privacy statement as a page shows it: who could learn what, its figures, what is left of budgets, every field."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from server import figures, guarantee, units
from server.figures import Series

Report = Mapping[str, Any]
MOST_ACCOUNTS = 10
_AGAINST = {
    "server": "server",
    "aggregator": "server",
    "other clients": "other_client",
    "report reader": "report_reader",
}


_SPENT = ("headline", "this_run", "rdp", "clients", "budget", *_AGAINST.values())
"""Epsilons by other names: rounded up, like every epsilon that is shown."""


class Drawn(NamedTuple):
    """A figure with its words."""

    title: str
    text: str
    svg: Markup


class Field(NamedTuple):
    """One field of a group, in words; with `reason` it has no value."""

    name: str
    text: str
    reason: str


def parties(report: Report) -> Iterator[dict[str, Any]]:
    """{party, sees, before_noise, epsilon, reason} for each; epsilon is null where none bounds it or is needed."""
    stated = report["statement"]
    against = stated["epsilon"]["adversaries"]
    whom = _AGAINST
    if report.get("protect", {}).get("mode") == "encrypted":  # an older Umbel has no such group
        whom = {**_AGAINST, "key holder": "server"}  # it reads the same sums
    for party in stated["trust"]["parties"]:
        key = whom.get(party["party"])
        why = "it sees no other's data" if key is None else against[f"{key}_reason"]
        epsilon = None if key is None else against[key]
        if party["party"] == "key holder" and party["before_noise"] and epsilon is not None:
            epsilon, why = None, "it reads the exact sums before it adds the noise: no epsilon bounds what it learns"
        yield {**party, "epsilon": epsilon, "reason": why}


def drawings(report: Report) -> Iterator[Drawn]:
    """The curve, what it means for a membership test, and the audit where there is one."""
    stated = report["statement"]
    points = stated["epsilon"]["curve"] or []
    if len(points) > 1:
        line = Series([point["epsilon"] for point in points], [point["delta"] for point in points])
        svg = figures.curves("delta by epsilon", [line], "ε", _power, units.number, log=True)
        yield Drawn(
            "δ for every ε.", "Of the costliest client: the promise holds at every point of the line at once.", svg
        )
    if len(points) > 1 and report["privacy"]["guarantee"]:
        shares = [float(share) for share in np.linspace(0, 1, 101)]
        best = [guarantee.true_positives(points, share) for share in shares]
        lines = [Series(shares, best), Series([0, 1], [0, 1], style=len(figures.SERIES) + 7)]
        svg = figures.curves("membership tests", lines, "false positives", units.percent, units.percent, from_zero=True)
        yield Drawn("The best membership test.", "No test against that client is above the line; dashed: a coin.", svg)
    audit = stated["audit"]
    if audit["histogram"]:
        found = audit["histogram"]
        svg = figures.bars("audit scores", found["edges"], [found["in"], found["out"]], "score of a canary")
        yield Drawn(
            "The audit.", "Canaries that took part (blue) and that did not (orange): the closer, the better.", svg
        )


def budgets(report: Report) -> list[dict[str, Any]]:
    """Clients with `share`, what is spent of each ledger account's budget, the least left first; at most 10.

    Without a budget the shares are of the largest total.
    """
    known = [client for client in report["privacy"]["clients"] if client["epsilon_total"] is not None]
    largest = max((client["epsilon_total"] for client in known), default=0.0)
    rows = []
    for client in known:
        whole = client["budget"] or largest
        if not whole or not math.isfinite(whole):
            continue
        total = min(1.0, client["epsilon_total"] / whole)
        rows.append({**client, "share": total, "left": None if client["budget"] is None else 1 - total})
    return sorted(rows, key=lambda row: (-row["share"], row["name"]))[:MOST_ACCOUNTS]


def fields(report: Report) -> dict[str, list[Field]]:
    """Every group of the statement, field by field, for a page."""
    return {name: list(_fields(group)) for name, group in report["statement"].items()}


def _fields(group: Mapping[str, Any]) -> Iterator[Field]:
    for name, value in group.items():
        if name == "reason" or name.endswith("_reason"):
            continue
        reason = group.get(f"{name}_reason") or group.get("reason") or ""
        empty = value in (None, "", [], {})
        if isinstance(value, Mapping) and any(key == "reason" or key.endswith("_reason") for key in value):
            yield from (field._replace(name=f"{name}.{field.name}") for field in _fields(value))
        else:
            yield Field(name.replace("_", " "), "" if empty else _text(name, value), reason if empty else "")


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _shown(name, value)
    if isinstance(value, Mapping):
        if value.keys() == {"least", "median", "most"}:
            texts = {key: _shown(name, one) for key, one in value.items()}
            if len({*texts.values()}) == 1:
                return f"{texts['most']}, the same for all"
            return f"{texts['least']} to {texts['most']}, median {texts['median']}"
        if "counts" in value:
            return f"{len(value['counts'])} bins, in report.json"
        return ", ".join(f"{key} {_text(key, one)}" for key, one in value.items() if one is not None)
    if isinstance(value, list):
        short = name in ("curve", "files", "hazards", "parties")
        return (
            f"{len(value)} entries, above and in report.json" if short else "; ".join(_text(name, one) for one in value)
        )
    return str(value)


def _shown(name: str, value: float) -> str:
    if name == "left":  # of a budget: never more than there is
        return f"{math.floor(100 * value) / 100:.2f}"
    return units.epsilon(value) if "epsilon" in name or name in _SPENT else units.number(value)


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def signers(report: Report) -> Sequence[str]:
    """Lines for those who put their name to it."""
    curator = report["statement"]["identity"]["curator"]
    return [f"For the data{f', {curator}' if curator else ''}", "For the operator"]
