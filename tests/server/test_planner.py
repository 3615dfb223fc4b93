"""What a plan says is what a run does: its epsilon and noise, who can pay, and the nearest to what is out of reach."""

import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from privacy import accounting
from privacy.ledger import Account, Ledger
from privacy.plan import Mechanism
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario, load
from scenarios.settings import Settings, override
from server import plan_facts, planner, purses
from server import run as job
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.ledger_place import ledger_path
from server.planner import Answer
from server.record import RunFolder

SIZES = {"a": 40, "b": 60, "c": 25, "d": 60}
BASE = (
    "rounds.number=3 local.batch=10 local.rate=1 export.recover_rounds=0 export.prune=0 reference.no_privacy=false "
    "privacy.unit=example privacy.epsilon=2"
)


def examples(name: str, size: int) -> Examples:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(ord(name)))
    return Examples(x, (x.sum(1) > 0).long())


def made(text: str = "", client: Any = None) -> tuple[Scenario, Settings]:
    test = examples("t", 200)
    fleet = Federation(SIZES, client or (lambda name: examples(name, SIZES[name])), test, test, lambda _: test)
    born = override(Settings(), BASE)
    scenario = Scenario("made", born, {"net": lambda: nn.Linear(6, 2)}, lambda _: fleet, name="made")
    return scenario, override(born, text)


def run(path: Path, scenario: Scenario, settings: Settings) -> dict[str, Any]:
    with RunFolder.create(path, "made", settings) as folder:
        return job.run(job.prepare(scenario, settings, folder, EmbeddedFleet, Quiet()))


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


KINDS = ["", "local.batch=0", "privacy.unit=client", "privacy.unit=client rounds.fraction=0.7 rounds.minimum=0"]
KINDS += ["privacy.unit=local privacy.epsilon=20", "privacy.unit=client rounds.fraction=0.5 privacy.sampling=fixed"]
KINDS += ["privacy.unit=both privacy.client_epsilon=20 privacy.update_clip=0.3", "privacy.unit=client privacy.bands=2"]
KINDS += ["evaluation.on=clients evaluation.epsilon=4 evaluation.every=2"]


@pytest.mark.parametrize("text", KINDS)
def test_a_run_with_the_printed_settings_spends_exactly_the_printed_epsilon(tmp_path: Path, text: str) -> None:
    scenario, settings = made(text)
    facts = plan_facts.collect("made", planner.answer(scenario, settings), "none", "none")
    words = shlex.split(facts["command"])
    assert words[:3] == ["umbel", "run", "made"]
    report = run(tmp_path / "run", scenario, override(scenario.settings, words[words.index("--set") + 1]))
    privacy = report["privacy"]
    assert privacy["worst_epsilon"] == facts["epsilon"]
    by_size = {row["examples"]: row for row in facts["per_size"]}
    for client in privacy["clients"]:
        if client["steps"] < facts["steps"] and "bands" in text:
            continue  # its turn came less often than the plan is made for
        row = by_size[client["examples"]]
        for key in ("noise_multiplier", "sampling_rate", "delta", "epsilon"):
            assert client[key] == row[key], key
        assert client["epsilon_total"] == row["epsilon_total"]
    for kind, worst in (("whole", "worst_whole_epsilon"), ("tests", "worst_tests_epsilon")):
        if facts[kind] is None:
            assert privacy[worst] is None
            continue
        assert privacy[worst] == facts[kind]["epsilon"]
        assert max(client[kind]["epsilon_total"] for client in privacy["clients"]) == facts[kind]["epsilon_total"]
        assert {client[kind]["sampling_rate"] for client in privacy["clients"]} == {facts[kind]["sampling_rate"]}
        assert max(c[kind]["noise_multiplier"] for c in privacy["clients"]) == facts[kind]["noise_multiplier"]
    assert facts["noise_multiplier"] == max(client["noise_multiplier"] for client in privacy["clients"])
    assert facts["steps"] in {client["steps"] for client in privacy["clients"]}


OUT_OF_REACH = [
    "privacy.epsilon=0.05 privacy.max_noise=20",
    "privacy.epsilon=0.05 privacy.max_noise=8 rounds.number=40 local.batch=0",
    "privacy.unit=client privacy.epsilon=0.5 privacy.max_noise=9 rounds.number=60",
    "privacy.unit=client privacy.epsilon=0.5 privacy.max_noise=9 rounds.number=60 privacy.bands=3",
    "privacy.unit=both privacy.epsilon=0.5 privacy.max_noise=9 rounds.number=60 privacy.update_clip=0.3",
]
OUT_OF_REACH += [
    f"local.batch=0 privacy.unit=both privacy.epsilon={one} privacy.client_epsilon=0.7 privacy.max_noise=9 "
    "rounds.number=50"
    for one in (0.5, 4)
]


@pytest.mark.parametrize("text", OUT_OF_REACH)
def test_a_target_out_of_reach_has_a_nearest_one_that_is_within_and_next_to_it_nothing_is(text: str) -> None:
    scenario, settings = made(text)
    found = planner.answer(scenario, settings)
    assert not found.feasible
    assert found.reason.count("\n") == 0
    names = {"rounds": "rounds.number", "noise_multiplier": "privacy.max_noise"}
    beyond = {"rounds": lambda n: n + 1, "noise_multiplier": lambda z: 0.99 * z}
    given = {key: value for key, value in found.nearest.items() if value is not None}
    assert {"epsilon", "noise_multiplier"} <= given.keys()
    assert ("client_epsilon" in given) == ("both" in text)
    for value in given.values():
        assert f"{value:g}" in found.reason
    for key in names.keys() & given.keys():
        value = given[key]
        assert planner.answer(scenario, override(settings, f"{names[key]}={value!r}")).feasible, key
        assert not planner.answer(scenario, override(settings, f"{names[key]}={beyond[key](value)!r}")).feasible, key
    pair = given["epsilon"], given.get("client_epsilon")
    assert planner.answer(scenario, planner.at(settings, *pair)).feasible
    asked = settings.privacy.epsilon, settings.privacy.client_epsilon or settings.privacy.epsilon
    for i, least in enumerate(pair):
        if least is not None and least != asked[i]:  # the other one is as it was asked for
            less = tuple(0.99 * value if j == i and value else value for j, value in enumerate(pair))
            assert not planner.answer(scenario, planner.at(settings, *less)).feasible, i


def test_what_was_not_asked_for_gives_way() -> None:
    scenario, settings = made("privacy.epsilon=0.5 privacy.max_noise=9 rounds.number=60 local.batch=0")
    closed = planner.answer(scenario, settings)
    assert closed.nearest["rounds"]
    fewer = planner.answer(scenario, settings, open_rounds=True)
    assert fewer.feasible
    assert fewer.settings.rounds.number == fewer.most_rounds == closed.nearest["rounds"]
    larger = planner.answer(scenario, settings, open_epsilon=True)
    assert larger.feasible
    assert larger.settings.privacy.epsilon == closed.nearest["epsilon"]


@pytest.mark.parametrize("text", ["", "privacy.unit=client rounds.fraction=0.7 rounds.minimum=0"])
def test_the_most_rounds_are_within_reach_and_one_more_is_not(text: str) -> None:
    scenario, settings = made(f"{text} privacy.max_noise=6")
    most = planner.answer(scenario, settings).most_rounds
    assert planner.answer(scenario, override(settings, f"rounds.number={most}")).feasible
    assert not planner.answer(scenario, override(settings, f"rounds.number={(most or 0) + 1}")).feasible


def test_without_a_unit_or_with_settings_that_no_run_takes_it_refuses_as_a_run_does() -> None:
    scenario, settings = made("privacy.unit=none")
    with pytest.raises(Refused, match=r"privacy\.unit=example"):
        planner.answer(scenario, settings)
    for text, reason in (
        ("privacy.unit=client privacy.delta=0.3", "publish"),
        ("privacy.unit=client rounds.fraction=0.3", "rounds.minimum"),
        ("rounds.minimum=9", "rounds.minimum"),
        ("server.step=none", "step"),
        ("local.engine=cohort local.precision=bf16", "local.precision=bf16"),
    ):
        with pytest.raises(Refused, match=reason):
            planner.answer(*made(text))


def half_spent(scenario: Scenario, settings: Settings, steps: dict[str, int], budget: float | None = 3) -> Ledger:
    """A ledger in which each client spent so many steps of noise 4 over all data."""
    found = planner.answer(scenario, settings)
    ledger = Ledger(ledger_path(scenario, settings, "embedded"))
    names = {name: Account(settings.privacy.unit, name, "made") for name in found.plans}
    ledger.open({account: (budget, 1.2 * found.plans[name].delta) for name, account in names.items()})
    asks = {names[name]: (Mechanism(1.0, 4.0), count) for name, count in steps.items()}
    assert not ledger.reserve("before", 1, asks)
    return ledger


def test_each_client_can_pay_for_as_many_rounds_as_the_gate_lets_through(state: Path) -> None:
    scenario, settings = made("rounds.number=8")
    ledger = half_spent(scenario, settings, {"a": 12, "b": 15})
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    found = planner.answer(scenario, settings)
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before
    assert found.feasible
    for name, (purse,) in found.held.items():
        account, plan, paid = Account("example", name, "made"), found.plans[name], 0
        per_round = plan.steps // found.total
        while paid < found.total and not ledger.reserve("run", paid + 1, {account: (plan.mechanism, per_round)}):
            paid += 1
        assert purse.rounds == paid
        assert purse.after == ledger.accounts[account].epsilon
        assert purse.spent == accounting.epsilon(purse.history, purse.delta)
    facts = plan_facts.collect("made", found, "none", "none")
    assert {one["client"] for one in facts["spent"]["refused"]} == {"a", "b"}
    assert all(0 < one["rounds"] < one["of"] == 8 for one in facts["spent"]["refused"])
    assert facts["spent"]["min"] == 0


def test_the_epsilon_that_everyone_can_pay_is_paid_by_all_and_a_little_more_is_not() -> None:
    scenario, settings = made("rounds.number=8")
    half_spent(scenario, settings, {"a": 12, "b": 15, "c": 1})
    found = planner.answer(scenario, settings)
    pair = planner.everyone_pays(found, len(found.held))
    assert pair is not None
    epsilon, second = pair
    assert second is None
    at = planner.answer(scenario, override(settings, f"privacy.epsilon={epsilon}"))
    assert len(purses.able(at.held)) == len(SIZES)
    above = planner.answer(scenario, override(settings, f"privacy.epsilon={1.02 * epsilon}"))
    assert len(purses.able(above.held)) < len(SIZES)


def test_where_too_few_can_pay_it_is_not_feasible_and_says_who_and_what_they_could() -> None:
    scenario, settings = made("rounds.number=8 rounds.minimum=3")
    half_spent(scenario, settings, {"a": 12, "b": 15})
    found = planner.answer(scenario, settings)
    assert not found.feasible
    assert "2 of 4 clients" in found.reason
    assert re.search(r"b \d of them, a \d of them", found.reason)
    at = planner.answer(scenario, override(settings, f"privacy.epsilon={found.nearest['epsilon']}"))
    assert at.feasible
    gave_way = planner.answer(scenario, settings, open_epsilon=True)
    assert gave_way.feasible
    assert gave_way.settings == at.settings
    assert plan_facts.collect("made", found, "none", "none")["command"] is None


def test_a_budget_that_is_spent_leaves_no_nearest() -> None:
    scenario, settings = made("rounds.number=8 rounds.minimum=4")
    half_spent(scenario, settings, {"a": 1000}, budget=None)
    found = planner.answer(scenario, override(settings, "privacy.budget=3"))
    assert not found.feasible
    assert found.nearest["epsilon"] is None
    assert "pays for no such run" in found.reason


def test_under_both_the_account_that_lacks_is_named_and_the_client_takes_part_only_if_both_pay() -> None:
    scenario, settings = made("privacy.unit=both privacy.update_clip=0.3 rounds.minimum=4")
    ledger = Ledger(ledger_path(scenario, settings, "embedded"))
    tired = Account("client", "a", "made")
    ledger.open({tired: (2.5, 1 / 40)})
    assert not ledger.reserve("before", 1, {tired: (Mechanism(1.0, 1.0), 1)})
    found = planner.answer(scenario, settings)
    assert not found.feasible
    assert "3 of 4 clients" in found.reason
    assert "a (client, made)" in found.reason
    (short,) = plan_facts.collect("made", found, "none", "none")["spent"]["refused"]
    assert (short["client"], short["unit"]) == ("a", "client")
    assert purses.able(found.held) == ["b", "c", "d"]


BOTH = "local.batch=0 privacy.unit=both privacy.update_clip=0.3 privacy.client_epsilon=6"


def spent_before(scenario: Scenario, settings: Settings, accounts: dict[Account, tuple[float, float]]) -> Ledger:
    """A ledger in which each account, of (budget, delta), paid for one Gaussian of noise 1."""
    ledger = Ledger(ledger_path(scenario, settings, "embedded"))
    ledger.open(accounts)
    assert not ledger.reserve("before", 1, dict.fromkeys(accounts, (Mechanism(1.0, 1.0), 1)))
    return ledger


def test_under_both_want_of_budget_has_a_nearest_pair_that_all_can_pay_and_next_to_it_they_cannot() -> None:
    scenario, settings = made(f"{BOTH} rounds.minimum=4")
    spent_before(scenario, settings, {Account("client", "a", "made"): (6, 1 / 40)})
    spent_before(scenario, settings, {Account("example", "b", "made"): (3, 1 / 600)})
    found = planner.answer(scenario, settings)
    assert not found.feasible
    pair = found.nearest["epsilon"], found.nearest["client_epsilon"]
    assert 0 < pair[0] < 2
    assert 0 < pair[1] < 6
    assert f"epsilon {pair[0]:g} with privacy.client_epsilon={pair[1]:g}" in found.reason
    near = planner.answer(scenario, planner.at(settings, *pair))
    assert near.feasible
    assert len(purses.able(near.held)) == 4
    assert not planner.answer(scenario, planner.at(settings, 1.02 * pair[0], pair[1])).feasible
    assert not planner.answer(scenario, planner.at(settings, pair[0], 1.02 * pair[1])).feasible


def test_under_both_only_the_promise_that_lacks_gives_way_and_one_that_was_asked_for_never_does() -> None:
    scenario, settings = made(f"{BOTH} rounds.minimum=4")
    spent_before(scenario, settings, {Account("client", "a", "made"): (6, 1 / 40)})
    found = planner.answer(scenario, settings, open_epsilon=True)
    assert not found.feasible, "privacy.client_epsilon was asked for"
    assert found.nearest["epsilon"] == 2
    followed = override(settings, "privacy.epsilon=6 privacy.client_epsilon=")
    gave_way = planner.answer(scenario, followed, open_epsilon=True)
    assert gave_way.feasible
    assert gave_way.settings.privacy.epsilon == 6
    assert gave_way.settings.privacy.client_epsilon == found.nearest["client_epsilon"]


def test_everyone_pays_says_what_both_accounts_of_all_clients_pay() -> None:
    scenario, settings = made(BOTH)
    spent_before(scenario, settings, {Account("client", "a", "made"): (6, 1 / 40)})
    spent_before(scenario, settings, {Account("example", "b", "made"): (3, 1 / 600)})
    found = planner.answer(scenario, settings)
    assert found.feasible, "two of four clients are enough"
    spent = plan_facts.collect("made", found, "none", "none")["spent"]
    assert {(one["client"], one["unit"]) for one in spent["refused"]} == {("a", "client"), ("b", "example")}
    pair = spent["affordable_epsilon"], spent["affordable_client_epsilon"]
    assert len(purses.able(planner.answer(scenario, planner.at(settings, *pair)).held)) == 4


def test_a_client_whose_test_account_cannot_pay_is_named_and_goes_on_training(tmp_path: Path) -> None:
    scenario, settings = made("local.batch=0 evaluation.on=clients evaluation.epsilon=4 evaluation.every=1")
    spent_before(scenario, settings, {Account("example", "a", "made (test)"): (5, 1 / 400)})
    found = planner.answer(scenario, settings)
    assert found.feasible
    assert purses.able(found.held) == list("abcd")
    facts = plan_facts.collect("made", found, "none", "none")
    (short,) = facts["tests"]["refused"]
    assert (short["client"], short["dataset"]) == ("a", "made (test)")
    assert short["rounds"] < short["of"] == facts["tests"]["evaluations"]
    report = run(tmp_path / "run", scenario, settings)
    evaluated = {client["name"]: client["tests"]["steps"] for client in report["privacy"]["clients"]}
    assert evaluated == {"a": short["rounds"], "b": 4, "c": 4, "d": 4}
    assert {client["steps"] for client in report["privacy"]["clients"] if client["name"] == "a"} == {3}


WINDOW = "local.batch=0 rounds.number=8 privacy.window_days=30 privacy.window_epsilon=3"


def at_time(patch: pytest.MonkeyPatch, days: float) -> None:
    patch.setattr("privacy.chain.time.time", lambda: 1_800_000_000 + days * 86_400)


def test_what_a_window_of_time_holds_is_not_paid_for_and_once_it_passed_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, settings = made(WINDOW)
    at_time(monkeypatch, 0)
    ledger = half_spent(scenario, settings, {"a": 12, "b": 15}, budget=None)
    at_time(monkeypatch, 10)
    found = planner.answer(scenario, settings)
    assert found.feasible
    short = {purse.client: purse for purse in purses.refused(found.held)}
    assert short.keys() == {"a", "b"}
    window = planner.accounts.window(settings)
    ledger.open({Account("example", name, "made"): (None, 1.2 * found.plans[name].delta) for name in SIZES}, window)
    for name, purse in short.items():
        account, plan, paid = Account("example", name, "made"), found.plans[name], 0
        while not ledger.reserve("run", paid + 1, {account: (plan.mechanism, plan.steps // found.total)}):
            paid += 1
        assert purse.rounds == paid
    facts = plan_facts.collect("made", found, "none", "none")["spent"]["refused"]
    assert [one["window"]["epsilon"] for one in facts] == [3, 3]
    assert all(0 < one["window"]["left"] < 3 and one["budget"] is None for one in facts)


def test_where_a_window_is_what_lacks_the_plan_says_from_when_on_it_can_be_paid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scenario, settings = made(f"{WINDOW} rounds.minimum=4")
    at_time(monkeypatch, 0)
    half_spent(scenario, settings, {"a": 12, "b": 15}, budget=None)
    at_time(monkeypatch, 10)
    found = planner.answer(scenario, settings)
    assert not found.feasible
    ready = found.nearest["ready"]
    assert plan_facts.collect("made", found, "none", "none")["nearest"]["ready"] in found.reason
    cheaper = planner.answer(scenario, override(settings, f"privacy.epsilon={found.nearest['epsilon']}"))
    assert cheaper.feasible
    monkeypatch.setattr("privacy.chain.time.time", lambda: ready - 1)
    assert not planner.answer(scenario, settings).feasible
    monkeypatch.setattr("privacy.chain.time.time", lambda: ready)
    assert planner.answer(scenario, settings).feasible


def test_a_run_that_is_dearer_than_its_whole_window_is_never_ready() -> None:
    scenario, settings = made("local.batch=0 privacy.window_days=30 privacy.window_epsilon=1")
    found = planner.answer(scenario, settings)
    assert not found.feasible
    assert found.nearest["ready"] is None
    assert found.nearest["epsilon"] <= 1
    assert planner.answer(scenario, override(settings, f"privacy.epsilon={found.nearest['epsilon']}")).feasible


def test_a_ledger_that_a_run_would_refuse_is_refused_in_the_same_words(tmp_path: Path) -> None:
    scenario, settings = made()
    half_spent(scenario, settings, {"a": 3})
    other = override(settings, "privacy.budget=5")
    with pytest.raises(Refused) as planned:
        planner.answer(scenario, other)
    with pytest.raises(Refused) as ran:
        run(tmp_path / "run", scenario, other)
    assert str(planned.value) == str(ran.value)
    path = ledger_path(scenario, settings, "embedded")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(Refused, match="damaged"):
        planner.answer(scenario, settings)


def test_a_plan_opens_no_ledger_and_touches_no_examples(state: Path) -> None:
    def untouchable(name: str) -> Examples:
        raise AssertionError(name)

    scenario, settings = made(client=untouchable)
    found = planner.answer(scenario, settings)
    assert found.feasible
    assert not state.exists()
    assert {name: hello.examples for name, hello in found.roster.items()} == SIZES


def test_seeded_noise_charges_nobody() -> None:
    scenario, settings = made("privacy.noise_seed=1")
    facts = plan_facts.collect("made", planner.answer(scenario, settings), "none", "none")
    assert facts["spent"]["ledger"] is None
    assert "noise_seed" in facts["spent"]["reason"]


def test_a_purse_counts_no_round_when_not_even_one_fits() -> None:
    scenario, settings = made("privacy.budget=0.2")
    found = planner.answer(scenario, settings)
    assert not found.feasible
    assert {purse.rounds for (purse,) in found.held.values()} <= {0, 1}
    for name, (purse,) in found.held.items():
        plan = found.plans[name]
        one_more = Counter({plan.mechanism: (purse.rounds + 1) * (plan.steps // found.total)})
        assert accounting.epsilon(one_more, purse.delta) > 0.2
    assert purses.affordable(replace(purse, budget=None), plan, 100) == 2


def test_digits_at_epsilon_3_in_50_rounds() -> None:
    digits = load("digits")
    found: Answer = planner.answer(digits, override(digits.settings, "privacy.epsilon=3 rounds.number=50"))
    plan = found.plans[found.binding]
    assert found.epsilon is not None
    assert 2.99 < found.epsilon <= 3
    assert plan.steps == 53
    closed = accounting.gaussian(plan.steps**0.5 / plan.mechanism.noise_multiplier, plan.delta)
    assert closed == pytest.approx(found.epsilon, rel=2e-3)
