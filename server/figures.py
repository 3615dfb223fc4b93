"""The figures of reports and comparisons, as SVG to be inlined in a page: same data, same bytes."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from server import units

# The pages define these names twice, for light and for dark; the figures are drawn with the light values.
SERIES = ("#1f6fb2", "#c2570c", "#2a7f55", "#7c4bab", "#b5346f", "#87650f", "#147d8c", "#5b6675")
DASHES = ("", "5 2", "1.5 1.5")
_NAMES = {"#1b2430": "ink", "#566272": "muted", "#dfe4ea": "line"} | {c: f"s{i}" for i, c in enumerate(SERIES)}
_INK, _MUTED, _LINE = list(_NAMES)[:3]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's own font, and it can be searched
    "svg.hashsalt": "umbel",
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Series:
    """One line: y over x, of equal length, with an optional half-width of its band."""

    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float] = ()
    style: int = 0
    """Chooses colour and dashes; `stroke` gives the same to a legend."""


def stroke(style: int) -> tuple[str, str]:
    """(CSS colour, dash array) of a line's style: eight colours, then the same eight dashed."""
    return f"var(--s{style % len(SERIES)})", DASHES[style // len(SERIES) % len(DASHES)]


def curves(
    label: str,
    series: Sequence[Series],
    x_label: str,
    y_text: Callable[[float], str] = units.number,
    x_text: Callable[[float], str] | None = None,
    from_zero: bool = False,
    log: bool = False,
) -> Markup:
    """Lines over a common axis. Without x_text, x counts rounds. label: what the figure says to who cannot see it.

    log: y by powers of ten.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        for line in series:
            colour, dashes = SERIES[line.style % len(SERIES)], DASHES[line.style // len(SERIES) % len(DASHES)]
            pattern = (0, tuple(map(float, dashes.split()))) if dashes else "-"
            few = "o" if len(line.x) < 12 else None
            axes.plot(line.x, line.y, color=colour, linestyle=pattern, linewidth=1.8, marker=few, markersize=4)
            if line.band:
                low, high = zip(*((y - b, y + b) for y, b in zip(line.y, line.band, strict=True)), strict=True)
                axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(numticks=5) if log else MaxNLocator(5))  # few: phones are narrow
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y_text, y)))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=x_text is None, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x_text or units.number, x)))
        if from_zero:
            axes.set_ylim(bottom=0)
        if x_text is not None:
            axes.set_xlim(left=0)
        axes.set_xlabel(x_label)
        return _svg(figure, label)


def histogram(label: str, values: Sequence[float], x_label: str, limit: float | None = None) -> Markup:
    """How many clients have which value, from zero on; `limit` is drawn as a dashed line."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        top = max([*values, limit or 0.0]) * 1.06 or 1.0
        axes.hist(values, bins=32, range=(0, top), color=SERIES[0])
        if limit is not None:
            axes.axvline(limit, color=SERIES[1], linestyle="--", linewidth=1.4)
        axes.set_xlim(0, top)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_xlabel(x_label)
        return _svg(figure, label)


def bars(label: str, edges: Sequence[float], counts: Sequence[Sequence[int]], x_label: str) -> Markup:
    """Histograms that were counted before, one over the other. edges: one more than there are counts in each."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        for style, heights in enumerate(counts):
            axes.stairs(heights, edges, fill=True, color=SERIES[style], alpha=0.55)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_xlabel(x_label)
        return _svg(figure, label)


def _tick(text: Callable[[float], str], value: float) -> str:
    return text(value).replace(".0 ", " ").replace(" 00 s", "")  # "90 %", not "90.0 %"; "2 min", not "2 min 00 s"


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, 2.75), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure, label: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[^"]*pt"', "", text)
    for colour, name in _NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    # Several figures share one page, so that their ids (clip paths, markers) need different names.
    prefix = re.sub(r"\W+", "-", label.lower())
    text = re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}-", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
