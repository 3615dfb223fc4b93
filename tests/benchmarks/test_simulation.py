"""benchmarks/simulation.py: what it prints for machines, and whom it sets in a ratio."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def contenders(monkeypatch):
    """Import a file of the contenders, which need no package around them."""
    monkeypatch.syspath_prepend(BENCHMARKS / "contenders")
    return importlib.import_module


def simulation(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "UMBEL_DATA"}
    command = [sys.executable, str(BENCHMARKS / "simulation.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def figures() -> dict:
    small = "--repeats 1 --rounds 1 --warmup 0 --layouts 1x1 --scale 25"
    done = simulation("--workloads", "A", "--peers", "none", "--json", *small.split())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_json_has_a_median_and_a_peak_of_every_contender(figures):
    for contender in ("umbel", "torch-loop"):
        row = figures["workloads"]["A"][contender]
        assert row["min"] <= row["median"] <= row["max"]
        assert row["peak_mb"] > row["torch_mb"] > 0


@pytest.mark.slow
def test_umbel_and_the_bare_loop_do_the_same_work(figures):
    rows = figures["workloads"]["A"]
    assert rows["umbel"]["agrees"]
    assert rows["umbel"]["apart"] < 1e-5
    assert figures["ratios"]["A"].keys() >= {"torch-loop / umbel"}


def test_a_contender_with_other_weights_gets_no_ratio(contenders):
    agreement, table, running = map(contenders, ("agreement", "table", "running"))
    weights = np.linspace(-1, 1, 100, dtype=np.float32)
    other = weights.copy()
    other[7] += 2e-2
    found = {"torch-loop": weights, "umbel": weights * (1 + 1e-6), "flower": other, "pfl": weights[1:]}
    found["umbel-cohort"] = weights + np.float32(2e-5)
    rows = {
        name: table.row([running.Outcome(seconds=1.0)], (1, 1), distance, agreement.agrees(distance))
        for name, distance in agreement.apart(found, "torch-loop").items()
    }
    assert table.ratios(rows).keys() == {"torch-loop / umbel"}


def test_a_contender_in_bf16_may_be_apart_by_its_rounding_and_its_ratios_say_so(contenders):
    agreement, table, lineup = map(contenders, ("agreement", "table", "lineup"))
    rounding, other = (agreement.Apart(median, 5e-3) for median in (5e-5, 5e-4))
    assert [agreement.agrees(rounding, precision) for precision in ("bf16", "float32")] == [True, False]
    assert not agreement.agrees(other, "bf16")
    (one,) = (contender for contender in lineup.LINEUP if contender.precision == "bf16")
    rows = {one.name: {"precision": one.precision}, "torch-loop": {"precision": "float32"}}
    assert list(table.notes("B", rows, {}, None)) == [
        "umbel-cohort-bf16 takes products in bf16: its ratios are not of the same precision"
    ]


def test_bf16_takes_no_part_where_the_processor_lacks_it(contenders, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    chosen = argparse.Namespace(peers=[], device="cpu")
    absent = contenders("comparison").Comparison(chosen).absent
    assert absent.keys() == {"flower", "pfl", "umbel-cohort-bf16"}
    assert "needs a processor with bf16" in absent["umbel-cohort-bf16"]


def test_a_run_that_takes_too_long_is_given_up_and_says_how_far_it_came():
    done = simulation("--workloads", "N-1000", "--scale", "100", "--layouts", "1x1", "--limit", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["workloads"]["N-1000"]["umbel"]
    assert row["reason"].startswith("no round in 0 s")
    assert "median" not in row


def test_an_unknown_workload_is_one_line():
    done = simulation("--workloads", "Q")
    assert done.returncode == 2
    assert "there is no workload 'Q'" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    done = simulation("--workloads", "A", "--device", "cuda")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no CUDA device" in line
