"""What travels to the nodes: our five packages and nothing else; and nobody else's package has one of their names."""

import io
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

PROJECT = Path(__file__).parents[2]
PACKAGES = {"clients", "edge_export", "privacy", "scenarios", "server"}


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's use of pathspec
def test_the_bundle_holds_every_module_of_the_five_packages_and_nothing_else() -> None:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(PROJECT))) as bundle:
        files = set(bundle.namelist()) - {"pyproject.toml", ".info/CONTENT"}
    modules = {str(path.relative_to(PROJECT)) for name in PACKAGES for path in (PROJECT / name).rglob("*.py")}
    assert files == modules
    assert {file.split("/")[0] for file in files} == PACKAGES


def test_the_packages_need_no_file_that_a_bundle_cannot_carry() -> None:
    ignored = {"__pycache__"}
    others = [
        str(path.relative_to(PROJECT))
        for name in PACKAGES
        for path in (PROJECT / name).rglob("*")
        if path.is_file() and path.suffix != ".py" and not ignored & set(path.parts)
    ]
    assert others == []


def test_the_bundle_is_built_from_the_packages_that_are_installed() -> None:
    config = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert set(config["tool"]["setuptools"]["packages"]) == PACKAGES
    assert {pattern.split("/")[0] for pattern in config["tool"]["flwr"]["app"]["fab-include"]} == PACKAGES


def test_no_other_distribution_provides_a_package_of_our_names() -> None:
    installed = packages_distributions()
    assert [other for name in PACKAGES for other in installed.get(name, ()) if other != "umbel"] == []
