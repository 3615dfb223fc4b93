"""What a privacy officer reads of protected updates is what the mode used really promises, adversary by adversary."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom

from privacy import neighbours
from privacy.neighbours import TENTH
from privacy.refused import Refused
from scenarios.settings import Protect, Settings, override
from server import console, exposure, gather, guarantee, proof, report, verify
from server.results import protection

MODES = (
    "protect=none",
    "codec=int9",
    "protect=masked",
    "protect=encrypted",
    "protect=encrypted protect.trust=shared",
)
UNITS = ("none", "example", "client", "both", "local")


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def said(text: str, clients: int = 20, runtime: str = "deployment") -> str:
    return " ".join(exposure.who_learns(override(Settings(), text), 1000, clients, runtime))


# ---- Epsilon per adversary ----


def against(kind: dict[str, Any], **protect: str | None) -> dict[str, Any]:
    """The adversaries of a report, had its updates travelled in another way."""
    return guarantee.adversaries({**kind, "protect": {**kind["protect"], **protect}})


def test_names_told_under_masks_take_the_secret_draw_away_from_other_clients_alone(real_run):
    found = report_of(real_run("masked-secret"))["statement"]
    epsilons = found["epsilon"]["adversaries"]
    assert epsilons["report_reader"] == found["epsilon"]["headline"]
    assert epsilons["other_client"] is None
    assert "told each other's names" in epsilons["other_client_reason"]
    assert "draw is no secret" in epsilons["other_client_reason"]


def test_a_draw_below_the_least_that_is_opened_is_part_of_delta(real_run):
    """One client more would open a sum of several: that is no change by one clipping norm."""
    masked = report_of(real_run("masked-secret"))["statement"]["delta"]["chance"]
    assert masked == pytest.approx(3 * binom.cdf(2, 5, 0.97))
    assert report_of(real_run("masked"))["statement"]["delta"]["chance"] == 0


def test_draws_that_too_often_open_nothing_are_refused_with_the_way_out(run_real, tmp_path):
    text = "privacy.unit=client privacy.epsilon=9 rounds.fraction=0.5 rounds.minimum=0"
    with pytest.raises(Refused, match=r"below protect\.minimum=3 of 6 clients.*or set privacy\.sampling=fixed"):
        run_real(tmp_path / "masked", f"{text} protect=masked")
    assert (
        run_real(tmp_path / "fixed", f"{text} protect=masked privacy.sampling=fixed privacy.epsilon=30")["rounds"] == 3
    )


def test_where_all_are_asked_names_tell_other_clients_nothing_new(real_run):
    found = report_of(real_run("masked"))["statement"]["epsilon"]
    assert found["adversaries"]["other_client"] == found["adversaries"]["report_reader"] == found["headline"]


@pytest.mark.parametrize("kind", ["masked", "masked-secret"])
def test_a_server_that_reads_exact_sums_faces_no_epsilon_and_is_not_said_to_see_updates(real_run, kind):
    found = report_of(real_run(kind))
    epsilons = found["statement"]["epsilon"]["adversaries"]
    assert epsilons["server"] is None
    assert "exact sum" in epsilons["server_reason"]
    assert "no single update" in epsilons["server_reason"]
    server = next(party for party in found["statement"]["trust"]["parties"] if party["party"] == "server")
    assert server["before_noise"]
    assert "no single update" in server["sees"]
    assert "again by the server" not in found["statement"]["unit"]["enforced"]
    assert found["privacy"]["not_covered"][0].startswith("the server: it reads the exact sum")
    assert "which reads the sum of each round's updates before the noise" in found["privacy"]["against"]


def test_under_both_the_epsilon_of_an_example_stays_and_that_of_a_client_is_taken_back_beside_it(real_run):
    found = report_of(real_run("masked-both"))
    epsilons = found["statement"]["epsilon"]["adversaries"]
    assert epsilons["other_client"] == epsilons["server"] == found["privacy"]["worst_epsilon"]
    for who, why in (("other_client", "told each other's names"), ("server", "exact sum")):
        assert epsilons[f"{who}_reason"].startswith("of an example alone; of a client as a whole none holds")
        assert why in epsilons[f"{who}_reason"]
    assert epsilons["report_reader_reason"] is None
    assert any(text.startswith("a client as a whole against other clients") for text in found["privacy"]["not_covered"])


def test_without_masks_both_take_back_the_server_s_alone(real_run):
    epsilons = report_of(real_run("both"))["statement"]["epsilon"]["adversaries"]
    assert epsilons["other_client_reason"] is None
    assert "before it adds the noise" in epsilons["server_reason"]


@pytest.mark.parametrize("kind", ["client", "secret"])
def test_a_key_holder_apart_tells_clients_no_names_and_a_shared_key_bounds_no_client(real_run, kind):
    found = report_of(real_run(kind))
    split = against(found, mode="encrypted", trust="split")
    shared = against(found, mode="encrypted", trust="shared")
    assert split["other_client"] == found["statement"]["epsilon"]["headline"]
    reason = {"client": "as long as the key holder", "secret": "the server draws who takes part"}[kind]
    assert reason in split["server_reason"]
    assert (split["server"] is None) == (kind == "secret")
    assert shared["other_client"] is None
    assert "share the secret key" in shared["other_client_reason"]
    assert shared["report_reader"] == found["statement"]["epsilon"]["headline"]


@pytest.mark.parametrize("kind", ["example", "local"])
@pytest.mark.parametrize("mode", ["masked", "encrypted"])
def test_noise_of_the_client_holds_against_all_however_updates_travel(real_run, kind, mode):
    found = report_of(real_run(kind))
    changed = against(found, mode=mode, trust="shared" if mode == "encrypted" else None)
    assert {changed[who] for who in ("report_reader", "other_client", "server")} == {found["privacy"]["worst_epsilon"]}


def test_a_key_holder_that_reads_sums_is_bounded_by_what_bounds_the_server(real_run):
    for kind, bounded in (("client", False), ("local", True)):
        found = report_of(real_run(kind))
        found["protect"] |= {"mode": "encrypted", "trust": "split"}
        found["statement"]["epsilon"]["adversaries"] = against(found, mode="encrypted", trust="split")
        sees = exposure.key_holder(Protect(mode="encrypted"), not bounded)
        parties = found["statement"]["trust"]["parties"]
        of = {"party": "key holder", "sees": sees[0], "before_noise": sees[1]}
        found["statement"]["trust"]["parties"] = [of if one["party"] == "key holder" else one for one in parties]
        holder = next(one for one in proof.parties(found) if one["party"] == "key holder")
        assert (holder["epsilon"] is not None) == bounded
        assert bounded or "before it adds the noise" in holder["reason"]


# ---- Figures ----


@pytest.mark.parametrize("kind", ["masked", "masked-coordinates"])
def test_a_masked_client_is_said_to_send_what_the_rounds_counted(real_run, kind):
    found = report_of(real_run(kind))
    said = found["protect"]["upload_bytes_per_client"]
    assert found["bytes"]["up"] == 3 * 6 * said
    assert said > gather.sent(override(Settings(), "codec=int16"), found["protect"]["values_sent"], 6)


def test_secret_rounds_count_the_bytes_of_the_cohort_expected_by_the_same_figure(real_run):
    found = report_of(real_run("masked-secret"))
    assert found["bytes"]["up"] == 3 * 6 * found["protect"]["upload_bytes_per_client"]


def test_the_figures_of_the_protocol_are_those_of_the_cohort_and_null_without_it(real_run):
    masked, clear = (report_of(real_run(kind))["protect"] for kind in ("masked", "client"))
    degree = neighbours.degree(6, colluding=TENTH)
    assert (masked["mode"], masked["trust"], masked["minimum"]) == ("masked", None, 3)
    assert (masked["neighbours"], masked["threshold"], masked["quorum"]) == (
        degree.neighbours,
        degree.threshold,
        degree.quorum,
    )
    keys = ("minimum", "neighbours", "threshold", "quorum", "parameters", "security_bits")
    assert {clear[key] for key in keys} == {None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("minimum", 5),
        ("threshold", 2),
        ("quorum", 2),
        ("neighbours", 3),
        ("upload_bytes_per_client", 7),
        ("security_bits", 192),
        ("who_learns", ["Nobody learns anything."]),
    ],
)
def test_a_check_finds_what_does_not_follow_from_the_settings(own_run, key, value):
    folder = own_run("masked")
    found = report_of(folder)
    found["protect"][key] = value
    (folder / "report.json").write_text(json.dumps(found))
    assert any(f"protect.{key} is" in fault for fault in verify.check(folder).wrong)


# ---- Sentences ----


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_says_what_stays_visible_and_what_nothing_prevents(mode, unit):
    text = said(f"{mode} privacy.unit={unit}")
    assert "The server sees, in every mode, who was asked and who answered" in text
    assert "how many examples each client says it has" in text
    assert "Nothing prevents a client from lying" in text
    hidden = mode not in MODES[:2]
    assert ("picking whom it asks" in text) == hidden
    assert ("before the noise of privacy.unit" in text) == (mode == "protect=masked" and unit in ("client", "both"))


@pytest.mark.parametrize("mode", MODES)
def test_test_results_of_clients_are_said_to_be_read_one_by_one_or_as_a_sum(mode):
    text, hidden = said(f"{mode} evaluation.on=clients"), mode not in MODES[:2]
    assert ("what it says of its test examples (without noise)" in text) != hidden
    assert ("how many test examples at least 10 clients have together" in text) == hidden
    noised = said(f"{mode} evaluation.on=clients evaluation.epsilon=4 privacy.unit=example")
    assert "what it says of its test examples (noised)" in noised
    assert "have together" not in noised
    assert "test examples" not in said(mode)


def test_in_the_clear_the_server_is_said_to_read_every_update():
    for mode in MODES[:2]:
        assert "The server reads every client's update of every round by itself, without noise" in said(mode)
    assert "integers of 9 bits (codec=int9) hides nothing" in said("codec=int9")
    assert "clipped and without noise" in said("privacy.unit=client")


@pytest.mark.parametrize("clients", [3, 9, 10, 20, 64, 100, 200])
def test_how_many_may_collude_under_masks_is_what_the_graph_was_made_for(clients):
    text = said("protect=masked protect.max_clients=200", clients)
    degree, colluding = neighbours.degree(clients, colluding=TENTH), clients // 10
    if colluding:
        least = degree.threshold + 1 - min(colluding, degree.threshold - 1)
        assert f"up to {colluding} may tell the server all they know" in text
        assert f"sums over at least {least} of them" in text
        assert 2 <= least <= clients - colluding
    else:
        assert "none may collude" in text
    assert ("2^-40" in text) == (clients > 64)
    assert f"With {colluding + 1} or more colluding clients nothing is promised" in text
    assert 2 * degree.quorum - clients > colluding  # two lists of survivors would have an honest client in common
    assert f"at least {max(3, -(-clients // 2))} clients" in text


def test_a_key_holder_and_a_shared_key_are_told_apart():
    split, shared = said(MODES[3]), said(MODES[4])
    assert "The server and the key holder together can read every update" in split
    assert "any single one of them, together with the server" in shared
    assert "any single one of them" not in split
    assert "They hold the public key alone" in split


def test_weights_follow_from_declared_examples_unless_all_weigh_the_same():
    follows = "its weight follows from its number of examples"
    assert follows in said("protect=masked")
    assert follows not in said("protect=masked server.weighting=uniform")
    assert follows not in said("protect=masked privacy.unit=client")


def test_a_simulation_says_that_one_machine_had_all_of_it():
    assert "whoever ran the machine had every client's data" in said("protect=masked", runtime="embedded")
    assert "simulated" not in said("protect=masked")


@pytest.mark.parametrize("kind", ["masked", "client", "none"])
def test_the_page_shows_every_sentence_of_the_report(own_run, kind):
    folder = own_run(kind)
    page = report.write(folder).read_text()
    for sentence in report_of(folder)["protect"]["who_learns"]:
        assert sentence.replace("'", "&#39;") in page


def test_the_summary_names_the_protection_in_one_line_and_only_where_there_is_one(real_run, capsys):
    for kind, shown in (("masked", True), ("client", False)):
        console.summary(report_of(real_run(kind)), real_run(kind))
        words = " ".join(capsys.readouterr().out.split())
        assert ("Updates masked: the server reads sums over at least 3 clients" in words) == shown
    assert protection({}) == ""
    assert protection(report_of(real_run("client"))).startswith("none: the server reads each update")


def test_not_covered_says_by_mode_who_reads_weights_and_clip_bits(real_run):
    clear, masked = (report_of(real_run(kind))["privacy"]["not_covered"][-1] for kind in ("client", "masked"))
    assert "whether it was within the clipping norm" in clear
    assert "the server reads them" in clear
    assert "what an update weighs and whether it was within the norm travels inside the protected sum" in masked
    assert all(word in masked for word in ("steps", "bytes", "time"))
