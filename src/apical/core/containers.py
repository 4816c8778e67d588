"""What a model does outside the modules that compute: hooks on containers, and forward methods put on them later.

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
        self.model = model
        inside = {part for _, leaf in leaves(model) for part in leaf.modules()}
        self.modules = [(name, module) for name, module in model.named_modules() if module not in inside]

    def require_intact(self, inputs: Tensor, own: Callable[[Tensor], Tensor]) -> None:
        """At each batch: run the model where a container has hooks or another forward, and compare.

        Args:
            inputs: (batch, ...).
            own: what the rule takes the model to compute.

        Raises:
            UnsupportedModelError: the model computes something else; the container is named.
        """
        touched = [
            f"{name!r} ({type(module).__name__})"
            for name, module in self.modules
            if is_hooked(module) or ("forward" in module.__dict__ and not runs_own_forward(module, type(module).forward))
        ]
        if not touched or torch.compiler.is_compiling():
            return
        with evaluating(self.model), torch.no_grad(), torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
            output, expected = self.model(inputs.clone()), own(inputs.clone())
        if not (
            isinstance(output, Tensor)
            and output.shape == expected.shape
            and torch.allclose(output, expected, equal_nan=True)
        ):
            raise UnsupportedModelError(
                f"a hook or a forward on module {' or '.join(touched)} changes what the model computes, which this rule "
                "does not see; make the change a module of its own"
            )
