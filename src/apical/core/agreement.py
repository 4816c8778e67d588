"""Whether what was said of an activation when it was registered is what its forward computes, on a few numbers.

A derivative that is another function's would train the chain's layers by wrong errors, and nothing later would show it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apical.core.rest import undisturbed
from apical.errors import ConfigError

if TYPE_CHECKING:
    from apical.core.activations import Activation

FAR = 1e-3
"""Share of the largest number by which two formulas of one function may differ: numbers in the module may be float32."""
SMALL = 1e-4
"""Imaginary part b at which `phi(a + ib)` is `phi(a) + i phi'(a) b`."""


def potentials(columns: int = 4) -> Tensor:
    """Numbers (5, columns) of both signs, none of them a whole number or a half."""
    return torch.linspace(-2.87, 3.19, 5 * columns, dtype=torch.float64, device="cpu").view(columns, 5).T


def _taken(phi: nn.Module) -> Tensor | None:
    """Potentials that the module can be run on: as wide as one of its vectors, if it has a number for each unit."""
    own = [*phi.parameters(), *phi.buffers()]
    for columns in dict.fromkeys((4, *(vector.numel() for vector in own if vector.numel()))):
        v = potentials(columns).to(own[0].device if own else "cpu")
        try:
            with torch.no_grad(), undisturbed(phi):
                phi(v.clone())
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        return v
    return None


@torch.no_grad()
def acts_on_each(phi: nn.Module) -> bool:
    """Whether a module maps each number of (rows, columns) alone, the same at every call; False where it cannot be run."""
    v = potentials().to(next(phi.buffers(), torch.empty(0)).device)
    row, column = v.clone(), v.clone()
    row[::2] += 0.31
    column[:, ::2] += 0.31
    try:
        with undisturbed(phi):
            r, again, below, beside = (phi(each.clone()) for each in (v, v, row, column))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    if not (isinstance(r, Tensor) and r.shape == v.shape):
        return False
    return _same(r, again) and _same(r[1::2], below[1::2]) and _same(r[:, 1::2], beside[:, 1::2])


def require_agreement(module: nn.Module, said: "Activation") -> None:
    """Refuse what was said of a type of activations, where its forward computes something else.

    Args:
        module: an activation of the type.
        said: what :func:`apical.register_activation` was told.

    Raises:
        ConfigError: it has parameters, or does not act on each neuron alone, though that was said; or a formula is another
            function's.
    """
    from apical.core.activations import plain

    if said.elementwise and next(module.parameters(), None) is not None:
        raise _wrong(module, "has parameters", "elementwise=False")
    phi = plain(module)
    if said.elementwise and not acts_on_each(phi):
        raise _wrong(module, "does not map each number independently and in the same way at every call", "elementwise=False")
    if (v := _taken(phi)) is None:
        if any(formula is not None for formula in (said.derivative, said.difference, said.complex_parts)):
            raise _wrong(module, "does not run on rows of numbers, which are used to check formulas", "no formula")
        return
    with undisturbed(phi), torch.enable_grad(), torch.autocast(v.device.type, enabled=False):
        leaf = v.clone().requires_grad_()
        r = phi(leaf)
        slope = torch.autograd.grad(r.sum(), leaf)[0] if r.requires_grad else torch.zeros_like(v)
    r, d = r.detach(), 0.7 * v.flip(0)
    formulas: list[tuple[str, Any, Any]] = []
    if said.derivative is not None:
        formulas.append(("derivative", said.derivative(module, v, r), slope))
    if said.difference is not None:
        with torch.no_grad():
            formulas.append(("difference", said.difference(module, v, r, d), phi(v + d) - r))
    if said.complex_parts is not None:
        real, imaginary = said.complex_parts(module, v, torch.full_like(v, SMALL))
        formulas += [("complex_parts (real)", real, r), ("complex_parts (imaginary)", imaginary, SMALL * slope)]
    for what, given, own in formulas:
        if not (isinstance(given, Tensor) and given.shape == own.shape and _same(given, own)):
            raise _wrong(module, f"is not what the {what} says", f"another {what.split()[0]}, or none")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding where the second is finite."""
    there = b.isfinite()
    scale = float(b[there].abs().max()) if bool(there.any()) else 0.0
    return bool(((a - b)[there].abs() <= FAR * scale + 1e-12).all())


def _wrong(module: nn.Module, what: str, remedy: str) -> ConfigError:
    kind = type(module).__name__
    return ConfigError(f"activation {kind} {what}; register it with {remedy}: apical.register_activation({kind}, ...)")
