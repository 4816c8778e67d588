"""A rule around a rule: the wrapped rule assigns the credit, and the wrapper changes how it is used.

Two handles are all a wrapper needs besides the calls themselves:

    gain   an identity on a layer's output whose backward pass multiplies the error there, unit by unit
    tap    a stand-in for a parameter during one call, whose backward pass changes this batch's share of `.grad`

State dicts have the keys of the wrapped rule, so either loads the other's.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from apical.core.credit import Batch, Credit, CreditRule, Loss, Measures, Panel, Phase
from apical.core.transport import Geometry, as_matrix, from_matrix
from apical.errors import ConfigError, refuse_second_derivatives

INNER = "rule."


class WrappedRule(CreditRule):
    """Base of the rules around another; by itself the wrapped rule, bit for bit.

    Args:
        rule: the wrapped rule, attached to its model.

    Raises:
        ConfigError: it is no rule, or was detached from its model.

    >>> from apical.rules.backprop import Backprop
    >>> rule = WrappedRule(Backprop(nn.Linear(4, 3)))
    >>> rule(torch.randn(8, 4), torch.arange(8) % 3).backward()
    >>> list(rule.state_dict())
    ['model.weight', 'model.bias']
    """

    def __init__(self, rule: CreditRule) -> None:
        nn.Module.__init__(self)
        name = type(self).__name__
        if not isinstance(rule, CreditRule):
            raise ConfigError(f"{name} wraps a rule, not a {type(rule).__name__}: {name}(FeedbackAlignment(model), ...)")
        from apical.core.wrappers import uncompiles

        rule.require_attached()
        self.rule = rule
        self.feed_forward, self.two_phase, self.chains_errors = rule.feed_forward, rule.two_phase, rule.chains_errors
        self.random_per_sample, self.repeats = rule.random_per_sample, rule.repeats
        self._uncompiles, self._turn = rule._uncompiles or uncompiles(self, rule.model), rule._turn
        self._prefix = _model_prefix(rule)
        self._hooks: list[Any] = []
        self._attached, self._is_fresh = True, False
        self._warned, self._unmoved = True, -1  # the wrapped rule warns
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss":  # a property would not hear of a loss that is a module
            self.rule.loss = value
        else:
            super().__setattr__(name, value)

    def _attach(self) -> None:
        """Put hooks on the model's layers; wrappers that have some do it here, and call it when they are made."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for module in self.model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if hook is _nothing]:
                    del hooks[key]
        if self._attached:
            self._attach()

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The wrapped rule's model."""
        return self.rule.model

    @property
    def loss(self) -> Loss:  # type: ignore[override]
        """The wrapped rule's loss."""
        return self.rule.loss

    @property
    def phase(self) -> Phase:
        """The wrapped rule's phase."""
        return self.rule.phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.rule.phase = phase

    def require_attached(self) -> None:
        """Refuse to work on a model that either rule was detached from."""
        super().require_attached()
        self.rule.require_attached()

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Return the wrapped rule's credit."""
        self.require_attached()
        credit: Credit = self.rule(inputs, targets)
        return credit

    def answer(self, inputs: Tensor) -> Tensor:
        """Return the wrapped rule's answer."""
        return self.rule.answer(inputs)

    def constrain_(self) -> None:
        """Apply the wrapped rule's constraints."""
        self.rule.constrain_()

    def restart(self) -> None:
        """Let the wrapped rule forget the batch."""
        self.rule.restart()

    @property
    def remarks(self) -> list[str]:
        """The wrapped rule's remarks."""
        return self.rule.remarks

    def feedback_weights(self) -> dict[str, Tensor]:
        """Return the wrapped rule's feedback."""
        return self.rule.feedback_weights()

    def feedback_parameters(self) -> list[nn.Parameter]:
        """Return the wrapped rule's feedback parameters."""
        return self.rule.feedback_parameters()

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Return the wrapped rule's paths: a wrapper changes sizes of errors and updates, not where they come from."""
        return self.rule.credit_paths(inputs)

    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        """Return what the wrapped rule measures of itself."""
        return self.rule.measures(probe, test)

    def panels(self, probe: Batch) -> Sequence[Panel]:
        """Return the figures of the wrapped rule."""
        return self.rule.panels(probe)

    def detach(self) -> nn.Module:
        """Detach wrapper and wrapped rule from the model, and return it."""
        super().detach()
        return self.rule.detach()

    def tapped(self, taps: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Credit:
        """Return the wrapped rule's credit, with tensors in place of parameters of the model while it is called.

        Args:
            taps: by the parameter's name in the model.
            inputs: (batch, ...).
            targets: what the loss takes.
        """
        if not taps:
            return WrappedRule.forward(self, inputs, targets)
        self.require_attached()
        named = {f"{self._prefix}{name}": tap for name, tap in taps.items()}
        # each of the layers that share a parameter has its own tap
        credit: Credit = torch.func.functional_call(self.rule, named, (inputs, targets), tie_weights=False)
        return credit


class LayerHook:
    """Hook of a layer that calls `method(rule, name, layer, ...)` as long as there is the rule.

    Copies and pickles do nothing: a copied model has no rule attached.
    """

    def __init__(self, rule: WrappedRule, name: str, method: Callable[..., Any]) -> None:
        self.rule, self.name, self.method = weakref.ref(rule), name, method

    def __call__(self, layer: nn.Module, *args: Any) -> Any:
        """Return what the method returns."""
        rule = self.rule()
        return None if rule is None else self.method(rule, self.name, layer, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_no_hook, ())


def _nothing(*_: Any) -> None:
    """The hook of a copied model."""


def _no_hook() -> Callable[..., None]:
    return _nothing


def innermost(rule: CreditRule) -> CreditRule:
    """Return the rule that is no wrapper."""
    while isinstance(rule, WrappedRule):
        rule = rule.rule
    return rule


def _model_prefix(rule: CreditRule) -> str:
    """Return the prefix that the model's parameters have among the rule's."""
    return INNER + _model_prefix(rule.rule) if isinstance(rule, WrappedRule) else "model."


def _without_prefix(rule: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Take "rule." out of the keys of a state dict, and of its versions."""
    for each in (state, getattr(state, "_metadata", {})):
        for key in [key for key in each if key.startswith(prefix + INNER)]:
            each[prefix + key.removeprefix(prefix + INNER)] = each.pop(key)


def _with_prefix(rule: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put it in again."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + INNER + key.removeprefix(prefix)] = state.pop(key)


class Gain(torch.autograd.Function):
    """Identity whose backward pass multiplies the error by a gain for each unit."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gain: Tensor) -> Tensor:
        """Return `output` itself, (..., n, ...); `gain` is (n,), with a dimension of one for every dimension of space."""
        ctx.save_for_backward(gain)
        ctx.mark_dirty(output)  # not a view: the next module may work in place
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        """Return `gain * delta`."""
        refuse_second_derivatives()
        (gain,) = ctx.saved_tensors
        return delta * gain.to(delta.dtype), None


class RowGain(torch.autograd.Function):
    """A parameter, whose share of `.grad` is multiplied by a gain for each output unit."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, gain: Tensor, shape: Geometry | None) -> Tensor:
        """Return the parameter: a weight of the layout of `shape`, or a bias (n,); `gain` is (n,)."""
        ctx.save_for_backward(gain)
        ctx.geometry = shape
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return each row of the gradient times its gain."""
        refuse_second_derivatives()
        (gain,) = ctx.saved_tensors
        gain = gain.to(gradient.dtype)
        if gradient.dim() == 1:
            return gain * gradient, None, None
        rows = gain.unsqueeze(1) * as_matrix(ctx.geometry, gradient)
        return from_matrix(ctx.geometry, rows, gradient), None, None


def gain_on(output: Tensor, gain: Tensor) -> Tensor:
    """Return `output`, whose error will be multiplied by `gain`."""
    result: Tensor = cast(Any, Gain).apply(output, gain)
    return result


def row_gain(parameter: Tensor, gain: Tensor, shape: Geometry | None) -> Tensor:
    """Return `parameter`, whose gradient's rows will be multiplied by `gain`."""
    result: Tensor = cast(Any, RowGain).apply(parameter, gain, shape)
    return result


Solve = Callable[..., tuple[Tensor, ...]]
"""Gradients of some parameters to what takes their place."""


class SolveTap(torch.autograd.Function):
    """Parameters, whose share of `.grad` is replaced by a function of all of them."""

    @staticmethod
    def forward(ctx: Any, solve: Solve, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the parameters."""
        ctx.solve = solve
        return tuple(parameter.detach() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return `solve` of the gradients; a missing one is zero."""
        refuse_second_derivatives()
        return (None, *ctx.solve(*gradients))


def solve_taps(solve: Solve, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the parameters; the backward pass calls `solve` with their gradients, once."""
    result: tuple[Tensor, ...] = cast(Any, SolveTap).apply(solve, *parameters)
    return result
