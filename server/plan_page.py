"""A plan as one offline page: the answer, the curve, the clients by size."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from privacy.ledger import TESTS
from server import figures, page, units
from server.figures import Series
from server.plan_facts import Facts
from server.plan_text import CURVE_WARNING, SEARCH_TERMS, UNITS, forecast_cost
from server.search_costs import account_name


def write(facts: Facts, path: Path) -> Path:
    """Draws the facts of a feasible plan at `path`, whole or not at all, and returns the path.

    Raises Refused where it cannot be written.
    """
    points = facts["curve"]
    curve = None
    if points:
        line = Series(
            [point["epsilon"] for point in points],
            [point["accuracy"] for point in points],
            [point["spread"] or 0.0 for point in points],
        )
        curve = figures.curves("Accuracy by ε.", [line], "ε", units.percent, units.number)
    sought = facts["search"]["accounts"] if facts["search"] else []
    text = page.render(
        "plan",
        version=version("umbel"),
        plan=facts,
        unit=UNITS.get(facts["unit"], facts["unit"]),
        promises=list(_promises(facts)),
        curve=curve,
        warning=CURVE_WARNING.format(forecast_cost(facts)) if points else "",
        sought=[(account_name(one["unit"], one["dataset"]), one) for one in sought],
        terms=SEARCH_TERMS,
    )
    return page.save(path, text)


def _promises(facts: Facts) -> Iterator[tuple[str, Facts]]:
    """(what a promise is about, its figures), of every account that a client has."""
    ends = [row["epsilon_total"] for row in facts["per_size"] if row["epsilon_total"] is not None]
    own = {"spent": facts["spent"]["max"], "epsilon_total": max(ends, default=None)}
    unit = "example" if facts["unit"] == "both" else facts["unit"]
    yield account_name(unit, ""), facts | own
    if facts["whole"]:
        yield account_name("client", ""), facts["whole"]
    if facts["tests"]:
        yield account_name("example", TESTS), facts["tests"]
