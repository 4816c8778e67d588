"""Difference target propagation and its direct and reconstruction variants (Meulemans et al., arXiv 2006.14331).

    t_L = h_L - eta dL/dh_L,   t_i = g_i(t_above) + h_i - g_i(h_above),   dW_i = 2 [(t_i - h_i) * phi'(v_i)] h_{i-1}^T

Every hidden layer gets a target through a feedback map g_i and learns to reach it. "Above" is the next layer (sequential
feedback) or the output (direct feedback). g_i learns from noise to undo the forward path: with the difference
reconstruction loss its Jacobian becomes the pseudo-inverse of the whole path to the output, and the targets those of
Gauss-Newton; the layerwise loss of the original method inverts one layer at a time, which is not the same.

All targets are kept as their distance d_i = t_i - h_i, computed without the cancellation of `g(t) - g(h)`.

Departures from the released code: the output error is that of the batch's sum, so that eta does not depend on the batch
size; reconstruction losses are halved and summed over neurons, and those of "dtp" not divided by the variance of the noise,
next to which they are large (`reduction="mean"` gives theirs); that variance has no floor; the top hidden layer keeps its
forward bias.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import difference, plain, pulled_back
from apical.core.batch import counted, fitted, require_one_type, require_precision
from apical.core.chain import Chain, States
from apical.core.credit import Credit, CreditRule, Loss, Root
from apical.core.feedback import put
from apical.core.local import local_roots
from apical.core.losses import output_error, refuse_options, terms
from apical.core.noise import initial, normal
from apical.core.placement import layer_paths
from apical.errors import ConfigError, UnsupportedModelError, require_choice, require_count

Variant = Literal["dtp", "drl", "linear", "hidden", "control", "lee"]
VARIANTS = ("dtp", "drl", "linear", "hidden", "control", "lee")
LAYERWISE = ("dtp", "lee")
"""Variants whose maps each undo one layer."""
DIFFERENCES = ("drl", "linear", "hidden")
"""Variants whose reconstruction loss is about differences: it is as small as the noise, and divided by its variance."""


class Mapped(NamedTuple):
    """A feedback map at one point: potential v, value g, what it was given z, and z's own potential where a fixed random
    layer makes z; each (batch, n)."""

    v: Tensor
    g: Tensor
    z: Tensor
    random: Tensor | None = None


class FeedbackMap(nn.Module):
    """`g(z) = s(z Q^T + c)`.

    Args:
        size: number n_i of its target neurons.
        given: number of its input neurons.
        activation: s, element-wise.
        like: tensor whose dtype and device the weights have.
        bias: c exists; it cancels where s is linear and only differences of g are used.
        generator: of the first weights; None draws from PyTorch's global state.
    """

    def __init__(
        self,
        size: int,
        given: int,
        activation: nn.Module,
        like: Tensor,
        *,
        bias: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.q = nn.Parameter(initial(nn.init.xavier_normal_, (size, given), like, generator))
        self.c = nn.Parameter(like.new_zeros(size)) if bias else None
        self.activation = activation

    def at(self, z: Tensor, random: Tensor | None = None) -> Mapped:
        """The map at z."""
        v = F.linear(z, self.q, self.c)
        return Mapped(v, self.activation(v), z, random)

    def moved(self, at: Mapped, d: Tensor) -> Mapped:
        """How v, g and z move when z moves by d, each (batch, n)."""
        dv = F.linear(d, self.q)
        return Mapped(dv, difference(self.activation, at.v, at.g, dv), d)

    def gradients(self, at: Mapped, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Of `sum residual * g(z)` with respect to Q and c."""
        error = pulled_back(self.activation, at.v, at.g, residual)
        return error.T @ at.z, error.sum(0)


class DifferenceTargetPropagation(CreditRule):
    """Layers learn to reach targets that learned feedback maps compute from the output's target.

    | variant | feedback | what its maps minimise |
    | --- | --- | --- |
    | "dtp" | from the next layer | `(g_i(f_{i+1}(h_i + noise)) - (h_i + noise))^2` |
    | "drl" | from the next layer | difference reconstruction loss through all maps above |
    | "linear" | from the output, linear | difference reconstruction loss |
    | "hidden" | from the output, behind a fixed random layer | difference reconstruction loss |
    | "control" | from the output, linear | a plain reconstruction loss, a control |
    | "lee" | as "dtp", but the topmost hidden layer's target is a step down the loss (Lee et al. 2015) | as "dtp" |

    Args:
        model: a chain of weighted layers and element-wise activations; dense layers for "dtp", "drl" and "lee".
        loss: maps (output, targets) to a scalar batch mean.
        variant: see the table.
        eta: size of the output target's step.
        sigma: standard deviation of the noise from which feedback learns.
        normalised: divide updates by 2 eta, so that the output layer learns by its exact gradient.
        reduction: "sum" takes half the squared error summed over neurons, "mean" its mean, for "dtp" and "lee" divided by
            sigma^2, as the released code does.
        neurons: of the random layer of "hidden".
        recurrent: the maps of "hidden" also receive their own layer's state, without the noise that they should undo.
        learn: whether feedback is learned; "linear" with fixed feedback is direct feedback alignment.
        input_shape: of one sample; needed with convolutions.
        generator: for initial feedback and noise; None draws from PyTorch's global state.

    Raises:
        UnsupportedModelError: the model is not such a chain; the message names the module.
        ConfigError: an option is out of range; or a loss with a reduction other than the mean.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    >>> rule = DifferenceTargetPropagation(model, variant="linear")
    >>> credit = rule(torch.randn(8, 4), torch.randint(3, (8,)))
    >>> credit.backward()
    >>> model[0].weight.grad.shape, rule.maps[0].q.grad.shape
    (torch.Size([6, 4]), torch.Size([6, 3]))
    """

    two_phase = True
    output_alone = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        variant: Variant = "drl",
        eta: float = 0.05,
        sigma: float = 0.05,
        normalised: bool = True,
        reduction: Literal["sum", "mean"] = "sum",
        neurons: int = 1024,
        recurrent: bool = False,
        learn: bool = True,
        input_shape: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, loss)
        refuse_options(self, "difference target propagation", ("reduction",))
        self.generator = generator
        require_choice("variant", variant, VARIANTS)
        require_choice("reduction", reduction, ("sum", "mean"))
        require_count("neurons", neurons)
        if not (0 < eta < float("inf") and 0 < sigma < float("inf")):
            raise ConfigError(f"eta and sigma must be positive, got eta={eta}, sigma={sigma}")
        if recurrent and variant != "hidden":
            raise ConfigError(f'recurrent=True needs variant="hidden", not "{variant}"')
        self.chain = Chain(model, input_shape)
        self.variant, self.eta, self.sigma, self.normalised, self.reduction = variant, eta, sigma, normalised, reduction
        self.random_per_sample = learn
        self.sequential, self.recurrent = variant in ("drl", *LAYERWISE), recurrent
        stages = self.chain.stages
        if self.sequential and (spatial := [stage.name for stage in stages if len(stage.shape) > 1]):
            raise UnsupportedModelError(
                f'layer {spatial[0]!r} has no flat output; variant={variant!r} needs dense layers: use variant="linear"'
            )
        like = stages[0].layer.weight.detach()
        require_precision(type(self).__name__, like)
        outputs, last = stages[-1].size, len(stages) - 2
        self.maps = nn.ModuleList()
        for i, stage in enumerate(stages[: -2 if variant == "lee" else -1]):
            hidden = variant == "hidden" and i < last
            linear = not (self.sequential or hidden)
            given = stages[i + 1].size if self.sequential else neurons + recurrent * stage.size if hidden else outputs
            activation = nn.Identity() if linear else plain(stage.activation)
            bias = not linear or variant == "control"
            feedback = FeedbackMap(stage.size, given, activation, like, bias=bias, generator=generator)
            self.maps.append(feedback.requires_grad_(learn))
        wide = (neurons, outputs) if variant == "hidden" else (0, outputs)
        drawn = initial(nn.init.xavier_normal_, wide, like, generator) if wide[0] else like.new_empty(wide)
        self.register_buffer("random", drawn)

    random: Tensor

    def feedback_parameters(self) -> list[nn.Parameter]:
        """The trainable Q_i and c_i."""
        return [parameter for parameter in self.maps.parameters() if parameter.requires_grad]

    def feedback_weights(self) -> dict[str, Tensor]:
        """Q_i^T of sequential feedback, in the shape of the weight W_{i+1} that it undoes."""
        if not self.sequential:
            return {}
        pairs = zip(self.chain.stages[1:], self.maps, strict=False)
        return {stage.name: g.q.T for stage, g in pairs if isinstance(g, FeedbackMap)}

    def set_feedback(self, layer: str, **matrices: Tensor) -> None:
        """Set the map g_i to a layer: `Q` (n_i, inputs of the map) and, if it has a bias, `c` (n_i,).

        Raises:
            ConfigError: unknown layer or symbol, or a wrong shape.
        """
        handles: dict[str, dict[str, Tensor]] = {}
        for stage, i in zip(self.chain.stages, range(len(self.maps)), strict=False):
            g = self._map(i)
            handles[stage.name] = {"Q": g.q} if g.c is None else {"Q": g.q, "c": g.c}
        put(type(self).__name__, layer, handles, matrices)

    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """Activities "h" and targets "t" of every layer, each (batch, n_i); nothing is learned."""
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states, _, error, _ = self._answered(inputs, targets)
            h = [r.flatten(1) for r in states.r[1:]]
            d = self.distances(states, self.delta(error))
            first = len(h) - len(d)  # "lee" with one layer has targets for all of them too
            return {"h": h, "t": [rates + shift for rates, shift in zip(h[first:], d, strict=True)]}

    def delta(self, error: Tensor) -> Tensor:
        """Distance of the output's target from the output, (batch, n_L), for the loss's gradient `error`."""
        return error.flatten(1) * (-self.eta * len(error))

    def _answered(self, inputs: Tensor, targets: Tensor) -> tuple[States, Tensor, Tensor, Tensor]:
        """States and errors of the samples that the loss does not ignore, its value, and the output of all."""
        weight = self.chain.like
        require_precision(type(self).__name__, weight)
        require_one_type(type(self).__name__, weight, [self._map(i).q for i in range(len(self.maps))])
        states = self.chain.run(inputs)
        output = states.r[-1]
        loss, error = output_error(self.loss, output, fitted(self.loss, output, targets))
        rows = counted(targets, error)
        return (states, loss, error, output) if rows is None else (states.rows(rows), loss, error[rows], output)

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch, for the weights that :attr:`phase` names: forward, feedback, or both."""
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states, loss, error, output = self._answered(inputs, targets)
            at = self.points(states)
            roots: list[Root] = []
            logs: dict[str, Tensor] = {}
            if self.phase != "feedback":
                roots += [*self._forward_roots(states, self.distances(states, self.delta(error), at)), *terms(loss)]
            if self.phase != "forward" and self.feedback_parameters():
                learned, losses = self._feedback_roots(states, at)
                roots += learned
                names = [f"reconstruction {stage.name}" for stage in self.chain.stages]
                logs = {"reconstruction": torch.stack(losses).mean(), **dict(zip(names, losses, strict=False))}
        return Credit.of(roots, output, loss, logs)

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Exact for the output layer, in "lee" also for the one below, unless updates keep the factor 2 eta."""
        told = self.chain.stages[-2 if self.variant == "lee" else -1 :] if self.normalised else []
        return layer_paths(self.model, inputs, "signal of its own", exact=[stage.name for stage in told])

    def points(self, states: States) -> list[Mapped]:
        """Every feedback map evaluated at its inputs among the states: the next layer, or the output."""
        h = [r.flatten(1) for r in states.r[2:]]
        points = []
        for i in range(len(self.maps)):
            heard, random = h[i if self.sequential else -1], None
            if self.variant == "hidden" and i < len(self.maps) - 1:
                random = heard @ self.random.T
                heard = random.tanh()
                if self.recurrent:
                    heard = torch.cat((heard, states.r[i + 1].flatten(1)), 1)
            points.append(self._map(i).at(heard, random))
        return points

    def distances(self, states: States, d: Tensor, at: Sequence[Mapped] | None = None) -> list[Tensor]:
        """`t_i - h_i` of every layer (batch, n_i), given that of the output, and :meth:`points` if available."""
        distances, at = [d], self.points(states) if at is None else at
        if self.variant == "lee" and len(self.chain.stages) > 1:
            top = self.chain.stages[-1]
            distances.insert(0, top.transposed(pulled_back(top.activation, states.v[-1], states.r[-1], d)))
        for i in reversed(range(len(self.maps))):
            distances.insert(0, self._moved(i, at[i], distances[0] if self.sequential else d).g)
        return distances

    def _map(self, i: int) -> FeedbackMap:
        return cast(FeedbackMap, self.maps[i])

    def _moved(self, i: int, at: Mapped, d: Tensor) -> Mapped:
        """Change of map i when its input (next layer, or output) changes by d."""
        if at.random is not None:
            heard = at.z[:, : len(self.random)]
            d = F.pad(difference(nn.Tanh(), at.random, heard, d @ self.random.T), (0, at.z.shape[1] - len(self.random)))
        return self._map(i).moved(at, d)

    def _forward_roots(self, states: States, d: Sequence[Tensor]) -> list[Root]:
        factor = -(1 / self.eta if self.normalised else 2.0) / len(d[0])
        roots: list[Root] = []
        for i, stage in enumerate(self.chain.stages):
            signal = pulled_back(stage.activation, states.v[i], states.r[i + 1], d[i].view_as(states.v[i]))
            roots += local_roots(stage, signal, states.r[i], factor=factor)
        return roots

    def _feedback_roots(self, states: States, points: Sequence[Mapped]) -> tuple[list[Root], list[Tensor]]:
        """Roots of the feedback weights, and the reconstruction loss of every map."""
        roots: list[Root] = []
        losses = []
        for i, at in enumerate(points):
            g, noise = self._map(i), self.sigma * normal(states.r[i + 1], self.generator)
            moved = self._reconstructed(i, states, points, noise)
            residual = moved.g - noise.flatten(1)
            if self.variant not in DIFFERENCES:  # not the difference: the map itself is to give h + noise
                residual = residual + at.g - states.r[i + 1].flatten(1)
            scale = 1.0 / len(noise) if self.reduction == "sum" else 2.0 / residual.numel()
            if self.variant in DIFFERENCES or (self.variant in LAYERWISE and self.reduction == "mean"):
                scale /= self.sigma**2
            losses.append(0.5 * scale * residual.square().sum())
            for_q, for_c = g.gradients(Mapped(at.v + moved.v, at.g + moved.g, at.z + moved.z), residual)
            if self.variant in DIFFERENCES:
                here = g.gradients(at, residual)
                for_q, for_c = for_q - here[0], for_c - here[1]
            roots.append((g.q, scale * for_q))
            if g.c is not None:
                roots.append((g.c, scale * for_c))
        return roots, losses

    def _reconstructed(self, i: int, states: States, points: Sequence[Mapped], noise: Tensor) -> Mapped:
        """Change of map i when noise at layer i has propagated up and back down to it."""
        rates, top = states.r[i + 1] + noise, i + 1 if self.variant in LAYERWISE else len(self.maps)
        for stage in self.chain.stages[i + 1 : top + 1]:
            rates = stage.activation(stage.layer(stage.seen(rates)))
        d = (rates - states.r[top + 1]).flatten(1)
        if self.variant == "drl":
            for k in reversed(range(i + 1, len(self.maps))):
                d = self._moved(k, points[k], d).g
        return self._moved(i, points[i], d)
