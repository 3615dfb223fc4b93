"""The statement's figures that follow from the clients' accounts: made here when it is written, and when checked."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from privacy import accounting, certificate, renyi
from privacy.filter import filtered
from privacy.plan import Mechanism
from server.wording import OTHER_CLIENT, REPORT_READER, SERVER, UNITS, beside, shared, unprotected, worded

Report = Mapping[str, Any]
Group = dict[str, Any]

FPR = 0.01
MOST_BINS = 40
_EASY, _ASKED = (0.003, 0.01, 0.03, 0.07, 0.12, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8), 48
_DELTAS = (*np.geomspace(1e-9, 0.1, 16), *np.linspace(0.2, 0.95, 8))
_NONE = "no privacy was asked for (privacy.unit=none)"
CURVE_ACCOUNTANT = (
    "privacy.accounting: losses composed in the Fourier domain, the closed form for Gaussians; 0.1 % loose"
)


def spread(values: Sequence[float]) -> Group | None:
    """{least, median, most}; None for no values."""
    if not values:
        return None
    return {"least": float(min(values)), "median": float(statistics.median(values)), "most": float(max(values))}


def histogram(values: Sequence[float]) -> Group | None:
    """{edges, counts} of at most 40 equal bins; one bin where all values are the same. None for no finite value."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    bins = (
        1 if max(known) - min(known) <= 1e-9 * abs(max(known)) else min(MOST_BINS, max(5, math.isqrt(len(known)) * 2))
    )
    counts, edges = np.histogram(known, bins=bins)
    return {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]}


def costliest(clients: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The client with the largest epsilon, the first of several."""
    return max(clients, key=lambda client: client["epsilon"], default=None)


def derived(report: Report) -> dict[str, Group]:
    """Fields by group of the statement, from `privacy` and what the statement states of chance, cohort and plan."""
    privacy, stated = report["privacy"], report["statement"]
    clients = privacy["clients"]
    worst = costliest(clients)
    if worst is None:
        return {}
    chance = stated["delta"]["chance"] or 0.0
    own = 0.0 if privacy["unit"] == "both" else chance  # there it is part of the delta of clients as a whole
    points = curve(worst, own)
    deltas = [client["delta"] for client in clients]
    epsilons = [client["epsilon"] for client in clients]
    by_client = privacy["unit"] in ("client", "local")
    units = [len(clients) if by_client else client["examples"] for client in clients]
    second = {key: [client[key]["epsilon"] for client in clients if client[key]] for key in ("whole", "tests")}
    return {
        "mechanism": {"noise_multiplier": spread([client["noise_multiplier"] for client in clients])},
        "sampling": {"rate": spread([client["sampling_rate"] for client in clients])},
        "steps": {
            "actual": spread([client["steps"] for client in clients]),
            "histogram": histogram([client["steps"] for client in clients]),
        },
        "delta": {
            "values": spread(deltas),
            "below_one_over_n": all(delta * n < 1 for delta, n in zip(deltas, units, strict=True))
            and all(client["whole"]["delta"] * len(clients) < 1 for client in clients if client["whole"]),
        },
        "epsilon": {
            "headline": worst["epsilon"],
            "prv_low": worst["epsilon_low"],
            "prv_high": worst["epsilon_prv"],
            "rdp": max((c["epsilon_rdp"] for c in clients if c["epsilon_rdp"] is not None), default=None),
            "interval": certificate.INTERVAL,
            **gaussian(clients),
            "clients": spread(epsilons),
            "histogram": histogram(epsilons),
            "curve": points,
            "whole": spread(second["whole"]),
            "tests": spread(second["tests"]),
            "adversaries": adversaries(report),
        },
        "composition": {"this_run": worst["epsilon"], **totals(clients), "adaptive": adaptive(stated, own)},
        "interpretation": {
            "posterior": posterior(worst["epsilon"]) if privacy["guarantee"] else None,
            "tpr_at_1_percent_fpr": membership(clients, own) if privacy["guarantee"] else None,
        },
    }


def mechanism(account: Mapping[str, Any]) -> Mechanism:
    """What ran on the account, from its three figures."""
    return Mechanism(account["sampling_rate"], account["noise_multiplier"], account["population"])


def curve(client: Mapping[str, Any], chance: float) -> list[Group]:
    """delta(epsilon) of one client, epsilon rising: 25 deltas from 1e-9 to 0.95, its own among them. chance: on top."""
    if not client["steps"] or not math.isfinite(client["epsilon"]):
        return [{"epsilon": client["epsilon"], "delta": client["delta"]}]
    history = {mechanism(client): client["steps"]}
    best = {client["epsilon"]: client["delta"]}
    for delta in (float(f"{delta:.6g}") for delta in _DELTAS):
        total = min(1.0, delta + chance)
        if abs(total - client["delta"]) > 0.02 * client["delta"]:  # nearer, the two accountants' points would cross
            epsilon = accounting.epsilon(history, delta)
            best[epsilon] = min(total, best.get(epsilon, 1.0))
    return [{"epsilon": epsilon, "delta": delta} for epsilon, delta in sorted(best.items())]


def gaussian(clients: Sequence[Mapping[str, Any]]) -> Group:
    """{zcdp_rho, gdp_mu} of the client for which they are largest; null where a step is over a sample.

    n steps of multiplier z: rho = n / 2z^2 (Bun and Steinke 2016, Proposition 6), mu = sqrt(n) / z (Dong et al. 2022).
    """
    if any(client["sampling_rate"] != 1 or not client["noise_multiplier"] for client in clients):
        return {"zcdp_rho": None, "gdp_mu": None}
    mu_squared = max(client["steps"] / client["noise_multiplier"] ** 2 for client in clients)
    return {"zcdp_rho": mu_squared / 2, "gdp_mu": math.sqrt(mu_squared)}


def adversaries(report: Report) -> Group:
    """Epsilon against the report's reader, another client and the server; null with the reason where none holds.

    Under `both` the figure is that of an example; a reason beside it says that none of a client as a whole holds.
    """
    privacy, protect = report["privacy"], report["protect"]
    unit, worst, words = privacy["unit"], costliest(privacy["clients"]), worded(report)
    drawn = unit in ("client", "both") and report["settings"]["rounds.fraction"] < 1
    way = unit, protect["mode"], protect["trust"], drawn
    by_shares = report["settings"].get("privacy.noise") == "shares"
    found: Group = {"reason": None}
    for who in (REPORT_READER, OTHER_CLIENT, SERVER):
        if worst is None:
            why: str | None = _NONE
        elif not privacy["guarantee"]:
            why = privacy["why_not"]
        elif unit not in UNITS:
            why = f"not worked out for privacy.unit={unit}; it holds against: {privacy['against']}"
        elif words is not None and by_shares:
            why = None if who in words.protects_from else words.unprotected
        else:
            why = unprotected(who, *way)
        found[who] = None if why or worst is None else worst["epsilon"]
        if why is None and by_shares:
            honest = protect["minimum"] - report["settings"]["privacy.colluding"]
            why = shared(who, honest, protect["mode"], protect["trust"])
        told = unit in UNITS and privacy["guarantee"]
        found[f"{who}_reason"] = why or (beside(who, *way) if told else None)
    return found


def totals(clients: Sequence[Mapping[str, Any]]) -> Group:
    """Over the ledger's life: the costliest client, its budget, the least that is left to any; null where unknown."""
    known = [client for client in clients if client["epsilon_total"] is not None]
    limited = [client for client in known if client["budget"] is not None]
    return {
        "epsilon_total": max((client["epsilon_total"] for client in known), default=None),
        "budget": max((client["budget"] for client in limited), default=None),
        "left": min((max(0.0, client["budget"] - client["epsilon_total"]) for client in limited), default=None),
    }


def adaptive(stated: Mapping[str, Any], chance: float) -> Group:
    """{epsilon, order, divergence} of the filter over the steps that the statement says were planned."""
    given = stated["composition"]["adaptive"]
    if given["steps"] is None:
        return {"epsilon": None, "order": None, "divergence": None}
    most = {mechanism(given): given["steps"]}
    return filtered(most, given["budget"], given["delta"] - chance)._asdict()


def posterior(epsilon: float) -> float:
    """From a prior of one half the odds become e^epsilon to 1 at most: e^epsilon / (1 + e^epsilon)."""
    return 1 / (1 + math.exp(-epsilon))


def membership(clients: Sequence[Mapping[str, Any]], chance: float) -> float:
    """Most true positives, at 1 % false ones, of any test against any of the clients: not only the costliest one.

    Epsilons at different deltas do not order clients by their curves, so every account is asked: by the Renyi bound
    all of them, and exactly those, the worst first, that could still be above what was found. After `_ASKED` of them
    the rest keep the Renyi bound.
    """
    histories = [dict([account]) for account in sorted({(mechanism(c), c["steps"]) for c in clients if c["steps"]})]
    if not histories:
        return FPR
    loose = [renyi.epsilons(histories, [delta] * len(histories)) for delta in _EASY]

    def bound(epsilons: Sequence[float]) -> float:
        pairs = zip(epsilons, _EASY, strict=True)
        return true_positives([{"epsilon": float(e), "delta": min(1.0, d + chance)} for e, d in pairs], FPR)

    quick = [bound([row[i] for row in loose]) for i in range(len(histories))]
    found = FPR
    for asked, i in enumerate(sorted(range(len(histories)), key=lambda i: -quick[i])):
        if quick[i] <= found:
            break
        if asked == _ASKED:
            return quick[i]
        found = max(found, bound([accounting.epsilon(histories[i], delta) for delta in _EASY]))
    return found


def true_positives(points: Sequence[Mapping[str, float]], false_positives: float) -> float:
    """Most true positives of a test with that share of false ones, under every point of the curve at once.

    Each (epsilon, delta) allows at most delta + e^epsilon FPR, and 1 - e^-epsilon (1 - delta - FPR) (Kairouz et al.
    2015, Theorem 2.1); what satisfies all of them satisfies the least.
    """
    least = 1.0
    for point in points:
        epsilon, delta = point["epsilon"], point["delta"]
        growing = delta + math.exp(min(epsilon, 700)) * false_positives
        flat = 1 - math.exp(-epsilon) * (1 - delta - false_positives)
        least = min(least, growing, flat)
    return max(false_positives, least)
