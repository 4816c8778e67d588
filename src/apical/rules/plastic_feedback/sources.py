"""Determine what an optimiser's step depends on, from the operations that it runs on a trial's tensors.

Values show what a step does to a trial's tensors. Operations show what it would do to others: noise that is too small
to see there, a condition on a weight that is not yet met, a joint norm of all weights that has not grown so far.
"""

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Source = tuple[str, int]

MAKES = ("empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full", "zero", "fill")
"""Operations whose values do not depend on their arguments, such as `zeros_like`."""

PLACES = (
    "alias clone contiguous copy detach expand narrow permute reshape select slice split split_with_sizes squeeze t to_copy "
    "transpose unbind unflatten unsafe_view unsqueeze view"
)
"""Operations that move values without changing them."""

AFFINE = {
    **dict.fromkeys((*PLACES.split(), "add", "sub", "rsub", "neg", "lerp", "mul"), 2),
    **dict.fromkeys(("div", "addcmul", "addcdiv", "addmm", "baddbmm"), 1),
}
"""Number of leading arguments of an operation that may depend on a weight."""


class UnclearError(Exception):
    """A step is more than a decay and a function of each weight's own gradients."""


class Sources(TorchDispatchMode):
    """Tracks what is computed from weights and gradients while it is active.

    Args:
        weights: of a trial, whose gradients are there.
        state: of an optimiser.
        before: the tracker of the last step; without it the state counts as computed from gradients.

    Raises:
        UnclearError: at an operation that draws numbers, combines two weights, passes a number to Python, or
            turns a weight into something other than a multiple of it.
    """

    def __init__(self, weights: Sequence[Tensor], state: Mapping[Tensor, Any], before: "Sources | None" = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources: dict[int, frozenset[Source]] = {}
        self._kept: list[Tensor] = []
        for index, weight in enumerate(weights):
            self._note(weight, frozenset({("weight", index)}))
            for tensor in _tensors([weight.grad, state.get(weight)]):
                if tensor.dim():  # others count steps
                    known = frozenset[Source]() if before is None else before._of(tensor)
                    self._note(tensor, self._of(tensor) | known | {("gradient", index)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record what its results depend on."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnclearError
        name = func.overloadpacket.__name__.strip("_").removesuffix("_like")
        if name.startswith("foreach_"):
            return self._each(func, name.removeprefix("foreach_"), args, kwargs)
        sources = self._allowed(name, [*args, *kwargs.values()])
        output = func(*args, **kwargs)
        written = [value for value, kind in zip(args, func._schema.arguments, strict=False) if _is_written(kind)]
        written += [kwargs[kind.name] for kind in func._schema.arguments if _is_written(kind) and kind.name in kwargs]
        if name not in MAKES:
            for tensor in _tensors([output, written]):
                self._note(tensor, sources | self._of(tensor))
        return output

    def _each(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """An operation on lists, one element after another."""
        lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple)) and _tensors(value)]
        rows = [
            self._allowed(name, [value[i] if any(value is own for own in lists) else value for value in args])
            | self._allowed(
                name, [None, None, *(value[i] for value in kwargs.values() if any(value is own for own in lists))]
            )
            for i in range(len(lists[0]))
        ]
        output = func(*args, **kwargs)
        written = [value for value, kind in zip(args, func._schema.arguments, strict=False) if _is_written(kind)]
        for tensors in (*written, *([output] if isinstance(output, (list, tuple)) else ())):
            for tensor, sources in zip(tensors, rows, strict=False):
                if name not in MAKES:
                    self._note(tensor, sources | self._of(tensor))
        return output

    def _allowed(self, name: str, values: Sequence[Any]) -> frozenset[Source]:
        """What the arguments of an operation depend on."""
        each = [frozenset[Source]().union(*map(self._of, _tensors(value))) for value in values]
        sources = frozenset[Source]().union(*each)
        if name in MAKES or not sources:
            return frozenset()
        of_weights = [any(kind == "weight" for kind, _ in own) for own in each]
        is_affine = not any(of_weights[AFFINE.get(name, 0) :])
        if name in ("mul", "div") and any(of_weights):
            is_affine = is_affine and sum(map(bool, each)) == 1
        if (
            len({index for _, index in sources}) > 1
            or name in ("local_scalar_dense", "equal", "is_nonzero")
            or not is_affine
        ):
            raise UnclearError
        return sources

    def _of(self, tensor: Tensor) -> frozenset[Source]:
        return self._sources.get(tensor.untyped_storage()._cdata, frozenset())

    def _note(self, tensor: Tensor, sources: frozenset[Source]) -> None:
        if sources:
            self._kept.append(tensor)  # or another storage may get its address
            self._sources[tensor.untyped_storage()._cdata] = sources


@contextmanager
def draws_nothing() -> Iterator[None]:
    """Forbid draws from Python's or NumPy's generators inside, and restore their states.

    Raises:
        UnclearError: something was.
    """
    python, numpy = random.getstate(), cast(tuple[Any, ...], np.random.get_state())
    try:
        yield
        if random.getstate() != python or cast(tuple[Any, ...], np.random.get_state())[2:] != numpy[2:]:
            raise UnclearError
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Mapping):
        return _tensors([*value.values()])
    if isinstance(value, (list, tuple, deque)):
        return [tensor for element in value for tensor in _tensors(element)]
    return [value] if isinstance(value, Tensor) else []
