"""Writes the pages and the schema that say what the program says of itself; `make docs` runs it, a test compares."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import typer

from scenarios import load, names
from scenarios.settings import Section, Settings, knobs
from server import schema
from server.cli import app
from server.groups import Statement
from server.shape import Closed

WIDTH = 100
_DOCS = Path(__file__).resolve().parent
_MADE = "<!-- Made by `make docs`; change the program, not this file. -->"


def settings_page() -> str:
    """Every setting with its default and its meaning, then what each bundled scenario begins with instead."""
    born = {name: value for name, value, _ in knobs(Settings())}
    lines = [
        "# Settings",
        "",
        _MADE,
        "",
        'Change them by name: `umbel run digits --set "rounds.number=5 privacy.epsilon=3"`. An empty value, as in',
        "`server.rate=`, unsets a setting that may be unset. `umbel settings SCENARIO` prints those of a scenario;",
        "a run keeps its own in `settings.toml`.",
        "",
        "Flags are settings too: `--seed` is `run.seed`, `--data` is `run.data`, `--out` is `run.out`.",
    ]
    for section, rows in groupby(knobs(Settings()), key=lambda row: row[0].rpartition(".")[0]):
        lines += ["", f"## {section or 'the task'}", "", "| setting | default | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | {_value(value)} | {_cell(meaning)}{_choices(name)} |" for name, value, meaning in rows]
    lines += ["", "## What the bundled scenarios begin with", "", "Where it differs from the defaults above."]
    for name in names():
        scenario = load(name)
        own = [f"`{knob}={value}`" for knob, value, _ in knobs(scenario.settings) if value != born[knob]]
        lines += ["", f"**{name}**: {scenario.summary}.", "", ", ".join(own) + "."]
    return "\n".join([*lines, ""])


def commands_page() -> str:
    """The --help of every command, as plain text of a fixed width."""
    lines = ["# Commands", "", _MADE, ""]
    lines += ["What stays stable for scripts, the exit codes among it, stands in [runs.md](runs.md)."]
    for path, text in _help(typer.main.get_command(app), "umbel", None):
        lines += ["", f"## {path}", "", "```", text, "```"]
    return "\n".join([*lines, ""])


def report_page() -> str:
    """docs/report.md: its own words up to the mark, then every field of the privacy statement, a line each."""
    words, mark, _ = (_DOCS / "report.md").read_text(encoding="utf-8").partition(_MADE)
    lines = [words + mark]
    for number, (name, field) in enumerate(Statement.model_fields.items(), 1):
        lines += ["", f"### {number}. `{name}`", "", "| field | meaning |", "|---|---|"]
        lines += [f"| `{path}` | {_cell(text)} |" for path, text in _fields(field.annotation)]
    return "\n".join([*lines, ""])


def report_schema() -> str:
    """docs/report.schema.json."""
    return json.dumps(schema.document(), indent=1, sort_keys=True) + "\n"


def _fields(shape: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path, meaning) of every field, objects within opened; reasons are explained once, in the text."""
    for name, field in shape.model_fields.items():
        if name == "reason" or name.endswith("_reason"):
            continue
        inner = [field.annotation, *get_args(field.annotation)]
        inner += [each for one in inner for each in get_args(one)]
        models = dict.fromkeys(one for one in inner if isinstance(one, type) and issubclass(one, Closed))
        many = "[]" if any(get_origin(one) is list for one in inner) else ""
        yield f"{prefix}{field.alias or name}{many}", field.description or ""
        for model in models:
            if model.__name__ not in ("Spread", "Histogram"):
                yield from _fields(model, f"{prefix}{field.alias or name}{many}.")


def _help(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    command.rich_markup_mode = None  # type: ignore[attr-defined]  # boxes are for terminals
    context = click.Context(command, parent, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    text = command.get_help(context).replace("\\[", "[")  # typer escapes for rich what rich does not get to see
    yield context.command_path, "\n".join(line.rstrip() for line in text.splitlines())
    if isinstance(command, click.Group):
        for each, child in command.commands.items():
            yield from _help(child, each, context)


def _value(value: Any) -> str:
    return "unset" if value is None else "empty" if value == "" else f"`{str(value).lower()}`"


def _choices(name: str) -> str:
    """The words that a setting takes, where its meaning does not list them."""
    owner: type[Section] = Settings
    *sections, last = name.split(".")
    for section in sections:
        owner = owner.model_fields[section].annotation  # type: ignore[assignment]
    field = owner.model_fields[last]
    words = [str(word) for word in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    return "" if all(word in (field.description or "") for word in words) else f" ({', '.join(words)})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "report.md": report_page,
    "report.schema.json": report_schema,
}


def main() -> None:
    """Write them, each whole or not at all."""
    for name, page in PAGES.items():
        partial = _DOCS / f"{name}.partial"
        partial.write_text(page(), encoding="utf-8")
        partial.replace(_DOCS / name)
        print(_DOCS / name)


if __name__ == "__main__":
    main()
