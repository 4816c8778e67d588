"""Dual propagation (Hoier, Staudt & Zach, arXiv 2302.01228; Hoier & Zach, arXiv 2402.08573): neurons of two compartments.

    a_l = W_l m_{l-1} + b_l,   D_l = W_{l+1}^T delta_{l+1},   m_l = alpha s+_l + (1 - alpha) s-_l,   delta_l = s+_l - s-_l

    transposed   s+_l = phi(a_l + (1 - alpha) D_l),   s-_l = phi(a_l - alpha D_l)
    original     s+_l = phi(a_l + alpha D_l),         s-_l = phi(a_l - (1 - alpha) D_l)
    output       delta_L = -beta g,   g = d ell / d a_L of each sample, at the feed-forward a_L (original: the present one)
    learning     dW_l = delta_l m_{l-1}^T / (beta B)

The mean of the two compartments propagates up, their difference down. After the feed-forward pass, one sweep from top to
bottom computes each layer's difference: a backward pass in which the activation's derivative is a finite difference over
[a - alpha D, a + (1 - alpha) D]. With linear units "transposed" is backpropagation for every alpha and beta; otherwise the
distance is O(beta^2) at alpha = 1/2 and O(beta) elsewhere. "original" is the same at alpha = 1/2; elsewhere its mean is
not the feed-forward activity even for linear units, and training with a large nudge fails.

Local: a layer needs its two compartments and its inputs; feedback runs through the next layer's transposed weights.
Departures: the state is stored as s-_l and delta_l, a form that loses no digits at a small nudge. The windows of
max-pooling are those of the mean's upward pass.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import difference
from apical.core.batch import counted, fitted, require_precision
from apical.core.chain import Chain, Stage, States
from apical.core.credit import Credit, CreditRule, Loss, Root
from apical.core.local import local_roots
from apical.core.losses import output_error, refuse_options, terms, value_at
from apical.errors import ConfigError, UnsupportedModelError, require_choice, require_count

Variant = Literal["transposed", "original"]
VARIANTS: tuple[Variant, ...] = ("transposed", "original")


class Dyads(NamedTuple):
    """Means m_0..m_{L-1}, m_0 the input, and differences delta_1..delta_L, (batch, ...); B samples."""

    m: list[Tensor]
    delta: list[Tensor]
    samples: int


class DualPropagation(CreditRule):
    """Every layer learns from the difference of its neurons' two compartments, computed in one downward sweep.

    Args:
        model: a chain of weighted layers and element-wise activations, with pooling anywhere; the last layer has no
            activation.
        loss: maps (output, targets) to a scalar batch mean.
        variant: "transposed" (2024) or "original" (2023).
        beta: size of the nudge, per sample.
        alpha: weight of the compartment that is nudged towards the target, in [0, 1].
        sweeps: number of downward sweeps, with an upward sweep of the means between them.
        input_shape: of one sample, where there are convolutions.

    Attributes:
        differences: True; the signals are finite differences, equal to derivatives while no unit leaves a linear piece.

    Raises:
        ConfigError: an option is out of range; or the loss has `ignore_index` or a reduction other than the mean.
        UnsupportedModelError: the model is not such a chain, or is in half precision; the message names the module.

    Logs: `nudge`, the size of hidden differences relative to hidden means: near 0 the run is backpropagation.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    >>> rule = DualPropagation(model, beta=0.1)
    >>> credit = rule(torch.randn(8, 4), torch.arange(8) % 3)
    >>> credit.backward()
    >>> model[0].weight.grad.shape
    torch.Size([6, 4])
    """

    output_alone = True
    differences = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        variant: Variant = "transposed",
        beta: float = 0.1,
        alpha: float = 0.5,
        sweeps: int = 1,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, loss)
        require_choice("variant", variant, VARIANTS)
        refuse_options(self, "dual propagation", ("ignore_index", "reduction"))
        if not (0 < beta < float("inf") and 0 <= alpha <= 1):
            raise ConfigError(f"beta must be positive and alpha in [0, 1]; got beta={beta}, alpha={alpha}")
        require_count("sweeps", sweeps)
        self.variant, self.beta, self.alpha, self.sweeps = variant, beta, alpha, sweeps
        self.chain = Chain(model, input_shape, pools=True)
        last = self.chain.stages[-1]
        if not isinstance(last.activation, nn.Identity) or last.after:
            raise UnsupportedModelError(
                f"an activation or pooling follows the last layer {last.name!r}, whose differences come from the loss at "
                "its own output; move it into the loss, or end the model with another layer"
            )

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch; `output` and `loss` are those of the feed-forward pass."""
        self.require_attached()
        require_precision(type(self).__name__, self.chain.like)
        learns = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.chain.run(inputs)
            output = states.v[-1]
            targets = fitted(self.loss, output, targets)
            loss = value_at(self.loss, output, targets)
            if not learns:
                return Credit.of([], output, loss)
            dyads = self._dyads(states, targets)
            roots: list[Root] = []
            for stage, m, delta in zip(self.chain.stages, dyads.m, dyads.delta, strict=True):
                roots += local_roots(stage, at_layer(stage, delta, m), m, factor=-1 / (self.beta * dyads.samples))
            logs = {"nudge": relative(dyads.delta[:-1], dyads.m[1:], output)}
        return Credit.of([*roots, *terms(loss)], output, loss, logs)

    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """ "mean", m_1..m_{L-1}, and "difference", delta_1..delta_L (batch, ...), without learning."""
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.chain.run(inputs)
            dyads = self._dyads(states, fitted(self.loss, states.v[-1], targets))
        return {"mean": dyads.m[1:], "difference": dyads.delta}

    def _dyads(self, states: States, targets: Tensor) -> Dyads:
        """Run the sweeps, starting from a feed-forward pass."""
        stages, top = self.chain.stages, len(self.chain.stages) - 1
        v, m = list(states.v), list(states.r[:-1])
        nudge, count = self._nudge(v[top], targets)
        delta = [*v[:-1], nudge]  # hidden ones, like the D_l, are written by the first sweep
        d = list(delta)
        for sweep in range(self.sweeps):
            if sweep:  # the first layer's a does not change
                for k in range(top):
                    v[k] = stages[k].potential(m[k]) if k else v[k]
                    d[k] = handed_down(stages[k + 1], delta[k + 1], m[k + 1]) if stages[k + 1].bends else d[k]
                    m[k + 1], delta[k] = self._dyad(stages[k], v[k], d[k])
                if self.variant == "original":
                    delta[top], _ = self._nudge(stages[top].potential(m[top]), targets)
            for k in reversed(range(top)):
                d[k] = handed_down(stages[k + 1], delta[k + 1], m[k + 1])
                m[k + 1], delta[k] = self._dyad(stages[k], v[k], d[k])
        return Dyads(m, delta, count)

    def _nudge(self, output: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """delta_L, and the number of samples that count."""
        _, error = output_error(self.loss, output, targets)
        rows = counted(targets, error)
        count = len(output) if rows is None else len(rows)
        return error * (-self.beta * count), count

    def _dyad(self, stage: Stage, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """m_l and delta_l."""
        down = self.alpha if self.variant == "transposed" else 1 - self.alpha
        low = torch.sub(v, d, alpha=down)
        rate = stage.activation(low)
        delta = difference(stage.activation, low, rate, d)
        return torch.add(rate, delta, alpha=self.alpha), delta


def handed_down(stage: Stage, delta: Tensor, m: Tensor) -> Tensor:
    """`W^T delta` (batch, *input_shape), back through the modules around the layer, with the pooling windows at m."""
    if stage.after or stage.bends:
        pulled: Tensor = torch.func.vjp(stage.potential, m)[1](delta)[0]
        return pulled
    return stage.transposed(delta.flatten(1)).view(len(delta), *stage.input_shape)


def at_layer(stage: Stage, delta: Tensor, m: Tensor) -> Tensor:
    """The difference at the layer's own output, before pooling."""
    if not stage.after:
        return delta

    pulled: Tensor = torch.func.vjp(stage.pooled, stage.layer(stage.seen(m)))[1](delta)[0]
    return pulled


def relative(differences: Sequence[Tensor], means: Sequence[Tensor], like: Tensor) -> Tensor:
    """Root mean square of differences over that of means, over all layers; zero if there are none."""
    zero = like.new_zeros(())
    above, below = (torch.stack([zero, *(each.norm() for each in group)]).norm() for group in (differences, means))
    return torch.where(below == 0, zero, above / below)
