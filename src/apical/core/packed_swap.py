"""The swap of a packed module: one for all weights that it applies within one call, as a layer has one for its own."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from apical.errors import UnsupportedModelError, refuse_second_derivatives


class View:
    """A note in place of a view of a part's weight, while autograd keeps it."""

    __slots__ = ("feedback", "made", "name", "offset", "size", "stride", "version", "weight")

    def __init__(
        self, made: dict[str, Tensor], feedback: Callable[[], Tensor], name: str, weight: Tensor, saved: Tensor
    ) -> None:
        self.made, self.feedback, self.name, self.weight, self.version = made, feedback, name, weight, weight._version
        self.size, self.stride, self.offset = saved.size(), saved.stride(), saved.storage_offset() - weight.storage_offset()


class PackedSwap(torch.autograd.graph.saved_tensors_hooks):
    """While a packed module runs, autograd keeps notes in place of views of its weights, and is given the same views of K.

    Args:
        feedback: is asked in the forward pass for what makes K of one part, in the shape of its weight, when the backward
            pass first asks for it.

    Attributes:
        met: names of the parts for which autograd has saved anything in the last call.
    """

    def __init__(self, feedback: Callable[[str], Callable[[], Tensor]]) -> None:
        super().__init__(self.pack, self.unpack)
        self.feedback = feedback
        self.met: set[str] = set()
        self._weights: list[tuple[Any, Any, Any, str, Tensor]] = []
        self._made: dict[str, Tensor] = {}

    def over(self, weights: Iterable[tuple[str, Tensor]]) -> "PackedSwap":
        """Return itself, for one call with these weights."""
        self.met, self._made, self._weights = set(), {}, []
        for name, weight in weights:
            begin = weight.storage_offset()
            self._weights.append((weight.untyped_storage()._cdata, begin, begin + _extent(weight), name, weight))
        return self

    def pack(self, saved: Tensor) -> Any:
        """Return a note for a view of a weight; (the tensor, its version) for anything else."""
        storage, first = saved.untyped_storage()._cdata, saved.storage_offset()
        shared = False
        for its, begin, end, name, weight in self._weights:
            if its == storage and first < end and first + _extent(saved) > begin:
                if begin <= first and first + _extent(saved) <= end:
                    self.met.add(name)
                    return View(self._made, self.feedback(name), name, weight, saved)
                shared = True
        if shared:
            raise UnsupportedModelError("a buffer over several weights is kept for the backward pass")
        return saved, saved._version

    def unpack(self, packed: Any) -> Tensor:
        """Return the view of the feedback, or the tensor that was kept, unless it was changed since."""
        if not isinstance(packed, View):
            saved, version = packed
            _require_version(saved, version)
            return saved  # type: ignore[no-any-return]
        refuse_second_derivatives()  # autograd would take what is returned for the weight
        weight = packed.weight
        _require_version(weight, packed.version)
        if packed.name not in packed.made:
            packed.made[packed.name] = _laid_out(packed.feedback(), weight)
        made = packed.made[packed.name]
        return made.as_strided(packed.size, packed.stride, made.storage_offset() + packed.offset)


def _extent(tensor: Tensor) -> int:
    """Places of the storage from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def _require_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError("a tensor that the backward pass needs was modified in place after the forward pass")


def _laid_out(feedback: Tensor, weight: Tensor) -> Tensor:
    """Return the feedback with the weight's type, device and strides."""
    feedback = feedback.detach()
    if feedback.dtype != weight.dtype or feedback.device != weight.device:
        feedback = feedback.to(weight)
    if feedback.stride() != weight.stride():
        feedback = torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype, device=weight.device).copy_(
            feedback
        )
    return feedback
