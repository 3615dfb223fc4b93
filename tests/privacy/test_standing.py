"""Windows of time, and the gate that asks all at once: nobody passes a limit, and nobody who fits is left out."""

import math
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import accounting, chain, standing
from privacy.ledger import Account, Ledger, Window
from privacy.plan import Mechanism
from privacy.refused import Refused
from privacy.standing import Standing, over, rounds_left

A = Account("example", "a", "digits")
STEP, SAMPLED = Mechanism(1.0, 10.0), Mechanism(0.2, 2.0)
DELTA, DAY, HOUR = 1e-3, 86_400, 3600


def cost(**counts: int) -> float:
    return accounting.epsilon({STEP: counts.get("full", 0), SAMPLED: counts.get("sampled", 0)}, DELTA)


MOVES = st.lists(
    st.tuples(st.integers(0, 3 * DAY), st.sampled_from([STEP, SAMPLED]), st.integers(1, 40), st.integers(0, 40)),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(MOVES, st.floats(0.1, 4), st.booleans())
def test_no_window_ever_holds_more_than_its_epsilon_and_what_fits_is_granted(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, Mechanism, int, int]], days: float, reopen: bool
) -> None:
    """Real times in seconds, in a list; the ledger's hours may hold a step an hour longer, and never a second less."""
    path, window = tmp_path_factory.mktemp("window") / "l.ledger", Window(days, 0.5)
    clock, done = [1_000_000], list[tuple[int, Mechanism, int]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain.time, "time", lambda: clock[0])
        book = Ledger(path)
        book.open({A: (None, DELTA)}, window)

        def within(since: float, until: float) -> Counter[Mechanism]:
            found: Counter[Mechanism] = Counter()
            for at, mechanism, steps in done:
                if since <= at <= until:
                    found[mechanism] += steps
            return found

        for number, (pause, mechanism, steps, taken) in enumerate(moves, 1):
            clock[0] += pause
            if reopen:
                book = Ledger(path)
                book.open({A: (None, DELTA)})
            ask = Counter({mechanism: steps})
            if refused := book.reserve("run", number, {A: (mechanism, steps)}):
                held = within(clock[0] - days * DAY - HOUR, clock[0])
                assert accounting.epsilon(held + ask, DELTA) > window.epsilon, "what fits is granted"
                assert "in " in refused[A]
                continue
            book.commit("run", number, {A: min(steps, taken)})
            done.append((clock[0], mechanism, min(steps, taken)))
        for start, _, _ in done:
            assert accounting.epsilon(within(start, start + days * DAY), DELTA) <= window.epsilon


def test_a_window_never_replaces_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000_000]
    monkeypatch.setattr(chain.time, "time", lambda: clock[0])
    book = Ledger(tmp_path / "l.ledger")
    book.open({A: (cost(full=50), DELTA)}, Window(1, cost(full=20)))
    taken = 0
    for number in range(1, 40):
        clock[0] += DAY + 2 * HOUR
        if not (refused := book.reserve("run", number, {A: (STEP, 20)})):
            taken += 20
    assert taken == 40
    assert f"of its {cost(full=50):g} is left" in refused[A]


def test_the_reason_says_when_enough_of_the_window_will_have_passed_and_then_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [HOUR * 300_000]
    monkeypatch.setattr(chain.time, "time", lambda: clock[0])
    book = Ledger(tmp_path / "l.ledger")
    book.open({A: (None, DELTA)}, Window(2, cost(full=20)))
    assert book.reserve("run", 1, {A: (STEP, 5)}) == {}
    clock[0] += 5 * HOUR
    assert book.reserve("run", 2, {A: (STEP, 15)}) == {}
    for steps, pays in ((5, 48), (6, 53)):  # hours after the first: 5 steps leave then, and the 15 later
        why = book.over({A: (STEP, steps)})[A]
        when = 300_000 * HOUR + pays * HOUR
        assert time.strftime("before %Y-%m-%d %H:%M UTC", time.gmtime(when + 60)) in why
        early, late = when, when + 60
        clock[0] = early
        assert A in book.over({A: (STEP, steps)})
        clock[0] = late
        assert book.over({A: (STEP, steps)}) == {}
        clock[0] = 300_000 * HOUR + 5 * HOUR
    assert "before" not in book.over({A: (STEP, 21)})[A], "no time will do"


def test_a_step_leaves_the_window_at_most_an_hour_late_and_not_a_second_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [HOUR * 300_000 + 1800]
    monkeypatch.setattr(chain.time, "time", lambda: clock[0])
    book = Ledger(tmp_path / "l.ledger")
    book.open({A: (None, DELTA)}, Window(2, cost(full=20)))
    book.reserve("run", 1, {A: (STEP, 20)})
    clock[0] += 2 * DAY
    assert A in book.over({A: (STEP, 1)})
    clock[0] += HOUR
    assert book.over({A: (STEP, 20)}) == {}


def test_a_window_counts_what_was_spent_before_it_was_set_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1_000_000]
    monkeypatch.setattr(chain.time, "time", lambda: clock[0])
    book = Ledger(tmp_path / "l.ledger")
    book.open({A: (None, DELTA)})
    book.reserve("run", 1, {A: (STEP, 20)})
    book.open({A: (9.0, DELTA)}, Window(30, cost(full=20)))
    assert A in book.over({A: (STEP, 1)})
    book.open({A: (None, DELTA)})
    assert Ledger(book.path).read() == book.chain.head
    assert (book.accounts[A].window, book.accounts[A].budget) == (Window(30, cost(full=20)), 9.0)
    with pytest.raises(Refused, match=r"a window of .* in 30 days .* keeps it"):
        book.open({A: (None, DELTA)}, Window(31, cost(full=20)))
    clock[0] -= 40 * DAY  # a clock that is set back gives nothing free
    assert A in book.over({A: (STEP, 1)})


@pytest.mark.parametrize(
    "window", [Window(0, 1), Window(1, 0), Window(-1, 1), Window(math.nan, 1), Window(1, math.inf)]
)
def test_a_window_that_means_nothing_is_refused(tmp_path: Path, window: Window) -> None:
    with pytest.raises(Refused, match="an account needs"):
        Ledger(tmp_path / "l.ledger").open({A: (None, DELTA)}, window)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 200), st.floats(0.2, 3), st.integers(1, 60)),
        min_size=1,
        max_size=8,
    )
)
def test_the_gate_refuses_exactly_whom_one_exact_query_each_would(clients: list[tuple[int, int, float, int]]) -> None:
    standings, asks, slow = {}, {}, set()
    for number, (full, sampled, budget, steps) in enumerate(clients):
        account = Account("example", str(number), "digits")
        standings[account] = Standing(budget, DELTA, None, Counter({STEP: full, SAMPLED: sampled}))
        asks[account] = (SAMPLED, steps)
        if accounting.epsilon(standings[account].history + Counter({SAMPLED: steps}), DELTA) > budget:
            slow.add(account)
    assert over(standings, asks, 0).keys() == slow


def test_the_gate_asks_exactly_only_whom_renyi_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    rich, poor = Account("example", "rich", "d"), Account("example", "poor", "d")
    standings = {rich: Standing(50.0, DELTA), poor: Standing(0.1, DELTA)}
    asked = list[float]()
    real = accounting.epsilon
    monkeypatch.setattr(accounting, "epsilon", lambda history, delta: asked.append(delta) or real(history, delta))
    assert accounting.may_join([{STEP: 5}, {STEP: 5}], [DELTA, DELTA], [50.0, 0.1]) == [True, False]
    assert len(asked) == 1
    assert over(standings, {rich: (STEP, 5), poor: (STEP, 5)}, 0).keys() == {poor}


def test_rounds_left_is_the_most_that_still_fits() -> None:
    spent = Standing(cost(full=50), DELTA, None, Counter({STEP: 7}))
    assert rounds_left(spent, (STEP, 5), 0) == 8
    assert rounds_left(Standing(None, DELTA), (STEP, 5), 0) is None
    spent.window = Window(1, cost(full=12))
    spent.dated[HOUR, STEP] = 7
    assert rounds_left(spent, (STEP, 5), HOUR) == 1
    assert rounds_left(spent, (STEP, 13), HOUR) == 0
    assert standing.valid(1.0, DELTA, None)
