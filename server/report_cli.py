"""umbel report and umbel key: draw a report again, sign it, print it, check it; make the key that signs."""

from pathlib import Path
from typing import Annotated

import typer

key_app = typer.Typer(help="The operator's key, which signs reports: new.", no_args_is_help=True)


@key_app.command()
def new(file: Annotated[Path, typer.Argument(help="Where to keep the private key; never overwritten.")]) -> None:
    """Make an Ed25519 key in FILE, readable by its owner alone, and print its public half.

    Example: umbel key new operator.key > operator.pem
    """
    from server import signature

    print(signature.new_key(file), end="")


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
