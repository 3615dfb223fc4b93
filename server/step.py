"""Server optimizers as (init, apply) pairs: what the combined update does to the weights.

The pseudo-gradient is the negative of the update (new weights minus old), so every step adds (Reddi et al. 2021,
Algorithm 1). State and weights are float32 (P,); apply is a pure function that never writes to its inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import numpy as np

from privacy.refused import Refused
from scenarios.settings import Server
from scenarios.weights import Vector

State = dict[str, Vector]
"""What a step remembers from round to round, by name, each (P,) float32; empty where it remembers nothing."""

Apply = Callable[[State, Vector, Vector], tuple[Vector, State]]


@dataclass(frozen=True)
class Step:
    """A server optimizer: `state = init(P)` before round 1, then `weights, state = apply(state, weights, update)`.

    apply raises OverflowError when weights or state would leave the float32 range; then the round is not to be applied.
    """

    init: Callable[[int], State]
    apply: Apply


def sgd(rate: float = 1.0) -> Step:
    """weights + rate * update; with rate 1 and the mean this is FedAvg (McMahan et al. 2017)."""

    def apply(_: State, weights: Vector, update: Vector) -> tuple[Vector, State]:
        return weights + np.float32(rate) * update, {}

    return _step((), apply)


def momentum(rate: float = 1.0, beta1: float = 0.9) -> Step:
    """FedAvgM (Hsu et al. 2019, section 4.3): m = beta1 * m + update; weights + rate * m."""

    def apply(state: State, weights: Vector, update: Vector) -> tuple[Vector, State]:
        m = np.float32(beta1) * state["m"] + update
        return weights + np.float32(rate) * m, {"m": m}

    return _step(("m",), apply)


def adam(rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Step:
    """FedAdam (Reddi et al. 2021, Algorithm 2): v = beta2 * v + (1 - beta2) * update^2, without bias correction.

    The defaults are the paper's betas and tau; its best server rate differs by task and lies about 0.01.
    """
    return _adaptive(rate, beta1, tau, lambda v, square: np.float32(beta2) * v + np.float32(1 - beta2) * square)


def yogi(rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.999, tau: float = 1e-8) -> Step:
    """FedYogi (Reddi et al. 2021, Algorithm 2): v = v - (1 - beta2) * update^2 * sign(v - update^2).

    The defaults are those of FLamby (du Terrail et al. 2022) for the heart data.
    """
    return _adaptive(rate, beta1, tau, lambda v, square: v - np.float32(1 - beta2) * square * np.sign(v - square))


def adagrad(rate: float = 0.2, beta1: float = 0.9, tau: float = 1e-8) -> Step:
    """FedAdagrad (Reddi et al. 2021, Algorithm 2): v = v + update^2. The defaults are FLamby's, as in `yogi`."""
    return _adaptive(rate, beta1, tau, lambda v, square: v + square)


STEPS: dict[str, Callable[..., Step]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "yogi": yogi,
    "adagrad": adagrad,
}


def resolve(server: Server) -> Step:
    """The step that server.step names, with the values that are set in `server` and its own defaults for the rest.

    Raises Refused for an unknown name, or a value that is set and that this step would not look at.
    """
    if server.step not in STEPS:
        raise Refused(f"there is no server.step={server.step}: choose one of {', '.join(STEPS)}")
    make = STEPS[server.step]
    values = {name: getattr(server, name) for name in ("rate", "beta1", "beta2", "tau")}
    chosen = {name: value for name, value in values.items() if value is not None}
    for name in chosen.keys() - signature(make).parameters.keys():
        raise Refused(f"server.step={server.step} has no {name}: unset it with `server.{name}=`")
    return make(**chosen)


def _adaptive(rate: float, beta1: float, tau: float, second: Callable[[Vector, Vector], Vector]) -> Step:
    """Reddi et al. 2021, Algorithm 2 with m0 = v0 = 0; `second`: (v, update^2) -> the new second moment v."""

    def apply(state: State, weights: Vector, update: Vector) -> tuple[Vector, State]:
        m = np.float32(beta1) * state["m"] + np.float32(1 - beta1) * update
        v = second(state["v"], update * update)
        root: Vector = np.sqrt(v)
        return weights + np.float32(rate) * m / (root + np.float32(tau)), {"m": m, "v": v}

    return _step(("m", "v"), apply)


def _step(names: tuple[str, ...], unchecked: Apply) -> Step:
    """A step that remembers zeros under `names` at first, and that never hands out a number that is none."""

    def init(size: int) -> State:
        return {name: np.zeros(size, np.float32) for name in names}

    def apply(state: State, weights: Vector, update: Vector) -> tuple[Vector, State]:
        if update.shape != weights.shape:
            raise ValueError(f"an update of shape {update.shape} came for weights of shape {weights.shape}")
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            new, state = unchecked(state, weights, update)
        if not all(np.isfinite(vector).all() for vector in (new, *state.values())):
            raise OverflowError("the server step left the range of float32: an update is too large, or the server rate")
        return new, state

    return Step(init, apply)
