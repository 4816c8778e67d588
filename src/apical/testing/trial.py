"""Experiments on a user's rule and model: each runs one step in a sandbox and returns the gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from apical.core.attention import Attending
from apical.core.credit import Credit, CreditRule
from apical.core.effective import Precision
from apical.core.packed import Part, caller
from apical.core.placement import Placement
from apical.core.rest import undisturbed

Gradients = dict[str, Tensor]
"""Gradients by parameter name; a parameter without one is missing."""


def direct(credit: Credit) -> None:
    """Call `credit.backward()`."""
    credit.backward()


class Trial:
    """A rule and a batch. Every method leaves rule, model, gradients and random generators as they are.

    Args:
        rule: the rule with its model.
        inputs: (batch, ...).
        targets: what the rule's loss takes.

    """

    def __init__(self, rule: CreditRule, inputs: Any, targets: Any) -> None:
        self.rule, self.model, self.inputs, self.targets = rule, rule.model, inputs, targets

    @cached_property
    def eps(self) -> float:
        """Coarsest precision of the model's parameters and activity."""
        kinds, seen = [q.dtype for q in self.model.parameters()], Precision()
        with undisturbed(self.rule), torch.no_grad(), seen:
            self.model(self.inputs)
        return max([seen.eps, *(torch.finfo(kind).eps for kind in kinds if kind.is_floating_point)])

    @property
    def tolerance(self) -> float:
        """Relative error that counts as equal in this precision."""
        eps = self.eps
        return 1e-9 if eps < 1e-12 else min(0.05, 2e3 * eps if eps < 1e-4 else 8 * eps)

    @cached_property
    def rounding(self) -> dict[str, float]:
        """By how much a usual gradient changes if parameters and inputs are rounded differently, relative to the largest.

        A gradient that is a sum of errors which cancel, as that of a bias before a batch normalisation, is rounding alone.
        """
        draws = [self.perturbed(self.step, self.eps, seed) for seed in range(4)]
        return {
            name: max((float((draw[name] - grad).abs().max()) for draw in draws if name in draw), default=0.0) / largest
            for name, grad in self.usual.items()
            if grad.numel() and (largest := _largest(self.usual))
        }

    @contextmanager
    def sandbox(self) -> Iterator[None]:
        """Within, no gradient is there, the random generators start from a fixed seed, and whatever changes is undone."""
        with undisturbed(self.rule, parameters=True), torch.enable_grad():
            self.rule.zero_grad()
            self.rule.restart()
            torch.manual_seed(0)
            yield

    def step(
        self,
        backward: Callable[[Credit], None] = direct,
        rule: Callable[..., Credit] | None = None,
    ) -> Gradients:
        """Return the gradients that one step of the rule makes in the model."""
        with self.sandbox():
            subject = self.rule if rule is None else rule
            backward(subject(self.inputs, self.targets))
            return self.collected()

    def exact(self) -> Gradients:
        """Return the gradients of the model's own loss by backpropagation; of attention, only those that the rule keeps."""
        attention = self.rule.attention
        attending = nullcontext() if attention == "exact" else Attending(attention, self.model, looks=False)
        with self.sandbox(), attending:
            self.loss(self.model(self.inputs)).backward()
            return self.collected()

    def perturbed(self, make: Callable[[], Gradients], size: float, seed: int) -> Gradients:
        """Return what `make` returns if each parameter and input is off by up to `size` of itself, at random."""
        generator = torch.Generator().manual_seed(seed)

        def off(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            noise = 2 * torch.rand(x.shape, generator=generator, dtype=torch.double) - 1
            return x.detach() * (1 + size * noise).to(x)

        inputs = self.inputs
        with undisturbed(self.rule, parameters=True):
            with torch.no_grad():
                for q in self.rule.parameters():
                    if q.numel():  # feedback in closed form has no values
                        q.copy_(off(q))
            self.inputs = tree_map(off, inputs)
            try:
                return make()
            finally:
                self.inputs = inputs

    def loss(self, output: Any) -> Tensor:
        """Return the rule's loss of an output."""
        value: Tensor = self.rule.loss(output, self.targets)
        return value

    def takes(self, inputs: Any, targets: Any) -> bool:
        """Return whether model and loss by themselves take a batch."""
        try:
            with self.sandbox():
                self.rule.loss(self.model(inputs), targets)
        except Exception:
            return False
        return True

    def collected(self) -> Gradients:
        """Return copies of the gradients that are in the model now."""
        grads = {name: q.grad for name, q in self.model.named_parameters() if q.grad is not None}
        return {name: (grad.to_dense() if grad.is_sparse else grad).detach().clone() for name, grad in grads.items()}

    @cached_property
    def usual(self) -> Gradients:
        """Gradients of an ordinary step."""
        return self.step()

    @cached_property
    def backprop(self) -> Gradients:
        """Gradients of backpropagation."""
        return self.exact()

    @cached_property
    def placement(self) -> Placement:
        """The rule's own statement."""
        with self.sandbox():
            return self.rule.placement(self.inputs)

    def path(self, parameter: str) -> str:
        """Return the path of the row whose module holds the parameter; "" where none does."""
        rows = [row for row in self.placement if parameter.startswith(f"{row.layer}." if row.layer else "")]
        return max(rows, key=lambda row: len(row.layer)).path if rows else ""

    @cached_property
    def is_stochastic(self) -> bool:
        """Whether the model's output depends on the random generators."""
        outputs = []
        for seed in range(3):
            with self.sandbox(), torch.no_grad():
                torch.manual_seed(seed)
                outputs.append([x.clone() for x in tree_leaves(self.model(self.inputs)) if isinstance(x, Tensor)])
        return any(
            len(a) != len(b) or any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(a, b, strict=True))
            for a, b in ((outputs[0], other) for other in outputs[1:])
        )

    @cached_property
    def strays(self) -> bool:
        """Whether the model draws random numbers, and draws others when the rule runs it, which has drawn before it."""
        if not (self.is_stochastic and self.rule.feed_forward):
            return False
        outputs = []
        for under_rule in (True, False):
            with self.sandbox():
                made = self.rule(self.inputs, self.targets)._output if under_rule else self.model(self.inputs)
                outputs.append([x.detach().clone() for x in tree_leaves(made) if isinstance(x, Tensor)])
        return any(
            a.shape != b.shape or not torch.allclose(a, b, rtol=self.tolerance, atol=self.tolerance)
            for a, b in zip(*outputs, strict=True)
        )

    def below(self, layer: nn.Module) -> set[str]:
        """Return the names of the parameters that the layer's input depends on; of a part, also those of its module."""
        inputs: list[Tensor] = []
        module = caller(layer)
        own = {id(parameter) for parameter in module.parameters()} if isinstance(layer, Part) else set()
        within = {name for name, parameter in self.model.named_parameters() if id(parameter) in own}
        with self.sandbox():
            with _before_forward(module, partial(_record, inputs)):
                self.model(self.inputs)
            starts = [x.abs().sum() for x in inputs if x.requires_grad]
            if starts:
                torch.autograd.backward(starts)
            return set(self.collected()) | within

    def through(self, layer: nn.Module) -> set[str]:
        """Return the names of the parameters that the loss depends on through this layer's input alone, as far as is known.

        Weights that are zero, as a new residual branch may begin, stop no error that goes by feedback: they count as others.
        """
        if isinstance(layer, Part) and not layer.whole:
            return set()
        has_state = isinstance(layer, Part) and isinstance(layer.owner, (nn.RNNBase, nn.RNNCellBase))  # another input
        zero = [parameter for parameter in self.model.parameters() if parameter.dim() > 1 and not bool(parameter.any())]
        others, generator = set[str](), torch.Generator().manual_seed(0)
        ways = [partial(_before_forward, caller(layer), _detached_first if has_state else _detached)]
        if isinstance(layer, Part) and isinstance(layer.owner, nn.MultiheadAttention):
            ways.append(partial(_detached_answer, layer.owner))  # the loss may read the attention weights too
        for filled, way in product(([], zero) if zero else ([],), ways):
            with self.sandbox():
                with torch.no_grad():
                    for parameter in filled:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
                with way():
                    loss = self.loss(self.model(self.inputs))
                    if loss.requires_grad:
                        loss.backward()  # which may run checkpointed layers again
                others |= {name for name, grad in self.collected().items() if bool(grad.any())}
        return {name for name, grad in self.backprop.items() if bool(grad.any())} - others

    def shows(self, name: str) -> bool:
        """Return whether a change of a parameter's usual gradient by a quarter of itself would be seen by :meth:`far`."""
        grad = self.usual.get(name)
        return grad is not None and bool(self.far({name: 1.25 * grad}, self.usual, {name}))

    def far(self, a: Gradients, b: Gradients, names: Mapping[str, Any] | set[str] | None = None) -> dict[str, float]:
        """Return parameters on which two sets of gradients differ by more than rounding, and how much, relative to b's."""
        scale = _largest(b)
        result = {}
        for name in names if names is not None else a.keys() | b.keys():
            x, y = a.get(name), b.get(name)
            if x is None and y is None:
                continue
            x, y = _filled(x, y), _filled(y, x)
            difference = float((x - y).abs().max()) if x.numel() else 0.0
            size = max(float(y.abs().max()) if y.numel() else 0.0, 1e-3 * scale)
            if not difference <= self.tolerance * size and not difference <= 8 * scale * self.rounding.get(name, 0.0):
                result[name] = difference / size if size else float("inf")
        return result


def _largest(gradients: Gradients) -> float:
    return max((float(grad.abs().max()) for grad in gradients.values() if grad.numel()), default=0.0)


def _filled(grad: Tensor | None, other: Tensor | None) -> Tensor:
    if grad is not None:
        return grad
    assert other is not None
    return torch.zeros_like(other)


@contextmanager
def shadowed(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Within, these attributes or methods replace the module's own or those of its class."""
    own = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del module.__dict__[name]
        module.__dict__.update(own)


@contextmanager
def _before_forward(module: nn.Module, act: Callable[..., Any]) -> Iterator[None]:
    """Within, `act(args, kwargs)` says what the module's forward method is given, also where it is called by its name."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = act(args, kwargs)
        return forward(*args, **kwargs)

    with shadowed(module, forward=run):
        yield


@contextmanager
def _detached_answer(module: nn.Module) -> Iterator[None]:
    """Within, the first of the module's outputs has no past."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        first, *rest = forward(*args, **kwargs)
        return (first.detach(), *rest)

    with shadowed(module, forward=run):
        yield


def _record(seen: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    seen += [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    return args, kwargs


def _detached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cut(x: Any) -> Any:
        return x.detach() if isinstance(x, Tensor) else x

    return tree_map(cut, (args, kwargs))  # type: ignore[no-any-return]


def _detached_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the input alone, and not the state, of a recurrent module."""
    first, named = _detached(args[:1], {name: value for name, value in kwargs.items() if name == "input"})
    return (*first, *args[1:]), {**kwargs, **named}
