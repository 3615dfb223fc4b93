"""The machine's limit: a workload's arithmetic at the best rates that its shapes reach here, and its least traffic.

A process of its own with one thread, which prints JSON. Rates are of single products as local training takes them,
forward, weight and input gradients, each by whichever of mm, bmm over eight clients, oneDNN's linear and conv is
fastest, times the cores: no contender can be faster that takes these products, but one that takes fewer can.
Traffic is what cannot be avoided: every client's examples and weights in, its update out, at the rate of a large copy.

Legend: (m, k, n): a product of m x k and k x n.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from workload import Workload

_TOGETHER = 8


@dataclass(frozen=True)
class Product:
    """A matrix product, or a convolution's forward pass or gradients."""

    kind: str
    """mm, conv, conv-weight, conv-both."""
    sizes: tuple[int, ...]
    """(m, k, n); of convolutions (examples, channels, side, outputs, kernel)."""

    @property
    def flops(self) -> int:
        if self.kind == "mm":
            m, k, n = self.sizes
            return 2 * m * k * n
        examples, channels, side, outputs, kernel = self.sizes
        once = 2 * examples * side * side * outputs * channels * kernel * kernel
        return 2 * once if self.kind == "conv-both" else once

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.sizes))}"


def products(workload: Workload) -> Counter[Product]:
    """The products of one client's round."""
    model, _ = workload.build()
    found: Counter[Product] = Counter()
    leaves = [part for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d | nn.GRU)]

    def note(part: nn.Module, given: tuple[Tensor, ...], _: Any) -> None:
        for product, count in _of_layer(part, given[0], part is leaves[0] and isinstance(model, nn.Sequential)):
            found[product] += count

    for part in leaves:
        part.register_forward_hook(note)
    x, _ = workload.local(0)
    batch = workload.batch or workload.examples
    with torch.no_grad():
        model(x[:batch])
    return Counter({product: count * workload.steps for product, count in found.items()})


def _of_layer(part: nn.Module, x: Tensor, first: bool) -> Iterator[tuple[Product, int]]:
    """A layer's products in one step, with how often each is taken; the first layer's input needs no gradient."""
    if isinstance(part, nn.Linear):
        yield from _dense(len(x), part.in_features, part.out_features, first)
    elif isinstance(part, nn.GRU):
        steps, gates = x.shape[1], 3 * part.hidden_size
        yield from _dense(len(x) * steps, part.input_size, gates, False)
        yield from ((product, steps) for product, _ in _dense(len(x), part.hidden_size, gates, False))
    elif isinstance(part, nn.Conv2d):
        sizes = (len(x), part.in_channels, x.shape[-1], part.out_channels, part.kernel_size[0])
        yield Product("conv", sizes), 1
        yield Product("conv-weight" if first else "conv-both", sizes), 1


def _dense(m: int, k: int, n: int, first: bool) -> Iterator[tuple[Product, int]]:
    yield Product("mm", (m, k, n)), 1
    yield Product("mm", (n, m, k)), 1
    if not first:
        yield Product("mm", (m, n, k)), 1


def seconds(product: Product, device: str) -> dict[str, float]:
    """The time of one such product, by each way to take it."""
    ways = _matrix_ways(product, device) if product.kind == "mm" else _convolution_ways(product, device)
    return {name: _best(call, device) / together for name, (call, together) in ways.items()}


def _matrix_ways(product: Product, device: str) -> dict[str, tuple[Callable[[], Any], int]]:
    m, k, n = product.sizes
    a, b = torch.randn(_TOGETHER, m, k, device=device), torch.randn(_TOGETHER, k, n, device=device)
    one, all_ = torch.empty(m, n, device=device), torch.empty(_TOGETHER, m, n, device=device)
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "mm": (lambda: torch.mm(a[0], b[0], out=one), 1),
        "bmm": (lambda: torch.bmm(a, b, out=all_), _TOGETHER),
    }
    if device == "cpu" and torch.backends.mkldnn.is_available():
        x, weight = a[0].to_mkldnn(), b[0].T.contiguous().to_mkldnn()
        ways["linear"] = (lambda: torch._C._nn.mkldnn_linear(x, weight), 1)
    return ways


def _convolution_ways(product: Product, device: str) -> dict[str, tuple[Callable[[], Any], int]]:
    examples, channels, side, outputs, kernel = product.sizes
    ways: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, layout in (("conv", torch.contiguous_format), ("conv, channels last", torch.channels_last)):
        x = torch.randn(examples, channels, side, side, device=device).to(memory_format=layout)
        weight = torch.randn(outputs, channels, kernel, kernel, device=device).to(memory_format=layout)
        y = torch.randn(examples, outputs, side, side, device=device).to(memory_format=layout)
        ways[name] = (_pass(product.kind, x, weight, y, kernel // 2), 1)
    return ways


def _pass(kind: str, x: Tensor, weight: Tensor, y: Tensor, pad: int) -> Callable[[], Any]:
    if kind == "conv":
        return lambda: nn.functional.conv2d(x, weight, padding=pad)
    mask = [kind == "conv-both", True, False]
    told = (None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, mask)
    return lambda: torch.ops.aten.convolution_backward(y, x, weight, *told)


def _best(call: Callable[[], Any], device: str) -> float:
    """Seconds a call: the best of seven runs of about 10 ms; of one thread its CPU time, which others disturb less."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def run(times: int) -> float:
        began = clock()
        for _ in range(times):
            call()
        if device != "cpu":
            torch.cuda.synchronize()
        return (clock() - began) / times

    run(3)
    times = max(1, int(0.01 / run(3)))
    return min(run(times) for _ in range(7))


def limit(workload: Workload, device: str, cores: int) -> dict[str, Any]:
    """{seconds, and of what it is made}: arithmetic and draws of noise, or traffic, whichever takes longer."""
    weights = len(workload.array("start"))
    rates, arithmetic, flops = {}, 0.0, 0
    for product, count in products(workload).items():
        ways = seconds(product, device)
        rates[str(product)] = {name: product.flops / took / 1e9 for name, took in ways.items()}
        arithmetic += workload.cohort * count * min(ways.values()) / cores
        flops += workload.cohort * count * product.flops
    buffer = torch.empty(1_000_000, device=device)
    draws = {"example": workload.cohort * workload.steps, "client": 1}.get(workload.unit, 0) * weights
    noise = draws * _best(buffer.normal_, device) / buffer.numel() / cores
    torch.set_num_threads(cores)
    source, target = torch.ones(2, 64 << 20, device=device)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    x, _ = workload.local(0)
    traffic = workload.cohort * (x.nbytes + 2 * 4 * weights)
    found = {"arithmetic_s": arithmetic, "noise_s": noise, "traffic_s": traffic / bandwidth}
    found |= {"gflop": flops / 1e9, "mb": traffic / 1e6, "gb_a_second": bandwidth / 1e9}
    return {"seconds": max(arithmetic + noise, traffic / bandwidth), **found, "gflop_a_second": rates, "cores": cores}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", type=Path)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0)) if told.device == "cpu" else 1
    if told.device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    print(json.dumps(limit(Workload.read(told.workload), told.device, cores)))


if __name__ == "__main__":
    main()
