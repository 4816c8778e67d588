"""Top-down credit before credit diffusion: one credit for every weight of a small learner.

    g_ij = 1/B sum_b c_ij f'(a_i) x_j       credit times what is local to the synapse
    g_ij = 1/B sum_b c_ij                   credit alone

where credit per unit, the starting point of diffusion in :mod:`apical.rules.top_down.teacher`, has c_ij = c_i. The paper
says that diffusion reduces the weights of the top-down network; credit per weight is the largest network to reduce. It is
used only in the study of diffusion, for perceptrons with one hidden layer of tanh units, and is written for speed: the
credits of the first layer's weights, one per example, are never materialised.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Credit, CreditRule
from apical.errors import UnsupportedModelError
from apical.evolution.classification import Classification, Images, Setting
from apical.rules.top_down.equivariant import Network
from apical.rules.top_down.teacher import TopDownNetwork, described


class SynapticCredit(CreditRule):
    """A top-down network maps [prediction, target] to a credit for every weight and bias.

    Args:
        model: affine, tanh, affine; its output is class scores.
        teacher: emits as many values as the model has parameters: those of the hidden units, then those of the output
            units, each unit's weights followed by its bias. The output's apply to the same quantity as the teacher's credit.
        local: multiply credit by the activity and the slope at the synapse; otherwise credit is the gradient.
        silent: give no credit to hidden units.

    Raises:
        UnsupportedModelError: the model is not of this form.
    """

    def __init__(self, model: nn.Module, teacher: TopDownNetwork, local: bool = True, silent: bool = False) -> None:
        super().__init__(model, F.cross_entropy)
        kinds = [type(m) for m in model.modules() if not list(m.children()) and not isinstance(m, nn.Flatten)]
        if kinds != [nn.Linear, nn.Tanh, nn.Linear]:
            raise UnsupportedModelError(f"credit per weight needs affine, tanh, affine; got {[k.__name__ for k in kinds]}")
        self.teacher, self.local, self.silent = teacher.requires_grad_(False), local, silent

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Return credit whose roots are the model's parameters and whose signals are their gradients."""
        first, second = (m for m in self.model.modules() if isinstance(m, nn.Linear))
        x = inputs.flatten(1)
        a = torch.tanh(F.linear(x, first.weight.detach(), first.bias.detach()))
        output = F.linear(a, second.weight.detach(), second.bias.detach())
        prediction, target = described(output, targets)
        # The top-down network's last layer is affine: c_b = U t_b, so that sums over examples can be taken before it.
        top, t = cast(nn.Linear, self.teacher.body[-1]), self.teacher.state(prediction, target, classes=True).detach()
        u = top.weight.detach()
        if top.bias is not None:
            t, u = with_one(t), torch.cat([u, top.bias.detach()[:, None]], 1)
        hidden, last = u.split([a.shape[1] * (x.shape[1] + 1), output.shape[1] * (a.shape[1] + 1)])
        hidden, last = hidden.unflatten(0, (a.shape[1], -1)), last.unflatten(0, (output.shape[1], -1))
        if self.teacher.relative:  # shared by the units, as with credit per unit
            hidden = hidden / a.shape[1] ** self.teacher.share
        t = t / len(x)
        if self.local:
            on_logits = self.teacher.credit == "logits"
            top_sum = at_slope(last, t, a, torch.ones_like(output)) if on_logits else at_softmax(last, t, a, prediction)
            sums = [at_slope(hidden, t, x, 1 - a.square()), top_sum]
        else:
            sums = [hidden @ t.sum(0), last @ t.sum(0)]
        roots = [first.weight, first.bias, second.weight, second.bias]
        signals = [part for layer in sums for part in (layer[:, :-1], layer[:, -1])]
        used = slice(2, None) if self.silent else slice(None)
        return Credit(roots[used], signals[used], output, self.loss(output, targets))


def with_one(x: Tensor) -> Tensor:
    """Append the constant 1 of the bias to activities (batch, n): (batch, n + 1)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def at_slope(u: Tensor, t: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """Return `sum_b c_ij f'_i x_j` (units, inputs + 1) for credits `c_ij = sum_h u_ijh t_h`.

    Args:
        u: last layer of the top-down network, (units, inputs + 1, h).
        t: its input, (batch, h).
        x, slope: the layer's inputs (batch, inputs), and its units' slopes (batch, units): 1 - a^2 for tanh.
    """
    return torch.einsum("ijh,hij->ij", u, torch.einsum("bh,bi,bj->hij", t, slope, with_one(x)))


def at_softmax(u: Tensor, t: Tensor, x: Tensor, p: Tensor) -> Tensor:
    """Return `sum_b p_i (c_ij - sum_k p_k c_kj) x_j` (classes, inputs + 1): credit on probabilities p, pulled back."""
    weighted = torch.einsum("ijh,bh->bij", u, t) * p[:, :, None]
    return ((weighted - p[:, :, None] * weighted.sum(1, keepdim=True)) * with_one(x)[:, None]).sum(0)


class SynapticClassification(Classification):
    """Evolution of top-down networks with a credit per weight; `local` as in :class:`SynapticCredit`."""

    def __init__(self, sets: list[Images], setting: Setting, local: bool = True) -> None:
        self.local = local
        super().__init__(sets, setting)

    def rule(self, model: nn.Module, teacher: Network, silent: bool = False) -> CreditRule:
        """Return the rule that trains a learner."""
        assert isinstance(teacher, TopDownNetwork)
        return SynapticCredit(model, teacher, self.local, silent)

    def network(self, seed: int) -> TopDownNetwork:
        """Return an unevolved top-down network with one output per parameter of the learner."""
        emitted = sum(parameter.numel() for parameter in self.learner(0).parameters())
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            widths = [emitted - self.outputs]
            kind: dict[str, Any] = {"relative": self.setting.relative, "credit": self.setting.credit}
            return TopDownNetwork(self.outputs, widths, self.setting.hidden, **kind)
