"""Activation checkpointing: parts of the model whose forward pass is repeated during the backward pass, without the rule.

Non-reentrant: saved-tensor hooks drop the tensors that autograd saves, and the repeated pass recomputes them, matched by
position. A rule must not add or remove saved tensors there: :func:`sever` cuts the graph instead of `detach`,
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

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # missing in the oldest PyTorch versions
SEES_HOOKS = _top_hooks is not None
"""Whether PyTorch reports saved-tensor hooks other than a checkpoint's; 2.6 does not."""


def is_checkpointed() -> bool:
    """Return whether a non-reentrant activation checkpoint is recording."""
    if torch.compiler.is_compiling():
        return False  # the compiler plans the recomputation from the whole graph
    if _top_hooks is None:
        return _caller(cast(Any, checkpoint.checkpoint).__wrapped__.__code__) is not None
    hooks = _top_hooks(True)
    return hooks is not None and "_checkpoint_hook." in hooks[0].__qualname__


def are_tensors_hooked() -> bool:
    """Return whether any saved-tensor hooks are active (of a checkpoint, or offloading to the CPU)."""
    return is_checkpointed() if _top_hooks is None else _top_hooks(True) is not None


def refuse_hidden(name: str) -> None:
    """Refuse a layer called without gradient inside an autograd function, as reentrant checkpointing does.

    For rules called with gradients that reach a layer called without them. A model may do that on purpose (a
    frozen backbone under `torch.no_grad`); its layer then gets no credit.

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
    """Return whether some of these parameters require gradients but are used without, and not by reentrant checkpointing."""
    return not torch.is_grad_enabled() and _autograd_function() is None and any(q.requires_grad for q in parameters)


def refuse_checkpointing(name: str) -> None:
    """Refuse a layer that runs inside an activation checkpoint of either kind, for rules that do not support it.

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
    """Return `inputs` without their graph, like `detach`, except that a checkpoint still sees the rest as differentiable."""
    result: Tensor = cast(Any, _Sever).apply(inputs) if is_checkpointed() else inputs.detach()
    return result


def aside() -> saved_tensors_hooks:
    """Return a context in which autograd saves tensors unchanged, whatever hooks (a checkpoint's) are active outside."""
    return saved_tensors_hooks(_itself, _itself)


def _itself(saved: Tensor) -> Tensor:
    return saved


def _caller(code: Any) -> Any:
    """Return the innermost stack frame that runs `code`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame


def _autograd_function() -> str | None:
    """Return the name of the innermost autograd function whose forward runs; in newer PyTorch `apply` leaves no frame."""
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
"""Code objects seen running, kept alive so that their ids stay unique; the autograd function whose forward each is."""


def _runs(kind: Any, code: CodeType) -> bool:
    """Return whether this is the code of the class's forward."""
    return getattr(kind.forward, "__code__", None) is code


def _functions() -> Iterator[type[torch.autograd.Function]]:
    """Yield every subclass of autograd.Function."""
    todo: list[type[torch.autograd.Function]] = [torch.autograd.Function]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        yield kind
