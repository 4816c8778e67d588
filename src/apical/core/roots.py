"""What stands between the loss that a trainer takes a step on and the roots of a credit: nodes of autograd's graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apical.errors import ConfigError, refuse_second_derivatives


class OneRoot(torch.autograd.Function):
    """A loss's value, whose backward pass hands every root its signal times the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, signals: Sequence[Tensor | None], *roots: Tensor) -> Tensor:
        """Return the value; roots may be parameters."""
        ctx.save_for_backward(*signals)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Return `scale * signal` for each root, multiplied in the wider of the two types."""
        refuse_second_derivatives()
        return (None, None, *(scale if s is None else _scaled(s, scale) for s in ctx.saved_tensors))


def _scaled(signal: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(signal.dtype, scale.dtype)
    return (signal.to(wide) * scale.to(signal.device, wide)).to(signal.dtype)


class KnownGradients(torch.autograd.Function):
    """A scalar zero whose backward pass gives parameters gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        """Return zero."""
        ctx.save_for_backward(*gradients)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients times `scale`; if it is one, the gradients themselves, which `.grad` takes without a copy."""
        refuse_second_derivatives()
        if not scale.is_cuda and scale.item() == 1.0:
            return (None, *ctx.saved_tensors)
        return (None, *(gradient * scale for gradient in ctx.saved_tensors))


class NoCreditBehind(torch.autograd.Function):
    """The output of a rule whose credit does not travel through it; a backward pass that arrives there is refused."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *leaves: Tensor) -> Tensor:
        """Return the output; `leaves` are what a backward pass could look for."""
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, error: Tensor | None) -> tuple[None, ...]:
        """Refuse an error."""
        if error is not None:
            raise ConfigError(
                "a loss made of credit.output would not train the layers under this rule, whose credit does not travel "
                "through the output; add the term to the loss that the rule is given, or use credit.output.detach()"
            )
        return tuple(None for _ in ctx.needs_input_grad)
