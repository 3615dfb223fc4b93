"""Shipping: every variant is written, checked and measured, and one is chosen by a rule that says why others lost."""

import json
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_export import Variant, bundle, ship
from edge_export.infer import classes, logits, open_model
from edge_export.measure import TURNS
from edge_export.prune import macs, prune
from privacy.refused import Refused
from scenarios import Examples

ALL = ["unpruned-fp32", "unpruned-int8", "pruned-fp32", "pruned-int8"]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, blobs, trained):
    """(run folder, variants by name, what progress heard) of one export with everything in it."""
    folder = tmp_path_factory.mktemp("run")
    validation, said = blobs(90, 2), []
    small, _ = prune(trained, validation.x[:1], 0.5)
    variants = ship(
        folder,
        {"unpruned": trained, "pruned": small},
        validation=validation,
        test=blobs(200, 3),
        tolerance=0.02,
        classes=("red", "green", "blue"),
        progress=said.append,
    )
    return folder, {v.name: v for v in variants}, said


def test_every_variant_is_a_file_of_the_size_it_says_and_nothing_else_is_left(shipped):
    folder, variants, _ = shipped
    assert list(variants) == ALL
    assert sorted(p.name for p in (folder / "edge").iterdir()) == sorted(f"{name}.onnx" for name in ALL)
    assert sorted(p.name for p in folder.iterdir()) == ["edge", "model.onnx"]
    for variant in variants.values():
        assert (folder / variant.file).stat().st_size == variant.bytes


def test_exactly_one_is_chosen_and_is_model_onnx(shipped):
    folder, variants, _ = shipped
    (chosen,) = [v for v in variants.values() if v.chosen]
    assert (folder / "model.onnx").read_bytes() == (folder / chosen.file).read_bytes()
    assert all(v.reason for v in variants.values())


def test_the_numbers_of_a_variant_are_those_of_its_file(shipped, blobs, trained):
    folder, variants, _ = shipped
    test, validation = blobs(200, 3), blobs(90, 2)
    for variant in variants.values():
        session = open_model((folder / variant.file).read_bytes())
        for examples, said in ((test, variant.accuracy), (validation, variant.validation_accuracy)):
            assert said == np.mean(classes(logits(session, examples.x.numpy())) == examples.y.numpy())
        assert variant.latency_us > 0
        assert variant.load_ms > 0
    assert variants["unpruned-fp32"].max_abs_diff <= 1e-4 < variants["unpruned-int8"].max_abs_diff
    assert variants["unpruned-fp32"].macs == 16 * 32 + 32 * 3 == 2 * variants["pruned-int8"].macs
    assert variants["unpruned-fp32"].macs == macs(trained, validation.x[:1])
    assert 0.8 < variants["unpruned-fp32"].accuracy != variants["unpruned-fp32"].validation_accuracy


def test_the_model_carries_shape_classes_and_meaning_and_the_whole_is_json(shipped):
    folder, variants, said = shipped
    for variant in variants.values():
        entries = {e.key: e.value for e in onnx.load(folder / variant.file).metadata_props}
        assert json.loads(entries.pop("umbel.classes")) == ["red", "green", "blue"]
        assert json.loads(entries.pop("umbel.input")) == ["N", 16]
        assert entries == {"umbel.version": "1", "umbel.output": "logits of classes"}
    assert json.loads(json.dumps([asdict(v) for v in variants.values()]))[0]["name"] == "unpruned-fp32"
    assert [line.split()[-1] for line in said] == [*ALL, "latency"]


def test_shipping_again_writes_the_same_bytes_and_clears_what_is_gone(shipped, tmp_path, blobs, trained):
    folder, _, _ = shipped
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "pruned-fp32.onnx").write_bytes(b"of an earlier export")
    variants = ship(
        tmp_path,
        {"unpruned": trained},
        validation=blobs(90, 2),
        test=None,
        tolerance=0.02,
        classes=("red", "green", "blue"),
        skipped={"pruned": "there is nothing to prune"},
    )
    assert variants[2:] == [
        Variant("pruned-fp32", reason="there is nothing to prune"),
        Variant("pruned-int8", reason="there is nothing to prune"),
    ]
    assert all(v.accuracy == v.validation_accuracy for v in variants)
    assert sorted(p.name for p in (tmp_path / "edge").iterdir()) == ["unpruned-fp32.onnx", "unpruned-int8.onnx"]
    for path in (tmp_path / "edge").iterdir():
        assert path.read_bytes() == (folder / "edge" / path.name).read_bytes()


def test_a_model_whose_logits_differ_is_not_shipped_and_leaves_no_model(tmp_path, blobs, trained):
    (tmp_path / "model.onnx").write_bytes(b"of an earlier export")
    large = nn.Sequential(*trained, nn.Linear(3, 3))
    with torch.no_grad():
        large[-1].weight.copy_(torch.full((3, 3), 1e5) + torch.eye(3))  # rounding alone differs by more than 1e-4
    fp32, int8 = ship(tmp_path, {"unpruned": large}, validation=blobs(90, 2), test=None, tolerance=0.02)
    assert fp32.max_abs_diff > 1e-4
    assert fp32 == Variant("unpruned-fp32", max_abs_diff=fp32.max_abs_diff, reason=fp32.reason)
    assert fp32.reason.startswith("its logits differ from torch's by ")
    assert fp32.reason.endswith(", more than the 1e-04 allowed")
    assert int8 == Variant("unpruned-int8", reason="needs unpruned-fp32, which failed")
    assert list((tmp_path / "edge").iterdir()) == []
    assert not (tmp_path / "model.onnx").exists()


class _Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] if x.sum() > 0 else -x[:, :3]


def test_a_candidate_that_cannot_be_exported_costs_only_itself(tmp_path, blobs, trained):
    variants = ship(
        tmp_path, {"unpruned": trained, "pruned": _Branch()}, validation=blobs(90, 2), test=None, tolerance=0.02
    )
    assert [v.file is None for v in variants] == [False, False, True, True]
    assert variants[2].reason.startswith("torch cannot export _Branch to ONNX: ")
    assert any(v.chosen for v in variants[:2])


def test_a_write_that_fails_leaves_the_earlier_model_whole(tmp_path, blobs, trained, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"of an earlier export")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ship(tmp_path, {"unpruned": trained}, validation=blobs(90, 2), test=None, tolerance=0.02)
    assert (tmp_path / "model.onnx").read_bytes() == b"of an earlier export"
    assert list((tmp_path / "edge").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: Examples(e.x[:0], e.y[:0]), "the validation part has 0 inputs and 0 labels"),
        (lambda e: Examples(e.x, e.y[:5]), "the validation part has 90 inputs and 5 labels"),
        (lambda e: Examples(e.x.double(), e.y), "the validation inputs are not finite float32"),
        (lambda e: Examples(e.x / 0, e.y), "the validation inputs are not finite float32"),
    ],
)
def test_a_validation_part_that_cannot_check_is_refused_before_anything_is_written(
    tmp_path, blobs, trained, change, message
):
    with pytest.raises(Refused, match=message):
        ship(tmp_path, {"unpruned": trained}, validation=change(blobs(90, 2)), test=None, tolerance=0.02)
    assert list(tmp_path.iterdir()) == []


def _variant(name: str, size: int, accuracy: float) -> Variant:
    return Variant(name, f"edge/{name}.onnx", size, validation_accuracy=accuracy)


def _choose(rows: dict[str, tuple[int, float, float]], tolerance: float = 0.02) -> dict[str, Variant]:
    """rows: name -> (bytes, validation accuracy, microseconds); the reference has accuracy 0.95."""
    turns = {name: np.full(TURNS, microseconds) for name, (_, _, microseconds) in rows.items()}
    variants = [_variant(name, size, accuracy) for name, (size, accuracy, _) in rows.items()]
    chosen = bundle.choose(variants, turns, 0.95, tolerance)
    assert [replace(v, chosen=False, reason="") for v in chosen] == variants
    return {v.name: v for v in chosen}


def test_the_fastest_within_the_tolerance_wins_and_losers_say_why():
    found = _choose({"a": (4000, 0.95, 40.0), "b": (1000, 0.919, 10.0), "c": (2000, 0.935, 20.0)})
    assert [name for name, v in found.items() if v.chosen] == ["c"]
    assert found["a"].reason == "2.00x slower than c"
    assert found["b"].reason == "loses 3.1 points of validation accuracy, more than the 2.0 allowed"
    assert found["c"].reason == "the fastest within the tolerance"


def test_within_noise_of_the_fastest_the_smaller_file_wins():
    found = _choose({"a": (4000, 0.95, 10.0), "b": (1000, 0.95, 10.4), "c": (500, 0.95, 10.6)})
    assert [name for name, v in found.items() if v.chosen] == ["b"]
    assert found["a"].reason == "no faster than b beyond measurement noise, and 4.00x larger"
    assert found["b"].reason == "the smallest of those that are as fast as a within measurement noise"
    assert found["c"].reason == "1.06x slower than a"


def test_a_loss_of_exactly_the_tolerance_is_allowed():
    found = _choose({"a": (4000, 0.95, 20.0), "b": (1000, 0.93, 10.0)})
    assert found["b"].chosen


def test_where_none_is_good_enough_none_is_chosen():
    found = _choose({"a": (4000, 0.5, 20.0)})
    assert not found["a"].chosen
    assert found["a"].reason == "loses 45.0 points of validation accuracy, more than the 2.0 allowed"
