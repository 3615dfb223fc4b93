"""What is said of each unit of privacy: one entry a unit; a unit without one is described by the facts alone.

Protected updates change some of it: `hidden` says what the words become, `unprotected` whom an epsilon fails.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from scenarios.settings import Protect

REPORT_READER, OTHER_CLIENT, SERVER = "report_reader", "other_client", "server"


@dataclass(frozen=True)
class Wording:
    """The words of one unit; figures stand in fields of their own."""

    means: str
    bound: str
    enforced: str
    public: tuple[str, ...]
    server_sees: str
    server_before_noise: bool
    protects_from: frozenset[str]
    """Against whom the epsilon of the account holds."""
    unprotected: str
    """Why it does not hold against the others."""
    covered: tuple[str, ...]
    family: str
    clip_scope: str
    weighting: str
    denominator: str
    dropout: str
    generator: str
    precision: str
    assumption: str
    empty: str
    owner: str
    """Of what a reader learns little: "one example of a client"."""


UNITS = {
    "example": Wording(
        means="one training example of one client; whoever has several is protected less, by the promise for all",
        bound="one example is drawn at most once a step and moves the step's sum by at most the clipping norm",
        enforced="the gradient of each example is clipped on the client; models that mix examples are refused",
        public=("which clients there are", "how many examples each has", "who took part in which round"),
        server_sees="each client's update, already noised",
        server_before_noise=False,
        protects_from=frozenset({REPORT_READER, OTHER_CLIENT, SERVER}),
        unprotected="",
        covered=(
            "every update that a client sends, in every round, recovery included",
            "every model that is broadcast",
            "the final weights and every model made of them",
        ),
        family="DP-SGD on the client: Gaussian noise on the sum of clipped gradients (Abadi et al. 2016)",
        clip_scope="the gradient of one example, all layers together (flat, L2)",
        weighting="every example of a step weighs the same; updates are then combined as server.* says",
        denominator="sampling rate x the client's examples, whatever number was drawn",
        dropout="none: a client noises alone, and a reply that is lost is charged as if it had come",
        generator="noise: AES-128 in counter mode (on a GPU Philox); samples: Mersenne Twister; key and state from the "
        "operating system's entropy, anew each client and round",
        precision="float32",
        assumption="each example is drawn for each step by a coin of its own (Poisson), or all are in every step",
        empty="noise alone; it counts like any other step",
        owner="one example of a client",
    ),
    "client": Wording(
        means="one whole client with all its examples",
        bound="one client adds one update a round, which moves the sum by at most the clipping norm",
        enforced="each update is clipped by its client and again by the server after decoding; all weigh the same",
        public=("the names of the clients and how many there are", "how many examples each has"),
        server_sees="each update, clipped and without noise, and who took part",
        server_before_noise=True,
        protects_from=frozenset({REPORT_READER, OTHER_CLIENT}),
        unprotected="the server sees each client's update before it adds the noise: no epsilon holds against it",
        covered=("every model that is broadcast", "the final weights and every model made of them"),
        family="Gaussian noise of the server on the sum of clipped updates (McMahan et al. 2018)",
        clip_scope="a client's whole update, all layers together (L2)",
        weighting="uniform, whatever the number of examples",
        denominator="the cohort expected, whatever number replied",
        dropout="costs accuracy alone: noise and denominator are those of the cohort expected",
        generator="PCG64 seeded with 256 bits of the operating system's entropy, anew each round",
        precision="float64",
        assumption="each client is drawn for each round by a secret coin of its own (Poisson), and every client pays "
        "for every round, drawn or not; or all are asked in every round",
        empty="noise alone where rounds.minimum is 0; else the round is not applied and its chance is part of delta",
        owner="one client, all its examples together,",
    ),
}
_EXAMPLE, _CLIENT = UNITS["example"], UNITS["client"]
UNITS["local"] = replace(
    _CLIENT,
    enforced="each update is clipped by its client, then noised by it; an update that is not finite counts as zero",
    public=("which clients there are", "how many examples each has", "who took part in which round"),
    server_sees="each client's update, already noised",
    server_before_noise=False,
    protects_from=frozenset({REPORT_READER, OTHER_CLIENT, SERVER}),
    unprotected="",
    covered=_EXAMPLE.covered,
    family="Gaussian noise of each client on its clipped update, sensitivity twice the norm (Balle and Wang 2018)",
    weighting="as server.* says: it comes after the noise",
    denominator="as server.* says: it comes after the noise",
    dropout="none: a client noises alone, and a reply that is lost is charged as if it had come",
    assumption="no amplification is claimed: a client pays for each round in which it was asked",
    empty="there are none: a client that is asked sends an update",
)
UNITS["both"] = replace(
    _EXAMPLE,
    means=f"{_EXAMPLE.means}; and beside it {_CLIENT.means}, with an account of its own",
    bound=f"{_EXAMPLE.bound}; {_CLIENT.bound}",
    enforced=f"{_EXAMPLE.enforced}; {_CLIENT.enforced}",
    server_sees="each client's update, noised for its examples and not for the client as a whole",
    family=f"{_EXAMPLE.family}; then {_CLIENT.family}",
    clip_scope=f"{_EXAMPLE.clip_scope}; then {_CLIENT.clip_scope} (privacy.update_clip)",
    weighting=_CLIENT.weighting,
    denominator=f"{_EXAMPLE.denominator}; of the sum of updates {_CLIENT.denominator}",
    dropout=_CLIENT.dropout,
    generator=f"{_EXAMPLE.generator}; on the server {_CLIENT.generator}",
    precision="float32 on the client, float64 on the server",
    assumption=f"{_EXAMPLE.assumption}; {_CLIENT.assumption}",
)


_SHARED = replace(
    _CLIENT,
    enforced="each update is clipped by its client, rounded to integers of a bounded norm and noised by it; all weigh "
    "the same",
    public=(*_CLIENT.public, "who took part in which round"),
    server_sees="each client's update with that client's share of the noise alone, and who took part",
    unprotected="the server reads single updates, each with a share of the noise alone: no epsilon holds against it",
    family="discrete Gaussian noise in shares that the clients add to their integers (Canonne, Kamath and Steinke "
    "2020; Kairouz, Liu and Steinke 2021); a Gaussian of the multiplier stated dominates the sum of the honest ones",
    denominator="the number of clients, whatever number replied",
    dropout="a sum of fewer clients than protect.minimum is not released, and the round stays charged; more of them "
    "add noise beyond what is charged",
    generator="the operating system's entropy for every draw",
    precision="integers; each share within 2^-180 of the discrete Gaussian",
    assumption="no amplification is claimed: all are asked in every round and pay for each; of the clients in a sum at "
    "least protect.minimum less privacy.colluding are honest",
    empty="a sum of too few is not released",
)
_HIDDEN = replace(
    _SHARED,
    server_sees="the sum of the noised updates, and who took part",
    server_before_noise=False,
    protects_from=frozenset({REPORT_READER, OTHER_CLIENT, SERVER}),
    unprotected="",
    covered=("every sum that the server reads", *_CLIENT.covered),
)


def worded(report: Mapping[str, Any]) -> Wording | None:
    """The words of a report's settings; what an older Umbel's report does not say is as it was then."""
    said = report["settings"]
    names = ("privacy.sampling", "poisson"), ("privacy.bands", 1), ("privacy.noise", "server"), ("protect.mode", "none")
    return wording(report["privacy"]["unit"], *(said.get(name, before) for name, before in names))


def wording(
    unit: str, sampling: str = "poisson", bands: int = 1, noise: str = "server", mode: str = "none"
) -> Wording | None:
    """The words of these settings (privacy.unit, .sampling, .bands, .noise, protect.mode); None for an unknown unit."""
    words = UNITS.get(unit)
    if words is None or unit != "client":
        return words
    if noise == "shares":
        return _HIDDEN if mode != "none" else _SHARED
    if sampling == "fixed":
        return replace(
            words,
            assumption="a fixed number of clients is drawn without replacement, in secret, for each round, and every "
            "client pays for every round, drawn or not (Wang, Balle and Kasiviswanathan 2019; replace one)",
            empty="there are none: the number drawn is fixed",
        )
    if bands > 1:
        return replace(
            words,
            public=(*words.public, "who took part in which round"),
            family=f"DP-FTRL: Gaussian noise of the server, correlated over {bands} rounds by a banded matrix (McKenna "
            "2024)",
            assumption=f"no amplification is claimed: a client takes part at most once in any {bands} rounds and pays "
            "for those",
            empty="a round in which too few could be asked is not released",
        )
    return words


_OPENED = {"masked": "once the masks are off", "encrypted": "once it was opened"}
_NAMES = "the clients of a round are told each other's names (protect=masked)"
_KEY = "the clients share the secret key (protect.trust=shared), and whoever opens a sum is told who is in it"


def hidden(words: Wording, unit: str, protect: Protect) -> Wording:
    """The words of a unit whose updates are protected: what the server sees, who can hold a client to its norm."""
    if protect.mode == "none":
        return words
    sees = f"the exact sum of each round's updates {_OPENED[protect.mode]}, and no single update, and who took part"
    if unit == "example":
        return replace(words, server_sees=f"{sees}; what is summed is noised already")
    if unit == "local":
        return replace(words, server_sees=f"{sees}; what is summed is noised already")
    if protect.mode == "encrypted":
        sees = "the sum of each round's updates with the key holder's noise on it, no single update, and who took part"
    elif unit == "both":
        sees += "; what is summed is noised for examples and not for clients as a whole"
    else:
        sees += "; it adds the noise to that sum"
    held = "each update is clipped and rounded by its client to the norm; none other can check it, as none reads it"
    bare = words.server_before_noise and protect.mode != "encrypted"
    return replace(
        words,
        server_sees=sees,
        server_before_noise=bare,
        enforced=held if unit == "client" else f"{_EXAMPLE.enforced}; {held}",
    )


def unprotected(who: str, unit: str, mode: str, trust: str | None, drawn: bool) -> str | None:
    """Why the epsilon of a unit's account does not hold against `who`; None where it does.

    drawn: whether the account is cheaper because nobody but the server knows who takes part in a round.
    """
    words = UNITS[unit]
    if unit != "client":
        return None if who in words.protects_from else words.unprotected
    if who == SERVER:
        if mode == "none":
            return words.unprotected
        if mode == "encrypted" and drawn:
            return "the server draws who takes part, so that draw makes nothing cheaper against it"
        if mode == "encrypted":
            return None
        return (
            f"the server reads the exact sum of each round's updates {_OPENED[mode]}, before the noise is added: no "
            "single update, yet no epsilon bounds what that sum says"
        )
    return _known(mode, trust, drawn) if who == OTHER_CLIENT else None


def beside(who: str, unit: str, mode: str, trust: str | None, drawn: bool) -> str | None:
    """Under `both` the epsilon against `who` is that of an example; why that of a client does not hold, if it does not.

    None too where both hold, and under any other unit. Against a server that gets noised sums from a key holder the
    epsilon of a client holds on a condition, which is said.
    """
    if who == SERVER and unit in ("client", "both") and mode == "encrypted" and not drawn:
        return "of a client as long as the key holder, who adds the noise, does not collude with the server"
    if unit != "both" or who not in (OTHER_CLIENT, SERVER):
        return None
    why = unprotected(who, "client", mode, trust, drawn)
    return f"of an example alone; of a client as a whole none holds: {why}" if why else None


def shared(who: str, honest: int, mode: str, trust: str | None) -> str:
    """The condition on which the epsilon of noise in shares holds against `who`, where it does.

    honest: the fewest honest clients in a sum.
    """
    condition = f"as long as at least {honest} of the clients in every sum are honest"
    if mode == "masked" and who == SERVER:
        condition += ", and no more clients collude with the server than masks bear (protect.who_learns)"
    if mode == "encrypted" and who == SERVER:
        condition += (
            ", and the key holder and the server do not collude"
            if trust == "split"
            else ", and neither a client nor the key holder, who all have the secret key, colludes with the server"
        )
    if mode == "encrypted" and trust == "shared" and who == OTHER_CLIENT:
        condition += ", and it is not given what they send, which it could open one by one"
    return condition


def _known(mode: str, trust: str | None, drawn: bool) -> str | None:
    """Why the promise for a client does not hold against another one."""
    if mode == "encrypted" and trust == "shared":
        return f"{_KEY}: every client could read the sums before the noise is added, so no epsilon holds against it"
    if mode == "masked" and drawn:
        return (
            f"{_NAMES}: the draw is no secret to them and makes nothing cheaper against them, and what the rounds cost "
            "without it was not worked out"
        )
    return None
