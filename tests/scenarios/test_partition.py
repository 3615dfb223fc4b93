"""Partitions give every example to one client, follow their law, come from the seed, and refuse what cannot be."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from privacy.refused import Refused
from scenarios import digits, partition
from scenarios.partition import split
from scenarios.settings import override

HOWS = ["iid", "dirichlet:0.3", "dirichlet:100", "shards", "shards:3"]
battery = pytest.mark.parametrize("how", HOWS)


def balanced(classes=10, each=100):
    """Labels of `classes` classes, `each` examples of each, in no order."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(classes), each))


def shares(parts, labels, label):
    """The share of `label`'s examples that each client holds."""
    return np.array([np.count_nonzero(labels[part] == label) for part in parts.values()]) / np.sum(labels == label)


def test_the_battery_holds_every_partition():
    assert {how.partition(":")[0] for how in HOWS} == set(partition.PARTITIONS)


@battery
@settings(max_examples=40, deadline=None)
@given(
    clients=st.integers(1, 13),
    labels=st.lists(st.integers(0, 4), min_size=40, max_size=200),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_example_goes_to_exactly_one_client(how, clients, labels, seed):
    labels = np.array(labels)
    try:
        parts = split(labels, clients, how, seed)
    except Refused:
        assume(False)
    assert len(parts) == clients
    assert (np.sort(np.concatenate(list(parts.values()))) == np.arange(len(labels))).all()
    assert all(part.dtype == np.int64 and len(part) > 0 for part in parts.values())


@battery
def test_the_seed_alone_decides(how):
    labels = balanced()
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    one, again, other = (split(labels, 10, how, seed) for seed in (1, 1, 2))
    assert all((one[name] == again[name]).all() for name in one)
    assert any(len(one[name]) != len(other[name]) or (one[name] != other[name]).any() for name in one)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    ("clients", "last"), [(1, "client-0"), (10, "client-9"), (11, "client-10"), (101, "client-100")]
)
def test_names_sort_in_the_order_of_the_clients(clients, last):
    names = list(split(balanced(), clients, "iid", 0))
    assert names == sorted(names)
    assert names[-1] == last
    assert len(set(map(len, names))) == 1


@pytest.mark.parametrize(("examples", "clients"), [(100, 10), (103, 10), (10, 10), (1437, 20)])
def test_iid_sizes_differ_by_one_at_most(examples, clients):
    sizes = [len(part) for part in split(np.zeros(examples, np.int64), clients, "iid", 0).values()]
    assert max(sizes) - min(sizes) <= 1


def test_iid_gives_each_client_every_label_in_about_equal_number():
    labels = balanced(each=1000)
    for label in range(10):
        assert np.abs(shares(split(labels, 10, "iid", 0), labels, label) - 0.1).max() < 0.05


def label_share_variance(alpha, clients=10, draws=60):
    labels = balanced(each=1000)
    return np.mean(
        [
            np.var(shares(split(labels, clients, f"dirichlet:{alpha}", seed, least=0), labels, label))
            for seed in range(draws)
            for label in range(10)
        ]
    )


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 10.0])
def test_dirichlet_label_shares_have_the_variance_of_their_alpha_and_of_no_other(alpha):
    def law(alpha, clients=10):
        return (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)

    ratio = label_share_variance(alpha) / law(alpha)
    assert 0.9 < ratio < 1.1
    assert not 0.9 < ratio * law(alpha) / law(2 * alpha) < 1.1


@pytest.mark.parametrize("seed", range(12))
def test_dirichlet_is_redrawn_until_each_of_digits_clients_has_20_examples(seed):
    federation = digits.data(override(digits.SCENARIO.settings, f"run.seed={seed}"))
    assert len(federation.sizes) == 20
    assert min(federation.sizes.values()) >= 20
    assert sum(federation.sizes.values()) == 1797 - 360 - 100


def test_shards_give_each_client_equal_pieces_of_the_sorted_labels():
    # McMahan et al. 2017, section 3: 200 shards of 300, two for each of 100 clients; here a tenth of that
    labels = balanced(each=600)
    parts = split(labels, 100, "shards:2", 0)
    assert {len(part) for part in parts.values()} == {60}
    kinds = Counter(len(np.unique(labels[part])) for part in parts.values())
    assert set(kinds) == {1, 2}
    assert kinds[2] > 70


def test_shards_without_a_number_are_two():
    labels = balanced()
    two, unsaid = split(labels, 10, "shards:2", 3), split(labels, 10, "shards", 3)
    assert all((two[name] == unsaid[name]).all() for name in two)


@pytest.mark.parametrize(
    ("how", "clients", "least", "hint"),
    [
        ("byage", 4, 1, "choose one of iid, dirichlet, shards"),
        ("natural", 4, 1, "choose one of"),
        ("", 4, 1, "choose one of"),
        ("iid", 1001, 1, "lower fleet.clients"),
        ("iid", 20, 51, "lower fleet.clients"),
        ("iid:3", 4, 1, "takes no number"),
        ("dirichlet", 4, 1, "dirichlet:0.3"),
        ("dirichlet:", 4, 1, "dirichlet:0.3"),
        ("dirichlet:0", 4, 1, "above 0"),
        ("dirichlet:-1", 4, 1, "above 0"),
        ("dirichlet:nan", 4, 1, "above 0"),
        ("dirichlet:inf", 4, 1, "above 0"),
        ("dirichlet:1e308", 4, 1, "above 0"),
        ("dirichlet:few", 4, 1, "'few' is no number"),
        ("dirichlet:0.01", 20, 20, "raise ALPHA"),
        ("shards:0", 4, 1, "shards:2"),
        ("shards:-1", 4, 1, "shards:2"),
        ("shards:2.5", 4, 1, "shards:2"),
        ("shards:nan", 4, 1, "shards:2"),
        ("shards:inf", 4, 1, "shards:2"),
        ("shards:1e300", 4, 1, "shards:2"),
        ("shards:900", 2, 500, "leaves a client"),
        ("shards:1", 501, 2, "lower fleet.clients"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line_with_the_way_out(how, clients, least, hint):
    with pytest.raises(Refused, match=hint) as caught:
        split(balanced(), clients, how, 0, least)
    assert "\n" not in str(caught.value)
