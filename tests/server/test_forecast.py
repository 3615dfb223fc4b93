"""The forecast: federations that really train, a curve that never falls, and what all of them would have spent."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from privacy import accounting
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import budget, forecast, planner
from server.forecast import Point
from server.planner import Answer

BASE = (
    "rounds.number=6 rounds.average=2 local.batch=0 local.rate=4 export.recover_rounds=3 privacy.unit=example "
    "privacy.epsilon=2 privacy.clip=0.5"
)


UNHURRIED = 1e6
"""Seconds: what is tried must not hang on the machine."""


def examples(seed: int, size: int = 60) -> Examples:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
    return Examples(x, (x.sum(1) > 0).long())


def found(text: str = "") -> Answer:
    test = examples(1, 400)
    fleet = Federation(dict.fromkeys("abcd", 60), lambda name: examples(ord(name)), test, test, lambda _: test)
    born = override(Settings(), BASE)
    scenario = Scenario("made", born, {"net": lambda: nn.Linear(6, 2)}, lambda _: fleet, name="made")
    return planner.answer(scenario, override(born, text))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_more_epsilon_is_more_accurate_and_nothing_is_charged(state: Path) -> None:
    calls: list[tuple[int, int]] = []
    foreseen = forecast.forecast(
        found("privacy.epsilon=0.4"), lambda done, total: calls.append((done, total)), UNHURRIED
    )
    assert foreseen.rounds == foreseen.planned == 6
    assert [point.epsilon for point in foreseen.points] == [0.4 * factor for factor in forecast.FACTORS]
    assert all(len(set(point.accuracies)) in (1, 2) and len(point.accuracies) == 2 for point in foreseen.points)
    assert foreseen.points[-1].accuracy > foreseen.points[0].accuracy + 0.05
    assert foreseen.accuracy is not None
    assert foreseen.points[0].accuracy - 0.05 < foreseen.accuracy <= foreseen.points[-1].accuracy + 0.05
    assert calls[-1] == (2 * 7 * 6, 2 * 7 * 6)
    assert not state.exists()


def test_its_cost_is_that_of_all_its_federations_composed() -> None:
    answer = found("rounds.number=4")
    foreseen = forecast.forecast(answer, lambda *_: None, UNHURRIED)
    spent: Counter[Mechanism] = Counter()
    for factor in forecast.FACTORS:
        plans = budget.plans(answer.roster, override(answer.settings, f"privacy.epsilon={2 * factor}"))
        spent[plans["a"].mechanism] += 2 * 4
    assert foreseen.cost == accounting.epsilon(spent, answer.plans["a"].delta)


def test_noise_is_new_each_time() -> None:
    answer = found("rounds.number=4")
    seen = {tuple(p.accuracies for p in forecast.forecast(answer, lambda *_: None, UNHURRIED).points) for _ in range(2)}
    assert len(seen) == 2


def test_where_time_is_short_federations_run_fewer_rounds_of_as_much_noise_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert forecast.schedule(0.01, 50, 60) == (forecast.FACTORS, 50)
    assert forecast.schedule(0.1, 50, 60) == (forecast.FACTORS, 42)
    assert forecast.schedule(1.0, 50, 60) == ((0.5, 1.0, 2.0), 10)
    assert forecast.schedule(3.0, 50, 60) is None
    assert forecast.schedule(3.0, 2, 60) == ((0.5, 1.0, 2.0), 2)
    answer = found("rounds.number=40 rounds.average=8 export.recover_rounds=4")
    monkeypatch.setattr(forecast, "schedule", lambda *_: ((0.5, 1.0), 6))
    foreseen = forecast.forecast(answer, lambda *_: None, UNHURRIED)
    assert (foreseen.rounds, foreseen.planned) == (6, 40)
    assert [point.epsilon for point in foreseen.points] == [1, 2]
    monkeypatch.setattr(forecast, "schedule", lambda *_: None, UNHURRIED)
    with pytest.raises(Refused, match="--seconds"):
        forecast.forecast(answer, lambda *_: None, UNHURRIED)
    short = forecast.shortened(answer.settings, 10)
    assert (short.rounds.number, short.rounds.average, short.export.recover_rounds) == (10, 2, 1)
    whole_noise, short_noise = (
        budget.plans(answer.roster, settings)["a"].mechanism.noise_multiplier for settings in (answer.settings, short)
    )
    reach = [settings.local.rate * settings.rounds.number for settings in (answer.settings, short)]
    noise = [
        settings.local.rate * z * math.sqrt(settings.rounds.number)
        for settings, z in ((answer.settings, whole_noise), (short, short_noise))
    ]
    assert reach[0] == reach[1]
    assert noise[1] == pytest.approx(noise[0], rel=5e-3)


def test_epsilons_out_of_reach_are_not_tried() -> None:
    points = forecast.forecast(found("rounds.number=4 privacy.max_noise=6"), lambda *_: None, UNHURRIED).points
    assert 0 < len(points) < 7
    assert 2.0 in [point.epsilon for point in points]


def test_who_cannot_pay_is_left_out_of_the_forecast_as_it_would_be_of_the_run() -> None:
    journal = forecast._Unkept({"a": 2, "b": 0}, Counter())
    out = [journal.reserve(number, {"a": 1, "b": 1, "c": 1}) for number in (1, 2, 3)]
    assert [sorted(names) for names in out] == [["b"], ["b"], ["a", "b"]]
    answer = found("privacy.budget=2.5")
    payable = forecast._payable(answer, 4.0, answer.settings)
    assert set(payable) == set("abcd")
    assert all(0 < rounds < 6 for rounds in payable.values())
    assert forecast._payable(answer, 2.0, answer.settings) == {}


@pytest.mark.parametrize("text", ["privacy.unit=both privacy.update_clip=0.5", "privacy.unit=client privacy.bands=2"])
def test_it_trains_with_two_promises_and_by_turns(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "schedule", lambda *_: ((1.0,), 3))
    answer = found(f"{text} rounds.number=3 privacy.epsilon=20")
    foreseen = forecast.forecast(answer, lambda *_: None, UNHURRIED)
    assert foreseen.accuracy is not None
    assert (foreseen.whole is not None) == ("both" in text)
    if foreseen.whole is not None:
        shared = answer.plans["a"].whole
        assert shared is not None
        assert foreseen.whole == accounting.epsilon({shared.mechanism: 2 * 3}, shared.delta)


def test_it_predicts_from_noised_test_results_and_says_what_they_would_have_cost() -> None:
    noised = "evaluation.on=clients evaluation.epsilon=4 evaluation.every=2 rounds.number=4 local.batch=0"
    answer = found(f"{noised} export.recover_rounds=0 privacy.epsilon=8")
    foreseen = forecast.forecast(answer, lambda *_: None, UNHURRIED)
    plan = answer.tests["a"]
    assert plan.steps == 3
    times = sum(len(point.accuracies) for point in foreseen.points)
    assert times == 2 * 7
    assert foreseen.tests == accounting.epsilon({plan.mechanism: times}, plan.delta)
    assert foreseen.accuracy is not None
    assert 0.8 < foreseen.accuracy <= 1
    exact = forecast.forecast(found("evaluation.on=clients rounds.number=4 local.batch=0"), lambda *_: None, UNHURRIED)
    assert exact.tests is None


def test_whose_test_examples_cannot_pay_does_not_evaluate_in_a_forecast_either(state: Path) -> None:
    text = "evaluation.on=clients evaluation.epsilon=4 rounds.number=2 export.recover_rounds=0 local.batch=0"
    poor = {Account("example", name, "made (test)"): (0.1, 1 / 600) for name in "abcd"}
    Ledger(state / "simulations" / "made.ledger").open(poor)
    foreseen = forecast.forecast(found(text), lambda *_: None, UNHURRIED)
    assert (foreseen.accuracy, foreseen.tests) == (None, None)
    assert "nobody could evaluate" in foreseen.reason


def test_who_has_no_budget_but_a_window_of_time_is_left_out_as_well() -> None:
    answer = found("privacy.window_days=30 privacy.window_epsilon=2.5 local.batch=0")
    payable = forecast._payable(answer, 4.0, answer.settings)
    assert set(payable) == set("abcd")
    assert all(0 < rounds < 6 for rounds in payable.values())


@pytest.mark.parametrize(
    "text", ["privacy.unit=local privacy.epsilon=20", "privacy.unit=client privacy.noise=shares codec=int16"]
)
def test_no_epsilon_is_refused_by_nodes_that_would_want_the_noise_of_another(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, right = [], forecast.rounds

    def heard(*asked: Any) -> Iterator[Any]:
        for state, row in right(*asked):
            rows.append(row)
            yield state, row

    monkeypatch.setattr(forecast, "rounds", heard)
    points = forecast.forecast(found(f"{text} rounds.number=2 export.recover_rounds=0"), lambda *_: None, UNHURRIED)
    assert len(points.points) >= 5
    assert not [row["rejected"] for row in rows if row["rejected"]]


def test_the_curve_never_falls_and_goes_through_points_that_do_not() -> None:
    points = [Point(1, (0.5, 0.5)), Point(2, (0.8, 0.9)), Point(4, (0.8, 0.8)), Point(8, (0.95, 0.95))]
    assert forecast.at(points, 1)[0] == pytest.approx(0.5)
    assert forecast.at(points, 2)[0] == forecast.at(points, 4)[0] == pytest.approx(0.825)
    assert forecast.at(points, math.sqrt(32))[0] == pytest.approx((0.825 + 0.95) / 2)
    assert forecast.at(points, 100)[0] == pytest.approx(0.95)
    assert forecast.at(points, 2)[1] == pytest.approx(math.sqrt(0.005 / 3))
    assert forecast.at([Point(1, (0.5,))], 1) == (0.5, None)
    assert forecast.at([], 1) == (None, None)
