"""Cuts: give each unit its own teaching signal.

A unit is what lies between two cuts: a weighted layer with its normalisation, the residual sum and the activation at
whose output the unit ends. The next unit reads that output detached, so no error crosses a cut; one backward pass from all
unit outputs at once, each with its own signal, then makes every unit's local gradient.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from apical.core.activations import is_activation
from apical.core.credit import CreditRule, Loss
from apical.core.units import weighted_layers
from apical.errors import UnsupportedModelError

Method = TypeVar("Method", bound=Callable[..., Any])


def eagerly(method: Method) -> Method:
    """Keep a method out of compiled graphs: what it does happens once, at the first batch."""
    return cast(Method, torch.compiler.disable(method))


class Teacher:
    """Makes the teaching signals of one pass, each not before the backward pass reaches its unit.

    Signals made in advance would all exist at once, beside every activation that backward still needs.

    Attributes:
        signal: `signal(index of the unit, scale) -> teaching signal` of the unit output's shape, times the scalar scale;
            set after the forward pass, when the output error is known.
    """

    signal: Callable[[int, Tensor], Tensor]


class TeachingSignal(torch.autograd.Function):
    """A scalar zero whose backward pass hands `teacher.signal(index, scale)` to `hidden`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Teacher, index: int) -> Tensor:
        """Zero; the unit's output is not kept."""
        ctx.teacher, ctx.index = teacher, index
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        """The signal, made now."""
        return ctx.teacher.signal(ctx.index, scale), None, None


class Cut(NamedTuple):
    """One hidden unit in one pass.

    Attributes:
        root: where backward starts: a scalar that carries the teacher's signal; under `torch.compile`, which plans memory
            itself, the unit's output.
        shape: of the unit's output (batch, ...).
        dtype: of the unit's output.
    """

    root: Tensor
    shape: torch.Size
    dtype: torch.dtype


class CutRule(CreditRule):
    """Base of the rules that hand a teaching signal to every hidden unit.

    Args:
        model: network whose activations are modules (`nn.ReLU()`, not `F.relu`), used once or several times each.
        loss: maps (output, targets) to a scalar batch mean.
        where: "activation" cuts behind every hidden activation (behind the residual sum), so that no error crosses;
            "input" cuts before every weighted layer but the first and leaves residual connections whole.
        exact: names of modules or parameters without known transport that keep their exact derivative within a unit.

    Raises:
        UnsupportedModelError: see :func:`apical.core.units.weighted_layers`; or, at the first batch, no hidden
            activation is found.

    Attributes:
        plain_roots: make roots that function transforms (`torch.func`) can follow, as compiled graphs get them.
    """

    plain_roots = False

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        where: Literal["activation", "input"] = "activation",
        exact: Collection[str] = (),
    ) -> None:
        super().__init__(model, loss)
        self.layers = weighted_layers(model, exact)
        self.where = where
        self._hidden: list[str] | None = None
        self._mode: Literal["off", "trace", "cut"] = "off"
        self._events: list[tuple[str, bool]] = []  # (module name, is a cut point), in the order of execution
        self._cuts: list[Cut] = []
        self._teacher = Teacher()
        self._calls = 0  # of activations (or layers) so far in this pass
        self._before = 0  # activations before the first layer: they belong to no unit
        for name, module in model.named_modules():
            if name in self.layers:
                self._hooks.append(module.register_forward_pre_hook(partial(self._before_layer, name)))
            elif where == "activation" and is_activation(module):
                self._hooks.append(module.register_forward_hook(partial(self._after_activation, name)))

    @property
    def takes_signals(self) -> bool:
        """Whether roots are plain unit outputs, to be given their signals: where a graph is compiled or transformed."""
        return self.plain_roots or torch.compiler.is_compiling()

    def hidden_units(self, inputs: Tensor) -> list[str]:
        """Names of the cuts in the order of execution: the module each belongs to, with "#k" when it is used again.

        The first call runs `inputs` through the model, leaving the state of model and random generators as it was.
        """
        if self._hidden is None:
            self._hidden = self._trace(inputs)
        return self._hidden

    @eagerly
    def _trace(self, inputs: Tensor) -> list[str]:
        devices = [inputs.device] if inputs.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad(), evaluating(self.model), self._during("trace"):
            self.model(inputs)
        weighted = [i for i, (name, _) in enumerate(self._events) if name in self.layers]
        unseen = set(self.layers) - {self._events[i][0] for i in weighted}
        if unseen:
            raise UnsupportedModelError(
                f"layer {min(unseen)!r} was not called as a module in the forward pass; call it, or remove it"
            )
        self._before = sum(is_cut for _, is_cut in self._events[: weighted[0]])
        names = [name for name, is_cut in self._events[weighted[0] + 1 : weighted[-1] + 1] if is_cut]
        if len(self.layers) > 1 and not names:
            raise UnsupportedModelError(
                "no activation module was called between the weighted layers, so there is no hidden unit to send a "
                "signal to; functional activations (F.relu) cannot be seen: use modules (nn.ReLU)"
            )
        return [f"{n}#{names[:i].count(n)}" if n in names[:i] else n for i, n in enumerate(names)]

    def run(self, inputs: Tensor) -> tuple[Tensor, list[Cut], Teacher]:
        """Forward pass with cuts: the model's output (batch, ...), its cuts, and the teacher to be told the signals.

        A root that does not require a gradient belongs to a unit without trainable parameters.
        """
        self.require_attached()
        self.hidden_units(inputs)
        self._teacher = teacher = Teacher()
        with self._during("cut"):
            output = self.model(inputs)
        cuts, self._cuts, self._teacher = self._cuts, [], Teacher()  # only the graph keeps this pass alive
        return output, cuts, teacher

    def _cut(self, hidden: Tensor) -> Tensor:
        root = hidden
        if not self.takes_signals:
            root = cast(Any, TeachingSignal).apply(hidden, self._teacher, len(self._cuts))
        self._cuts.append(Cut(root, hidden.shape, hidden.dtype))
        return hidden.detach()

    @contextmanager
    def _during(self, mode: Literal["trace", "cut"]) -> Iterator[None]:
        self._mode = mode
        self._cuts, self._calls = [], 0
        if mode == "trace":
            self._events = []
        try:
            yield
        finally:
            self._mode = "off"

    def _before_layer(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._mode == "trace":
            self._events.append((name, self.where == "input"))
        elif self._mode == "cut" and self.where == "input":
            self._calls += 1
            if not args:
                raise UnsupportedModelError(f"layer {name!r} was called with keyword arguments; pass its input by position")
            if self._calls > 1:
                return (self._cut(args[0]), *args[1:])
        return None

    def _after_activation(self, name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._mode == "trace":
            self._events.append((name, True))
        elif self._mode == "cut":
            self._calls += 1
            if self._before < self._calls <= self._before + len(self._hidden or ()):
                return self._cut(output)
        return None


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
