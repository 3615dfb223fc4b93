"""The statement on a page and on paper: everything that a signer must see, in colours that paper knows."""

import json
import re
import sys

import pytest

from privacy.refused import Refused
from server import paper, proof, report

KINDS = ("none", "example", "seeded", "secret", "adaptive")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_the_statement_of_every_kind_and_fetches_nothing(own_run, kind):
    folder = own_run(kind)
    html = report.write(folder).read_text()
    stated = json.loads((folder / "report.json").read_text())
    for group in stated["statement"]:
        assert f". {group.replace('_', ' ')}</h4>" in html
    assert stated["digest"] in html
    assert "http" not in html
    assert html.count("<svg") >= (5 if kind not in ("none", "seeded") else 2)
    assert not re.search(r">\s*(None|nan|inf)\s*<", html)


def test_who_could_learn_what_says_no_bound_and_why(real_run):
    rows = {one["party"]: one for one in proof.parties(json.loads((real_run("client") / "report.json").read_text()))}
    assert rows["server"]["epsilon"] is None
    assert "before it adds the noise" in rows["server"]["reason"]
    assert rows["report reader"]["epsilon"] > 0


def test_the_bar_of_an_account_is_what_is_spent_of_its_budget(real_run):
    whole = json.loads((real_run("example") / "report.json").read_text())
    for client in whole["privacy"]["clients"]:
        client["budget"] = 2 * client["epsilon_total"]
    whole["privacy"]["clients"][3]["budget"] /= 2
    rows = proof.budgets(whole)
    assert [row["share"] for row in rows] == pytest.approx([1.0] + [0.5] * (len(rows) - 1))
    assert rows[0]["name"] == whole["privacy"]["clients"][3]["name"]


def test_every_colour_on_paper_is_a_colour(own_run):
    html = report.write(own_run("example")).read_text()
    assert "var(--" in html
    plain = paper.plain(html)
    assert "var(--" not in plain
    assert "#1f6fb2" in plain.partition("</style>")[2]  # a line of a figure


def test_without_weasyprint_one_line_says_what_to_install_and_nothing_is_written(own_run, monkeypatch):
    folder = own_run("none")
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(Refused, match=r"pip install '\.\[pdf\]'") as refused:
        report.write(folder, pdf=True)
    assert "\n" not in str(refused.value)
    assert not (folder / "report.pdf").exists()


def test_the_pdf_is_whole_and_searchable(own_run):
    try:
        import weasyprint  # noqa: F401
    except (ImportError, OSError):
        pytest.skip("needs weasyprint and Pango: pip install '.[pdf]'")
    folder = own_run("example")
    report.write(folder, pdf=True)
    content = (folder / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")
    assert len(content) > 30_000
