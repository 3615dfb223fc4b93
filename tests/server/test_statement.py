"""The privacy statement of real runs: its shape is the published one, and it says what each unit really promises."""

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.stats import norm

from server import guarantee, provenance, schema, verify
from server import run as job
from server.groups import Statement
from server.wording import UNITS

ROOT = Path(__file__).parents[2]
KINDS = ("none", "example", "sampled", "seeded", "client", "secret", "adaptive", "both", "local", "fixed", "turns")
KINDS += ("masked", "masked-coordinates", "masked-secret", "masked-both")


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_of_every_kind_fits_the_published_schema_and_is_found_true(real_run, kind):
    report = report_of(real_run(kind))
    published = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.validate(report, published)
    assert schema.faults(report) == []
    assert len(report["statement"]) == len(Statement.model_fields) == 17
    verdict = verify.check(real_run(kind))
    assert verdict.wrong == []
    assert {"schema", "digest", "arithmetic", "sums over rounds.jsonl"} <= {*verdict.held}
    assert ("6 of 6" if kind == "example" else "4 of 4") + " exported files" in verdict.held
    assert ("ledger" in verdict.held) == (kind not in ("none", "seeded"))


def empties(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of what is null or empty in a statement, reasons apart."""
    if isinstance(value, dict) and value:
        pairs = [(key, one) for key, one in value.items() if key != "reason" and not key.endswith("_reason")]
        return [path for key, one in pairs for path in empties(one, (*at, key))]
    if isinstance(value, list) and value:
        return [path for key, one in enumerate(value) for path in empties(one, (*at, key))]
    return [at] if value in (None, "", [], {}) else []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_empty_without_a_reason_and_a_reason_taken_away_is_missed(real_run, kind):
    report = report_of(real_run(kind))
    found = [path for path in empties(report["statement"]) if path[:2] not in {("audit", "membership")}]
    assert found
    for path in found:
        less = json.loads(json.dumps(report))
        group = less["statement"]
        for key in path[:-1]:
            group = group[key]
        group["reason"] = None
        group.pop(f"{path[-1]}_reason", None)
        assert any("says why" in fault for fault in schema.faults(less)), path


@pytest.mark.parametrize("kind", ["example", "sampled", "local", "both"])
def test_noise_of_the_client_holds_against_all_three(real_run, kind):
    report = report_of(real_run(kind))
    against = report["statement"]["epsilon"]["adversaries"]
    worst = report["privacy"]["worst_epsilon"]
    assert {against[who] for who in ("report_reader", "other_client", "server")} == {worst}


def test_both_promises_and_noised_tests_stand_beside_the_headline(real_run):
    report = report_of(real_run("both"))
    stated, client = report["statement"]["epsilon"], report["privacy"]["clients"][0]
    assert stated["whole"]["most"] == report["privacy"]["worst_whole_epsilon"] <= 9
    assert stated["tests"]["most"] == report["privacy"]["worst_tests_epsilon"] <= 4
    assert client["whole"]["epsilon_total"] == pytest.approx(client["whole"]["epsilon"], rel=1e-3)
    assert "account of its own" in report["statement"]["unit"]["means"]
    assert "charged to accounts of their test examples" in report["statement"]["composition"]["evaluation"]
    alone = report_of(real_run("example"))["statement"]["epsilon"]
    assert (alone["whole"], alone["tests"]) == (None, None)


@pytest.mark.parametrize(("kind", "words"), [("fixed", "fixed size"), ("turns", "by turns"), ("secret", "Poisson")])
def test_how_clients_are_drawn_is_said_as_it_is_accounted(real_run, kind, words):
    report = report_of(real_run(kind))
    assert report["statement"]["sampling"]["kind"].startswith(words)
    assert (report["privacy"]["clients"][0]["population"] > 0) == (kind == "fixed")
    assert report["statement"]["trust"]["participation_secret"] == (kind != "turns")


@pytest.mark.parametrize("kind", ["client", "secret", "adaptive", "fixed", "turns"])
def test_noise_of_the_server_does_not_hold_against_the_server(real_run, kind):
    stated = report_of(real_run(kind))["statement"]
    against = stated["epsilon"]["adversaries"]
    assert against["report_reader"] == against["other_client"] == stated["epsilon"]["headline"]
    assert against["server"] is None
    assert "before it adds the noise" in against["server_reason"]
    assert next(party for party in stated["trust"]["parties"] if party["party"] == "server")["before_noise"]
    assert stated["trust"]["participation_secret"] == (kind in ("secret", "fixed"))
    assert (stated["sampling"]["actual_cohort"] is None) == (kind in ("secret", "fixed"))


@pytest.mark.parametrize(("kind", "why"), [("none", "no privacy was asked for"), ("seeded", "seeded")])
def test_where_nothing_is_promised_no_adversary_has_an_epsilon_and_nothing_is_said_of_odds(real_run, kind, why):
    stated = report_of(real_run(kind))["statement"]
    against, meaning = stated["epsilon"]["adversaries"], stated["interpretation"]
    assert all(against[who] is None and why in against[f"{who}_reason"] for who in ("report_reader", "server"))
    assert meaning["posterior"] is None
    assert meaning["tpr_at_1_percent_fpr"] is None
    assert why in meaning["reason"]
    assert "Nothing" in meaning["sentence"]
    assert not any(file["inherits"] for file in stated["post_processing"]["files"])


def test_a_secret_draw_states_its_chance_and_the_steps_are_accounted_at_the_rest(real_run):
    report = report_of(real_run("secret"))
    chance = report["statement"]["delta"]["chance"]
    assert 0 < chance < report["privacy"]["clients"][0]["delta"] / 10
    assert report["statement"]["delta"]["values"]["most"] == pytest.approx(1 / (10 * 6))


def test_adaptive_clipping_states_its_votes_and_both_norms(real_run):
    mechanism = report_of(real_run("adaptive"))["statement"]["mechanism"]
    assert mechanism["votes_std"] >= mechanism["noise_multiplier"]["least"]
    assert mechanism["clip"] != mechanism["clip_at_end"]
    assert "Andrew" in mechanism["clip_schedule"]


def test_the_digest_of_every_exported_file_is_there(real_run):
    folder = real_run("example")
    files = report_of(folder)["statement"]["post_processing"]["files"]
    assert {entry["file"] for entry in files} >= {"weights.safetensors", "model.onnx", "edge/pruned-int8.onnx"}
    assert all(provenance.sha256((folder / entry["file"]).read_bytes()) == entry["sha256"] for entry in files)


def test_rounds_that_were_lost_and_runs_that_came_before_are_counted(run_real, tmp_path):
    run_real(tmp_path / "first", "local.batch=0")
    with pytest.raises(job.Stopped):
        run_real(tmp_path / "second", "local.batch=0", stop_after=2)
    run_real(tmp_path / "second", "local.batch=0", lose=3)
    stated = report_of(tmp_path / "second")["statement"]
    assert stated["composition"]["earlier_runs"] == 1
    assert stated["steps"]["lost_rounds"] == 1
    assert stated["steps"]["rounds"] == 3
    assert stated["composition"]["refused"] == [
        {"name": f"site-{i:02}", "reason": "budget", "times": 1} for i in range(6)
    ]
    assert verify.check(tmp_path / "second").wrong == []
    assert verify.check(tmp_path / "first").wrong == []  # its head is still in the ledger, which has gone on


def test_the_curve_is_an_upper_bound_and_a_tight_one(real_run):
    report = report_of(real_run("sampled"))
    worst = guarantee.costliest(report["privacy"]["clients"])
    exact = pld.from_gaussian_mechanism(
        worst["noise_multiplier"], value_discretization_interval=1e-4, sampling_prob=worst["sampling_rate"]
    ).self_compose(worst["steps"])
    points = report["statement"]["epsilon"]["curve"]
    assert len(points) > 15
    for point in points:
        assert point["delta"] >= exact.get_delta_for_epsilon(point["epsilon"]) * (1 - 2e-3)
        if point["epsilon"] > 0:
            assert point["delta"] <= exact.get_delta_for_epsilon(point["epsilon"] * (1 - 5e-3) - 1e-3)


@pytest.mark.parametrize("kind", ["example", "client"])
def test_the_bound_on_membership_tests_is_that_of_the_best_test(real_run, kind):
    stated = report_of(real_run(kind))["statement"]
    best = norm.cdf(stated["epsilon"]["gdp_mu"] - norm.isf(0.01))  # Dong, Roth and Su 2022, section 2.2
    assert best <= stated["interpretation"]["tpr_at_1_percent_fpr"] <= 1.05 * best


def test_one_point_allows_what_its_epsilon_and_delta_allow():
    points = [{"epsilon": math.log(3), "delta": 0.05}]
    assert guarantee.true_positives(points, 0.01) == pytest.approx(0.08)
    assert guarantee.true_positives(points, 0.6) == pytest.approx(1 - 0.35 / 3)
    assert guarantee.posterior(math.log(3)) == pytest.approx(0.75)


def test_a_large_fleet_has_few_bins_and_a_bound_for_clients_that_differ():
    clients = [
        {
            "epsilon": 1 + i / 900,
            "sampling_rate": 0.1,
            "noise_multiplier": 1 + i / 100,
            "population": 0,
            "steps": 100 + i,
        }
        for i in range(900)
    ]
    found = guarantee.histogram([client["epsilon"] for client in clients])
    assert len(found["counts"]) <= 40
    assert sum(found["counts"]) == 900
    few = clients[:3]
    assert guarantee.membership(few, 0.0) <= guarantee.membership(clients, 0.0)
    alone = max(guarantee.membership([client], 0.0) for client in few)
    assert guarantee.membership(few, 0.0) == alone


def test_a_unit_without_a_description_is_told_by_the_facts(real_run, monkeypatch):
    report = report_of(real_run("client"))
    monkeypatch.delitem(UNITS, "client")
    found = guarantee.adversaries(report)
    assert found["server"] is None
    assert report["privacy"]["against"] in found["server_reason"]
