"""One privacy plan a client, calibrated before round 1 for all rounds it may join, recovery included."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from clients.roster import Sizes, examples
from clients.steps import local_steps, sampling_rate
from clients.task import Hello
from privacy import accounting, cohort_noise, fixed_size, local_noise, matrix_noise, noise_shares, noisy_counts
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios.numbered import named
from scenarios.settings import Settings
from server.plans import Plans, shared
from server.select import cohort_size, least_summed


def plans(roster: Mapping[str, Hello], settings: Settings) -> Mapping[str, Plan]:
    """The plan of every client that has examples under privacy.unit=example, one for all under client and local.

    Under both each client with examples has its own plan, and in it the one of the client as a whole.

    Raises Refused when a client would need more noise than privacy.max_noise, with the smallest epsilon for these
    rounds and the most rounds for this epsilon.
    """
    wanted = settings.privacy
    if wanted.unit == "none":
        return {}
    total = settings.rounds.number + settings.export.recover_rounds
    if wanted.unit == "client" and wanted.bands > 1:
        limits = wanted.epsilon, wanted.delta, wanted.clip, wanted.max_noise
        return shared(roster, matrix_noise.plan(len(roster), wanted.bands, total, *limits))
    if wanted.by_shares:
        limits = wanted.epsilon, wanted.delta, wanted.clip, wanted.max_noise
        return shared(roster, noise_shares.plan(len(roster), total, *limits))
    if wanted.unit == "client":
        return shared(roster, _whole(len(roster), settings, total, wanted.epsilon))
    if wanted.unit == "local":
        limits = wanted.epsilon, wanted.delta, wanted.clip, wanted.max_noise
        return shared(roster, local_noise.plan(len(roster), total, *limits))
    names, sizes = named(roster), examples(roster)
    first, which = _alike(sizes)
    whole = None
    if wanted.unit == "both" and first:
        whole = _whole(int((sizes > 0).sum()), settings, total, wanted.client_epsilon or wanted.epsilon)
    kinds = []
    for at in first:
        name, size = names[at], int(sizes[at])
        rate = sampling_rate(settings.local, size)
        steps = total * local_steps(settings.local, size, True)
        delta = wanted.delta or accounting.default_delta(size)
        _below_one_over_n(wanted.delta, name, size)
        if accounting.epsilon({Mechanism(rate, wanted.max_noise): steps}, delta) > wanted.epsilon:
            raise Refused(_unreachable(roster, settings, total))
        noise = accounting.calibrate(rate, steps, wanted.epsilon, delta, wanted.max_noise)
        kinds.append(Plan(Mechanism(rate, noise), wanted.clip, wanted.epsilon, delta, steps, whole=whole))
    return Plans(names, kinds, which)


def test_plans(roster: Mapping[str, Hello], settings: Settings) -> Mapping[str, Plan]:
    """The plan of every client's test examples: so many noised evaluations; empty where they are not noised.

    The server does not know how many they are: delta is that of the client's training examples.
    """
    wanted = settings.evaluation
    if wanted.epsilon is None:
        return {}
    names, sizes = named(roster), examples(roster)
    first, which = _alike(sizes)
    for at in first:
        _below_one_over_n(settings.privacy.delta, names[at], int(sizes[at]))
    kinds = [
        noisy_counts.plan(settings.evaluations, wanted.epsilon, settings.privacy.delta, int(sizes[at])) for at in first
    ]
    return Plans(names, kinds, which)


def _alike(sizes: Sizes) -> tuple[list[int], NDArray[np.int32]]:
    """(the first client of each number of examples, in the order of the fleet; the number of that one for every client,
    -1 where there are no examples): clients with as many examples have the same plan."""
    kinds, first, back = np.unique(sizes, return_index=True, return_inverse=True)
    order = [at for at in np.argsort(first, kind="stable").tolist() if kinds[at]]
    place = np.full(len(kinds), -1, np.int32)
    place[order] = np.arange(len(order))
    return first[order].tolist(), place[back]


def _whole(clients: int, settings: Settings, total: int, epsilon: float) -> Plan:
    wanted, asked, rate = settings.privacy, settings.rounds, settings.rounds.fraction
    if fixed := wanted.sampling == "fixed":
        rate = fixed_size.rate(clients, cohort_size(clients, settings))
    limits = wanted.delta, wanted.update_norm, wanted.max_noise, fixed
    named = "privacy.client_epsilon" if wanted.client_epsilon else "privacy.epsilon"
    floor, minimum = "rounds.minimum", asked.minimum
    if settings.protect.mode != "none" and (least := least_summed(clients, settings)) > minimum:
        floor, minimum = "protect.minimum", least  # below it no sum is opened, and the model shows that
    return cohort_noise.plan(clients, rate, total, minimum, epsilon, *limits, named, floor)


def _below_one_over_n(delta: float | None, name: str, size: int) -> None:
    if delta is not None and delta >= 1 / size:
        raise Refused(
            f"privacy.delta={delta:g} lets a mechanism publish one of the {size} examples of {name} "
            f"outright: set it below {1 / size:.3g}, or unset it for 1 / (10 x a client's examples)"
        )


def _unreachable(roster: Mapping[str, Hello], settings: Settings, total: int) -> str:
    wanted = settings.privacy
    least, rounds, culprit = 0.0, total, ""
    for name, client in _holders(roster):
        mechanism = Mechanism(sampling_rate(settings.local, client.examples), wanted.max_noise)
        steps = local_steps(settings.local, client.examples, True)
        delta = wanted.delta or accounting.default_delta(client.examples)
        cost = accounting.epsilon({mechanism: total * steps}, delta)
        if cost > least:
            least, culprit = cost, name
        rounds = min(rounds, accounting.most_steps(mechanism, wanted.epsilon, delta, total * steps) // steps)
    recovery = f" ({settings.export.recover_rounds} of them recovery)" if settings.export.recover_rounds else ""
    return (
        f"privacy.epsilon={wanted.epsilon:g} cannot be reached in {total} rounds{recovery} with "
        f"privacy.max_noise={wanted.max_noise:g} ({culprit} has {roster[culprit].examples} examples): "
        f"the smallest epsilon for these rounds is {least:.4g}, the most rounds for this epsilon are {rounds}"
    )


def _holders(roster: Mapping[str, Hello]) -> list[tuple[str, Hello]]:
    """Who has examples, in name order; nobody else is ever asked."""
    return [(name, client) for name, client in sorted(roster.items()) if client.examples]
