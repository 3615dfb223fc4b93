"""From trained weights to a small, verified ONNX model; lazy, so that a device needs neither torch nor onnx."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_export.bundle import Variant, ship

__all__ = ["Variant", "ship"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edge_export import bundle

    return getattr(bundle, name)
