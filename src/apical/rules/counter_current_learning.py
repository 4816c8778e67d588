"""Counter-current learning (Kao & Hariharan, NeurIPS 2024, arXiv 2409.19841), for chains of dense layers.

Two networks of mirrored shape run in opposite directions and teach each other. F maps inputs x to logits, G maps the one-hot
code of each class to the input space; every layer's input is detached, so a loss at a layer reaches that layer alone:

    forward   A_l     = phi(sg(A_{l-1}) U_l^T + c_l)        A_0 = x,    logits = sg(A_{L-1}) U_L^T + c_L
    feedback  B_{l-1} = phi(sg(B_l) V_l^T)                  B_L = I     one row per class
    pairs     ell_l   = (256 s / d_l) mean (A_l B_l^T - M)^2,           M[i, k] = 1 where sample i is of class k
    output    ell_L   = the loss of the logits, for U_L alone

Both sides of a pair descend it (kappa = 512 s / (d_l batch K), R = A B^T - M):

    dU_l = (kappa R B_l * phi')^T A_{l-1},    dV_{l+1} = (kappa R^T A_l * phi')^T B_{l+1}

Local: an update needs the two activations that meet at its depth, and the label. G never reads F, so both passes may run at
the same time.

`pair="inner"` is the loss of the authors' MLP code, above. `pair="cosine"` is that of their CNN code and, nearly, the
paper's: with rows of unit length, s mean(Ahat Bhat^T - M)^2 and, against collapse, `spread` r times mean(Ahat Ahat^T - I)^2
+ mean(Bhat Bhat^T - I)^2. The paper writes the identity as the target, its code the membership matrix M.

Departures: G's last layer V_1 and the pair at the input are left out by default: nothing that predicts depends on them
(`input_pair=True` keeps them). The forward layers keep the biases they have; the authors' have none.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import derivative, plain
from apical.core.chain import Chain, States
from apical.core.credit import Credit, CreditRule, Loss
from apical.core.cut import output_error
from apical.core.local import known_root, local_root
from apical.core.units import weighted_layers
from apical.errors import ConfigError, UnsupportedModelError, unknown_name

Pair = Literal["inner", "cosine"]

WIDTH = 256
"""Layer width at which the inner loss has weight s: a constant of the authors' code."""

EPSILON = 1e-8
"""Added to the length of a row by the authors' cosine loss."""


def inner(a: Tensor, b: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The inner-product loss of a pair and its gradients.

    Args:
        a: forward activations (batch, d).
        b: feedback activations (K, d).
        labels: classes (batch,).
        scale: s.

    Returns:
        The loss, and its gradients with respect to a and b.
    """
    miss = _miss(a @ b.T, labels)
    weight = WIDTH * scale / (a.shape[1] * miss.numel())
    return weight * miss.square().sum(), 2 * weight * (miss @ b), 2 * weight * (miss.T @ a)


def cosine(a: Tensor, b: Tensor, labels: Tensor, scale: float, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the angles between a pair's rows, with anti-collapse terms of weight `spread`, and its gradients."""
    a_hat, a_length = _unit(a)
    b_hat, b_length = _unit(b)
    miss = _miss(a_hat @ b_hat.T, labels)
    loss = scale * miss.square().mean()
    for_a, for_b = 2 * scale / miss.numel() * (miss @ b_hat), 2 * scale / miss.numel() * (miss.T @ a_hat)
    if spread:
        for hat, gradient in ((a_hat, for_a), (b_hat, for_b)):
            among = hat @ hat.T
            among.diagonal().sub_(1)
            loss = loss + spread * among.square().mean()
            gradient.add_(among @ hat, alpha=4 * spread / among.numel())
    return loss, _through_length(for_a, a_hat, a_length), _through_length(for_b, b_hat, b_length)


def _miss(product: Tensor, labels: Tensor) -> Tensor:
    """`product - M`."""
    return product.scatter_add(1, labels.unsqueeze(1), product.new_full((), -1.0).expand(len(labels), 1))


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their length plus EPSILON, and that length."""
    length = rows.norm(dim=1, keepdim=True)
    return rows / (length + EPSILON), length


def _through_length(gradient: Tensor, hat: Tensor, length: Tensor) -> Tensor:
    """From a gradient with respect to the rows of `_unit` to one with respect to the rows that it was given."""
    padded = length + EPSILON
    # the length itself has no EPSILON and may be zero, where hat is zero too
    along = (hat * gradient).sum(1, keepdim=True) * padded / length.clamp_min(torch.finfo(length.dtype).tiny)
    return (gradient - hat * along) / padded


class CounterCurrentLearning(CreditRule):
    """Two anti-parallel networks that teach each other by local losses.

    Args:
        model: a chain of Linear layers and element-wise activations (see :class:`apical.core.chain.Chain`).
        loss: maps (logits, class labels) to a scalar batch mean; it teaches the last layer alone.
        pair: "inner" or "cosine".
        scale: s, weight of the pairs' losses; None: 0.5 for "inner", 1 for "cosine".
        spread: r, weight of the anti-collapse terms of "cosine"; above 0 samples of a batch depend on each other.
        input_pair: keep V_1 and the pair at the input, which no prediction depends on.

    Raises:
        UnsupportedModelError: the model is no such chain; the module is named.
        ConfigError: an option is out of range.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 3))
    >>> rule = CounterCurrentLearning(model)
    >>> rule(torch.randn(8, 4), torch.randint(3, (8,))).backward()
    >>> [tuple(v.grad.shape) for v in rule.feedback], tuple(rule.predict(torch.randn(8, 4), depth=1).shape)
    ([(6, 5), (5, 3)], (8,))
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        pair: Pair = "inner",
        scale: float | None = None,
        spread: float = 0.0,
        input_pair: bool = False,
    ) -> None:
        super().__init__(model, loss)
        if pair not in ("inner", "cosine"):
            raise unknown_name("pair", pair, ("inner", "cosine"))
        scale = (0.5 if pair == "inner" else 1.0) if scale is None else scale
        if not (0 < scale < float("inf") and 0 <= spread < float("inf")):
            raise ConfigError(f"scale must be positive and spread not negative, got scale={scale}, spread={spread}")
        if spread and pair == "inner":
            raise ConfigError("spread is an option of pair='cosine'; pair='inner' has no anti-collapse terms")
        self.pair, self.scale, self.spread, self.input_pair = pair, scale, spread, input_pair
        for name, layer in weighted_layers(model).items():
            if not isinstance(layer, nn.Linear):
                raise UnsupportedModelError(
                    f"layer {name!r} ({type(layer).__name__}) is not dense: only Linear layers have a mirror yet; "
                    "use another rule"
                )
        self.chain = Chain(model)
        for stage in self.chain.stages:
            if not stage.is_dense:
                raise UnsupportedModelError(
                    f"layer {stage.name!r} is not given the vector that the layer before makes: only Linear layers "
                    "one after another have a mirror yet; use another rule"
                )
        self.feedback = nn.ParameterList()
        for stage in self.chain.stages[0 if input_pair else 1 :]:  # V_l is (d_{l-1}, d_l)
            bound = stage.size**-0.5
            self.feedback.append(nn.Parameter(torch.empty_like(stage.layer.weight.T).detach().uniform_(-bound, bound)))

    def feedback_parameters(self) -> list[nn.Parameter]:
        """The weights of G."""
        return list(self.feedback)

    def feedback_weights(self) -> dict[str, Tensor]:
        """V_l^T beside U_l, by the name of the forward layer."""
        stages = self.chain.stages[len(self.chain.stages) - len(self.feedback) :]
        return {stage.name: weight.T for stage, weight in zip(stages, self.feedback, strict=True)}

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch of class labels."""
        self.require_attached()
        if targets.is_floating_point() or targets.dim() != 1:
            raise ConfigError("counter-current learning needs one class label per sample")
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = self.chain.run(inputs)
            output = states.r[-1]
            loss, error = output_error(self.loss, output, targets)
            signals, gradients, local = self._pairs(states, targets)
        error = error * derivative(self.chain.stages[-1].activation, states.v[-1], output)
        with torch.enable_grad():
            layers = zip(self.chain.stages, [*signals, error], states.r[:-1], strict=True)
            roots = [local_root(stage, signal, rates) for stage, signal, rates in layers]
            pairs = zip(self.feedback, gradients, strict=True)
            roots += [known_root(weight, gradient) for weight, gradient in pairs if weight.requires_grad]
        kept = [root for root in roots if root is not None]
        return Credit(kept, [None] * len(kept), output, loss, {"local": local})

    def codes(self) -> States:
        """G's pass on all classes: `v[l]` and `r[l]` of depth l, (K, d_l); depths without a layer of G are left empty."""
        stages = self.chain.stages
        weight = stages[-1].layer.weight
        depth = len(stages)
        r = [weight.new_empty(0)] * depth + [torch.eye(stages[-1].size, dtype=weight.dtype, device=weight.device)]
        v = list(r)
        with torch.no_grad():
            for level, feedback in zip(range(depth - 1, -1, -1), reversed(self.feedback), strict=False):
                v[level] = r[level + 1] @ feedback.T
                r[level] = plain(stages[level - 1].activation)(v[level]) if level else v[level]
        return States(v, r)

    def _pairs(self, states: States, labels: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Signals at the hidden potentials of F, gradients of the weights of G, and the sum of the local losses."""
        codes, stages = self.codes(), self.chain.stages
        signals: list[Tensor] = []
        gradients: list[Tensor] = []
        total = states.r[-1].new_zeros(())
        for level in range(0 if self.input_pair else 1, len(stages)):
            a, b = states.r[level], codes.r[level]
            pair = inner(a, b, labels, self.scale) if self.pair == "inner" else cosine(a, b, labels, self.scale, self.spread)
            loss, for_a, for_b = pair
            total = total + loss
            if level:
                activation = stages[level - 1].activation
                signals.append(for_a * derivative(activation, states.v[level - 1], a))
                for_b = for_b * derivative(activation, codes.v[level], b)
            gradients.append(for_b.T @ codes.r[level + 1])
        return signals, gradients, total

    @torch.no_grad()
    def predict(self, inputs: Tensor, depth: int | None = None) -> Tensor:
        """Classes (batch,) read out at a depth 1..L: the nearest code of G there; L, the default, is the model's own output.

        Raises:
            ConfigError: there is no read-out at this depth.
        """
        last = len(self.chain.stages)
        depth = last if depth is None else depth
        if not (0 if self.input_pair else 1) <= depth <= last:
            raise ConfigError(f"there is a read-out at depths {0 if self.input_pair else 1} to {last}, not at {depth}")
        a = self.chain.run(inputs).r[depth]
        if depth == last:
            return a.argmax(1)
        b = self.codes().r[depth]
        return (a @ (_unit(b)[0] if self.pair == "cosine" else b).T).argmax(1)
