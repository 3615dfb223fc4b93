"""umbel report --check: is a report whole, unchanged, and true? Every line it finds says one thing that is not."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from privacy import accounting
from privacy.chain import Head
from privacy.ledger import TESTS, Account, Ledger
from privacy.refused import Refused
from server import client_rows, composition, outcome, provenance, schema, signature
from server.arithmetic import errors
from server.results import load_rounds

_MOST_LINES = 30


class Verdict(NamedTuple):
    """What was found wrong, one line each; what was checked and held; what could not be looked at, and why."""

    wrong: Sequence[str]
    held: Sequence[str]
    open: Sequence[str]


def check(path: Path, verify_key: Path | None = None) -> Verdict:
    """Checks a report.json, or that of a run folder: schema, digest, arithmetic, and what lies beside it.

    verify_key: the PEM public key that must have signed it. Raises Refused where there is no report, or no such key.
    """
    path = path / "report.json" if path.is_dir() else path
    wanted = None if verify_key is None else signature.public_key(verify_key)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): name a report.json or the folder of a run") from None
    wrong, held, open_ = list[str](), list[str](), list[str]()
    try:
        report = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return Verdict([f"it is no JSON object with each key once: {error}"], [], [])
    if isinstance(report, dict) and "statement" not in report and "digest" not in report:
        wrong.append("it has no statement and no digest: it is of an older Umbel, or they were taken out")
    elif faults := schema.faults(report):
        wrong += [f"schema: {fault}" for fault in faults[:_MOST_LINES]]
    else:
        held.append("schema")
        _say("digest", _digest(report), wrong, held)
        try:
            report = client_rows.whole(report, path.parent)
        except Refused as error:
            wrong.append(f"clients: {error}")
        else:
            _content(report, path.parent, wrong, held, open_)
    _signature(report, path, content, wanted, wrong, held, open_)
    return Verdict(wrong, held, open_)


def _content(report: Mapping[str, Any], folder: Path, wrong: list[str], held: list[str], open_: list[str]) -> None:
    """What a report says, its clients' rows with it, wherever they stand."""
    if report["privacy"]["clients"]:
        wrong += [f"schema: {fault}" for fault in schema.faults(report)[:_MOST_LINES]]
    try:
        _say("arithmetic", errors(report), wrong, held)
    except (
        ArithmeticError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:  # a rate of 0, settings that are not ours
        wrong.append(f"arithmetic: no run has such figures or settings ({type(error).__name__})")
    for part in (_files, _rounds, _audit, _ledger):
        part(report, folder, wrong, held, open_)


def _say(what: str, found: Iterator[str], wrong: list[str], held: list[str]) -> None:
    before = len(wrong)
    wrong += [f"{what}: {line}" for line in found][:_MOST_LINES]
    if len(wrong) == before:
        held.append(what)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _digest(report: Mapping[str, Any]) -> Iterator[str]:
    if report["digest"] != (found := provenance.digest(report)):
        yield f"the report says {report['digest'][:16]}…, its content has {found[:16]}…: it was changed"


def _files(report: Mapping[str, Any], folder: Path, wrong: list[str], held: list[str], open_: list[str]) -> None:
    def found() -> Iterator[str]:
        for entry in there:
            data = (folder / entry["file"]).read_bytes()
            if len(data) != entry["bytes"] or provenance.sha256(data) != entry["sha256"]:
                yield f"{entry['file']} is not the file that this report speaks of"

    listed = report["statement"]["post_processing"]["files"] or []
    inside = [entry for entry in listed if _inside(folder, entry["file"])]
    wrong += [f"files: {entry['file']!r} leads out of the run folder" for entry in listed if entry not in inside]
    there = [entry for entry in inside if (folder / entry["file"]).is_file()]
    if there:
        _say(f"{len(there)} of {len(listed)} exported files", found(), wrong, held)
    if absent := [entry["file"] for entry in inside if entry not in there]:
        open_.append(f"exported files that do not lie beside it: {', '.join(absent)}")


def _inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _rounds(report: Mapping[str, Any], folder: Path, wrong: list[str], held: list[str], open_: list[str]) -> None:
    if not (folder / "rounds.jsonl").is_file():
        open_.append("sums over rounds: rounds.jsonl does not lie beside it")
        return

    def found() -> Iterator[str]:
        try:
            rows = load_rounds(folder)
        except Refused as error:
            yield str(error)
            return
        trained = sum(row["phase"] == "train" for row in rows)
        if trained != report["rounds"]:
            yield f"rounds is {report['rounds']}, rounds.jsonl has {trained} training rounds"
        if len(rows) != (said := report["statement"]["steps"]["rounds"]):
            yield f"statement.steps.rounds is {said}, rounds.jsonl has {len(rows)}"
        for way in ("up", "down"):
            if (total := sum(row[f"bytes_{way}"] for row in rows)) != report["bytes"][way]:
                yield f"bytes.{way} is {report['bytes'][way]}, the rounds add up to {total}"
        spent = [row["epsilon"] for row in rows if row["epsilon"] is not None]
        worst = report["privacy"]["worst_epsilon"] or 0.0
        if spent and max(spent) > worst * (1 + 2e-3) + 1e-9:
            yield f"privacy.worst_epsilon is {worst:.6g}, a round says {max(spent):.6g} was spent by then"

    _say("sums over rounds.jsonl", found(), wrong, held)


def _audit(report: Mapping[str, Any], folder: Path, wrong: list[str], held: list[str], open_: list[str]) -> None:
    if not (folder / "audit.json").is_file():
        return
    fresh, said = outcome.audit(folder), report["statement"]["audit"]
    if differs := [key for key, value in fresh.items() if key not in ("command", "reason") and said[key] != value]:
        wrong.append(f"audit: audit.json says otherwise of {', '.join(differs)}: `umbel report RUN` takes it over")
    else:
        held.append("audit.json")


def _ledger(report: Mapping[str, Any], _: Path, wrong: list[str], held: list[str], open_: list[str]) -> None:
    ledger = report["privacy"]["ledger"]
    if ledger["path"] is None:
        return
    place = Path(ledger["path"])
    if not place.is_file():
        open_.append(f"the ledger {place} is not there")
        return

    def found() -> Iterator[str]:
        try:
            known = Ledger(place, keep=True)
            if not known.holds(Head(ledger["sequence"], ledger["hash"])):
                yield f"{place} does not go on from the head that this report names"
                return
        except Refused as error:
            yield str(error)
            return
        stated, clients = report["statement"], report["privacy"]["clients"]
        unit, dataset = report["privacy"]["unit"], stated["identity"]["dataset"]
        spent = composition.histories(known, ledger["sequence"])
        charged = [(Account("example" if unit == "both" else unit, c["name"], dataset), c) for c in clients]
        charged += [(Account("client", c["name"], dataset), c["whole"]) for c in clients if c["whole"]]
        charged += [(Account("example", c["name"], dataset + TESTS), c["tests"]) for c in clients if c["tests"]]
        for account, said in charged:
            whose = f"{account.client} ({account.unit}, {account.dataset})"
            if account not in known.accounts and said["epsilon_total"] == 0 and not said.get("steps"):
                continue  # of a large fleet, and never charged
            if account not in known.accounts or said["epsilon_total"] is None:
                yield f"it has no account of client {whose}"
                continue
            standing = known.accounts[account]
            epsilon = accounting.epsilon(spent.get(account, {}), standing.delta)
            if not math.isclose(epsilon, said["epsilon_total"], rel_tol=1e-6, abs_tol=1e-9):
                yield f"client {whose} had spent {epsilon}, epsilon_total says {said['epsilon_total']}"
            if said["delta_total"] != standing.delta:
                yield f"client {whose}: delta_total is {said['delta_total']}, its account's {standing.delta}"
            if said["budget"] not in (None, standing.budget):  # an account may take its budget later
                yield f"client {whose}: budget is {said['budget']}, its account's {standing.budget}"
        beside = composition.beside(str(place), ledger["run"], ledger["sequence"])
        for name, told, found in (
            ("composition.earlier_runs", stated["composition"]["earlier_runs"], beside.other_runs),
            ("steps.lost_rounds", stated["steps"]["lost_rounds"], beside.lost_rounds),
        ):
            if told != found:
                yield f"statement.{name} is {told}, the ledger has {found}"

    _say("ledger", found(), wrong, held)


def _signature(
    report: Any, path: Path, content: bytes, wanted: str | None, wrong: list[str], held: list[str], open_: list[str]
) -> None:
    try:
        signed = signature.read(signature.beside(path))
    except Refused as error:
        wrong.append(f"signature: {error}")
        return
    if signed is None:
        if wanted is not None:
            wrong.append(f"signature: {signature.beside(path).name} is missing, and a signature was asked for")
        elif isinstance(report, dict) and (report.get("statement") or {}).get("reproduction", {}).get("signed_by"):
            wrong.append("signature: the report says that it is signed, report.json.sig is missing")
    elif wanted is not None and signed.public != wanted:
        wrong.append("signature: it is by another key than the one that was given")
    elif not signature.verified(content, signed):
        wrong.append("signature: it is not of these bytes")
    else:
        held.append("signature")
        if wanted is None:
            open_.append(f"whose key {signed.public} is: --verify-key PUB.pem demands that of the operator")
