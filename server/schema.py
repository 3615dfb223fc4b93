"""report.json's shape, as one model; docs/report.schema.json is made from it, and what is written is held to it."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from server.groups import Statement
from server.shape import Amount, Closed, Count, Sha256, Share

TITLE = "Umbel's report.json"


class Final(Closed):
    accuracy: Share | None
    loss: float | None
    worst_client_accuracy: Share | None
    evaluated_by: Literal["server", "clients"]
    reason: str | None


class Reference(Closed):
    central_accuracy: Share | None
    central_reason: str | None
    no_privacy_accuracy: Share | None
    no_privacy_reason: str | None


class Ledger(Closed):
    path: str | None
    run: str | None
    sequence: Count | None
    hash: Sha256 | None
    reason: str | None


class Account(Closed):
    epsilon: Amount
    epsilon_low: Amount | None
    epsilon_prv: Amount | None
    epsilon_rdp: Amount | None
    delta: Share
    epsilon_total: Amount | None
    delta_total: Share | None
    budget: Amount | None
    noise_multiplier: Amount
    sampling_rate: Share
    population: Count
    steps: Count


class Client(Account):
    name: str
    examples: Count
    rounds: Count
    whole: Account | None
    tests: Account | None


class RowsFile(Closed):
    file: Literal["clients.jsonl", "left_out.jsonl", "unevaluated.jsonl"]
    rows: Count
    bytes: Count
    sha256: Sha256


class Privacy(Closed):
    unit: str
    guarantee: bool
    why_not: str | None
    epsilon: Amount | None
    accountant: str | None
    adjacency: str | None
    against: str | None
    delta_rule: str | None
    clip: Amount | None
    update_clip: Amount | None
    ledger: Ledger
    clients: list[Client]
    clients_file: RowsFile | None = None  # an older Umbel does not say
    worst_epsilon: Amount | None
    median_epsilon: Amount | None
    worst_whole_epsilon: Amount | None
    worst_tests_epsilon: Amount | None
    not_covered: list[str]


class Protect(Closed):
    mode: Literal["none", "encrypted", "masked"]
    trust: Literal["split", "shared"] | None
    parameters: str | None
    security_bits: Count | None
    values: Count
    values_sent: Count
    bits: Count | None
    range: Amount | None
    rotated: bool | None
    norm: Amount | None
    max_clients: Count | None
    minimum: Count | None
    neighbours: Count | None
    threshold: Count | None
    quorum: Count | None
    upload_bytes_per_client: Count
    who_learns: list[str]


class Bytes(Closed):
    up: Count
    down: Count


class LeftOut(Closed):
    name: str
    reason: str
    times: Count


class Trained(Closed):
    way: str
    why: str
    precision: str
    times: Count


class Engine(Closed):
    name: str
    block: Count
    precision: str
    device: str
    threads: Count
    processes: Count
    trained: list[Trained]


class Fleet(Closed):
    profile: str
    clients: Count
    deadline: float
    simulated_seconds: float | None
    left_out: list[LeftOut]
    left_out_file: RowsFile | None = None  # an older Umbel does not say
    unevaluated: list[LeftOut]
    unevaluated_file: RowsFile | None = None
    runtime: str
    engine: Engine


class Variant(Closed):
    name: str
    file: str | None
    bytes: Count | None
    latency_us: float | None
    load_ms: float | None
    accuracy: Share | None
    validation_accuracy: Share | None
    max_abs_diff: float | None
    macs: Count | None
    chosen: bool
    reason: str


class Edge(Closed):
    accuracy: Share | None
    recovery: str
    rule: str
    variants: list[Variant]


class Seconds(Closed):
    rounds: float
    references: float
    export: float
    total: float
    evaluation: float | None = None  # an older Umbel does not say


class Report(Closed):
    """What a run came to. Every key is explained in docs/runs.md; those of `statement` in docs/report.md."""

    schema_: Literal[1] = Field(alias="schema")
    umbel_version: str
    status: str
    scenario: str
    summary: str
    model: str
    seed: int
    rounds: Count
    parameters: Count
    final: Final
    reference: Reference
    privacy: Privacy
    protect: Protect
    bytes: Bytes
    fleet: Fleet
    edge: Edge
    versions: dict[str, str]
    settings: dict[str, Any]
    changed: dict[str, Any]
    seeds: str
    seconds: Seconds
    statement: Statement
    digest: Sha256 = Field(description="SHA-256 over this report's canonical JSON without `digest`")


def document() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of report.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema(), "title": TITLE}


def faults(report: object) -> list[str]:
    """What keeps `report` from being such a report, one line each; empty if nothing does."""
    try:
        Report.model_validate(report)
    except ValidationError as error:
        return [f"{'.'.join(map(str, one['loc'])) or 'report'}: {one['msg']}" for one in error.errors()]
    return []
