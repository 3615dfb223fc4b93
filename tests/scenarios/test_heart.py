"""Heart: the parser on small made files, always; FLamby's counts, split and accuracy on the real ones, if there."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from privacy.refused import Refused
from scenarios import Federation, build_model, heart, predict
from scenarios.settings import Settings, override

LINE = "63,1,{pain},145,233,1,{ecg},150,0,2.3,3,?,6,{diagnosis}"


def lines(patients: int, seed: int = 0) -> list[str]:
    """Complete patients, who differ in age and pressure; about half are sick."""
    rng = np.random.default_rng(seed)
    return [
        f"{rng.integers(30, 70)}.0,{i % 2},{1 + i % 4},{rng.integers(90, 180)},{rng.integers(1, 400)},0,{i % 3},"
        f"150.1,0,.{i % 10},?,?,?,{rng.integers(0, 5) if i % 2 else 0}"
        for i in range(patients)
    ]


def write(folder: Path, hospital: str, rows: list[str]) -> None:
    (folder / "heart_disease").mkdir(exist_ok=True)
    (folder / "heart_disease" / f"processed.{hospital}.data").write_text("\n".join(rows) + "\n")


@pytest.fixture
def made(tmp_path: Path) -> Settings:
    """Four made hospitals of 20, 21, 22 and 23 complete patients and one incomplete each."""
    for i, hospital in enumerate(heart.HOSPITALS):
        write(tmp_path, hospital, [*lines(20 + i, seed=i), f"50,?,1,{100 + i},200,0,0,150.1,0,1,?,?,?,1"])
    return override(heart.SCENARIO.settings, f"run.data={tmp_path}")


def test_categories_become_indicators_and_the_last_three_columns_go() -> None:
    rows = [LINE.format(pain=1 + i % 4, ecg=i % 3, diagnosis=i % 5) for i in range(12)]
    records = heart.parse("\n".join(rows), "made")
    assert records.x.shape == (7, 13)
    assert records.x_test.shape == (5, 13)
    seen = {tuple(row) for row in np.concatenate([records.x, records.x_test])}
    numbers = (63, 1, 145, 233, 1, 150, 0, 2.3)
    assert seen == {(*numbers, i % 4 == 1, i % 4 == 2, i % 4 == 3, i % 3 == 1, i % 3 == 2) for i in range(12)}
    labels = np.concatenate([records.y, records.y_test])
    assert sorted(labels) == [0] * 3 + [1] * 9  # diagnoses 1 to 4 are disease


def test_a_patient_with_a_missing_value_is_neither_training_nor_test() -> None:
    incomplete = ["50,1,1,?,200,0,1,150,0,1,2,0,3,1", "50,1,1,120,200,0,?,150,0,1,2,0,3,0"]
    records = heart.parse("\n".join([*lines(20), *incomplete]), "made")
    assert len(records.y) + len(records.y_test) == 20
    assert records.y_incomplete.tolist() == [1, 0]
    missing = np.isnan(records.x_incomplete)
    assert np.flatnonzero(missing[0]).tolist() == [2]
    assert np.flatnonzero(missing[1]).tolist() == [11, 12]  # an unknown ECG leaves both of its indicators open


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("63,1,1,145,233,1,2,150,0,2.3,3,0,6", "line 21 has 13 columns instead of 14"),
        ("63,1,1,145,secret,1,2,150,0,2.3,3,0,6,0", "line 21 holds something that is neither a number"),
        ("63,1,1,145,nan,1,2,150,0,2.3,3,0,6,0", "line 21, column 5 has a value"),
        ("63,1,1,145,1e999,1,2,150,0,2.3,3,0,6,0", "line 21, column 5 has a value"),
        ("63,1,5,145,233,1,2,150,0,2.3,3,0,6,0", "line 21, column 3 has a value"),
        ("63,1,1,145,233,1,3,150,0,2.3,3,0,6,0", "line 21, column 7 has a value"),
        ("63,1,1,145,233,1,2,150,0,2.3,3,0,6,5", "line 21, column 14 has a value"),
        ("63,1,1,145,233,1,2,150,0,2.3,3,0,6,?", "line 21, column 14 has a value"),
    ],
)
def test_a_bad_line_is_refused_by_its_place_and_quotes_no_patient(line: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refusal:
        heart.parse("\n".join([*lines(20), line]), "made")
    message = str(refusal.value)
    assert message.startswith("made line 21")
    assert not any(value in message for value in ("secret", "145", "233", "1e999"))


def test_a_file_of_too_few_patients_is_refused() -> None:
    for text in ("", "\n\n", "\n".join(lines(9))):
        with pytest.raises(Refused, match="complete patients, fewer than 10"):
            heart.parse(text, "made")
    assert len(heart.parse("\n".join(lines(10)), "made").y) == 6


def test_training_inputs_are_standardized_by_their_own_hospital(made: Settings) -> None:
    federation = heart.data(made)
    assert federation.sizes == {"cleveland": 13, "hungarian": 13, "switzerland": 14, "va": 15}
    for hospital, size in federation.sizes.items():
        x, y = federation.client(hospital)
        assert (x.dtype, y.dtype, tuple(x.shape), tuple(y.shape)) == (torch.float32, torch.int64, (size, 13), (size,))
        torch.testing.assert_close(x.mean(0), torch.zeros(13), atol=1e-6, rtol=0)
        deviation = x.std(0)
        constant = x.abs().amax(0) < 1e-6
        assert constant.tolist() == [i in (4, 5, 6) for i in range(13)]
        torch.testing.assert_close(deviation[~constant], torch.ones(10), atol=1e-5, rtol=0)


def test_the_server_test_set_is_standardized_by_pooled_training_statistics(made: Settings) -> None:
    federation = heart.data(made)
    read = {
        h: heart.parse((Path(made.run.data) / f"heart_disease/processed.{h}.data").read_text(), h)
        for h in heart.HOSPITALS
    }
    pooled = np.concatenate([records.x for records in read.values()])
    age, pressure = 0, 2
    for column in (age, pressure):
        raw = np.concatenate([records.x_test for records in read.values()])[:, column]
        wanted = (raw - pooled[:, column].mean()) / pooled[:, column].std(ddof=1)
        np.testing.assert_allclose(federation.test.x[:, column], wanted, rtol=1e-5)
    own = federation.client_test("va").x[:, age]
    raw, mine = read["va"].x_test[:, age], read["va"].x[:, age]
    np.testing.assert_allclose(own, (raw - mine.mean()) / mine.std(ddof=1), rtol=1e-5)


def test_validation_is_the_incomplete_patients_with_the_mean_for_what_is_missing(made: Settings) -> None:
    validation = heart.data(made).validation
    assert tuple(validation.x.shape) == (4, 13)
    assert validation.y.tolist() == [1] * 4
    assert validation.x[:, 1].tolist() == [0.0] * 4
    assert torch.isfinite(validation.x).all()


def test_a_node_with_its_own_file_alone_trains_and_tests_where_clients_evaluate(tmp_path: Path) -> None:
    write(tmp_path, "va", lines(30))
    settings = override(heart.SCENARIO.settings, f"run.data={tmp_path} evaluation.on=clients")
    federation = heart.data(settings)
    assert federation.test is None
    assert federation.sizes == {"va": 19}
    assert len(federation.client("va").y) == 19
    assert len(federation.client_test("va").y) == 11
    with pytest.raises(Refused, match=r"heart_disease/processed\.cleveland\.data"):
        federation.client("cleveland")
    with pytest.raises(Refused, match="there is no hospital 'mayo'"):
        federation.client("mayo")


def test_a_missing_hospital_is_refused_where_the_server_evaluates(tmp_path: Path) -> None:
    write(tmp_path, "va", lines(30))
    with pytest.raises(Refused, match=r"heart_disease/processed\.cleveland\.data .*umbel data get heart_disease"):
        heart.data(override(heart.SCENARIO.settings, f"run.data={tmp_path}"))


def test_other_partitions_and_numbers_of_clients_are_refused(made: Settings) -> None:
    for change, reason in {
        "partition=iid": "leave partition=natural",
        "fleet.clients=9": "leave fleet.clients=4",
    }.items():
        with pytest.raises(Refused, match=reason):
            heart.data(override(made, change))


def test_the_loss_is_the_cross_entropy_of_the_predicted_probability() -> None:
    logits = torch.tensor([[0.3], [-2.0], [4.0]])
    labels = torch.tensor([1, 0, 0])
    p = torch.sigmoid(logits[:, 0])
    wanted = -(p[0].log() + (1 - p[1]).log() + (1 - p[2]).log()) / 3
    torch.testing.assert_close(heart.loss(logits, labels), wanted)


@pytest.fixture(scope="module")
def real() -> Federation:
    root = os.environ.get("UMBEL_DATA", "")
    if not (Path(root) / "heart_disease").is_dir():
        pytest.skip("UMBEL_DATA does not name a folder that holds heart_disease/")
    return heart.data(override(heart.SCENARIO.settings, f"run.data={root}"))


def test_the_real_files_give_flambys_740_patients_and_its_split(real: Federation) -> None:
    assert dict(real.sizes) == {"cleveland": 199, "hungarian": 172, "switzerland": 30, "va": 85}
    assert [len(real.client_test(h).y) for h in heart.HOSPITALS] == [104, 89, 16, 45]
    assert tuple(real.test.x.shape) == (254, 13)
    assert tuple(real.validation.x.shape) == (180, 13)
    assert sum(real.sizes.values()) + len(real.test.y) == 740
    # stratified in Cleveland and Hungary; Switzerland, with one healthy patient of 46, is not
    assert [int(real.client(h).y.sum()) for h in heart.HOSPITALS] == [91, 65, 30, 66]
    assert [int(real.client_test(h).y.sum()) for h in heart.HOSPITALS] == [48, 33, 15, 35]


def test_pooled_training_reaches_the_published_central_accuracy(real: Federation) -> None:
    x = torch.cat([real.client(h).x for h in heart.HOSPITALS])
    y = torch.cat([real.client(h).y for h in heart.HOSPITALS])
    model = build_model(heart.SCENARIO, heart.SCENARIO.settings)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = heart.loss(model(x), y)
        value.backward()
        return value

    optimizer.step(closure)
    accuracy = (predict(model(real.test.x)) == real.test.y).float().mean().item()
    assert abs(accuracy - 0.795) < 0.02  # FLamby's pooled training, mean of five seeds
