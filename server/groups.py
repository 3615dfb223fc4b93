"""The privacy statement's shape: seventeen groups, every field with its meaning, none empty without a reason."""

from typing import Any, Literal

from pydantic import Field, model_validator

from server.shape import Amount, Closed, Count, Group, Head, Histogram, Sha256, Share, Spread, meaning


class Identity(Group):
    report: str = meaning("id of this report, a random UUID")
    run: str | None = meaning("the run's name in the ledger")
    run_reason: str | None = None
    dataset: str = meaning("the declared name of the data, to which spending is charged")
    data_digest: Sha256 | None = meaning("SHA-256 over the clients' names and keyed digests of their data")
    versions: dict[str, str] = meaning("versions of Python and the packages that matter")
    git_commit: str | None = meaning("commit of the program; ends in -changed where files differed from it")
    git_commit_reason: str | None = None
    settings_digest: Sha256 = meaning("SHA-256 over the canonical JSON of `settings`")
    ledger: Head | None = meaning("the ledger's head: its records and the digest of the last")
    ledger_reason: str | None = None
    date: str = meaning("when it was written, UTC")
    curator: str | None = meaning("who answers for the data: `report.curator`")
    curator_reason: str | None = None
    intended_use: str | None = meaning("what the model is for: `report.intended_use`")
    intended_use_reason: str | None = None
    product: str | None = meaning("what it becomes part of: `report.product`")
    product_reason: str | None = None


class Unit(Group):
    unit: str = meaning("`privacy.unit`")
    means: str | None = meaning("what one unit is, in words")
    bound: str | None = meaning("how much of the data one unit may be")
    enforced: str | None = meaning("what keeps one unit's influence within that")


class Adjacency(Group):
    relation: str | None = meaning("which two data sets the promise compares")
    public: list[str] = meaning("what the promise takes as known to everyone")


class Party(Closed):
    party: Literal["client", "server", "aggregator", "key holder", "other clients", "report reader"] = meaning("who")
    sees: str = meaning("what reaches it")
    before_noise: bool = meaning("whether it sees other people's contributions before noise is added")


class Trust(Group):
    parties: list[Party] = meaning("who sees what")
    adversary: str = meaning("honest-but-curious or malicious: what is assumed of each")
    participation_secret: bool = meaning("whether the guarantee rests on nobody knowing who took part")


class Outputs(Group):
    covered: list[str] = meaning("what the guarantee speaks about")


class Mechanism(Group):
    family: str | None = meaning("the mechanism")
    noise_multiplier: Spread | None = meaning("noise in units of the clipping norm, over clients")
    noise_std: Spread | None = meaning(
        "the same times the norm of what is summed: the clipping norm, or that after rounding"
    )
    noise_std_reason: str | None = None
    clip: Amount | None = meaning("clipping norm at the start")
    clip_at_end: Amount | None = meaning("clipping norm where the run left it")
    clip_schedule: str | None = meaning("fixed, or how it moves")
    votes_std: Amount | None = meaning("adaptive clipping: noise on the sum of votes")
    votes_std_reason: str | None = None
    clip_scope: str | None = meaning("the vector that is clipped")
    weighting: str | None = meaning("what each contribution weighs")
    denominator: str | None = meaning("what the noised sum is divided by")
    dropout: str | None = meaning("what a contribution that is missing changes")
    generator: str | None = meaning("where the noise comes from")
    seeded: bool | None = meaning("whether the noise can be made again from a seed")
    precision: str | None = meaning("arithmetic of sum and noise")


class Sampling(Group):
    kind: str | None = meaning("full, Poisson, fixed size or by turns")
    rate: Spread | None = meaning("chance of a unit to be in a step, over clients")
    planned_cohort: Amount | None = meaning("clients drawn a round, expected")
    actual_cohort: Spread | None = meaning("clients drawn a round, as it happened")
    actual_cohort_reason: str | None = None
    empty_batches: str | None = meaning("what a draw of nobody does")
    truncated_batches: str | None = meaning("what a draw that is too large does")
    as_assumed: bool | None = meaning("whether the code samples as the proof of amplification assumes")
    assumption: str | None = meaning("that assumption, and how it is met")


class Steps(Group):
    planned: Spread | None = meaning(
        "most steps (rounds, where the client is the unit) that a client's budget pays for"
    )
    actual: Spread | None = meaning("steps that may have been released, over clients")
    histogram: Histogram | None = meaning("clients by actual steps")
    rounds: Count = meaning("committed rounds, recovery included")
    lost_rounds: Count | None = meaning("rounds reserved of which nothing was committed; they count as spent")
    lost_rounds_reason: str | None = None


class Delta(Group):
    values: Spread | None = meaning("delta over clients")
    rule: str | None = meaning("where it comes from")
    chance: Amount | None = meaning(
        "part of it that covers draws below `rounds.minimum`; the steps are accounted at the rest"
    )
    below_one_over_n: bool | None = meaning("whether every delta is below 1 / n of its units")


class Point(Closed):
    epsilon: Amount = meaning("rising")
    delta: Share = meaning("falling")


class Adversaries(Group):
    """Epsilon against each; null where there is no bound."""

    report_reader: Amount | None = meaning("whoever reads the model, the report and the published files")
    report_reader_reason: str | None = None
    other_client: Amount | None = meaning("another client, which also sees each round's weights")
    other_client_reason: str | None = None
    server: Amount | None = meaning("the server, which also sees what each client sends")
    server_reason: str | None = None


class Epsilon(Group):
    headline: Amount | None = meaning("the claim: PLD upper bound of the costliest client")
    accountant: str | None = meaning("how it was computed")
    accountant_version: str | None = meaning("of dp-accounting")
    interval: Amount | None = meaning("discretisation of privacy losses")
    prv_low: Amount | None = meaning("that client by Opacus' PRV accountant: at least this was spent")
    prv_low_reason: str | None = None
    prv_high: Amount | None = meaning("the same: at most this")
    prv_high_reason: str | None = None
    rdp: Amount | None = meaning("the most of any client by Opacus' Renyi accountant")
    rdp_reason: str | None = None
    zcdp_rho: Amount | None = meaning("rho of zCDP, where every step is a Gaussian over all units")
    zcdp_rho_reason: str | None = None
    gdp_mu: Amount | None = meaning("mu of Gaussian DP, there as well")
    gdp_mu_reason: str | None = None
    clients: Spread | None = meaning("epsilon over clients")
    histogram: Histogram | None = meaning("clients by epsilon")
    curve: list[Point] | None = meaning("delta(epsilon) of the costliest client, an upper bound at every point")
    curve_accountant: str | None = meaning("how the curve was computed")
    whole: Spread | None = meaning(
        "`both`: of clients as a whole; holds against readers and other clients, unless `adversaries` says otherwise, "
        "and not against the server"
    )
    whole_reason: str | None = None
    tests: Spread | None = meaning("`evaluation.epsilon`: of the clients' test examples; holds against everyone")
    tests_reason: str | None = None
    adversaries: Adversaries = meaning("epsilon against each adversary")


class Refusal(Closed):
    name: str = meaning("the client")
    reason: str = meaning("budget (of this run) or ledger (of all runs)")
    times: Count = meaning("in how many rounds")


class Adaptive(Group):
    """What may be claimed where steps or the end were chosen by released values."""

    epsilon: Amount | None = meaning("by a Renyi filter over all planned steps of the costliest client")
    delta: Share | None = meaning("at this delta")
    order: Count | None = meaning("its one order, fixed by budget and delta alone")
    budget: Amount | None = meaning("the budget that fixed the order")
    divergence: Amount | None = meaning("the divergence at that order that no choice can pass")
    noise_multiplier: Amount | None = meaning("of each step")
    sampling_rate: Share | None = meaning("of each step")
    population: Count | None = meaning("of each step: 0, or the clients that cohorts of a fixed size are drawn from")
    steps: Count | None = meaning("most steps")
    claim: str | None = meaning("when this figure is the one to use")


class Composition(Group):
    this_run: Amount | None = meaning("the costliest client in this run")
    earlier_runs: Count | None = meaning("other runs charged to the same accounts before this report")
    earlier_runs_reason: str | None = None
    epsilon_total: Amount | None = meaning("the costliest client over all of them")
    epsilon_total_reason: str | None = None
    budget: Amount | None = meaning("`privacy.budget`, for the ledger's life")
    budget_reason: str | None = None
    left: Amount | None = meaning("the least that any client has left of it")
    left_reason: str | None = None
    refused: list[Refusal] = meaning("who was refused a round by its budget")
    refused_reason: str | None = None
    evaluation: str = meaning("what evaluation cost")
    search: str = meaning("what choosing settings cost")
    adaptive: Adaptive = meaning("the figure that survives adaptive choices")


class NotCovered(Group):
    items: list[str] = meaning("what the guarantee does not speak about", ...)

    @model_validator(mode="after")
    def _some(self) -> "NotCovered":
        if not self.items:
            raise ValueError("there is always something that is not covered")
        return self


class File(Closed):
    file: str = meaning("relative to the run folder")
    sha256: Sha256 = meaning("its digest")
    bytes: Count = meaning("its size")
    inherits: bool = meaning("whether the guarantee holds for it")
    why: str = meaning("why it does, or does not")


class PostProcessing(Group):
    files: list[File] = meaning("exported files with their digests")
    files_reason: str | None = None
    touched_private_data: bool = meaning(
        "whether pruning, calibration or choice read data of clients outside the account"
    )
    validation_part: str = meaning("what the server's validation part was used for, and what that means")
    recovery: str = meaning("what was done after pruning")


class Scores(Closed):
    edges: list[float] = meaning("scores, one more than there are bins")
    in_: list[Count] = Field(alias="in", description="canaries that took part, by bin")
    out: list[Count] = meaning("canaries that did not, by bin")


class Audit(Group):
    claimed_epsilon: float | None = meaning("what the audited mechanism claims")
    estimate: float | None = meaning("the audit's estimate of epsilon; no bound")
    lower_bound: float | None = meaning("what it proves was spent at least, at `confidence`")
    confidence: Share | None = meaning("of the lower bound")
    verdict: str | None = meaning("pass or fail")
    canaries: Count | None = meaning("how many were planted")
    seed: int | None = meaning("of the audit")
    method: str | None = meaning("how it was done")
    histogram: Scores | None = meaning("canaries by score: those that were in, those that were out")
    membership: dict[str, Any] | None = meaning("membership inference, where it was tried")
    inversion: dict[str, Any] | None = meaning("gradient inversion, where it was tried")
    command: str = meaning("what audits this run")


class Utility(Group):
    accuracy: Share | None = meaning("of the final weights")
    without_privacy: Share | None = meaning("the same federation without privacy")
    without_privacy_reason: str | None = None
    central: Share | None = meaning("the same model on all data in one place")
    central_reason: str | None = None
    worst_client: Share | None = meaning("the worst client")
    worst_client_reason: str | None = None
    subgroup_gap: float | None = meaning("between the best and the worst subgroup")
    subgroup_gap_reason: str | None = None


class Hazard(Closed):
    hazard: str = meaning("what could go wrong")
    state: Literal["pass", "fail", "unknown"] = meaning("pass, fail, or unknown: nobody has looked")
    why: str = meaning("what speaks for it")


class Interpretation(Group):
    posterior: Share | None = meaning("from a prior of one half, an observer's belief that a unit was there, at most")
    tpr_at_1_percent_fpr: Share | None = meaning(
        "most true positives of any membership test against any client, with 1 % false ones; under `both` of an example"
    )
    sentence: str = meaning("what it means, in plain words")
    hazards: list[Hazard] = meaning("the checklist: pass, fail or unknown, each with its reason")


class Reproduction(Group):
    run: str = meaning("makes such a run again; real noise differs")
    verify_ledger: str | None = meaning("checks the ledger's chain")
    recompute: str | None = meaning("recomputes every account from the ledger, sharing no code with this report")
    check: str = meaning("checks this report")
    signed_by: str | None = meaning(
        "the operator's Ed25519 public key, base64 of its 32 bytes; report.json.sig has the signature"
    )
    signed_by_reason: str | None = None


class Statement(Closed):
    """Privacy, group by group: NIST SP 800-226, Ponomareva et al. 2023 (section 5.3.3), OpenDP's registry, and more."""

    identity: Identity
    unit: Unit
    adjacency: Adjacency
    trust: Trust
    outputs: Outputs
    mechanism: Mechanism
    sampling: Sampling
    steps: Steps
    delta: Delta
    epsilon: Epsilon
    composition: Composition
    not_covered: NotCovered
    post_processing: PostProcessing
    audit: Audit
    utility: Utility
    interpretation: Interpretation
    reproduction: Reproduction
