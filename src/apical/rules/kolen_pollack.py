"""Kolen-Pollack learning (Kolen & Pollack 1994; Akrout et al., arXiv 1904.05391).

    delta_l = (B_{l+1}^T delta_{l+1}) * f'(a_l),   dW_l = delta_l h_{l-1}^T,   dB_l = dW_l

Feedback and forward weight receive the same update and the same weight decay, so their difference decays: `B - W` shrinks
to zero at the rate of the decay, which must be positive. Local: B's synapse sees the same two activities as W's.

Form "closed" (default) stores the initial difference and one scalar (:mod:`apical.core.mismatch`): exact for SGD with any
momentum, decay and schedule, and no second gradient, momentum or update. Form "explicit" keeps B as a parameter, for any
optimiser.
"""

from collections.abc import Collection
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Credit, Loss
from apical.core.edge import EdgeRule, Feedback, stored, weight_tap
from apical.core.mismatch import Mismatch, matched, with_scales
from apical.core.transport import Geometry
from apical.core.units import key
from apical.errors import ConfigError


def grown_together(shape: Geometry | None, weight: Tensor, difference: Tensor, scale: Tensor) -> Tensor:
    """`W + c (B_0 - W_0)`."""
    return matched(weight, difference, scale)


def same_gradient(gradient: Tensor, shape: Geometry | None) -> Tensor:
    """`dB = dW`."""
    return gradient


class KolenPollack(EdgeRule):
    """Feedback weights that receive the forward weights' updates and so grow equal to them.

    Give `rule.parameters()` to the optimiser, with a positive weight decay, all in groups with equal options.

    Args:
        model: network of Linear and convolution layers; other modules keep their exact derivative.
        loss: maps (output, targets) to a scalar batch mean.
        form: "closed" for SGD, "explicit" for any optimiser.
        exact: names of modules or parameters that keep their exact derivative.
        first_layer: also hold feedback for the first layer (read-outs only).

    Raises:
        ConfigError: unknown form; or, while training, a closed form under an optimiser that it is not valid for.

    >>> model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> rule = KolenPollack(model)
    >>> optimizer = torch.optim.SGD(rule.parameters(), lr=0.5, weight_decay=0.1)
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     rule(torch.randn(8, 4), torch.arange(8) % 3).backward()
    ...     optimizer.step()
    >>> bool(torch.allclose(rule.feedback_weights()["2"], model[2].weight, atol=1e-3))
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        form: Literal["closed", "explicit"] = "closed",
        exact: Collection[str] = (),
        first_layer: bool = False,
    ) -> None:
        if form not in ("closed", "explicit"):
            raise ConfigError(f'form must be "closed" or "explicit", not {form!r}')
        super().__init__(model, loss, exact, first_layer)
        self.form = form
        self.calls = 0
        self.difference = nn.ModuleDict()
        self.feedback = nn.ParameterDict()
        for name, layer in self.layers.items():
            weight = layer.weight.detach()
            initial = nn.init.xavier_uniform_(torch.empty_like(weight))
            if form == "closed":
                self.difference[key(name)] = Mismatch(initial - weight)
            else:
                self.feedback[key(name)] = nn.Parameter(initial)

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit whose root is the loss; now and then the closed form checks its optimiser."""
        if self.form == "closed" and self.layers and not torch.compiler.is_compiling():
            self.calls += 1
            if self.calls in (2, 3, 4) or self.calls % 100 == 0:
                name, layer = next(iter(self.layers.items()))
                self._mismatch(name).check_optimizer("KolenPollack", layer.weight)
        credit = super().forward(inputs, targets)
        return with_scales(credit, [self._mismatch(name) for name in self.layers]) if self.form == "closed" else credit

    def feedback_of(self, name: str) -> Feedback:
        """B of this layer, stored or as `W + c (B_0 - W_0)`."""
        if self.form == "explicit":
            return stored, (self.feedback[key(name)].detach(),)
        mismatch = self._mismatch(name)
        return grown_together, (self.layers[name].weight, mismatch.initial, mismatch.scale)

    def _mismatch(self, name: str) -> Mismatch:
        return cast(Mismatch, self.difference._modules[key(name)])

    def substitutes(self) -> dict[str, Tensor]:
        """In explicit form, weights whose gradient is also B's."""
        if self.form == "closed":
            return {}
        return {
            f"{name}.weight".lstrip("."): weight_tap(layer.weight, self.feedback[key(name)], same_gradient, None)
            for name, layer in self.layers.items()
        }
