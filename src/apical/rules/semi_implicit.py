"""Semi-implicit backpropagation: neurons take an explicit step, weights a proximal one, layer by layer from the top.

    g_L = d ell / d a_L                                            of every sample, not divided by the batch size B
    D_l = g_l * phi_l'(a_l)                                        phi_L is the identity
    W_l <- argmin |A_l W^T + b_l - (a_l - eta D_l)|^2 + lam B |W - W_l|^2     A_l = r_{l-1}, phi_l on its linear piece
         = W_l - eta ((A_l^T A_l + lam B I)^-1 A_l^T D_l)^T
    b_l <- b_l - sum (A_l dW_l^T + eta D_l) / (B + lam B)          with the new weights
    g_{l-1} = D_l W_l                                              through the new weights, too

The gradients are old minus new weights, so SGD with lr 1 takes the proximal step. lam -> infinity: lam / eta times the
gradient is backpropagation's. The error of a lower layer depends on the new weights above it, so this is not an optimiser.

Local: the inverse correlation of a layer's inputs. The error comes through transposed weights, as in backpropagation.
Source: Liu & Zhang, arXiv 2002.03516, and the authors' MATLAB code.
Departures: the code's lam is for the sum over its batch of 100, that is 100 times the `proximity` of single samples here.
Hidden layers take the linearised step, where the code runs five steps of conjugate gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import derivative
from apical.core.batch import counted, fitted, require_precision
from apical.core.chain import Chain, States
from apical.core.credit import Credit, CreditRule, Loss, Root
from apical.core.losses import output_error, refuse_options, terms, value_at
from apical.core.processes import summed
from apical.core.solve import proximal
from apical.errors import ConfigError, UnsupportedModelError


class SemiImplicit(CreditRule):
    """Each layer takes a proximal step toward its neurons' explicit step.

    Args:
        model: a chain of Linear layers with element-wise activations.
        loss: maps (output, targets) to a scalar batch mean.
        eta: step of the neurons, in units of their errors.
        proximity: lam, per sample; the smaller, the more exactly the weights realise the neurons' step.

    Raises:
        ConfigError: an option is not positive; or a loss with `ignore_index` or a reduction other than the mean.
        UnsupportedModelError: the model is not a chain of Linear layers, or is in half precision.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> rule = SemiImplicit(model, eta=1.0)
    >>> optimizer = torch.optim.SGD(rule.parameters(), lr=1.0)
    >>> rule(torch.randn(8, 4), torch.arange(8) % 3).backward()
    >>> optimizer.step()
    """

    output_alone = True

    def __init__(self, model: nn.Module, loss: Loss = F.cross_entropy, eta: float = 0.1, proximity: float = 0.01) -> None:
        super().__init__(model, loss)
        if not (0 < eta < float("inf") and 0 < proximity < float("inf")):
            raise ConfigError(f"eta and proximity must be positive and finite, got eta={eta}, proximity={proximity}")
        refuse_options(self, "semi-implicit backpropagation", ("ignore_index", "reduction"))
        self.chain = Chain(model, dense=True)
        for stage in self.chain.stages:
            if not stage.is_dense:
                raise UnsupportedModelError(
                    f"layer {stage.name!r} ({type(stage.layer).__name__}) is not a matrix on vectors, for which the "
                    "proximal step is solved; use Linear layers on (batch, n)"
                )
        self.eta, self.proximity = eta, proximity

    @property
    def remarks(self) -> list[str]:
        """Remark on the optimiser that takes the proximal step."""
        return ["SGD with lr 1 takes semi-implicit backpropagation's step; with momentum or Adam it is a different method"]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch, the step of every layer in it."""
        self.require_attached()
        require_precision(type(self).__name__, self.chain.like)
        learns = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.chain.run(inputs)
            output = states.r[-1]
            targets = fitted(self.loss, output, targets)
            if not learns:
                return Credit.of([], output, value_at(self.loss, output, targets).detach())
            loss, error = output_error(self.loss, output, targets)
            roots = self._roots(states, error, targets)
        return Credit.of([*roots, *terms(loss)], output, loss)

    def _roots(self, states: States, error: Tensor, targets: Tensor) -> list[Root]:
        """Old minus new of every trained parameter."""
        rows = counted(targets, error)
        if rows is not None:
            states, error = states.rows(rows), error[rows]
        own = len(error)
        total = summed(error.new_tensor(float(own)))
        g = error * own  # of single samples
        roots: list[Root] = []
        for stage, a, v, r in reversed(list(zip(self.chain.stages, states.r, states.v, states.r[1:], strict=False))):
            weight, bias = stage.layer.weight, stage.layer.bias
            d = g * derivative(stage.activation, v, r)
            step = torch.zeros_like(weight)
            if weight.requires_grad:
                step = self.eta * proximal(a, d, self.proximity * total)
                roots.append((weight, step))
            if bias is not None and bias.requires_grad:
                left = self.eta * d - a @ step.T  # what the new weights leave to do
                roots.append((bias, summed(left.sum(0)) / (total * (1 + self.proximity))))
            g = d @ (weight - step)
        return roots
