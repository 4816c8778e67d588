"""Activations: which modules count as one, their derivatives, and `phi(v + d) - phi(v)` without cancellation.

The properties of a type hold only for its own forward: a subclass that overrides it is an activation, but is not known to be
elementwise. Differences for common types are in :mod:`apical.core.differences`; an activation without one is
evaluated in float64 if its potentials have lower precision.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.layers import runs_own_forward
from apical.errors import ConfigError


@dataclass(frozen=True)
class Activation:
    """Properties of a type of activation; each formula takes the module first, then tensors of the same shape.

    Attributes:
        forward: the method that the other attributes describe.
        elementwise: whether it acts on each neuron separately, without parameters or randomness.
        derivative: `phi'(v)` given v and `r = phi(v)`; None uses autograd.
        pulled_back: `phi'(v) * signal` given v, r and the signal, in one pass over memory.
        difference: `phi(v + d) - phi(v)` given v, r and d; None computes the plain difference.
        complex_parts: real and imaginary part of `phi(a + ib)` given a and b; None applies the module to complex numbers.
        from_output: whether the derivative can be computed from r alone.
        said: whether a user registered it; it is then checked against the forward of the first module of the type.
    """

    forward: Callable[..., Any]
    elementwise: bool = True
    derivative: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    pulled_back: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None
    difference: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None
    complex_parts: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    from_output: bool = False
    said: bool = False


TYPES: dict[type[nn.Module], Activation] = {}
"""The registered types."""


def register_activation(
    kind: type[nn.Module],
    *,
    elementwise: bool = True,
    derivative: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
    difference: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None,
    complex_parts: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Register a type of module as an activation for every rule.

    When a rule first encounters a module of this type, the formulas are compared with its forward on a few numbers. One
    that does not match is refused with a :class:`apical.errors.ConfigError`.

    Args:
        kind: the type; subclasses that override `forward` are not covered.
        elementwise: whether it acts on each neuron separately, without parameters or randomness; chains require this.
        derivative: `phi'(v)` as a function of (module, v, r) with `r = phi(v)`; autograd by default.
        difference: `phi(v + d) - phi(v)` as a function of (module, v, r, d), for where the plain difference would cancel.
        complex_parts: real and imaginary part of `phi(a + ib)` as a function of (module, a, b), for holomorphic equilibrium
            propagation; by default the module is applied to complex numbers.

    Raises:
        ConfigError: `kind` is not a subclass of nn.Module.

    >>> class Cube(nn.Module):
    ...     def forward(self, v):
    ...         return v**3
    >>> register_activation(Cube, derivative=lambda module, v, r: 3 * v**2)
    >>> derivative(Cube(), torch.tensor(2.0), torch.tensor(8.0))
    tensor(12.)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"register_activation takes a subclass of nn.Module, not {kind!r}")
    TYPES[kind] = Activation(kind.forward, elementwise, derivative, None, difference, complex_parts, said=True)
    _nearest.clear()


class Itself(nn.Module):
    """Wrapper for an activation that inherits from a known type but computes something else, so that `isinstance` is false.

    Args:
        activation: the activation; not registered as a submodule.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.__dict__["stands_for"] = activation

    def forward(self, v: Tensor) -> Tensor:
        """Apply the activation to v."""
        result: Tensor = self.__dict__["stands_for"](v)
        return result


def itself(activation: nn.Module) -> nn.Module:
    """Return the activation, wrapped if needed so that an instance of a known type computes what that type does."""
    kind = type(activation)
    inherits = any(base in TYPES and base.forward is not kind.forward for base in kind.__mro__)
    return Itself(activation) if inherits else activation


def plain(activation: nn.Module) -> nn.Module:
    """Return the activation, not in place; if it is a copy, its `stands_for` is the original."""
    if not getattr(activation, "inplace", False):
        return activation
    twin = copy(activation)
    twin.__dict__["stands_for"] = activation
    twin.inplace = False  # type: ignore[assignment]
    return twin


_nearest: dict[type[nn.Module], Activation | None] = {}


def known(activation: nn.Module) -> Activation | None:
    """Return the properties of the module's type, if the module runs that type's own forward; else None."""
    activation = _own(activation)
    kind = type(activation)
    if kind not in _nearest:
        base = next((base for base in kind.__mro__ if base in TYPES), None)
        entry = None if base is None or kind.forward is not TYPES[base].forward else TYPES[base]
        if entry is not None and base is not None and entry.difference is None:
            from apical.core.differences import DIFFERENCES  # for common types; few rules need it

            entry = replace(entry, difference=DIFFERENCES.get(base))
        if entry is not None and entry.said and not torch.compiler.is_compiling():
            from apical.core.agreement import require_agreement

            require_agreement(activation, entry)
        _nearest[kind] = entry
    entry = _nearest[kind]
    return entry if entry is not None and runs_own_forward(activation, entry.forward) else None


def _own(activation: nn.Module) -> nn.Module:
    """Return the module that the formulas describe."""
    own: nn.Module = activation.__dict__["stands_for"] if isinstance(activation, Itself) else activation
    return own


def is_activation(module: nn.Module) -> bool:
    """Return whether the module is an activation, at whose output a unit ends, whatever its forward computes."""
    return isinstance(module, tuple(TYPES)) and not isinstance(module, nn.Identity)


def is_elementwise(module: nn.Module) -> bool:
    """Return whether the module is known to act on each neuron separately, without parameters or randomness."""
    entry = known(module)
    return entry is not None and entry.elementwise


def derivative(activation: nn.Module, v: Tensor, r: Tensor) -> Tensor:
    """Return `phi'(v)`, of v's shape, given also `r = phi(v)`; at a kink, the one-sided value that autograd uses."""
    entry = known(activation)
    if entry is not None and entry.derivative is not None:
        return entry.derivative(_own(activation), v, r)
    slope: Tensor = torch.func.jvp(plain(activation), (v,), (torch.ones_like(v),))[1]
    return slope


def pulled_back(activation: nn.Module, v: Tensor, r: Tensor, signal: Tensor) -> Tensor:
    """Return `phi'(v) * signal`, given also `r = phi(v)`; in one pass over memory where PyTorch has such a kernel."""
    entry = known(activation)
    if entry is not None and entry.pulled_back is not None:
        return entry.pulled_back(_own(activation), v, r, signal)
    return signal * derivative(activation, v, r)


def difference(activation: nn.Module, v: Tensor, r: Tensor, d: Tensor) -> Tensor:
    """Return `phi(v + d) - phi(v)`, of v's shape, given `r = phi(v)`; without an identity, by subtraction in float64."""
    entry = known(activation)
    if entry is not None and entry.difference is not None:
        return entry.difference(_own(activation), v, r, d)
    phi = plain(activation)
    if v.dtype != torch.float64 and v.device.type != "mps":  # mps has no float64
        wide = v.double()
        change: Tensor = phi(wide + d) - phi(wide)
        return change.to(v.dtype)
    moved: Tensor = phi(v + d)
    return moved - r


def complex_parts(activation: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real and imaginary part of `phi(a + ib)`, of a's shape."""
    entry = known(activation)
    if entry is not None and entry.complex_parts is not None:
        return entry.complex_parts(_own(activation), a, b)
    z: Tensor = plain(activation)(torch.complex(a, b))
    return z.real, z.imag


_ATEN = torch.ops.aten

TYPES |= {kind: Activation(kind.forward, elementwise=False) for kind in (nn.PReLU, nn.RReLU, nn.Softmax)}
TYPES |= {
    kind: Activation(kind.forward)
    for kind in (
        *(nn.ReLU6, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid),
        *(nn.Hardswish, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold),
    )
}
TYPES |= {
    nn.Identity: Activation(
        nn.Identity.forward,
        derivative=lambda _, v, r: torch.ones_like(v),
        pulled_back=lambda _, v, r, signal: signal,
        from_output=True,
    ),
    nn.Tanh: Activation(
        nn.Tanh.forward,
        derivative=lambda _, v, r: 1 - r * r,
        pulled_back=lambda _, v, r, signal: _ATEN.tanh_backward(signal, r),
        from_output=True,
    ),
    nn.Sigmoid: Activation(
        nn.Sigmoid.forward,
        derivative=lambda _, v, r: r - r * r,
        pulled_back=lambda _, v, r, signal: _ATEN.sigmoid_backward(signal, r),
        from_output=True,
    ),
    nn.ReLU: Activation(
        nn.ReLU.forward,
        derivative=lambda _, v, r: (v > 0).to(v.dtype),
        pulled_back=lambda _, v, r, signal: _ATEN.threshold_backward(signal, r, 0),
        from_output=True,
    ),
    nn.LeakyReLU: Activation(
        nn.LeakyReLU.forward,
        derivative=lambda self, v, r: torch.where(v > 0, torch.ones_like(v), self.negative_slope),
    ),
    nn.ELU: Activation(
        nn.ELU.forward,
        derivative=lambda self, v, r: torch.where(v > 0, 1.0, r + self.alpha).to(v.dtype),
        pulled_back=lambda self, v, r, signal: _ATEN.elu_backward(signal, self.alpha, 1.0, 1.0, True, r),
        from_output=True,
    ),
}
