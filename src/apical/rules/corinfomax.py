"""Correlative information maximisation (Bozkurt, Pehlevan & Erdogan, arXiv 2306.04810): layers that predict both ways.

    e^f_k = r_k - W^f_k r_{k-1},   e^b_k = r_k - W^b_k r_{k+1}

Each layer ascends its part of the information between neighbouring layers: it spreads its activities (the inverse of their
correlation matrix, B_k, is stored in lateral weights) and stays near both neighbours' predictions. With step mu, leak g,
regulariser eps and gamma = (1 - lambda) / lambda:

    hidden:  u_k <- u_k + mu { (W^f_k r_{k-1} + W^b_k r_{k+1} - 2 u_k) / eps - g u_k + g r_k + 2 gamma B_k r_k }
    output:  u_K <- u_K + mu { (W^f_K r_{K-1} - u_K) / eps - (g + 1) u_K + g r_K + gamma B_K r_K - beta (r_K - y) }
    r_k = clip(u_k, 0, 1)

The sparse form bounds the sum of a layer's activities by 1: the multiplier Lambda_k = ReLU(Lambda'_k) is subtracted:

    r_k = ReLU(u_k),   Lambda'_k <- Lambda'_k + eta_k (sum_j r_kj - 1 + Lambda_k - Lambda'_k)

Weights learn from the difference of prediction errors between a nudged phase (beta) and a free one. Forward and backward
weights learn separately, so neither is the other's transpose; the field is not a gradient, so neither are the updates.

Departures from the released code: biases, where the model has them, are weights from a unit that is always 1; a third phase
starts from the free state.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from apical.core.batch import fitted, require_classes, require_one_type, require_precision
from apical.core.chain import Chain
from apical.core.credit import Credit, CreditRule, Loss, Root
from apical.core.feedback import put
from apical.core.losses import refuse_options, squared_error, terms, value_at, wanted
from apical.core.noise import coins, initial
from apical.core.units import key
from apical.errors import ConfigError, UnsupportedModelError, require_choice, require_count

Nudge = Literal["one-sided", "random-sign", "symmetric"]
NUDGES = ("one-sided", "random-sign", "symmetric")


class Layers(NamedTuple):
    """Membrane potentials u_k, activities r_k, and Lambda'_k of the sparse form (batch, 1), whose positive part is its
    multiplier; from the first layer on."""

    u: list[Tensor]
    r: list[Tensor]
    multiplier: list[Tensor]


class Phases(NamedTuple):
    """Settled phases: free, nudged, the one it is compared with, and the difference of their nudges."""

    free: Layers
    nudged: Layers
    against: Layers
    width: Tensor


class CorInfoMax(CreditRule):
    """Network that settles with and without a nudge towards the label; forward, backward and lateral weights learn locally.

    Activities live in [0, 1] (or, sparse, are not negative and nearly sum to 1), whatever the model's activations are.

    Args:
        model: a chain of Linear layers, each followed by ReLU, `nn.Hardtanh(0, 1)` or nothing.
        loss: for reports, and for its own parameters; the dynamics nudge the output by `beta (r - y)`, y one-hot.
        nudge: "one-sided", "random-sign" (the sign of beta drawn for each batch) or "symmetric" (a third phase, -beta).
        beta: size of the nudge.
        epsilon: eps.
        forgetting: lambda, in (0, 1].
        leak: g.
        output_leak: the "+ 1" of the output's leak, as in the released code; 0 ascends the objective alone.
        step: mu.
        step_decay: mu_t = max(mu / (step_decay t + 1), step_floor); 0 keeps mu.
        step_floor: lower bound of the step, see `step_decay`.
        free_steps: T_f.
        nudged_steps: T_n.
        exact_inverse: divide the lateral change by `1 + gamma r^T B r`, sample by sample.
        sparse: rate eta_k of each layer's multiplier, which replaces the upper bound 1; empty for the range [0, 1].
        rates: factor of the published update of each layer's forward weights; empty for 1 / eps, with which it is the
            gradient of the layer's own objective. With 1 the optimiser's learning rates are those of the paper.
        backward_rates: the same for the backward weights of the hidden layers.
        generator: for the initial W^b and B and for random signs; None draws from PyTorch's global state.

    Attributes:
        backward: W^b_k.
        lateral: B_k, updated in every training step, in place; not under `torch.no_grad()`.

    Raises:
        UnsupportedModelError: the model is not such a chain; the message names the module.
        ConfigError: an option is out of range.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> rule = CorInfoMax(model)
    >>> credit = rule(torch.rand(8, 4), torch.randint(3, (8,)))
    >>> credit.backward()
    >>> model[0].weight.grad.shape, rule.backward[0].grad.shape
    (torch.Size([6, 4]), torch.Size([6, 3]))
    """

    feed_forward = False
    output_alone = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = squared_error,
        nudge: Nudge = "random-sign",
        beta: float = 1.0,
        epsilon: float = 0.15,
        forgetting: float = 0.99999,
        leak: float = 0.5,
        output_leak: float = 1.0,
        step: float = 0.05,
        step_decay: float = 0.0,
        step_floor: float = 0.001,
        free_steps: int = 30,
        nudged_steps: int = 10,
        exact_inverse: bool = False,
        sparse: Sequence[float] = (),
        rates: Sequence[float] = (),
        backward_rates: Sequence[float] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, loss)
        refuse_options(self, "correlative information maximisation")
        self.generator = generator
        require_choice("nudge", nudge, NUDGES)
        positive = {"beta": beta, "epsilon": epsilon, "step": step, "step_floor": step_floor}
        for name, value in (*positive.items(), ("leak", leak), ("output_leak", output_leak), ("step_decay", step_decay)):
            if not (isfinite(value) and value >= 0 and (value > 0 or name not in positive)):
                raise ConfigError(f"{name} must be {'positive' if name in positive else 'at least 0'}, got {value}")
        require_count("free_steps", free_steps)
        require_count("nudged_steps", nudged_steps)
        if not 0 < forgetting <= 1:
            raise ConfigError(f"forgetting must be in (0, 1], got {forgetting}")
        self.chain = Chain(model, dense=True)
        stages = self.chain.stages
        for stage in stages:
            if not stage.is_dense:
                raise UnsupportedModelError(f"layer {stage.name!r} is not a Linear layer on vectors, as corinfomax needs")
            phi = stage.activation
            bent = isinstance(phi, nn.Hardtanh) and not (phi.min_val == 0 and phi.max_val >= 1)
            if bent or not isinstance(phi, nn.ReLU | nn.Hardtanh | nn.Identity):
                kind = repr(phi) if bent else type(phi).__name__
                raise UnsupportedModelError(
                    f"the activation after layer {stage.name!r} ({kind}) does not fit the range [0, 1] of corinfomax's "
                    "activities: use ReLU or Hardtanh(0, 1) there"
                )
        for name, given, count in (("sparse", sparse, len(stages)), ("rates", rates, len(stages))):
            if len(given) not in (0, count):
                raise ConfigError(f"{name} needs one number for each of the {count} layers, got {len(given)}")
        if len(backward_rates) not in (0, len(stages) - 1):
            raise ConfigError(
                f"backward_rates needs {len(stages) - 1} numbers, one per hidden layer, got {len(backward_rates)}"
            )
        self.nudge, self.beta, self.epsilon, self.forgetting = nudge, beta, epsilon, forgetting
        self.gamma = (1 - forgetting) / forgetting
        self.leak, self.output_leak = leak, output_leak
        self.step, self.step_decay, self.step_floor = step, step_decay, step_floor
        self.free_steps, self.nudged_steps, self.exact_inverse = free_steps, nudged_steps, exact_inverse
        self.sparse, self.rates = tuple(sparse), tuple(rates) or (1 / epsilon,) * len(stages)
        self.backward_rates = tuple(backward_rates) or (1 / epsilon,) * (len(stages) - 1)
        like = stages[0].layer.weight.detach()
        require_precision(type(self).__name__, like)
        self.backward = nn.ParameterList(
            nn.Parameter(initial(nn.init.xavier_uniform_, (stage.size, above.size), like, generator))
            for stage, above in pairwise(stages)
        )
        self.lateral = nn.Module()
        for stage in stages:
            root = initial(nn.init.xavier_uniform_, (stage.size, stage.size), like, generator)
            self.lateral.register_buffer(key(stage.name), root @ root.T)

    @property
    def remarks(self) -> list[str]:
        """Remark that activities stay in [0, 1], whatever activation follows a layer."""
        boxed = [stage.name for stage in self.chain.stages if not isinstance(stage.activation, nn.Hardtanh)]
        if not boxed or self.sparse:
            return []
        return [f"activities of {' and '.join(boxed)} stay in [0, 1], whatever activation follows these layers"]

    def feedback_parameters(self) -> list[nn.Parameter]:
        """W^b_1..W^b_{K-1}."""
        return list(self.backward)

    def feedback_weights(self) -> dict[str, Tensor]:
        """(W^b_{k-1})^T, in the shape of W^f_k, the weight it runs against."""
        above = self.chain.stages[1:]
        return {stage.name: back.T for stage, back in zip(above, self.backward, strict=True)}

    def set_feedback(self, layer: str, **matrices: Tensor) -> None:
        """Set matrices of a layer k: lateral weights `B` (n_k, n_k), or `Wb`, W^b_{k-1} (n_{k-1}, n_k) from it downwards.

        Raises:
            ConfigError: unknown layer or symbol, or a wrong shape.
        """
        stages = self.chain.stages
        handles = {stage.name: {"B": b} for stage, b in zip(stages, self.inverses(), strict=True)}
        for stage, back in zip(stages[1:], self.backward, strict=True):
            handles[stage.name]["Wb"] = back
        put(type(self).__name__, layer, handles, matrices)

    def inverses(self) -> list[Tensor]:
        """B_1..B_K."""
        return [self.lateral.get_buffer(key(stage.name)) for stage in self.chain.stages]

    def answer(self, inputs: Tensor) -> Tensor:
        """r_K (batch, outputs) after T_f free steps; differentiable."""
        return self._free(self.chain.enter(inputs)).r[-1]

    def _free(self, x: Tensor) -> Layers:
        if x.dim() != 2:
            raise UnsupportedModelError(f"CorInfoMax takes inputs of shape (batch, inputs), not {tuple(x.shape)}")
        u = [x.new_zeros(len(x), stage.size) for stage in self.chain.stages]
        start = Layers(u, list(u), [x.new_zeros(len(x), 1) for _ in self.sparse])
        return self.settle(x, start, self.free_steps)

    def settle(self, x: Tensor, start: Layers, steps: int, push: Tensor | None = None, y: Tensor | None = None) -> Layers:
        """Run `steps` iterations from a state; layers update in order, each using the new values of those below.

        Args:
            x: (batch, inputs).
            start: the initial state.
            push: beta, a scalar; None is the free phase.
            y: targets (batch, outputs) of a nudged phase.
        """
        stages, last = self.chain.stages, len(self.chain.stages) - 1
        spread = [
            (1 if k == last else 2) * self.gamma * b + self.leak * torch.eye(len(b), dtype=b.dtype, device=b.device)
            for k, b in enumerate(self.inverses())
        ]
        first = stages[0].layer(x)  # W^f_1 x + b_1, the same in every step: (batch, n_1)
        u, r, multiplier = list(start.u), list(start.r), list(start.multiplier)
        for t in range(steps):
            mu = max(self.step / (self.step_decay * t + 1), self.step_floor) if self.step_decay else self.step
            near = mu / self.epsilon
            for k, stage in enumerate(stages):
                leak = near + mu * (self.leak + self.output_leak) if k == last else 2 * near + mu * self.leak
                # u_k + mu [ lateral r_k - leak u_k + (W^f_k r_{k-1} + b_k + W^b_k r_{k+1}) / epsilon ]: (batch, n_k)
                moved = torch.addmm(u[k], r[k], spread[k], beta=1 - leak, alpha=mu)
                if k == 0:
                    moved = moved.add_(first, alpha=near)
                else:
                    moved = moved.addmm_(r[k - 1], stage.layer.weight.T, alpha=near)
                    if stage.layer.bias is not None:
                        moved = moved.add_(stage.layer.bias, alpha=near)
                if k < last:
                    moved = moved.addmm_(r[k + 1], self.backward[k].T, alpha=near)
                elif push is not None and y is not None:
                    moved = moved - mu * push * (r[k] - y)
                if self.sparse:
                    price = multiplier[k].clamp_min(0.0)  # Lambda_k = ReLU(Lambda'_k); Lambda' itself may be negative
                    moved = moved - mu * price
                    u[k], r[k] = moved, moved.clamp_min(0.0)
                    excess = r[k].sum(1, keepdim=True) - 1
                    multiplier[k] = multiplier[k] + self.sparse[k] * (price - multiplier[k] + excess)
                else:
                    u[k], r[k] = moved, moved.clamp(0.0, 1.0)
        return Layers(u, r, multiplier)

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch: `output` and `loss` are those of the free phase. Without gradients nothing is learned."""
        self.require_attached()
        learns = self.training and torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            x, targets, phases = self._phases(inputs, targets)
            free, nudged, against, width = phases.free, phases.nudged, phases.against, phases.width
            output = free.r[-1]
            products = self._contrast(x, nudged.r, against.r, width)
            if learns and self.gamma:
                self._follow(nudged.r)
            logs = {"dead_outputs": (output.amax(0) <= 0).sum().to(output.dtype)}
        roots: list[Root] = [(parameter, product) for parameter, product in products if parameter.requires_grad]
        loss = value_at(self.loss, output, targets)
        roots += terms(loss)
        return Credit.of(roots, output, loss, logs)

    def _phases(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, "Phases"]:
        """Return the first layer's input, targets of a fitting shape, and the settled phases."""
        like = self.chain.like
        require_precision(type(self).__name__, like)
        require_one_type(type(self).__name__, like, [*self.backward, *self.inverses()])
        x = self.chain.enter(inputs)
        free = self._free(x)
        targets = fitted(self.loss, free.r[-1], targets)
        goals = fitted(squared_error, free.r[-1], targets)  # a user's loss may expect another shape
        if goals.dim() == 1:
            require_classes(goals, free.r[-1].shape[1])
        y = wanted(free.r[-1], goals)
        beta = x.new_full((), self.beta)
        if self.nudge == "random-sign":
            beta = beta * coins((), x, self.generator)
        start = Layers(list(free.r), list(free.r), list(free.multiplier))  # from the activities, not the old potentials
        nudged = self.settle(x, start, self.nudged_steps, beta, y)
        if self.nudge == "symmetric":
            opposite = self.settle(x, start, self.nudged_steps, -beta, y)
            return x, targets, Phases(free, nudged, opposite, 2 * beta)
        return x, targets, Phases(free, nudged, free, beta)

    def states(self, inputs: Tensor, targets: Tensor) -> dict[str, list[Tensor]]:
        """Return activities r_k of a batch, layer by layer (batch, n_k), without learning.

        "free"; "nudged", by +-beta as drawn; "against", the phase compared with the nudged one: the free one or the opposite
        nudge; and "width" (one number), the difference of their nudges.
        """
        self.require_attached()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            _, _, phases = self._phases(inputs, targets)
            free, nudged, against, width = phases
            return {"free": free.r, "nudged": nudged.r, "against": against.r, "width": [width]}

    def _contrast(
        self, x: Tensor, nudged: Sequence[Tensor], against: Sequence[Tensor], width: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Parameters, each with minus its requested change."""
        roots: list[tuple[Tensor, Tensor]] = []
        stages = self.chain.stages
        for k, stage in enumerate(stages):
            weight, bias, factor = stage.layer.weight, stage.layer.bias, -self.rates[k] / (width * len(x))
            if k == 0:  # the input's prediction is the same in both phases
                changed = (nudged[0] - against[0]) * factor
                product = changed.T @ x
            else:
                # e^f_k = r_k - W^f_k r_{k-1} - b_k in both phases: (batch, n_k)
                up, down = nudged[k] - stage.layer(nudged[k - 1]), against[k] - stage.layer(against[k - 1])
                product = factor * (up.T @ nudged[k - 1] - down.T @ against[k - 1])
                changed = (up - down) * factor
            roots.append((weight, product))
            if bias is not None:
                roots.append((bias, changed.sum(0)))
        for k, back in enumerate(self.backward):
            # e^b_k = r_k - W^b_k r_{k+1} in both phases: (batch, n_k)
            up, down = nudged[k] - nudged[k + 1] @ back.T, against[k] - against[k + 1] @ back.T
            product = up.T @ nudged[k + 1] - down.T @ against[k + 1]
            roots.append((back, -self.backward_rates[k] / (width * len(x)) * product))
        return roots

    def _follow(self, r: Sequence[Tensor]) -> None:
        """`B_k <- (B_k - gamma mean(z z^T)) / lambda`, `z = B_k r_k`."""
        for b, each in zip(self.inverses(), r, strict=True):
            z = each @ b  # z: (batch, n_k)
            weighed = z / (1 + self.gamma * (z * each).sum(1, keepdim=True)) if self.exact_inverse else z
            b.sub_(weighed.T @ z, alpha=self.gamma / len(each)).div_(self.forgetting)
