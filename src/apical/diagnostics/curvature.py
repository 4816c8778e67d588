"""Matrix-free linear algebra of Gauss-Newton methods: products with J_W J_W^T and with J_W^T H J_W, conjugate gradients.

J_W is the Jacobian of a network's output in its parameters (a dict of tensors); H the Hessian of the loss in the output.
Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 14 (2002).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from apical.errors import ConfigError, require_count

Parameters: TypeAlias = dict[str, Tensor]
Network: TypeAlias = Callable[[Parameters, Tensor], Tensor]
"""(parameters, inputs (batch, ...)) -> output (batch, ...), each sample on its own."""

ENTRIES_AT_ONCE = 2**24
"""So many entries of per-sample Jacobians are held at a time."""


def kernel_matrices(network: Network, parameters: Parameters, inputs: Tensor) -> Tensor:
    """Return `J_W J_W^T` of each sample: (batch, n_L, n_L), by one vjp per output and sample."""

    def one(sample: Tensor) -> Tensor:
        result = vjp(lambda p: network(p, sample[None]).flatten(), parameters)
        output, pullback = result[0], result[1]
        (rows,) = vmap(pullback)(torch.eye(len(output), dtype=output.dtype, device=output.device))
        flat = torch.cat([row.flatten(1) for row in rows.values()], 1)
        return flat @ flat.mT

    with torch.no_grad():
        outputs = network(parameters, inputs[:1]).numel()
    kernels: Tensor = vmap(one, chunk_size=_samples_at_once(parameters, outputs))(inputs)
    return kernels


def kernel_product(network: Network, parameters: Parameters, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return `z -> J_W J_W^T z` for each sample, (batch, n_L) -> (batch, n_L), as a jvp of a vjp."""

    def one(sample: Tensor, z: Tensor) -> Tensor:
        def output(p: Parameters) -> Tensor:
            return network(p, sample[None]).flatten()

        (pulled,) = vjp(output, parameters)[1](z)
        image: Tensor = jvp(output, (parameters,), (pulled,))[1]
        return image

    batched = vmap(one, chunk_size=_samples_at_once(parameters, 1))
    return lambda z: batched(inputs, z)


def jacobian_rows(model: nn.Module, parameters: Sequence[Tensor], sample: Tensor) -> Tensor:
    """One sample's Jacobian (outputs, parameters), an output at a time: of any model, also where transforms fail."""
    with torch.enable_grad():
        output = model(sample[None]).flatten()
        grads = [
            torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in output
        ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])


def loss_curvature_product(
    output: Callable[[Parameters], Tensor], loss: Callable[[Tensor], Tensor], parameters: Parameters
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return `x -> J_W^T H J_W x` on flat vectors (parameters,), and the flat gradient `J_W^T dL/dr`."""
    result = vjp(output, parameters)
    bent = vjp(grad(loss), result[0])
    pullback, hessian = result[1], bent[1]

    def flat(change: Parameters) -> Tensor:
        return torch.cat([change[name].flatten() for name in parameters])

    def product(x: Tensor) -> Tensor:
        parts = x.split([p.numel() for p in parameters.values()])
        tangent = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
        change = jvp(output, (parameters,), (tangent,))[1]  # J_W x: (batch, n_L); then H, then J_W^T
        return flat(pullback(hessian(change)[0])[0])

    return product, flat(pullback(bent[0])[0])


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float | None = None, iterations: int | None = None
) -> Tensor:
    """Solve `A x = right` for symmetric positive definite A; leading dimensions are independent systems.

    Args:
        product: x -> A x, of right's shape.
        right: (..., n).
        tolerance: on the residual over the right-hand side; None: ten times the precision of right's dtype.
        iterations: maximum number of products; None: 10 n.

    Raises:
        ConfigError: not converged by then; or a tolerance outside of (0, 1).
    """
    tolerance = 10 * torch.finfo(right.dtype).eps if tolerance is None else tolerance
    iterations = 10 * right.shape[-1] if iterations is None else iterations
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance must lie between 0 and 1; got {tolerance:g}")
    require_count("iterations", iterations)
    scale = right.abs().amax(-1, keepdim=True)
    residual = right / torch.where(scale > 0, scale, 1)  # so that its square cannot underflow
    x, direction = torch.zeros_like(right), residual
    square = residual.square().sum(-1, keepdim=True)
    goal = tolerance**2 * square
    for _ in range(iterations):
        open_ = square > goal
        if not open_.any():
            break
        image = product(direction)
        step = torch.where(open_, square / (direction * image).sum(-1, keepdim=True), 0)  # a solved system stands still
        x = x + step * direction
        residual = residual - step * image
        previous, square = square, residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(open_, square / previous, 0) * direction
    if not (square <= goal).all():  # NaN too
        worst = tolerance * float((square / goal).nan_to_num(0).max().sqrt())
        raise ConfigError(
            f"conjugate gradients did not converge in {iterations} iterations (relative residual {worst:.1e}, wanted "
            f"{tolerance:.1e}); raise the damping or the number of iterations"
        )
    solution: Tensor = scale * x
    return solution


def _samples_at_once(parameters: Parameters, rows: int) -> int:
    return max(1, ENTRIES_AT_ONCE // (rows * sum(p.numel() for p in parameters.values())))
