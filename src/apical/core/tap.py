"""A weight whose gradient also gives that of a second parameter, the plastic feedback of Kolen-Pollack and PFA."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from apical.core.transport import Geometry


class WeightTap(torch.autograd.Function):
    """The weight itself; its backward also hands `share(gradient, ...)` to a second parameter, the plastic feedback."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, plastic: Tensor, share: Callable[..., Tensor], shape: Geometry | None, *tensors: Tensor
    ) -> Tensor:
        """Return `weight`."""
        ctx.share, ctx.geometry = share, shape
        ctx.save_for_backward(*tensors)
        return weight.detach()  # not a view: a hook of the user's may still change it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the weight, and of the plastic feedback."""
        shared = ctx.share(grad, ctx.geometry, *ctx.saved_tensors)
        return (grad, shared, None, None, *(None for _ in ctx.saved_tensors))


def weight_tap(
    weight: Tensor, plastic: Tensor, share: Callable[..., Tensor], shape: Geometry | None, *tensors: Tensor
) -> Tensor:
    """Return `weight`; its backward pass also gives `plastic` the gradient `share(gradient, shape, *tensors)`."""
    result: Tensor = cast(Any, WeightTap).apply(weight, plastic, share, shape, *tensors)
    return result
