"""How long a model takes on one thread: p50 of a call at batch 1, the models taking turns, and the time to load."""

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge_export.infer import open_model

Turns = NDArray[np.float64]
"""(TURNS,) microseconds: the median call of each turn."""
TURNS = 30
SLOWER_BY, SLOWER_IN = 1.05, 0.9
"""Slower means: by this factor in the median turn, and in this share of the turns at all."""

_TURN_US = 2000  # long enough that a hiccup of the machine spoils single calls, not the median of a turn
_LOADS = 5


def load_ms(model: bytes) -> float:
    """Median milliseconds from the bytes of a model to a session that can run."""
    return statistics.median(_us(lambda: open_model(model)) for _ in range(_LOADS)) / 1000


def latencies(sessions: Mapping[str, onnxruntime.InferenceSession], x: NDArray[np.float32]) -> dict[str, Turns]:
    """Microseconds of a call on x (1, ...) in each turn, by name.

    The models take turns, each time another one first: what slows the machine down slows all of them alike.
    """
    call = {name: _call(session, x) for name, session in sessions.items()}
    calls = {name: int(np.clip(_TURN_US / min(_us(run) for _ in range(3)), 3, 100)) for name, run in call.items()}
    turns: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    for _ in range(TURNS):
        for name in order:
            turns[name].append(statistics.median(_us(call[name]) for _ in range(calls[name])))
        order = order[1:] + order[:1]
    return {name: np.array(values) for name, values in turns.items()}


def p50(turns: Turns) -> float:
    """Microseconds of a call: the median over the turns."""
    return float(np.median(turns))


def slower(turns: Turns, than: Turns) -> bool:
    """Whether a model is slower than another beyond measurement noise: see SLOWER_BY and SLOWER_IN."""
    return p50(turns) > SLOWER_BY * p50(than) and float(np.mean(turns > than)) >= SLOWER_IN


def _call(session: onnxruntime.InferenceSession, x: NDArray[np.float32]) -> Callable[[], object]:
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)


def _us(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1000
