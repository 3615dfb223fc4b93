"""umbel report and umbel key: draw a report again, sign it, print it, check it; the keys that sign."""

from pathlib import Path
from typing import Annotated

import typer

from privacy.refused import Refused

key_app = typer.Typer(help="Keys that sign: the operator's (new), a device's (node).", no_args_is_help=True)


@key_app.command()
def new(file: Annotated[Path, typer.Argument(help="Where to keep the private key; never overwritten.")]) -> None:
    """Make an Ed25519 key in FILE, readable by its owner alone, and print its public half.

    Example: umbel key new operator.key > operator.pem
    """
    from server import signature

    print(signature.new_key(file), end="")


@key_app.command()
def node(
    state: Annotated[Path, typer.Argument(help="The device's state folder, as its node config has it.")],
    name: Annotated[str, typer.Argument(help="Which client it is, as its node config has it.")],
) -> None:
    """Print a device's line for the file of public keys (peers) of protect=masked.

    Example: umbel key node ~/.umbel/state hospital-1 >> peers.toml
    """
    from clients import masking

    try:
        print(masking.introduction(state.expanduser(), name))
    except OSError as error:
        raise Refused(f"{state} cannot be used ({error.strerror}): name the folder that the node keeps") from None


def check(path: Path, verify_key: Path | None) -> None:
    """Print what is wrong with a report, one line each, and end with 2; or what was checked, and what was not."""
    from server import verify

    verdict = verify.check(path, verify_key)
    for line in verdict.wrong:
        print(line)
    if verdict.wrong:
        raise typer.Exit(2)
    print(f"checked: {', '.join(verdict.held)}")
    for line in verdict.open:
        print(f"not checked: {line}")


def draw(folder: Path, key: str, pdf: bool, quiet: bool) -> None:
    """Bring report.json up to date with audit.json and the key, draw report.html and, if asked, report.pdf."""
    from server import launch
    from server import report as page

    page.write(folder, key, pdf)
    launch.show(folder, quiet)
