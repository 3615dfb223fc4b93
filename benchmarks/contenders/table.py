"""The table of one workload: medians with min and max, and the ratios of whoever does the same work."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from running import Outcome

OURS = "umbel", "umbel-cohort"
Row = dict[str, Any]
_HEADS = {
    "": "14",
    "p x t": ">6",
    "s a round (min-max)": ">26",
    "CPU s": ">9",
    "start-up": ">9",
    "eval. s": ">8",
    "peak MB": ">8",
    "- torch": ">8",
    "accuracy": ">9",
    "apart": ">9",
}


def row(outcomes: Sequence[Outcome], layout: str, distance: float | None, agreeing: bool) -> Row:
    """What the JSON says of one contender at one workload; layout: processes x threads."""
    good = [outcome for outcome in outcomes if not outcome.reason]
    reason = next((outcome.reason for outcome in outcomes if outcome.reason), "")
    if not good:
        return {"layout": layout, "reason": reason or "not run", "apart": distance, "agrees": agreeing}
    seconds = [outcome.seconds for outcome in good]
    found: Row = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    found |= {"repeats": seconds, "peak_mb": max(outcome.peak_mb for outcome in good), "layout": layout}
    for name in good[0].more:
        if name != "rounds":
            found[name] = statistics.median(outcome.more[name] for outcome in good)
    return found | {"apart": distance, "agrees": agreeing, "reason": reason}


def ratios(rows: Mapping[str, Row]) -> dict[str, float]:
    """ "flower / umbel-cohort": how many times the time of one of ours it takes; only where both do the same work."""
    fit = {name: one["median"] for name, one in rows.items() if "median" in one and one["agrees"]}
    return {f"{name} / {our}": fit[name] / fit[our] for our in OURS if our in fit for name in fit if name != our}


def lines(name: str, summary: str, rows: Mapping[str, Row]) -> Iterator[str]:
    """The table as text."""
    ours = [our for our in OURS if our in rows]
    yield f"{name}: {summary}"
    yield "".join(f"{head:{form}}" for head, form in _HEADS.items()) + "".join(f"{'/ ' + our:>16}" for our in ours)
    compared = ratios(rows)
    for contender, one in rows.items():
        start = f"{contender:14}{one['layout']:>6}"
        if "median" not in one:
            yield f"{start}  {one['reason']}"
            continue
        times = f"{one['median']:.4g} ({one['min']:.4g}-{one['max']:.4g})"
        apart = "-" if one["apart"] is None else f"{one['apart']:.1e}"
        cells = (
            f"{times:>26}{one['cpu']:9.3f}{one['start_up']:9.1f}{one['evaluation_seconds']:8.2f}{one['peak_mb']:8.0f}"
        )
        cells += f"{one['peak_mb'] - one['torch_mb']:8.0f}{one['evaluation_accuracy']:9.3f}{apart:>9}"
        for our in ours:
            ratio = compared.get(f"{contender} / {our}")
            cells += f"{'-' if ratio is None else f'{ratio:.2f}x':>16}"
        yield start + cells + ("" if one["agrees"] else "  other weights: no ratio")
