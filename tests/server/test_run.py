"""The main job in this process: clients that evaluate, data that changed, exports that come later."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clients.task import Reply, Task
from clients.training import Node
from privacy.refused import Refused
from scenarios import Examples, Federation, Scenario
from scenarios.settings import Settings, override
from server import run as job
from server.embedded import EmbeddedFleet
from server.launch import Quiet
from server.record import RunFolder

BASE = (
    "rounds.number=3 local.batch=0 local.rate=1 export.recover_rounds=1 reference.no_privacy=false "
    "privacy.unit=example privacy.epsilon=20 privacy.noise_seed=1"
)


def made_examples(seed: int, size: int = 30) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return Examples(x, (x.sum(1) > 0).long())


def made_scenario(federation: Federation, model: Callable[[], nn.Module] | None = None) -> Scenario:
    net = model or (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)))
    return Scenario("made for a test", override(Settings(), BASE), {"net": net}, lambda _: federation, name="made")


def federation_of(client: Callable[[str], Examples] | None = None, test: bool = True) -> Federation:
    return Federation(
        {"a": 30, "b": 30},
        client or (lambda name: made_examples(ord(name))),
        made_examples(1, 60),
        made_examples(2, 60) if test else None,
        lambda name: made_examples(ord(name) + 10, 20 if name == "a" else 40),
    )


def run(path: Path, scenario: Scenario, text: str = "", again: bool = False) -> dict[str, Any]:
    settings = override(scenario.settings, text)
    with RunFolder.open(path) if again else RunFolder.create(path, "made", settings) as folder:
        return job.run(job.prepare(scenario, settings, folder, EmbeddedFleet, Quiet()))


def export(path: Path, scenario: Scenario, text: str = "") -> dict[str, Any]:
    with RunFolder.open(path) as folder:
        settings = override(folder.settings()[1], text)
        return job.export(job.prepare(scenario, settings, folder, EmbeddedFleet, Quiet()))


def test_a_run_leaves_every_file_that_is_promised(tmp_path: Path) -> None:
    run(tmp_path / "run", made_scenario(federation_of()))
    names = {"settings.toml", "rounds.jsonl", "weights.safetensors", "report.json", "report.html", "model.onnx", "edge"}
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_clients_that_evaluate_give_the_weighted_and_the_worst_accuracy(tmp_path: Path) -> None:
    found = run(tmp_path / "run", made_scenario(federation_of(test=False)), "evaluation.on=clients")
    rows = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert found["final"]["evaluated_by"] == "clients"
    assert found["final"]["worst_client_accuracy"] <= found["final"]["accuracy"]
    assert all(row["worst_client_accuracy"] <= row["accuracy"] for row in rows)
    assert (found["final"]["accuracy"] * 60) % 1 == pytest.approx(0, abs=1e-6)
    assert "without noise" in found["privacy"]["not_covered"][0]
    assert found["reference"]["central_reason"] == "the server has no test set"


class Noted(Quiet):
    """A progress that remembers what was to stay."""

    def __init__(self) -> None:
        self.notes = list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_who_shares_no_pass_is_noted_once_and_counted_in_the_report(tmp_path: Path) -> None:
    scenario, noted = made_scenario(federation_of()), Noted()
    text = "local.engine=cohort privacy.unit=none privacy.epsilon=8 export.prune=0 fleet.clock=wall fleet.deadline=600"
    settings = override(scenario.settings, text)
    with RunFolder.create(tmp_path / "run", "made", settings) as folder:
        found = job.run(job.prepare(scenario, settings, folder, EmbeddedFleet, noted))
    why = "a deadline on the wall clock"
    assert noted.notes == [f"cohort: 2 of 2 clients are trained one by one: {why}"]
    single = {"way": "single", "why": why, "precision": "float32", "times": 2 * 3}
    assert found["fleet"]["engine"]["trained"] == [single]


def test_a_server_without_test_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="set evaluation"):
        run(tmp_path / "run", made_scenario(federation_of(test=False)))
    assert not (tmp_path / "run").exists()


def test_a_run_whose_data_changed_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path / "run", made_scenario(federation_of()))
    changed = federation_of(lambda name: made_examples(ord(name) + (name == "b")))
    before = (tmp_path / "run/report.json").read_bytes()
    with pytest.raises(Refused, match="data of client b has changed"):
        run(tmp_path / "run", made_scenario(changed), again=True)
    other = replace(federation_of(), test=made_examples(3, 60))
    with pytest.raises(Refused, match="server's test or validation data has changed"):
        run(tmp_path / "run", made_scenario(other), again=True)
    assert (tmp_path / "run/report.json").read_bytes() == before


def test_recovery_is_part_of_the_budget_and_a_later_export_has_none_left(tmp_path: Path) -> None:
    scenario = made_scenario(federation_of())
    first = run(tmp_path / "run", scenario)
    assert [client["steps"] for client in first["privacy"]["clients"]] == [4, 4]
    assert 19.9 < first["privacy"]["worst_epsilon"] <= 20
    again = export(tmp_path / "run", scenario, "export.prune=0.25")
    assert again["edge"]["recovery"] == "pruned without recovery: no privacy budget is left"
    assert again["privacy"]["clients"] == first["privacy"]["clients"]
    assert again["final"] == first["final"]


def test_a_later_export_recovers_with_what_is_left_of_the_budget(tmp_path: Path) -> None:
    scenario = made_scenario(federation_of())
    without = "export.prune=0"  # one recovery round is paid for in the noise and not used
    run(tmp_path / "run", scenario, without)
    again = export(tmp_path / "run", scenario, "export.prune=0.5")
    assert again["edge"]["recovery"].startswith("pruned, then 1 federated round")
    assert [client["steps"] for client in again["privacy"]["clients"]] == [4, 4]
    assert len((tmp_path / "run/rounds.jsonl").read_text().splitlines()) == 4


def test_a_run_of_fewer_rounds_than_are_averaged_averages_them_all(tmp_path: Path) -> None:
    text = "rounds.number=1 export.prune=0 rounds.average={}"
    many = run(tmp_path / "many", made_scenario(federation_of()), text.format(4))
    assert many["final"] == run(tmp_path / "one", made_scenario(federation_of()), text.format(1))["final"]


class Dies(EmbeddedFleet):
    """A fleet that is gone in the middle of a round, as SIGKILL leaves it: tasks went out, nothing came back."""

    at = 5

    def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        if tasks[0].kind == "train" and tasks[0].round == self.at:
            raise KeyboardInterrupt
        return super().ask(tasks)


ROOM = "export.prune=0 export.recover_rounds=3 local.batch=10 privacy.noise_seed="  # three rounds paid for and not used


def test_an_export_that_is_cut_off_leaves_no_report_of_less_than_was_spent_and_resume_ends_it(tmp_path: Path) -> None:
    scenario, path = made_scenario(federation_of()), tmp_path / "run"
    assert [client["steps"] for client in run(path, scenario, ROOM)["privacy"]["clients"]] == [9, 9]
    wanted = ROOM.replace("prune=0", "prune=0.5")
    settings = override(scenario.settings, wanted)
    with RunFolder.open(path) as folder, pytest.raises(KeyboardInterrupt):
        job.export(job.prepare(scenario, settings, folder, Dies, Quiet()))  # one round committed, one begun
    assert not (path / "report.json").exists()
    assert not (path / "report.html").exists()
    found = run(path, scenario, wanted, again=True)
    assert [client["steps"] for client in found["privacy"]["clients"]] == [18, 18]
    assert found["edge"]["recovery"].startswith("pruned, then 2 of 3 federated rounds")
    assert found["privacy"]["worst_epsilon"] <= 20
    rows = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    assert [entry["reason"].split(":")[0] for entry in rows[-1]["skipped"]] == ["budget", "budget"]


def test_an_export_that_is_cut_off_before_its_first_round_prunes_anew(tmp_path: Path) -> None:
    scenario, path = made_scenario(federation_of()), tmp_path / "run"
    text = "privacy.unit=none export.prune={}"
    run(path, scenario, text.format(0.25))
    settings = override(scenario.settings, text.format(0.75))
    with RunFolder.open(path) as folder, pytest.raises(KeyboardInterrupt):
        job.export(job.prepare(scenario, settings, folder, Dies, Quiet()))
    found = run(path, scenario, text.format(0.75), again=True)
    fresh = run(tmp_path / "fresh", scenario, text.format(0.75))
    sizes = [[v["bytes"] for v in each["edge"]["variants"] if "fp32" in v["name"]] for each in (found, fresh)]
    assert sizes[0] == sizes[1]


def test_a_second_recovery_begins_without_what_clients_held_back_in_the_first(tmp_path: Path) -> None:
    asked: list[Task] = []

    class Heard(EmbeddedFleet):
        def ask(self, tasks: Sequence[Task]) -> Iterator[Reply]:
            asked.extend(task for task in tasks if task.kind == "train")
            return super().ask(tasks)

    scenario = made_scenario(federation_of())
    settings = override(scenario.settings, "privacy.unit=none codec=topk:0.1 export.recover_rounds=2")
    with RunFolder.create(tmp_path / "run", "made", settings) as folder:
        job.run(job.prepare(scenario, settings, folder, Heard, Quiet()))
        job.export(job.prepare(scenario, settings, folder, Heard, Quiet()))
    found = {task.round: task.state_round for task in asked}
    assert found == {1: 0, 2: 1, 3: 2, 4: 0, 5: 4, 6: 0, 7: 6}


@pytest.mark.parametrize("name", ["start.json", "checkpoint.safetensors"])
def test_a_run_folder_that_lost_a_file_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    scenario, path = made_scenario(federation_of()), tmp_path / "run"
    run(path, scenario)
    (path / name).unlink()
    before = {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}
    with pytest.raises(Refused, match=f"{name} is missing"):
        run(path, scenario, again=True)
    assert {each: each.read_bytes() for each in path.rglob("*") if each.is_file()} == before


@pytest.mark.parametrize(
    "text", ["privacy.noise_seed=", "privacy.unit=none", "privacy.epsilon=9", "local.batch=5", "run.seed=4"]
)
def test_a_run_goes_on_with_the_settings_it_began_with_alone(tmp_path: Path, text: str) -> None:
    scenario = made_scenario(federation_of())
    run(tmp_path / "run", scenario)
    with pytest.raises(Refused, match=text.split("=")[0] + " was "):
        run(tmp_path / "run", scenario, text, again=True)
    assert run(tmp_path / "run", scenario, "export.tolerance=0.5 run.data=elsewhere", again=True)["status"] == "done"


@pytest.mark.parametrize("text", ["", "local.batch=4", "local.steps=2", "privacy.unit=none local.steps=2"])
def test_a_client_without_examples_is_skipped_by_name(tmp_path: Path, text: str) -> None:
    none = Examples(torch.empty(0, 6), torch.empty(0, dtype=torch.int64))
    federation = federation_of(lambda name: none if name == "a" else made_examples(ord(name)))
    found = run(tmp_path / "run", made_scenario(federation), f"export.prune=0 {text}")
    rows = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert all(row["skipped"] == [{"name": "a", "reason": "no examples"}] and row["replies"] == 1 for row in rows)
    assert [client["name"] for client in found["privacy"]["clients"]] == ([] if "none" in text else ["b"])


def test_who_comes_after_the_run_began_has_no_plan_and_is_not_asked(tmp_path: Path) -> None:
    text = "export.prune=0 export.recover_rounds=0"
    scenario = made_scenario(federation_of())
    with RunFolder.create(tmp_path / "run", "made", override(scenario.settings, text)) as folder:
        job.prepare(scenario, override(scenario.settings, text), folder, EmbeddedFleet, Quiet())
    more = replace(federation_of(), sizes={"a": 30, "aa": 30, "b": 30}, client=lambda name: made_examples(ord(name[0])))
    found = run(tmp_path / "run", made_scenario(more), text, again=True)
    assert [client["name"] for client in found["privacy"]["clients"]] == ["a", "b"]
    assert all(
        row["cohort"] == ["a", "b"] for row in map(json.loads, (tmp_path / "run/rounds.jsonl").read_text().splitlines())
    )


ODD = ["a/../../b", "\u202e<odd>", "x" * 300, "new\nline", "\x00", "日本"]


def test_client_names_of_any_characters_stay_names(tmp_path: Path) -> None:
    federation = replace(federation_of(), sizes=dict.fromkeys(ODD, 30), client=lambda name: made_examples(len(name)))
    found = run(tmp_path / "run", made_scenario(federation), "codec=topk:0.5 export.prune=0")
    assert [client["name"] for client in found["privacy"]["clients"]] == sorted(ODD)
    assert "<odd>" not in (tmp_path / "run/report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_model_with_nothing_to_prune_ships_unpruned_and_says_why(tmp_path: Path) -> None:
    found = run(tmp_path / "run", made_scenario(federation_of(), lambda: nn.Linear(6, 2)))
    missing = [variant for variant in found["edge"]["variants"] if variant["name"].startswith("pruned")]
    assert missing
    assert all(variant["file"] is None and variant["reason"] for variant in missing)
    assert found["edge"]["accuracy"] is not None


def test_references_are_measured_or_say_why_not(tmp_path: Path) -> None:
    text = "reference.no_privacy=true reference.central_epochs=20 reference.central_rate=0.5"
    found = run(tmp_path / "run", made_scenario(federation_of()), text)["reference"]
    assert found["central_accuracy"] > 0.8
    assert found["no_privacy_accuracy"] > 0.6
    without = run(tmp_path / "other", made_scenario(federation_of()), "privacy.unit=none")["reference"]
    assert without["no_privacy_accuracy"] is None
    assert without["no_privacy_reason"] == "the run itself has no privacy"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("codec=zip", "no codec"),
        ("server.combine=max", "server.combine"),
        ("server.combine=krum", "needs 5 replies"),
        ("server.combine=median server.normalize=true", "normalize"),
        ("server.step=lion", "server.step"),
        ("fleet.profile=nowhere", "fleet profile"),
        ("model=big", "no model"),
        ("rounds.minimum=3", "rounds.minimum"),
        ("privacy.epsilon=0.001", "smallest epsilon"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_round_one(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(Refused, match=line) as caught:
        run(tmp_path / "run", made_scenario(federation_of()), text)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_batch_norm_is_refused_under_dp_and_federated_without(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    with pytest.raises(Refused, match="GroupNorm"):
        run(tmp_path / "run", made_scenario(federation_of(), model))
    found = run(tmp_path / "run", made_scenario(federation_of(), model), "privacy.unit=none")
    assert found["final"]["accuracy"] > 0.5


def test_a_loss_with_class_weights_is_refused_under_dp_and_federated_without(tmp_path: Path) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
    scenario = replace(made_scenario(federation_of()), loss=loss)
    with pytest.raises(Refused, match="mixes the examples"):
        run(tmp_path / "run", scenario)
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run", scenario, "privacy.unit=none")["final"]["accuracy"] > 0.5


def test_the_refusal_names_the_most_rounds_that_the_budget_allows(tmp_path: Path) -> None:
    text = "privacy.epsilon=2 privacy.max_noise=3 rounds.number={}"
    with pytest.raises(Refused, match="most rounds for this epsilon are") as caught:
        run(tmp_path / "run", made_scenario(federation_of()), text.format(200))
    most = int(str(caught.value).rsplit(" ", 1)[1])
    assert run(tmp_path / "fits", made_scenario(federation_of()), text.format(most - 1))["rounds"] == most - 1
    with pytest.raises(Refused):
        run(tmp_path / "beyond", made_scenario(federation_of()), text.format(most))


def test_the_node_of_a_run_keeps_client_states_in_its_folder(tmp_path: Path) -> None:
    seen: list[Node] = []

    class Watched(EmbeddedFleet):
        def __init__(self, node: Node) -> None:
            seen.append(node)
            super().__init__(node)

    scenario = made_scenario(federation_of())
    settings = override(scenario.settings, "codec=topk:0.2")
    folder = RunFolder.create(tmp_path / "run", "made", settings)
    job.run(job.prepare(scenario, settings, folder, Watched, Quiet()))
    assert seen[0].states == tmp_path / "run" / "clients"
    assert len(list(seen[0].states.rglob("*.safetensors"))) >= 2
