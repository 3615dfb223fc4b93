"""Tightness and speed of Umbel's three answers beside dp-accounting's PLD and Opacus' PRV and Renyi accountants.

    python benchmarks/accounting.py [--repeats N] [--json FILE]

Add-or-remove adjacency, Poisson sampling. Every time is CPU and the median over the repeats; a query starts with what
the accountants keep between queries (Umbel: transforms and rows), `first` without. Ratios are to dp-accounting's PLD at
1e-4, composed from the distinct mechanisms, in the same call. Opacus' histories are grouped by mechanism, which it does
not do by itself. Opacus' GDP accountant is left out: it is no bound.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dp_accounting.pld import privacy_loss_distribution as pld

from privacy import accounting, dp_sgd, fourier, renyi
from privacy.plan import Mechanism

SETTINGS: dict[str, tuple[Counter[Mechanism], float]] = {
    "A silo": (Counter({Mechanism(0.0256, 1.0): 400}), 1e-5),
    "B edge": (Counter({Mechanism(0.25, 1.1): 200}), 1e-3),
    "C full batch": (Counter({Mechanism(1.0, 4.0): 100}), 1e-3),
    "D MNIST": (Counter({Mechanism(0.004, 1.3): 3750}), 1e-5),
    "E clients": (Counter({Mechanism(0.01, 1.0): 1000}), 1e-5),
    "F clients": (Counter({Mechanism(0.001, 0.8): 2000}), 1e-7),
    "G low noise": (Counter({Mechanism(0.02, 0.5): 1000}), 1e-5),
    "H three rounds": (Counter({Mechanism(0.2, 0.2): 3}), 1e-2),
    "I long": (Counter({Mechanism(0.05, 2.0): 20_000}), 1e-6),
    "30 mechanisms": (
        Counter(Mechanism((0.005, 0.01, 0.02)[i % 3], round(0.8 + 0.1 * (i % 10), 1)) for i in range(1000)),
        1e-5,
    ),
}


def forget() -> None:
    """Empty what Umbel keeps between queries."""
    for kept in (accounting._epsilon, fourier._one_step, fourier._transform, renyi.row):
        kept.cache_clear()


def first(history: Counter[Mechanism], delta: float) -> float:
    """Umbel's exact epsilon with nothing kept."""
    forget()
    return accounting.epsilon(history, delta)


def query(history: Counter[Mechanism], delta: float) -> float:
    """Umbel's exact epsilon with transforms kept, but not the answer."""
    accounting._epsilon.cache_clear()
    return accounting.epsilon(history, delta)


def gate(history: Counter[Mechanism], delta: float) -> float:
    """Umbel's Renyi rows."""
    return float(renyi.epsilons([history], [delta])[0])


def reference(history: Counter[Mechanism], delta: float) -> float:
    """dp-accounting's PLD at 1e-4."""
    total = pld.identity(1e-4)
    for mechanism, count in history.items():
        step = pld.from_gaussian_mechanism(
            mechanism.noise_multiplier, value_discretization_interval=1e-4, sampling_prob=mechanism.sampling_rate
        )
        total = total.compose(step.self_compose(count))
    return float(total.get_epsilon_for_delta(delta))


def opacus_prv(history: Counter[Mechanism], delta: float) -> float:
    """The upper end of Opacus' PRV interval."""
    interval = dp_sgd.epsilon_prv(history, delta)
    return interval[1] if interval else float("nan")


ACCOUNTANTS: dict[str, Callable[[Counter[Mechanism], float], float]] = {
    "dp-accounting PLD 1e-4": reference,
    "Umbel exact, first": first,
    "Umbel exact": query,
    "Umbel gate": gate,
    "Opacus PRV": opacus_prv,
    "Opacus Renyi": dp_sgd.epsilon_rdp,
}


def timed(ask: Callable[[], float], repeats: int) -> tuple[float, float]:
    """(answer, median CPU milliseconds)."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        answer = ask()
        times.append(1e3 * (time.process_time() - began))
    return answer, statistics.median(times)


def fleet(clients: int, rounds: int, mixed: bool) -> float:
    """CPU seconds in which all clients are gated in every round, with one mechanism each or thirty in turn."""
    many = list(SETTINGS["30 mechanisms"][0])
    deltas, budgets = [1e-5] * clients, [1e9] * clients
    own = [many[client % len(many)] for client in range(clients)]
    forget()
    began = time.process_time()
    if mixed:
        spent = renyi.spent([{}] * clients)
        for number in range(rounds):
            asked = [many[(client + number) % len(many)] for client in range(clients)]
            spent = renyi.after(spent, asked, [1] * clients)
            assert (renyi.bounds(spent, deltas) <= budgets).all()
    else:
        for number in range(rounds):
            histories = [{mechanism: number + 1} for mechanism in own]
            assert all(accounting.may_join(histories, deltas, budgets))
    return time.process_time() - began


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of every query (default 3)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {"settings": {}, "gate": {}}
    print("epsilon, its ratio to dp-accounting's PLD at 1e-4, CPU ms a query\n")
    print(f"{'':15}" + "".join(f"{name:>26}" for name in ACCOUNTANTS))
    for name, (history, delta) in SETTINGS.items():
        row: dict[str, float] = {}
        cells = ""
        for accountant, ask in ACCOUNTANTS.items():
            value, milliseconds = timed(lambda ask=ask: ask(history, delta), chosen.repeats)  # type: ignore[misc]  # noqa: B023
            base = row.setdefault("dp-accounting PLD 1e-4", value)
            row |= {accountant: value, f"{accountant}, ratio": value / base, f"{accountant}, ms": milliseconds}
            cells += f"{value:10.4f} {value / base:6.4f} {milliseconds:8.2f}"
        found["settings"][name] = row
        print(f"{name:15}{cells}", flush=True)
    print("\nthe gate: 1000 clients x 1000 rounds, all asked in every round")
    for title, mixed in (("one mechanism a client", False), ("thirty a client, in turn", True)):
        seconds = statistics.median(fleet(1000, 1000, mixed) for _ in range(chosen.repeats))
        found["gate"][title] = {"seconds": seconds, "microseconds a client a round": seconds}
        print(f"{title:26} {seconds:6.2f} s CPU, {seconds:.2f} us a client a round", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
