"""One privacy plan a client, calibrated before round 1 for all rounds it may join, recovery included."""

from collections.abc import Mapping

from clients.task import Hello
from privacy import accounting, cohort_noise, noisy_counts
from privacy.plan import Mechanism, Plan
from privacy.refused import Refused
from scenarios.settings import Settings
from server.select import local_steps, sampling_rate


def plans(roster: Mapping[str, Hello], settings: Settings) -> dict[str, Plan]:
    """The plan of every client that has examples under privacy.unit=example, one for all under client; else empty.

    Under both each client with examples has its own plan, and in it the one of the client as a whole.

    Raises Refused when a client would need more noise than privacy.max_noise, with the smallest epsilon for these
    rounds and the most rounds for this epsilon.
    """
    wanted = settings.privacy
    if wanted.unit == "none":
        return {}
    total = settings.rounds.number + settings.export.recover_rounds
    if wanted.unit == "client":
        return dict.fromkeys(sorted(roster), _whole(len(roster), settings, total, wanted.epsilon))
    made, holders = {}, _holders(roster)
    whole = None
    if wanted.unit == "both" and holders:
        whole = _whole(len(holders), settings, total, wanted.client_epsilon or wanted.epsilon)
    for name, client in holders:
        rate = sampling_rate(settings.local, client.examples)
        steps = total * local_steps(settings.local, client.examples, True)
        delta = wanted.delta or accounting.default_delta(client.examples)
        if accounting.epsilon({Mechanism(rate, wanted.max_noise): steps}, delta) > wanted.epsilon:
            raise Refused(_unreachable(roster, settings, total))
        noise = accounting.calibrate(rate, steps, wanted.epsilon, delta, wanted.max_noise)
        made[name] = Plan(Mechanism(rate, noise), wanted.clip, wanted.epsilon, delta, steps, whole=whole)
    return made


def test_plans(roster: Mapping[str, Hello], settings: Settings) -> dict[str, Plan]:
    """The plan of every client's test examples: so many noised evaluations; empty where they are not noised.

    The server does not know how many they are: delta is that of the client's training examples.
    """
    wanted = settings.evaluation
    if wanted.epsilon is None:
        return {}
    times = (settings.rounds.number + settings.export.recover_rounds) // wanted.every + 1  # and once at the end
    return {
        name: noisy_counts.plan(times, wanted.epsilon, settings.privacy.delta, client.examples)
        for name, client in _holders(roster)
    }


def _whole(clients: int, settings: Settings, total: int, epsilon: float) -> Plan:
    wanted, asked = settings.privacy, settings.rounds
    bounds = wanted.update_norm, wanted.max_noise
    named = "privacy.client_epsilon" if wanted.client_epsilon else "privacy.epsilon"
    return cohort_noise.plan(clients, asked.fraction, total, asked.minimum, epsilon, wanted.delta, *bounds, named)


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
