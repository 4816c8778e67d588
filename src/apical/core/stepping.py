"""Steps of optimisers, as a rule sees them: it is told before and after each step of any `torch.optim.Optimizer`.

The user makes the optimiser and never hands it over, so one pair of torch's global hooks serves all rules of the process.
"""

import math
import sys
import threading
from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Any, Protocol, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as hooks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Group = dict[str, Any]
"""One of an optimiser's `param_groups`."""

Signature = list[tuple[Group, list[Tensor]]]


class Observer(Protocol):
    """What is told of steps."""

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether the optimiser holds any parameter of interest; asked at every step of every optimiser."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Gradients are there and nothing has moved; may raise."""

    def after_step(self, optimizer: Optimizer) -> None:
        """The step is done."""


_observers: WeakSet[Observer] = WeakSet()
_handles: list[Any] = []
_lock = threading.Lock()
_compiles = [False]


def observe(observer: Observer) -> None:
    """Tell `observer` of all steps from now on; it is not kept alive."""
    with _lock:
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before))
            _handles.append(register_optimizer_step_post_hook(_after))
        _observers.add(observer)


def ignore(observer: Observer) -> None:
    """Tell it no more, and leave nothing in torch when it was the last one."""
    with _lock:
        _observers.discard(observer)
        if not _observers:
            while _handles:
                _handles.pop().remove()


def _concerned(optimizer: Optimizer) -> list[Observer]:
    with _lock:  # another thread may make a rule
        observers = list(_observers)
    return [observer for observer in observers if observer.concerns(optimizer)]


def _outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that a compiled step calls uncompiled, with all that it calls."""
    disabled: list[Callable[..., Any]] = []

    def outside(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # which takes seconds to import
            return hook(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(hook))
        _compiles[0] = torch.compiler.is_compiling()  # of this frame
        return disabled[0](*args)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]  # what the compiler looks for
    return outside


@_outside_graphs
def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    observers = _concerned(optimizer)
    if not observers:
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        for observer in observers:
            observer.before_step(optimizer)
        return None
    wrapped = _told_after(closure, optimizer, observers)
    return (args[0], *([wrapped, *args[2:]] if len(args) > 1 else ())), (
        kwargs if len(args) > 1 else {**kwargs, "closure": wrapped}
    )


def _told_after(closure: Callable[[], Any], optimizer: Optimizer, observers: list[Observer]) -> Callable[[], Any]:
    """Return the user's closure, after whose first call gradients are there."""
    told = False

    def wrapped() -> Any:
        nonlocal told
        loss = closure()
        if not told:
            told = True
            for observer in observers:
                observer.before_step(optimizer)
        return loss

    return wrapped


@_outside_graphs
def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for observer in _concerned(optimizer):
        observer.after_step(optimizer)


def signature(optimizer: Optimizer) -> Signature:
    """Return the optimiser's groups and their parameters, to see whether any were added, removed or replaced."""
    return [(group, [*group["params"]]) for group in optimizer.param_groups]


def unchanged(optimizer: Optimizer, before: Signature) -> bool:
    """Return whether the optimiser still has the groups and the parameters of `before`."""
    groups = optimizer.param_groups
    return len(groups) == len(before) and all(
        group is old and len(group["params"]) == len(held) and all(map(is_, group["params"], held))
        for group, (old, held) in zip(groups, before, strict=True)
    )


def is_hooked(optimizer: Optimizer) -> bool:
    """Return whether hooks of others run within its step, which may change gradients or weights unseen."""
    everywhere = len(hooks._global_optimizer_pre_hooks) + len(hooks._global_optimizer_post_hooks) > len(_handles)
    return everywhere or bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def is_compiled() -> bool:
    """Return whether the step under way is one that `torch.compile` runs, which reads every parameter as it likes."""
    return _compiles[0]


def skipped(optimizer: Optimizer) -> bool:
    """Return whether a `GradScaler` found infinities and a fused step left everything as it was."""
    infinities: Tensor | None = getattr(optimizer, "found_inf", None)
    return infinities is not None and bool(infinities.sum() > 0)


def distributed() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Arrival:
    """Hook of a weight: records which gradient has arrived, so that a change before the step is noticed.

    In-place changes show in the version; those through `.data` in a product of the values, taken when `sampled`; and those
    of the weight in some of its values, where many gradients arrive without a step of an optimiser.

    Attributes:
        fresh: set at every arrival; the observer of steps clears it.
        watched: the weight's own gradient is distinguished from others since the last step (:func:`noted`).
        foreign: others have arrived.
        is_wary: the weight has moved otherwise than by steps, so that its values are sampled at every arrival.
        waits: a forward pass may have been made in closed form, and R is explicit by now.
        lost: a gradient has arrived since, and none for R.
        arrived: how many since the last step of an optimiser.
        moves: arrivals that found the weight moved; :meth:`stepped` clears it.
    """

    def __init__(self) -> None:
        self.mark: tuple[int, int] | None = None
        self.sampled = True
        self.fresh = self.is_wary = False
        self.moves, self.arrived, self._version = 0, 0, -1
        self._weight: Tensor | None = None
        self.watched = self.foreign = self._unknown = self.waits = self.lost = False
        self._own: Tensor | None = None
        self._restarts = False
        self._sample: Tensor | None = None

    def __call__(self, weight: Tensor) -> None:
        """Note a gradient; autograd calls this once that of a backward pass has been added."""
        self.fresh, self.lost = True, self.lost or self.waits
        self.arrived += 1
        if weight._version != self._version or not self.rests(weight):
            self.moves, self._version = self.moves + 1, weight._version
        self._weight = strided(weight).clone() if self.sampled or self.is_wary or self.arrived > 3 else None
        if self.watched:
            self._compare(weight)
        else:
            self._unknown = True
        self._note(weight)
        if distributed():  # the average over processes is made at the very end of the backward pass
            later = torch.autograd.Variable._execution_engine.queue_callback
            later(partial(later, partial(self._note, weight)))

    def stepped(self) -> None:
        """Note that an optimiser takes a step."""
        self.moves, self.arrived, self._weight = 0, 0, None
        self.watched = self.foreign = self._unknown = self.waits = self.lost = False

    def rests(self, weight: Tensor) -> bool:
        """Return whether a weight is where the last gradient found it, as far as that is known."""
        return self._weight is None or torch.equal(self._weight, strided(weight))

    def watch(self) -> None:
        """Expect every gradient of the rule to be announced from here on; one that has arrived before is another's."""
        if not self.watched:
            self.watched, self.foreign = True, self._unknown

    def expect(self, weight: Tensor, gradient: Tensor) -> None:
        """The rule's own gradient is about to be added to the weight's."""
        if self._own is None:
            self._restarts = weight.grad is None or not bool(weight.grad.any())
            self._own = _spread(gradient).clone() if weight.grad is None else _spread(gradient) + _spread(weight.grad)
        else:
            self._own = self._own + _spread(gradient)

    def _compare(self, weight: Tensor) -> None:
        own, self._own, now = self._own, None, weight.grad
        if own is None or now is None or now.is_sparse:
            self.foreign = True
            return
        difference = (_spread(now) - own).norm()
        astray = bool(difference > 1e4 * torch.finfo(own.dtype).eps * own.norm())
        self.foreign = astray or (self.foreign and not self._restarts)

    def _note(self, weight: Tensor) -> None:
        gradient = weight.grad
        if gradient is None or gradient.is_sparse:
            self.mark = None
            return
        self.mark = (gradient.data_ptr(), gradient._version)
        self._sample = _product(gradient) if self.sampled and gradient.device.type == "cpu" else None

    def untouched(self, gradient: Tensor) -> bool:
        """Return whether `gradient` is the one that arrived, up to a power of two by which a `GradScaler` divides."""
        if self.mark != (gradient.data_ptr(), gradient._version):
            return not (self.fresh or bool(gradient.any()))  # zeros are its own unless they replace what has arrived
        if self._sample is None:
            return True
        now, then = _product(gradient), self._sample
        if torch.equal(now, then) or not bool(now.isfinite().all()):
            return True
        place = int(then.abs().argmax())
        ratio = float(now[place] / then[place])
        return ratio > 0 and ratio.hex().startswith("0x1.0000000000000p") and torch.equal(then * ratio, now)


class Noted(torch.autograd.Function):
    """Return the weight itself; its backward tells an :class:`Arrival` what it passes on."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, arrival: Arrival) -> Tensor:
        """Return `weight`."""
        ctx.weight, ctx.arrival = weight, arrival
        return weight.detach()  # not a view: a hook of the user's may still change it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient itself."""
        ctx.arrival.expect(ctx.weight, gradient)
        return gradient, None


def noted(weight: Tensor, arrival: Arrival) -> Tensor:
    """Return `weight`; `arrival` can tell its gradient from here on from others."""
    arrival.watch()
    result: Tensor = cast(Any, Noted).apply(weight, arrival)
    return result


def _spread(tensor: Tensor) -> Tensor:
    """Return about 64 elements in the order of the indices, whatever the layout in memory."""
    flat = _own_part(tensor.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // 64)]


def _product(tensor: Tensor) -> Tensor:
    """Return the fingerprint of this process's part of a tensor; counters of multiply-adds do not see it."""
    own = _own_part(tensor.detach())
    rows = own.flatten(1) if own.dim() > 1 else own.reshape(1, -1)
    return (rows * direction(own)).sum(1)


def _own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that `fully_shard` has parted."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def strided(tensor: Tensor) -> Tensor:
    """Return about 64 elements of a dense tensor, as a view of it."""
    flat = _own_part(tensor.detach())
    if not flat.is_contiguous():
        flat = flat.permute(sorted(range(flat.dim()), key=flat.stride, reverse=True))
    flat = flat.reshape(-1)
    return flat[:: max(1, flat.numel() // 64)]


def direction(tensor: Tensor) -> Tensor:
    """Return the fixed vector of :func:`fingerprint`, for tensors of this shape."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    columns = math.prod(tensor.shape[1:]) if tensor.dim() > 1 else tensor.numel()
    return torch.arange(1, columns + 1, dtype=dtype, device=tensor.device).sin_()


def fingerprint(tensor: Tensor, direction: Tensor) -> Tensor:
    """Return each row's product with a fixed vector, which tells a change of any value or a swap of some."""
    rows = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach().reshape(1, -1)
    return rows.to(direction.dtype) @ direction
