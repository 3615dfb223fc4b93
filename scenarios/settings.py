"""Every knob of a run as small frozen models, and the one string that overrides them."""

import difflib
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privacy.refused import Refused


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Run(Section):
    """What `umbel run` also takes as flags."""

    seed: int = Field(0, ge=0, description="seed of split, partition, initialization, cohorts (never of privacy noise)")
    data: str = Field("", description="folder of data sets that are not bundled; empty: UMBEL_DATA")
    out: str = Field("", description="run folder; empty: runs/SCENARIO-TIME")
    state: str = Field("", description="folder of the privacy ledgers; empty: UMBEL_STATE, else the platform's own")
    resume: bool = Field(False, description="go on with the run in run.out instead of starting one")
    processes: int = Field(
        0, ge=0, description="local.engine=cohort: processes that train blocks (on Ray: workers); 0: one a core"
    )


class Rounds(Section):
    number: int = Field(10, ge=1, description="federated rounds")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the fleet that is asked each round")
    minimum: int = Field(
        1, ge=0, description="fewest good replies (privacy.unit=client: drawn clients) with which a round is applied"
    )
    average: int = Field(
        1, ge=1, description="how many last rounds are averaged into the final weights (all, where there are fewer)"
    )


class Local(Section):
    epochs: int = Field(1, ge=1, description="passes over a client's data a round")
    steps: int = Field(0, ge=0, description="local steps a round; 0: as many as local.epochs takes")
    batch: int = Field(32, ge=0, description="examples a local step (expected, under DP); 0: all of a client's data")
    rate: float = Field(0.1, gt=0, description="learning rate of local SGD")
    decay: float = Field(0.0, ge=0, lt=1, description="share of local.rate that is lost, linearly, by the last round")
    momentum: float = Field(
        0.0, ge=0, lt=1, description="momentum of local SGD, from rest in every round (acts after DP noise)"
    )
    proximal: float = Field(0.0, ge=0, description="FedProx: pull towards the round's weights (acts after DP noise)")
    weight_decay: float = Field(0.0, ge=0, description="pull towards zero, L2 (acts after DP noise)")
    scaffold: bool = Field(False, description="SCAFFOLD: correct every step by control variates (acts after DP noise)")
    engine: Literal["single", "cohort"] = Field(
        "single",
        description="single: clients one by one, the same bits on every runtime; cohort: blocks of them at once",
    )
    fallback: Literal["single", "fused", "none"] = Field(
        "single",
        description="cohort: how far clients may fall back that share no pass; fused: one after another by one model; "
        "single: one by one; none: not at all. What is further is refused before round 1",
    )
    block: int = Field(0, ge=0, description="cohort: clients of a block; 0: at most 25, in blocks of even number")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="embedded: where clients are trained and weights evaluated; cuda is an NVIDIA GPU"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="cohort: of matrix products and convolutions; bf16 needs a processor that has it"
    )


class Server(Section):
    step: str = Field("sgd", description="server optimizer: sgd, momentum, adam, yogi, adagrad")
    combine: str = Field("mean", description="mean, median, trimmed, krum, multikrum")
    weighting: Literal["examples", "uniform"] = Field(
        "examples", description="what a client's update weighs in the mean; under privacy.unit=client always uniform"
    )
    normalize: bool = Field(False, description="FedNova: every update counts by its steps' mean, whatever their number")
    rate: float | None = Field(None, gt=0, description="server learning rate; unset: the step's own default")
    beta1: float | None = Field(None, ge=0, lt=1, description="first moment's decay; unset: the step's own default")
    beta2: float | None = Field(None, ge=0, lt=1, description="second moment's decay; unset: the step's own default")
    tau: float | None = Field(None, gt=0, description="degree of adaptivity; unset: the step's own default")
    trim: float = Field(0.1, ge=0, lt=0.5, description="trimmed: share of values cut off at each end")
    byzantine: int = Field(1, ge=0, description="krum, multikrum: how many clients may lie")


class Privacy(Section):
    unit: Literal["none", "example", "client", "both", "local"] = Field(
        "none",
        description="what one change of the data is: none, example, client (noised by the server), both, "
        "local (a client, noised by itself)",
    )
    epsilon: float = Field(8.0, gt=0, description="budget of every client over the whole run, recovery included")
    client_epsilon: float | None = Field(
        None, gt=0, description="both: the budget of a client as a whole; unset: privacy.epsilon, as for its examples"
    )
    budget: float | None = Field(
        None, gt=0, description="epsilon of every client over all runs on the same data; unset: recorded, never refused"
    )
    window_days: float | None = Field(None, gt=0, description="days of a window of time; needs privacy.window_epsilon")
    window_epsilon: float | None = Field(
        None, gt=0, description="epsilon of every client in any privacy.window_days days, beside the total budget"
    )
    delta: float | None = Field(None, gt=0, lt=1, description="unset: 1 / (10 x the client's examples), or clients")
    clip: float = Field(1.0, gt=0, description="clipping norm of one example's gradient, or of a client's update")
    update_clip: float = Field(1.0, gt=0, description="both: clipping norm of a client's update")
    adapt: bool = Field(False, description="client: move the norm towards a quantile of the updates' lengths, under DP")
    quantile: float = Field(0.5, gt=0, lt=1, description="adapt: share of updates that are to be within the norm")
    adapt_rate: float = Field(0.2, gt=0, le=1, description="adapt: step of the norm's logarithm")
    sampling: Literal["poisson", "fixed"] = Field(
        "poisson", description="client: cohorts by a coin for each client, or of a fixed size (replace-one adjacency)"
    )
    bands: int = Field(
        1,
        ge=1,
        description="client: over 1 the noise of that many rounds is correlated, and a client joins one in them",
    )
    noise: Literal["server", "shares"] = Field(
        "server",
        description="client: noise of the server on the sum (of the key holder, if encrypted), or a share of each "
        "client on its own integers",
    )
    colluding: int = Field(
        1, ge=0, description="shares: clients in a sum that may pool what they know; the others' noise suffices"
    )
    max_noise: float = Field(100.0, gt=0, description="largest noise multiplier; more is refused")
    noise_seed: int | None = Field(None, ge=0, description="reproducible noise, for tests and replays: no guarantee")

    @property
    def by_example(self) -> bool:
        """Whether the clients clip and noise the gradients of single examples."""
        return self.unit in ("example", "both")

    @property
    def by_client(self) -> bool:
        """Whether whole updates are clipped and their sum is noised."""
        return self.unit in ("client", "both")

    @property
    def by_shares(self) -> bool:
        """Whether the clients, not the server, noise that sum."""
        return self.unit == "client" and self.noise == "shares"

    @property
    def update_norm(self) -> float:
        """Clipping norm of a client's update where `by_client` holds."""
        return self.update_clip if self.unit == "both" else self.clip


class Protect(Section):
    mode: Literal["none", "encrypted", "masked"] = Field(
        "none",
        description="how updates are hidden from the server, which learns their sum: none; masked, by pads of the "
        "clients that cancel; encrypted, under a key that it has not. Also written protect=MODE",
    )
    trust: Literal["split", "shared"] = Field(
        "split",
        description="encrypted: who can open a sum: a key holder apart from the server, or the clients, who then add "
        "the noise of privacy.unit=client themselves (privacy.noise=shares)",
    )
    bits: int = Field(16, ge=2, le=24, description="of one quantized value (protect=none: codec=intN says it)")
    range: float | None = Field(
        None, gt=0, description="a quantized value is clamped to +-range; unset: made from the clipping norm, else 1"
    )
    minimum: int | None = Field(
        None, ge=3, description="fewest clients in a sum that is opened; unset: the larger of 3 and half the cohort"
    )
    max_clients: int = Field(100, ge=1, description="most clients in a sum of integers: none of so many carries")


class Fleet(Section):
    clients: int = Field(20, ge=1, description="clients of a simulated federation")
    profile: str = Field("equal", description="equal, edge, or a TOML file: what the devices can do")
    deadline: float = Field(0.0, ge=0, description="seconds a round may take on the fleet's clock; 0: no deadline")
    clock: Literal["simulated", "wall"] = Field(
        "simulated", description="simulated: devices are drawn from the profile; wall: devices measure themselves"
    )
    wait: float = Field(120.0, gt=0, description="seconds to wait for nodes or a reply where no deadline is set")


class Evaluation(Section):
    on: Literal["server", "clients"] = Field("server", description="who holds the test data")
    every: int = Field(1, ge=1, description="evaluate after every so many rounds, and at the end")
    fraction: float = Field(
        1.0, gt=0, le=1, description="clients: share of the fleet that is asked, drawn anew each time"
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        description="clients: budget of a client's test examples, whose counts are noised; unset: as they are",
    )


class Export(Section):
    recover_rounds: int = Field(0, ge=0, description="federated rounds after pruning, under the same account")
    prune: float = Field(0.5, ge=0, lt=1, description="share of hidden channels that pruning removes; 0: no pruning")
    tolerance: float = Field(0.02, ge=0, le=1, description="validation accuracy an edge model may lose against fp32")


class Reference(Section):
    central_epochs: int = Field(0, ge=0, description="epochs of the central reference without privacy; 0: skipped")
    central_batch: int = Field(32, ge=1, description="its batch")
    central_rate: float = Field(0.1, gt=0, description="its learning rate")
    no_privacy: bool = Field(True, description="also run the same federation without privacy")
    no_privacy_set: str = Field("", description="settings of that run alone, for example its own local.rate")


class Report(Section):
    curator: str = Field("", description="who answers for the data; stands in the report's statement")
    intended_use: str = Field("", description="what the model is for; stands in the report's statement")
    product: str = Field("", description="what the model becomes part of; stands in the report's statement")
    key: str = Field("", description="PEM file of the Ed25519 key that signs the report; empty: UMBEL_KEY, else none")


class Faults(Section):
    dropout: float = Field(
        0.0, ge=0, lt=1, description="for trials: chance that a client that was asked to train never answers, by seed"
    )


class Settings(Section):
    """All settings of a run. A scenario is born with its own values; `override` changes them by name."""

    model: str = Field("", description="which of the scenario's models; empty: its first")
    partition: str = Field("iid", description="iid, dirichlet:ALPHA, shards:NUMBER, natural")
    codec: str = Field(
        "float32",
        description="how updates travel: float32, float16, topk:SHARE, shared-topk:SHARE[:CODEC], qsgd8, intN",
    )
    run: Run = Run()
    rounds: Rounds = Rounds()
    local: Local = Local()
    server: Server = Server()
    privacy: Privacy = Privacy()
    protect: Protect = Protect()
    faults: Faults = Faults()
    fleet: Fleet = Fleet()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    reference: Reference = Reference()
    report: Report = Report()

    @property
    def evaluations(self) -> int:
        """How often a client's test examples are asked at most: every so many rounds, and once at the end."""
        return (self.rounds.number + self.export.recover_rounds) // self.evaluation.every + 1

    @property
    def hides_tests(self) -> bool:
        """Whether a client says what its test examples make of the model in a protected sum alone, without noise."""
        return self.protect.mode != "none" and self.evaluation.epsilon is None

    @property
    def sums_tests(self) -> bool:
        """Whether the run's test results are such sums."""
        return self.hides_tests and self.evaluation.on == "clients"


def knobs(settings: Section, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting as (dotted name, value, one-line meaning), in the order of this file."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Section):
            yield from knobs(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, field.description or ""


def override(settings: Settings, text: str) -> Settings:
    """`settings` with the values named in `text`, as in "rounds.number=5 privacy.epsilon=3".

    An empty value (`server.rate=`) unsets a setting that may be unset. A section that has a mode takes it by its own
    name: `protect=masked` is `protect.mode=masked`.
    Raises Refused for a name that does not exist (with the nearest one that does) or a value that does not fit.
    """
    values = {name: value for name, value, _ in knobs(settings)}
    tree = settings.model_dump()
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Refused(
            f"settings {text!r} cannot be read ({error}): write name=value pairs with blanks between"
        ) from None
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise Refused(f"setting {word!r} has no value: write {word}=VALUE")
        if f"{name}.mode" in values:
            name = f"{name}.mode"
        if name not in values:
            near = difflib.get_close_matches(name, values, 1, 0.0)[0]
            raise Refused(f"there is no setting {name!r}: the nearest is {near!r}; `umbel settings SCENARIO` lists all")
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[last] = value if value != "" or isinstance(values[name], str) else None
    return _validated(tree, text)


def _validated(tree: dict[str, Any], source: str) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        given = " ".join(str(first["input"]).split())  # one line, whatever came
        raise Refused(f"setting {name}={given} (in {source!r}): {first['msg']}") from None


def to_toml(settings: Settings, scenario: str) -> str:
    """The settings as TOML text with their meanings as comments; unset values are left out, as TOML has no null."""
    lines, section = [f"scenario = {_toml(scenario)}"], ""
    for name, value, meaning in knobs(settings):
        head, _, last = name.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{head}]"]
        lines.append(f"{last} = {_toml(value)}  # {meaning}" if value is not None else f"# {last} is unset: {meaning}")
    return "\n".join(lines) + "\n"


def from_toml(path: Path) -> tuple[str, Settings]:
    """(scenario, settings) of a file that `to_toml` wrote. Raises Refused when it cannot be read."""
    try:
        tree = tomllib.loads(path.read_text())
        scenario = str(tree.pop("scenario"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError) as error:
        raise Refused(f"{path} is no settings file of a run ({type(error).__name__}): is this a run folder?") from None
    return scenario, _validated(tree, str(path))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text) + '"'
    return repr(value)
