"""The figures of a report held against one another: epsilons recomputed, what is made of other figures made again."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clients import upload
from clients.steps import local_steps
from privacy import accounting, certificate, dp_sgd
from privacy.noise_shares import Shares
from scenarios.settings import Local, Settings
from server import copies, gather, guarantee, select
from server.guarantee import mechanism
from server.hazards import hazards

Report = Mapping[str, Any]
_CLOSE = 1e-6
_KINDS = ("full", "Poisson", "fixed size", "by turns")


def errors(report: Report) -> Iterator[str]:
    """Lines about figures that do not follow, for a report that fits the schema."""
    if impossible := list(_impossible(report)):
        yield from impossible
        return
    yield from _summary(report)
    yield from copies.errors(report)
    yield from _plan(report)
    yield from _protected(report)
    yield from _derived(report)
    yield from _accounts(report)  # last: it takes seconds where steps are over samples


def _impossible(report: Report) -> Iterator[str]:
    """Figures that no accountant could be asked about."""
    chance = report["statement"]["delta"]["chance"] or 0.0
    if chance and report["privacy"]["unit"] not in ("client", "both"):
        yield f"statement.delta.chance is {chance}, but no client is drawn in secret"
    for name, one, drawn in _each_account(report):
        if not 0 < one["delta"] - (chance if drawn else 0.0) < 1:
            yield f"client {name}: of delta {one['delta']} a chance of {chance} leaves none for the steps"
        if not (one["sampling_rate"] > 0 and one["noise_multiplier"] > 0):
            yield f"client {name}: sampling_rate and noise_multiplier must be above 0"
        elif one["population"] and not (one["sampling_rate"] < 1 and one["population"] > 1):
            yield f"client {name}: a fixed size cannot be {one['sampling_rate']} of {one['population']}"


def _accounts(report: Report) -> Iterator[str]:
    """Each client's epsilons from its noise, rate, steps and delta, by the accountants that signed for them."""
    privacy, stated = report["privacy"], report["statement"]
    clients, kind = privacy["clients"], stated["sampling"]["kind"] or ""
    if len({client["name"] for client in clients}) < len(clients):
        yield "privacy.clients names a client twice"
    if clients and not kind.startswith(_KINDS):
        yield f"statement.sampling.kind {kind!r} is none of {', '.join(_KINDS)}"
    chance = stated["delta"]["chance"] or 0.0
    same = report["versions"].get("dp-accounting") == stated["epsilon"]["accountant_version"]
    kept = _each_account(report)
    asked = [({mechanism(one): one["steps"]}, one["delta"] - (chance if drawn else 0.0)) for _, one, drawn in kept]
    for (name, one, _), history, certified in zip(kept, asked, certificate.certify_all(asked), strict=True):
        found = {
            "epsilon": certified.epsilon,
            "epsilon_low": certified.low,
            "epsilon_prv": certified.prv,
            "epsilon_rdp": dp_sgd.epsilon_rdp(*history),
        }
        for key, value in found.items():
            if not _same(one[key], value, 1e-5 if same else 2e-3):
                yield f"client {name}: {key} is {one[key]}, its steps give {value}"
        total, delta = one["epsilon_total"], one["delta_total"]
        alike = total is not None and delta is not None and delta <= history[1] * (1 + _CLOSE)
        if alike and total < one["epsilon"] * (1 - 2e-3):
            yield f"client {name}: epsilon_total {total} is less than this run's {one['epsilon']}"
    for client in clients:
        if client["rounds"] > stated["steps"]["rounds"] or client["rounds"] > client["steps"]:
            yield f"client {client['name']}: {client['rounds']} rounds are more than its steps or the run's rounds"


def _each_account(report: Report) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(whose, the account's figures, whether a draw that falls short is part of its delta), in the order of a run."""
    clients, by_client = report["privacy"]["clients"], report["privacy"]["unit"] == "client"
    found = [(client["name"], client, by_client) for client in clients]
    found += [(f"{client['name']} as a whole", client["whole"], True) for client in clients if client["whole"]]
    found += [(f"{client['name']}'s tests", client["tests"], False) for client in clients if client["tests"]]
    return found


def _summary(report: Report) -> Iterator[str]:
    privacy = report["privacy"]
    epsilons = [client["epsilon"] for client in privacy["clients"]]
    for key, value in (
        ("worst_epsilon", max(epsilons, default=None)),
        ("median_epsilon", statistics.median(epsilons) if epsilons else None),
        ("worst_whole_epsilon", _most(privacy["clients"], "whole")),
        ("worst_tests_epsilon", _most(privacy["clients"], "tests")),
    ):
        if not _same(privacy[key], value):
            yield f"privacy.{key} is {privacy[key]}, the clients give {value}"
    if privacy["guarantee"] == (privacy["why_not"] is not None):
        yield "privacy.guarantee and privacy.why_not contradict each other"
    if privacy["guarantee"]:
        if privacy["worst_epsilon"] is None:
            yield "privacy.guarantee is true without any account"
        for client in privacy["clients"]:
            if client["epsilon_low"] is not None and client["epsilon"] < client["epsilon_low"]:
                yield f"client {client['name']}: epsilon is below what Opacus' PRV proves, yet guarantee is true"
    seconds = report["seconds"]
    if not _same(seconds["total"], seconds["rounds"] + seconds["references"] + seconds["export"]):
        yield "seconds.total is not the sum of the others"
    if (seconds.get("evaluation") or 0) > seconds["total"]:
        yield "seconds.evaluation is more than seconds.total, of which it is a part"


def _most(clients: Sequence[Mapping[str, Any]], account: str) -> float | None:
    return max((client[account]["epsilon"] for client in clients if client[account]), default=None)


def _plan(report: Report) -> Iterator[str]:
    """What was planned covers what was done."""
    stated, clients = report["statement"], report["privacy"]["clients"]
    planned, words, filtered = stated["steps"]["planned"], stated["mechanism"], stated["composition"]["adaptive"]
    worst = guarantee.costliest(clients)
    if worst is None or planned is None:
        return
    if most := _planned(report):
        yield from _compared("statement.steps.planned", planned, guarantee.spread(most))
    if max(client["steps"] for client in clients) > planned["most"]:
        yield f"a client took more steps than the most that were planned, {planned['most']:g}"
    if report["privacy"]["unit"] in ("example", "both"):
        yield from _by_examples(report)
    for key, value in (
        ("noise_multiplier", worst["noise_multiplier"]),
        ("sampling_rate", worst["sampling_rate"]),
        ("population", worst["population"]),
        ("delta", worst["delta"]),
        ("budget", report["privacy"]["epsilon"]),
    ):
        if not _same(filtered[key], value):
            yield f"statement.composition.adaptive.{key} is {filtered[key]}, the costliest client has {value}"
    if filtered["steps"] is not None and not worst["steps"] <= filtered["steps"] <= planned["most"]:
        yield f"statement.composition.adaptive.steps is {filtered['steps']}, planned were {planned['most']:g} at most"
    reach = 2.0 if report["privacy"]["unit"] == "local" else 1.0
    if report["privacy"]["unit"] == "client" and report["protect"]["norm"] is not None:
        reach = report["protect"]["norm"] / report["privacy"]["clip"]
    if words["noise_std"] is not None and words["noise_multiplier"] is not None:
        for key, value in words["noise_multiplier"].items():
            if not _same(words["noise_std"][key], value * words["clip"] * reach):
                yield f"statement.mechanism.noise_std.{key} is not the noise multiplier times the sensitivity"


def _protected(report: Report) -> Iterator[str]:
    """The grid, the bytes and who learns what, from the settings, the norm at the end, the values and the clients."""
    said, clients, tree = report["protect"], report["privacy"]["clients"], dict[str, Any]()
    for name, value in report["settings"].items():
        section, dot, last = name.rpartition(".")
        (tree.setdefault(section, {}) if dot else tree)[last] = value
    try:
        settings = Settings.model_validate(tree)
        clip = report["privacy"]["update_clip" if settings.privacy.unit == "both" else "clip"]
        clip, noise = clip or settings.privacy.update_norm, 0.0
        if settings.privacy.unit == "local":
            noise = max(client["noise_multiplier"] for client in clients)
            clip = settings.privacy.clip
        by_update = settings.privacy.by_client or settings.privacy.unit == "local"
        shares = None
        if settings.privacy.by_shares:
            multiplier = max(client["noise_multiplier"] for client in clients)
            shares = Shares(multiplier, select.honest(len(clients), settings))
        grid = upload.grid(settings, said["values"], 1, clip if by_update else 0.0, noise, shares)
        fleet = report["fleet"]
        found = gather.told(settings, said["values"], grid, fleet["clients"], fleet["runtime"])
    except ValueError as error:  # of pydantic, of a grid that cannot be
        yield f"protect cannot follow from the settings: {str(error).splitlines()[0]}"
        return
    if said["values"] < report["parameters"]:
        yield f"protect.values is {said['values']}, fewer than the {report['parameters']} parameters"
    for key, value in found.items():
        if said[key] != value and not (isinstance(value, float) and said[key] and _same(said[key], value)):
            yield f"protect.{key} is {said[key]!r}, from the settings it is {value!r}"


def _planned(report: Report) -> list[int]:
    """The most steps of each client, from the settings; empty for a unit that this check does not know."""
    settings, clients = report["settings"], report["privacy"]["clients"]
    total = settings["rounds.number"] + settings["export.recover_rounds"]
    if report["privacy"]["unit"] in ("client", "local"):
        return [math.ceil(total / settings["privacy.bands"])] * len(clients)
    local = Local(**{name.removeprefix("local."): v for name, v in settings.items() if name.startswith("local.")})
    if report["privacy"]["unit"] in ("example", "both"):
        return [total * local_steps(local, client["examples"], True) for client in clients]
    return []


def _by_examples(report: Report) -> Iterator[str]:
    """privacy.unit=example and both: each client's delta and sampling rate come from its number of examples."""
    settings = report["settings"]
    for client in report["privacy"]["clients"]:
        n, batch = client["examples"], settings["local.batch"]
        delta = settings["privacy.delta"] or accounting.default_delta(n)
        if not _same(client["delta"], delta):
            yield f"client {client['name']}: delta is {client['delta']}, {n} examples give {delta}"
        if not _same(client["sampling_rate"], min(1.0, batch / n) if batch else 1.0):
            yield f"client {client['name']}: sampling_rate is {client['sampling_rate']}, it has {n} examples"


def _derived(report: Report) -> Iterator[str]:
    stated = report["statement"]
    for name, fields in guarantee.derived(report).items():
        for key, value in fields.items():
            yield from _compared(f"statement.{name}.{key}", stated[name][key], value)
    yield from _compared("statement.interpretation.hazards", stated["interpretation"]["hazards"], hazards(report))
    for name in ("epsilon", "steps"):
        found = stated[name]["histogram"]
        if found is not None and sum(found["counts"]) != len(report["privacy"]["clients"]):
            yield f"statement.{name}.histogram does not count every client once"
    points = stated["epsilon"]["curve"] or []
    if any(b["epsilon"] <= a["epsilon"] or b["delta"] >= a["delta"] for a, b in zip(points, points[1:], strict=False)):
        yield "statement.epsilon.curve does not fall"


def _compared(where: str, here: Any, made: Any) -> Iterator[str]:
    """Every leaf of `made` stands `here` as well; what is only here (a reason) is not looked at."""
    if isinstance(made, Mapping) and isinstance(here, Mapping):
        for key, value in made.items():
            yield from _compared(f"{where}.{key}", here.get(key), value)
    elif isinstance(made, list) and isinstance(here, list) and len(made) == len(here):
        for number, (one, other) in enumerate(zip(here, made, strict=True)):
            yield from _compared(f"{where}.{number}", one, other)
    elif not _same(here, made, 1e-5):
        yield f"{where} is {here}, it follows {made}"


def _same(here: Any, there: Any, close: float = _CLOSE) -> bool:
    if isinstance(here, bool) or isinstance(there, bool) or not (_number(here) and _number(there)):
        return bool(here == there)
    return here == there or math.isclose(here, there, rel_tol=close, abs_tol=1e-12)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)
