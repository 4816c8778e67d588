"""Teachers that were not evolved, as controls of an evolved one.

    c_L = p - y,   c_l = 0   or   c_l = B_l (p - y) / sqrt(n_l)

with fixed random B_l, standard normal. On logits, p - y is what backpropagation gives the output. An evolved teacher that
trains no better than this has learned nothing about hidden units; and where even this one fails, evolution is not at fault.
:func:`wired` sets a top-down network's weights to approximate this, as a starting point for evolution.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from apical.errors import ConfigError
from apical.rules.top_down.equivariant import EquivariantNetwork, Network
from apical.rules.top_down.teacher import TopDownNetwork, diffusion


class HandBuiltTeacher(nn.Module):
    """The error as the output's credit, and zero or its fixed random feedback for hidden units.

    Args:
        outputs: of the learner.
        widths: units (channels) of each hidden layer of the learner, in the order of execution.
        hidden: credit of hidden units.
        sites: emission sites per hidden layer; None draws feedback for each unit.
        seed: of the feedback.

    Raises:
        ConfigError: `hidden` is neither.

    >>> teacher = HandBuiltTeacher(2, [3])
    >>> [credit.tolist() for credit in teacher(torch.tensor([[0.75, 0.25]]), torch.tensor([[0.0, 1.0]]))]
    [[[0.0, 0.0, 0.0]], [[0.75, -0.75]]]
    """

    def __init__(
        self,
        outputs: int,
        widths: Sequence[int],
        hidden: Literal["silent", "random"] = "silent",
        sites: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if hidden not in ("silent", "random"):
            raise ConfigError(f'the hidden credit of a hand-built teacher is "silent" or "random", not {hidden!r}')
        generator = torch.Generator().manual_seed(seed)
        for number, width in enumerate(widths):
            feedback = torch.zeros(width, outputs)
            if hidden == "random":
                drawn = torch.randn(sites or width, outputs, generator=generator, device="cpu").to(feedback)
                spread = drawn if sites is None else diffusion(width, sites).float() @ drawn
                feedback = spread / width**0.5
            self.register_buffer(f"feedback{number}", feedback)
        self.layers = len(widths)

    def forward(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        """Credits (batch, width) of each hidden layer and (batch, outputs) of the output."""
        error = prediction - target
        feedback = (self.get_buffer(f"feedback{number}").to(error.dtype) for number in range(self.layers))
        return [*(error @ matrix.T for matrix in feedback), error]


class ShuffledTeacher(nn.Module):
    """Another teacher whose credits go to the wrong examples: each gets those of the example before it.

    Args:
        network: the teacher.
        widths: units of each hidden layer of the learner.
    """

    def __init__(self, network: Network, widths: Sequence[int]) -> None:
        super().__init__()
        self.network, self.widths = network, list(widths)

    def forward(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        """Credits (batch, width) of each hidden layer and (batch, outputs) of the output, of other examples."""
        return [credit.roll(1, 0) for credit in self.network.credits(self.network(prediction, target), self.widths)]


class MixedTeacher(nn.Module):
    """Half of another teacher, to test what each half contributes: the rest is hand-built.

    Args:
        network: the teacher.
        widths: units of each hidden layer of the learner.
        keep: "hidden" takes its credit for hidden units, and the error for the output; "output" takes its credit for the
            output, and fixed random feedback of the error for hidden units.
        seed: of the feedback.
    """

    def __init__(
        self, network: TopDownNetwork, widths: Sequence[int], keep: Literal["hidden", "output"], seed: int = 0
    ) -> None:
        super().__init__()
        self.network, self.widths, self.keep = network, list(widths), keep
        self.built = HandBuiltTeacher(network.outputs, widths, "random", seed=seed)

    def forward(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        """Credits (batch, width) of each hidden layer and (batch, outputs) of the output."""
        own = self.network.credits(self.network(prediction, target), self.widths)
        built = self.built(prediction, target)
        hidden, output = (own, built) if self.keep == "hidden" else (built, own)
        return [*hidden[:-1], output[-1]]


GAIN = 0.5
"""Gain of the wired network on a probability, small enough for tanh to be nearly linear."""


@torch.no_grad()
def wired(network: Network, seed: int = 0) -> Network:
    """Set the weights of a relative top-down network so that it gives approximately the hand-built random credit.

    Unit k of both hidden layers follows p_k, from -1/2 to 1/2; the others are unchanged and ignored. An
    equivariant network has one such unit, or, where it is linear, hands out direct feedback alignment's credit exactly.

    Raises:
        ConfigError: its credit is not relative, it has fewer hidden units than there are outputs, or it sees a projection.
    """
    if isinstance(network, EquivariantNetwork):
        bottom, top = (cast(nn.Linear, network.body[number]) for number in (0, -1))
        top.weight.zero_()
        top.weight[:, 0] = 1.0
        if network.hidden:
            bottom.weight[0], bottom.bias[0] = torch.tensor([GAIN, 0.0, 0.0]), -GAIN / 2
            top.weight[:, 0] /= 2 * torch.tanh(torch.tensor(GAIN / 2))  # between p_k = 0 and 1
        return network
    n, h = network.outputs, network.hidden
    if not network.relative or h < n or network.projection is not None:
        raise ConfigError(
            f"a hand-wired top-down network needs relative credit and a hidden unit for each of {n} outputs; got "
            f"relative={network.relative}, hidden={h}"
        )
    first, second, last = (layer for layer in network.body if isinstance(layer, nn.Linear))
    generator = torch.Generator().manual_seed(seed)
    unit = torch.eye(n)
    first.weight[:n] = torch.cat([GAIN * unit, 0 * unit], 1)
    first.bias[:n] = -GAIN / 2
    second.weight[:n] = torch.cat([unit, torch.zeros(n, h - n)], 1)
    span = 2 * torch.tanh(torch.tanh(torch.tensor(GAIN / 2)))  # between p_k = 0 and 1
    feedback = torch.randn(sum(network.emissions), n, generator=generator, device="cpu").to(unit)
    last.weight.zero_()
    last.weight[:, :n] = torch.cat([feedback, unit] if network.output == "evolved" else [feedback]) / span
    return network
