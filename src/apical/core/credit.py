"""The interface between a rule and PyTorch: a rule maps a batch to a :class:`Credit`; `credit.backward()` writes `.grad`."""

import copy
import math
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map

from apical.core.roots import KnownGradients, NoCreditBehind, OneRoot
from apical.errors import ApicalError, ConfigError, refuse_transforms, require_choice

if TYPE_CHECKING:
    from apical.core.placement import Placement
    from apical.core.plain_chain import PlainChain
    from apical.core.units import Found

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps (output, targets) to a scalar, the mean over the batch, like `torch.nn.functional.cross_entropy`."""

Root = tuple[Tensor, Tensor | None]
"""Where a backward pass starts (a scalar, a unit's output or a parameter) and its signal; None means 1, for scalars."""

Phase = Literal["both", "forward", "feedback"]
"""What one call of a rule trains."""

Attention = Literal["exact", "fixed", "present"]
"""How much of the backward pass of attention a rule keeps, see :mod:`apical.core.attention`."""

Batch = tuple[Tensor, Tensor]
"""Inputs (batch, ...) and their targets."""


@dataclass(init=False, repr=False, eq=False)  # DistributedDataParallel looks for tensors in the fields of dataclasses
class Credit:
    """The credit that a rule assigns for one batch.

    There are two ways to the same gradients: :meth:`backward`, and `credit.loss.backward()`, which any trainer can call on
    any multiple of the loss or on its sum with other terms.

    Args:
        roots: scalars (losses, energies), unit outputs or parameters from which a backward pass starts.
        signals: the teaching signal of each root, of the root's shape; None means 1 (scalar roots only).
        output: the model's output on the batch; it has a graph if a loss computed from it delivers the rule's update.
        loss: scalar loss of that output.
        logs: scalars to plot, named by the rule.
    """

    loss: Tensor

    def __init__(
        self,
        roots: Sequence[Tensor],
        signals: Sequence[Tensor | None],
        output: Tensor,
        loss: Tensor,
        logs: dict[str, Tensor] | None = None,
    ) -> None:
        self.roots, self.signals, self.logs = roots, signals, {} if logs is None else logs
        self._output, self._loss, self._learns, self._root = output, loss, torch.is_grad_enabled(), cast(Tensor | None, None)

    @classmethod
    def of(cls, roots: Iterable[Root], output: Tensor, loss: Tensor, logs: dict[str, Tensor] | None = None) -> "Credit":
        """Create the credit from roots with their signals."""
        pairs = list(roots)
        return cls([root for root, _ in pairs], [signal for _, signal in pairs], output, loss, logs)

    @property  # type: ignore[no-redef]
    def loss(self) -> Tensor:
        """The loss, which is also the root of the whole update: `(s * credit.loss).backward()` adds `s` times it to `.grad`.

        It has no graph if gradients were disabled when the rule was called, or are disabled now.
        """
        if len(self.roots) == 1 and self.roots[0] is self._loss and self.signals[0] is None:
            return self._loss
        if not (self._learns and torch.is_grad_enabled()):
            return self._loss.detach()
        if self._root is None:
            refuse_transforms("this rule")
            self._root = cast(Tensor, cast(Any, OneRoot).apply(self._loss.detach(), self.signals, *self.roots))
        return self._root

    @property
    def output(self) -> Tensor:
        """The model's output.

        Under backpropagation and the edge rules, a loss made from it delivers the rule's update. Under every other rule a
        backward pass that reaches it raises a :class:`apical.errors.ConfigError`; its values can be used freely.
        """
        parts = [part for part in tree_leaves(self._output) if isinstance(part, Tensor)]
        if any(part.requires_grad for part in parts) or not (self._learns and torch.is_grad_enabled()):
            return self._output
        result: Tensor = tree_map(partial(_without_credit, self.roots), self._output)  # a dictionary stays one
        return result

    @loss.setter  # type: ignore[attr-defined, no-redef, untyped-decorator]
    def loss(self, root: Tensor) -> None:
        """Replace the root by what a trainer sets (such as the loss in another dtype)."""
        self.roots, self.signals, self._loss, self._root = [root], [None], root, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Credit":
        """Return another credit with the same graph, which is never copied; Lightning's Fabric maps the copy's tensors."""
        copied = copy.copy(self)
        copied.roots, copied.signals, copied.logs = [*self.roots], [*self.signals], {**self.logs}
        return copied

    def backward(self, retain_graph: bool | None = None) -> None:
        """Add the negative of the rule's weight change to `.grad`; like `loss.backward()`, but cheaper."""
        if not any(root.requires_grad for root in self.roots):
            raise ConfigError("nothing learns: all parameters are frozen, or the rule was called under torch.no_grad()")
        if len(self.roots) > 1 or self.signals[0] is not None or self._root is not None:
            self._let_go()
        torch.autograd.backward(list(self.roots), list(self.signals), retain_graph)

    def _let_go(self) -> None:
        """One root for all parameters; nothing else then holds their gradients, so `.grad` needs no copy."""
        if self._root is not None and self._root._backward_hooks:  # of somebody who waits for the loss, as fully_shard does
            self.roots, self.signals = [self._root], [None]
        pairs = list(zip(self.roots, self.signals, strict=True))
        known = [(root, signal) for root, signal in pairs if signal is not None and root.is_leaf and root.requires_grad]
        if known:
            with torch.enable_grad():
                zero = cast(Any, KnownGradients).apply([signal for _, signal in known], *(root for root, _ in known))
            others = [(root, signal) for root, signal in pairs if signal is None or not root.is_leaf]
            self.roots, self.signals = [*(root for root, _ in others), zero], [*(signal for _, signal in others), None]


def _without_credit(roots: Sequence[Tensor], part: Any) -> Any:
    if not isinstance(part, Tensor) or not part.is_floating_point():
        return part
    return cast(Any, NoCreditBehind).apply(part, torch.empty(0, requires_grad=True), *roots)


def _flattened(credit: Credit) -> tuple[list[Tensor], tuple[str, ...]]:
    return [credit.loss, credit._output, *credit.logs.values()], tuple(credit.logs)


def _unflattened(tensors: Sequence[Tensor], names: tuple[str, ...]) -> Credit:
    loss, output, *logs = tensors
    return Credit([loss], [None], output, loss, dict(zip(names, logs, strict=True)))


register_pytree_node(Credit, _flattened, cast(Any, _unflattened), serialized_type_name="apical.Credit")


@dataclass(frozen=True)
class Measures:
    """What a rule measures about itself, see :meth:`CreditRule.measures`; metrics.jsonl uses these names.

    Attributes:
        network: numbers for the whole network.
        layers: numbers for each layer, as in `{"0": {"sparseness": 0.9}}`.
        depths: test accuracy (0 to 1) of the classes read out at each layer (:func:`depth_accuracies`).
    """

    network: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    depths: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """A figure of one network after training, see :meth:`CreditRule.panels`; the report shows that of the first seed.

    Attributes:
        title: title of the figure.
        kind: "raster" (values (steps, n), 0 or 1: one panel each), "bars" (values (categories,) side by side) or "histogram"
            (values (n,), with non-finite ones counted separately).
        x, y: labels of the axes.
        values, categories: values by name; categories of the bars.
    """

    title: str
    kind: Literal["raster", "bars", "histogram"]
    x: str
    y: str
    values: Mapping[str, Tensor]
    categories: Sequence[str] = ()


def depth_accuracies(read_outs: Callable[[Tensor], Mapping[str, Tensor]], test: Iterable[Batch]) -> dict[str, float]:
    """Return the accuracy (0 to 1) at each layer; empty if targets are numbers, or not one class per sample.

    `read_outs` maps the inputs of a batch to classes (batch,) by layer.
    """
    hits, samples = Counter[str](), 0
    for inputs, targets in test:
        if not targets.is_floating_point() and targets.dim() == 1:
            hits.update({name: int((classes == targets).sum()) for name, classes in read_outs(inputs).items()})
        samples += len(targets)
    return {name: count / samples for name, count in hits.items()}


class CreditRule(nn.Module):
    """A credit-assignment rule: holds the model and the rule's own feedback parameters.

    Calling a rule on a batch returns a :class:`Credit`. What a rule installs on the model is active only during that
    call, so `rule.model(x)` is always the plain model, and :meth:`detach` restores the model.

    Args:
        model: any `nn.Module` the rule supports; it is trained in place.
        loss: maps (output, targets) to a scalar batch mean.

    Attributes:
        feed_forward: the network's answer is the model's feed-forward pass; otherwise the rule has its own :meth:`answer`.
        output_alone: the rule asks the loss for its derivative with respect to the output, and would leave out terms that
            read other activities of the model; such losses are refused at the first batch.
        chains_errors: whether the error travels from layer to layer through the model's graph, whose only root is the loss.
        sees_layers: compiled parts of the model run as they were written while the rule learns.
        random_per_sample: each sample has its own random numbers: repeating a batch, or splitting it, is another draw.
        repeats: calls that a training loop makes for each batch, each before a step of the optimiser.
        two_phase: the rule can learn its feedback weights in separate passes, when `phase` says so.
        phase: what the next calls of a `two_phase` rule learn. With "both" one call gives the gradients of forward and
            feedback weights; with "forward" or "feedback" only those, and the graphs of the credit's `output` and `loss` may
            not lead to the others (multi-process training waits for every gradient in the graph).
    """

    model: nn.Module
    two_phase: bool = False
    feed_forward: bool = True
    output_alone: bool = False
    chains_errors: bool = False
    sees_layers: bool = True
    random_per_sample: bool = False
    repeats: int = 1
    phase: Phase
    _attention: Attention = "exact"
    _uncompiles: bool = False  # a model that is compiled
    _turn: AbstractContextManager[Any] = nullcontext()  # threads take turns
    _has_attended: bool = False  # and hand-written attention was looked for
    _placement: "Placement | None" = None
    _kinds: Sequence[tuple[Any, bool]] = ()  # losses already checked, and whether targets were numbers
    _loss_options: Mapping[str, str] = {}  # what a loss must not do, and which rule would omit it from the update
    _held: Any = None  # state of a batch between its calls
    _found: "Found | None" = None  # layers, where the rule does not see at once that others were put there
    _unmoved: int = 0  # checks in which the model's weights had moved but the rule's own had not; below 0 checks have ended
    _looks: Sequence[Any] = (0,)  # how many there were, and what they saw
    _by_hand: "PlainChain | None" = None  # a model whose batches are computed by hand
    _made_for: tuple[nn.Module, ...] = ()  # the model, in a tuple so that it is not a submodule

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        from apical.core.wrappers import refuse_wrapped, turn, uncompiles

        refuse_wrapped(model)
        self.model, self.loss, self._uncompiles, self._turn = model, loss, uncompiles(self, model), turn(model)
        self._hooks: list[Any] = []
        self._attached, self._warned, self._is_fresh, self.phase = True, False, True, "both"
        self._made_for = (getattr(model, "_orig_mod", model),)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model" and self.__dict__.get("_attached") and getattr(value, "_orig_mod", value) is not self.model:
            raise ConfigError(f"this {type(self).__name__} was made for its model alone; make a new rule for another one")
        super().__setattr__(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Credit:
        """Return the credit for one batch, see :meth:`forward`; warn once of a non-finite loss, if checking is free."""
        if torch.compiler.is_compiling():
            from apical.core.wrappers import COMPILES, outside_graphs

            follows = COMPILES or not torch.compiler.is_dynamo_compiling()  # an export may run the code as is
            return (CreditRule._plainly if follows else outside_graphs)(self, *args, **kwargs)
        if self._by_hand and len(args) == 2 and not kwargs and (quick := self._by_hand.credit(self, *args)) is not None:
            return quick
        if parametrize._cache_enabled:
            from apical.core.wrappers import uncached

            with self._turn, uncached():
                return self._plainly(*args, **kwargs)
        with self._turn:
            return self._plainly(*args, **kwargs)

    def _plainly(self, *args: Any, **kwargs: Any) -> Credit:
        if self._uncompiles or ((self._is_fresh or self.model._compiled_call_impl) and not torch.compiler.is_compiling()):
            from apical.core.wrappers import uncompiled  # for a model that is already compiled

            with uncompiled(self.model, self):
                return self._attended(*args, **kwargs)
        return self._attended(*args, **kwargs)

    def _attended(self, *args: Any, **kwargs: Any) -> Credit:
        if self.attention == "exact":
            return self._credited(*args, **kwargs)
        from apical.core.attention import attended  # rarely needed

        return attended(self, args, kwargs)

    @property
    def attention(self) -> Attention:
        """How much of the backward pass of attention is kept, if the rule has this option; :mod:`apical.core.attention`."""
        return self._attention

    @attention.setter
    def attention(self, attention: Attention) -> None:
        require_choice("attention", attention, get_args(Attention))
        self._attention, self._has_attended = attention, False

    def _credited(self, *args: Any, **kwargs: Any) -> Credit:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            if self._is_fresh and torch.is_grad_enabled() and (self.output_alone or self._loss_options):
                from apical.core.loss_options import require_known

                require_known(self.loss)
            return cast(Credit, super().__call__(*args, **kwargs))
        if kwargs.keys() <= {"inputs", "targets"}:
            args, kwargs = (*args, *(kwargs[name] for name in ("inputs", "targets") if name in kwargs)), {}
        if self.output_alone and args and getattr(args[0], "dtype", None) in (torch.bfloat16, torch.float16):
            from apical.core.batch import widened

            args = (widened(args[0], self.model), *args[1:])
        numbers = len(args) == 2 and isinstance(args[1], Tensor) and args[1].is_floating_point()
        first = torch.is_grad_enabled() and not any(a is self.loss and b is numbers for a, b in self._kinds)
        if first or self._unmoved >= 0 or forward_ad._current_level >= 0:
            from apical.core.diagnosis import look_before

            look_before(self, args, first)
        try:
            credit: Credit = super().__call__(*args, **kwargs)
            loss = getattr(credit, "_loss", None)
            if hasattr(credit, "_loss") and not (isinstance(loss, Tensor) and not loss.dim()):
                raise TypeError("the loss is no scalar tensor")
            if type(output := getattr(credit, "_output", None)) is Tensor and output.dim() == 1 and len(args) == 2:
                from apical.core.diagnosis import require_rows

                require_rows(self.loss, output, args[1])
        except (ApicalError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError, ValueError) as error:
            from apical.core.diagnosis import explained

            reason = explained(self, error, *args) if len(args) == 2 else None
            if reason is None:
                raise
            raise reason from error
        if torch.is_grad_enabled() and (self._unmoved >= 3 or (args and getattr(args[0], "requires_grad", False))):
            from apical.core.diagnosis import look_after

            look_after(self, args, credit)
        if first and self._loss_options and len(args) == 2:
            from apical.core.loss_options import require_plain

            require_plain(self, credit._output, args[1])
        self._is_fresh = self._is_fresh and not first
        self._kinds = (*self._kinds[-8:], (self.loss, numbers)) if first else self._kinds
        if not self._warned and type(loss) is Tensor and loss.is_cpu:
            given = () if self.feed_forward else args[:1]  # bounded states hide non-finite inputs
            odd = (isinstance(value, Tensor) and not bool(value.isfinite().all()) for value in given)
            if not math.isfinite(loss.item()) or any(odd):
                from apical.core.diagnosis import why_not_finite

                self._warned = True
                warnings.warn(why_not_finite(args), RuntimeWarning, stacklevel=2)
        return credit

    @abstractmethod
    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Return the credit for a batch: `inputs` (batch, ...), `targets` (batch,) class indices or what the loss takes."""

    def answer(self, inputs: Tensor) -> Tensor:
        """Return the answer to inputs (batch, ...), differentiable; the feed-forward pass unless the rule settles."""
        return cast(Tensor, self.model(inputs))

    def constrain_(self) -> None:
        """Project parameters back into the range that the rule requires, if any; call this after `optimizer.step()`."""

    def restart(self) -> None:
        """Discard what is stored about a batch between its calls, if :attr:`repeats` is more than one."""
        self._held = None

    def accumulate(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Add the gradients of all calls of one batch to `.grad`, with the weights held fixed; return the last credit."""
        self.restart()
        for _ in range(self.repeats):
            credit: Credit = self(inputs, targets)
            credit.backward()
        return credit

    @property
    def remarks(self) -> list[str]:
        """Describe in sentences how what is trained differs from the model's modules; empty if it does not."""
        if self.attention == "exact":
            return []
        what = "A is a constant" if self.attention == "fixed" else "errors stay at their own position"
        return [f"the backward pass of attention is not the exact one: {what} (attention={self.attention!r})"]

    def feedback_weights(self) -> dict[str, Tensor]:
        """Return the effective feedback weight of each layer, in the shape of its weight; empty if the rule has none."""
        return {}

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Return what each weighted layer's error passes through, in the terms of :class:`apical.core.placement.Row`."""
        from apical.core.placement import layer_paths

        return layer_paths(self.model, inputs, "signal of its own")

    def placement(self, inputs: Tensor) -> "Placement":
        """Return a table of every module with parameters and what its error passes through, for inputs (batch, ...).

        The model runs, but weights, buffers, gradients and random generators are left unchanged. Afterwards, `repr(rule)`
        includes a summary.
        """
        from apical.core.placement import place, require_whole
        from apical.core.rest import undisturbed

        self.require_attached()
        require_whole(self.model)
        with undisturbed(self):
            placement = place(self.model, self.credit_paths(inputs))
        self._placement = placement
        return placement

    def extra_repr(self) -> str:
        """Return a summary of the placement, once it is known."""
        return "" if self._placement is None else f"placement: {self._placement.summary()}"

    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        """Return quantities to record after each epoch; by default what the model's method
        `measures(inputs, targets)` returns as numbers by layer, if it has one.

        The rule is in training mode; its gradients, buffers and random state are restored afterwards.

        Args:
            probe: the training samples on which alignment is measured, always the same (`--probe N`; 0 measures nothing).
            test: the test set.
        """
        own = getattr(self.model, "measures", None)
        return Measures(layers=own(*probe)) if callable(own) else Measures()

    def panels(self, probe: Batch) -> Sequence[Panel]:
        """Return figures of the trained network; by default of the model's `panels(inputs, targets)`, if it has one."""
        own = getattr(self.model, "panels", None)
        return own(*probe) if callable(own) else ()

    def feedback_parameters(self) -> list[nn.Parameter]:
        """Return trainable feedback weights, which an optimiser may treat separately from forward weights; empty if none."""
        return []

    @property
    def learns_apart(self) -> bool:
        """Whether there are feedback weights that can learn in separate passes."""
        return self.two_phase and any(parameter.requires_grad for parameter in self.feedback_parameters())

    def require_attached(self) -> None:
        """Refuse to work on a model that the rule was detached from, or whose layers were replaced.

        Raises:
            ConfigError: :meth:`detach` was called, or this is a copy with another model.
        """
        if not self._attached:
            raise ConfigError(f"this {type(self).__name__} was detached from its model; make a new rule")
        if self._made_for and getattr(self.model, "_orig_mod", self.model) is not self._made_for[0]:
            raise ConfigError(
                "this copy of a rule has another model than the one the rule was made for, but would still use that "
                "one's layers (higher and nn.DataParallel make such copies); use copy.deepcopy(rule)"
            )
        if self._found is not None:
            self._found.require_intact(type(self).__name__)

    def detach(self) -> nn.Module:
        """Remove everything from the model and return it, with the same class, state-dict keys and outputs as before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._attached, self._by_hand = False, None
        return self.model
