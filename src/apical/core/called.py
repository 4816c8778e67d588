"""Functions that a model calls between its modules, represented by modules that compute the same.

`F.relu(x)`, `x.flatten(1)` and `F.avg_pool2d(x, 2)` are steps of a chain just as `nn.ReLU()`, `nn.Flatten()` and
`nn.AvgPool2d(2)` are, and so is `x.mean((2, 3))`. A function is taken for a module if the two agree, bit for bit, on random
numbers of its input's shape. An activation with a number of its own (`F.leaky_relu(x, self.slope)`) is not: no one would see
the number change.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apical.core.layers import LINEAR
from apical.errors import UnsupportedModelError

FAKE = "tensors under FakeTensorMode have no values, which this rule needs; make and call the rule outside that mode"


class Mean(nn.Module):
    """Mean over dimensions other than the batch dimension, as in `x.mean((2, 3))`.

    Args:
        dim: one dimension or several.
        keepdim: whether to keep the reduced dimensions with size 1.

    >>> Mean((2, 3))(Tensor(2, 5, 4, 4)).shape
    torch.Size([2, 5])
    """

    def __init__(self, dim: int | Sequence[int], keepdim: bool = False) -> None:
        super().__init__()
        self.dim, self.keepdim = (dim,) if isinstance(dim, int) else tuple(dim), keepdim

    def forward(self, v: Tensor) -> Tensor:
        """Average (batch, ...) over the dimensions."""
        return v.mean(self.dim, self.keepdim)

    def extra_repr(self) -> str:
        """Return the options as printed."""
        return f"dim={self.dim}, keepdim={self.keepdim}"


LINEAR.append(Mean)
_ACTIVATIONS = (
    *("relu ReLU", "relu6 ReLU6", "leaky_relu LeakyReLU", "elu ELU", "selu SELU", "celu CELU", "gelu GELU", "silu SiLU"),
    *("mish Mish", "tanh Tanh", "sigmoid Sigmoid", "special_expit Sigmoid", "softplus Softplus", "softsign Softsign"),
    *("hardtanh Hardtanh", "hardsigmoid Hardsigmoid", "hardswish Hardswish", "log_sigmoid LogSigmoid"),
    *("tanhshrink Tanhshrink", "hardshrink Hardshrink", "softshrink Softshrink", "threshold Threshold"),
    *("softmax Softmax", "log_softmax LogSoftmax"),
)
_POOLS = tuple(
    f"{name}_pool{n}d {kind}Pool{n}d"
    for name, kind in (("max", "Max"), ("avg", "Avg"), ("adaptive_avg", "AdaptiveAvg"))
    for n in (1, 2, 3)
)
MODULES: dict[str, type[nn.Module]] = {
    function: getattr(nn, kind) for function, kind in map(str.split, (*_ACTIVATIONS, *_POOLS))
}
"""Functions by name, and the modules that take the same arguments in the same order."""

RESHAPING = ("flatten", "view", "reshape")
"""Functions that may flatten each sample to one row, as `nn.Flatten()` does."""

VALUES = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "equal", "allclose")
"""Functions that return a tensor's values to Python."""

UNHEARD = ("input", "inplace", "_stacklevel", "dtype", "return_indices")
"""Arguments that make no difference between function and module; a `dtype` that does is detected by comparison."""


class Call(NamedTuple):
    """One call of a function or of a module without children, with its input and its result."""

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor
    entered: int  # version of `given` at the call: a change in place leaves the tensor the same object
    left: int  # version of `made` when it returned
    is_function: bool = False

    @property
    def label(self) -> str:
        """Description of the call, for messages."""
        return f"{'function' if self.is_function else 'module'} {self.name!r}"


class Functions(TorchFunctionMode):
    """Mode that records calls of functions that a module could compute as calls of that module.

    Args:
        note: is handed each call.
        before: modules created in an earlier pass, by name, which are reused; new ones are added.
    """

    def __init__(self, note: Callable[[Call], None], before: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.note, self.modules = note, {} if before is None else before
        self.deep = 0  # number of module calls in progress
        self.where = "the model's forward"
        self.counts: dict[str, int] = {}
        self.makers: list[tuple[Tensor, str]] = []  # with its function; kept alive so that ids stay unique

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call and return its result."""
        options = kwargs or {}
        given = args[0] if args and isinstance(args[0], Tensor) else None
        entered = given._version if given is not None else 0
        result = func(*args, **options)
        if not self.deep and func.__name__ in VALUES:
            raise UnsupportedModelError(
                f"{self.where} reads values of the batch ({func.__name__.strip('_')}) and may take another path for "
                "other values, which this rule would not see; remove that, or use another rule"
            )
        if self.deep or not isinstance(result, Tensor):
            return result
        name = func.__name__.strip("_")
        self.makers.append((result, name))
        if given is not None and given.is_floating_point():
            module = module_of(func, given, args[1:], options)
            if isinstance(module, Mean) and not module.keepdim and result.dim() == 2:  # one position, flattened
                module = Mean(module.dim, keepdim=True)
                kept = module(given)
                self._hear(name, module, given, kept, entered)
                name, module, given, entered = "flatten", nn.Flatten(), kept, kept._version
            if module is not None:
                self._hear(name, module, given, result, entered)
        return result

    def _hear(self, name: str, module: nn.Module, given: Tensor, made: Tensor, entered: int) -> None:
        self.note(Call(*self._known(f"F.{name}", module), given, made, entered, made._version, True))

    def _known(self, name: str, module: nn.Module) -> tuple[str, nn.Module]:
        """Return the name of this call, and the module that an earlier pass created for it."""
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        name = f"{name}#{count}" if count else name
        if repr(self.modules.setdefault(name, module)) != repr(module):
            self.modules[name] = module
        return name, self.modules[name]

    def maker(self, tensor: Tensor) -> str | None:
        """Return the name of the function that made a tensor, or last changed it in place."""
        return next((name for made, name in reversed(self.makers) if made is tensor), None)


def module_of(
    function: Callable[..., Any], given: Tensor, arguments: Sequence[Any], options: dict[str, Any]
) -> nn.Module | None:
    """Return a module that computes the same as `function(given, *arguments, **options)`; None if there is none.

    >>> module_of(torch.relu, torch.zeros(2, 3), (), {}), module_of(torch.cumsum, torch.zeros(2, 3), (1,), {})
    (ReLU(), None)
    """
    name = getattr(function, "__name__", "").strip("_")
    own = {key: value for key, value in options.items() if key not in UNHEARD}
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(given.shape, dtype=torch.float64, generator=generator, device="cpu").to(given)
    try:
        if name in RESHAPING:
            module: nn.Module = nn.Flatten()
        elif name == "mean":
            module = Mean(*arguments, **own)
            if any(dim % given.dim() == 0 for dim in module.dim):
                return None  # over the batch
        elif name in MODULES and not _has_number(name, [*arguments, *own.values()]):
            module = MODULES[name](*arguments, **own)
        else:
            return None
        wanted, made = function(numbers.clone(), *arguments, **options), module(numbers.clone())
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    return module if isinstance(made, Tensor) and wanted.dtype == made.dtype and torch.equal(wanted, made) else None


def _has_number(name: str, options: Sequence[Any]) -> bool:
    """Whether a parameter such as a slope or a bound is given; sizes of pools and dimensions do not count."""
    sized = "pool" in name or "softmax" in name
    return not sized and any(isinstance(value, int | float | Tensor) and not isinstance(value, bool) for value in options)


def on_path(calls: Sequence[Call], output: Any) -> list[Call]:
    """Return the calls of modules, and those calls of functions that the output depends on."""
    kept: list[Call] = []
    at = output
    for call in reversed(calls):
        if not call.is_function or call.made is at:
            kept.append(call)
            at = call.given
    return kept[::-1]


def are_fake() -> bool:
    """Return whether tensors hold no values because PyTorch's `FakeTensorMode` is active."""
    if torch.compiler.is_compiling():  # the compiler's own tensors are fake
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def not_run(example: Tensor, error: Exception) -> UnsupportedModelError:
    """Return the error for a model whose forward pass failed on an example tensor of the right shape."""
    if are_fake():
        return UnsupportedModelError(f"the model cannot be run here: {FAKE}")
    return UnsupportedModelError(
        f"the model cannot be run on a sample of shape {tuple(example.shape[1:])}: {type(error).__name__}: {error}"
    )
