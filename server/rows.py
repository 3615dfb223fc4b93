"""A round's row: what rounds.jsonl says of it, what it may not say, and why it was not applied."""

import time
from collections.abc import Callable, Collection, Mapping

import numpy as np

from privacy import accounting
from privacy.plan import Plan
from scenarios.numbered import named
from scenarios.settings import Settings
from server import combine, select
from server.plans import planned
from server.spendings import Spendings, spendings
from server.state import Row, Score, ServerState


def begun(state: ServerState, number: int, chosen: select.Cohort, down: int) -> Row:
    """Before anyone has answered. down: bytes to all that are asked."""
    return {
        "round": number,
        "phase": state.phase,
        "cohort": sorted([*chosen.steps, *chosen.late, *(entry["name"] for entry in chosen.skipped)]),
        "replies": 0,
        "rejected": [],
        "late": list(chosen.late),
        "skipped": chosen.skipped,
        "applied": False,
        "reason": None,
        "bytes_up": 0,
        "bytes_down": down,
    }


def too_few(chosen: select.Cohort, accepted: Mapping[str, int], clients: int, settings: Settings) -> str | None:
    """Why the round is not applied. Under client-level DP the draw decides: replies would give names away.

    With noise in shares replies do: who came is no secret, and without their noise nothing may be released.
    """
    if settings.privacy.by_shares:
        least, came = max(settings.rounds.minimum, select.least_summed(clients, settings)), len(accepted)
        missing = f"{came} noised updates came, {least} are needed for the noise that was charged"
        return chosen.reason or (missing if came < least else None)
    if select.by_turns(settings):
        least = max(1, settings.rounds.minimum)
        return f"fewer than {least} clients could be asked" if len(chosen.paid) < least else None
    if settings.privacy.by_client:
        few = chosen.drawn < settings.rounds.minimum
        return chosen.reason or (f"fewer than {settings.rounds.minimum} clients were drawn" if few else None)
    least = max(settings.rounds.minimum, combine.least(settings.server))
    return f"{len(accepted)} good replies, {least} are needed" if len(accepted) < least else None


def withhold(row: Row, traffic: tuple[int, int], expected: int, engine: Callable[[int], Row]) -> None:
    """What would tell who was drawn stays out of the row; bytes and `engine` are those of the cohort expected."""
    row.update(cohort=[], replies=None, rejected=[], late=[], skipped=[], simulated_seconds=None)
    row.update(bytes_up=expected * traffic[1], bytes_down=expected * traffic[0])
    row["engine"] = engine(expected)


def scored(score: Callable[[ServerState], Score], state: ServerState) -> Row:
    """How the round's weights do, of whom nothing was heard, and how long that took."""
    began = time.monotonic()
    loss, accuracy, worst, missing = score(state)
    return {
        "loss": loss,
        "accuracy": accuracy,
        "worst_client_accuracy": worst,
        "unevaluated": [{"name": name, "reason": reason} for name, reason in sorted(missing.items())],
        "seconds_evaluation": time.monotonic() - began,
    }


def worst_epsilon(
    state: ServerState, plans: Mapping[str, Plan], of: Collection[str] | None = None, least: float | None = None
) -> float | None:
    """The largest epsilon that any client has spent so far; None without DP.

    of: who has spent since it was `least`.
    """
    if not plans:
        return None
    known = state.clients.names if isinstance(state.clients, Spendings) else named({*plans, *state.clients})
    table = planned(plans, known)
    spent = spendings(state.clients, table.names)
    at = np.flatnonzero((table.which >= 0) & (spent.rows["steps"] > 0)) if of is None else spent.places(of)
    kinds = dict.fromkeys(zip(table.which[at].tolist(), spent.rows["steps"][at].tolist(), strict=True))
    found = (accounting.epsilon({table.kinds[kind].mechanism: steps}, table.kinds[kind].delta) for kind, steps in kinds)
    return max([least or 0.0, *found])
