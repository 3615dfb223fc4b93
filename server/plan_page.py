"""A plan as one offline page: the answer, the curve, the clients by size."""

from importlib.metadata import version
from pathlib import Path

from server import figures, page, units
from server.figures import Series
from server.plan_facts import Facts
from server.plan_text import CURVE_WARNING, SEARCH_TERMS


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
    warning = CURVE_WARNING.format(units.epsilon(facts["curve_cost_epsilon"])) if points else ""
    text = page.render("plan", version=version("umbel"), plan=facts, curve=curve, warning=warning, terms=SEARCH_TERMS)
    return page.save(path, text)
