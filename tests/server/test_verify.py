"""umbel report --check on true reports and on edited ones: no figure can be moved without a line about it."""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from privacy.refused import Refused
from server import arithmetic, provenance, schema, verify

# Measurements that nothing else in a report repeats; the digest and the signature alone hold them.
MEASURED = {
    "final.loss",
    "parameters",
    "fleet.deadline",
    "fleet.engine.block",
    "fleet.engine.processes",
    "fleet.engine.threads",
    "seconds.evaluation",
    "seconds.references",
    "edge.variants[].accuracy",
    "edge.variants[].latency_us",
    "edge.variants[].load_ms",
    "edge.variants[].macs",
    "edge.variants[].max_abs_diff",
    "edge.variants[].validation_accuracy",
}
# What is held by the files and the ledger beside a report, not by its arithmetic.
BESIDE = {
    "bytes.up",
    "bytes.down",
    "rounds",
    "privacy.clients[].delta_total",
    *(f"privacy.clients[].{one}.{key}_total" for one in ("whole", "tests") for key in ("epsilon", "delta")),
    "statement.composition.earlier_runs",
    "statement.post_processing.files[].bytes",
    "statement.sampling.actual_cohort.least",
    "statement.sampling.actual_cohort.median",
    "statement.sampling.actual_cohort.most",
    "statement.steps.lost_rounds",
    "statement.steps.rounds",
}


def leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*at, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield at


def edited(report: dict[str, Any], at: tuple[Any, ...]) -> dict[str, Any]:
    """The report with that figure moved by a hundredth, or one."""
    found = copy.deepcopy(report)
    inside = found
    for key in at[:-1]:
        inside = inside[key]
    value = inside[at[-1]]
    inside[at[-1]] = value + 1 if isinstance(value, int) else value * 1.01 or 0.25
    return found


def name_of(at: tuple[Any, ...]) -> str:
    return re.sub(r"\.\d+", "[]", ".".join(map(str, at)))


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["none", "example", "secret"])
def test_any_figure_that_is_edited_breaks_the_digest(real_run, kind):
    report = report_of(real_run(kind))
    places = list(leaves(report))
    assert len(places) > 60
    for at in places:
        assert provenance.digest(edited(report, at)) != report["digest"], at


@pytest.mark.parametrize("kind", ["example", "client", "both"])
def test_a_figure_that_is_edited_with_its_digest_is_found_by_arithmetic(real_run, kind):
    report = report_of(real_run(kind))
    assert list(arithmetic.errors(report)) == []
    by_name: dict[str, list[tuple[Any, ...]]] = {}
    for at in leaves(report):
        by_name.setdefault(name_of(at), []).append(at)
    some, missed = random.Random(4), set()
    for name, places in by_name.items():
        other = edited(report, some.choice(places))
        if not schema.faults(other) and next(arithmetic.errors(other), None) is None:
            missed.add(name)
    by_client = {"privacy.clients[].examples"} if kind == "client" else set()  # the account does not look at them
    assert missed <= MEASURED | BESIDE | by_client
    assert not any(
        name.startswith(("privacy.worst", "statement.epsilon", "statement.interpretation")) for name in missed
    )


def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    """What --check says of the run in `folder` once its report was changed and its digest made anew."""
    report = report_of(folder)
    change(report)
    report["digest"] = provenance.digest(report)
    (folder / "report.json").write_text(json.dumps(report))
    return list(verify.check(folder).wrong)


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        inside: Any = report
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("settings", "privacy.epsilon", value=1.0), "settings_digest"),
        (put("privacy", "clients", 2, "steps", value=1), "client site-02"),
        (put("privacy", "guarantee", value=False), "contradict"),
        (put("privacy", "against", value=None), ""),
        (put("bytes", "up", value=1), "the rounds add up to"),
        (put("rounds", value=9), "rounds.jsonl has 3 training rounds"),
        (put("privacy", "clients", 0, "epsilon_total", value=99.0), "epsilon_total says 99.0"),
        (put("statement", "composition", "earlier_runs", value=0), ""),
        (put("statement", "composition", "earlier_runs", value=5), "the ledger has 0"),
        (put("privacy", "ledger", "hash", value="0" * 64), "does not go on from the head"),
        (put("statement", "post_processing", "files", 0, "file", value="../../etc/passwd"), "leads out"),
        (put("statement", "not_covered", "items", value=[]), "says why"),
        (put("statement", "interpretation", "hazards", 1, "state", value="pass"), "hazards.1.state"),
        (put("statement", "epsilon", "adversaries", "server", value=None), "says why"),
        (put("privacy", "clients", 0, "sampling_rate", value=0.0), "client site-00"),
        (put("settings", value={}), "no run has such figures or settings (KeyError)"),
        (put("more", value=1), "more: Extra inputs"),
        (put("statement", "epsilon", "headline", value="low"), "headline: Input should be a valid number"),
    ],
)
def test_a_forged_report_is_told_apart_in_words(own_run, change, said):
    wrong = forged(own_run("example"), change)
    assert any(said in line for line in wrong) if said else wrong == []
    assert all("\n" not in line for line in wrong)


def test_a_chance_that_was_forged_is_found(own_run):
    assert any("epsilon" in line for line in forged(own_run("secret"), put("statement", "delta", "chance", value=1e-3)))


def test_a_file_that_was_exchanged_is_found_and_one_that_is_gone_is_said(own_run):
    folder = own_run("example")
    (folder / "model.onnx").write_bytes(b"another")
    (folder / "weights.safetensors").unlink()
    verdict = verify.check(folder)
    assert verdict.wrong == ["5 of 6 exported files: model.onnx is not the file that this report speaks of"]
    assert "exported files that do not lie beside it: weights.safetensors" in verdict.open


def test_a_report_alone_is_checked_as_far_as_it_goes(own_run, tmp_path):
    lonely = tmp_path / "lonely.json"
    lonely.write_bytes((own_run("example") / "report.json").read_bytes())
    verdict = verify.check(lonely)
    assert verdict.wrong == []
    assert sum("not lie beside it" in line or "does not lie" in line for line in verdict.open) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema": 1, "schema": 1}', '{"a": NaN}', "[" * 100_000])
def test_what_is_no_report_is_said_in_one_line(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    wrong = verify.check(tmp_path / "report.json").wrong
    assert wrong
    assert all("\n" not in line for line in wrong)


def test_no_report_at_all_is_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        verify.check(tmp_path / "report.json")


def test_a_report_of_an_older_umbel_is_not_called_true(write_run):
    assert "older Umbel" in verify.check(write_run()).wrong[0]
