"""How a rule uses weights, seen from below autograd: which products are a layer's forward response, and which are not.

Every product of a weight with something else goes through a handful of operations of PyTorch. Seen there, a product that
sums over a layer's inputs is the layer's forward response, `W x`; one that sums over its outputs, `W^T delta`, is a use that
no forward synapse serves. A rule may write them as it likes, in its forward or its backward pass, by autograd or by hand.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

FACTORS = {
    aten.mm: (0, 1),
    aten.addmm: (1, 2),
    aten.addmm_: (1, 2),
    aten.bmm: (0, 1),
    aten.baddbmm: (1, 2),
    aten.mv: (0, 1),
    aten.addmv: (1, 2),
    aten.linear: (0, 1),
    aten.convolution: (0, 1),
    aten.convolution_backward: (0, 2),
}
"""Operations that multiply two tensors and sum, with the places of the two among their arguments."""


def factors(func: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Places of the two factors among the arguments of an operation; empty if it multiplies none, or sums over none."""
    packet = func.overloadpacket
    if packet is aten.convolution_backward and not args[-1][0]:
        return (0, 1)  # the input's gradient is not asked for: the weight is given, and not used
    return FACTORS.get(packet, ())


class Use(NamedTuple):
    """A weight as a factor of a product.

    Attributes:
        name: of the weight.
        place: among the arguments of the operation.
        forward: the product is the layer's forward response.
        transposed: the factor is the weight's transpose.
    """

    name: str
    place: int
    forward: bool
    transposed: bool


class Weights:
    """Recognises weights, whole or transposed, among the factors of an operation.

    Args:
        weights: by name; they must not move in memory while this is in use.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.known = {weight.untyped_storage()._cdata: (name, weight) for name, weight in weights.items()}

    def uses(self, func: Any, args: tuple[Any, ...]) -> list[Use]:
        """The weights that `func(*args)` multiplies."""
        packet = func.overloadpacket
        uses = []
        for side, place in enumerate(factors(func, args)):
            factor = args[place] if place < len(args) else None
            if not isinstance(factor, Tensor) or factor.untyped_storage()._cdata not in self.known:
                continue
            name, weight = self.known[factor.untyped_storage()._cdata]
            transposed = _transposed(factor, weight)
            if packet in (aten.convolution, aten.linear):
                forward = side == 1
            elif packet is aten.convolution_backward:
                forward = False
            else:  # (rows, n_in) W^T and W (n_in, columns) sum over the inputs
                forward = transposed if side == 1 else not transposed
            uses.append(Use(name, place, forward, transposed))
        return uses


def _transposed(factor: Tensor, weight: Tensor) -> bool:
    if weight.dim() != 2 or factor.dim() < 2:
        return False
    own = (tuple(weight.shape), weight.stride())
    return (tuple(factor.shape[-2:]), tuple(factor.stride()[-2:])) != own


class Responding(TorchDispatchMode):
    """While it is active, forward responses are made with other weights than everything else sees.

    Args:
        weights: by name, as the model holds them.
        responses: weight of the same shape, by name, with which a layer responds; those not named respond with their own.
        after: `after(name, result) -> result` may change every forward response.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        responses: Mapping[str, Tensor],
        after: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights, self.responses, self.after = Weights(weights), responses, after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, with the responding weight in place of the one it was given."""
        uses = [use for use in self.weights.uses(func, args) if use.forward]
        for use in uses:
            if use.name in self.responses:
                other = self.responses[use.name]
                other = (other.T if use.transposed else other).expand(args[use.place].shape)
                args = (*args[: use.place], other, *args[use.place + 1 :])
        result = func(*args, **(kwargs or {}))
        for use in uses if self.after is not None else ():
            assert self.after is not None
            result = self.after(use.name, result)
        return result
