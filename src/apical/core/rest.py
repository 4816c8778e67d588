"""Run a model and leave it as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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

    Args:
        modules: whose state is kept.
        parameters: also restore the values of the parameters.
    """
    every = list(dict.fromkeys(m for module in modules for m in module.modules()))
    attributes = [(m, {k: _shallow(v) for k, v in m.__dict__.items()}) for m in every]
    tensors = _tensors(every, parameters)
    generators = [v for m in every for v in m.__dict__.values() if isinstance(v, torch.Generator)]
    states = [(generator, generator.get_state()) for generator in generators]
    leaves = [q for m in every for q in m.parameters(recurse=False) if q.is_leaf]  # others stand in for parameters in a call
    grads = [(q, q.grad, None if q.grad is None else q.grad.clone()) for q in leaves]
    devices = {t.device.index for t, _ in tensors if t.is_cuda}
    devices |= {q.device.index for q, *_ in grads if q.is_cuda}
    with torch.random.fork_rng([device for device in devices if device is not None]):
        try:
            yield
        finally:
            for module, saved in attributes:
                module.__dict__.clear()
                module.__dict__.update({key: _restored(*value) for key, value in saved.items()})
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                for tensor, value in tensors:
                    if tensor.shape != value.shape:  # an observer's, which are empty before its first batch
                        tensor.data = value
                    elif not (tensor.is_meta or torch.equal(tensor, value)):  # on meta there are no values
                        tensor.data.copy_(value)  # unseen by a graph that keeps the buffer
            for generator, state in states:
                generator.set_state(state)
            for parameter, grad, before in grads:
                parameter.grad = grad
                if grad is not None and before is not None:
                    grad.detach().copy_(before)


def _tensors(modules: Iterable[nn.Module], parameters: bool) -> list[tuple[Tensor, Tensor]]:
    tensors = [t for m in modules for t in m._buffers.values() if t is not None]
    if parameters:
        tensors += [t for m in modules for t in m._parameters.values() if t is not None]
    with torch._C.DisableTorchFunctionSubclass():  # of feedback that is kept in closed form there is nothing to keep
        return [(t, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]


def _shallow(value: Any) -> tuple[Any, Any]:
    """The value, and what it holds where it is a container."""
    kind = next((kind for kind in (dict, list, set) if isinstance(value, kind)), None)
    return value, None if kind is None else kind(value)


def _restored(value: Any, content: Any) -> Any:
    """The value, holding what it held; one that has not changed is not touched, as it may be a type that cannot be."""
    if content is None or _holds(value, content):
        return value
    if isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)
    return value


def _holds(value: Any, content: Any) -> bool:
    """Whether a container still holds the same objects in the same order."""
    if isinstance(value, set):
        return bool(value == content)
    held, before = ([part for item in x.items() for part in item] if isinstance(x, dict) else x for x in (value, content))
    return len(held) == len(before) and all(a is b for a, b in zip(held, before, strict=True))
