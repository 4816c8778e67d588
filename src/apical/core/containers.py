"""What a model does outside its computing modules: a user's forward method, hooks, modules added later.

Rules that call a model's layers do not call its containers. What these compute is checked when a rule is made, and here:
a forward method may take another path when an attribute or a global changes.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.layers import is_hooked, refuse_backward_hooks, runs_own_forward
from apical.core.rest import evaluating, undisturbed
from apical.core.units import Found, leaves
from apical.errors import UnsupportedModelError

KNOWN = ("torch.nn.", "apical.core.", "apical.models.", "apical.rules.")
"""Python modules whose forward methods always take the same path."""
FIRST, EVERY = 4, 16
"""Batches in which a user's forward method is inspected: the first n, then every n-th."""
LONG = 64
"""Number of entries above which a container is a table, such as a vocabulary or a Python module, rather than options."""
_EVERY_MODULES = {*vars(nn.Module()), "forward"}


def is_written(module: nn.Module) -> bool:
    """Return whether the module's forward method is the user's."""
    return not _place(type(module).forward).startswith(KNOWN)


def _place(function: Callable[..., Any]) -> str:
    """Return the Python module in which a function is written; None for a generated one, as by torch.fx."""
    return function.__module__ or ""


class Containers:
    """The modules of a model that contain others.

    Args:
        model: the network; it is not changed.
        layers: layers whose weight is taken from the registration of their type; one with a user's forward counts as one of
            the modules that contain others.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module] = ()) -> None:
        self.model, self.names = model, {module: name for name, module in model.named_modules()}
        self._held = [(module._modules, [*module._modules.values()]) for module in self.names]
        inside = {part for _, leaf in leaves(model) for part in leaf.modules()}
        told = [layer for layer in layers if is_written(layer)]
        containers = [(name, module) for name, module in model.named_modules() if module not in inside or module in told]
        self.modules = [(name, module, list(module.children())) for name, module in containers]
        self.written = [module for _, module in containers if is_written(module)]
        self._batches, self._choices = 0, self._attributes()
        self._found = Found(model, activations=True)

    def require_intact(self, inputs: Tensor, own: Callable[[Tensor], Tensor]) -> None:
        """Run the model and compare, if a container has changed what it computes or may have.

        At each batch where one has hooks, another forward or other children; where its forward is the user's, when an
        attribute has changed, in the first batches and periodically, because an inspection costs two forward passes.

        Args:
            inputs: (batch, ...).
            own: what the rule assumes the model to compute.

        Raises:
            UnsupportedModelError: the model computes something else, or has lost a module; the message names it.
        """
        compiling = torch.compiler.is_compiling()
        if compiling:
            self._found.require_intact("the rule")
        else:
            self._found.require_weights("the rule")
        if not compiling and torch._C._are_functorch_transforms_active():
            return  # values cannot be checked there
        changed = not compiling and any([*now.values()] != then for now, then in self._held)
        if changed and (lost := self.names.keys() - set(self.model.modules())):
            module = min(lost, key=self.names.__getitem__)
            raise UnsupportedModelError(
                f"module {self.names[module]!r} ({type(module).__name__}) was removed from the model after the rule was "
                "made; make the rule afterwards"
            )
        if not (touched := self.written if compiling else self._touched(self._is_due())):
            self._batches += not compiling
            return
        names = " or ".join(f"{self.names[module]!r} ({type(module).__name__})" for module in touched)
        for module in () if compiling else touched:
            refuse_backward_hooks(f"{self.names[module]!r} ({type(module).__name__})", module)
        message = (
            f"module {names} computes another function than when the rule was made, or than the one given to "
            "apical.register_layer, because of a hook, a forward method, a new child, a dtype conversion, or a choice "
            "in its forward (an attribute, values of the batch, randomness), which this rule does not see; move that "
            "into a separate module, and make the rule afterwards"
        )
        fresh = [] if compiling else [module for module in self.model.modules() if module not in self.names]  # dropout?
        modes = [(module, module.training) for module in (*touched, *fresh)]
        kept = nullcontext() if compiling else undisturbed(self.model)
        with evaluating(self.model), torch.no_grad(), kept:
            expected = own(inputs.clone()) if compiling else self._take(own, inputs, message)
            for module, mode in modes:
                module.training = mode
            output = self.model(inputs.clone())
        fits = isinstance(output, Tensor) and output.shape == expected.shape
        if fits and compiling:  # the graph is for this choice of attributes; another one is compiled again, and stops here
            torch._assert_async(_close(output, expected), message)
        elif not (fits and bool(_close(output, expected))):
            raise UnsupportedModelError(message)
        if not compiling:  # a refused model is checked again
            self._batches += 1
            self._choices = self._attributes()  # a forward may count its calls, or keep its result

    def _take(self, own: Callable[[Tensor], Tensor], inputs: Tensor, message: str) -> Tensor:
        """Compute what the rule assumes the model to compute; refuse inputs that only the model accepts."""
        try:
            return own(inputs.clone())
        except RuntimeError as error:
            self.model(inputs.clone())  # which raises its own error if it cannot take them either
            raise UnsupportedModelError(f"{message} ({error})") from error

    def _attributes(self) -> list[dict[str, object]]:
        """Return the values on which a user's forward methods may depend."""
        return [
            {k: _contents(v) for k, v in vars(m).items() if k not in _EVERY_MODULES} | {"methods": _methods(type(m))}
            for m in self.written
        ]

    def _is_due(self) -> bool:
        """Return whether this batch is one at which a user's forward methods are checked."""
        return self._attributes() != self._choices or self._batches < FIRST or self._batches % EVERY == 0

    def _touched(self, due: bool) -> list[nn.Module]:
        """Return the containers that may compute something else than at first."""
        return [
            module
            for _, module, children in self.modules
            if (due and module in self.written)
            or is_hooked(module)
            or ("forward" in module.__dict__ and not runs_own_forward(module, type(module).forward))
            or list(module.children()) != children
        ]


def _methods(kind: type) -> list[object]:
    """Return the values on which the methods of a user's class depend."""
    own = [vars(base).values() for base in kind.__mro__ if not base.__module__.startswith((*KNOWN, "builtins"))]
    return [_scope(value) for values in own for value in values if isinstance(value, FunctionType)]


def _scope(function: FunctionType, depth: int = 2) -> object:
    """Return the values that a function's code finds by name: globals, enclosed variables, and in functions of these."""
    if not depth or _place(function).startswith(("torch", "apical.")):
        return id(function)
    held = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            held.append(cell.cell_contents)
    return [_contents(value, depth - 1) for value in held]


def _contents(value: object, depth: int = 2) -> object:
    """Return numbers and strings in a value, its containers and plain objects; for others, and long containers, the id."""
    if isinstance(value, dict | list | tuple) and len(value) > LONG:
        return id(value)
    if depth and isinstance(value, dict):
        return {key: _contents(inner, depth - 1) for key, inner in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_contents(inner, depth - 1) for inner in value]
    if isinstance(value, FunctionType):
        return _scope(value, depth)
    if depth and isinstance(value, type):  # a class of options; other types hold methods
        return {key: own for key, own in vars(value).items() if isinstance(own, bool | int | float | str)}
    if depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor) and len(vars(value)) <= LONG:
        return _contents(dict(vars(value)), depth)
    return value if isinstance(value, bool | int | float | str) else id(value)


def _close(output: Tensor, expected: Tensor) -> Tensor:
    """Return whether two tensors are equal up to rounding, or not finite."""
    coarse = torch.is_autocast_enabled(output.device.type) or output.element_size() < 4
    allowed = 0.05 if coarse else 1e3 * torch.finfo(output.dtype).eps
    a, b = output.double(), expected.double()
    result: Tensor = ~((a - b).norm() > allowed * b.norm())
    return result
