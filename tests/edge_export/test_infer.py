"""On the device: numpy and onnxruntime suffice, answers are right, and every wrong input gives one line and exit 2."""

import importlib.util
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_export.infer import main

NEEDED = ["numpy", "numpy.libs", "onnxruntime", "flatbuffers", "packaging"]
"""numpy, onnxruntime, and what onnxruntime itself imports."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder to import from that holds edge_export, numpy, onnxruntime and its needs, and nothing else."""
    folder = tmp_path_factory.mktemp("device")
    for name in NEEDED:
        for where in (importlib.util.find_spec("numpy").origin, importlib.util.find_spec("onnxruntime").origin):
            source = Path(where).parents[1] / name
            if source.exists() and not (folder / name).exists():
                (folder / name).symlink_to(source)
    (folder / "edge_export").symlink_to(Path(__file__).parents[2] / "edge_export")
    return folder


def _bare_python(folder: Path, code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); " + code
    return subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", start, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
        check=False,
    )


@pytest.fixture
def model(tmp_path, exported):
    """(model.onnx, input.npy, the classes and logits that torch gives)."""
    torch_model, x, graph = exported("cnn")
    onnx.save(graph, tmp_path / "model.onnx")
    np.save(tmp_path / "input.npy", x.numpy())
    expected = torch_model(x).detach().numpy()
    return tmp_path / "model.onnx", tmp_path / "input.npy", expected


@pytest.mark.parametrize("absent", ["torch", "onnx", "flwr", "privacy", "scenarios", "sklearn"])
def test_the_bare_environment_is_bare(bare, tmp_path, absent):
    ran = _bare_python(bare, f"import {absent}", cwd=tmp_path)
    assert ran.returncode == 1
    assert f"ModuleNotFoundError: No module named '{absent}'" in ran.stderr


def test_it_runs_with_numpy_and_onnxruntime_alone(bare, tmp_path, model):
    path, given, expected = model
    code = "import runpy; runpy.run_module('edge_export.infer', run_name='__main__', alter_sys=True)"
    ran = _bare_python(bare, code, path, given, "--out", tmp_path / "logits.npy", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [int(line) for line in ran.stdout.splitlines()] == expected.argmax(1).tolist()
    saved = np.load(tmp_path / "logits.npy")
    assert saved.dtype == np.float32
    assert np.abs(saved - expected).max() < 1e-5


def test_the_package_itself_imports_nothing_until_asked(bare, tmp_path):
    assert _bare_python(bare, "import edge_export", cwd=tmp_path).returncode == 0
    ran = _bare_python(bare, "import edge_export; edge_export.ship", cwd=tmp_path)
    assert "ModuleNotFoundError" in ran.stderr


def test_more_rows_than_a_batch_come_out_in_order(tmp_path, exported, capsys):
    torch_model, _, graph = exported("mlp")
    onnx.save(graph, tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(700, 64)).astype(np.float32)
    np.save(tmp_path / "input.npy", np.asfortranarray(x))
    assert main([str(tmp_path / "model.onnx"), str(tmp_path / "input.npy")]) == 0
    expected = torch_model(torch_model[0].weight.new_tensor(x)).argmax(1).tolist()
    assert [int(line) for line in capsys.readouterr().out.splitlines()] == expected


def _graph(operator: str, columns: int, weights: list[TensorProto] = (), kind: int = TensorProto.FLOAT) -> bytes:
    """A model of one operator from (N, 64) to (N, columns)."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["input", *(w.name for w in weights)], ["logits"])],
        "one",
        [helper.make_tensor_value_info("input", kind, ["N", 64])],
        [helper.make_tensor_value_info("logits", kind, ["N", columns])],
        weights,
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def test_one_output_column_is_the_logit_of_class_1(tmp_path, capsys):
    weight = onnx.numpy_helper.from_array(np.eye(64, 1, dtype=np.float32), "w")
    (tmp_path / "model.onnx").write_bytes(_graph("MatMul", 1, [weight]))
    x = np.zeros((4, 64), np.float32)
    x[:, 0] = [-1.0, 0.5, 0.0, 3.0]
    np.save(tmp_path / "input.npy", x)
    assert main([str(tmp_path / "model.onnx"), str(tmp_path / "input.npy")]) == 0
    assert capsys.readouterr().out == "0\n1\n0\n1\n"


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "{}/weights.bin", "sub/../../weights.bin"])
def test_weights_beside_the_current_directory_are_never_loaded(tmp_path, monkeypatch, capsys, location):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    for folder in (here, tmp_path):
        np.ones((64, 64), np.float32).tofile(folder / "weights.bin")
    weight = TensorProto(name="w", data_type=1, dims=[64, 64], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location.format(here))
    weight.external_data.add(key="length", value=str(64 * 64 * 4))
    Path("model.onnx").write_bytes(_graph("MatMul", 64, [weight]))
    np.save("input.npy", np.ones((3, 64), np.float32))
    assert main(["model.onnx", "input.npy", "--out", "logits.npy"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("model.onnx is not an ONNX model that runs here: ")
    assert said.err.count("\n") == 1
    assert not Path("logits.npy").exists()


GOOD = np.ones((3, 64), np.float32)


def _npy(x: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, x)
    return file.getvalue()


def _archive() -> bytes:
    file = BytesIO()
    np.savez(file, x=GOOD)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is no whole .npy file"),
        (b"no array at all", "is no whole .npy file"),
        (_npy(GOOD)[:-1], "is no whole .npy file"),
        (_npy(GOOD).replace(b"(3, 64)", b"(9**9,)"), "is no whole .npy file"),
        (_npy(GOOD).replace(b"(3, 64), }           ", b"(99999999999, 64), } "), "is no whole .npy file"),
        (_archive(), "is no whole .npy file"),
        (_npy(np.array([[{}] * 64], dtype=object)), "is no whole .npy file"),
        (_npy(GOOD.astype(np.float64)), "holds float64, but the model takes float32"),
        (_npy(GOOD.astype(">f4")), "holds >f4, but the model takes float32"),
        (_npy(GOOD[:, :63]), "has shape (3, 63), but the model takes (N, 64)"),
        (_npy(GOOD[0]), "has shape (64,), but the model takes (N, 64)"),
        (_npy(GOOD[:0]), "holds no examples"),
        (_npy(GOOD * np.nan), "holds values that are not finite"),
        (_npy(GOOD * np.inf), "holds values that are not finite"),
    ],
)
def test_a_wrong_input_file_gives_one_line_and_exit_code_2(tmp_path, capsys, content, message):
    (tmp_path / "model.onnx").write_bytes(_graph("Relu", 64))
    given, out = tmp_path / "input.npy", tmp_path / "logits.npy"
    if content is not None:
        given.write_bytes(content)
    assert main([str(tmp_path / "model.onnx"), str(given), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{given} {message}")
    assert said.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is not an ONNX model that runs here"),
        (b"no model at all", "is not an ONNX model that runs here"),
        (_npy(GOOD), "is not an ONNX model that runs here"),
        (_graph("Relu", 64)[:-9], "is not an ONNX model that runs here"),
        (_graph("NoSuchOperator", 64), "is not an ONNX model that runs here"),
        (_graph("Relu", 64, kind=TensorProto.DOUBLE), "must have one float32 input and one float32 output"),
    ],
)
def test_a_wrong_model_gives_one_line_and_exit_code_2(tmp_path, capfd, content, message):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    np.save(tmp_path / "input.npy", GOOD)
    assert main([str(path), str(tmp_path / "input.npy")]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{path} {message}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("out", ["no/such/folder/logits.npy", "."])
def test_an_output_that_cannot_be_written_gives_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(_graph("Relu", 64))
    np.save("input.npy", GOOD)
    assert main(["model.onnx", "input.npy", "--out", out]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert f"{Path(out)} cannot be written: " in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.npy", "model.onnx"]
