"""What a machine has left of its memory, and what a worker process is taken to need of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from clients import memory, together
from clients.task import Way
from clients.training import Node
from scenarios import load
from scenarios.settings import override


def made_node(text: str = "") -> Node:
    digits = load("digits")
    settings = override(digits.settings, f"privacy.unit=none local.batch=10 local.engine=cohort {text}")
    return Node(digits, settings, digits.data(settings), Path())


GRAM, FUSED, SINGLE = Way("gram"), Way("fused", "why"), Way("single", "why")


def test_what_a_machine_has_left_is_known_on_linux() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("no Linux")
    left = memory.available()
    assert left is not None
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 <= left <= total << 10


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"a/b/memory.max": "1000", "a/b/memory.current": "400"}, [600]),
        ({"a/b/memory.max": "1000", "a/b/memory.current": "400", "a/b/memory.stat": "anon 5\ninactive_file 50"}, [650]),
        ({"a/b/memory.max": "max", "a/b/memory.current": "400"}, []),
        (
            {"a/b/memory.max": "max", "a/b/memory.current": "4", "a/memory.max": "70", "a/memory.current": "90"},
            [0],
        ),
        ({"memory.max": "1000", "memory.current": "100"}, [900]),
        ({"memory/a/b/memory.limit_in_bytes": "1000", "memory/a/b/memory.usage_in_bytes": "400"}, []),
    ],
)
def test_the_limits_of_all_groups_that_a_process_is_in_count(
    tmp_path: Path, files: dict[str, str], left: list[int]
) -> None:
    assert found(tmp_path, "0::/a/b\n", files) == left


def test_groups_of_the_first_version_count_by_their_own_names(tmp_path: Path) -> None:
    files = {
        "memory/a/memory.limit_in_bytes": "1000",
        "memory/a/memory.usage_in_bytes": "400",
        "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 30",
        "cpu/a/memory.limit_in_bytes": "1",
    }
    assert found(tmp_path, "7:cpu,cpuacct:/a\n4:memory:/a\n", files) == [630]


def test_without_groups_nothing_limits(tmp_path: Path) -> None:
    assert list(memory._groups(tmp_path, tmp_path / "none")) == []


def found(folder: Path, groups: str, files: dict[str, str]) -> list[int]:
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (folder / "groups").write_text(groups)
    return list(memory._groups(folder / "mount", folder / "groups"))


@pytest.mark.parametrize("way", [GRAM, FUSED, SINGLE])
def test_larger_blocks_and_more_examples_need_more(way: Way) -> None:
    node = made_node()
    less = memory.need(node, way, 5, 60, 6, 0)
    assert memory.need(node, way, 50, 60, 6, 0) > less
    assert memory.need(node, way, 5, 600, 60, 0) > less
    assert memory.need(node, way, 5, 60, 6, 1 << 20) == less + (5 << 20)


def test_opacus_holds_a_gradient_for_every_example_of_a_step() -> None:
    text = "privacy.unit=example privacy.clip=1"
    plain, private = (memory.need(made_node(t), SINGLE, 1, 600, 1, 0) for t in ("", text))
    assert private - plain > 2 * 4 * 10 * (64 * 64 + 64 + 64 * 10 + 10)


def test_momentum_needs_a_velocity() -> None:
    node = made_node()
    settings = override(node.settings, "local.momentum=0.9")
    more = memory.need(replace(node, settings=settings), FUSED, 5, 60, 6, 0) - memory.need(node, FUSED, 5, 60, 6, 0)
    assert more == 4 * (64 * 64 + 64 + 64 * 10 + 10)


def test_clients_side_by_side_need_what_each_of_them_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    node = made_node()
    made = {
        name: lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        for name in node.scenario.models
    }
    node = replace(node, scenario=replace(node.scenario, models=made))
    few, many = ((node, FUSED, 5, 30, steps, 0) for steps in (3, 30))
    alone = memory.need(*few), memory.need(*many)
    monkeypatch.setattr(together, "OUTGROWN", 64 * 64)
    assert memory.need(*few) > alone[0]
    assert memory.need(*many) == alone[1]  # too many rows to be side by side


def test_one_large_client_is_not_counted_for_all_of_its_block() -> None:
    node = made_node()
    alike = memory.need(node, FUSED, 25, 12_500, 1250, 0)
    assert alike - memory.need(node, FUSED, 25, 12_500, 1250, 0, 12_500 + 24 * 100) > 20 * 12_500 * 64 * 4
