"""The node of a key holder, which is no client: what its owner's config makes of it, and what it answers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clients.masking import read_peers
from clients.task import KeyNode
from privacy import holder
from privacy.cohort_noise import CohortNoise
from privacy.keyholder import KeyHolder
from privacy.refused import Refused

Config = Mapping[str, Any]


def hello(config: Config) -> KeyNode:
    """What it says at first."""
    with _keyholder(config) as mine:
        return KeyNode(mine.identity.hex())


def answer(config: Config, request: bytes) -> bytes:
    """Deal the keys of a run or open one of its sums, as the server's request asks."""
    with _keyholder(config) as mine:
        return holder.answer(mine, request, _noise(config), config.get("seeded") is True)


@contextmanager
def _keyholder(config: Config) -> Iterator[KeyHolder]:
    """The key holder that this node is, as its owner has it: `keys`, `clients`, `minimum`, `cohort` in its config."""
    if "keys" not in config:
        raise Refused("this node is no key holder: `umbel keyholder` starts one")
    numbers = (int(config[name]) if name in config else None for name in ("cohort", "minimum"))
    mine = KeyHolder(Path(str(config["keys"])), read_peers(Path(str(config.get("clients", "")))), *numbers)
    try:
        yield mine
    finally:
        mine.close()


def _noise(config: Config) -> CohortNoise | None:
    """What this key holder puts on every sum, as its owner has it."""
    names = ("multiplier", "expected", "quantile", "adapt-rate")
    return CohortNoise(*(float(config[name]) for name in names)) if "multiplier" in config else None
