"""How a rule uses weights, seen from below autograd: which products are a layer's forward response, and which are not.

Every product of a weight with something else goes through a handful of operations of PyTorch. Seen there, a product that
sums over a layer's inputs is the layer's forward response, `W x`; one that sums over its outputs, `W^T delta`, is a use that
no forward synapse serves. A rule may write them as it likes, in its forward or its backward pass, by autograd or by hand.
"""

from collections.abc import Callable, Collection, Mapping
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
        flipped: names of those that are held as (n_in, n_out).
    """

    def __init__(self, weights: Mapping[str, Tensor], flipped: Collection[str] = ()) -> None:
        self.named, self.flipped = dict(weights), flipped
        self.known: dict[int, list[tuple[str, Tensor]]] = {}
        for name, weight in weights.items():
            self.known.setdefault(weight.untyped_storage()._cdata, []).append((name, weight))

    def of(self, factor: Tensor) -> tuple[str, Tensor] | None:
        """Return the name and weight that `factor` is a view of."""
        for name, weight in self.known.get(factor.untyped_storage()._cdata, ()):
            if 0 <= factor.storage_offset() - weight.storage_offset() < max(weight.numel(), 1):
                return name, weight
        return None

    def uses(self, func: Any, args: tuple[Any, ...]) -> list[Use]:
        """Return the weights that `func(*args)` multiplies."""
        packet = func.overloadpacket
        uses = []
        for side, place in enumerate(factors(func, args)):
            factor = args[place] if place < len(args) else None
            if not isinstance(factor, Tensor):
                continue
            product = self.of(factor)
            if product is None:
                continue
            name, weight = product
            transposed = _transposed(factor, weight)
            if packet in (aten.convolution, aten.linear):
                forward = side == 1
            elif packet is aten.convolution_backward:
                forward = False
            else:  # (rows, n_in) W^T and W (n_in, columns) sum over the inputs
                forward = (transposed if side == 1 else not transposed) != (name in self.flipped)
            uses.append(Use(name, place, forward, transposed))
        return uses


def _transposed(factor: Tensor, weight: Tensor) -> bool:
    if weight.dim() != 2 or factor.dim() < 2:
        return False
    seen = tuple(factor.stride()[-2:])
    if seen in (weight.stride(), weight.stride()[::-1]) and weight.stride(0) != weight.stride(1):
        return seen != weight.stride()  # a block of rows, too
    return (tuple(factor.shape[-2:]), seen) != (tuple(weight.shape), weight.stride())


def viewed(other: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """Return the view of `other` that `factor` is of `weight`: a block of rows, a transpose, a repetition on new axes.

    >>> weight, other = torch.zeros(6, 2), torch.arange(12.0).view(6, 2)
    >>> viewed(other, weight.chunk(3)[1].T, weight)
    tensor([[4., 6.],
            [5., 7.]])
    """
    if other.stride() != weight.stride():
        other = torch.empty_strided(weight.shape, weight.stride(), dtype=other.dtype, device=other.device).copy_(other)
    offset = factor.storage_offset() - weight.storage_offset() + other.storage_offset()
    return other.as_strided(factor.shape, factor.stride(), offset)


class Responding(TorchDispatchMode):
    """While it is active, forward responses are made with other weights than everything else sees.

    Args:
        weights: by name, as the model holds them.
        responses: weight of the same shape, by name, with which a layer responds; those not named respond with their own.
        after: `after(name, result) -> result` may change every forward response.
        flipped: names of weights that are held as (n_in, n_out).
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        responses: Mapping[str, Tensor],
        after: Callable[[str, Tensor], Tensor] | None = None,
        flipped: Collection[str] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights, self.responses, self.after = Weights(weights, flipped), responses, after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation with the responding weight in place of the one it was given."""
        uses = [use for use in self.weights.uses(func, args) if use.forward]
        for use in uses:
            if use.name in self.responses:
                other = viewed(self.responses[use.name], args[use.place], self.weights.named[use.name])
                args = (*args[: use.place], other, *args[use.place + 1 :])
        result = func(*args, **(kwargs or {}))
        for use in uses if self.after is not None else ():
            assert self.after is not None
            result = self.after(use.name, result)
        return result


class Inputs(TorchDispatchMode):
    """While it is active, it keeps what layers are given, from the products that are their forward responses.

    Args:
        weights: by name, as the model holds them.
        flipped: names of weights that are held as (n_in, n_out).

    Attributes:
        calls: by layer, one entry a response: rows (positions, n_in) for a matrix.
        blocks: the parts of matrices that respond on their own, as a block of rows for queries, keys or values.
        backwards: products of each weight that would be no forward response.
    """

    def __init__(self, weights: Mapping[str, Tensor], flipped: Collection[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = Weights(weights, flipped)
        self.calls: dict[str, list[Tensor]] = {}
        self.backwards: dict[str, int] = {}
        self.blocks: dict[tuple[str, int, torch.Size], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation itself."""
        for use in self.weights.uses(func, args):
            if not use.forward:
                self.backwards[use.name] = self.backwards.get(use.name, 0) + 1
                continue
            (place,) = set(factors(func, args)) - {use.place}
            given = args[place].detach()
            if self.weights.named[use.name].dim() == 2:
                part = args[use.place].detach()
                part = part.mT if use.transposed else part
                self.blocks[use.name, part.storage_offset(), part.shape] = part
                rows = given if place < use.place or given.dim() == 1 else given.mT
                given = rows.reshape(-1, rows.shape[-1])
            self.calls.setdefault(use.name, []).append(given.clone())
        return func(*args, **(kwargs or {}))
