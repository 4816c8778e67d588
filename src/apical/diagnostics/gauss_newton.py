"""Angles between what a rule asks for and the Gauss-Newton and minimum-norm updates, for every rule and model.

Meulemans et al., "Credit Assignment in Neural Networks through Deep Feedback Control", arXiv 2106.07887. With the output
error delta = -dL/dr_L of one sample, J_W = d r_L / d W its Jacobian in all trained weights and biases, J = d r_L / d v:

    Gauss-Newton, batch size 1 (Theorem 2):   dW = J_W^T (J_W J_W^T + damping I)^-1 delta,        mean over the batch
    minimum norm (Theorem 3):                 dv = J^T (J J^T + damping I)^-1 delta,
                                              dW_i = [phi(v_i + dv_i) - phi(v_i)] r_{i-1}^T,      mean over the batch
    Gauss-Newton of the whole batch:          dW = -(G + damping I)^-1 dL/dW,  G = J_W^T (d2L/dr_L2) J_W

All are weight *changes*, to be compared with minus the rule's `.grad`. The network is taken in evaluation mode everywhere
(running statistics, no dropout), the rule's own gradient included: only there is the output a function of one sample.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from apical.core.activations import difference as rate_difference
from apical.core.affine import original
from apical.core.batch import require_rows
from apical.core.chain import Chain, States
from apical.core.credit import CreditRule, Loss
from apical.core.layers import is_weighted
from apical.core.losses import output_error
from apical.core.placement import require_whole
from apical.core.rest import evaluating, kept_attributes
from apical.core.wrapped import innermost
from apical.diagnostics.alignment import angle, unchanged
from apical.diagnostics.curvature import (
    conjugate_gradient,
    jacobian_rows,
    kernel_matrices,
    kernel_product,
    loss_curvature_product,
)
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.feedback_control.states import output_jacobian

Update: TypeAlias = dict[str, Tensor]
"""Weight change of each parameter, by its name in the model."""


def gauss_newton_update(
    model: nn.Module,
    inputs: Tensor,
    delta: Tensor,
    damping: float = 0.1,
    *,
    names: Collection[str] | None = None,
    dense_outputs: int = 64,
) -> Update:
    """Return the damped Gauss-Newton update of batch size 1, averaged over the batch.

    Args:
        model: any network that maps (batch, ...) to (batch, ...), each sample on its own in evaluation mode.
        inputs: (batch, ...).
        delta: wished change of the output, of the output's shape: minus the error of each sample.
        damping: positive; 0 is allowed where J_W J_W^T is regular.
        names: parameters to take into account; None: all that require a gradient.
        dense_outputs: up to this many outputs the matrix J_W J_W^T is built, above it conjugate gradients never build it.

    Returns:
        Parameter name -> change, of the parameter's shape.

    Raises:
        ConfigError: a negative damping, an unknown name, or conjugate gradients that do not converge.
        UnsupportedModelError: a module mixes the samples even in evaluation mode; it is named.
    """
    _require_damping(damping)
    require_rows("a Gauss-Newton update", inputs)
    require_precision(delta)
    delta = delta.detach().flatten(1)
    with evaluation(model):
        parameters, network = _functional(model, names)
        try:
            with kept_attributes(model):
                if delta.shape[1] <= dense_outputs:
                    kernel = kernel_matrices(network, parameters, inputs)  # J J^T of each sample: (batch, n_L, n_L)
                    kernel.diagonal(dim1=-2, dim2=-1).add_(damping)
                    weighted = torch.linalg.solve(kernel, delta)
                else:
                    product = kernel_product(network, parameters, inputs)
                    weighted = conjugate_gradient(lambda z: product(z) + damping * z, delta)
                # J^T (J J^T + damping I)^-1 delta, averaged over the batch
                pullback = vjp(lambda p: network(p, inputs).flatten(1), parameters)[1]
                update: Update = pullback(weighted / len(weighted))[0]
        except RuntimeError:  # torch.func cannot follow everything: PReLU, forward methods that write into tensors
            return _sample_by_sample(model, list(parameters), inputs, delta, damping)
    return update


def _sample_by_sample(model: nn.Module, names: list[str], inputs: Tensor, delta: Tensor, damping: float) -> Update:
    """Return the same from the Jacobian of one sample after the other."""
    own = dict(model.named_parameters())
    learned = {name: own[name] for name in names}
    flat = torch.zeros(sum(p.numel() for p in learned.values()), dtype=delta.dtype, device=delta.device)
    for sample, wished in zip(inputs, delta, strict=True):
        with kept_attributes(model):
            rows = jacobian_rows(model, list(learned.values()), sample)  # J: (n_L, parameters)
        kernel = rows @ rows.T + damping * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        flat += rows.T @ torch.linalg.solve(kernel, wished) / len(delta)
    parts = flat.split([p.numel() for p in learned.values()])
    return {name: part.view_as(p) for (name, p), part in zip(learned.items(), parts, strict=True)}


def minimum_norm_update(
    chain: Chain,
    inputs: Tensor,
    delta: Tensor,
    damping: float = 0.1,
    difference: Literal["rate", "voltage"] = "rate",
) -> Update:
    """Return the damped minimum-norm update of a chain, averaged over the batch.

    Args:
        chain: the network as a chain of layers.
        inputs: (batch, ...).
        delta: wished change of the output, of the output's shape.
        damping: as above.
        difference: "rate" for phi(v + dv) - phi(v) as teaching signal of a layer, "voltage" for dv itself.

    Returns:
        Parameter name -> change, for the layers' parameters that require a gradient.

    Raises:
        ConfigError: a negative damping or an unknown `difference`.
    """
    _require_damping(damping)
    if difference not in ("rate", "voltage"):
        raise ConfigError(f"difference must be 'rate' or 'voltage', not {difference!r}")
    require_precision(delta)
    states = chain.run(inputs)
    with torch.no_grad():
        jacobian = output_jacobian(chain, states)
        # sum_i R_i R_i^T: (batch, n_L, n_L)
        gram = sum((block @ block.mT for block in jacobian), torch.zeros_like(jacobian[-1][:, :, :1]))
        gram.diagonal(dim1=-2, dim2=-1).add_(damping)
        weighted = torch.linalg.solve(gram, delta.detach().flatten(1))
    update: Update = {}
    for i, (stage, block) in enumerate(zip(chain.stages, jacobian, strict=True)):
        shift = torch.einsum("bkn,bk->bn", block, weighted).view_as(states.v[i])  # dv_i = R_i^T weighted
        if difference == "rate":
            shift = rate_difference(stage.activation, states.v[i], states.r[i + 1], shift)
        own = {name: p for name, p in original(stage.layer).named_parameters() if p.requires_grad}
        if own:
            with torch.enable_grad():
                v = stage.layer(stage.seen(states.r[i]))
            changes = torch.autograd.grad(v, list(own.values()), shift / len(shift))
            prefix = f"{stage.name}." if stage.name else ""
            update |= {prefix + name: change for name, change in zip(own, changes, strict=True)}
    return update


@torch.no_grad()
def gauss_newton_targets(chain: Chain, states: States, delta: Tensor, damping: float = 0.0) -> list[Tensor]:
    """`t_i - r_i = J_i^T (J_i J_i^T + damping I)^-1 delta`, J_i = d r_L / d r_i, (batch, n_i) each (arXiv 2006.14331).

    Each layer's by itself: were it the only one to move, it would make the output move by delta, to first order. The
    output's own is delta. Without damping the inverse is the pseudo-inverse.

    Args:
        chain: the network as a chain of layers.
        states: of a pass through it.
        delta: wished change of the output, of the output's shape.
        damping: not negative.

    Raises:
        ConfigError: a negative damping.
    """
    _require_damping(damping)
    delta = delta.flatten(1)
    targets = [delta]
    for i, block in list(enumerate(output_jacobian(chain, states)))[:0:-1]:
        # J_{i-1} = R_i W_i: (batch, n_L, n_{i-1})
        below = chain.stages[i].transposed(block.reshape(-1, chain.stages[i].size)).view(len(delta), delta.shape[1], -1)
        if damping:
            eye = torch.eye(delta.shape[1], dtype=delta.dtype, device=delta.device)
            shift = below.mT @ torch.linalg.solve(below @ below.mT + damping * eye, delta.unsqueeze(-1))
        else:
            shift = torch.linalg.pinv(below) @ delta.unsqueeze(-1)
        targets.insert(0, shift.squeeze(-1))
    return targets


def gauss_newton_direction(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    damping: float = 0.1,
    *,
    names: Collection[str] | None = None,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> Update:
    """Return the Gauss-Newton change of the whole batch, `-(G + damping I)^-1 dL/dW`, by conjugate gradients.

    Args:
        model: any network; in evaluation mode it must treat the samples independently.
        loss: maps (output, targets) to a scalar that is convex in the output, such as cross entropy or squared error.
        inputs: (batch, ...).
        targets: what the loss takes.
        damping: positive.
        names: parameters to take into account; None: all that require a gradient.
        tolerance: relative residual at which to stop.
        iterations: maximum number of products with G.

    Raises:
        ConfigError: a negative damping, an unknown name, or no convergence (raise `damping` or `iterations`).
        UnsupportedModelError: a module mixes the samples even in evaluation mode, or torch.func cannot follow the model.
    """
    _require_damping(damping)
    with evaluation(model), kept_attributes(model, loss=loss):
        parameters, network = _functional(model, names)
        try:
            product, gradient = loss_curvature_product(lambda p: network(p, inputs), lambda r: loss(r, targets), parameters)
            flat = conjugate_gradient(lambda x: product(x) + damping * x, -gradient, tolerance, iterations)
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no Gauss-Newton direction, because torch.func cannot follow its forward method "
                f"({str(error).splitlines()[0]})"
            ) from error
    sizes = [p.numel() for p in parameters.values()]
    return {name: part.view_as(parameters[name]) for name, part in zip(parameters, flat.split(sizes), strict=True)}


def gauss_newton_alignment(rule: CreditRule, inputs: Tensor, targets: Tensor, damping: float = 0.1) -> dict[str, float]:
    """Angle of the weight change the rule asks for to the damped Gauss-Newton update of batch size 1, in degrees.

    Args:
        rule: any rule on any model; neither is changed.
        inputs: probe batch (batch, ...).
        targets: its targets.
        damping: 0.1 in the paper's toy experiments, 1 on images.

    Returns:
        Layer name -> angle over its weight and bias; "all" -> angle over all parameters the rule trains.

    Raises:
        UnsupportedModelError: a module mixes the samples even in evaluation mode.
    """
    change, delta = requested_change(rule, inputs, targets)
    return _angles(rule.model, change, gauss_newton_update(rule.model, inputs, delta, damping, names=change))


def minimum_norm_alignment(
    rule: CreditRule, inputs: Tensor, targets: Tensor, damping: float = 0.1, *, nudge: float | None = None
) -> dict[str, float]:
    """Angle of the weight change the rule asks for to the damped minimum-norm update, in degrees.

    Rates or voltages are compared as the rule does (its `difference`); rates where it has no such option.

    Args:
        rule: any rule on a chain of layers; neither is changed.
        inputs: probe batch (batch, ...).
        targets: its targets.
        damping: 0.1 in the paper's toy experiments, 1 on images.
        nudge: how far along the output error the minimum-norm update goes (lambda); matters only through the curvature of
            the activations. None: the rule's own `nudge` where it has one, else 0.001.

    Returns:
        Layer name -> angle over its weight and bias; "all" -> angle over all parameters the rule trains.

    Raises:
        ConfigError: a negative damping, or a nudge that is not positive.
        UnsupportedModelError: the model is no chain; the module is named.
    """
    require_rows("a minimum-norm angle", inputs)
    inner = innermost(rule)
    own = getattr(inner, "chain", None)
    chain = own if isinstance(own, Chain) else Chain(rule.model, inputs.shape[1:])
    change, delta = requested_change(rule, inputs, targets)
    if nudge is None:
        nudge = getattr(inner, "nudge", 1e-3)
        nudge = nudge if isinstance(nudge, int | float) else 1e-3  # other rules have words of this name
    if not 0 < nudge < math.inf:
        raise ConfigError(f"nudge must be positive; got {nudge:g}")
    voltage = getattr(inner, "difference", None) == "voltage"  # other rules have other things of this name
    target = minimum_norm_update(chain, inputs, nudge * delta, damping, "voltage" if voltage else "rate")
    return _angles(rule.model, change, target)


def requested_change(rule: CreditRule, inputs: Tensor, targets: Tensor) -> tuple[Update, Tensor]:
    """Return minus the rule's gradients for its model in evaluation mode, by name, and minus each sample's error.

    The rule, its model, their gradients, buffers and random state are left as they were.
    """
    require_whole(rule.model)
    with unchanged(rule), torch.enable_grad():
        rule.model.eval()
        output = rule.accumulate(inputs, targets).output
        require_rows("a Gauss-Newton or minimum-norm angle", inputs, output)
        output = output.detach()
        change = {name: -p.grad for name, p in rule.model.named_parameters() if p.grad is not None}
        error = output_error(rule.loss, output, targets)[1]
    return change, -len(output) * error  # the loss is a mean over the batch


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode.

    Raises:
        UnsupportedModelError: see :func:`require_apart`.
    """
    require_apart(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of transformer layers, which has no derivative
    try:
        with evaluating(model), sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def require_apart(model: nn.Module) -> None:
    """Refuse a model whose samples depend on each other in evaluation mode.

    Raises:
        UnsupportedModelError: a batch normalisation that has no running statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise UnsupportedModelError(
                f"module {name!r} ({type(module).__name__}) normalises over the batch even in evaluation mode, so the "
                "update of one sample is not defined; set track_running_stats=True or use GroupNorm"
            )


def require_precision(values: Tensor) -> None:
    """Refuse half precision, in which equations are not solved.

    Raises:
        UnsupportedModelError: the values are neither float32 nor float64.
    """
    if values.dtype not in (torch.float32, torch.float64):
        raise UnsupportedModelError(
            f"this measure solves equations, in float32 or float64 and not in {values.dtype}: take a copy of the model "
            "in float32 (model.float())"
        )


def _functional(
    model: nn.Module, names: Collection[str] | None
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """Return the chosen parameters, detached, and the network as their function: (parameters, inputs) -> (batch, n_L)."""
    every = dict(model.named_parameters())
    if names is None:
        names = [name for name, parameter in every.items() if parameter.requires_grad]
    if missing := [name for name in names if name not in every]:
        raise ConfigError(f"the model has no parameter {missing[0]!r}; known: {', '.join(every)}")
    if not names:
        raise ConfigError(f"{type(model).__name__} has no parameter that requires a gradient; unfreeze one")

    fixed = {name: parameter.detach() for name, parameter in every.items()}

    def network(parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        with kept_attributes(model):  # what a transform leaves in them is of no use outside it
            output: Tensor = functional_call(model, fixed | parameters, (inputs,))
        return output

    return {name: fixed[name] for name in names}, network


def _angles(model: nn.Module, change: Mapping[str, Tensor], target: Update) -> dict[str, float]:
    """Return the angle per weighted layer and over everything, for the parameters that both updates have."""
    both = [name for name in target if name in change]

    def over(names: list[str]) -> float:
        return angle(torch.cat([change[n].flatten() for n in names]), torch.cat([target[n].flatten() for n in names]))

    angles: dict[str, float] = {}
    for layer, module in model.named_modules():
        own = [name for name in both if name.startswith(f"{layer}." if layer else "")] if is_weighted(module) else []
        if own:
            angles[layer] = over(own)
    return angles | {"all": over(both)}


def _require_damping(damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise ConfigError(f"damping must not be negative; got {damping:g}")
