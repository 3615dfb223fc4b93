"""Settings that do not fit one another, refused before anyone is asked."""

from clients import cohort, coordinates, upload
from privacy.refused import Refused
from scenarios.settings import Settings


def check(settings: Settings) -> None:
    """Raises Refused, in one line, for what the unit of privacy, or another setting, makes no sense of."""
    cohort.check(settings.local)
    share, values = coordinates.split(settings.codec)
    _summable(settings, values)
    if share is not None:
        _shared_coordinates(settings)
    if settings.local.scaffold:
        _scaffold(settings)
    privacy, fraction, evaluation = settings.privacy, settings.rounds.fraction, settings.evaluation
    if privacy.budget is not None and privacy.unit == "none":
        raise Refused(
            "privacy.budget limits what is spent under DP: set privacy.unit=example, client, both or local, or leave "
            "it out"
        )
    if privacy.budget is not None and privacy.noise_seed is not None:
        raise Refused("privacy.budget cannot be kept with privacy.noise_seed, which promises nothing: leave one out")
    if privacy.adapt and not privacy.by_client:
        raise Refused(f"privacy.adapt is for privacy.unit=client, not {privacy.unit}: set privacy.adapt=false")
    if privacy.sampling == "fixed" and privacy.unit != "client":
        raise Refused(f"privacy.sampling=fixed is for privacy.unit=client, not {privacy.unit}: set it to poisson")
    if privacy.sampling == "fixed" and fraction == 1:
        raise Refused("privacy.sampling=fixed draws a part of the clients: set rounds.fraction below 1, or poisson")
    if privacy.noise == "shares":
        _shares(settings)
    if privacy.client_epsilon is not None and privacy.unit != "both":
        raise Refused("privacy.client_epsilon is for privacy.unit=both: elsewhere privacy.epsilon is the one budget")
    if evaluation.epsilon is not None and (evaluation.on == "server" or privacy.unit == "none"):
        raise Refused(
            "evaluation.epsilon noises what clients say of their test data in a run with DP: set evaluation.on=clients "
            "and a privacy.unit, or leave it out"
        )
    if evaluation.fraction < 1 and (evaluation.on == "server" or evaluation.epsilon or settings.sums_tests):
        raise Refused(
            f"evaluation.fraction={evaluation.fraction:g} asks some clients for results that each says by itself: set "
            "evaluation.on=clients, without evaluation.epsilon and with protect=none, or leave it at 1"
        )
    if privacy.bands == 1:
        return
    if privacy.unit != "client":
        raise Refused(f"privacy.bands is for privacy.unit=client, not {privacy.unit}: set privacy.bands=1")
    if fraction < 1 or privacy.sampling == "fixed":
        raise Refused(
            f"privacy.bands={privacy.bands} asks each client once in {privacy.bands} rounds, by turns that all may "
            "know: set rounds.fraction=1 and privacy.sampling=poisson, or privacy.bands=1"
        )
    if privacy.adapt:
        raise Refused(
            "privacy.adapt moves the norm from round to round, and the noise of privacy.bands is that of one norm: set "
            "privacy.adapt=false or privacy.bands=1"
        )


def _shares(settings: Settings) -> None:
    privacy = settings.privacy
    if privacy.unit != "client":
        raise Refused(f"privacy.noise=shares is for privacy.unit=client, not {privacy.unit}: set privacy.noise=server")
    if upload.bits(settings) is None:
        raise Refused(
            "privacy.noise=shares noises integers whose sum alone is read: set protect=masked or encrypted, or "
            "codec=int16 for trials with a server that is trusted"
        )
    if settings.rounds.fraction < 1:
        raise Refused(
            f"rounds.fraction={settings.rounds.fraction:g} draws clients in secret, and with privacy.noise=shares the "
            "server knows who takes part: set rounds.fraction=1, or privacy.noise=server"
        )
    if privacy.bands > 1:
        raise Refused(
            f"privacy.bands={privacy.bands} correlates noise that one party adds, and with privacy.noise=shares nobody "
            "knows all of it: set privacy.bands=1, or privacy.noise=server"
        )
    if privacy.adapt:
        raise Refused(
            "privacy.adapt sums votes that need noise of their own, and privacy.noise=shares has none for them: set "
            "privacy.adapt=false, or privacy.noise=server"
        )


def _scaffold(settings: Settings) -> None:
    unit, combine = settings.privacy.unit, settings.server.combine
    if settings.privacy.by_client:
        raise Refused(
            f"local.scaffold sums every client's own control variate, and under privacy.unit={unit} the server may "
            "let out only a noised sum of updates: set local.scaffold=false, or privacy.unit=example"
        )
    if unit == "local":
        raise Refused(
            "local.scaffold would make the noise on a client's update (privacy.unit=local), which is many times longer "
            "than the update, the direction of its next one: set local.scaffold=false, or privacy.unit=example"
        )
    if combine != "mean":
        raise Refused(
            f"local.scaffold keeps the mean of all control variates, and server.combine={combine} leaves some updates "
            "out: set local.scaffold=false or server.combine=mean"
        )
    if settings.local.momentum:
        raise Refused(
            "local.scaffold divides an update by its steps to get the mean gradient, and with local.momentum its steps "
            "weigh differently: set one of them to 0 (false)"
        )
    if settings.local.proximal:
        raise Refused(
            "local.scaffold and local.proximal both act against drift, and control variates would take the pull for "
            "gradient: set one of them to 0 (false)"
        )


def _shared_coordinates(settings: Settings) -> None:
    """Refuse what goes by single coordinates over the rounds, or counts what is not sent as well."""
    way = f"codec={settings.codec}"
    if settings.local.scaffold:
        raise Refused(
            f"local.scaffold keeps what is not sent in its control variates, and {way} in a residual: together they "
            "count it twice: set local.scaffold=false, or codec=topk:SHARE"
        )
    if settings.server.normalize:
        raise Refused(
            f"server.normalize=true (FedNova) divides an update by the steps of its round, and with {way} it holds "
            "what earlier rounds left: set server.normalize=false, or codec=float32"
        )
    if settings.privacy.bands > 1:
        raise Refused(
            f"privacy.bands={settings.privacy.bands} takes noise of earlier rounds away again, coordinate by "
            f"coordinate, and with {way} each round is of others: set privacy.bands=1, or codec=float32"
        )


def _summable(settings: Settings, values: str) -> None:
    """Refuse what needs a single update where only their sum is read. values: the codec of what is sent."""
    mode, bits = settings.protect.mode, upload.bits(settings)
    if bits is None:
        return
    if mode != "none" and values.startswith("topk"):
        raise Refused(
            f"protect={mode} sums integers at coordinates that all clients share, and with codec={settings.codec} each "
            f"chooses its own: set codec=shared-{settings.codec}, or protect=none"
        )
    if mode != "none" and values not in ("float32", f"int{bits}"):
        raise Refused(
            f"protect={mode} sends integers of protect.bits={bits}, and codec={settings.codec} would make others of "
            f"them: set codec=int{bits}, or protect=none"
        )
    if mode == "encrypted":
        _encryptable(settings)
    way = f"protect={mode}" if mode != "none" else f"codec={settings.codec}"
    leave = "protect=none codec=float32"
    if settings.server.combine != "mean":
        raise Refused(
            f"server.combine={settings.server.combine} compares single updates, and with {way} only their sum is read: "
            f"set server.combine=mean, or {leave}"
        )
    if settings.server.normalize:
        raise Refused(
            f"server.normalize=true (FedNova) rescales single updates by their steps, and with {way} only their sum is "
            f"read: set server.normalize=false, or {leave}"
        )
    if settings.local.scaffold:
        raise Refused(
            f"local.scaffold needs every client's own update, and with {way} only their sum is read: set "
            f"local.scaffold=false, or {leave}"
        )


def _encryptable(settings: Settings) -> None:
    upload.encryption(settings, 1)
    unit = settings.privacy.unit
    if settings.protect.trust == "shared" and settings.privacy.by_client and not settings.privacy.by_shares:
        way = "" if unit == "client" else "privacy.unit=client "
        raise Refused(
            f"protect.trust=shared lets every client read the sum before privacy.unit={unit} has put noise on it: set "
            f"{way}privacy.noise=shares, with which clients noise what they encrypt, or protect.trust=split"
        )
    if settings.sums_tests and settings.privacy.by_client and not settings.privacy.by_shares:
        raise Refused(
            f"evaluation.on=clients sums test results, and the key holder of privacy.unit={unit} opens no sum without "
            "its noise: set evaluation.epsilon, with which clients noise their own, evaluation.on=server, or "
            "protect=masked"
        )
    if settings.privacy.bands > 1:
        raise Refused(
            "privacy.bands correlates the noise of rounds, and the key holder of protect=encrypted draws that of each "
            "by itself: set privacy.bands=1, or protect=masked"
        )
