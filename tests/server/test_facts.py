"""What the report says of privacy when the accountants agree, and when they do not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clients.task import Hello
from privacy import accounting, certificate, dp_sgd
from privacy.certificate import Certificate
from privacy.plan import Mechanism, Plan
from scenarios.settings import Settings, override
from server import facts
from server.accounts import Accounts
from server.state import ServerState, Spent

PLANS = {name: Plan(Mechanism(rate, 2.0), 1.0, 8.0, 1e-3, 40) for name, rate in (("a", 0.2), ("b", 1.0))}


def privacy_of(spent: dict[str, int]) -> dict[str, Any]:
    settings = override(Settings(), "privacy.unit=example")
    clients = {name: Spent(steps, 1, 1) for name, steps in spent.items()}
    state = ServerState(np.zeros(1, dtype=np.float32), (), (), 1, clients=clients)  # type: ignore[arg-type]
    roster = {name: Hello(name, 100, "digest") for name in PLANS}
    unwritten: Any = SimpleNamespace(settings=settings)
    return facts._privacy(unwritten, state, roster, PLANS, {}, Accounts(folder=unwritten), {})


def test_every_client_is_certified_and_stands_inside_the_interval_of_the_other_accountant() -> None:
    found = privacy_of({"a": 30, "b": 10})
    assert found["guarantee"]
    for client in found["clients"]:
        plan = PLANS[client["name"]]
        history = {plan.mechanism: client["steps"]}
        assert client["epsilon"] == certificate.certify(history, plan.delta).epsilon
        assert client["epsilon_low"] <= client["epsilon"] <= client["epsilon_prv"]
        assert client["epsilon"] <= accounting.epsilon(history, plan.delta) * (1 + 1e-6)
        assert client["epsilon"] < client["epsilon_rdp"] == dp_sgd.epsilon_rdp(history, plan.delta)
    assert found["worst_epsilon"] == max(client["epsilon"] for client in found["clients"])


def test_a_client_that_never_took_part_spent_nothing() -> None:
    found = privacy_of({"a": 5})
    assert [client["epsilon"] for client in found["clients"]][1] == 0
    assert found["guarantee"]


def test_accountants_that_contradict_each_other_take_the_guarantee_away_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = [Certificate(1.0, 0.98, 1.02), Certificate(2.0, 2.25, 2.3)]
    monkeypatch.setattr(certificate, "certify_all", lambda accounts: wrong)
    found = privacy_of({"a": 30, "b": 10})
    assert not found["guarantee"]
    assert "client b" in found["why_not"]
    assert "2.25" in found["why_not"]
