"""Activation checkpointing: parts of the model whose forward pass is repeated during the backward pass, without the rule.

Non-reentrant: saved-tensor hooks drop what autograd keeps, and the repeated pass supplies it again, matched by position. A
rule may add nothing to what autograd keeps there, and take nothing away: :func:`sever` cuts the graph in place of `detach`,
and :func:`aside` keeps the rule's own tensors out of the checkpoint.

Reentrant: the pass runs without gradient inside an autograd function, whose backward repeats it, unseen by the rule.
"""

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

from apical.errors import UnsupportedModelError

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in the oldest versions of PyTorch
SEES_HOOKS = _top_hooks is not None
"""Whether PyTorch tells of saved-tensor hooks other than a checkpoint's, as 2.6 does not."""


def is_checkpointed() -> bool:
    """Whether a non-reentrant activation checkpoint is recording now."""
    if torch.compiler.is_compiling():
        return False  # a compiler plans the repeated pass from the whole graph
    if _top_hooks is None:
        return _caller(cast(Any, checkpoint.checkpoint).__wrapped__.__code__) is not None
    hooks = _top_hooks(True)
    return hooks is not None and "_checkpoint_hook." in hooks[0].__qualname__


def are_tensors_hooked() -> bool:
    """Whether anybody's saved-tensor hooks are at work now (a checkpoint's; offloading to the CPU)."""
    return is_checkpointed() if _top_hooks is None else _top_hooks(True) is not None


def refuse_hidden(name: str) -> None:
    """Refuse a layer called without gradient inside an autograd function, as reentrant checkpointing does.

    To be asked where a rule that was called with gradients meets a layer called without: a model may do so on purpose (a
    frozen backbone under `torch.no_grad`), and then its layer gets no credit.

    Raises:
        UnsupportedModelError: names the layer and the function.
    """
    function = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _autograd_function()
    if function is not None:
        raise UnsupportedModelError(
            f"layer {name!r} runs inside the autograd function {function}, where the rule cannot see it; if this is "
            "activation checkpointing, pass use_reentrant=False, or remove it"
        )


def is_untrained(parameters: Iterable[Tensor]) -> bool:
    """Whether some of these parameters would learn, but are used without gradients, and not by reentrant checkpointing."""
    return not torch.is_grad_enabled() and _autograd_function() is None and any(q.requires_grad for q in parameters)


def refuse_checkpointing(name: str) -> None:
    """Refuse a layer that runs inside an activation checkpoint of either kind, for rules that cannot work there.

    Raises:
        UnsupportedModelError: names the layer.
    """
    if is_checkpointed():
        raise UnsupportedModelError(
            f"layer {name!r} runs inside torch.utils.checkpoint, which repeats its forward pass without the rule; "
            "remove the checkpoint, or train with a rule of the feedback-alignment family"
        )
    refuse_hidden(name)


class _Sever(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> None:
        return None


def sever(inputs: Tensor) -> Tensor:
    """`inputs` without its past, as `detach`, except that what follows still looks differentiable to a checkpoint."""
    result: Tensor = cast(Any, _Sever).apply(inputs) if is_checkpointed() else inputs.detach()
    return result


def aside() -> saved_tensors_hooks:
    """Context in which autograd keeps tensors as they are, whatever hooks (a checkpoint's) are at work outside."""
    return saved_tensors_hooks(_itself, _itself)


def _itself(saved: Tensor) -> Tensor:
    return saved


def _caller(code: Any) -> Any:
    """The innermost frame on the stack that runs `code`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame


def _autograd_function() -> str | None:
    """Name of the innermost autograd function whose forward runs; `apply` leaves no frame in newer versions of PyTorch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if id(code) not in _FORWARDS:
            _FORWARDS[id(code)] = code, next((kind.__name__ for kind in _functions() if _runs(kind, code)), None)
        if (name := _FORWARDS[id(code)][1]) is not None:
            return name
        frame = frame.f_back
    return None


_FORWARDS: dict[int, tuple[CodeType, str | None]] = {}
"""Code that has been seen to run, which is kept so that its id stays its own; the autograd function whose forward it is."""


def _runs(kind: Any, code: CodeType) -> bool:
    """Whether this is the code of a class' forward."""
    return getattr(kind.forward, "__code__", None) is code


def _functions() -> Iterator[type[torch.autograd.Function]]:
    """Every class of autograd functions."""
    todo: list[type[torch.autograd.Function]] = [torch.autograd.Function]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        yield kind
