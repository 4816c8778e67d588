"""Check on a few numbers whether an activation's registered properties match what its forward computes.

The derivative of a different function would train the chain's layers with wrong errors, and nothing later would reveal it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apical.core.rest import undisturbed
from apical.errors import ConfigError

if TYPE_CHECKING:
    from apical.core.activations import Activation

FAR = 1e-3
"""Maximum difference between two formulas of one function, relative to the largest number: the module may hold float32."""
SMALL = 1e-4
"""Imaginary part b for which `phi(a + ib)` equals `phi(a) + i phi'(a) b`."""


def potentials(columns: int = 4) -> Tensor:
    """Return numbers (5, columns) of both signs, none of them an integer or a half-integer."""
    return torch.linspace(-2.87, 3.19, 5 * columns, dtype=torch.float64, device="cpu").view(columns, 5).T


def _taken(phi: nn.Module) -> Tensor | None:
    """Return potentials that the module accepts: as wide as one of its vectors, if it has one number per unit."""
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
    """Return whether a module maps each number of (rows, columns) separately and repeatably; False if it cannot be run."""
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
    """Refuse properties registered for a type of activation if its forward computes something else.

    Args:
        module: an activation of that type.
        said: the properties passed to :func:`apical.register_activation`.

    Raises:
        ConfigError: it has parameters, or is not elementwise although it was registered as such; or a formula does not match
            its forward.
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
    """Return whether two tensors are equal up to rounding wherever the second is finite."""
    there = b.isfinite()
    scale = float(b[there].abs().max()) if bool(there.any()) else 0.0
    return bool(((a - b)[there].abs() <= FAR * scale + 1e-12).all())


def _wrong(module: nn.Module, what: str, remedy: str) -> ConfigError:
    kind = type(module).__name__
    return ConfigError(f"activation {kind} {what}; register it with {remedy}: apical.register_activation({kind}, ...)")
