"""Run a model and leave it as it was."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

DEPTH = 3
"""How far into a module's attributes objects are looked for that hold a state."""

LONG = 1000
"""Elements of a container beyond which these are not looked at."""

LARGE = 2**24
"""Numbers of a tensor or array beyond which it holds data, and no state."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def undisturbed(*modules: nn.Module, parameters: bool = False) -> Iterator[None]:
    """Run anything within; afterwards modules, gradients, buffers and random generators are as they were.

    So are the attributes of modules, and what forward methods, hooks and the loss find by name, with what containers and
    plain objects hold: states of neurons, counters, lists of activities. An iterator that was asked for its next value, and
    numbers that a function sets outside itself, cannot be put back.

    Args:
        modules: whose state is kept.
        parameters: also restore the values of the parameters of a large model, which its forward is not thought to change.
    """
    every = list(dict.fromkeys(m for module in modules for m in module.modules()))
    attributes = [(m, {k: _shallow(v) for k, v in m.__dict__.items()}) for m in every]
    tensors = _tensors(every, parameters)
    leaves = [q for m in every for q in m.parameters(recurse=False) if q.is_leaf]  # others stand in for parameters in a call
    grads = [(q, q.grad, None if q.grad is None else q.grad.clone()) for q in leaves]
    devices = {t.device.index for t, _ in tensors if t.is_cuda}
    devices |= {q.device.index for q, *_ in grads if q.is_cuda}
    with torch.random.fork_rng([device for device in devices if device is not None]), kept_states(every, drawn=True):
        try:
            yield
        finally:
            for module, saved in attributes:
                module.__dict__.clear()
                module.__dict__.update({key: _restored(*value) for key, value in saved.items()})
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                _put_back(tensors)
            for parameter, grad, before in grads:
                parameter.grad = grad
                if grad is not None and before is not None:
                    grad.detach().copy_(before)


@contextmanager
def kept_attributes(*modules: nn.Module, loss: Callable[..., Any] | None = None, tensors: bool = True) -> Iterator[None]:
    """Afterwards what a user's modules hold is as it was, with buffers and weights; see :func:`undisturbed`.

    Gradients, and what rules put into the modules within, stay.

    Args:
        modules: a model, but no rule, which may keep what belongs to what it put into the model.
        loss: whose state is kept, too.
        tensors: False leaves buffers and weights to the caller.
    """
    modules += (loss,) if isinstance(loss, nn.Module) else ()
    every = list(dict.fromkeys(m for module in modules for m in module.modules()))
    made = [m for m in every if not isinstance(m, LazyModuleMixin)]  # others are changed for good by their first batch
    attributes = [(m, {name: _shallow(m.__dict__[name]) for name in _own_names(m)}) for m in made]
    values = _tensors(made, parameters=False) if tensors else []
    with kept_states(every, drawn=True, objects=(loss,)):
        try:
            yield
        finally:
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                _put_back(values)
            for module, saved in attributes:
                for name in _own_names(module) - saved.keys():
                    del module.__dict__[name]
                module.__dict__.update({name: _restored(*value) for name, value in saved.items()})


def _own_names(module: nn.Module) -> set[str]:
    """Return the attributes of a user's module, but for those that every module has."""
    return set() if type(module).__module__.startswith("apical.") else module.__dict__.keys() - _EVERY_MODULES - {"forward"}


@contextmanager
def kept_states(modules: Iterable[nn.Module], drawn: bool = False, objects: Iterable[Any] = ()) -> Iterator[None]:
    """Afterwards objects that attributes of modules hold are as they were, but for buffers and parameters.

    Args:
        modules: whose attributes are looked at; of a rule's own only the loss.
        drawn: the generators of Python and NumPy, too.
        objects: others that are looked at.
    """
    restores, tensors = _eagerly(_inner, modules, objects)
    copies = _copies(tensors)
    restores += _eagerly(_generators) if drawn else []
    try:
        yield
    finally:
        with torch.no_grad():
            _put_back(copies)
        _eagerly(_call, restores)


def _put_back(tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in tensors:
        if tensor.shape != value.shape:  # an observer's, which are empty before its first batch
            tensor.data = value
        elif not (tensor.is_meta or torch.equal(tensor, value)):  # on meta there are no values
            tensor.data.copy_(value)  # unseen by a graph that keeps the buffer


def _copies(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    dense = [t for t in tensors if t.layout is torch.strided]  # others are not written in place
    return [(t, t.detach().clone()) for t in {id(t): t for t in dense}.values()]


def _tensors(modules: Iterable[nn.Module], parameters: bool) -> list[tuple[Tensor, Tensor]]:
    tensors = [t for m in modules for t in m._buffers.values() if t is not None]
    own = [t for m in modules for t in m._parameters.values() if t is not None]
    frozen = [t for t in own if not t.requires_grad]
    if parameters:
        tensors += own
    elif sum(t.numel() for t in own) <= LARGE:  # a forward may clamp or rescale weights
        tensors += [t for t in own if type(t) in (nn.Parameter, Tensor) or not t.requires_grad]  # no feedback in closed form
    elif 2 * sum(t.numel() for t in frozen) <= sum(t.numel() for t in own):  # averages that a forward moves, no backbone
        tensors += frozen
    with torch._C.DisableTorchFunctionSubclass():  # of feedback that is kept in closed form there is nothing to keep
        return _copies(tensors)


def _generators() -> list[Callable[[], None]]:
    """Return a function that restores the random generators of Python and NumPy."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    if numpy is None:
        return [lambda: random.setstate(state)]
    legacy = numpy.random.get_state()
    return [lambda: random.setstate(state), lambda: numpy.random.set_state(legacy)]


def _inner(modules: Iterable[nn.Module], objects: Iterable[Any]) -> tuple[list[Callable[[], None]], list[Tensor]]:
    """Return what restores states of objects and tensors that attributes of a user's modules hold, also in containers."""
    seen, restores, tensors = set[int](), list[Callable[[], None]](), list[Tensor]()
    waiting = [(value, 0) for module in modules for value in _looked_at(module)] + [(value, 0) for value in objects]
    waiting += [(hook, 0) for hooks in _GLOBAL_HOOKS for hook in hooks.values()]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors += [value] if type(value) is Tensor and value.numel() <= LARGE else []
            continue
        restore, inner = _kept(value)
        restores += [] if restore is None else [restore]
        waiting += [(part, depth + 1) for part in inner] if depth < DEPTH and len(inner) <= LONG else []
    return restores, tensors


def _call(restores: Iterable[Callable[[], None]]) -> None:
    for restore in restores:
        restore()


@cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], torch.compiler.disable(function))


def _eagerly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that a compiler shall not look into; to import one takes as long as to import PyTorch."""
    return (_disabled(function) if "torch._dynamo" in sys.modules else function)(*arguments)


def _looked_at(module: nn.Module) -> Iterator[Any]:
    """Return the attributes of a user's module, its forward method and hooks; of a rule, its loss."""
    held, kind = module.__dict__, type(module).__module__
    names = {"loss"} if kind.startswith("apical.") else held.keys() - _EVERY_MODULES
    yield from (held[name] for name in names if name in held)
    for hooks in _HOOKS:
        yield from held[hooks].values()
    if not kind.startswith(_OTHERS):
        yield type(module).forward


def _scope(function: FunctionType) -> list[Any]:
    """Return the values that a user's function reads from enclosing functions and from its file."""
    if (function.__module__ or "").startswith(_OTHERS):
        return []
    inner = [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
    return inner + [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]


def _kept(value: Any) -> tuple[Callable[[], None] | None, list[Any]]:
    """Return what restores a value's state, if it has one that can be kept, and what it holds."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: (value.set_state(state), None)[1], []
    if isinstance(value, random.Random):
        drawn = value.getstate()
        return lambda: value.setstate(drawn), []
    if isinstance(value, dict | list | set | deque | tuple):
        inner = list(value.values()) if isinstance(value, dict) else list(value)
        if isinstance(value, tuple):
            return None, inner
        kept = _copy(value)
        return lambda: (_restored(value, kept), None)[1], inner
    if isinstance(value, FunctionType):
        return None, _scope(value)
    if isinstance(value, MethodType):
        return None, [value.__self__, value.__func__]
    if isinstance(value, partial):
        if (getattr(value.func, "__module__", None) or "").startswith("apical."):  # keeps notes, which are read afterwards
            return None, []
        return None, [value.func, *value.args, *value.keywords.values()]
    if type(value).__module__.startswith("numpy"):
        return _kept_numpy(value), []
    kind: Any = type(value)
    own, slots = getattr(value, "__dict__", {}), _slots(kind)
    if type(own) is not dict or isinstance(value, nn.Module | type) or kind.__module__.startswith((*_OTHERS, *_LIVE)):
        return None, []
    before, placed = dict(own), {name: getattr(value, name) for name in slots if hasattr(value, name)}
    inner = [*before.values(), *placed.values()]
    live = [part for part in inner if type(part).__module__.startswith(_LIVE) and type(part).__name__ not in _NEUTRAL]
    if live:  # half of it cannot be put back
        return None, []

    def restore() -> None:
        _restored(own, before)
        for name in slots:
            if name in placed:
                object.__setattr__(value, name, placed[name])
            elif hasattr(value, name):
                object.__delattr__(value, name)

    return restore, inner


@cache
def _slots(kind: type) -> list[str]:
    """Return the names of what objects of a class keep in `__slots__`; a private name has that of its class in front."""
    names = []
    for base in kind.__mro__:
        own = base.__dict__.get("__slots__", ())
        for name in (own,) if isinstance(own, str) else own:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _kept_numpy(value: Any) -> Callable[[], None] | None:
    """Return what restores an array or a random generator of NumPy; None for other values."""
    if hasattr(value, "bit_generator"):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    if not hasattr(value, "shape") or value.ndim == 0 or value.size > LARGE:
        return None
    numbers = value.copy()
    return lambda: value.__setitem__(..., numbers)


def _shallow(value: Any) -> tuple[Any, Any]:
    """Return the value, and what it holds where it is a container."""
    return value, _copy(value) if isinstance(value, dict | list | set) else None


def _copy(value: Any) -> Any:
    """Return what a container holds."""
    return next(kind(value) for kind in (dict, list, set, deque) if isinstance(value, kind))


def _restored(value: Any, content: Any) -> Any:
    """Return the value with its former content; one that has not changed is not touched, since its type may forbid it."""
    if content is None or _holds(value, content):
        return value
    if isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        (value.extend if isinstance(value, deque) else value.update)(content)
    return value


def _holds(value: Any, content: Any) -> bool:
    """Return whether a container still holds the same objects in the same order."""
    if isinstance(value, set):
        return bool(value == content)
    held, before = ([part for item in x.items() for part in item] if isinstance(x, dict) else x for x in (value, content))
    return len(held) == len(before) and all(a is b for a, b in zip(held, before, strict=True))


_EMPTY = CellType()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OTHERS = ("torch.", "apical.", "builtins")
_LIVE = ("_thread", "threading", "_io", "socket", "queue", "_queue", "multiprocessing", "concurrent", "asyncio", "logging")
_NEUTRAL = ("lock", "RLock", "Logger")
"""Types of live objects that are after a pass what they were before it."""

_EVERY_MODULES = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (_global_forward_hooks, _global_forward_pre_hooks)
