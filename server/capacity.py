"""Whether this machine has the memory for what a run asks of it."""

from collections.abc import Mapping

from clients import cohort, memory, upload
from clients.task import Hello
from clients.training import Node
from privacy.refused import Refused
from scenarios.weights import flatten
from server import engine, select


def check(node: Node, roster: Mapping[str, Hello]) -> None:
    """Raises Refused for more processes than this machine's memory holds, by the client that takes most of it."""
    settings, asked = node.settings, select.cohort_size(len(roster), node.settings)
    told = cohort.told(settings, asked)
    count = min(told["processes"], -(-asked // max(1, told["block"])))
    free = memory.available() if count > 1 else None
    if free is None:
        return
    payload = 0 if cohort.weigh(settings) else upload.size(settings, len(flatten(node.template)))
    kinds = list(engine.kinds(node, roster))  # sizes come in order
    largest, together, left = {way: (size, steps) for way, size, steps, _ in kinds}, 0, told["block"]
    for _, size, _, number in reversed(kinds):
        together, left = together + size * min(number, left), left - min(number, left)
    block = told["block"]
    each = max((memory.need(node, way, block, *most, payload, together) for way, most in largest.items()), default=0)
    if count * each > free:
        fit = max(1, free // each)
        raise Refused(
            f"{count} processes for blocks of {told['block']} clients take about {each >> 20} MiB each, and "
            f"{free >> 20} MiB are free here: set run.processes={fit}, or a smaller local.block"
        )
