"""The hazards checklist of a statement: what makes an epsilon mean less than it says; each pass, fail or unknown."""

from collections.abc import Mapping
from typing import Any

from server.wording import UNITS

Hazard = dict[str, str]


def hazards(report: Mapping[str, Any]) -> list[Hazard]:
    """{hazard, state, why} for a report whose statement has all other groups but interpretation."""
    privacy, stated = report["privacy"], report["statement"]
    if not privacy["clients"]:
        why = "no privacy was asked for"
        return [{"hazard": "a guarantee of differential privacy", "state": "fail", "why": why}]
    words, clients = UNITS.get(privacy["unit"]), privacy["clients"]
    crossed = [client for client in clients if client["epsilon_low"] is not None]
    apart = [client["name"] for client in crossed if client["epsilon"] < client["epsilon_low"]]
    seeded, ledger = stated["mechanism"]["seeded"], privacy["ledger"]
    references = [key for key in ("without_privacy", "central") if stated["utility"][key] is not None]
    noised = report["settings"].get("evaluation.epsilon") is not None
    whole = privacy["unit"] == "client" and report["settings"].get("privacy.noise") == "shares"
    by_clients = report["final"]["evaluated_by"] == "clients" and not noised
    verdict = stated["audit"]["verdict"]
    sampled, below = stated["sampling"]["as_assumed"], stated["delta"]["below_one_over_n"]
    lines = [
        (
            "noise that can be made again",
            not seeded,
            "from a published seed" if seeded else "from the system's entropy",
        ),
        (
            "a generator that is not cryptographic",
            whole and not seeded,
            stated["mechanism"]["generator"] or "not known",
        ),
        (
            "attacks on floating-point noise",
            whole,
            "discrete Gaussian noise, drawn and added in whole numbers"
            if whole
            else "continuous Gaussian noise in floating point, neither discrete nor snapped",
        ),
        ("sampling other than the proof assumes", sampled, stated["sampling"]["assumption"] or "not worked out"),
        ("delta at or above 1 / n", below, "delta is compared with the units of every account"),
        (
            "spending that nobody adds up",
            ledger["path"] is not None,
            ledger["reason"] or "every step is charged to a ledger",
        ),
        (
            "one accountant alone",
            None if not crossed else not apart,
            f"{len(crossed)} of {len(clients)} clients checked by Opacus' PRV" + (f", not {apart[0]}" if apart else ""),
        ),
        (
            "a server that does not follow the protocol",
            False,
            "it is trusted to run this program; what it sends is not proven",
        ),
        ("settings that were chosen by looking at data", None, "earlier runs are added up where a ledger knows them"),
        ("preprocessing that depends on data", None, "constants of the scenario are taken as they are"),
        (
            "metrics without noise",
            not by_clients,
            "the sums of the clients' test results have no noise"
            if by_clients and report["settings"].get("protect.mode", "none") != "none"
            else "the clients' test results leave without noise"
            if by_clients
            else "the clients noise their test results"
            if noised
            else "measured on the server's own data",
        ),
        (
            "runs on the same data without privacy",
            not references,
            f"reference runs, whose accuracy stands in this report: {len(references)}"
            if references
            else "none was made",
        ),
        ("timing and traffic", None, "how long a round took and what the network shows is not noised"),
        (
            "code that differs from the proof",
            None if verdict is None else verdict == "pass",
            "no audit was made" if verdict is None else f"the audit's verdict is {verdict}",
        ),
    ]
    if words is None:
        lines.append(("a unit of privacy without a description", None, f"privacy.unit={privacy['unit']}"))
    states = {True: "pass", False: "fail", None: "unknown"}
    return [{"hazard": hazard, "state": states[state], "why": why} for hazard, state, why in lines]
