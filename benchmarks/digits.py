"""Final accuracy of `digits` over seeds at several privacy budgets, beside the same federation without privacy.

    python benchmarks/digits.py [--seeds N] [--first SEED] [--epsilon E ...] [--json FILE]

One model and one set of settings: privacy.epsilon alone is changed. The noise is real, so figures differ a little from
call to call. `final` is the accuracy of the unpruned, averaged weights on the held-out fifth, as in report.json.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from clients.training import Node
from scenarios import load
from scenarios.settings import override
from server import budget
from server.embedded import EmbeddedFleet
from server.references import NoJournal, no_privacy_reference
from server.rounds import rounds
from server.score import NOTHING, scorer
from server.state import final_weights, first_state


class _Forgetful(NoJournal):
    """Reserves nothing: the run is measured and thrown away, nothing of it leaves this process."""

    def reserve(self, number: int, steps: object) -> dict[str, str]:
        return {}


def final_accuracy(name: str, text: str) -> float:
    """What `umbel run NAME --set TEXT` reports as final.accuracy."""
    scenario = load(name)
    settings = override(scenario.settings, text)
    with tempfile.TemporaryDirectory(prefix="umbel-bench-") as states:
        node = Node(scenario, settings, scenario.data(settings), Path(states))
        fleet = EmbeddedFleet(node)
        roster = fleet.hello()
        plans, state = budget.plans(roster, settings), first_state(node.template, settings)
        *_, (last, _) = rounds(fleet, roster, plans, state, settings, _Forgetful(), lambda _: NOTHING)
        accuracy = scorer(node, fleet, sorted(roster))(replace(last, weights=final_weights(last))).accuracy
    assert accuracy is not None
    return accuracy


def without_privacy(seed: int) -> float:
    """The reference of the same seed."""
    scenario = load("digits")
    settings = override(scenario.settings, f"run.seed={seed}")
    accuracy = no_privacy_reference(scenario, settings, scenario.data(settings))
    assert accuracy is not None
    return accuracy


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds (default 20)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 3.0], help="budgets (default 8 3)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    seeds = range(chosen.first, chosen.first + chosen.seeds)

    def at(epsilon: float) -> list[float]:
        return [final_accuracy("digits", f"run.seed={seed} privacy.epsilon={epsilon}") for seed in seeds]

    found = {f"epsilon {e:g}": at(e) for e in chosen.epsilon}
    found["no privacy"] = [without_privacy(seed) for seed in seeds]
    base = statistics.mean(found["no privacy"])
    print(f"digits, seeds {seeds.start} to {seeds.stop - 1}")
    print(f"{'':14} {'mean':>7} {'sd':>7} {'worst':>7} {'of no privacy':>14}")
    for name, values in found.items():
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:14} {mean:7.4f} {spread:7.4f} {min(values):7.4f} {mean / base:14.3f}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
