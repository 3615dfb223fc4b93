"""One offline HTML page: a template with escaped values and inlined figures, written whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from privacy.durable import write_atomic
from privacy.refused import Refused
from server import units
from server.templates import TEMPLATES


def render(template: str, **values: object) -> str:
    """The page that `template` (page, report, compare) makes of the values. Everything but Markup is escaped."""
    return _ENVIRONMENT.get_template(template).render(**values)


def save(path: Path, text: str) -> Path:
    """Writes the page by rename, so that a reader never meets half of one. Raises Refused where it cannot."""
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise Refused(
            f"{path} cannot be written ({error.strerror}): choose a folder that exists and is yours"
        ) from None
    return path


def setting(value: Any) -> str:
    """A setting's value as its user would write it."""
    return "unset" if value is None or value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def _unbroken(text: Callable[..., str]) -> Callable[..., str]:
    return lambda *values: text(*values).replace(" ", "\u00a0")  # a number stays on one line with its unit


_ENVIRONMENT = Environment(
    loader=DictLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_NUMBERS = (
    units.percent,
    units.size,
    units.duration,
    units.micros,
    units.epsilon,
    units.number,
    units.fixed,
    units.scientific,
)
_ENVIRONMENT.filters |= {text.__name__: _unbroken(text) for text in _NUMBERS}
_ENVIRONMENT.filters["setting"] = setting
