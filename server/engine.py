"""How a run's clients are trained: what can be said and refused of it before round 1, and what its rounds counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clients.roster import examples
from clients.steps import local_steps
from clients.task import Hello, Way
from clients.training import Node
from clients.ways import Ways
from privacy.refused import Refused
from server.state import Row

_KEPT = {"single": ("gram", "rows", "fused", "single"), "fused": ("gram", "rows", "fused"), "none": ("gram", "rows")}
"""local.fallback -> the ways that it leaves open."""
_SAID = {"fused": "one after another through one model", "single": "one by one"}


def fleet(node: Node, roster: Mapping[str, Hello]) -> Counter[Way]:
    """How many clients of the whole fleet are trained in each way, before anything is pruned; empty without blocks."""
    found: Counter[Way] = Counter()
    for way, _, _, count in kinds(node, roster):
        found[way] += count
    return found


def kinds(node: Node, roster: Mapping[str, Hello]) -> Iterator[tuple[Way, int, int, int]]:
    """(how, examples, steps of a round, how many) of clients that are alike."""
    settings = node.settings
    if settings.local.engine == "single":
        return
    ways, private = Ways.of(node, node.template), settings.privacy.by_example
    deadline = settings.fleet.clock == "wall" and settings.fleet.deadline > 0
    sizes = examples(roster)
    for size, count in zip(*(part.tolist() for part in np.unique(sizes[sizes > 0], return_counts=True)), strict=True):
        steps = local_steps(settings.local, size, private)
        yield ways.at(size, steps, private, deadline), size, steps, count


def check(node: Node, roster: Mapping[str, Hello]) -> None:
    """Raises Refused where clients would fall back further than local.fallback lets them, or bf16 would do nothing."""
    local, ways = node.settings.local, fleet(node, roster)
    out = [(way, count) for way, count in ways.most_common() if way.name not in _KEPT[local.fallback]]
    if out:
        way, count = out[0]
        last = "single" if any(way.name == "single" for way, _ in out) else "fused"
        raise Refused(
            f"local.fallback={local.fallback}, but {count} of {ways.total()} clients can only be trained "
            f"{_SAID[way.name]} ({way.why}): set local.fallback={last}, or remove what stands in the way"
        )
    if ways and local.precision != "float32" and all(way.precision == "float32" for way in ways):
        names = " or ".join(sorted({way.name for way in ways}))
        raise Refused(
            f"local.precision={local.precision} acts on clients that train through one model for their block "
            f"(clients/fused.py), and those of this run train otherwise ({names}): set local.precision=float32"
        )


def said(node: Node, roster: Mapping[str, Hello]) -> str:
    """One line on who shares no pass with others, and why; empty where all do."""
    ways, wanted = fleet(node, roster), node.settings.local.precision
    parts = [
        f"{count} of {ways.total()} clients are trained {_SAID[way.name]}: {way.why}"
        for way, count in ways.most_common()
        if way.name in _SAID
    ]
    if rough := sum(count for way, count in ways.items() if way.precision != "float32"):
        parts += [f"{wanted} for {rough} of {ways.total()}, float32 for the others"] if rough < ways.total() else []
    return f"cohort: {'; '.join(parts)}" if parts else ""


def tally(trained: list[dict[str, Any]], way: Way | None) -> None:
    """Count one client more in a row's engine.trained. way: None where nobody said it."""
    if way is None:
        return
    for one in trained:
        if (one["way"], one["why"], one["precision"]) == (way.name, way.why, way.precision):
            one["clients"] += 1
            return
    trained.append({"way": way.name, "why": way.why, "precision": way.precision, "clients": 1})


def summed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What all rounds counted, most first: `times` for the rows' `clients`."""
    times: Counter[tuple[str, str, str]] = Counter()
    for one in _entries(rows):
        times[one["way"], one["why"], one["precision"]] += one["clients"]
    keys = ("way", "why", "precision")
    return [dict(zip(keys, key, strict=True)) | {"times": count} for key, count in times.most_common()]


def _entries(rows: Sequence[Row]) -> Iterable[Mapping[str, Any]]:
    return (one for row in rows for one in row.get("engine", {}).get("trained", ()))  # an older Umbel's rows have none
