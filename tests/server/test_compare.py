import io
import re
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from privacy.refused import Refused
from server.compare import Spread, cell, compare
from server.units import percent, size


def printed(folders: list[Path], out: Path, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    compare(folders, out, console)
    return console.file.getvalue()


def grid(write_run, seeds: int = 3) -> list[Path]:
    return [
        write_run(f"eps{epsilon}-{seed}", seed=seed, change=f"privacy.epsilon={epsilon}", accuracy=base + 0.01 * seed)
        for epsilon, base in ((8, 0.92), (3, 0.87))
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("width", [80, 130])
def test_seeds_of_one_setting_are_one_row_with_mean_and_spread(write_run, tmp_path, width):
    text = printed(grid(write_run), tmp_path / "compare.html", width)
    assert re.search(r"1 +privacy.epsilon=8.0\n2 +privacy.epsilon=3.0\n", text.replace(" \n", "\n"))
    assert re.search(r"1 +3 +93\.0 ± 1\.0 % +8\.00", text)
    assert re.search(r"2 +3 +88\.0 ± 1\.0 % +3\.00", text)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= max(width, len(f"Drawn in {tmp_path}/compare.html"))


def test_the_spread_is_the_sample_standard_deviation():
    values = [0.91, 0.93, 0.98]
    spread = Spread.of([*values, None])
    assert (spread.mean, spread.deviation, spread.count) == (statistics.fmean(values), statistics.stdev(values), 3)
    assert Spread.of([0.9]).deviation is None
    assert Spread.of([None]) == Spread(None, None, 0)


@pytest.mark.parametrize(
    ("spread", "text", "expected"),
    [
        (Spread(0.93, 0.004, 3), percent, "93.0 ± 0.4 %"),
        (Spread(0.93, None, 1), percent, "93.0 %"),
        (Spread(0.93, 0.0, 2), percent, "93.0 %"),
        (Spread(28e6, 5e4, 2), size, "28.0 MB ± 50.0 kB"),
        (Spread(None, None, 0), size, "–"),
    ],
)
def test_a_spread_reads_well(spread, text, expected):
    assert cell(spread, text) == expected


def test_settings_that_differ_are_named_and_others_are_not(write_run, tmp_path):
    runs = [write_run("a", change="codec=qsgd8 local.rate=2"), write_run("b", change="codec=topk:0.1 local.rate=2")]
    text = printed(runs, tmp_path / "x.html")
    assert "codec=qsgd8" in text
    assert "codec=topk:0.1" in text
    assert "local.rate" not in text


def test_where_a_run_lies_or_finds_its_data_makes_no_difference(write_run, tmp_path):
    runs = [write_run("a", change="run.out=x run.data=y"), write_run("b", seed=1, change="run.out=z")]
    assert re.search(r"^ *1 +2 ", printed(runs, tmp_path / "x.html"), re.MULTILINE)


def test_two_scenarios_are_never_one_row(write_run, tmp_path):
    text = printed([write_run("a"), write_run("b", scenario="letters")], tmp_path / "x.html")
    assert "scenario=digits" in text
    assert "scenario=letters" in text


def test_the_page_draws_one_line_a_setting_with_bands_and_fetches_nothing(write_run, tmp_path):
    out = tmp_path / "compare.html"
    printed(grid(write_run), out)
    html = out.read_text()
    figure = html[html.index("Accuracy by round.") : html.index("Loss by round.")]
    assert {"var(--s0)", "var(--s1)"} <= set(re.findall(r"var\(--s\d\)", figure))
    assert "var(--s2)" not in figure
    assert figure.count("opacity: 0.15") == 2
    assert "http" not in html
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert "93.0\u00a0±\u00a01.0\u00a0%" in html or "93.0 ± 1.0 %" in html


def test_one_run_a_setting_has_no_band(write_run, tmp_path):
    out = tmp_path / "compare.html"
    printed(grid(write_run, seeds=1), out)
    assert "opacity: 0.15" not in out.read_text()


def test_a_run_without_guarantee_is_said_to_be_one(write_run, tmp_path):
    out = tmp_path / "compare.html"
    text = printed([write_run("a"), write_run("b", why_not="the noise is seeded")], out, 200)
    assert "b: The privacy guarantee does not hold: the noise is seeded" in text
    assert "a: The privacy" not in text
    assert out.read_text().count('class="banner"') == 1


def test_runs_of_different_length_are_drawn_as_far_as_all_go(write_run, tmp_path):
    runs = [write_run("a", status="stopped"), write_run("b", seed=1)]
    lines = (runs[0] / "rounds.jsonl").read_text().splitlines()
    (runs[0] / "rounds.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert "Drawn in" in printed(runs, tmp_path / "x.html")


def test_the_page_lies_in_the_current_folder_by_default(write_run, tmp_path, monkeypatch):
    runs = [write_run("a"), write_run("b", seed=1)]
    monkeypatch.chdir(tmp_path)
    assert compare(runs, console=Console(file=io.StringIO())) == Path("compare.html")
    assert (tmp_path / "compare.html").is_file()


def test_one_run_or_a_run_named_twice_is_refused(write_run, tmp_path):
    run = write_run("a")
    for folders in ([], [run], [run, run], [run, run / ".." / "a"]):
        with pytest.raises(Refused, match="two or more different"):
            compare(folders, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_damaged_run_is_refused_and_nothing_is_drawn(write_run, tmp_path):
    runs = [write_run("a"), write_run("b", seed=1)]
    (runs[1] / "report.json").write_text("{")
    with pytest.raises(Refused, match=r"b/report\.json"):
        compare(runs, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_page_that_cannot_be_written_is_refused(write_run, tmp_path):
    with pytest.raises(Refused, match="cannot be written"):
        compare([write_run("a"), write_run("b", seed=1)], tmp_path / "missing" / "x.html")
