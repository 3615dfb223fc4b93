import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from server import console, results
from server.live import Live


def terminal(width: int, height: int = 30) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, highlight=False)


def plain(at: Console) -> str:
    """What was printed, without colours."""
    return Text.from_ansi(at.file.getvalue()).plain


def screen(live: Live, width: int, height: int = 30) -> str:
    at = terminal(width, height)
    at.print(live._render())
    return plain(at)


@pytest.fixture
def run(write_run):
    folder = write_run(simulated=True)
    return folder, results.load(folder), results.load_rounds(folder)


@pytest.mark.parametrize("width", [80, 130])
def test_the_live_table_shows_each_number_whole(run, width):
    _, _, rows = run
    with Live(38, "digits", terminal(width), itertools.count(0, 2).__next__) as live:
        for row in rows[:8]:
            live.row(row)
        shown = screen(live, width)
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["6"])
    expected = f"6 18/20 {rows[5]['loss']:.4f} {100 * rows[5]['accuracy']:.1f} % 3.18 346.3 kB 365.6 kB 410 ms 1 late"
    assert " ".join(line.split()).startswith(expected)
    assert "…" not in shown
    assert "8 of 38 rounds" in shown
    assert max(map(len, shown.splitlines())) <= width


def test_time_left_comes_from_the_rounds_seen_so_far(run):
    _, _, rows = run
    now = [100.0]
    with Live(38, "digits", terminal(100), lambda: now[0]) as live:
        live.row(rows[27])  # a resumed run: the first round seen is the 28th
        now[0] = 104.0
        assert "28 of 38 rounds · 4.0 s · about 40.0 s left" in screen(live, 100)


def test_a_small_terminal_shows_the_last_rounds(run):
    _, _, rows = run
    with Live(38, "digits", terminal(100, 10)) as live:
        for row in rows[:20]:
            live.row(row)
        live._console = terminal(100, 10)
        shown = screen(live, 100, 10)
    numbers = [int(line.split()[0]) for line in shown.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert numbers == [17, 18, 19, 20]


def test_status_is_shown_until_the_next_round(run):
    _, _, rows = run
    with Live(38, "digits", terminal(100)) as live:
        live.status("training the central reference")
        assert "training the central reference" in screen(live, 100)
        live.row(rows[0])
        assert "training" not in screen(live, 100)


@pytest.mark.parametrize("tty", [True, False])
def test_a_note_is_said_once_and_stays(run, tty):
    _, _, rows = run
    at = terminal(100) if tty else Console(file=io.StringIO(), width=100, highlight=False)
    with Live(38, "digits", at) as live:
        live.note("cohort: 3 of 20 clients are trained one by one: why")
        live.row(rows[0])
        live.row(rows[1])
    assert plain(at).count("3 of 20 clients are trained one by one: why") == 1


def test_the_live_table_notes_who_was_trained_one_by_one(run):
    _, _, rows = run
    single = {"way": "single", "why": "why", "precision": "float32", "clients": 3}
    with Live(38, "digits", terminal(130)) as live:
        live.row(rows[0] | {"engine": {"trained": [single, single | {"way": "fused"}]}})
        assert "3 one by one" in screen(live, 130)


def test_where_stderr_is_no_terminal_each_round_is_one_plain_line(run):
    _, _, rows = run
    file = io.StringIO()
    with Live(38, "digits", Console(file=file, width=40, highlight=False)) as live:
        live.row(rows[0])
        live.row(rows[10])
        live.status("exporting")
    lines = file.getvalue().splitlines()
    assert lines[0] == "digits"
    assert lines[1].startswith("round 1 of 38: cohort 20, loss ")
    assert lines[2].endswith("note not applied, fleet clock 27.5 s")
    assert lines[3:] == ["exporting"]
    assert "\x1b" not in file.getvalue()


def test_the_cursor_comes_back_when_the_run_fails():
    at = terminal(80)

    def fail() -> None:
        with Live(38, "digits", at):
            assert "\x1b[?25l" in at.file.getvalue()
            assert "\x1b[?25h" not in at.file.getvalue()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert "\x1b[?25h" in at.file.getvalue()


@pytest.mark.parametrize("width", [80, 130])
def test_the_summary_says_accuracy_privacy_edge_and_the_way_on(run, width):
    _, report, _ = run
    at = terminal(width)
    console.summary(report, Path("runs/a"), at)
    text = plain(at)
    words = " ".join(text.split())
    assert "This federation 93.1 % The same without privacy 96.1 % +3.0 points Central, without privacy 97.2 %" in words
    assert "Worst client ε 8.00 of 8.00 allowed Median client ε 7.97 δ 1 / (10 x the client's examples)" in words
    assert "✓ pruned fp32 11.2 kB 6.1 µs 92.5 % fastest within the tolerance" in words
    assert "python -m edge_export.infer runs/a/model.onnx input.npy" in words
    assert "umbel compare runs/a" in words
    assert "umbel export runs/a" in words
    assert "does not hold" not in words
    assert max(map(len, text.splitlines())) <= width


def test_a_summary_without_guarantee_says_so_in_red(write_run):
    at = terminal(130)
    console.summary(results.load(write_run(why_not="the noise is seeded")), Path("runs/a"), at)
    line = next(line for line in at.file.getvalue().splitlines() if "does not hold" in line)
    assert "\x1b[1;31m" in line
    assert "The privacy guarantee does not hold: the noise is seeded" in plain(at)


def test_a_summary_without_privacy_or_edge_model_gives_the_reasons(write_run):
    edge = {"accuracy": None, "rule": "", "variants": []}
    folder = write_run(unit="none", accuracy=None, edge=edge, status="stopped", rounds=4)
    at = terminal(130)
    console.summary(results.load(folder), folder, at)
    words = " ".join(plain(at).split())
    assert "This run has no differential privacy: no privacy was asked for" in words
    assert "This federation – nobody holds test data" in words
    assert "Edge model – no edge model was made" in words
    assert "stopped before its last round, after 4" in words
    assert "ε" not in words
    assert "model.onnx" not in words


def test_the_summary_goes_to_stdout_and_the_live_table_to_stderr(run, capsys):
    folder, report, rows = run
    with Live(38, "digits") as live:
        live.row(rows[0])
    between = capsys.readouterr()
    console.summary(report, folder)
    after = capsys.readouterr()
    assert between.out == ""
    assert "round 1 of 38" in between.err
    assert "This federation" in after.out
    assert after.err == ""


def test_control_characters_and_markup_in_text_do_not_reach_the_terminal(run):
    folder, report, _ = run
    report["edge"]["variants"][0]["reason"] = "\x1b[2J[red]wiped"
    at = Console(file=io.StringIO(), width=130, highlight=False)
    console.summary(report, folder, at)
    assert "\x1b" not in at.file.getvalue()
    assert "[red]wiped" in at.file.getvalue()
