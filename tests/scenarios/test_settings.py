"""Settings: overriding by name, refusing in one line, and the file that keeps them."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from privacy.refused import Refused
from scenarios import load, names
from scenarios.settings import Rounds, Settings, from_toml, knobs, override, to_toml

KNOBS = [name for name, _, _ in knobs(Settings())]
every_knob = pytest.mark.parametrize("name", KNOBS)

STABLE = {
    "run": ["seed", "data", "out"],
    "rounds": ["number", "fraction", "minimum"],
    "local": ["epochs", "batch", "rate"],
    "server": ["step", "combine"],
    "privacy": ["unit", "epsilon", "noise_seed", "max_noise"],
    "fleet": ["profile"],
    "export": ["recover_rounds"],
}


def value_of(settings, name):
    return {name: value for name, value, _ in knobs(settings)}[name]


def test_the_names_that_scripts_rely_on_exist():
    stable = {f"{section}.{last}" for section, names_ in STABLE.items() for last in names_}
    assert stable | {"model", "partition", "codec"} <= set(KNOBS)


@pytest.mark.parametrize("scenario", names())
def test_every_setting_has_a_one_line_meaning(scenario):
    for name, _, meaning in knobs(load(scenario).settings):
        assert meaning, name
        assert "\n" not in meaning


def test_override_changes_what_it_names_and_nothing_else():
    before = Settings()
    after = override(before, "rounds.number=5 privacy.epsilon=3 server.normalize=true model=cnn")
    changed = {name: value for name, value, _ in knobs(after) if value != value_of(before, name)}
    assert changed == {"rounds.number": 5, "privacy.epsilon": 3.0, "server.normalize": True, "model": "cnn"}
    assert before == Settings()


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_text_changes_nothing(text):
    assert override(Settings(), text) == Settings()


@every_knob
def test_every_setting_may_be_given_its_own_value(name):
    value = value_of(Settings(), name)
    assert override(Settings(), f"{name}={'' if value is None else value}") == Settings()


def test_the_last_of_two_values_counts():
    assert override(Settings(), "run.seed=1 run.seed=2").run.seed == 2


def test_values_may_be_quoted_and_hold_an_equals_sign():
    assert override(Settings(), "run.data='my data/x=1'").run.data == "my data/x=1"


def test_an_empty_value_unsets_what_may_be_unset():
    given_ = override(Settings(), "server.rate=0.5 privacy.noise_seed=7")
    assert (given_.server.rate, given_.privacy.noise_seed) == (0.5, 7)
    assert override(given_, "server.rate= privacy.noise_seed=") == Settings()


@every_knob
def test_a_misspelt_name_is_refused_with_the_right_one(name):
    misspelt = name[:-3] + name[-2:]
    with pytest.raises(Refused, match=f"no setting '{misspelt}': the nearest is '{name}'"):
        override(Settings(), f"{misspelt}=1")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epsilon=3", ["'epsilon'", "'privacy.epsilon'"]),
        ("rounds=3", ["'rounds'", "nearest"]),
        ("=3", ["''", "nearest"]),
        ("rounds.number", ["no value", "rounds.number=VALUE"]),
        ("rounds.number=", ["rounds.number=None", "valid integer"]),
        ("rounds.number=five", ["rounds.number=five", "valid integer"]),
        ("rounds.number=2.5", ["rounds.number=2.5", "valid integer"]),
        ("rounds.number=0", ["rounds.number=0", "greater than or equal to 1"]),
        ("'rounds.number=a\nb'", ["rounds.number=a b", "valid integer"]),
        ("rounds.fraction=1.5", ["rounds.fraction=1.5", "less than or equal to 1"]),
        ("local.rate=nan", ["local.rate=nan", "greater than 0|finite"]),
        ("local.rate=inf", ["local.rate=inf", "finite"]),
        ("privacy.unit=person", ["privacy.unit=person", "'none', 'example', 'client', 'both' or 'local'"]),
        ("server.normalize=maybe", ["server.normalize=maybe", "boolean"]),
        ("run.seed=-1", ["run.seed=-1", "greater than or equal to 0"]),
        ("run.data='open", ["No closing quotation", "name=value"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_that_names_it(text, parts):
    with pytest.raises(Refused) as caught:
        override(Settings(), text)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert any(word in message for word in part.split("|")), (part, message)


def test_settings_are_frozen_and_know_no_other_names():
    with pytest.raises(ValidationError):
        Settings().rounds.number = 5
    with pytest.raises(ValidationError):
        Rounds(rounds=5)


# ---- the file ----


@pytest.mark.parametrize("scenario", names())
def test_a_scenarios_settings_come_back_from_their_file(scenario, tmp_path):
    settings = override(load(scenario).settings, "server.tau=1e-08 run.seed=12345678901234567890 local.decay=0.1")
    (tmp_path / "settings.toml").write_text(to_toml(settings, scenario))
    assert from_toml(tmp_path / "settings.toml") == (scenario, settings)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_the_file(text):
    settings = Settings().model_copy(update={"model": text})
    tree = tomllib.loads(to_toml(settings, text))
    assert (tree["scenario"], tree["model"]) == (text, text)


def test_the_file_says_what_each_setting_means_and_which_are_unset():
    lines = to_toml(Settings(), "digits").splitlines()
    for name, value, meaning in knobs(Settings()):
        last = name.rpartition(".")[2]
        start = f"# {last} is unset: {meaning}" if value is None else f"{last} = "
        assert any(line.startswith(start) and line.endswith(meaning) for line in lines), name


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (None, "FileNotFoundError"),
        ("", "KeyError"),
        ("scenario = ", "TOMLDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        ("scenario = 'x'\nrounds = 3", "rounds=3"),
        ("scenario = 'x'\n[rounds]\nnumber = 'a'", "rounds.number=a"),
        ("scenario = 'x'\n[rounds]\nspeed = 1", "rounds.speed=1"),
        ("scenario = 'x'\n[speed]\nup = 1", "speed="),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line_with_its_path(text, hint, tmp_path):
    path = tmp_path / "settings.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Refused, match=hint) as caught:
        from_toml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_section_with_a_mode_takes_it_by_its_own_name():
    given_ = override(Settings(), "protect=masked protect.trust=shared")
    assert (given_.protect.mode, given_.protect.trust) == ("masked", "shared")
    assert override(given_, "protect.mode=none protect.trust=split") == Settings()
    with pytest.raises(Refused, match=r"protect\.mode=secret"):
        override(Settings(), "protect=secret")
