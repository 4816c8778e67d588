"""How many multiply-adds a piece of work takes, counted product by product, whatever code computes them."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from apical.diagnostics.synapses import aten, factors


def of_operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the multiply-adds of one operation; 0 if it is no summing product (matrix product, convolution, attention)."""
    if func.overloadpacket in flop_registry:  # which counts two operations for each
        return int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)) // 2
    places = factors(func, args)
    if not places:
        return 0
    first, second = (args[place] for place in places)
    columns = 1 if second.dim() == 1 else second.shape[0 if func.overloadpacket is aten.linear else -1]
    return int(first.numel() * columns)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += of_operation(func, args, kwargs or {}, result)
        return result


def multiply_adds(work: Callable[[], object]) -> int:
    """Return the multiply-adds of `work()`, which is called once, its backward passes included.

    >>> import torch
    >>> multiply_adds(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
    30
    """
    counter = _Counter()
    with counter:
        work()
    return counter.total
