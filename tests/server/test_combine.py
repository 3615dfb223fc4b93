"""Combiners against hand-computed values, against their definitions and against Flower's strategies."""

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum

from privacy.refused import Refused
from scenarios.settings import Server
from server import combine
from server.combine import Contribution


def contributions(*updates, weights=None, steps=None):
    count = len(updates)
    return [
        Contribution(np.asarray(update, np.float32), float(weight), step)
        for update, weight, step in zip(updates, weights or [1] * count, steps or [1] * count, strict=True)
    ]


def random_contributions(count, size=300, seed=0, equal=False):
    rng = np.random.default_rng(seed)
    weights = [1] * count if equal else rng.integers(1, 100, count).tolist()
    return contributions(*rng.normal(size=(count, size)), weights=weights, steps=rng.integers(1, 9, count).tolist())


def combined(given, **settings):
    server = Server(**settings)
    return combine.resolve(server)(iter(given), server)


ALL = [
    Server(combine="mean"),
    Server(combine="mean", normalize=True),
    Server(combine="median"),
    Server(combine="trimmed", trim=0.2),
    Server(combine="krum", byzantine=2),
    Server(combine="multikrum", byzantine=2),
]
battery = pytest.mark.parametrize("server", ALL, ids=lambda s: s.combine + "-normalized" * s.normalize)


def test_the_battery_holds_every_combiner():
    assert {server.combine for server in ALL} == set(combine.COMBINERS)


@battery
def test_nothing_in_nothing_out(server):
    assert combine.resolve(server)([], server) is None


@battery
def test_fewer_than_least_give_none_and_least_give_an_update(server):
    few = random_contributions(combine.least(server) - 1)
    enough = random_contributions(combine.least(server))
    assert combine.resolve(server)(few, server) is None
    assert combine.resolve(server)(enough, server) is not None


@pytest.mark.parametrize("byzantine", [0, 1, 4])
def test_krum_needs_what_its_theorem_needs(byzantine):
    # Blanchard et al. 2017, Proposition 1: 2f + 2 < n
    assert combine.least(Server(combine="krum", byzantine=byzantine)) == 2 * byzantine + 3
    assert combine.least(Server(combine="multikrum", byzantine=byzantine)) == 2 * byzantine + 3


@battery
def test_equal_updates_come_out_as_they_are(server):
    update = np.random.default_rng(0).normal(size=50).astype(np.float32)
    given = contributions(*[update] * 7, weights=range(1, 8), steps=[3] * 7)
    np.testing.assert_allclose(combine.resolve(server)(given, server), update, rtol=1e-6)


@battery
def test_the_result_is_float32_new_and_the_same_bits_again(server):
    given = random_contributions(9)
    before = [one.update.copy() for one in given]
    first, second = (combine.resolve(server)(given, server) for _ in range(2))
    assert first.dtype == np.float32
    assert first.tobytes() == second.tobytes()
    assert first.base is None  # a view would keep all clients' updates alive
    first[:] = 7
    assert all((one.update == old).all() for one, old in zip(given, before, strict=True))


@battery
def test_updates_scale_the_result(server):
    given = random_contributions(9)
    doubled = [Contribution(2 * one.update, one.weight, one.steps) for one in given]
    once, twice = (combine.resolve(server)(some, server) for some in (given, doubled))
    assert (2 * once == twice).all()  # a power of two: to the bit


@battery
def test_the_largest_finite_values_do_not_overflow_on_the_way(server):
    given = contributions(*[[3e38, -3e38]] * 8)
    np.testing.assert_allclose(combine.resolve(server)(given, server), [3e38, -3e38], rtol=1e-6)


@battery
def test_updates_of_different_lengths_are_refused(server):
    given = [*random_contributions(8), *contributions([1.0])]
    with pytest.raises(ValueError, match=r"summed|shape"):
        combine.resolve(server)(given, server)


@pytest.mark.parametrize("server", [s for s in ALL if s.combine != "mean"], ids=lambda s: s.combine)
def test_two_liars_of_any_size_and_weight_move_a_robust_combiner_little(server):
    honest = random_contributions(8, seed=1)
    liars = contributions([1e30] * 300, [-1e30] * 300, weights=[1e9, 1e9])
    result = combine.resolve(server)([liars[0], *honest, liars[1]], server)
    honest_CP = np.stack([one.update for one in honest])
    assert (result >= honest_CP.min(axis=0)).all()
    assert (result <= honest_CP.max(axis=0)).all()


def test_one_liar_moves_the_mean_anywhere():
    assert abs(combined([*contributions([1e30]), *contributions(*[[1.0]] * 9)])[0]) > 1e28


# ---- by hand ----


def test_mean_by_hand():
    given = contributions([1, 0], [4, 8], weights=[1, 3])
    np.testing.assert_array_equal(combined(given), np.float32([3.25, 6]))


def test_mean_keeps_what_a_float32_sum_would_lose():
    given = contributions([2.0**24], *[[1.0]] * 64)
    assert combined(given)[0] == np.float32((2.0**24 + 64) / 65)


def test_mean_takes_a_generator_in_one_pass_and_keeps_no_update():
    alive = []

    def stream():
        for k in range(50):
            alive.append(k)
            yield Contribution(np.full(10, k, np.float32), 1.0, 1)

    np.testing.assert_allclose(combine.mean(stream(), Server()), 24.5)
    assert len(alive) == 50


def test_fednova_by_hand():
    # p = (1/4, 3/4), tau = (2, 4): tau_eff = 3.5; 3.5 * (1/4 * 2/2 + 3/4 * 8/4) = 6.125
    given = contributions([2], [8], weights=[1, 3], steps=[2, 4])
    assert combined(given, normalize=True)[0] == np.float32(6.125)


def test_fednova_is_the_mean_where_steps_are_equal_and_not_otherwise():
    rng = np.random.default_rng(3)
    updates, weights = rng.normal(size=(5, 40)), rng.integers(1, 50, 5).tolist()
    equal = contributions(*updates, weights=weights, steps=[7] * 5)
    unequal = contributions(*updates, weights=weights, steps=[1, 2, 4, 8, 16])
    np.testing.assert_allclose(combined(equal, normalize=True), combined(equal), rtol=1e-6)
    assert not np.allclose(combined(unequal, normalize=True), combined(unequal), rtol=1e-2)


def test_fednova_removes_the_pull_of_the_client_that_steps_most():
    # two clients with quadratic losses at -1 and +1, equal data, 1 and 9 small local steps: the fixed point of FedAvg
    # is drawn towards the second, FedNova's stays in the middle (Wang et al. 2020, Theorem 1)
    def fixed_point(normalize):
        x, rate = 0.3, 0.01
        for _ in range(3000):
            updates = [(target - x) * (1 - (1 - rate) ** steps) for target, steps in ((-1, 1), (1, 9))]
            given = contributions([updates[0]], [updates[1]], steps=[1, 9])
            x += float(combined(given, normalize=normalize)[0])
        return x

    assert fixed_point(False) > 0.7
    assert abs(fixed_point(True)) < 0.03


def test_median_by_hand_of_odd_and_even_numbers():
    assert combined(contributions([1], [9], [2]), combine="median")[0] == 2
    assert combined(contributions([1], [9], [2], [4]), combine="median")[0] == 3


def test_median_works_on_each_coordinate_alone():
    given = contributions([1, 30, -5], [2, 10, 0], [3, 20, 5])
    np.testing.assert_array_equal(combined(given, combine="median"), [2, 20, 0])


def test_trimmed_by_hand():
    given = contributions([100], [1], [2], [3], [-100])
    assert combined(given, combine="trimmed", trim=0.2)[0] == 2
    assert combined(given, combine="trimmed", trim=0.4)[0] == 2
    np.testing.assert_allclose(combined(given, combine="trimmed", trim=0.0), [1.2], rtol=1e-6)


def test_trimmed_cuts_at_least_one_value_at_each_end_however_few_came():
    given = contributions([1e9], [1], [2], [3])
    assert combined(given, combine="trimmed", trim=0.1)[0] == 2.5


def test_krum_by_hand():
    # f = 1, C = 5: scores over the 2 nearest. 0: 1+4=5, 1: 1+1=2, 2: 1+4=5, 10: 64+81=145, 50: 1600+2304
    given = contributions([50], [0], [1], [2], [10])
    assert combined(given, combine="krum", byzantine=1)[0] == 1
    assert combined(given, combine="multikrum", byzantine=1)[0] == 0.5  # C - f - 2 = 2: of equals the first given


def test_krum_gives_one_of_the_updates_by_its_definition():
    given = random_contributions(11, seed=5)
    updates_CP = np.stack([one.update for one in given]).astype(np.float64)
    scores = []
    for k, update in enumerate(updates_CP):
        distances = np.sort(np.square(np.delete(updates_CP, k, axis=0) - update).sum(axis=1))
        scores.append(distances[: 11 - 3 - 2].sum())
    order = np.argsort(scores)
    assert (combined(given, combine="krum", byzantine=3) == updates_CP[order[0]]).all()
    expected = updates_CP[order[: 11 - 3 - 2]].mean(axis=0)
    np.testing.assert_allclose(combined(given, combine="multikrum", byzantine=3), expected, rtol=1e-5, atol=1e-7)


def test_krum_over_several_blocks_chooses_as_over_one(monkeypatch):
    given = random_contributions(9, size=1000, seed=8)
    whole = combined(given, combine="krum", byzantine=2)
    monkeypatch.setattr(combine, "_BLOCK", 7)
    assert (combined(given, combine="krum", byzantine=2) == whole).all()


def test_krum_holds_against_f_colluding_liars_and_falls_to_2f():
    lie = np.full(300, 5.0)
    for liars, holds in ((2, True), (4, False)):
        given = [*contributions(*[lie] * liars), *random_contributions(7 - liars, seed=2)]
        assert (combined(given, combine="krum", byzantine=2) != lie).any() == holds


# ---- against Flower ----


def flower_replies(given):
    """What Flower's strategies read of a reply; a Message itself cannot be built outside a Flower process."""
    return [
        SimpleNamespace(
            content=RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(one.update[:100].reshape(10, 10)), "b": Array(one.update[100:])}),
                    "metrics": MetricRecord({"num-examples": int(one.weight), "loss": 1.0}),
                }
            ),
            has_error=lambda: False,
        )
        for one in given
    ]


def flower(strategy, given):
    arrays, _ = strategy.aggregate_train(1, flower_replies(given))
    return np.concatenate([arrays["w"].numpy().ravel(), arrays["b"].numpy()])


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_mean_equals_flowers_fedavg(count):
    given = random_contributions(count, seed=count)
    np.testing.assert_allclose(combined(given), flower(FedAvg(), given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_median_equals_flowers_fedmedian(count):
    given = random_contributions(count, seed=count)
    np.testing.assert_allclose(combined(given, combine="median"), flower(FedMedian(), given), rtol=1e-6)


@pytest.mark.parametrize(("count", "trim"), [(5, 0.2), (10, 0.1), (11, 0.3), (20, 0.25), (7, 0.0)])
def test_trimmed_equals_flowers_fedtrimmedavg(count, trim):
    given = random_contributions(count, seed=count)
    theirs = flower(FedTrimmedAvg(beta=trim), given)
    np.testing.assert_allclose(combined(given, combine="trimmed", trim=trim), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "byzantine"), [(3, 0), (5, 1), (11, 4), (20, 3)])
def test_krum_equals_flowers_krum(count, byzantine):
    given = random_contributions(count, seed=count)
    theirs = flower(Krum(num_malicious_nodes=byzantine), given)
    np.testing.assert_allclose(combined(given, combine="krum", byzantine=byzantine), theirs, rtol=1e-6)


@pytest.mark.parametrize(("count", "byzantine"), [(4, 0), (6, 1), (11, 4), (20, 3)])
def test_multikrum_equals_flowers_multikrum_where_weights_are_equal(count, byzantine):
    given = random_contributions(count, seed=count, equal=True)
    theirs = flower(MultiKrum(num_malicious_nodes=byzantine, num_nodes_to_select=count - byzantine - 2), given)
    ours = combined(given, combine="multikrum", byzantine=byzantine)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- refusals ----


def test_an_unknown_combiner_is_refused_with_the_known_ones():
    with pytest.raises(Refused, match="mean, median, trimmed, krum, multikrum"):
        combine.resolve(Server(combine="average"))


@pytest.mark.parametrize("name", sorted(set(combine.COMBINERS) - {"mean"}))
def test_normalize_with_anything_but_the_mean_is_refused_with_the_way_out(name):
    with pytest.raises(Refused, match=r"server\.normalize=false or server\.combine=mean"):
        combine.resolve(Server(combine=name, normalize=True))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_no_contribution(weight):
    with pytest.raises(ValueError, match="above 0"):
        Contribution(np.zeros(3, np.float32), weight, 1)


@pytest.mark.parametrize("update", [np.zeros(3), np.zeros((3, 1), np.float32), np.zeros(3, np.int32)])
def test_an_update_of_another_dtype_or_shape_is_no_contribution(update):
    with pytest.raises(ValueError, match="float32"):
        Contribution(update, 1.0, 1)


def test_an_update_of_no_step_is_no_contribution():
    with pytest.raises(ValueError, match="at least one local step"):
        Contribution(np.zeros(3, np.float32), 1.0, 0)
