"""umbel keyholder, umbel key recipient: a key holder as a node of a fleet, and how it comes to know the clients."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from privacy.refused import Refused


def register(app: typer.Typer, key_app: typer.Typer) -> None:
    """Add the commands to `umbel` and to `umbel key`."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(keyholder)
    key_app.command()(recipient)


def keyholder(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where its keys lie, which nobody else may read; made at first use.")],
    clients: Annotated[Path, typer.Option(help='The clients it deals keys to: TOML lines NAME = "KEY".')],
    minimum: Annotated[
        int | None, typer.Option(help="Fewest clients in a sum that is opened, else the larger of 3 and half of them.")
    ] = None,
    cohort: Annotated[int | None, typer.Option(help="Clients that are asked a round, else all of them.")] = None,
    multiplier: Annotated[
        float | None,
        typer.Option(
            help="privacy.unit=client: noise on every sum, in units of the norm; not with privacy.noise=shares."
        ),
    ] = None,
    expected: Annotated[float | None, typer.Option(help="With it: clients expected in a round.")] = None,
    quantile: Annotated[float, typer.Option(help="With it: privacy.quantile.")] = 0.5,
    adapt_rate: Annotated[float, typer.Option(help="With it: privacy.adapt_rate under privacy.adapt, else 0.")] = 0.0,
    seeded: Annotated[
        bool,
        typer.Option(
            "--seeded", help="With it: noise from privacy.noise_seed where a run sets it. For tests: no guarantee."
        ),
    ] = False,
    superlink: Annotated[
        str, typer.Option(help="HOST:PORT of the SuperLink; without it the key is printed alone.")
    ] = "",
) -> None:
    """Print the public key that clients know this key holder by, and be a node of the fleet that opens sums.

    Further options go to flower-supernode. Run it where the operator of the SuperLink cannot read FOLDER.

    Example: umbel keyholder keys --clients clients.toml --superlink example.org:9092
    """
    from clients.masking import read_peers
    from privacy.keyholder import KeyHolder
    from server.superlink import COMMANDS, environment, running

    if (multiplier is None) != (expected is None):
        raise Refused("--multiplier and --expected go together: give both, or none for sums without noise")
    told: dict[str, str | int | float] = {"keys": str(folder.absolute()), "clients": str(clients.absolute())}
    told |= {name: value for name, value in (("minimum", minimum), ("cohort", cohort)) if value is not None}
    if multiplier is not None and expected is not None:
        told |= {
            "multiplier": multiplier,
            "expected": expected,
            "quantile": quantile,
            "adapt-rate": adapt_rate,
            "seeded": seeded,
        }
    holder = KeyHolder(folder, read_peers(clients), cohort, minimum)
    print(f'keyholder="{holder.identity.hex()}"', flush=True)
    holder.close()
    if not superlink:
        return
    link = running(superlink)
    command = [str(COMMANDS / "flower-supernode"), "--superlink", link.address, *context.args]
    command += ["--insecure"] if link.insecure else []
    command += ["--root-certificates", str(link.root_certificates)] if link.root_certificates else []
    command += ["--node-config", " ".join(f"{name}={json.dumps(value)}" for name, value in told.items())]
    os.execve(command[0], command, environment(folder.absolute() / "flower"))


def recipient(
    name: Annotated[str, typer.Argument(help="The client's name, as its node config says it.")],
    state: Annotated[Path, typer.Option(help="The node's state folder, as its node config says it.")] = Path(
        "~/.umbel/state"
    ),
) -> None:
    """Print the line that makes a client known to a key holder: its name and the key its letters are sealed for.

    Example: umbel key recipient north --state /var/lib/umbel >> clients.toml
    """
    from clients import encrypting

    try:
        [key] = encrypting.simulated(state.expanduser(), [name]).values()
    except OSError as error:
        raise Refused(f"{state} cannot be written ({error.strerror}): name another folder by --state") from None
    print(f"{json.dumps(name)} = {json.dumps(key.hex())}")
