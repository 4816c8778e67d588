"""Function calls in a forward pass, which module hooks do not see: `F.relu(x)`, `torch.tanh(x)`, `x.relu_()`, `x + y`.

`torch.overrides` passes every call of a PyTorch function on tensors to an active mode, both eager and compiled, at a cost of
about 2 microseconds each. A module calls the function of the same name, so calls inside an activation module are not
counted twice.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

NAMES = (
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid"),
    *("softplus", "softsign", "hardtanh", "hardsigmoid", "hardswish", "logsigmoid", "tanhshrink", "hardshrink"),
    *("softshrink", "threshold", "expit"),
)
"""Activations by their names in `torch.nn.functional`, `torch` and `Tensor`; with "_" appended they work in place."""

AVERAGES = (
    "mean",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
)
"""Functions that average over positions, so that each position gets only its share of the error."""

PRODUCTS = {
    *("linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "einsum", "tensordot"),
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
}
"""Functions that multiply activities by a weight that they are given."""

NORMALISATIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
"""Functions after which the size of the preceding weights does not matter."""

FUNCTIONS = frozenset(
    function
    for name in NAMES
    for place in (F, torch, Tensor, torch.special)
    for function in (getattr(place, name, None), getattr(place, f"{name}_", None))
    if function is not None
)
"""The activation functions themselves."""


def traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function in a form that `torch.compile` can trace below function modes."""
    return torch.unflatten if function is Tensor.unflatten else function


class Listener(Protocol):
    """Receives function calls."""

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
        """Record a call; the return value is passed to the caller."""


class Calls(TorchFunctionMode):
    """While it is active, `listener` is told of every call of a PyTorch function on tensors."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call and return its result."""
        func = traceable(func)
        return self.listener.function(func, args, func(*args, **(kwargs or {})))
