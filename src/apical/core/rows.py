"""Which sample each row of a tensor belongs to, where a model picks, shuffles, stacks or folds the rows of a batch.

Routing (mixtures of experts), windows, stacked pairs, tokens folded into the batch, and moments first: a unit's rows are no
longer those of the output. While it is switched on, this mode follows every call of PyTorch's functions: operations on
shapes act on the rows' labels as they do on the tensor, all others hand the labels of their first argument on.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

RESHAPING = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"),
        *("squeeze", "unsqueeze", "expand", "narrow", "select", "index_select", "__getitem__", "chunk", "split", "unbind"),
        *("cat", "concat", "stack", "hstack", "vstack", "flip", "roll", "repeat", "repeat_interleave", "tile", "t"),
        *("tensor_split", "take_along_dim", "gather", "view_as", "expand_as", "reshape_as"),
    )
)
"""Functions that move rows."""

WRITING = {
    **dict.fromkeys(("__setitem__", "index_put", "index_put_"), "__setitem__"),
    **dict.fromkeys(("index_copy", "index_copy_", "index_add", "index_add_"), "index_copy_"),
    **dict.fromkeys(("scatter", "scatter_", "scatter_add", "scatter_add_"), "scatter_"),
}
"""Functions that put rows into a tensor, and what does the same to labels."""

CREATING = ("zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full")
"""Functions whose results belong to no sample yet."""

Labels = tuple[int, Tensor]
"""The axis of a tensor on which samples differ, and the sample of each place on it."""


def uncompiled(model: Callable[[Any], Any], inputs: Any) -> Any:
    """Return the model's output while rows are followed, outside of compiled graphs.

    A compiler continues with parts of the model after giving up on the whole, and does not make every call under this mode.
    """

    def run() -> Any:
        return model(inputs)

    return (torch.compiler.disable(run) if "torch._dynamo" in sys.modules else run)()


class Rows(TorchFunctionMode):
    """Follows the samples of a batch through a forward pass.

    Args:
        inputs: (batch, ...), or anything that holds such tensors.

    Attributes:
        labels: of the tensors for which they are known.
        made: the tensors that were made of the inputs, so far as functions were seen.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.labels: Any = WeakIdKeyDictionary()
        self.made: Any = WeakIdKeyDictionary()
        self.batch = 0
        for tensor in _tensors(inputs):
            self.made[tensor] = True
            if tensor.dim():
                self.batch = self.batch or len(tensor)
                self.labels[tensor] = (0, _numbers(len(tensor), tensor))

    def of(self, tensor: Tensor) -> Labels | None:
        """Return the labels of a tensor; None where each row is its own sample, or nothing is known."""
        labels: Labels | None = self.labels.get(tensor)
        if (
            labels is None
            or not _is_known(labels)
            or (labels[0] == 0 and torch.equal(labels[1], _numbers(self.batch, tensor)))
        ):
            return None
        return labels

    def moves(self, tensor: Tensor, folds: set[int]) -> bool:
        """Return whether samples must be followed; where places are only folded into rows, their number goes to `folds`."""
        labels = self.of(tensor)
        if labels is None:
            return False
        axis, owners = labels
        size = len(owners) // max(self.batch, 1)
        if axis == 0 and torch.equal(owners, _numbers(self.batch, tensor).repeat_interleave(size)):
            folds.add(len(owners))
            return False
        return True

    def tell(self, cuts: list[Any], output: Any) -> list[Any]:
        """Return the cuts with the labels of the output; without labels if the output omits samples, as no batch does."""
        first = next((leaf for leaf in _tensors(output) if leaf.is_floating_point()), None)
        answers = None if first is None else self.of(first)
        if answers is not None and len(answers[1].unique()) < self.batch:
            return [cut._replace(rows=None) for cut in cuts]
        return [cut._replace(answers=answers) for cut in cuts]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call, and label its result."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name != "__setitem__" and (
            isinstance(result, torch.Size) or not isinstance(result, Tensor | list | tuple | dict)
        ):
            return result  # a size, a flag, a type
        given = [t for value in (*args, *(kwargs or {}).values()) for t in _tensors(value) if t in self.made]
        for tensor in _tensors(args[0] if name == "__setitem__" else result) if given else ():
            self.made[tensor] = True
        inputs = [t for t in given if t in self.labels]
        if inputs:
            if name in WRITING:
                self._write(WRITING[name], args, args[0] if name == "__setitem__" else result)
            elif name in CREATING:
                pass
            elif name in RESHAPING:
                self._move(func, args, kwargs or {}, result)
            else:
                for tensor in _tensors(result):
                    self._inherit(tensor, inputs)
        return result

    def _move(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        first = [tree_map(self._spread, value) for value in args[:1]]
        named = {k: tree_map(self._spread, v) if k in ("input", "tensors") else v for k, v in kwargs.items()}
        try:
            try:
                moved = func(*first, *args[1:], **named)
            except RuntimeError:  # a view that expanded labels do not allow
                moved = func(*tree_map(_whole, first), *args[1:], **tree_map(_whole, named))
        except (RuntimeError, TypeError, IndexError):
            return
        for tensor, labels in zip(_tensors(result), _tensors(moved), strict=True):
            condensed = _condensed(labels)
            if condensed is not None and tensor.shape == labels.shape:
                self.labels[tensor] = condensed

    def _write(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        target, *rest, source = args if len(args) > 2 else (args[0], None)
        if not isinstance(source, Tensor) or not isinstance(target, Tensor) or not isinstance(result, Tensor):
            return
        labels = self._spread(target).clone()
        try:
            getattr(labels, name)(*rest, self._spread(source))
            condensed = _condensed(labels)
        except (RuntimeError, TypeError, IndexError):
            condensed = None
        self.labels.pop(result, None)
        if condensed is not None:
            self.labels[result] = condensed

    def _spread(self, value: Any) -> Any:
        """Return a tensor's labels in its shape; whatever has no labels as it is, if it is an index, else -1."""
        if not isinstance(value, Tensor):
            return value
        labels = self.labels.get(value)
        if labels is None:
            return value if not value.is_floating_point() else value.new_full((), -1, dtype=torch.int32).expand(value.shape)
        axis, owners = labels
        return owners.view([-1 if i == axis else 1 for i in range(value.dim())]).expand(value.shape)

    def _inherit(self, tensor: Tensor, inputs: list[Tensor]) -> None:
        for other in inputs:
            if not _is_known(self.labels[other]):
                continue
            axis, owners = self.labels[other]
            gone = [k for k in range(other.dim()) if k != axis and other.shape[:k] + other.shape[k + 1 :] == tensor.shape]
            left = {axis - (k < axis) for k in gone}
            if len(left) == 1:  # one axis was summed up, and it can only be this
                self.labels[tensor] = (left.pop(), owners)
                return
            for at in range(min(axis, tensor.dim() - 1), -1, -1):
                if tensor.shape[at] == len(owners) and (at == axis or tensor.dim() < other.dim()):
                    self.labels[tensor] = (at, owners)
                    return


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        return (tree,)
    if tree is None or isinstance(tree, int | float | str):
        return ()
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _whole(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=like.device)


def _is_known(labels: Labels) -> bool:
    """Return whether every row has a sample; those not yet written have -1."""
    return not labels[1].numel() or int(labels[1].min()) >= 0


def _condensed(labels: Tensor) -> Labels | None:
    """Return the one axis on which labels differ; None if there are several."""
    if not labels.dim():
        return None
    if not labels.numel():
        return 0, labels.new_empty(labels.shape[0])
    for axis in range(labels.dim()):
        owners = labels[tuple(slice(None) if i == axis else 0 for i in range(labels.dim()))]
        if torch.equal(labels, owners.view([-1 if i == axis else 1 for i in range(labels.dim())]).expand_as(labels)):
            return axis, owners.clone()
    return None
