"""Kolen-Pollack learning (Kolen & Pollack 1994; Akrout et al., arXiv 1904.05391).

    delta_l = (B_{l+1}^T delta_{l+1}) * f'(a_l),   dW_l = delta_l h_{l-1}^T,   dB_l = dW_l

Feedback and forward weights receive the same update and the same weight decay, so their difference decays: `B - W` shrinks
to zero at the rate of the decay, which must be positive. Local: B's synapse uses the same two activities as W's.

While the optimiser moves W and B alike, `B = W + c (B_0 - W_0)` with one number c (:mod:`.mismatch`), and B
needs no separate gradient, momentum or update. This holds for `torch.optim.SGD`, and for optimisers whose decay is
separate from the gradient step (AdamW, Muon): equal gradients give equal changes. Adam's weight decay goes through
its moments, so no number c exists. Form "auto" (default) uses this layer by layer where it is exact, and keeps B as a
parameter where it is not (:mod:`apical.rules.plastic_feedback.plastic_rule`).
"""

import copy
from collections.abc import Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Attention, Loss
from apical.core.edge import Feedback, Pathway, stored
from apical.core.effective import weight_now
from apical.core.packed import xavier_
from apical.core.tap import weight_tap
from apical.core.transport import Geometry, transport, weight_gradient
from apical.errors import ConfigError, require_choice
from apical.rules.plastic_feedback.plastic_rule import Initial, PlasticRule, check_initial


def same_gradient(gradient: Tensor, shape: Geometry | None) -> Tensor:
    """`dB = dW`."""
    return gradient


def literal_feedback(
    shape: Geometry | None, delta: Tensor, template: Tensor | None, inputs: Tensor, feedback: Tensor
) -> tuple[Tensor | None, ...]:
    """`B^T delta` and `dB = delta h^T`."""
    below = None if template is None else transport(shape, delta, feedback, template)
    return below, None, weight_gradient(shape, delta, inputs, feedback).to(feedback.dtype)


class KolenPollack(PlasticRule):
    """Feedback weights that receive the forward weights' updates and so converge to them.

    Pass `rule.parameters()` to the optimiser, with a positive weight decay.

    Args:
        model: network of Linear, convolution, attention and recurrent layers; other modules keep their exact derivative.
        loss: maps (output, targets) to a scalar batch mean.
        form: "explicit" keeps B as a parameter; "closed" never does, and refuses what it cannot follow exactly; "auto" uses
            for each layer the closed form from the first step on where it is exact, and lists the others in `rule.remarks`.
        exact: names of modules or parameters that keep their exact derivative.
        first_layer: also hold feedback for the first layer (read-outs only).
        initial: "random", as in the papers; or "mirror": before the first step noise copies the weights (:meth:`mirror`),
            since the decay of AdamW and similar is too small for that. The rule is built before it knows the optimiser, so
            that you must choose.
        mirror: noise vectors per input of a layer, for initial="mirror".
        sites, through_time: see :class:`apical.core.edge.EdgeRule`.
        attention: which parts of attention's backward pass are kept: "exact", "fixed" or "present"; see
            :mod:`apical.core.attention`.

    Raises:
        ConfigError: unknown form or initial, mirror < 1; or, while training, an optimiser without B, or what the
            closed form cannot follow.

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

    PLASTIC, MISMATCH = "feedback", "difference"
    ALIKE = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        form: Literal["auto", "closed", "explicit"] = "auto",
        exact: Collection[str] = (),
        first_layer: bool = False,
        initial: Initial = "random",
        mirror: int = 40,
        sites: Collection[str] = (),
        through_time: bool = True,
        attention: Attention = "exact",
    ) -> None:
        check_initial(initial, mirror)
        require_choice("form", form, ("auto", "closed", "explicit"))
        super().__init__(model, loss, exact, first_layer, form, sites=sites, through_time=through_time)
        self.attention = attention
        for name, layer in self.layers.items():
            self.hold(name, xavier_(torch.empty_like(weight_now(layer)), layer))
        if initial == "mirror":
            self.mirror(mirror)

    def set_feedback(self, name: str, B: Tensor) -> None:
        """Replace B of one layer; its momentum in the optimiser stays.

        Args:
            name: the layer.
            B: in the shape of the layer's weight.

        Raises:
            ConfigError: unknown layer, or a wrong shape.
        """
        self.reopen(name)
        weight = weight_now(self.layers[name])
        if B.shape != weight.shape:
            raise ConfigError(f"B of layer {name!r} has shape {tuple(weight.shape)}, not {tuple(B.shape)}")
        self.replace(name, B.to(weight))

    def feedback_of(self, name: str) -> Feedback:
        """B of this layer."""
        mismatch = self.mismatch_of(name)
        return stored, (self.plastic_of(name).detach() if mismatch is None else mismatch.feedback,)

    def pathway(self, name: str, inputs: Tensor) -> Pathway | None:
        """B's own gradient, where it cannot be derived from that of the weight."""
        if self.mismatch_of(name) is not None or self.tapped(name):
            return None
        return literal_feedback, (inputs.detach(), self.plastic_of(name))

    def has_pathway(self) -> bool:
        """Whether any B has a gradient of its own."""
        return any(self.mismatch_of(name) is None and not self.tapped(name) for name in self.layers)

    def substitutes(self) -> dict[str, Tensor]:
        """Weights whose gradient is also B's."""
        return self.steps.taps() | {
            self.weight_name(name): weight_tap(layer.weight, self.plastic_of(name), same_gradient, None)
            for name, layer in self.layers.items()
            if self.mismatch_of(name) is None and self.tapped(name)
        }

    def to_weight(self, name: str, plastic: Tensor) -> Tensor:
        """B itself."""
        return plastic.clone()

    def from_weight(self, name: str, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight.clone()

    def own_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The weight's own: from equal gradients the optimiser made the same."""
        return copy.deepcopy(state)
