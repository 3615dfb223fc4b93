"""The examples of a block's clients read at once: what each by itself would be, and no more than one client's loss."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from clients import cohort, reading
from clients.task import Reply, Task
from clients.training import Node
from scenarios import Examples, Federation, Gathered, Scenario, build_model, digits
from scenarios.settings import Settings, override
from scenarios.weights import flatten, layout

SIZES = {"a": 5, "b": 5, "c": 9, "d": 1, "e": 4}


def examples(name: str, more: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(ord(name[0]))
    x = torch.randn(SIZES.get(name, 6) + more, 3, generator=generator)
    return Examples(x, (x[:, 0] > 0).long())


def gathered(broken: str = "", grown: str = "") -> tuple[Gathered, list[list[str]]]:
    """(how data is read of which one client's is gone, or is more than there was; who was asked for, by call)."""
    calls = list[list[str]]()

    def several(names: Sequence[str]) -> Examples:
        calls.append([*names])
        if broken in names:
            raise OSError("its disk is gone")
        parts = [examples(name, more=name == grown) for name in names]
        return Examples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))

    return Gathered(several), calls


def federation(client: Gathered | None = None) -> Federation:
    return Federation(SIZES, client or examples, examples("validation"), examples("test"))


def answered(folder: Path, text: str, held: Federation) -> list[Reply]:
    settings = override(Settings(), f"local.engine=cohort {text}")
    scenario = Scenario("made", Settings(), {"net": lambda: nn.Linear(3, 2)}, lambda _: held, name="made")
    model = build_model(scenario, settings)
    shared = flatten(model), layout(model)
    tasks = [Task("train", 1, name, *shared, rate=0.3, steps=-(-size // 4)) for name, size in SIZES.items()]
    return cohort.answer(Node(scenario, settings, held, folder), tasks)


def same(one: Examples, other: Examples) -> bool:
    return torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


def test_a_block_is_read_by_one_call_and_each_client_has_its_own_examples() -> None:
    client, calls = gathered()
    read = reading.together(federation(client), [*SIZES])
    assert all(same(read(name).examples, examples(name)) for name in SIZES)
    assert calls == [[*SIZES]]


@pytest.mark.parametrize(
    "text", ["local.batch=4", "local.batch=0 local.steps=3", "local.batch=4 local.precision=bf16 codec=topk:0.5"]
)
def test_what_is_read_at_once_trains_to_the_bits_of_what_is_read_one_by_one(tmp_path: Path, text: str) -> None:
    if "bf16" in text and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        text = text.replace("bf16", "float32")
    together = answered(tmp_path / "together", text, federation(gathered()[0]))
    assert together == answered(tmp_path / "alone", text, federation())
    assert not any(reply.reason for reply in together)


def test_a_client_whose_data_is_gone_costs_itself_alone(tmp_path: Path) -> None:
    replies = answered(tmp_path, "local.batch=4", federation(gathered(broken="c")[0]))
    assert {reply.client: reply.reason for reply in replies if reply.reason} == {"c": "failed with OSError"}


def test_a_client_that_has_more_than_it_had_says_so_and_gives_nothing_to_its_neighbours(tmp_path: Path) -> None:
    replies = answered(tmp_path, "local.batch=4", federation(gathered(grown="b")[0]))
    assert [reply.examples for reply in replies] == [5, 6, 9, 1, 4]


def test_digits_reads_several_clients_as_it_reads_one() -> None:
    held = digits.data(digits.SCENARIO.settings)
    assert isinstance(held.client, Gathered)
    chosen = [*held.sizes][3:6]
    parts = [held.client(name) for name in chosen]
    assert same(held.client.several(chosen), Examples(*(torch.cat(part) for part in zip(*parts, strict=True))))
    assert [len(part.y) for part in parts] == [held.sizes[name] for name in chosen]
