"""What is learned: scenarios, one file each, and their settings; lazy, so that what needs settings loads no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarios.contract import Examples, Federation, Gathered, Scenario, build_model, load, names, predict

__all__ = ["Examples", "Federation", "Gathered", "Scenario", "build_model", "load", "names", "predict"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scenarios import contract

    return getattr(contract, name)
