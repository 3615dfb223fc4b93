"""What blocks of clients, and bf16 in them, cost in accuracy: the CNN of McMahan et al. on MNIST, over seeds.

    python benchmarks/precision.py [--seeds N] [--rounds N] [--json FILE]

590 clients of 100 images, 10 a round, batches of 10, SGD 0.1, as workload B of benchmarks/simulation.py; UMBEL_DATA
names the folder that has MNIST. Every seed is trained one by one, in blocks, and in blocks with bf16, from the same
weights on the same batches; the accuracy is that of the last weights on the 10,000 test images.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from digits import final_accuracy  # the benchmark beside this one

_B = "model=cnn partition=iid fleet.clients=590 rounds.fraction=0.01695 local.epochs=1 local.batch=10 local.rate=0.1"
WAYS = {
    "single": "local.engine=single",
    "cohort": "local.engine=cohort run.processes=1",
    "cohort, bf16": "local.engine=cohort run.processes=1 local.precision=bf16",
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu = dict.fromkeys(WAYS, 0.0)
    for seed in range(chosen.seeds):
        for way, text in WAYS.items():
            began = time.process_time()
            found[way].append(
                100 * final_accuracy("mnist", f"{_B} {text} rounds.number={chosen.rounds} run.seed={seed}")
            )
            cpu[way] += time.process_time() - began
            print(f"seed {seed}, {way}: {found[way][-1]:.2f} %", file=sys.stderr)
    for way, values in found.items():
        apart = [value - truth for value, truth in zip(values, found["single"], strict=True)]
        print(
            f"{way}: {statistics.mean(values):.2f} % ({min(values):.2f} to {max(values):.2f}), "
            f"{statistics.mean(apart):+.2f} of single ({min(apart):+.2f} to {max(apart):+.2f}), "
            f"{cpu[way] / chosen.seeds:.0f} CPU s a run"
        )
    if chosen.json:
        chosen.json.write_text(json.dumps({"accuracy": found, "cpu": cpu}, indent=2) + "\n")


if __name__ == "__main__":
    main()
