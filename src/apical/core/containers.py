"""What a model does outside the modules that compute: hooks on containers, and forward methods or modules put there later.

Rules that call a model's layers do not call its containers. That these compute nothing is seen when a rule is made,
and here at each batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from apical.core.layers import is_hooked, runs_own_forward
from apical.core.rest import evaluating
from apical.core.units import leaves
from apical.errors import UnsupportedModelError


class Containers:
    """The modules of a model that contain others.

    Args:
        model: the network; it is only read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.names = model, {module: name for name, module in model.named_modules()}
        inside = {part for _, leaf in leaves(model) for part in leaf.modules()}
        containers = [(name, module) for name, module in model.named_modules() if module not in inside]
        self.modules = [(name, module, list(module.children())) for name, module in containers]

    def require_intact(self, inputs: Tensor, own: Callable[[Tensor], Tensor]) -> None:
        """At each batch: run the model where a container has hooks, another forward or other children, and compare.

        Args:
            inputs: (batch, ...).
            own: what the rule takes the model to compute.

        Raises:
            UnsupportedModelError: the model computes something else, or has lost a module; it is named.
        """
        if torch.compiler.is_compiling():
            return
        if lost := self.names.keys() - set(self.model.modules()):
            module = min(lost, key=self.names.__getitem__)
            raise UnsupportedModelError(
                f"module {self.names[module]!r} ({type(module).__name__}) was taken out of the model after the rule was "
                "made; make the rule after that"
            )
        touched = [
            f"{name!r} ({type(module).__name__})"
            for name, module, children in self.modules
            if is_hooked(module)
            or ("forward" in module.__dict__ and not runs_own_forward(module, type(module).forward))
            or list(module.children()) != children
        ]
        if not touched:
            return
        with evaluating(self.model), torch.no_grad(), torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
            output, expected = self.model(inputs.clone()), own(inputs.clone())
        if not (
            isinstance(output, Tensor)
            and output.shape == expected.shape
            and torch.allclose(output, expected, equal_nan=True)
        ):
            raise UnsupportedModelError(
                f"a hook, a forward or a new child of module {' or '.join(touched)} changes what the model computes, which "
                "this rule does not see; make the change a module of its own, and the rule after that"
            )
