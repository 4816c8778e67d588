"""Teachers that nothing evolved, as controls of an evolved one.

    c_L = p - y,   c_l = 0   or   c_l = B_l (p - y) / sqrt(n_l)

with fixed random B_l, standard normal. On logits, p - y is what backpropagation gives the output. An evolved teacher that
trains no better than this has learned nothing about hidden units; and where even this one fails, the fault is not evolution's.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from apical.errors import ConfigError
from apical.rules.top_down.teacher import TopDownNetwork, diffusion


class HandBuiltTeacher(nn.Module):
    """The error as the output's credit, and none or fixed random feedback of it for hidden units.

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
                drawn = torch.randn(sites or width, outputs, generator=generator)
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
    """Another teacher whose credits go to the wrong examples, in an order that stays the same.

    Args:
        network: the teacher.
        widths: units of each hidden layer of the learner.
        examples: in a batch.
        seed: of the order.
    """

    def __init__(self, network: TopDownNetwork, widths: Sequence[int], examples: int, seed: int = 0) -> None:
        super().__init__()
        self.network, self.widths = network, list(widths)
        self.register_buffer("order", torch.randperm(examples, generator=torch.Generator().manual_seed(seed)))

    def forward(self, prediction: Tensor, target: Tensor) -> list[Tensor]:
        """Credits (batch, width) of each hidden layer and (batch, outputs) of the output, of other examples."""
        order = self.get_buffer("order")
        return [credit[order] for credit in self.network.credits(self.network(prediction, target), self.widths)]
