"""The swap: while one layer runs, autograd keeps a note in place of its weight, and is given the feedback when it asks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from apical.core.units import Layer
from apical.errors import refuse_second_derivatives


class Swap(saved_tensors_hooks):
    """While one layer runs, autograd keeps a note in place of the layer's weight, and other tensors as they are.

    Args:
        layer: the layer.
        feedback: is asked in the forward pass for what makes the feedback weight when the backward pass asks for the weight.

    Attributes:
        met: autograd kept the weight since this was last set to False. Where it did not, the layer computes with another
            tensor, and the error would pass through that.
        twice: it did so twice, as for forward-mode derivatives.
    """

    def __init__(self, layer: Layer, feedback: Callable[[], Callable[[], Tensor]]) -> None:
        super().__init__(self.pack, self.unpack)
        self.layer, self.feedback = layer, feedback
        self.met = self.twice = False
        self._own = layer._parameters

    def _weight(self) -> Tensor:
        """Return the layer's weight; attributes of modules take a microsecond, which matters for small layers."""
        weight = self._own.get("weight")
        return self.layer.weight if weight is None else weight

    def pack(self, saved: Tensor) -> Any:
        """Return (the tensor or what makes the feedback, is it transposed, version)."""
        weight = self._weight()
        if saved.untyped_storage()._cdata != weight.untyped_storage()._cdata:
            return saved, False, saved._version
        transposed = saved.shape != weight.shape or saved.stride() != weight.stride()
        is_other = transposed and (saved.shape != weight.shape[::-1] or saved.stride() != weight.stride()[::-1])
        if is_other or saved.storage_offset() != weight.storage_offset():  # all parameters may lie in one storage
            return saved, False, saved._version
        self.twice, self.met = self.met, True
        return self.feedback(), transposed, weight._version

    def is_given(self, inputs: Tensor) -> bool:
        """Return whether the layer's input is its weight, or a part of it, too; which is which cannot be told then."""
        return bool(inputs.untyped_storage()._cdata == self._weight().untyped_storage()._cdata)

    def unpack(self, packed: tuple[Tensor | Callable[[], Tensor], bool, int]) -> Tensor:
        """Return the feedback weight, or the tensor that was kept, unless it was changed since."""
        saved, transposed, version = packed
        weight = saved if isinstance(saved, Tensor) else self._weight()
        if weight._version != version:
            raise RuntimeError("a tensor that the backward pass needs was modified in place after the forward pass")
        if isinstance(saved, Tensor):
            return saved
        refuse_second_derivatives()  # autograd would take what is returned for the weight
        feedback = saved()
        if feedback.dtype != weight.dtype or feedback.device != weight.device:  # the model was moved without the rule
            feedback = feedback.to(weight)
        return feedback.T if transposed else feedback
