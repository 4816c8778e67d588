"""Weights of layers that a model also multiplies activities with outside the layers, where no feedback can be attached."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from apical.errors import UnsupportedModelError

PRODUCTS = {
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "einsum", "tensordot"),
    *("addmm", "addmv", "addbmm", "baddbmm"),
    *(f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)),
}
"""Names of the functions by which an error passes from one population to another."""


class OutsideUse(TorchFunctionMode):
    """Stands in for a rule during one forward pass, and looks at what happens to weights outside the layers' own calls.

    Args:
        rule: takes the layers' calls.
        weights: each layer's weight in this pass.
    """

    def __init__(self, rule: Any, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rule, self.inside = rule, 0
        self.found: tuple[str, str] | None = None
        self.made = {id(weight): (name, weight) for name, weight in weights.items()}  # weights, and what is made of them

    def call_layer(self, site: Any, *args: Any, **kwargs: Any) -> Any:
        """The rule's own, during which nothing is outside."""
        self.inside += 1
        try:
            return self.rule.call_layer(site, *args, **kwargs)
        finally:
            self.inside -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            tensors = list(_tensors((*args, *(kwargs or {}).values())))
            names = [self.made[id(tensor)][0] for tensor in tensors if id(tensor) in self.made]
            activities = any(tensor.requires_grad for tensor in tensors if id(tensor) not in self.made)
            if names and activities and getattr(func, "__name__", "") in PRODUCTS:
                self.found = self.found or (names[0], func.__name__)
            if names and not activities:
                self.made |= {id(tensor): (names[0], tensor) for tensor in _tensors((result,))}
        return result

    def report(self) -> None:
        """Refuse a weight that was used outside; afterwards, since an operator would take the error for its own.

        Raises:
            UnsupportedModelError: names the layer and the function.
        """
        if self.found is not None:
            name, function = self.found
            raise UnsupportedModelError(
                f"the weight of layer {name!r} is also used outside the layer, by {function}, where the error would pass "
                f"through the weight itself; use a layer of its own there, or pass exact=({name!r},)"
            )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
