"""Networks of neurons that fire at most once, trained through their spike times."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from apical.core.credit import Panel
from apical.core.spike_times import FirstSpike, Readout, SpikingLinear
from apical.errors import ConfigError

ACTIVE = 0.2
"""Approximate share of inputs that fire, for which the initial weights are scaled; in images, the share of ink."""


class FirstSpikeNetwork(nn.Sequential):
    """Input spike times, layers of spike times, class scores; see :func:`first_spike`."""

    @torch.no_grad()
    def times(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return spike times (batch, n) by layer, infinite for silent neurons."""
        layers = {}
        for name, module in self.named_children():
            inputs = module(inputs)
            if isinstance(module, SpikingLinear):
                layers[name] = inputs
        return layers

    def silent(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the share of samples for which each neuron is silent (n,), by layer."""
        return {name: times.isinf().to(times.dtype).mean(0) for name, times in self.times(inputs).items()}

    def measures(self, inputs: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
        """Return, by layer, the mean share of silent neurons and the share of neurons silent for every sample."""
        shares = self.silent(inputs).items()
        return {name: {"silent": float(s.mean()), "dead": float((s == 1).to(s.dtype).mean())} for name, s in shares}

    def panels(self, inputs: Tensor, targets: Tensor) -> list[Panel]:
        """Return plots of spike times by layer, and of the spike time of the correct output neuron by class."""
        times = self.times(inputs)
        last = list(times.values())[-1]
        right = last.gather(1, targets.unsqueeze(1)).squeeze(1)
        others = last.scatter(1, targets.unsqueeze(1), torch.inf).amin(1)
        classes = range(last.shape[1])
        groups = {
            name: torch.stack([each[(targets == k) & each.isfinite()].median() for k in classes])
            for name, each in (("of the class", right), ("first of the others", others))
        }
        return [
            Panel("Spike times", "histogram", "time", "share of neurons", {name: t.flatten() for name, t in times.items()}),
            Panel("Median time of output neurons by class", "bars", "class", "time", groups, [str(k) for k in classes]),
        ]


def first_spike(in_features: int, widths: Sequence[int], out_features: int) -> FirstSpikeNetwork:
    """Build layers of neurons that fire at most once: (N, ...) with `in_features` entries in [0, 1] -> (N, out_features).

    Raises:
        ConfigError: a size is not positive.

    >>> [name for name, _ in first_spike(4, [3], 2).named_children()]
    ['encoder', 'spikes1', 'spikes2', 'readout']
    """
    sizes = [in_features, *widths, out_features]
    if min(sizes) < 1:
        raise ConfigError(f"every layer needs at least one neuron; got {'-'.join(map(str, sizes))}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(encoder=FirstSpike())
    for depth, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        layers[f"spikes{depth}"] = SpikingLinear(fan_in, fan_out, active=max(1.0, ACTIVE * fan_in) if depth == 1 else None)
    layers["readout"] = Readout()
    return FirstSpikeNetwork(layers)
