"""Fixed-step solvers of dy/dt = f(t, y) for batches, and settling until each sample stands still.

    euler   y + dt k1                                                          order 1
    heun    y + dt (k1 + k2) / 2,   k2 = f(t + dt, y + dt k1)                  order 2
    rk4     y + dt (k1 + 2 k2 + 2 k3 + k4) / 6, the classical tableau          order 4
    map     y[t + 1] = f(t, y[t]): dynamics given as an update, such as layer after layer or with clipping

(Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.1.) The Euler-Maruyama method adds
sigma sqrt(dt) xi to the Euler step (Kloeden & Platen, Numerical Solution of Stochastic Differential Equations, 9.1).

A state is a tensor or a tuple of tensors; f takes the time as a float and returns the same structure and shapes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from apical.errors import ConfigError, InstabilityError, unknown_name

S = TypeVar("S", Tensor, tuple[Tensor, ...])
State = Tensor | tuple[Tensor, ...]
Tensors = tuple[Tensor, ...]
Field = Callable[[float, Tensors], Tensors]
"""f on tuples, the form in which this file works."""


class Settled(NamedTuple, Generic[S]):
    """Where `settle` ended; each field but the first is (batch,).

    Attributes:
        state: the states, in the structure of y0.
        steps: steps that each sample has taken (long).
        converged: whether its residual came down to the tolerance.
        residual: at the returned state.
    """

    state: S
    steps: Tensor
    converged: Tensor
    residual: Tensor


def integrate(
    f: Callable[[float, S], S], y0: S, dt: float, steps: int, method: str = "euler", save: bool = False, t0: float = 0.0
) -> S:
    """`steps` steps of size `dt` from y0 at time t0; gradients flow through if autograd is on.

    Returns:
        The last state; with `save` all of them, stacked on a new first dimension of length steps + 1.

    Raises:
        ConfigError: unknown method, dt not positive, steps negative, or f returns other shapes than y0's.
    """
    advance = _method(method)
    _check_steps(dt, "steps", steps)
    y, field = _parts(y0), _on_tuples(f, y0)
    path = [y]
    for step in range(steps):
        t = t0 + step * dt
        y = advance(field, t, y, dt, field(t, y))
        if save:
            path.append(y)
    return _like(y0, _stacked(path) if save else y)


def euler_maruyama(
    f: Callable[[float, S], S],
    sigma: float | Tensor | Sequence[float | Tensor],
    y0: S,
    dt: float,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    noise: S | None = None,
    save: bool = False,
    t0: float = 0.0,
) -> S:
    """Solve dy = f dt + sigma dW: y[t + 1] = y[t] + dt f(t, y[t]) + sigma sqrt(dt) xi[t], xi ~ N(0, I).

    Args:
        f: the drift.
        sigma: strength of the noise: a number, a tensor that broadcasts to the state, or one of these for each tensor of
            the state.
        y0: state at time t0.
        dt: step.
        steps: their number.
        generator: source of the noise; numbers are drawn on its device.
        noise: xi drawn beforehand, in the structure of y0 with a first dimension of length `steps`; instead of `generator`.
        save: return all states, stacked on a new first dimension of length steps + 1.
        t0: time at the start.

    Raises:
        ConfigError: both or none of generator and noise are given, or a shape, dt or the number of steps is wrong.
    """
    _check_steps(dt, "steps", steps)
    if (generator is None) == (noise is None):
        raise ConfigError("euler_maruyama needs either a generator or noise drawn beforehand, and not both")
    y, field = _parts(y0), _on_tuples(f, y0)
    sigmas = tuple(sigma) if isinstance(sigma, Sequence) else (sigma,) * len(y)
    if len(sigmas) != len(y):
        raise ConfigError(f"sigma has {len(sigmas)} entries for a state of {len(y)} tensors; give one for each")
    drawn = None if noise is None else _parts(noise)
    if drawn is not None and _shapes(drawn) != _shapes(y, steps):
        raise ConfigError(f"noise of shape {_shapes(drawn)} does not fit {steps} steps of a state of shape {_shapes(y)}")
    path = [y]
    for step in range(steps):
        xi = _normal(y, generator) if drawn is None else tuple(x[step] for x in drawn)
        y = _moved(y, (dt, field(t0 + step * dt, y)))
        y = tuple(part + s * math.sqrt(dt) * x for part, s, x in zip(y, sigmas, xi, strict=True))
        if save:
            path.append(y)
    return _like(y0, _stacked(path) if save else y)


@torch.no_grad()
def settle(
    f: Callable[..., S],
    y0: S,
    dt: float,
    tolerance: float,
    max_steps: int,
    method: str = "euler",
    *,
    per_sample: Sequence[Tensor] = (),
    every: int = 10,
    floor: float = 1e-12,
) -> Settled[S]:
    """Run dy/dt = f(t, y, *per_sample) until each sample stands still; no gradients.

    The residual of a sample is the largest entry of |dy/dt| over the largest |y| it has had so far, tensor by tensor, as
    these may have different units; the worst tensor counts. So it does not depend on the scale of the state, and a sample
    may settle at 0. Samples whose residual is at most the tolerance are frozen and taken out of the batch, so the rest
    costs less; whether and when a sample stops does not depend on the others.

    Args:
        f: right-hand side, or the next state for the method "map" (where dy/dt counts as the change over dt).
        y0: starting state; the first dimension of each tensor is the batch.
        dt: step.
        tolerance: largest residual of a sample at rest, per unit of time.
        max_steps: steps after which the rest is returned as it is, not converged.
        method: "euler", "heun", "rk4" or "map".
        per_sample: what f needs besides the state and has one row per sample of: inputs, targets, or torch.arange(batch)
            for the samples' numbers. f is given the rows of the samples that are still moving.
        every: steps between two looks at the residual, each of which waits for the device.
        floor: a state below this counts as 0: it is divided by the floor.

    Raises:
        ConfigError: unknown method, dt, floor or `every` not positive, tolerance or max_steps negative, or shapes differ.
        InstabilityError: a state became infinite or NaN; it names dt.
    """
    advance = _method(method)
    _check_steps(dt, "max_steps", max_steps)
    y, data = _parts(y0), tuple(per_sample)
    _check_settle(y, data, tolerance, floor, every)
    state = tuple(part.clone() for part in y)
    residual = torch.zeros(len(y[0]), dtype=y[0].dtype, device=y[0].device)
    steps = torch.zeros_like(residual, dtype=torch.long)
    index = torch.arange(len(residual), device=residual.device)  # of the samples that are still moving
    scale: list[Tensor] = [torch.full_like(residual, floor) for _ in y]
    field = _on_tuples(f, y0, data)
    for step in range(max_steps + 1 if len(index) else 0):
        t = step * dt
        first = field(t, y)
        if step % every == 0 or step == max_steps:
            scale = [torch.maximum(s, _largest(part)) for s, part in zip(scale, y, strict=True)]
            change = _moved(first, (-1.0, y)) if method == "map" else first
            speed: list[Tensor] = [_largest(part) / (dt if method == "map" else 1.0) for part in change]
            _check_finite([*speed, *scale], index, step, dt)
            residual[index] = torch.stack([(v / s).to(residual) for v, s in zip(speed, scale, strict=True)]).amax(0)
            moving = residual[index] > tolerance
            if step == max_steps:
                moving.fill_(False)
            if not bool(moving.all()):
                for whole, part in zip(state, y, strict=True):
                    whole[index] = part  # all of them, which costs no wait; those that still move are overwritten later
                steps[index] = step
                kept = moving.nonzero().squeeze(1)
                index, scale = index[kept], [s[kept] for s in scale]
                y, first, data = _rows(y, kept), _rows(first, kept), _rows(data, kept)
                field = _on_tuples(f, y0, data)
        if not len(index):  # as always after the last look
            break
        y = advance(field, t, y, dt, first)
    return Settled(_like(y0, state), steps, residual <= tolerance, residual)


def _euler(f: Field, t: float, y: Tensors, dt: float, k1: Tensors) -> Tensors:
    return _moved(y, (dt, k1))


def _heun(f: Field, t: float, y: Tensors, dt: float, k1: Tensors) -> Tensors:
    k2 = f(t + dt, _moved(y, (dt, k1)))
    return _moved(y, (dt / 2, k1), (dt / 2, k2))


def _rk4(f: Field, t: float, y: Tensors, dt: float, k1: Tensors) -> Tensors:
    k2 = f(t + dt / 2, _moved(y, (dt / 2, k1)))
    k3 = f(t + dt / 2, _moved(y, (dt / 2, k2)))
    k4 = f(t + dt, _moved(y, (dt, k3)))
    return _moved(y, (dt / 6, k1), (dt / 3, k2), (dt / 3, k3), (dt / 6, k4))


def _map(f: Field, t: float, y: Tensors, dt: float, following: Tensors) -> Tensors:
    return following


Method = Callable[[Field, float, Tensors, float, Tensors], Tensors]
METHODS: dict[str, Method] = {"euler": _euler, "heun": _heun, "rk4": _rk4, "map": _map}
"""One step each: (f, t, y, dt, f(t, y)) -> y at t + dt. The caller passes f(t, y), which it may have looked at."""


def _method(name: str) -> Method:
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def _moved(y: Tensors, *terms: tuple[float, Tensors]) -> Tensors:
    """y + sum of h k over the terms (h, k), tensor by tensor."""
    for h, k in terms:
        y = tuple(torch.add(part, slope, alpha=h) for part, slope in zip(y, k, strict=True))
    return y


def _normal(y: Tensors, generator: torch.Generator | None) -> Tensors:
    """xi of y's shapes, drawn where the generator lives."""
    device = None if generator is None else generator.device
    made = [torch.randn(part.shape, generator=generator, dtype=part.dtype, device=device) for part in y]
    return tuple(xi.to(part.device) for xi, part in zip(made, y, strict=True))


def _largest(x: Tensor) -> Tensor:
    """Largest absolute value of each sample, NaN if there is one: (batch, ...) -> (batch,)."""
    x = x[:, None] if x.ndim == 1 else x.flatten(1)
    return x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))


def _parts(y: State) -> Tensors:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def _rows(tensors: Tensors, keep: Tensor) -> Tensors:
    return tuple(tensor[keep] for tensor in tensors)


def _like(template: S, parts: Tensors) -> S:
    """`parts` in the structure of the template."""
    return parts[0] if isinstance(template, Tensor) else parts


def _stacked(path: list[Tensors]) -> Tensors:
    return tuple(torch.stack(parts) for parts in zip(*path, strict=True))


def _shapes(y: Tensors, *leading: int) -> list[tuple[int, ...]]:
    return [(*leading, *part.shape) for part in y]


def _on_tuples(f: Callable[..., State], template: State, data: Tensors = ()) -> Field:
    """f on tuples, with its shapes checked: a slope that broadcasts against the state would go unnoticed."""

    def field(t: float, y: Tensors) -> Tensors:
        slope = _parts(f(t, y[0], *data) if isinstance(template, Tensor) else f(t, y, *data))
        if [k.shape for k in slope] != [part.shape for part in y]:
            raise ConfigError(
                f"f returned shapes {_shapes(slope)} for a state of shapes {_shapes(y)}; they must be the same"
            )
        return slope

    return field


def _check_steps(dt: float, name: str, steps: int) -> None:
    if not 0 < dt < math.inf:
        raise ConfigError(f"dt={dt} must be positive and finite")
    if steps < 0:
        raise ConfigError(f"{name}={steps} must not be negative")


def _check_settle(y: Tensors, data: Tensors, tolerance: float, floor: float, every: int) -> None:
    if not (tolerance >= 0 and floor > 0 and every >= 1):
        raise ConfigError(
            f"tolerance={tolerance} must not be negative, floor={floor} must be positive and every={every} too"
        )
    if any(part.ndim == 0 or len(part) != len(y[0]) for part in (*y, *data)):
        shapes = f"state {_shapes(y)}, per_sample {_shapes(data)}"
        raise ConfigError(f"the first dimension of each tensor must be the same batch: {shapes}")


def _check_finite(sizes: list[Tensor], index: Tensor, step: int, dt: float) -> None:
    lost = index[~torch.stack(sizes).isfinite().all(0)]
    if len(lost):
        raise InstabilityError(
            f"the state of {len(lost)} sample(s), the first is number {int(lost[0])}, became infinite or NaN within "
            f"{step} steps of dt={dt:g}; make dt smaller. If that does not help, the dynamics themselves are unstable."
        )
