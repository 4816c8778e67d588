"""Layers whose calls go through the active rule: one wrapper per layer, however many rules are attached to it."""

import weakref
from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn

from apical.errors import ConfigError


class Wrapped:
    """Replaces a layer's forward method, and passes its calls to the active rule, if any.

    Copies and pickles contain the layer's own forward method: a copied model has no rule attached.

    Attributes:
        before: the instance's previous forward attribute, or None.
        forward: what a call without a rule runs; see :meth:`own`.
        function: the forward method of the layer's class at that time.
        rule: the active rule: its `call_layer(site, *args, **kwargs)` takes the calls.
        site: what that rule knows of the layer.
        attached: number of rules that use this wrapper.
    """

    def __init__(self, layer: nn.Module) -> None:
        before = layer.__dict__.get("forward")
        if getattr(before, "__func__", None) is type(layer).forward and getattr(before, "__self__", None) is layer:
            before = None  # left by a copy
        self.layer, self.before, self.attached = layer, before, 0
        self.forward = layer.forward if before is None else before
        self.function = type(layer).forward
        self.rule: Any = None
        self.site: Any = None
        layer.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer under the active rule."""
        rule = self.rule
        if rule is None:
            return self.own()(*args, **kwargs)
        return rule.call_layer(self.site, *args, **kwargs)

    def own(self) -> Any:
        """Return the layer's forward method, of its present class."""
        if type(self.layer).forward is not self.function:
            self.function = type(self.layer).forward
            if self.before is None:
                self.forward = MethodType(self.function, self.layer)
        return self.forward

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self.layer, "forward")) if self.before is None else (_itself, (self.before,))

    def release(self) -> None:
        """Detach one rule; after the last one, restore the layer's own forward method."""
        self.attached -= 1
        if self.attached == 0 and self.layer.__dict__.get("forward") is self:
            del self.layer.__dict__["forward"]
            if self.before is not None:
                self.layer.__dict__["forward"] = self.before

    def require_in_place(self, name: str, forward: Any) -> None:
        """Refuse to work if something else has replaced the wrapper, or the forward method that a rule knows.

        Raises:
            ConfigError: the layer was given another forward method or class after the rule was made.
        """
        if self.layer.__dict__.get("forward") is not self or self.own() is not forward:
            raise ConfigError(
                f"layer {name!r} was given another forward method or class after the rule was made; make the rule afterwards"
            )


class Attachment:
    """The attachment of one rule to layers, until :meth:`remove` is called or the rule is freed.

    Args:
        rule: the attached rule; only weakly referenced.
        layers: the layers to wrap.
    """

    def __init__(self, rule: object, layers: Iterable[nn.Module]) -> None:
        self.wrapped = [_wrapper(layer) for layer in layers]
        for item in self.wrapped:
            item.attached += 1
        self._release = weakref.finalize(rule, _release, self.wrapped)
        self._release.atexit = False

    def remove(self) -> None:
        """Release every layer."""
        self._release()


def _wrapper(layer: nn.Module) -> Wrapped:
    existing = layer.__dict__.get("forward")
    if not isinstance(existing, Wrapped):
        return Wrapped(layer)
    existing.own()
    return existing


def _release(wrapped: list[Wrapped]) -> None:
    for item in wrapped:
        item.release()


def _itself(forward: Any) -> Any:
    return forward
