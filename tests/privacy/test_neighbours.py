"""How many neighbours are enough: the figures, the tails by another library and by simulation, and the graph itself."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from privacy.frames import Rules
from privacy.neighbours import connected, degree, graph

THIRD = Fraction(1, 3)


@pytest.mark.parametrize(("clients", "k"), [(100, 57), (200, 87), (500, 131), (1000, 159)])
def test_a_third_may_drop_of_cohorts_of_these_sizes(clients: int, k: int) -> None:
    found = degree(clients)
    assert (found.neighbours, found.threshold, found.quorum) == (k, k // 2 + 1, clients // 2 + 1)
    assert degree(clients, colluding=Rules(1, 1, 2).colluding).neighbours == k, "a tenth may collude as well"


@pytest.mark.parametrize("clients", range(2, 200))
def test_no_cohort_is_too_small_or_odd_for_the_rules(clients: int) -> None:
    found = degree(clients, colluding=Rules(1, 1, 2).colluding)
    assert 1 <= found.threshold <= found.neighbours < clients
    assert found.quorum <= clients - (clients // 3 if clients > 3 else 0)


@pytest.mark.parametrize("clients", [2, 3, 10, 64])
def test_small_cohorts_are_all_neighbours(clients: int) -> None:
    assert degree(clients).neighbours == clients - 1


@pytest.mark.parametrize("clients", [65, 99, 100, 101, 200, 1000])
def test_the_tail_is_that_of_another_library_and_no_fewer_neighbours_would_do(clients: int) -> None:
    def fails(k: int) -> float:
        return float(clients * hypergeom(clients - 1, clients - 1 - clients // 3, k).cdf(k // 2))

    k = degree(clients).neighbours
    assert fails(k) <= 1e-3
    assert all(fails(fewer) > 1e-3 for fewer in range(2, k) if clients * fewer % 2 == 0)


def test_simulated_cohorts_fail_as_seldom_as_promised_and_with_fewer_neighbours_more_often() -> None:
    clients, failure, draws = 100, Fraction(1, 20), 300
    found = degree(clients, failure=failure)
    rng = np.random.default_rng(0)

    def share_that_fails(k: int) -> float:
        failed = 0
        for _ in range(draws):
            left = set(rng.permutation(clients)[clients // 3 :].tolist())
            edges = graph(clients, k, rng.bytes(32))
            failed += any(len(left.intersection(edges[i])) < k // 2 + 1 for i in left)
        return failed / draws

    assert share_that_fails(found.neighbours) <= failure + 3 * (failure * (1 - failure) / draws) ** 0.5
    assert share_that_fails(found.neighbours // 2) > 0.5


@pytest.mark.parametrize("colluding", [Fraction(0), Fraction(1, 10), Fraction(1, 5), Fraction(3, 10)])
@pytest.mark.parametrize("clients", [20, 100, 200, 1000])
def test_colluding_clients_are_outnumbered_among_neighbours_and_in_every_two_quorums(
    clients: int, colluding: Fraction
) -> None:
    found, liars = degree(clients, colluding=colluding), int(clients * colluding)
    assert found.threshold > found.neighbours / 2
    assert 2 * found.quorum > clients + liars
    reached = hypergeom(clients - 1, liars, found.neighbours).logsf(found.threshold - 1) / np.log(2)
    assert np.log2(clients) + reached <= -104
    assert found.quorum <= clients - clients // 3 or not liars
    left = hypergeom(clients - 1, clients - 1 - clients // 3, found.neighbours)
    assert clients * left.cdf(found.threshold - 1) <= 1e-3


@pytest.mark.parametrize("clients", [10, 100, 1000])
def test_more_liars_than_any_threshold_stands_are_refused(clients: int) -> None:
    with pytest.raises(ValueError, match="colluding"):
        degree(clients, colluding=Fraction(1, 2))


def test_nobody_masks_alone() -> None:
    with pytest.raises(ValueError, match="takes two"):
        degree(1)


@given(st.integers(3, 60), st.data(), st.binary(min_size=32, max_size=32))
def test_every_graph_is_regular_mutual_and_connected(clients: int, data: st.DataObject, seed: bytes) -> None:
    k = data.draw(st.integers(2, clients - 1).filter(lambda k: clients * k % 2 == 0))
    edges = graph(clients, k, seed)
    assert all(len(set(near)) == k and i not in near and list(near) == sorted(near) for i, near in enumerate(edges))
    assert all(i in edges[j] for i, near in enumerate(edges) for j in near)
    assert connected(edges, set(range(clients)))
    assert edges == graph(clients, k, seed)


@pytest.mark.parametrize(("clients", "k"), [(5, 3), (5, 5), (5, 0), (4, 4)])
def test_impossible_graphs_are_refused(clients: int, k: int) -> None:
    with pytest.raises(ValueError, match="no graph"):
        graph(clients, k, b"")


def test_seeds_give_each_pair_an_edge_equally_often() -> None:
    clients, k, draws = 12, 5, 3000
    counts = np.zeros((clients, clients))
    for seed in range(draws):
        for i, near in enumerate(graph(clients, k, seed.to_bytes(32, "big"))):
            counts[i, list(near)] += 1
    share = k / (clients - 1)
    edges = counts[np.triu_indices(clients, 1)]
    assert np.abs(edges - draws * share).max() < 5 * (draws * share * (1 - share)) ** 0.5


def test_survivors_that_come_apart_are_seen() -> None:
    ring = graph(8, 2, b"seed")
    whole = set(range(8))
    assert connected(ring, whole - {0})
    assert not connected(ring, whole - {0} - set(ring[ring[0][0]]))
    assert not connected(ring, set())
