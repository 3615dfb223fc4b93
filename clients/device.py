"""What a client's device can do: drawn from a profile in simulation, measured by the device itself in deployment."""

import math
import os
import time
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clients.task import Device
from privacy.refused import Refused
from scenarios.seeds import derive

# Orders of magnitude for training a small model: a hospital server, a factory gateway, a Raspberry Pi on a mobile link.
PROFILES: dict[str, list[dict[str, Any]]] = {
    "equal": [],
    "edge": [
        {"name": "server", "share": 0.2, "speed": 4000, "down": 10e6, "up": 5e6, "memory_mb": 8192},
        {
            "name": "gateway",
            "share": 0.4,
            "speed": 800,
            "down": 2e6,
            "up": 1e6,
            "memory_mb": 1024,
            "availability": 0.95,
        },
        {"name": "pi", "share": 0.4, "speed": 150, "down": 400e3, "up": 100e3, "memory_mb": 256, "availability": 0.85},
    ],
}
_KEYS = {"name", "share", "speed", "down", "up", "memory_mb", "availability", "spread"}


def profile(name: str) -> list[dict[str, Any]]:
    """The device classes of a profile: a bundled name, or a TOML file of [[device]] tables.

    Keys: share (of the fleet), speed (examples a second), down and up (bytes a second), memory_mb, availability
    (0 to 1), spread (standard deviation of log speed and log link, default 0.3). Raises Refused when it does not fit.
    """
    if name in PROFILES:
        return PROFILES[name]
    try:
        classes = tomllib.loads(Path(name).read_text())["device"]
        for device in classes:
            if unknown := set(device) - _KEYS:
                raise Refused(
                    f"fleet profile {name}: unknown key {min(unknown)!r}, known are {', '.join(sorted(_KEYS))}"
                )
            numbers = {key: float(value) for key, value in device.items() if key != "name"}
            if not all(math.isfinite(v) and v >= 0 for v in numbers.values()) or numbers.get("availability", 1) > 1:
                raise Refused(f"fleet profile {name}: a device's numbers must be at least 0, availability at most 1")
        if not classes or sum(float(device.get("share", 1)) for device in classes) <= 0:
            raise Refused(f"fleet profile {name}: the shares of its devices sum to 0")
    except OSError:
        raise Refused(
            f"there is no fleet profile {name!r}: choose {', '.join(PROFILES)}, or give a TOML file"
        ) from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"fleet profile {name} does not read ({error}): it needs [[device]] tables, see docs") from None
    return classes  # type: ignore[no-any-return]


def draw(name: str, client: str, seed: int) -> Device:
    """The device of `client` under profile `name`, the same for the same seed."""
    classes = profile(name)
    if not classes:
        return Device()
    rng = np.random.default_rng(derive(seed, "device", client))
    shares = np.array([float(device.get("share", 1)) for device in classes])
    chosen = classes[int(rng.choice(len(classes), p=shares / shares.sum()))]
    speed, link = np.exp(rng.normal(0, float(chosen.get("spread", 0.3)), 2))
    return Device(
        speed=float(chosen.get("speed", 0) * speed),
        down=float(chosen.get("down", 0) * link),
        up=float(chosen.get("up", 0) * link),
        memory=int(float(chosen.get("memory_mb", 0)) * 2**20),
        availability=float(chosen.get("availability", 1)),
    )


def said(config: Mapping[str, Any]) -> Device:
    """What a device's owner says of it in the node config: down and up (bytes a second), memory-mb. Raises Refused."""
    try:
        down, up, memory = (float(config.get(key, 0)) for key in ("down", "up", "memory-mb"))
    except (TypeError, ValueError):
        raise Refused("down, up and memory-mb of the node config must be numbers") from None
    if not all(math.isfinite(value) and value >= 0 for value in (down, up, memory)):
        raise Refused("down, up and memory-mb of the node config must be at least 0")
    return Device(down=down, up=up, memory=int(memory * 2**20))


def measure(model: nn.Module, x: torch.Tensor, said: Device = Device(), seconds: float = 0.2) -> Device:
    """This device as it is: examples a second through `model` (forward, backward) on `x` (N, ...), and free memory.

    said: what its owner says of its link, which is not measured, and of the memory it may use at most.
    """
    model.train()
    done, began = 0, time.monotonic()
    while (spent := time.monotonic() - began) < seconds:
        model.zero_grad()
        torch.autograd.backward(model(x).square().mean())
        done += len(x)
    model.zero_grad()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return replace(said, speed=done / spent, memory=min(free, said.memory or free))


def transfer_seconds(device: Device, bytes_down: int, bytes_up: int) -> float:
    """Seconds on the link for one round's weights down and update up; a link of 0 takes no time."""
    down = bytes_down / device.down if device.down else 0.0
    return down + (bytes_up / device.up if device.up else 0.0)


def step_seconds(device: Device, batch: float) -> float:
    """Seconds of one local step over `batch` examples; a speed of 0 takes no time."""
    return batch / device.speed if device.speed else 0.0
