"""What a client of a masked sum is said to send is what it sends, to the byte, at every stage."""

from fractions import Fraction
from typing import Any

import pytest

from privacy import lengths
from privacy.frames import Rules, Stage


@pytest.mark.parametrize(("count", "entries", "width"), [(4, 1, 1), (5, 37, 23), (9, 12, 64)])
def test_each_answer_is_as_long_as_was_said(fleets: Any, count: int, entries: int, width: int) -> None:
    fleet = fleets(count, entries, width)
    _hold(fleet, lengths.sent(count, fleet.rules))
    assert Stage.REVEAL not in lengths.sent(count, fleet.rules)


@pytest.mark.usefixtures("drawn_graphs")
def test_a_graph_that_is_drawn_costs_a_stage_and_fewer_shares(fleets: Any) -> None:
    fleet = fleets(14, failure=Fraction(1, 2))
    said = lengths.sent(14, fleet.rules)
    _hold(fleet, said)
    assert list(said) == list(Stage)


def test_a_cohort_below_the_minimum_sends_nothing() -> None:
    with pytest.raises(ValueError, match="2 clients take part, 3 are the minimum"):
        lengths.sent(2, Rules(10, 20, 3))


def _hold(fleet: Any, said: dict[Stage, int]) -> None:
    server = fleet.server()
    asked = []
    while requests := server.ask():
        asked.append(server.stage)
        for name, request in requests.items():
            answer = fleet.answer(name, request)
            assert len(answer) == said[server.stage]
            server.hear(name, answer)
    assert asked == list(said)
