"""The figures of docs/privacy.md, sharp-edges.md and protected.md: `make docs` runs it, a test compares.

Curves come from the accountants. The client of all of them has 200 examples, batches of 20, 10 local steps in each of
50 rounds, and the noise that costs it epsilon 8 at delta 1 / 2000.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from privacy import accounting
from privacy.plan import History, Mechanism
from server.units import epsilon as shown

_IMAGES = Path(__file__).resolve().parent / "images"
INK, MUTED, LINE = "#1b2430", "#566272", "#dfe4ea"
BLUE, ORANGE, GREEN, PURPLE = "#1f6fb2", "#c2570c", "#2a7f55", "#7c4bab"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "umbel",
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
}

EXAMPLES, ROUNDS, STEPS = 200, 50, 10
DELTA = accounting.default_delta(EXAMPLES)
CLIENT = Mechanism(0.1, round(accounting.calibrate(0.1, ROUNDS * STEPS, 8.0, DELTA, 100.0), 4))


def _after(rounds: int) -> History:
    return {CLIENT: rounds * STEPS}


def _epsilon(history: History, delta: float) -> float:
    return round(accounting.epsilon(history, delta), 3)  # so that the last bits of a machine are not drawn


def units(figure: Figure) -> None:
    """One picture of units and of who sees what before the noise."""
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(-1, 101)
    axes.set_ylim(-28.5, 90)
    for x, who in ((14, "a client"), (52, "the server"), (88, "readers of the model")):
        axes.text(x, 87.5, who, ha="center", color=MUTED)
    alone = "each example's gradient\nclipped and added up,\nnoise added here"
    _row(axes, 63.5, "example", alone, "adds up what is\nalready noised", 1)
    _row(axes, 35, "client", "the whole update\nclipped", "adds up clipped updates,\nnoise added here", 8)
    both = "noise for each example,\nthen the whole update\nclipped"
    _row(axes, 6.5, "both", both, "adds up,\nmore noise for clients", 1, whole=True)
    _row(
        axes,
        -22,
        "local",
        "the whole update\nclipped, noise added here",
        "adds up what is\nalready noised",
        8,
        bare=False,
    )
    axes.text(
        0,
        -27.5,
        "blue: what the promise hides, and what it holds for; orange: what it does not cover",
        color=MUTED,
        fontsize=9.5,
    )


def _row(
    axes: Axes, y: float, unit: str, client: str, server: str, hidden: int, whole: bool = False, bare: bool = True
) -> None:
    """hidden: how many of the client's eight examples are the unit; whole: the client is one as well; bare: whether all
    eight leave it without noise.
    """
    axes.text(0, y + 18.6, f"privacy.unit={unit}", family="DejaVu Sans Mono", fontsize=10.5)
    for x, width, text in ((0, 28, client), (40, 24, server), (78, 20, "see the model\nafter each round")):
        corner = "round,pad=0,rounding_size=1.5"
        axes.add_patch(FancyBboxPatch((x + 1, y), width, 17, boxstyle=corner, fc="#f6f8fa", ec=LINE))
        height = y + (6 if x == 0 else 8.5)
        axes.text(x + 1 + width / 2, height, text, ha="center", va="center", fontsize=9.5, linespacing=1.35)
    for i in range(8):
        axes.plot(5.5 + 2.7 * i, y + 13.6, "o", markersize=5, color=BLUE if hidden == 8 or i == 2 else "#c3ccd6")
    if whole or hidden == 8:
        corner = "round,pad=0,rounding_size=1.2"
        axes.add_patch(FancyBboxPatch((3.4, y + 11.9), 23.2, 3.4, boxstyle=corner, fc="none", ec=BLUE))
    sent = ("noised", BLUE) if hidden < 8 or not bare else ("bare", ORANGE)
    for start, end, (label, colour) in ((29.3, 40.7, sent), (65.3, 78.7, ("noised", BLUE))):
        patch = FancyArrowPatch(
            (start, y + 8.5), (end, y + 8.5), arrowstyle="-|>", mutation_scale=13, color=colour, lw=1.8
        )
        axes.add_patch(patch)
        axes.text((start + end) / 2, y + 10.6, label, ha="center", fontsize=9.5, color=colour)
    if whole:
        axes.text(35, y + 4.2, "as a whole\nbare", ha="center", va="center", fontsize=8.5, color=ORANGE)


def curve(figure: Figure) -> None:
    """The whole delta(epsilon) curve of one account, after some rounds."""
    axes = figure.add_subplot()
    deltas = np.geomspace(1e-8, 1e-1, 36)
    for rounds, colour in ((5, GREEN), (20, PURPLE), (50, BLUE)):
        epsilons = [_epsilon(_after(rounds), float(delta)) for delta in deltas]
        axes.plot(epsilons, deltas, color=colour)
        axes.text(epsilons[3] + 0.2, deltas[3], f"{rounds} rounds", color=colour, fontsize=10)
    quoted = _epsilon(_after(ROUNDS), DELTA)
    axes.plot([quoted], [DELTA], "o", color=BLUE)
    axes.annotate(
        f"what is quoted: epsilon\n{shown(quoted)} at delta 1/2000",
        (quoted, DELTA),
        (9.6, 6e-3),
        fontsize=10,
        arrowprops={"arrowstyle": "-", "color": MUTED},
    )
    axes.set_yscale("log")
    axes.set_xlim(0, 19)
    axes.set_xlabel("epsilon")
    axes.set_ylabel("delta")


def rounds(figure: Figure) -> None:
    """One round's price against the account."""
    axes = figure.add_subplot()
    numbers = range(1, ROUNDS + 1)
    account = [_epsilon(_after(number), DELTA) for number in numbers]
    axes.plot(numbers, account, color=BLUE)
    axes.plot(numbers, [account[0]] * ROUNDS, color=ORANGE, linestyle="--")
    axes.text(30, account[26] - 1.1, "the account", color=BLUE)
    axes.text(
        50,
        account[0] + 0.25,
        f"one round's price, {shown(account[0])}, reported again and again",
        color=ORANGE,
        ha="right",
        fontsize=10,
    )
    axes.set_xlim(0, ROUNDS + 1)
    axes.set_ylim(0, 8.6)
    axes.set_xlabel("round")
    axes.set_ylabel("epsilon at delta 1/2000")


def sampling(figure: Figure) -> None:
    """10,000 clients, 100 drawn a round, noise multiplier 1: what is claimed by whom pays when."""
    axes = figure.add_subplot()
    numbers = [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
    amplified, bare = Mechanism(0.01, 1.0), Mechanism(1.0, 1.0)
    joined = [number // 100 for number in numbers]  # on average
    lines = (
        ("whoever knows who is drawn: no amplification", ORANGE, "-", [{bare: count} for count in joined]),
        ("everyone pays every round, drawn or not: what holds", BLUE, "-", [{amplified: number} for number in numbers]),
        ("paid only when joined: too little", ORANGE, "--", [{amplified: count} for count in joined]),
    )
    for text, colour, dashes, histories in lines:
        epsilons = [_epsilon(history, 1e-5) for history in histories]
        axes.plot(numbers, epsilons, color=colour, linestyle=dashes)
        axes.text(1000, epsilons[-1] * 1.13, f"{text}, {shown(epsilons[-1])}", color=colour, ha="right", fontsize=9.5)
    axes.set_yscale("log")
    axes.set_ylim(0.1, 40)
    axes.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.set_xlim(80, 1010)
    axes.set_xlabel("rounds")
    axes.set_ylabel("epsilon at delta 1e-5")


def attacker(figure: Figure) -> None:
    """The most that an attacker can find at a rate of false alarms."""
    axes = figure.add_subplot()
    alarms = np.geomspace(1e-4, 1, 200)
    for epsilon, colour in ((8.0, ORANGE), (3.0, PURPLE), (1.0, BLUE), (0.5, GREEN)):
        rising, falling = np.exp(epsilon) * alarms + DELTA, 1 - np.exp(-epsilon) * (1 - DELTA - alarms)
        found = np.minimum(1, np.minimum(rising, falling))
        axes.plot(alarms, np.round(found, 5), color=colour, label=f"epsilon {epsilon:g}")
    axes.plot(alarms, alarms, color=MUTED, linestyle=":", label="guessing")
    axes.legend(loc="center", bbox_to_anchor=(0.32, 0.55), frameon=False, fontsize=10)
    axes.set_xscale("log")
    axes.set_xlim(1e-4, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("of those who were not there, so many are taken for members")
    axes.set_ylabel("members found, at most")


def delta(figure: Figure) -> None:
    """The same account at another delta has another epsilon."""
    axes = figure.add_subplot()
    deltas = np.geomspace(1e-7, 3e-2, 36)
    axes.plot(deltas, [_epsilon(_after(ROUNDS), float(each)) for each in deltas], color=BLUE)
    marks = (
        (1 / EXAMPLES, "1/n: one example\nmay be published", ORANGE, (1.1e-2, 9.2)),
        (DELTA, "1/(10 n): the default", BLUE, (1.6e-3, 11.3)),
        (1e-5, "1e-5: what others\nset for everyone", MUTED, (5e-5, 13.7)),
    )
    for at, text, colour, place in marks:
        epsilon = _epsilon(_after(ROUNDS), at)
        axes.plot([at], [epsilon], "o", color=colour)
        axes.annotate(
            f"{text}: {shown(epsilon)}",
            (at, epsilon),
            place,
            color=colour,
            fontsize=9.5,
            ha="left" if at < 1e-4 else "center",
            arrowprops={"arrowstyle": "-", "color": LINE},
        )
    axes.set_xscale("log")
    axes.set_ylim(0, 16)
    axes.set_xlabel("delta")
    axes.set_ylabel("epsilon")


def protection(figure: Figure) -> None:
    """Both ways to hide updates: three clients, the server, and who takes off what hides their sum."""
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(-1, 101)
    axes.set_ylim(-6, 103)
    masked = ("x₁ + p₁ + m₁₂ + m₁₃", "x₂ + p₂ − m₁₂ + m₂₃", "x₃ + p₃ − m₁₃ − m₂₃")
    _way(axes, 60, "masked", masked, "adds: the m cancel\n\nx₁ + x₂ + x₃\n+ p₁ + p₂ + p₃", "no single x")
    _box(axes, 77, 60 + 7.5, 23, 23, "the same clients\n\nsign who survived, then\ngive shares of each p", GREEN)
    _arrow(axes, (66.5, 60 + 24), (76.5, 60 + 24), MUTED, "who is in it")
    _arrow(axes, (76.5, 60 + 14), (66.5, 60 + 14), GREEN, "p₁, p₂, p₃")
    axes.text(
        0,
        60 - 1.5,
        "x: a client's integers; p: its own pad; m₁₂: the pad that clients 1 and 2 share. Had client 3 dropped, the\n"
        "others would give shares of its mask key instead, which makes m₁₃ and m₂₃: nothing of x₃ is in the sum then.",
        color=MUTED,
        fontsize=9.5,
        va="top",
        linespacing=1.4,
    )
    encrypted = ("Enc(x₁, tag₁)", "Enc(x₂, tag₂)", "Enc(x₃, tag₃)")
    _way(axes, 4, "encrypted", encrypted, "adds what it\ncannot read\n\nEnc(sum of x, of tags)", "no key")
    _box(axes, 77, 4 + 7.5, 23, 23, "key holder\n\ntags right? enough in it?\nfirst time? then it opens", PURPLE)
    _arrow(axes, (66.5, 4 + 24), (76.5, 4 + 24), ORANGE, "one sum")
    _arrow(axes, (76.5, 4 + 14), (66.5, 4 + 14), PURPLE, "x₁ + x₂ + x₃")
    axes.text(
        0,
        4 - 1.5,
        "Orange: what is sent hidden. A tag is what only this client and the key holder can compute, for this round:\n"
        "a sum with a client too many, too few or twice has a wrong one and stays closed.",
        color=MUTED,
        fontsize=9.5,
        va="top",
        linespacing=1.4,
    )


def _way(axes: Axes, y: float, mode: str, sent: tuple[str, ...], server: str, less: str) -> None:
    """Three clients that send, a server that adds; `less`: what it does not have."""
    axes.text(0, y + 40.5, f"protect={mode}", family="DejaVu Sans Mono", fontsize=10.5)
    for x, who in ((14, "clients"), (54, f"the server: {less}")):
        axes.text(x, y + 36, who, ha="center", color=MUTED, fontsize=9.5)
    for i, text in enumerate(sent):
        _box(axes, 1, y + 24 - 11 * i, 27, 9, text, BLUE)
        _arrow(axes, (28.5, y + 28.5 - 11 * i), (41.5, y + 22.5 - 4 * i), ORANGE)
    _box(axes, 42, y + 7.5, 24, 23, server, LINE)


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, edge: str) -> None:
    corner = "round,pad=0,rounding_size=1.5"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=corner, fc="#f6f8fa", ec=edge))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, linespacing=1.35)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, text: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.6))
    axes.text((start[0] + end[0]) / 2, start[1] + 1.5, text, ha="center", color=colour, fontsize=8)


FIGURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "units.svg": (units, (8.2, 6.1)),
    "delta-of-epsilon.svg": (curve, (6.4, 3.4)),
    "epsilon-over-rounds.svg": (rounds, (6.4, 3.2)),
    "who-pays.svg": (sampling, (6.4, 3.4)),
    "attacker.svg": (attacker, (6.4, 3.4)),
    "choice-of-delta.svg": (delta, (6.4, 3.4)),
    "protection.svg": (protection, (8.2, 7.4)),
}


def drawn(name: str) -> str:
    """The figure as SVG: same accountants, same bytes."""
    draw, size = FIGURES[name]
    with matplotlib.rc_context(_STYLE):
        figure, text = Figure(figsize=size, layout="constrained", facecolor="white"), io.StringIO()
        FigureCanvasSVG(figure)
        draw(figure)
        figure.axes[0].minorticks_off()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def main() -> None:
    """Write all figures, each whole or not at all."""
    for name in FIGURES:
        partial = _IMAGES / f"{name}.partial"
        partial.write_text(drawn(name), encoding="utf-8")
        partial.replace(_IMAGES / name)
        print(_IMAGES / name)


if __name__ == "__main__":
    main()
