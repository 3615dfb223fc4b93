"""Recompute every account of a ledger with dp-accounting alone: its own reader, its own history, no code of Umbel's.

    python -m privacy.recompute LEDGER [--json]

Prints one row an account: unit, client, dataset, epsilon, delta. A ledger that does not fit together, or that its head
file does not confirm, gives one line and exit code 2.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import dp_accounting as dp
from dp_accounting import gaussian_mechanism
from dp_accounting.pld import PLDAccountant

_FIRST = b"umbel ledger 2\n"
_INTERVAL = 1e-4
_ORDERS = [*range(2, 25), 320, 512, 1024]
"""At these the bound of sampling without replacement has no differences that cancel."""
_FRAME = 4 + 32 + 32  # length, digest, and a tag that only who has the ledger's key can check


def records(path: Path) -> list[dict[str, Any]]:
    """The bodies of all records. Raises ValueError where a digest, or the head, does not fit."""
    data, head = path.read_bytes(), json.loads(path.with_name(path.name + ".head").read_bytes())
    if not data.startswith(_FIRST):
        raise ValueError("it is no ledger of version 2")
    digest, at, found = hashlib.sha256(_FIRST).digest(), len(_FIRST), list[dict[str, Any]]()
    if head[0] == 0 and head[1] != digest.hex():
        raise ValueError("it differs from its head")
    while at + _FRAME <= len(data) and at + _FRAME + int.from_bytes(data[at : at + 4]) <= len(data):
        body, end = at + _FRAME, at + _FRAME + int.from_bytes(data[at : at + 4])
        digest = hashlib.sha256(digest + data[body:end]).digest()
        if digest != data[at + 4 : at + 36] or (len(found) + 1 == head[0] and digest.hex() != head[1]):
            raise ValueError(f"record {len(found) + 1} is damaged")
        found.append(json.loads(data[body:end]))
        at = end
    if len(found) < head[0]:
        raise ValueError(f"it has {len(found)} records, its head names {head[0]}")
    return found


def accounts(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """{unit, client, dataset, epsilon, delta} of each account: an upper bound at the adjacency of what ran.

    Every reservation counts: in full, or as its COMMIT says; one with a VOID not at all.
    """
    rows: list[dict[str, Any]] = []  # in the order in which accounts were opened
    opened: dict[int, int] = {}  # by the record that opened one by itself
    known: dict[tuple[str, str, str], int] = {}
    spent: list[dict[tuple[float, ...], int]] = []
    reserved: dict[tuple[int, str, int, int], tuple[tuple[float, ...], int]] = {}
    for sequence, body in enumerate(bodies, 1):
        if body["kind"] == "OPEN":
            for client in body["clients"] if "clients" in body else [body["client"]]:
                who = (body["unit"], client, body["dataset"])
                if who not in known:
                    known[who] = len(rows)
                    opened |= {sequence: len(rows)} if "client" in body else {}
                    names = dict(zip(("unit", "client", "dataset"), who, strict=True))
                    rows.append({**names, "epsilon": 0.0, "delta": body["delta"]})
                    spent.append({})
        if body["kind"] not in ("RESERVE", "COMMIT", "VOID"):
            continue  # evidence: of data, of the other side's ledger, of an adoption
        ranges = body["accounts"] if "accounts" in body else [[opened[body["account"]]] * 2]
        if any(first < 0 for first, _ in ranges):
            raise ValueError(f"record {sequence} is about accounts that are not there")
        for at in (at for first, last in ranges for at in range(first, last + 1)):
            key = (at, body["run"], body["round"], body["attempt"])
            steps = spent[at]
            if body["kind"] == "RESERVE":
                reserved[key] = mechanism, count = tuple(body["mechanism"]), body["steps"]
                steps[mechanism] = steps.get(mechanism, 0) + count
            else:
                mechanism, count = reserved.pop(key)
                steps[mechanism] -= count - (body["steps"] if body["kind"] == "COMMIT" else 0)
    alike: dict[Any, float] = {}  # where one mechanism runs for all, their accounts are alike
    for row, steps in zip(rows, spent, strict=True):
        counts = {mechanism: count for mechanism, count in steps.items() if count}
        if (which := (frozenset(counts.items()), row["delta"])) not in alike:
            alike[which] = _epsilon(counts, row["delta"])
        row["epsilon"] = alike[which]
    return rows


def _epsilon(steps: dict[tuple[float, ...], int], delta: float) -> float:
    if any(mechanism[1] == 0 for mechanism in steps):
        return math.inf
    if fixed := sum(len(mechanism) == 3 for mechanism in steps):
        if fixed < len(steps):
            raise ValueError("an account mixes cohorts of a fixed size with others, which have another adjacency")
        return _fixed_size(steps, delta)
    accountant = PLDAccountant(value_discretization_interval=_INTERVAL)
    for (rate, noise), count in steps.items():
        gaussian = dp.GaussianDpEvent(noise)
        accountant.compose(gaussian if rate == 1 else dp.PoissonSampledDpEvent(rate, gaussian), count)
    return float(accountant.get_epsilon(delta)) if steps else 0.0


def _fixed_size(steps: dict[tuple[float, ...], int], delta: float) -> float:
    """Replace one of n, which moves a sum by 2C: sampling without replacement by Renyi, or as if all were asked."""
    sampled = dp.rdp.RdpAccountant(_ORDERS, dp.NeighboringRelation.REPLACE_ONE)
    squares = 0.0
    for (rate, noise, clients), count in steps.items():
        gaussian = dp.GaussianDpEvent(noise / 2)
        event = dp.SampledWithoutReplacementDpEvent(int(clients), round(rate * clients), gaussian)
        sampled.compose(event, count)
        squares += count * (2 / noise) ** 2
    everyone = gaussian_mechanism.get_epsilon_gaussian(1 / math.sqrt(squares), delta)
    return min(float(sampled.get_epsilon(delta)), float(everyone))


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--json", action="store_true", help="a JSON list instead of lines")
    chosen = parser.parse_args()
    try:
        rows = accounts(records(chosen.ledger))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        print(f"{chosen.ledger} cannot be recomputed: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(
                f"{row['dataset']} {row['client']} ({row['unit']}): epsilon {row['epsilon']:.4f} at {row['delta']:.3g}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
