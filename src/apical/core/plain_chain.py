"""A plain chain by hand: both passes of dense layers and activations as one node of autograd's graph.

In small layers the nodes that autograd makes, and what a rule does at each layer's call, take longer than the products. A
model that is an `nn.Sequential` of `nn.Linear` and activations, without changes or hooks, is run here
by the same products in the same order: outputs and gradients have the same bits as on the general path, which takes all
else, and the first batches of these models too.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from apical.core.checkpointing import SEES_HOOKS, are_tensors_hooked
from apical.core.credit import Credit, CreditRule
from apical.core.layers import has_global_hook
from apical.core.losses import require_dependence
from apical.core.stepping import distributed
from apical.errors import refuse_second_derivatives

Sender: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`sender(delta, error)`: the error at a layer's input (batch, n_in), given that at its output and at the model's."""

_ATEN = torch.ops.aten

PULLED_BACK: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.ReLU: lambda signal, r: _ATEN.threshold_backward(signal, r, 0),
    nn.Tanh: _ATEN.tanh_backward,
    nn.Sigmoid: _ATEN.sigmoid_backward,
}
"""Activations whose derivative autograd takes from their output r: `phi'(v) * signal`."""

_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward  # type: ignore[attr-defined]
    for kind in (nn.Sequential, nn.Flatten, nn.Linear, *PULLED_BACK)
}


def _functions() -> tuple[object, ...]:
    """Return the modules' forward methods and module calls, which other code may have replaced."""
    return F.linear, F.relu, torch.tanh, torch.sigmoid, nn.Module.__call__


_FUNCTIONS = _functions()
_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
"""Whether the backward pass under way leaves its graph for another; the oldest versions of PyTorch do not tell."""

WAYS = frozenset(
    ("forward", "run", "signal", "feedback_of", "feedback_weight", "send", "pathway", "call_layer", "prepare", "substitutes")
)
"""Methods of rules that other code may replace, on an object or on its class."""


class Stage(NamedTuple):
    """A layer and the activation after it; the last layer has none."""

    name: str
    layer: nn.Linear
    activation: nn.Module | None = None
    activation_name: str = ""


class ByHand(torch.autograd.Function):
    """The chain's output; its backward pass makes every gradient, with the errors that the senders lead down."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stages: Sequence[Stage], senders: Sequence[Sender], watched: bool, *parameters: Tensor | None
    ) -> Tensor:
        """Return the output (batch, n_out) for x (batch, n_in); see :meth:`PlainChain.run`."""
        ctx.stages, ctx.senders = stages, senders
        read = [x, *parameters[2::2]] if watched else [x]  # by autograd: the rest it does not need, or we alone hold it
        ctx.versions = [(tensor, cast(Tensor, tensor)._version) for tensor in read]
        ctx.inputs, h = [], x
        for k, stage in enumerate(stages):
            ctx.inputs.append(h)
            h = F.linear(h, cast(Tensor, parameters[2 * k]), parameters[2 * k + 1])
            if stage.activation is not None:
                h = stage.activation.forward(h)
        return h

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the parameters that are asked for; layers' inputs are freed on the way down."""
        refuse_second_derivatives()
        inputs, needed, keeps = ctx.inputs, ctx.needs_input_grad[4:], _keeps_graph()
        if not inputs:
            raise RuntimeError(
                "Trying to backward through the graph a second time; pass retain_graph=True to the first backward pass"
            )
        for tensor, version in ctx.versions:
            if tensor._version != version:
                raise RuntimeError("a tensor that the backward pass needs was modified in place after the forward pass")
        if not keeps:
            ctx.inputs, ctx.versions = [], []
        lowest = next(place for place, is_needed in enumerate(needed) if is_needed) // 2
        gradients: list[Tensor | None] = [None] * len(needed)
        delta = error
        for k in range(len(inputs) - 1, lowest - 1, -1):
            h = inputs[k] if keeps else inputs.pop()
            if needed[2 * k]:
                gradients[2 * k] = delta.t().mm(h)
            if needed[2 * k + 1]:
                gradients[2 * k + 1] = delta.sum(0)
            if k > lowest:
                delta = PULLED_BACK[type(ctx.stages[k - 1].activation)](ctx.senders[k - 1](delta, error), h)
        return (None, None, None, None, *gradients)


class PlainChain:
    """A model of dense layers, and whether it is still what it was when it was looked at.

    A copied or unpickled rule has none, and inspects its own model.

    Args:
        rule: its model is of any kind; `nn.Flatten` may come first in a plain one, and layers in further `nn.Sequential`s.
        hooks: keys of hooks on its modules that have nothing to do in a pass by hand.
        wrappers: what stands in place of modules' forward methods, and has nothing to do then either.

    Attributes:
        stages: layers in order; none where the model is no plain chain, or the rule not one of this package.
        loss, numbers: of the batch that the general path took last, and whether its targets were numbers.
    """

    loss: Any = None
    numbers = False

    def __init__(
        self, rule: CreditRule, hooks: Collection[int] = (), wrappers: Mapping[nn.Module, Any] | None = None
    ) -> None:
        model = rule.model
        self._ways = _ways(rule)
        named = list(model.named_modules(remove_duplicate=False))
        self._modules = [(m, m.__dict__, type(m), (wrappers or {}).get(m)) for _, m in named]
        self._hooks = frozenset(hooks)
        self._children = [(m._modules, [*m.children()]) for _, m in named if type(m) is nn.Sequential]
        self._flatten: nn.Flatten | None = None
        self.stages: list[Stage] = []
        if _is_ours(rule) and type(model) is nn.Sequential and all(type(m) in _FORWARDS for _, m in named):
            self.stages = self._read([(name, m) for name, m in named if type(m) is not nn.Sequential])
        layers = [stage.layer for stage in self.stages]
        self._own = [(layer._parameters, layer.weight.shape, layer.weight.shape[:1]) for layer in layers]
        self._is_narrow = any(1 in layer.weight.shape for layer in layers)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _none, ()

    def _read(self, named: list[tuple[str, nn.Module]]) -> list[Stage]:
        """Return the stages of modules in order; none if the modules run in another order."""
        if named and isinstance(named[0][1], nn.Flatten):
            self._flatten = cast(nn.Flatten, named.pop(0)[1])
        stages: list[Stage] = []
        for place, (name, module) in enumerate(named):
            if isinstance(module, nn.Linear) and (not stages or stages[-1].activation is not None):
                stages.append(Stage(name, module))
            elif type(module) in PULLED_BACK and stages and stages[-1].activation is None and place + 1 < len(named):
                stages[-1] = Stage(*stages[-1][:2], module, name)
            else:
                return []
        return stages

    def _is_intact(self) -> bool:
        """Return whether modules, their classes and forward methods are unchanged and have no other hooks."""
        for module, own, kind, forward in self._modules:
            if own["_backward_hooks"] or own["_backward_pre_hooks"] or own.get("forward") is not forward:
                return False
            if type(module) is not kind or kind.forward is not _FORWARDS[kind] or own.get("_compiled_call_impl") is not None:
                return False
            for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
                if hooks and not hooks.keys() <= self._hooks:
                    return False
        if has_global_hook() or _functions() != _FUNCTIONS:
            return False
        return all([*now.values()] == then for now, then in self._children)

    def _takes(self, inputs: object) -> bool:
        """Return whether the input is one real tensor (batch, ...) for the first layer."""
        if type(inputs) is not Tensor or inputs.requires_grad or inputs.is_nested or inputs.layout is not torch.strided:
            return False
        axes, flatten = inputs.dim(), self._flatten
        if axes < 2 or (flatten is None and axes > 2) or not inputs.numel() or inputs.is_inference():
            return False
        if self._is_narrow and len(inputs) == 1:  # of single numbers autograd cannot tell rows from columns: other roundings
            return False
        return flatten is None or (flatten.start_dim == 1 and flatten.end_dim == -1)

    def parameters(self, rule: CreditRule, inputs: object) -> list[Parameter | None] | None:
        """Return weight and bias of each layer in turn if the rule can process these inputs by hand now; else None."""
        if not (SEES_HOOKS and self.stages and torch.is_grad_enabled() and self._takes(inputs) and self._is_intact()):
            return None
        if not WAYS.isdisjoint(rule.__dict__) or _ways(rule) != self._ways:
            return None
        if torch._C._len_torch_function_stack() or torch._C._get_tracing_state() or are_tensors_hooked() or distributed():
            return None
        if torch.is_autocast_enabled(cast(Tensor, inputs).device.type) or forward_ad._current_level >= 0:
            return None
        parameters: list[Parameter | None] = []
        for own, shape, width in self._own:
            weight, bias = own.get("weight"), own.get("bias")
            if type(weight) is not Parameter or not weight.requires_grad or weight.shape != shape:
                return None
            if bias is not None and (type(bias) is not Parameter or not bias.requires_grad or bias.shape != width):
                return None
            parameters += (weight, bias)
        weights = {id(weight) for weight in parameters[::2]}
        return parameters if len(weights) == len(self._own) else None

    def run(self, inputs: Tensor, parameters: list[Parameter | None], senders: Sequence[Sender], watched: bool) -> Tensor:
        """Return the model's output (batch, n_out).

        Args:
            inputs: (batch, ...).
            parameters: see :meth:`parameters`.
            senders: of all layers but the first, in order.
            watched: refuse weights that were moved before the backward pass, as autograd does where the error passes them.
        """
        x = inputs if inputs.dim() == 2 else inputs.flatten(1)
        return cast(Tensor, cast(Any, ByHand).apply(x, self.stages, senders, watched, *parameters))

    def note(self, rule: CreditRule, targets: object) -> bool:
        """Return whether the rule may process batches with such targets by hand: the general path has seen them before."""
        self.loss, self.numbers = rule.loss, isinstance(targets, Tensor) and targets.is_floating_point()
        met = any(loss is self.loss and numbers is self.numbers for loss, numbers in rule._kinds)
        return bool(self.stages) and met and rule._unmoved < 0

    def credit(self, rule: Any, inputs: object, targets: object) -> Credit | None:
        """Return a rule's credit for one batch in a pass by hand, whatever is looked at on the general path; else None.

        The rule's `senders_by_hand(inputs)` says how errors go down in this batch, or None for the general path. Where the
        loss raises an error or is not finite, that path meets it once more, and says why.
        """
        own = rule.__dict__
        if type(targets) is not Tensor or rule.loss is not self.loss or targets.is_floating_point() is not self.numbers:
            return None
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
        if rule._attention != "exact" or own.get("_compiled_call_impl") is not None:
            return None
        parameters = None if torch._C._are_functorch_transforms_active() else self.parameters(rule, inputs)
        senders = None if parameters is None else rule.senders_by_hand(inputs)
        if parameters is None or senders is None:
            return None
        try:
            output = self.run(cast(Tensor, inputs), parameters, senders, rule.chains_errors)
            loss = rule.loss(output, targets)
            if type(loss) is not Tensor or loss.dim() or (loss.is_cpu and not math.isfinite(loss.item())):
                return None
        except (TypeError, AttributeError, LookupError, RuntimeError, AssertionError, ValueError):
            return None
        if rule.chains_errors:
            return Credit([loss], [None], output, loss)
        require_dependence(loss, output)
        return Credit([loss], [None], output.detach(), loss)


def _ways(rule: CreditRule) -> list[object]:
    """Return the methods of its class, as they are now."""
    kind = type(rule)
    return [getattr(kind, way, None) for way in WAYS]


def _is_ours(rule: CreditRule) -> bool:
    """Return whether class and methods are this package's: a pass by hand knows nothing of what may replace them."""
    owners = [kind.__module__ for kind in type(rule).__mro__]
    # where a function was written: `functools.wraps` copies the name of its module
    owners += [getattr(way, "__globals__", {}).get("__name__", "") for way in _ways(rule) if way is not None]
    return all(owner.startswith(("apical.", "torch.", "builtins")) for owner in owners)


def _none() -> None:
    """Return what a copy of a chain is."""
