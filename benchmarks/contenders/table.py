"""The table of one workload: medians with min and max, and the ratios of whoever does the same work."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agreement import Apart
from lineup import Layout, shown
from running import Outcome

OURS = "umbel", "umbel-cohort", "umbel-cohort-bf16"
Row = dict[str, Any]
NOISE = "noise-only", "noise-own"
"""Contenders that draw noise and do nothing else."""
_HEADS = {
    "": "18",
    "p x t": ">6",
    "s a round (min-max)": ">26",
    "CPU s": ">9",
    "start-up": ">9",
    "eval. s": ">8",
    "peak MB": ">8",
    "- torch": ">8",
    "accuracy": ">9",
    "apart": ">9",
    "/ limit": ">9",
}


def row(outcomes: Sequence[Outcome], layout: Layout, apart: Apart | None, agreeing: bool) -> Row:
    """What the JSON says of one contender at one workload; a run that failed is left out, and its reason kept."""
    good = [outcome for outcome in outcomes if not outcome.reason]
    reason = next((outcome.reason for outcome in outcomes if outcome.reason), None)
    found: Row = {"layout": shown(layout), "agrees": agreeing, "reason": reason}
    found["median_apart"], found["apart"] = apart or (None, None)
    if not good:
        return found
    seconds = [outcome.seconds for outcome in good]
    found |= {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "repeats": seconds}
    found["peak_mb"] = max(outcome.peak_mb for outcome in good)
    for name in good[0].more:
        if name != "rounds":
            found[name] = statistics.median(outcome.more[name] for outcome in good)
    return found


def fastest(outcomes: Mapping[Layout, Sequence[Outcome]]) -> Row:
    """The row of a contender that trains nothing, in the layout in which it took least."""
    rows = [row(found, layout, None, False) for layout, found in outcomes.items()]
    return min(rows, key=lambda one: one.get("median", float("inf")))


def without_noise(rows: Mapping[str, Row], noise: Mapping[str, Mapping[Layout, Sequence[Outcome]]]) -> dict[str, Row]:
    """`rows` less what drawing the same noise takes in the same layout, in this run.

    minus_noise: by torch's normal_. minus_own_noise: of ours by their own generator, of the others by normal_, theirs.
    """
    drawn = {
        name: {shown(layout): row(found, layout, None, False).get("median") for layout, found in layouts.items()}
        for name, layouts in noise.items()
    }
    made = dict(rows)
    for name, one in rows.items():
        own = "noise-own" if name in OURS else "noise-only"
        for key, generator in (("minus_noise", "noise-only"), ("minus_own_noise", own)):
            seconds = drawn.get(generator, {}).get(one["layout"])
            if seconds and "median" in one and one["apart"] is not None:
                made[name] = made[name] | {key: one["median"] - seconds}
    return made


def ratios(rows: Mapping[str, Row]) -> dict[str, float]:
    """ "flower / umbel-cohort": how many times the time of one of ours it takes; only where both do the same work."""
    found = {}
    for key, end in (
        ("median", ""),
        ("minus_noise", ", minus noise"),
        ("minus_own_noise", ", each minus its own noise"),
    ):
        fit = {name: one[key] for name, one in rows.items() if one.get(key, 0) > 0 and one["agrees"]}
        pairs = [(name, our) for our in OURS if our in fit for name in fit if name != our]
        found |= {f"{name} / {our}{end}": fit[name] / fit[our] for name, our in pairs}
    return found


def beside_noise(workloads: Mapping[str, Mapping[str, Row]], name: str) -> dict[str, float]:
    """C as a whole beside A and the noise alone, for each of ours."""
    rows, plain = workloads[name], workloads.get("A", {})
    noise = rows.get("noise-only", {}).get("median")
    if name != "C" or not noise:
        return {}
    ours = [our for our in OURS if "median" in rows.get(our, {}) and "median" in plain.get(our, {})]
    return {f"{our} / (its A + noise-only)": rows[our]["median"] / (plain[our]["median"] + noise) for our in ours}


def notes(
    name: str, rows: Mapping[str, Row], compared: Mapping[str, float], limit: Mapping[str, Any] | None
) -> Iterator[str]:
    """What stands below the table: the limit and what it is made of, other precisions, and ratios without a column."""
    if limit:
        yield (
            f"{name}'s limit is {limit['seconds']:.4g} s: {limit['gflop']:.3g} GFLOP take "
            f"{limit['arithmetic_s']:.4g} s on {limit['cores']} cores, noise {limit['noise_s']:.4g} s, "
            f"{limit['mb']:.3g} MB at {limit['gb_a_second']:.3g} GB/s {limit['traffic_s']:.4g} s"
        )
        for product, ways in limit["gflop_a_second"].items():
            yield f"  {product}: " + ", ".join(f"{way} {rate:.3g}" for way, rate in ways.items()) + " GFLOP/s"
    for contender, one in rows.items():
        if one.get("precision", "float32") != "float32":
            yield f"{contender} takes products in {one['precision']}: its ratios are not of the same precision"
    for pair, ratio in compared.items():
        if "noise" in pair:
            yield f"{pair}: {ratio:.2f}x"


def lines(name: str, summary: str, rows: Mapping[str, Row], limit: Mapping[str, Any] | None) -> Iterator[str]:
    """The table as text."""
    ours = [our for our in OURS if our in rows]
    yield f"{name}: {summary}"
    yield "".join(f"{head:{form}}" for head, form in _HEADS.items()) + "".join(f"{'/ ' + our:>20}" for our in ours)
    compared = ratios(rows)
    for contender, one in rows.items():
        start = f"{contender:18}{one['layout']:>6}"
        if "median" not in one:
            yield f"{start}  {one['reason']}"
            continue
        times = f"{one['median']:.4g} ({one['min']:.4g}-{one['max']:.4g})"
        apart = "-" if one["apart"] is None else f"{one['apart']:.1e}"
        cells = (
            f"{times:>26}{one['cpu']:9.3f}{one['start_up']:9.1f}{one['evaluation_seconds']:8.2f}{one['peak_mb']:8.0f}"
        )
        cells += f"{one['peak_mb'] - one['torch_mb']:8.0f}{one['evaluation_accuracy']:9.3f}{apart:>9}"
        cells += f"{one['median'] / limit['seconds']:9.1f}" if limit and one["agrees"] else f"{'-':>9}"
        for our in ours:
            ratio = compared.get(f"{contender} / {our}")
            cells += f"{'-' if ratio is None else f'{ratio:.2f}x':>20}"
        yield start + cells + ("" if one["agrees"] or one["apart"] is None else "  other weights: no ratio")
