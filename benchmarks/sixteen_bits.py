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
from pathlib import Path

from digits import final_accuracy  # the benchmark beside this one

from scenarios import load

_RUNS = {"digits": "privacy.unit=none", "mnist": "rounds.number=10"}
_CODECS = ("float32", "int16")


def accuracy(name: str, codec: str, seed: int) -> float:
    """What `umbel run NAME --seed SEED` without privacy and with that codec reports as final.accuracy."""
    own = load(name).settings.reference.no_privacy_set
    return final_accuracy(name, f"{_RUNS[name]} {own} codec={codec} run.seed={seed}")


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
        found[name] = {codec: [accuracy(name, codec, seed) for seed in range(seeds[name])] for codec in _CODECS}
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
