"""What each kind of privacy promises, in the words of the report: one frozen value a kind, beside the mechanisms."""

from dataclasses import dataclass, replace

_SCENARIO = (
    "constants of the scenario that were chosen by looking at data, and settings tuned in earlier runs",
    "floating-point and generator caveats: Gaussian noise in {} from a {} seeded by the system",
)
_TORCH, _NUMPY = ("float32", "key stream of AES-128 (on a GPU from Philox)"), ("float64", "PCG64 generator")
_CLIENTS = "1 / (10 x the number of clients)"


def _scenario(generator: tuple[str, str]) -> tuple[str, ...]:
    return _SCENARIO[0], _SCENARIO[1].format(*generator)


@dataclass(frozen=True)
class Promise:
    """One kind of privacy; every text completes the report's key of that name."""

    adjacency: str | None = None
    against: str | None = None
    delta_rule: str | None = None
    not_covered: tuple[str, ...] = ()
    noise: str = "none"


_BY_CLIENT = Promise(
    "add or remove one client with all its examples; how many clients there are is public",
    "readers of the model and of this report, and other clients; not the server, which adds the noise itself",
    _CLIENTS,
    (
        "the server: it sees the update of each client, clipped and without noise, and who took part",
        "the names of the clients, how many they are, and the number of examples of each",
        "the time that each round took, and what the network shows of who took part",
        "where all are asked in every round: who was late, and an error on a client by its kind",
        *_scenario(_NUMPY),
    ),
    "Gaussian, noise multiplier x clipping norm on the sum of the updates, added by the server",
)

PROMISES = {
    "none": Promise(),
    "example": Promise(
        "add or remove one example",
        "everyone who sees what a client sends: the server, other clients, the network, readers of the model",
        "1 / (10 x the client's examples)",
        (
            "the number of examples of each client, which weighs its update and sets its sampling rate",
            "who took part in which round, when, for how long and with how many bytes",
            "the split of labels over clients, where a simulation draws its partition from them",
            *_scenario(_TORCH),
        ),
        "Gaussian, noise multiplier x clipping norm on the sum of gradients of each local step, added by the client",
    ),
    "client": _BY_CLIENT,
    "local": Promise(
        "replace all examples of one client by any others, whatever their number; who the clients are is public",
        "everyone who sees what a client sends: the server, other clients, the network, readers of the model",
        _CLIENTS,
        (
            "the number of examples of each client, said before round 1, which weighs its update and sets its steps",
            "who took part in which round, when, for how long and with how many bytes, and an error on a client",
            "the split of labels over clients, where a simulation draws its partition from them",
            *_scenario(_NUMPY),
        ),
        "Gaussian, noise multiplier x 2 x clipping norm on each update, added by its client",
    ),
}
_EXAMPLE = PROMISES["example"]
PROMISES["both"] = Promise(
    f"of an example: {_EXAMPLE.adjacency}; of a client as a whole: {_BY_CLIENT.adjacency}",
    f"of an example: {_EXAMPLE.against}; of a client as a whole: {_BY_CLIENT.against}",
    f"of an example: {_EXAMPLE.delta_rule}; of a client as a whole: {_BY_CLIENT.delta_rule}",
    (
        "a client as a whole against the server, which sees its update noised for single examples alone",
        *_EXAMPLE.not_covered,
        _scenario(_NUMPY)[1],
    ),
    f"{_EXAMPLE.noise}; {_BY_CLIENT.noise}",
)


def promise(
    unit: str, sampling: str = "poisson", bands: int = 1, honest: int = 0, mode: str = "none", trust: str = "split"
) -> Promise:
    """The promise of these settings (privacy.unit, privacy.sampling, privacy.bands).

    honest: where noise comes in shares, the fewest honest clients in a sum; mode, trust: protect.mode, protect.trust.
    """
    made = PROMISES[unit]
    if honest:
        return _shared(honest, mode, trust)
    if unit == "client" and sampling == "fixed":
        adjacency = "replace all examples of one client by any others; how many clients there are is public"
        return replace(made, adjacency=adjacency)
    if unit == "client" and bands > 1:
        listed = (
            made.not_covered[0],
            "who took part in which round, which the run's seed decides",
            *made.not_covered[1:],
        )
        noise = f"{made.noise}, correlated over {bands} rounds (DP-FTRL by a banded matrix)"
        return replace(made, not_covered=listed, noise=noise)
    return made


def summed(made: Promise, unit: str, mode: str, trust: str, drawn: bool) -> Promise:
    """`made` where the server reads sums of updates alone (protect.mode, protect.trust).

    drawn: whether the promise counts on nobody but the server knowing who takes part in a round.
    """
    if mode == "none" or unit not in ("client", "both"):
        return made
    others, reason = "", ""
    if mode == "masked" and drawn:
        others = "nor other clients, whom masks tell who takes part in their rounds"
        reason = "other clients: those of a round are told each other's names, so its draw is no secret to them"
    if mode == "encrypted" and trust == "shared":
        others = "nor other clients, which hold the secret key"
        reason = "other clients: each holds the key that opens the sums, before noise is added to them"
    against = f"readers of the model and of this report{'' if others else ', and other clients'}; not the server, "
    against += f"which reads the sum of each round's updates before the noise is added{', ' if others else ''}{others}"
    server = "the server: it reads the exact sum of each round's updates, without noise, and who took part"
    if mode == "encrypted":
        noised = "which gets the sum of each round's updates from the key holder, noised"
        against = f"readers of the model and of this report{'' if others else ', and other clients'}; "
        against += (
            f"not the server, {noised}, but draws who takes part"
            if drawn
            else (f"the server too, {noised}, as long as the key holder does not collude with it")
        )
        against += f"; {others}" if others else ""
        server = "the key holder: it reads the exact sum of each round's updates, without noise, and who is in it"
    if unit == "both":
        against = f"of an example: {_EXAMPLE.against}; of a client as a whole: {against}"
        server = "a client as a whole against the server, which reads sums of updates noised for single examples alone"
        reason = reason and f"a client as a whole against {reason}"
    few = "how many came to the end of a round: where too few did its sum is lost, which the next weights show"
    listed = (server, *([reason] if reason else []), few, *made.not_covered[1:])
    return replace(made, against=against, not_covered=listed)


def _shared(honest: int, mode: str, trust: str) -> Promise:
    """privacy.unit=client with privacy.noise=shares (privacy/noise_shares.py)."""
    condition = (
        f"as long as at least {honest} of the clients in every sum are honest, whatever the others pool of what they "
        "know"
    )
    single = "the update of each client with that client's own share of the noise"
    match mode, trust:
        case "none", _:
            whom = f", {condition}; not the server, which reads single updates, each with a share of the noise alone"
            bare = [f"the server: it sees {single}, and who took part"]
        case "encrypted", "split":
            whom = f", and the server and the key holder, which learn sums alone, {condition}, and they do not collude"
            bare = [f"the server together with the key holder: the two can read {single}"]
        case "encrypted", _:
            keyed = "neither a client nor the key holder, who all have the secret key,"
            whom = f", and the server, which learn sums alone, {condition}, and {keyed} colludes with the server or is "
            whom += "given what clients send"
            pair = "the server, or who records what clients send, together with any one client or the key holder"
            bare = [f"{pair}: the two can read {single}"]
        case _:
            whom, bare = f", and the server, which learns sums alone, {condition}", []
    return Promise(
        "a client's update is there, or zeros in its place; who the clients are and who takes part is public",
        f"readers of the model and of this report, and other clients{whom}",
        _CLIENTS,
        (
            *bare,
            "who took part in which round, when, for how long and with how many bytes, and an error on a client",
            "the names of the clients, how many they are, and the number of examples of each",
            _SCENARIO[0],
        ),
        "discrete Gaussian in shares that the clients add, the sum over the honest ones at least noise multiplier x "
        "the norm after rounding",
    )
