"""From trained models to the run's edge models: every variant exported, checked and measured, the best one chosen.

The rule: of the variants that lose at most `tolerance` of the unpruned fp32 model's validation accuracy, the fastest;
where others are as fast within measurement noise, the smallest file of them. The test set has no say.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from edge_export import check, infer, measure
from edge_export.measure import Turns
from edge_export.prune import macs
from edge_export.quantize import quantize
from edge_export.to_onnx import describe, export
from privacy.refused import Refused
from scenarios import Examples

CHOSEN = "model.onnx"
_ROUNDING = 1e-9  # accuracies are rounded quotients


@dataclass(frozen=True)
class Variant:
    """One edge model of a run. Where it was left out or failed, `reason` says why and what was not measured is None."""

    name: str
    file: str | None = None
    """Relative to the run folder."""
    bytes: int | None = None
    latency_us: float | None = None
    """p50 of a call at batch 1 on one thread."""
    load_ms: float | None = None
    accuracy: float | None = None
    """On the test set; on the validation part where the server has no test set."""
    validation_accuracy: float | None = None
    max_abs_diff: float | None = None
    """Of the logits from those of the torch model, over the validation part."""
    macs: int | None = None
    """Multiply-accumulates of one example."""
    chosen: bool = False
    reason: str = ""


@dataclass(frozen=True)
class _Built:
    """A variant that passed its checks."""

    variant: Variant
    data: bytes
    session: onnxruntime.InferenceSession


@dataclass(frozen=True)
class _Held:
    """What the server holds for checking, and what is written into every model."""

    validation: Examples
    test: Examples | None
    metadata: Mapping[str, str]


def ship(
    folder: Path,
    candidates: Mapping[str, nn.Module],
    *,
    validation: Examples,
    test: Examples | None,
    tolerance: float,
    classes: tuple[str, ...] = (),
    skipped: Mapping[str, str] = {},
    progress: Callable[[str], None] = lambda _: None,
) -> list[Variant]:
    """Write edge/NAME-fp32.onnx and edge/NAME-int8.onnx for each candidate, and the best of them as model.onnx.

    folder: the run folder. candidates: the first is the reference for accuracy. skipped: candidates that are left out
    -> the reason. tolerance: share of validation accuracy that may be lost. progress hears what is being done.
    Returns every variant, shipped or not. If none passes its checks, none is chosen and there is no model.onnx.
    Raises Refused, before anything is written, when the validation part or the class names do not fit the models.
    """
    reference = _outputs(next(iter(candidates.values())), validation)
    held = _Held(validation, test, describe(validation.x[:1], reference.shape[1], classes))
    results: dict[str, _Built | Variant] = {}
    for name in dict.fromkeys([*candidates, *skipped]):
        if name in skipped:
            results |= {n: Variant(n, reason=skipped[name]) for n in (f"{name}-fp32", f"{name}-int8")}
        else:
            results |= {_name(result): result for result in _build(name, candidates[name], held, progress)}
    built = {name: result for name, result in results.items() if isinstance(result, _Built)}
    progress("measuring latency")
    turns = measure.latencies({name: one.session for name, one in built.items()}, validation.x[:1].numpy())
    measured = [
        replace(one.variant, latency_us=measure.p50(turns[name]), load_ms=measure.load_ms(one.data))
        for name, one in built.items()
    ]
    ranked = {v.name: v for v in choose(measured, turns, check.right(reference, validation.y), tolerance)}
    _write(folder, {variant: built[name].data for name, variant in ranked.items()})
    return [ranked[name] if isinstance(result, _Built) else result for name, result in results.items()]


def choose(variants: list[Variant], turns: Mapping[str, Turns], reference: float, tolerance: float) -> list[Variant]:
    """The variants with the best one chosen by the rule above, and the reason why each other one lost.

    turns: of each variant by name. reference: validation accuracy of the model that may not be undercut by more than
    `tolerance`.
    """
    lost = {v.name: reference - (v.validation_accuracy or 0.0) for v in variants}
    fit = [v for v in variants if lost[v.name] <= tolerance + _ROUNDING]
    if not fit:
        return [replace(v, reason=_too_wrong(lost[v.name], tolerance)) for v in variants]
    fastest = min(fit, key=lambda v: (measure.p50(turns[v.name]), v.name))
    equal = [v for v in fit if not measure.slower(turns[v.name], turns[fastest.name])]
    best = min(equal, key=lambda v: (v.bytes or 0, v.name))

    def reason(v: Variant) -> str:
        if v is best and v is fastest:
            return (
                "the fastest within the tolerance" if len(equal) == 1 else "the fastest, and the smallest of its like"
            )
        if v is best:
            return f"the smallest of those that are as fast as {fastest.name} within measurement noise"
        if v not in fit:
            return _too_wrong(lost[v.name], tolerance)
        if v not in equal:
            factor = measure.p50(turns[v.name]) / measure.p50(turns[fastest.name])
            return f"{factor:.2f}x slower than {fastest.name}"
        return (
            f"no faster than {best.name} beyond measurement noise, and {(v.bytes or 0) / (best.bytes or 1):.2f}x larger"
        )

    return [replace(v, chosen=v is best, reason=reason(v)) for v in variants]


def _too_wrong(lost: float, tolerance: float) -> str:
    return f"loses {100 * lost:.1f} points of validation accuracy, more than the {100 * tolerance:.1f} allowed"


def _outputs(model: nn.Module, validation: Examples) -> Tensor:
    """The reference's outputs (N, K). Raises Refused unless the validation part can calibrate and check."""
    x, y = validation
    if len(x) == 0 or len(x) != len(y):
        raise Refused(f"the validation part has {len(x)} inputs and {len(y)} labels: edge models need some of both")
    if x.dtype != torch.float32 or not x.isfinite().all():
        raise Refused("the validation inputs are not finite float32: mend the scenario's data")
    outputs = check.torch_logits(model, x)
    if outputs.ndim != 2 or outputs.dtype != torch.float32:
        raise Refused(
            f"the model answers {outputs.dtype} {tuple(outputs.shape)}: edge models answer float32 (N, classes)"
        )
    return outputs


def _build(name: str, model: nn.Module, held: _Held, progress: Callable[[str], None]) -> list[_Built | Variant]:
    """The fp32 and the int8 variant of one candidate, checked; what fails comes back as a Variant with the reason."""
    names = f"{name}-fp32", f"{name}-int8"
    try:
        progress(f"exporting {names[0]}")
        graph = export(model, held.validation.x[:1], held.metadata)
        fp32 = _checked(names[0], graph, model, held)
    except (Refused, infer.Unusable) as error:
        return [Variant(names[0], reason=str(error)), Variant(names[1], reason=f"needs {names[0]}, which failed")]
    difference = fp32.variant.max_abs_diff
    assert difference is not None
    if difference > check.ALLOWED:
        reason = f"its logits differ from torch's by {difference:.1e}, more than the {check.ALLOWED:.0e} allowed"
        wrong = Variant(names[0], max_abs_diff=difference, reason=reason)
        return [wrong, Variant(names[1], reason=f"needs {names[0]}, which failed")]
    try:
        progress(f"quantizing {names[1]}")
        return [fp32, _checked(names[1], quantize(graph, held.validation.x.numpy()), model, held)]
    except (Refused, infer.Unusable) as error:
        return [fp32, Variant(names[1], reason=str(error))]


def _checked(name: str, graph: onnx.ModelProto, model: nn.Module, held: _Held) -> _Built:
    data = graph.SerializeToString(deterministic=True)
    session = infer.open_model(data, name)
    on_validation = check.accuracy(session, held.validation)
    variant = Variant(
        name,
        file=f"edge/{name}.onnx",
        bytes=len(data),
        accuracy=on_validation if held.test is None else check.accuracy(session, held.test),
        validation_accuracy=on_validation,
        max_abs_diff=check.max_abs_diff(session, model, held.validation.x),
        macs=macs(model, held.validation.x[:1]),
    )
    return _Built(variant, data, session)


def _name(result: _Built | Variant) -> str:
    return result.name if isinstance(result, Variant) else result.variant.name


def _write(folder: Path, models: Mapping[Variant, bytes]) -> None:
    """The files of `models` and no others from an earlier export; each appears whole, model.onnx last."""
    edge = folder / "edge"
    edge.mkdir(parents=True, exist_ok=True)
    files = {folder / variant.file: data for variant, data in models.items() if variant.file}
    for path, data in files.items():
        _replace(path, data)
    for stale in set(edge.glob("*.onnx")) - set(files):
        stale.unlink()
    chosen = [data for variant, data in models.items() if variant.chosen]
    if chosen:
        _replace(folder / CHOSEN, chosen[0])
    else:
        (folder / CHOSEN).unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
