"""opacus-hooks, opacus-ghost: that loop with Opacus, by per-example gradients and by norms alone (ghost clipping).

The model is wrapped once, not once a client. Poisson samples and noise come from torch's own generator.
"""

import sys
import warnings
from functools import partial

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch_loop import Learn, go
from workload import Workload, adopt

warnings.filterwarnings("ignore", "Full backward hook is firing")


def private(ghost: bool, workload: Workload, device: str) -> Learn:
    """Local DP-SGD; ghost: two backward passes in place of one gradient an example."""
    model, flat = workload.build()
    if device != "cpu":
        flat = flat.to(device)
        adopt(model, flat)
    sgd = torch.optim.SGD(model.parameters(), lr=workload.rate)
    batch = workload.batch or workload.examples
    told = {"noise_multiplier": workload.noise, "max_grad_norm": workload.clip, "expected_batch_size": batch}
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=workload.clip)
        optimizer = DPOptimizerFastGradientClipping(sgd, **told)
        loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    else:
        wrapped, optimizer, loss = GradSampleModule(model), DPOptimizer(sgd, **told), nn.CrossEntropyLoss()

    def learn(number: int, place: int, weights: Tensor, total: Tensor) -> None:
        with torch.no_grad():
            flat.copy_(weights)
        x, y = (part.to(device) for part in workload.local(int(workload.cohorts[number, place])))
        for _ in range(workload.steps):
            sample = _sample(workload.examples, batch / workload.examples).to(device)
            optimizer.zero_grad()
            loss(wrapped(x[sample]), y[sample]).backward()
            optimizer.step()
        total.add_(flat).sub_(weights)

    return learn


def _sample(examples: int, rate: float) -> Tensor:
    """A Poisson sample that is not empty: ghost clipping has no mean of nothing; at q=1/6 of 60 one in 56,000 is."""
    while not len(found := (torch.rand(examples) < rate).nonzero()[:, 0]):
        pass
    return found


if __name__ == "__main__":
    go(partial(private, "opacus-ghost" in sys.argv))
