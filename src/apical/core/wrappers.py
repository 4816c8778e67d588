"""What a model may come in: several processes or inference mode, which are refused; `torch.compile`; several threads."""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from inspect import getclosurevars
from itertools import takewhile
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from apical.errors import ConfigError, UnsupportedModelError, refuse_transforms

if TYPE_CHECKING:
    from apical.core.credit import CreditRule

COMPILES = torch.__version__ >= "2.13"
"""Whether rules are compiled: older compilers fail on rules, that of 2.6 on most, of 2.9 on one in two, of 2.12 on a few."""


def outside_graphs(rule: "CreditRule", *args: Any, **kwargs: Any) -> Any:
    """Return the result of a rule's call that the compiler has met, in eager mode; with a warning."""
    warnings.warn(
        f"PyTorch {torch.__version__} cannot compile rules: {type(rule).__name__} runs uncompiled; update PyTorch to 2.13 "
        "or newer, or leave torch.compile out",
        RuntimeWarning,
        stacklevel=2,
    )
    return torch.compiler.disable(type(rule).__call__)(rule, *args, **kwargs)


outside_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]  # what the compiler looks for


class Turn:
    """For a `with`: calls from several threads take turns, because layers are told which rule is at work.

    What a transform of `torch.func` cannot follow there is explained.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._lock.release()
        if isinstance(error, RuntimeError):
            refuse_transforms("this rule")

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        return Turn, ()


_TURNS: WeakKeyDictionary[nn.Module, Turn] = WeakKeyDictionary()


def turn(model: nn.Module) -> Turn:
    """Return the turns of all rules of one model."""
    return _TURNS.setdefault(model, Turn())


def refuse_wrapped(model: object) -> None:
    """Refuse what is no model, and wrappers that rely on the outermost forward to share gradients, which need not pass it.

    Raises:
        ConfigError: no `nn.Module`; or tensors of inference mode, which cannot learn.
        UnsupportedModelError: lazy modules without weights; or `DistributedDataParallel` or `DataParallel`, around the model
            or a part of it.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be an object of a subclass of nn.Module, not {model!r:.60}")
    lazy = [
        n for n, m in model.named_modules() if any(isinstance(q, UninitializedParameter) for q in m._parameters.values())
    ]
    if lazy:
        from apical.core.units import enumerated

        what = "the model itself is" if lazy == [""] else enumerated("module", lazy, "is", "are")
        raise UnsupportedModelError(f"{what} lazy: run one batch through the model before making the rule")
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise ConfigError(
            "a model or rule that is made under torch.inference_mode() has tensors that cannot learn: create both outside"
        )
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, *_sharders())
    if kind := next((each.__name__ for m in model.modules() for each in wrappers if isinstance(m, each)), None):
        remedy = "fully_shard(rule)" if "FSDP" in kind or "Sharded" in kind else "DistributedDataParallel(rule)"
        raise UnsupportedModelError(
            f"the model is wrapped in {kind}, which would not share every gradient of a rule among processes: make the "
            f"rule from the plain model and wrap the rule, {remedy}"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        warnings.warn(
            "the model is on the meta device, and so is the feedback made for it, which to_empty() leaves undefined: "
            "load a state dict of the whole rule, or make the rule once the model has values",
            RuntimeWarning,
            stacklevel=4,
        )


def _sharders() -> tuple[type, ...]:
    """Return the classes of modules whose parameters are shared out, if they have been imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)


def is_compiled(model: nn.Module) -> bool:
    """Return whether `torch.compile` has compiled the model or a part of it: as a module, in place, or one of its methods.

    >>> is_compiled(torch.compile(nn.Linear(2, 2))), is_compiled(nn.Linear(2, 2))
    (True, False)
    """
    return "torch._dynamo" in sys.modules and any(_is_compiled(module) for module in model.modules())


def _is_compiled(module: nn.Module) -> bool:
    if module._compiled_call_impl is not None:
        return True
    kinds = takewhile(lambda kind: kind is not nn.Module, type(module).__mro__)
    functions = [f for own in (module, *kinds) for f in vars(own).values() if isinstance(f, FunctionType | MethodType)]
    return any(hasattr(f, "_torchdynamo_orig_callable") and not getattr(f, "_torchdynamo_disable", False) for f in functions)


def compiled_function(model: nn.Module) -> str | None:
    """Return the name of a function that `torch.compile` has compiled, not one of PyTorch's, and that a model calls.

    It is looked for in collections that modules hold, and among the variables of their methods and of the functions that
    these name.
    """
    waiting: list[object] = []
    for module in model.modules() if "torch._dynamo" in sys.modules else ():
        kinds = takewhile(lambda kind: kind is not nn.Module, type(module).__mro__)
        waiting += [own for kind in kinds for own in vars(kind).values()]
        waiting += [own for own in vars(module).values() if isinstance(own, list | tuple | dict)]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple | dict):
            waiting += value.values() if isinstance(value, dict) else value
        function = value.__func__ if isinstance(value, MethodType | staticmethod) else value
        if not isinstance(function, FunctionType) or id(value) in seen:
            continue
        seen.add(id(value))
        own = getattr(value, "_torchdynamo_orig_callable", None)
        if ((own or function).__module__ or "").startswith("torch."):
            continue
        if own is not None and not hasattr(value, "_torchdynamo_disable"):
            return str(own.__name__)
        with suppress(ValueError):  # a variable without a value
            waiting += _named(function)
    return None


def _named(function: Callable[..., Any]) -> list[object]:
    """Return what a function's code names among its variables, and among the attributes of Python's modules."""
    names = getclosurevars(function)
    values = [*names.globals.values(), *names.nonlocals.values()]
    modules = [value for value in values if isinstance(value, ModuleType) and not value.__name__.startswith("torch")]
    return values + [vars(m)[name] for m in modules for name in function.__code__.co_names if name in vars(m)]


def uncompiles(rule: "CreditRule", model: nn.Module) -> bool:
    """Return whether a rule must run its model uncompiled; warns when that begins."""
    if not ((rule.sees_layers or rule.attention != "exact") and is_compiled(model)):
        return False
    if not rule._uncompiles:
        warnings.warn(
            "the model is compiled, whole or in parts, and runs uncompiled while the rule learns, which must see its "
            "layers at work; make the rule from the uncompiled model, and compile the rule, torch.compile(rule)",
            RuntimeWarning,
            stacklevel=3,
        )
    return True


def _refuse_shared_out(rule: "CreditRule") -> None:
    """Refuse layers that were shared out by themselves since, and FullyShardedDataParallel, which takes their parameters.

    Raises:
        UnsupportedModelError: names a layer, or the wrapper.
    """
    names = [name for name, module in rule.model.named_modules() if isinstance(module, _sharders())]
    if names:
        raise UnsupportedModelError(
            f"module {names[0]!r} of the model was sharded by itself, and a rule also runs layers outside the calls that "
            "would gather their parameters: call fully_shard(rule) alone"
        )
    flat = "_flat_param" in rule._parameters or not any(q.is_leaf for q in rule.parameters())
    if flat and getattr(rule, "_is_fsdp_managed_module", False):
        raise UnsupportedModelError(
            "the rule is wrapped in FullyShardedDataParallel, which takes parameters away from their layers: use "
            "fully_shard(rule) or DistributedDataParallel(rule)"
        )


def uncompiled(model: nn.Module, rule: "CreditRule | None" = None) -> AbstractContextManager[object]:
    """For a `with`: a model that is compiled runs as it was written, for a rule that must see its layers.

    Raises:
        UnsupportedModelError: it is being compiled once more, with the rule around it.
    """
    if not torch.compiler.is_compiling():
        if rule is not None:
            _refuse_shared_out(rule)
            rule._uncompiles = uncompiles(rule, model)
        if not (is_compiled(model) if rule is None else rule._uncompiles):
            return nullcontext()
        try:
            stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
            return stance
        except RuntimeError:  # where the graph of what is compiled around the rule was broken
            pass
    raise UnsupportedModelError(
        "the model is compiled, whole or in parts, within a rule or a step that is compiled too: make the rule from the "
        "uncompiled model, and compile the rule, torch.compile(rule)"
    )


@contextmanager
def uncached() -> Iterator[None]:
    """Compute parametrised weights at every access within `torch.nn.utils.parametrize.cached()`.

    A rule also reads weights without recording a graph; the cache would keep such a weight, which then gets no gradient.
    """
    before = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before
