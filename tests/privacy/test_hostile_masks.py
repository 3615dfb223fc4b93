"""A server, a client or a wire that lies to those who mask gets an error that says who and why, and no vector."""

import contextlib
import random
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from privacy import agreement, dealing, frames, pads, roster, shares
from privacy.agreement import Sharers
from privacy.dealing import Lost
from privacy.frames import HEADER, SIGNATURE, Attempt, Rules, Stage
from privacy.masked_sum import Server, Sum
from privacy.neighbours import Degree, Graph, graph
from privacy.transcript import Transcript


def _ask(fleet: Any, stage: Stage, body: bytes) -> bytes:
    """A request of the fleet's server, with any body."""
    return frames.write(fleet.attempt(), stage, body)


def _resigned(fleet: Any, name: str, answer: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A client's answer with another body, properly signed: what a client that lies would send."""
    frame = answer[:HEADER] + change(answer[HEADER:-SIGNATURE])
    return bytes(frame + fleet.identities[name].sign(frame))


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _shown(server: Server, who: str, without: str) -> bytes:
    """The body of a request to sign: everybody but one survived."""
    view, sharers = server._view, server._sharers
    signatures = {i: s for i, s in server._vectors.items() if i != view.number[without]}
    return agreement.show_survivors(sharers, signatures, view.number[who])


# ---- A server that lies ----


def _all_masked(fleet: Any) -> Server:
    server = fleet.server()
    fleet.until(server, Stage.SIGN)
    return server


def test_two_lists_of_survivors_find_no_quorum_each(fleets: Any) -> None:
    fleet = fleets(6)
    server = _all_masked(fleet)
    signatures: dict[int, bytes] = {}
    for i, name in enumerate(fleet.names[:4]):  # a and b hear that f dropped, c and d that e did
        shown = _shown(server, name, without="f" if i < 2 else "e")
        answer = fleet.answer(name, _ask(fleet, Stage.SIGN, shown))
        signatures[i] = answer[HEADER:-SIGNATURE]
    assert len(signatures) == server._view.degree.quorum
    for name in fleet.names[:4]:
        with pytest.raises(
            ValueError, match=r"(c|a) has not signed the same survivors: the server shows different ones"
        ):
            fleet.answer(name, _ask(fleet, Stage.UNMASK, agreement.show_quorum(server._sharers, signatures)))


def test_a_quorum_is_not_made_of_one_signature_repeated_or_of_too_few(fleets: Any) -> None:
    fleet = fleets(6)
    server = fleet.server()
    requests = fleet.until(server, Stage.SIGN)
    signature = fleet.answer("a", requests["a"])[HEADER:-SIGNATURE]
    for who, rows in [({0, 1, 2, 3}, signature * 4), ({0}, signature), ({0}, signature * 4), (set(), b"")]:
        with pytest.raises(ValueError, match=r"has not signed the same survivors|a body of|signatures where 4"):
            fleet.answer("a", _ask(fleet, Stage.UNMASK, frames.bits(who, 6) + rows))


def test_a_client_gives_one_share_of_each_neighbour_once(fleets: Any) -> None:
    fleet = fleets(6)
    server = fleet.server()
    requests = fleet.until(server, Stage.UNMASK)
    first = fleet.answer("a", requests["a"])
    with pytest.raises(ValueError, match="asked twice, and not for the same, at sign"):
        fleet.answer("a", _ask(fleet, Stage.SIGN, _shown(server, "a", "f")))
    other = sorted(server._signed)[1:5]
    again = frames.bits(other, 6) + b"".join(server._signed[i] for i in other)
    with pytest.raises(ValueError, match="asked twice, and not for the same, at unmask"):
        fleet.answer("a", _ask(fleet, Stage.UNMASK, again))
    assert fleet.answer("a", requests["a"]) == first
    slots = frames.slots(first[HEADER:-SIGNATURE], dealing.GIVEN)
    assert [slot[0] for slot in slots] == [dealing.SELF] * 5


def test_of_a_survivor_only_the_self_mask_and_of_one_that_dropped_only_the_mask_key_is_given(fleets: Any) -> None:
    fleet = fleets(6)
    server = fleet.server()
    requests = fleet.until(server, Stage.UNMASK, {"c": Stage.MASK, "f": Stage.SHARE})
    slots = frames.slots(fleet.answer("a", requests["a"])[HEADER:-SIGNATURE], dealing.GIVEN)
    assert [slot[0] for slot in slots] == [dealing.SELF, dealing.KEY, dealing.SELF, dealing.SELF, dealing.NOTHING]
    assert not any(slots[4])


def test_fewer_survivors_than_the_minimum_are_refused(fleets: Any) -> None:
    fleet = fleets(6, minimum=6)
    server = _all_masked(fleet)
    with pytest.raises(ValueError, match="5 survivors are below the minimum of 6"):
        fleet.answer("a", _ask(fleet, Stage.SIGN, _shown(server, "a", "f")))


def test_a_cohort_below_the_minimum_is_refused(fleets: Any) -> None:
    fleet = fleets(6, minimum=5)
    server = fleet.server()
    fleet.until(server, Stage.SHARE)
    few = roster.write_roster(list(server._adverts.values())[:4])
    with pytest.raises(ValueError, match="4 clients take part, 5 are the minimum"):
        fleet.answer("a", _ask(fleet, Stage.SHARE, few))


def test_a_client_that_is_not_on_the_list_of_survivors_signs_nothing(fleets: Any) -> None:
    fleet = fleets(6)
    server = _all_masked(fleet)
    with pytest.raises(ValueError, match="a is not among the survivors"):
        fleet.answer("a", _ask(fleet, Stage.SIGN, _shown(server, "a", "a")))


def test_a_survivor_that_was_shown_other_sharers_gets_no_signature(fleets: Any) -> None:
    fleet = fleets(6)
    server = fleet.server()
    requests = fleet.until(server, Stage.MASK)
    view = server._view
    rows = [server._dealt[i][0] if i != 5 else None for i in view.edges[0]]
    to_a = frames.bits({0, 1, 2, 3, 4}, 6) + frames.table(rows, dealing.DEALT)  # a: f has dropped
    answers = {name: fleet.answer(name, requests[name]) for name in fleet.names[1:]}
    answers["a"] = fleet.answer("a", _ask(fleet, Stage.MASK, to_a))
    with pytest.raises(ValueError, match="a: has not signed who shared"):
        server.hear("a", answers["a"])
    signatures = {view.number[name]: answer[HEADER : HEADER + 64] for name, answer in answers.items()}
    for name in "bc":
        shown = agreement.show_survivors(server._sharers, signatures, view.number[name])
        with pytest.raises(ValueError, match="a has not signed the same sharers: the server shows different ones"):
            fleet.answer(name, _ask(fleet, Stage.SIGN, shown))


def test_keys_that_a_client_has_not_signed_are_refused_and_named(fleets: Any) -> None:
    fleet = fleets(5)
    server = fleet.server()
    fleet.until(server, Stage.SHARE)
    adverts = list(server._adverts.values())
    forged = replace(adverts[2], mask_key=pads.public(shares.draw()))
    with pytest.raises(ValueError, match="the keys of c in the roster: not signed by its identity key"):
        fleet.answer("a", _ask(fleet, Stage.SHARE, roster.write_roster([*adverts[:2], forged, *adverts[3:]])))
    swapped = replace(adverts[2], signature=adverts[3].signature)
    with pytest.raises(ValueError, match="the keys of c in the roster"):
        fleet.answer("a", _ask(fleet, Stage.SHARE, roster.write_roster([*adverts[:2], swapped, *adverts[3:]])))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: a[1:], "does not show the keys of a"),
        (lambda a: [a[0], a[1], a[1], *a[2:]], "a roster of .* for 6 of 5 known clients"),
        (lambda a: [a[0], a[1], a[1], a[3], a[4]], "b is out of order"),
        (lambda a: a[::-1], "d is out of order"),
        (lambda a: [*a[:4], replace(a[4], name="mallory")], "'mallory' in the roster is unknown"),
    ],
)
def test_rosters_that_an_honest_server_does_not_show_are_refused(fleets: Any, change: Any, why: str) -> None:
    fleet = fleets(5)
    server = fleet.server()
    fleet.until(server, Stage.SHARE)
    body = roster.write_roster(change(list(server._adverts.values())))
    with pytest.raises(ValueError, match=why):
        fleet.answer("a", _ask(fleet, Stage.SHARE, body))


@pytest.mark.usefixtures("drawn_graphs")
def test_nonces_that_an_honest_server_does_not_show_are_refused(fleets: Any) -> None:
    fleet = fleets(14, minimum=9, failure=Fraction(1, 2))
    server = fleet.server()
    fleet.until(server, Stage.SHARE)
    nonces = {i: server._nonces[name] for i, name in enumerate(fleet.names)}
    stray = roster.write_nonces(nonces, 14)
    lies = {
        "c committed to another nonce": roster.write_nonces(nonces | {2: bytes(32)}, 14),
        "the nonce of a is left out": roster.write_nonces({i: n for i, n in nonces.items() if i}, 14),
        "8 clients take part, 9 are the minimum": roster.write_nonces({i: nonces[i] for i in range(8)}, 14),
        "a nonce of nobody": frames.bits(range(13), 14) + stray[2:],
        "bits beyond the last of 14": b"\xff\xff" + stray[2:],
    }
    for why, body in lies.items():
        with pytest.raises(ValueError, match=why):
            fleet.answer("a", _ask(fleet, Stage.SHARE, body))


def test_where_all_are_neighbours_no_nonce_is_revealed(fleets: Any) -> None:
    fleet = fleets(5)
    server = fleet.server()
    body = fleet.until(server, Stage.SHARE)["a"][HEADER:]
    with pytest.raises(ValueError, match="there is no graph to draw"):
        fleet.answer("a", _ask(fleet, Stage.REVEAL, body))


@pytest.mark.usefixtures("drawn_graphs")
def test_a_graph_that_nobody_has_drawn_is_refused(fleets: Any) -> None:
    fleet = fleets(14, failure=Fraction(1, 2))
    server = fleet.server()
    body = fleet.until(server, Stage.REVEAL)["a"][HEADER:]
    with pytest.raises(ValueError, match="nobody has revealed a nonce"):
        fleet.answer("a", _ask(fleet, Stage.SHARE, body))


def test_a_request_under_other_rules_or_of_another_run_is_refused(fleets: Any) -> None:
    fleet = fleets(5)
    request = fleet.server().ask()["a"]
    for other in (
        replace(fleet.client("a"), rules=replace(fleet.rules, minimum=3)),
        replace(fleet.client("a"), rules=replace(fleet.rules, colluding=Fraction(0))),
        replace(fleet.client("a"), run="another"),
    ):
        with pytest.raises(ValueError, match="of another run, or under other rules"):
            other.answer(request)
    fleet.answer("a", request)
    again = replace(fleet.client("a"), run="another")
    opened = Server(Attempt(frames.run_id("another", fleet.rules), 9, 9), fleet.rules, fleet.known, fleet.names).ask()
    with pytest.raises(ValueError, match="this store is of another run"):
        again.answer(opened["a"])


def test_no_stage_is_answered_after_a_later_one(fleets: Any) -> None:
    fleet = fleets(5)
    fleet.until(fleet.server(), Stage.MASK)
    told = Transcript(fleet.stores["a"], fleet.attempt())
    with pytest.raises(ValueError, match="reveal of attempt 1 of round 1 is over"):
        told.once(Stage.REVEAL, b"", lambda: b"a nonce")


def test_survivors_that_come_apart_are_refused(fleets: Any) -> None:
    fleet = fleets(8)
    view = replace(_all_masked(fleet)._view, degree=Degree(2, 1, 5), edges=(ring := graph(8, 2, b"seed")))
    sharers = Sharers(view, frozenset(range(8)))
    sharers.check(fleet.rules, sharers.who - {0})
    opposite = next(i for i in range(8) if i and not set(ring[i]) & {0, *ring[0]})
    with pytest.raises(ValueError, match="do not hang together"):
        sharers.check(fleet.rules, sharers.who - {0, opposite})
    with pytest.raises(ValueError, match="has 0 neighbours left, of 1 due"):
        sharers.check(fleet.rules, sharers.who - set(ring[0]))
    with pytest.raises(ValueError, match="who have shared nothing"):
        Sharers(view, sharers.who - {0}).check(fleet.rules, sharers.who)


def _hidden_among(edges: Graph, survivors: set[int], liars: set[int]) -> int:
    """Honest survivors in the smallest set whose sum comes out: masks within it cancel, those with others are known."""
    honest, sizes = survivors - liars, []
    while honest:
        part = {honest.pop()}
        while more := {j for i in part for j in edges[i]} & honest:
            part |= more
            honest -= more
        sizes.append(len(part))
    return min(sizes)


@pytest.mark.parametrize("liars", [0, 1, 2])
def test_an_honest_vector_hides_among_as_many_as_guaranteed_whoever_the_server_drops(liars: int) -> None:
    draw, seen, unchecked = random.Random(liars), 0, 0
    advert = roster.Advert("a", b"", b"", b"", b"", b"")
    for _ in range(4000):
        clients, k = draw.choice([(12, 5), (14, 6), (16, 4), (16, 7)])
        edges, t = graph(clients, k, draw.randbytes(32)), k // 2 + 1
        view = roster.View(Attempt(bytes(32), 1, 1), (advert,) * clients, Degree(k, t, 1), edges, b"")
        everybody = range(clients)
        colluding = set(draw.sample(everybody, liars))
        survivors = set(draw.sample(everybody, draw.randrange(clients // 2, clients)))
        if not survivors - colluding:
            continue
        most = max(len(colluding & set(edges[i])) for i in survivors - colluding)
        hidden = _hidden_among(edges, survivors, colluding)
        guaranteed = t + 1 - most if liars else len(survivors)
        unchecked += hidden < guaranteed
        with contextlib.suppress(ValueError):
            Sharers(view, frozenset(everybody)).check(Rules(1, 1, 2), frozenset(survivors))
            seen += 1
            assert hidden >= guaranteed
    assert seen > 100
    assert unchecked > 10, "a server whose list nobody checks would have come further"


def test_shares_for_somebody_else_or_of_another_attempt_do_not_open(fleets: Any) -> None:
    fleet = fleets(5)
    old = fleet.server(1)
    fleet.until(old, Stage.MASK)
    server = fleet.server(2)
    requests = fleet.until(server, Stage.MASK)
    new, number = server._view, server._view.number
    key = Transcript(fleet.stores["a"], fleet.attempt(2)).secrets()[96:]
    spoilt = bytes([dealing.SPOILT]) + bytes(32)
    assert dealing.give(new, 0, 1, server._dealt[1][0], key, dealing.SELF)[0] == dealing.SELF
    assert dealing.give(new, 0, 1, server._dealt[1][2], key, dealing.SELF) == spoilt
    assert dealing.give(new, 0, 2, server._dealt[1][0], key, dealing.SELF) == spoilt
    assert dealing.give(new, 0, 1, old._dealt[1][0], key, dealing.SELF) == spoilt
    assert requests.keys() == number.keys()


def test_a_share_that_was_changed_on_its_way_is_told_and_the_others_are_enough(fleets: Any) -> None:
    fleet = fleets(6)
    server = fleet.server()
    requests = dict(fleet.until(server, Stage.MASK))
    requests["a"] = _flipped(requests["a"], HEADER + 1 + 100)  # in b's slot for a
    result = fleet.finish(server, requests)
    assert server._given[0][1][0] == dealing.SPOILT
    assert (result.values == fleet.total(fleet.names)).all()


# ---- A client that lies ----


def test_an_answer_of_another_round_or_stage_or_client_is_refused_and_named(fleets: Any) -> None:
    fleet = fleets(4)
    old: dict[Stage, dict[str, bytes]] = {}
    server = fleet.server(of=1)
    while requests := server.ask():
        assert server.stage is not None
        old[server.stage] = {name: fleet.answer(name, request) for name, request in requests.items()}
        for name, answer in old[server.stage].items():
            server.hear(name, answer)
    server = fleet.server(of=2)
    requests = server.ask()
    while requests:
        assert server.stage is not None
        answers = {name: fleet.answer(name, request) for name, request in requests.items()}
        for name, answer in answers.items():
            with pytest.raises(ValueError, match=f"{name}: not its answer at"):
                server.hear(name, old[server.stage][name])
            for stage in old.keys() - {server.stage}:
                with pytest.raises(ValueError, match=f"{name}: .* bytes are due at"):
                    server.hear(name, old[stage].get(name, b""))
            other = next(n for n in answers if n != name)
            with pytest.raises(ValueError, match=f"{name}: not its answer at"):
                server.hear(name, answers[other])
            forged = answer[:-SIGNATURE] + fleet.identities[other].sign(answer[:-SIGNATURE])
            with pytest.raises(ValueError, match=f"{name}: not signed by its identity key"):
                server.hear(name, forged)
            server.hear(name, answer)
        requests = server.ask()
    assert (server.result().values == fleet.total(fleet.names)).all()


def test_who_was_not_asked_is_not_heard_and_nobody_twice(fleets: Any) -> None:
    fleet = fleets(4)
    server = fleet.server()
    requests = server.ask()
    with pytest.raises(ValueError, match="'mallory' was not asked"):
        server.hear("mallory", b"")
    answer = fleet.answer("a", requests["a"])
    server.hear("a", answer)
    second = _resigned(fleet, "a", answer, lambda body: _flipped(body, 0))
    with pytest.raises(ValueError, match="a answered twice, and not the same, at advertise"):
        server.hear("a", second)


@pytest.mark.parametrize("at", [32, 64])
def test_a_key_of_low_order_costs_only_its_sender(fleets: Any, at: int) -> None:
    fleet = fleets(5)
    server = fleet.server()
    requests = server.ask()
    for name in fleet.names:
        answer = fleet.answer(name, requests[name])
        if name == "c":
            answer = _resigned(fleet, name, answer, lambda body: body[:at] + bytes(32) + body[at + 32 :])
            with pytest.raises(ValueError, match="c: a public key of low order"):
                server.hear(name, answer)
        else:
            server.hear(name, answer)
    assert fleet.finish(server, server.ask()).survivors == ("a", "b", "d", "e")


LIES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("not the share that b dealt it", lambda body: _flipped(body, 1)),
    ("not the share that b dealt it", lambda body: body[:1] + b"\xff" * 32 + body[33:]),
    ("a share of b that is not due", lambda body: bytes([dealing.KEY]) + body[1:]),
    ("a share of b that is not due", lambda body: b"\x09" + body[1:]),
    ("a share of b that is not due", lambda body: bytes(33) + body[33:]),
    ("a share of b where it says that there is none", lambda body: bytes([dealing.SPOILT]) + body[1:]),
]


def test_a_wrong_share_given_back_is_refused_and_its_giver_named(fleets: Any) -> None:
    fleet = fleets(6)
    server = fleet.server()
    requests = fleet.until(server, Stage.UNMASK, {"f": Stage.MASK})
    honest = {name: fleet.answer(name, request) for name, request in requests.items()}
    for why, lie in LIES:
        with pytest.raises(ValueError, match=f"a: {why}"):
            server.hear("a", _resigned(fleet, "a", honest["a"], lie))
    for name in "bcde":
        server.hear(name, honest[name])
    assert server.ask() == {}
    assert (server.result().values == fleet.total("abcde")).all()


@pytest.mark.parametrize(("kind", "gone"), [("self-mask", ()), ("mask key", ("b",))])
def test_who_deals_shares_of_another_secret_loses_the_round_and_is_named(
    fleets: Any, kind: str, gone: tuple[str, ...]
) -> None:
    fleet = fleets(5)
    server = fleet.server()
    requests = fleet.until(server, Stage.SHARE)
    for name, request in requests.items():
        answer = fleet.answer(name, request)
        if name == "b":
            key = Transcript(fleet.stores["b"], fleet.attempt()).secrets()[96:]
            lie = dealing.deal(server._view, 1, shares.draw(), shares.draw(), key)
            answer = _resigned(fleet, "b", answer, lambda body, lie=lie: lie)
        server.hear(name, answer)
    with pytest.raises(Lost, match=f"b dealt another {kind} than its own") as caught:
        fleet.finish(server, server.ask(), gone)
    assert caught.value.offenders == ("b",)


def test_who_deals_shares_that_do_not_open_loses_the_round_and_all_concerned_are_told(fleets: Any) -> None:
    fleet = fleets(5)
    server = fleet.server()
    requests = fleet.until(server, Stage.SHARE)
    for name, request in requests.items():
        answer = fleet.answer(name, request)
        if name == "b":
            answer = _resigned(fleet, "b", answer, lambda body: bytes(len(body)))
        server.hear(name, answer)
    with pytest.raises(Lost, match=r"0 of 3 shares of the self-mask of b came; those dealt to a, c, d, e were spoilt"):
        fleet.finish(server, server.ask())


def test_a_share_that_is_not_the_one_committed_to_is_told_instead_of_given(fleets: Any) -> None:
    fleet = fleets(5)
    server = fleet.server()
    fleet.until(server, Stage.MASK)
    view, commitments = server._view, server._dealt[1][0][:64]
    of_a, of_b = (Transcript(fleet.stores[name], fleet.attempt()).secrets()[96:] for name in "ab")
    key = pads.agree(of_b, view.adverts[0].share_key, dealing._info(view, 1, 0))
    pair = pads.unseal(key, server._dealt[1][0][64:], commitments)
    assert pair is not None
    for text in (shares.draw() + pair[32:], pair[:32] + shares.draw()):
        slot = dealing.give(view, 0, 1, commitments + pads.seal(key, text, commitments), of_a, dealing.SELF)
        assert slot == bytes([dealing.SPOILT]) + bytes(32)


def test_a_signature_of_other_survivors_is_refused(fleets: Any) -> None:
    fleet = fleets(6)
    server = fleet.server()
    requests = fleet.until(server, Stage.SIGN)
    other = fleet.identities["a"].sign(server._sharers.survived("a", frozenset(range(5))))
    answer = _resigned(fleet, "a", fleet.answer("a", requests["a"]), lambda body: other)
    with pytest.raises(ValueError, match="a: has not signed who survived"):
        server.hear("a", answer)


def test_a_vector_whose_sender_saw_other_sharers_is_refused(fleets: Any) -> None:
    fleet = fleets(4)
    server = fleet.server()
    requests = fleet.until(server, Stage.MASK)
    answer = _resigned(fleet, "a", fleet.answer("a", requests["a"]), lambda body: _flipped(body, 3))
    with pytest.raises(ValueError, match="a: has not signed who shared"):
        server.hear("a", answer)
    result = fleet.finish(server, requests)
    assert (result.values == fleet.total(fleet.names)).all()


# ---- A wire that lies ----


def _mutations(data: bytes, count: int, seed: int) -> list[bytes]:
    """The bytes with bits flipped, pieces cut, exchanged, zeroed, filled, or others altogether; never as they were."""
    draw = random.Random(seed)
    ways: list[Callable[[int, int], bytes]] = [
        lambda i, j: _flipped(data, min(i, len(data) - 1)),
        lambda i, j: data[:i],
        lambda i, j: data[i:],
        lambda i, j: data[:i] + data[j:],
        lambda i, j: data[:j] + data[i:],
        lambda i, j: data[:i] + bytes(j - i) + data[j:],
        lambda i, j: data[:i] + b"\xff" * (j - i) + data[j:],
        lambda i, j: data[:i] + draw.randbytes(j - i) + data[j:],
        lambda i, j: data[j:] + data[:j],
        lambda i, j: data + draw.randbytes(i + 1),
        lambda i, j: draw.randbytes(j),
        lambda i, j: draw.randbytes(len(data)),
    ]
    changed: list[bytes] = []
    while len(changed) < count:
        i, j = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        if (one := draw.choice(ways)(i, j)) != data:
            changed.append(one)
    return changed


def test_ten_thousand_changed_answers_are_refused_and_cost_only_their_sender(fleets: Any) -> None:
    fleet = fleets(5)
    server, tried = fleet.server(), 0
    while requests := server.ask():
        for name, request in requests.items():
            answer = fleet.answer(name, request)
            if name == "a":
                for changed in _mutations(answer, 2000, seed=tried):
                    with pytest.raises(ValueError, match=r"^a: "):
                        server.hear("a", changed)
                    tried += 1
            server.hear(name, answer)
    assert tried == 10_000
    assert (server.result().values == fleet.total(fleet.names)).all()


@pytest.mark.parametrize("stage", [Stage.ADVERTISE, Stage.SHARE, Stage.SIGN, Stage.UNMASK])
def test_what_a_client_signs_that_lies_is_refused_or_harmless_or_the_round_is_lost(fleets: Any, stage: Stage) -> None:
    fleet = fleets(5)
    server = fleet.server()
    requests = fleet.until(server, stage)
    answer = fleet.answer("a", requests["a"])
    before, refused = deepcopy([store.records for store in fleet.stores.values()]), 0
    for body in _mutations(answer[HEADER:-SIGNATURE], 80, seed=stage):
        trial = deepcopy(server)
        try:
            trial.hear("a", _resigned(fleet, "a", answer, lambda _, body=body: body))
        except ValueError as error:
            refused += str(error).startswith("a: ")
            continue
        for store, records in zip(fleet.stores.values(), before, strict=True):
            store.records = dict(records)
        total = _whatever_comes(fleet, trial, requests)
        assert total is None or (total.values == fleet.total(total.survivors)).all()
    assert refused > 40


def _whatever_comes(fleet: Any, server: Server, requests: Mapping[str, bytes]) -> Sum | None:
    """Go on to the end with those who answer and are heard; None where the round is lost."""
    try:
        while requests:
            for name, request in requests.items():
                if name not in server._heard:
                    with contextlib.suppress(ValueError):
                        server.hear(name, fleet.answer(name, request))
            requests = server.ask()
        return server.result()
    except Lost:
        return None


@pytest.mark.usefixtures("drawn_graphs")
@pytest.mark.parametrize("stage", [Stage.REVEAL, Stage.SHARE])
def test_changed_requests_to_draw_a_graph_are_refused(fleets: Any, stage: Stage) -> None:
    fleet = fleets(12, failure=Fraction(1, 2))
    server = fleet.server()
    requests = fleet.until(server, stage)
    before = dict(fleet.stores["a"].records)
    for changed in _mutations(requests["a"], 200, seed=stage):
        fleet.stores["a"].records = dict(before)
        with pytest.raises(ValueError, match=r"\w"):
            fleet.answer("a", changed)
    for changed in _mutations(answer := fleet.answer("b", requests["b"]), 500, seed=stage):
        with pytest.raises(ValueError, match=r"^b: "):
            server.hear("b", changed)
    server.hear("b", answer)
    assert (fleet.finish(server, requests).values == fleet.total(fleet.names)).all()


@pytest.mark.parametrize("stage", [Stage.ADVERTISE, Stage.SHARE, Stage.MASK, Stage.SIGN, Stage.UNMASK])
def test_changed_requests_are_refused_or_answered_as_what_they_are(fleets: Any, stage: Stage) -> None:
    fleet = fleets(5)
    server = fleet.server()
    requests = fleet.until(server, stage)
    before, taken = dict(fleet.stores["a"].records), 0
    for changed in _mutations(requests["a"], 400, seed=stage):
        fleet.stores["a"].records = dict(before)
        with contextlib.suppress(ValueError):
            fleet.answer("a", changed)
            taken += 1
    # an attempt may have any number, and a slot is sealed for later; all else is bound by what a client has seen before
    assert taken == 0 or stage in (Stage.ADVERTISE, Stage.MASK)
    fleet.stores["a"].records = before
    assert (fleet.finish(server, requests).values == fleet.total(fleet.names)).all()
