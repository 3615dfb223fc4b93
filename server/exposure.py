"""Who can learn what of single updates, alone and together with whom: the sentences of a report, by `protect.mode`.

Each follows from the settings, the size of the fleet and the runtime, so that a check of the report makes it again.
The guarantees stand in privacy/masks.py and privacy/keyholder.py, with their proofs and what they rest on.
"""

from collections.abc import Iterator

from clients import upload
from privacy import integers, roster
from privacy.frames import Rules
from privacy.neighbours import Degree
from scenarios.settings import Protect, Settings
from server import select

_BEARS = {
    "none": "without noise",
    "example": "noised by its client for single examples",
    "client": "clipped and without noise",
    "both": "noised by its client for single examples, not for the client as a whole",
    "local": "noised by its client",
}
_PICKED = (
    "Nothing prevents a server from picking whom it asks: colluding clients count among those it picked, and the sums "
    "of two rounds whose clients differ by few show more of those few than one sum does."
)
_CODE = (
    "All of this takes for granted that the clients run this program: whoever can send them another one, the server "
    "where it ships their code, can read everything."
)


def rules(settings: Settings, entries: int, clients: int, grid: integers.Grid | None = None) -> Rules:
    """The rules of the masked sums over updates of `entries` values, in a fleet of `clients`.

    grid: of any round, where clients add noise to their integers.
    """
    wanted, least = settings.protect, select.least_summed(clients, settings)
    return Rules(
        upload.values(settings, entries) + 2,
        grid.width if grid else integers.width(wanted.bits, wanted.max_clients),
        least,
    )


def who_learns(settings: Settings, entries: int, clients: int, runtime: str) -> list[str]:
    """What a privacy officer signs for, one sentence each. clients: of the fleet; entries: values of an update."""
    mode, trust = settings.protect.mode, settings.protect.trust
    if mode == "masked":
        drawn = select.cohort_size(clients, settings)
        asked = rules(settings, entries, clients)
        said = list(_masked(settings, asked, drawn, roster.degree(drawn, asked)))
    elif mode == "encrypted":
        minimum = select.least_summed(clients, settings)
        said = list(_split(settings, minimum) if trust == "split" else _shared(settings, minimum))
    else:
        said = list(_clear(settings))
    if settings.privacy.by_shares:
        said.append(_shares(select.honest(clients, settings), mode, trust))
    if settings.sums_tests:
        said.append(_tests(select.least_evaluated(clients, settings)))
    if (sent := upload.values(settings, entries)) < entries:
        said.append(_coordinates(sent, entries))
    said += [_weights(settings), _visible(settings), _lies(settings)]
    if mode != "none":
        said += [_PICKED, _CODE]
    if runtime != "deployment":
        said.append(
            f"This run was simulated (runtime {runtime}): whoever ran the machine had every client's data. The other "
            "sentences are about the same run on devices of their own."
        )
    return said


def besides(settings: Settings) -> str:
    """What goes beside the values of an update, of which differential privacy says nothing: by mode, who reads it."""
    bit = ", whether it was within the clipping norm" if settings.privacy.by_client else ""
    if settings.protect.mode == "none":
        return f"what each update weighs{bit}, the steps it took and the bytes and time of it: the server reads them"
    inside = f"what an update weighs{' and whether it was within the norm' if bit else ''}"
    told = "" if _alike(settings) else ", though weights follow from the numbers of examples"
    return (
        f"the steps that each update took and the bytes and time of each message, which the server reads; {inside} "
        f"travels inside the protected sum{told}"
    )


def key_holder(protect: Protect, bare: bool, tests: bool = False) -> tuple[str, bool]:
    """(what the key holder sees, whether before noise is added); bare: the sums of updates have none for the unit.

    tests: it opens sums of test results, too.
    """
    if protect.mode != "encrypted":
        return "nothing: updates are not encrypted, so nobody holds a key", False
    more = ", and one of test results an evaluation" if tests else ""
    return f"one sum of updates a round{more}, proven to be that of the clients named to it; no single update", bare


def other_clients(protect: Protect, bare: bool) -> tuple[str, bool]:
    """(what other clients see, whether before noise is added)."""
    if protect.mode == "masked":
        return "the weights of each round, and who takes part in their rounds", False
    if protect.mode == "encrypted" and protect.trust == "shared":
        return "the weights of each round; they hold the secret key, and one of them opens each round's sum", bare
    return "the weights of each round", False


def _clear(settings: Settings) -> Iterator[str]:
    share = "clipped and with its client's share of the noise alone"
    bears = share if settings.privacy.by_shares else _BEARS[settings.privacy.unit]
    yield (
        "The server reads every client's update of every round by itself, "
        f"{bears}; so does whoever reads the server's memory, or its connections where they have no TLS."
    )
    if (bits := upload.bits(settings)) is not None:
        yield f"That updates travel as integers of {bits} bits (codec={settings.codec}) hides nothing: all can be read."
    yield "Other clients get no update but their own; with the server they learn what the server alone learns."


def _masked(settings: Settings, asked: Rules, drawn: int, degree: Degree) -> Iterator[str]:
    colluding = int(drawn * asked.colluding)
    least = degree.threshold + 1 - min(colluding, degree.threshold - 1)
    yield (
        f"As long as no client colludes with it, the server learns of each round the exact sum of the updates of at "
        f"least {asked.minimum} clients{_before(settings)}, and nothing more of any one of them, even if it does not "
        "keep to the protocol."
    )
    if colluding:
        chance = "" if degree.neighbours == drawn - 1 else ", but for a chance of 2^-40"
        yield (
            f"Of the {drawn} clients that a round asks, up to {colluding} may tell the server all they know: it then "
            f"learns their own updates, and of the others sums over at least {least} of them{chance}."
        )
    else:
        yield f"Of the {drawn} clients that a round asks, none may collude with the server."
    yield (
        f"With {colluding + 1} or more colluding clients nothing is promised: {degree.threshold} of a client's "
        f"{degree.neighbours} neighbours, together with the server, can read its update."
    )
    yield (
        "The clients of a round are told each other's names and who of them sent an update, so a secret draw is no "
        "secret to them; without the server they learn of the others' updates what the next weights tell, no more."
    )
    yield (
        "It rests on X25519, HKDF, ChaCha20-Poly1305, Ed25519 and SHA-256, and on clients that know each other's "
        "identity keys from a list of their owners (peers), not from the server."
    )


def _split(settings: Settings, minimum: int) -> Iterator[str]:
    yield (
        "The server adds ciphertexts that it cannot read, and learns of each round what the key holder publishes of "
        f"one sum over at least {minimum} clients{_before(settings)}; of single updates nothing, unless the key holder "
        "colludes with it."
    )
    yield (
        "The key holder reads that sum and who is in it, once a round, and is sent no single update; it opens nothing "
        "but the proven sum over the clients that were named, but for the chance of a guessed tag."
    )
    yield (
        "The server and the key holder together can read every update; so can whoever has the key holder's key of the "
        "run and what clients sent."
    )
    yield (
        "Clients that collude with the server can take their own updates out of a sum: all of its clients but one "
        "together with the server know that one's update. They hold the public key alone, and open nothing."
    )
    yield _tries()
    yield (
        "It rests on the hardness of RLWE (protect.security_bits), HPKE and HMAC, and on clients that know the key "
        "holder's identity key from elsewhere than the server."
    )


def _shared(settings: Settings, minimum: int) -> Iterator[str]:
    yield (
        "The server adds ciphertexts that it cannot read, and learns of each round what is published of one sum over "
        f"at least {minimum} clients{_before(settings)}; of single updates nothing, unless a client colludes with it."
    )
    yield (
        "The clients share the secret key: any single one of them, together with the server or with whoever records "
        "what clients send, can read every update of every client."
    )
    yield (
        "The client that opens a round's sum reads it and who is in it; a secret draw is no secret to that client, and "
        "every other client could read the same if it were sent the sum."
    )
    yield _tries()
    yield (
        "It rests on the hardness of RLWE (protect.security_bits), HPKE and HMAC, on clients that know the key "
        "holder's identity key from elsewhere than the server, and on none of them giving away the key."
    )


def _before(settings: Settings) -> str:
    if not settings.privacy.by_client:
        return ""
    if settings.privacy.by_shares:
        return ", each of which added its share of the noise of privacy.unit=client"
    if settings.protect.mode == "encrypted":
        return f", with the noise of privacy.unit={settings.privacy.unit} on it, which the key holder adds"
    return f", before the noise of privacy.unit={settings.privacy.unit} is added"


def _shares(honest: int, mode: str, trust: str) -> str:
    """What noise in shares bounds, and whom it does not."""
    whom = {
        "none": "the server",
        "masked": "more colluding clients than that together with the server",
        "split": "the server and the key holder together",
        "shared": "any single client, or the key holder, together with the server or with whoever records what "
        "clients send",
    }[trust if mode == "encrypted" else mode]
    return (
        f"A sum has the noise that its epsilon asks for if at least {honest} of its clients are honest, that is, add "
        "their shares and keep them to themselves: whoever reads the sum alone and knows what all the others sent "
        "learns no more than that epsilon bounds. A single update has one share, which is far less, so that no epsilon "
        f"holds against {whom}."
    )


def _tries() -> str:
    return (
        "A server that asks for a forged sum learns that it stayed closed; after three of those the key is destroyed "
        "and the run ends."
    )


def _weights(settings: Settings) -> str:
    if settings.privacy.by_client:
        bounded = "with noise on it: what that tells of one client is what its epsilon bounds, where one holds"
    elif settings.privacy.unit == "none":
        bounded = "without noise: all clients of a sum but one, together, can take their own away and know that one's"
    else:
        bounded = "as its clients noised it: all clients of a sum but one, together, can know that one's noised update"
    return (
        "Every client, and whoever is given the model of each round, sees how the weights moved, so the mean of the "
        f"round's updates, {bounded}."
    )


def _coordinates(sent: int, entries: int) -> str:
    return (
        f"A round is of {sent} of an update's {entries} values, the same of all its clients, at coordinates that the "
        "server names: whoever it is that reads updates or sums learns nothing of the others in that round. They stay "
        "with the client, and go out, added up, in a later round that names them."
    )


def _tests(least: int) -> str:
    return (
        "What clients say of their test examples (evaluation.on=clients) is hidden as their updates are: whoever reads "
        f"a sum of updates learns of each evaluation, without noise, how many test examples at least {least} clients "
        "have together, how many of them were right and what their losses add up to. A client's number of test "
        "examples stays as it is: where two evaluations differ by one client, their difference tells that number, and "
        "nearly what it got right."
    )


def _visible(settings: Settings) -> str:
    hidden = settings.protect.mode != "none"
    counts = "how many examples each client says it has, how many steps it took"
    if settings.evaluation.on == "clients" and not settings.sums_tests:
        noised = "noised" if settings.evaluation.epsilon is not None else "without noise"
        counts += f", what it says of its test examples ({noised})"
    weight = ""
    if hidden:
        weight = "; a client's weight and clip bit travel inside the sum"
        weight += "" if _alike(settings) else ", though its weight follows from its number of examples"
    return (
        "The server sees, in every mode, who was asked and who answered in which round, the size and the time of each "
        f"message, {counts}{weight}."
    )


def _lies(settings: Settings) -> str:
    if settings.protect.mode != "none":
        closed = ", or keep it closed, which ends the run at the third," if settings.protect.mode == "encrypted" else ""
        return (
            "Nothing prevents a client from lying. Its own program keeps it within range and norm; nobody can check "
            f"what nobody can read, so one that lies can make a round's sum anything{closed or ','} and nobody can say "
            "who it was."
        )
    if upload.bits(settings) is not None:
        return (
            "Nothing prevents a client from lying within the range (protect.range): it moves the mean by that at most."
        )
    return "Nothing prevents a client from lying within what server.combine lets pass."


def _alike(settings: Settings) -> bool:
    return settings.server.weighting == "uniform" or settings.privacy.by_client
