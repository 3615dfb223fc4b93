"""What 16 bits cost in accuracy: updates as floats beside codec=int16, whose sums are those of masks and encryption.

    python benchmarks/sixteen_bits.py [--seeds N] [--mnist N] [--json FILE]

Without privacy, by the settings of the scenario's reference for that, so that nothing but the rounding differs; the
accuracy is that of the averaged weights on held-out data, as in report.json. `mnist` for 10 rounds, where UMBEL_DATA
names a folder that has it.
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from clients.training import Node
from scenarios import load
from scenarios.settings import override
from server import budget
from server.embedded import EmbeddedFleet
from server.references import NoJournal
from server.rounds import rounds
from server.score import NOTHING, scorer
from server.state import final_weights, first_state

_RUNS = {"digits": "privacy.unit=none", "mnist": "rounds.number=10"}
_CODECS = ("float32", "int16")


class _Forgetful(NoJournal):
    """Reserves nothing: the run is measured and thrown away, nothing of it leaves this process."""

    def reserve(self, number: int, steps: object) -> dict[str, str]:
        return {}


def final_accuracy(name: str, codec: str, seed: int) -> float:
    """What `umbel run NAME --seed SEED` with that codec reports as final.accuracy."""
    scenario = load(name)
    own = scenario.settings.reference.no_privacy_set
    settings = override(scenario.settings, f"{_RUNS[name]} {own} codec={codec} run.seed={seed}")
    with tempfile.TemporaryDirectory(prefix="umbel-bench-") as states:
        node = Node(scenario, settings, scenario.data(settings), Path(states))
        fleet = EmbeddedFleet(node)
        roster = fleet.hello()
        plans, state = budget.plans(roster, settings), first_state(node.template, settings)
        *_, (last, _) = rounds(fleet, roster, plans, state, settings, _Forgetful(), lambda _: NOTHING)
        accuracy = scorer(node, fleet, sorted(roster))(replace(last, weights=final_weights(last))).accuracy
    assert accuracy is not None
    return accuracy


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds of digits (default 10)")
    parser.add_argument("--mnist", type=int, default=1, help="seeds of mnist (default 1)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    seeds = {"digits": chosen.seeds, "mnist": chosen.mnist if os.environ.get("UMBEL_DATA") else 0}
    found = {}
    for name in (name for name, count in seeds.items() if count):
        found[name] = {codec: [final_accuracy(name, codec, seed) for seed in range(seeds[name])] for codec in _CODECS}
        floats, integers = (100 * statistics.mean(values) for values in found[name].values())
        apart = [100 * (b - a) for a, b in zip(*found[name].values(), strict=True)]
        spread = f", sd {statistics.stdev(apart):.2f}" if len(apart) > 1 else ""
        print(
            f"{name}, {seeds[name]} seeds: {floats:.2f} % in floats, {integers - floats:+.2f} points at 16 bits{spread}"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
