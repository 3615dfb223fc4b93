import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

import scenarios
from privacy.refused import Refused
from scenarios.settings import knobs, override
from server import page, report, units
from server.figures import Series, curves

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that every element is closed, and keeps text, ids and addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.rows = 0
        self.feed(path.read_text())
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.rows += tag == "tr"
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def test_the_page_is_one_file_that_fetches_nothing(write_run):
    path = report.write(write_run())
    shown = Page(path)
    assert path.name == "report.html"
    assert "http" not in path.read_text()
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", path.read_text())
    assert all(address.startswith("#") for address in shown.addresses)
    assert len(shown.ids) == len(set(shown.ids))
    assert {address[1:] for address in shown.addresses} <= set(shown.ids)


def test_the_page_says_what_was_learned_at_what_price_and_what_ships(write_run):
    text = Page(report.write(write_run())).text
    assert "20 clients trained one model together in 35 rounds" in text
    assert "93.1 % of the test examples right, against 96.1 % for the same federation without privacy" in text
    assert "no client spent more than ε 8.00 of the 8.00 allowed" in text
    assert "To the edge ships the pruned fp32 model: it takes 11.2 kB, answers in 6.1 µs" in text
    assert "1 / (10 x the client's examples)" in text
    assert "A person with many examples: each of them is protected, not all together." in text
    assert "1 round of 38 changed nothing" in text
    assert "does not hold" not in text


def test_seeded_noise_is_said_in_a_banner(write_run):
    text = report.write(write_run(why_not="the noise is seeded (privacy.noise_seed)")).read_text()
    assert '<div class="banner"' in text
    assert "The privacy guarantee does not hold:</b> the noise is seeded (privacy.noise_seed)" in text


def test_a_run_without_privacy_says_so_and_shows_no_epsilon(write_run):
    shown = Page(report.write(write_run(unit="none", recover=0)))
    assert "This run has no differential privacy: no privacy was asked for (privacy.unit=none)" in shown.text
    assert "ε 8" not in shown.text
    assert "the run itself has no privacy" in shown.text


def test_accuracy_that_clients_measured_is_marked_as_not_covered(write_run):
    text = Page(report.write(write_run(evaluated_by="clients"))).text
    assert "the worst client reached 71.0 %" in text
    assert "not covered by differential privacy" in text
    assert "92.5 % of the server's validation data" in text


def test_a_missing_value_shows_its_reason_and_never_none_or_nan(write_run):
    edge = {"accuracy": None, "rule": "", "variants": []}
    text = Page(report.write(write_run(clients=1, rounds=1, recover=0, accuracy=None, edge=edge))).text
    assert "How well it does is not known: nobody holds test data." in text
    assert "no edge model was made" in text
    assert not re.search(r"\b(None|nan|inf)\b", text)


def test_nan_in_the_files_counts_as_missing_and_infinity_is_shown_as_such(write_run):
    folder = write_run(clients=3)
    whole = json.loads((folder / "report.json").read_text())
    whole["final"]["loss"] = float("nan")
    whole["privacy"]["clients"][1]["epsilon"] = whole["privacy"]["worst_epsilon"] = float("inf")
    (folder / "report.json").write_text(json.dumps(whole))
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {"loss": float("nan"), "epsilon": float("inf")})
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    text = Page(report.write(folder)).text
    assert "no client spent more than ε ∞" in text
    assert not re.search(r"\b(None|nan|inf)\b", text)


def test_a_thousand_clients_and_two_thousand_rounds_stay_readable(write_run):
    path = report.write(write_run(clients=1000, rounds=2000, simulated=True))
    shown = Page(path)
    assert "The 50 clients that spent most" in shown.text
    assert "950 more clients spent no more than these" in shown.text
    assert shown.rows < 100
    assert path.stat().st_size < 1_000_000


def test_the_worst_clients_come_first(write_run):
    folder = write_run(clients=60)
    clients = report.load(folder)["privacy"]["clients"]
    order = [client["name"] for client in sorted(clients, key=lambda client: -client["epsilon"])]
    text = Page(report.write(folder)).text
    table = text[text.index("The 50 clients that spent most") : text.index("10 more clients")]
    assert re.findall(r"client-\d+", table) == order[:50]


def test_who_was_left_out_is_named_with_reason_and_count(write_run):
    text = Page(report.write(write_run(simulated=True))).text
    assert "client-00 not asked offline 19" in text
    assert "client-19 late its reply missed the deadline 12" in text
    assert "client-10 rejected update holds NaN <b> 1" in text


def test_text_from_clients_is_escaped(write_run):
    folder = write_run(clients=3)
    whole = json.loads((folder / "report.json").read_text())
    whole["privacy"]["clients"][0]["name"] = "<script>alert(1)</script>"
    (folder / "report.json").write_text(json.dumps(whole))
    html = report.write(folder).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_same_run_gives_the_same_bytes(write_run):
    folder = write_run(simulated=True)
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first


def test_the_command_on_the_page_gives_the_same_settings_again(write_run):
    nested = "reference.no_privacy_set='local.rate=2 codec=qsgd8'"
    folder = write_run(seed=7, change=f"privacy.epsilon=3 server.rate=0.5 export.recover_rounds=1 run.seed=7 {nested}")
    command = Page(report.write(folder)).text.split("How to reproduce it ")[1].split(" Seeds")[0]
    umbel, run, scenario, seed, number, change, text = shlex.split(command)
    assert (umbel, run, seed, change) == ("umbel", "run", "--seed", "--set")
    again = override(scenarios.load(scenario).settings, f"{text} run.seed={number}")
    assert {name: value for name, value, _ in knobs(again)} == report.load(folder)["settings"]


@pytest.mark.parametrize("name", ["report.json", "rounds.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "binary", "another shape"])
def test_a_folder_that_is_not_whole_is_refused_in_one_line_and_nothing_is_written(write_run, name, damage):
    folder = write_run()
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) - 9], "binary": b"\xff\xfe", "another shape": b"[1]"}[damage])
    with pytest.raises(Refused, match=name) as refused:
        report.write(folder)
    assert "\n" not in str(refused.value)
    assert {entry.name for entry in folder.iterdir()} <= {"report.json", "rounds.jsonl"}


@pytest.mark.parametrize("lost", ["final", "privacy.clients", "edge.variants", "bytes.up", "fleet.simulated_seconds"])
def test_a_report_that_lacks_a_part_is_refused_by_name(write_run, lost):
    folder = write_run()
    whole = json.loads((folder / "report.json").read_text())
    section, _, key = lost.partition(".")
    del (whole[section] if key else whole)[key or section]
    (folder / "report.json").write_text(json.dumps(whole))
    with pytest.raises(Refused, match=key or section):
        report.load(folder)


def test_another_schema_is_refused(write_run):
    with pytest.raises(Refused, match="schema 2, this Umbel reads 1"):
        report.load(write_run(schema=2))


def test_a_failed_write_leaves_the_old_page(write_run, monkeypatch):
    folder = write_run()
    report.write(folder).write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Refused, match="No space left"):
        report.write(folder)
    assert (folder / "report.html").read_text() == "old"


def test_all_that_a_page_is_made_of_travels_in_the_bundle():
    files = [
        path for path in Path(page.__file__).parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {path.suffix for path in files} == {".py"}  # Flower bundles no templates by another name


def test_a_curve_draws_every_point_and_its_colours_follow_the_page():
    few = curves("few", [Series([1, 2, 3], [0.1, 0.2, 0.4], style=1)], "round")
    assert few.count("<use") >= 3
    assert "var(--s1)" in few
    assert "#c2570c" not in few


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.percent(0.93149), "93.1 %"),
        (units.percent(None), "–"),
        (units.points(0.901, 0.931), "−3.0 points"),
        (units.points(0.931, 0.9309), "equal"),
        (units.size(999), "999 B"),
        (units.size(999_960), "1.0 MB"),
        (units.size(2_500_000_000_000), "2.5 TB"),
        (units.duration(0.0004), "0 ms"),
        (units.duration(59.96), "1 min 00 s"),
        (units.duration(3599.9), "1 h 00 min"),
        (units.duration(200_000), "2 d 07 h"),
        (units.micros(12.34), "12.3 µs"),
        (units.micros(4560), "4.6 ms"),
        (units.epsilon(7.9901), "8.00"),
        (units.epsilon(7.07), "7.07"),
        (units.epsilon(0.00031), "0.0004"),
        (units.epsilon(float("inf")), "∞"),
        (units.number(12345), "12,345"),
        (units.number(3.2e-7), "3.2e-07"),
        (units.printable("a\x1b[2Jb"), "a�[2Jb"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text == expected
