"""Devices: drawn the same from the same seed, read from a file, refused when the file makes no sense."""

from pathlib import Path

import pytest
import torch
from torch import nn

from clients.device import draw, measure, profile, said, step_seconds, transfer_seconds
from clients.task import Device
from privacy.refused import Refused


def test_the_profile_equal_has_no_limits() -> None:
    assert draw("equal", "client-1", 0) == Device()


def test_the_edge_profile_gives_clients_different_devices_and_the_same_ones_again() -> None:
    drawn = [draw("edge", f"client-{i}", 3) for i in range(40)]
    assert drawn == [draw("edge", f"client-{i}", 3) for i in range(40)]
    assert len({device.speed for device in drawn}) == 40
    assert max(d.speed for d in drawn) > 5 * min(d.speed for d in drawn)


def test_a_profile_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text('[[device]]\nname = "pi"\nspeed = 100\nspread = 0\nmemory_mb = 1\navailability = 0.5\n')
    assert draw(str(file), "a", 0) == Device(speed=100.0, memory=2**20, availability=0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "device = 3",
        "[[device]]\nspeeed = 3",
        "[[device]]\nspeed = -3",
        "[[device]]\nspeed = nan",
        "[[device]]\navailability = 2",
        "[[device]]\nshare = 0",
        '[[device]]\nspeed = "fast"',
        "[[device]\n",
    ],
)
def test_a_profile_that_makes_no_sense_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    with pytest.raises(Refused) as caught:
        profile(str(file))
    assert "fleet.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_names_those_that_exist() -> None:
    with pytest.raises(Refused, match="equal, edge"):
        profile("no-such")


def test_links_and_steps_take_time_in_proportion() -> None:
    device = Device(speed=100, down=1000, up=500)
    assert transfer_seconds(device, 2000, 1000) == pytest.approx(4)
    assert step_seconds(device, 50) == pytest.approx(0.5)
    assert transfer_seconds(Device(), 10**9, 10**9) == step_seconds(Device(), 10**9) == 0


def test_a_device_says_what_its_owner_said_of_link_and_memory() -> None:
    owner = said({"client": "a", "down": 1000, "up": "500", "memory-mb": 2})
    found = measure(nn.Linear(6, 3), torch.randn(8, 6), owner, seconds=0.02)
    assert (found.down, found.up, found.memory) == (1000.0, 500.0, 2 * 2**20)
    assert found.speed > 0
    assert said({"client": "a"}) == Device()


@pytest.mark.parametrize("config", [{"down": "fast"}, {"up": -1}, {"memory-mb": float("nan")}, {"down": [1]}])
def test_a_device_whose_owner_says_nonsense_is_refused_in_one_line(config: dict[str, object]) -> None:
    with pytest.raises(Refused, match="node config"):
        said(config)


def test_a_device_measures_itself() -> None:
    found = measure(nn.Linear(6, 3), torch.randn(8, 6), seconds=0.02)
    assert found.speed > 0
    assert found.memory > 2**20
