"""MNIST: splits on small made idx files, always; counts on the real ones, where they are; the paper's model sizes."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from privacy.refused import Refused
from scenarios import Federation, build_model, mnist
from scenarios.settings import Settings, override


def write(folder: Path, part: str, images: np.ndarray, digits: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", digits)):
        head = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes(), 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """1,600 training images, each of which carries its number in its first two pixels and its digit in the third."""
    root = tmp_path_factory.mktemp("data")
    for part, count in (("train", 1600), ("t10k", 50)):
        images = np.zeros((count, 28, 28), np.uint8)
        number = np.arange(count)
        digits = (number * 7 % 10).astype(np.uint8)
        images[:, 0, 0], images[:, 0, 1], images[:, 0, 2], images[:, 0, 3] = number // 256, number % 256, digits, 255
        write(root / "mnist", part, images, digits)
    return override(mnist.SCENARIO.settings, f"run.data={root} fleet.clients=6")


def numbers(x: torch.Tensor) -> list[int]:
    pixels = (x[:, 0, 0, :2] * 255).round().long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


@pytest.mark.parametrize("how", ["iid", "shards:2", "dirichlet:0.5"])
def test_clients_and_validation_share_the_training_images_without_overlap(made: Settings, how: str) -> None:
    federation = mnist.data(override(made, f"partition={how}"))
    assert len(federation.sizes) == 6
    everyone = [federation.client(name) for name in federation.sizes]
    assert [len(part.y) for part in everyone] == list(federation.sizes.values())
    given = [number for part in [*everyone, federation.validation] for number in numbers(part.x)]
    assert sorted(given) == list(range(1600))
    assert len(federation.validation.y) == 1000
    assert len(federation.test.y) == 50


def test_pixels_lie_between_0_and_1_and_labels_stay_with_their_images(made: Settings) -> None:
    federation = mnist.data(made)
    for x, y in (federation.client("client-3"), federation.validation, federation.test):
        assert (x.dtype, y.dtype, tuple(x.shape[1:])) == (torch.float32, torch.int64, (1, 28, 28))
        assert float(x.min()) == 0
        assert float(x.max()) == 1
        assert (x[:, 0, 0, 2] * 255).round().long().tolist() == y.tolist()


def test_two_shards_a_client_are_few_digits(made: Settings) -> None:
    federation = mnist.data(override(made, "partition=shards:2"))
    kinds = [len(federation.client(name).y.unique()) for name in federation.sizes]
    assert max(kinds) <= 4  # two shards of 50 among ten digits of about 60: each crosses at most one border
    assert min(len(mnist.data(made).client(name).y.unique()) for name in federation.sizes) == 10


def test_the_split_follows_the_seed(made: Settings) -> None:
    first, again, other = (numbers(mnist.data(override(made, f"run.seed={s}")).validation.x) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_models_have_the_sizes_of_the_paper(made: Settings) -> None:
    x = mnist.data(made).test.x[:3]
    for name, parameters in {"2nn": 199_210, "cnn": 1_663_370}.items():
        model = build_model(mnist.SCENARIO, override(made, f"model={name}"))
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert model(x).shape == (3, 10)


def test_files_that_are_not_mnist_are_refused(tmp_path: Path) -> None:
    images, digits = np.zeros((1200, 28, 28), np.uint8), np.zeros(1200, np.uint8)
    settings = override(mnist.SCENARIO.settings, f"run.data={tmp_path} fleet.clients=2")
    write(tmp_path / "mnist", "t10k", images[:5], digits[:5])
    for bad_images, bad_digits, reason in (
        (images[:, :27], digits, "that is not MNIST"),
        (images, digits[:-1], "that is not MNIST"),
        (images, digits + np.uint8(10), "that is not MNIST"),
        (images[:0], digits[:0], "holds 0 training images"),
        (images[:1000], digits[:1000], "holds 1000 training images"),
    ):
        write(tmp_path / "mnist", "train", bad_images, bad_digits)
        with pytest.raises(Refused, match=reason):
            mnist.data(settings)
    write(tmp_path / "mnist", "train", images, digits)
    assert set(mnist.data(settings).sizes.values()) == {100}
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(Refused, match=r"mnist/t10k-labels-idx1-ubyte .*umbel data get mnist"):
        mnist.data(settings)


@pytest.fixture(scope="module")
def real() -> Federation:
    root = os.environ.get("UMBEL_DATA", "")
    if not (Path(root) / "mnist").is_dir():
        pytest.skip("UMBEL_DATA does not name a folder that holds mnist/")
    return mnist.data(override(mnist.SCENARIO.settings, f"run.data={root} partition=shards:2"))


def test_the_real_files_give_100_clients_of_590(real: Federation) -> None:
    assert set(real.sizes.values()) == {590}
    assert len(real.sizes) == 100
    assert (len(real.validation.y), len(real.test.y)) == (1000, 10_000)
    assert torch.bincount(real.test.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert float(real.test.x.mean()) == pytest.approx(0.1325, abs=1e-4)
    assert max(len(real.client(name).y.unique()) for name in list(real.sizes)[:20]) <= 4
