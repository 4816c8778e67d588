"""What a rule with cuts attaches to a model: hooks that end a unit at an activation's output, and a record of one pass.

Hooks know a :class:`Cutting`, not the rule, so that a rule without references is freed together with its hooks.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from apical.core.activations import is_activation
from apical.core.calls import AVERAGES, FUNCTIONS, NORMALISATIONS, PRODUCTS, Calls
from apical.core.checkpointing import refuse_hidden, sever
from apical.core.gains import gain
from apical.core.graph import Vertex, lasting, vertex
from apical.core.layers import is_packed, refuse_backward_hooks
from apical.core.outputs import parts, tensors
from apical.core.outside_use import refuse_derivatives, refuse_mapped
from apical.core.rows import Rows, uncompiled
from apical.core.signals import Cut, Teacher, TeachingSignal, channels_axis
from apical.errors import UnsupportedModelError


class Call(NamedTuple):
    """One call in a traced pass.

    Attributes:
        kind: of what: a weighted layer, an activation, any module, any function.
        name: name of the module or function, with "#k" for its further calls.
        base: the same without "#k".
        at: its output in autograd's graph; None if it needs no gradient.
        first: whether no weighted layer was called before.
        shape: shape of its output, or () for layers.
    """

    kind: Literal["layer", "activation", "module", "function"]
    name: str
    base: str
    at: Vertex | None
    first: bool = False
    shape: tuple[int, ...] = ()


def is_part_of(point: str, module: str) -> bool:
    """Return whether a point is a tensor of the module's output.

    >>> is_part_of("lstm:1", "lstm"), is_part_of("lstm1", "lstm")
    (True, False)
    """
    return point.partition(":")[0] == module


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Return whether a module lies within one of the others."""
    return any(name.startswith(f"{module}.") for module in modules)


class Cutting:
    """Where a model is cut, and the hooks that cut it during :meth:`cut_pass`.

    Attributes:
        activations: names of activation modules.
        packed: names of layers with several weights, whose inner calls are ignored.
        exact: names of modules whose matrices keep their exact derivative, wherever they are used.
        points: further cuts: names of modules, cut at every call, and of function calls.
        bases: names of function calls among the points, without "#k".
        inside: names of activation calls within a unit, at which there is no cut.
        tail: names of activation calls behind the last weighted layer.
        beside: those after which some layer was called, with that layer: it leads to another output.
        skips_activations: units end at the points only.
        heard: contains "functions" once some cut is at a function call.
        moves_rows: whether some unit's rows are not those of the batch.
        weights: the layer of each weight, by the weight's id, when the model was last traced.
        now: the pass in progress.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], at_inputs: bool) -> None:
        self.model, self.layers, self.at_inputs = model, layers, at_inputs
        self.modules = dict(model.named_modules())
        self.activations = {name for name, module in self.modules.items() if is_activation(module)}
        self.packed = {name for name, layer in layers.items() if is_packed(layer)}
        self.exact: frozenset[str] = frozenset()
        self.points: set[str] = set()
        self.bases: set[str] = set()
        self.inside: set[str] = set()
        self.tail, self.beside = set[str](), set[tuple[str, str]]()
        self.skips_activations = False
        self.heard: set[str] = set()
        self.moves_rows = False
        self.weights: dict[int, str] = {}
        self.now: Pass | Trace | None = None
        self.hooks: list[Any] = []
        for name, module in self.modules.items():
            if name in layers and at_inputs:
                self.hooks.append(module.register_forward_pre_hook(partial(_before_layer, self, name), with_kwargs=True))
            elif name in layers:
                self.hooks.append(module.register_forward_hook(partial(_after_layer, self, name)))
            elif name in self.activations and not at_inputs:
                self.hooks.append(module.register_forward_hook(partial(_after, self, "activation", name)))

    def add_points(self, names: Collection[str]) -> None:
        """Cut at the outputs of these modules too, ":k" for tensor k of a layer's output; other names are function calls."""
        for name in sorted(set(names) - self.points):
            self.points.add(name)
            module = name.partition(":")[0]
            if module in self.modules:
                if not any(is_part_of(point, module) for point in self.points - {name}):
                    self.hooks.append(self.modules[module].register_forward_hook(partial(_after, self, "point", module)))
            else:
                self.bases.add(name.partition("#")[0])
                self.hear_functions()

    @property
    def is_functional(self) -> bool:
        """Whether some cut is at a function call, so that calls must be observed."""
        return bool(self.heard)

    def hear_functions(self) -> None:
        """Cut at function calls too, from now on."""
        if not self.is_functional:
            self.heard.add("functions")
            self.hooks += self._owners()

    def _owners(self) -> list[Any]:
        """Return hooks that track which module's code is running."""
        hooks: list[Any] = []
        for name, module in self.modules.items():
            if name in self.packed:
                hooks.append(module.register_forward_pre_hook(partial(_enter, self, name)))
                hooks.append(module.register_forward_hook(partial(_pass_by, self)))
            elif name not in self.layers and not is_inside(name, self.packed):
                hooks.append(module.register_forward_pre_hook(partial(_enter, self, name)))
                hooks.append(module.register_forward_hook(partial(_leave, self, name)))
        return hooks

    @contextmanager
    def _under_way(self, now: "Pass | Trace", functions: bool) -> Iterator[None]:
        self.now = now
        try:
            if now.rows is None and not functions:
                yield
                return
            with now.rows or nullcontext(), Calls(now) if functions else nullcontext():
                yield
        finally:
            self.now = None

    @staticmethod
    def _folds_apart(now: "Trace", output: Any) -> bool:
        """Return whether the output's rows moved, or a unit has positions folded into rows and the output has not."""
        folded: set[int] = set()
        moved = any([now.rows is not None and now.rows.moves(part, folded) for part in tensors(output)])
        return moved or bool(now.folds - folded)

    def cut_pass(self, inputs: Any, plain: bool, run: Callable[[Any], Any] | None = None) -> tuple[Any, "Pass"]:
        """Return the model's output from a pass with cuts, and the pass; `plain` roots are the unit outputs themselves.

        Another rule may act within units: `run(inputs)` then computes the model's output.
        """
        now = Pass(self, plain)
        if self.moves_rows:
            if torch.compiler.is_compiling():
                raise UnsupportedModelError("the model moves rows of the batch, which is followed in eager mode only")
            now.rows = Rows(inputs)
        with self._under_way(now, self.is_functional):
            output = uncompiled(run or self.model, inputs) if self.moves_rows else (run or self.model)(inputs)
        if now.rows is not None:
            now.cuts = now.rows.tell(now.cuts, output)
        return output, now

    def trace(self, inputs: Any) -> tuple[Any, "Trace"]:
        """Return the model's output from a pass without cuts in which everything is recorded.

        Real-valued inputs require a gradient during this pass, so that the graph is complete even if layers are frozen.
        """
        now = Trace(self)
        self.weights = {id(p): name for name, layer in self.layers.items() for p in layer.parameters() if p.dim() > 1}
        hooks = [] if self.is_functional else self._owners()
        hooks += [layer.register_forward_hook(partial(_noted, self, name)) for name, layer in self.layers.items()]
        try:
            with torch.inference_mode(False), torch.enable_grad():
                if isinstance(inputs, Tensor):
                    inputs = inputs.detach().clone()
                    if inputs.is_floating_point():
                        inputs = inputs.requires_grad_().clone()
                now.rows = Rows(inputs)
                with self._under_way(now, True):
                    output = self.model(inputs)
                self.moves_rows |= self._folds_apart(now, output)
                return output, now
        finally:
            for hook in hooks:
                hook.remove()


class Pass:
    """A forward pass with cuts.

    Attributes:
        events: names of what was called, in order; "~" precedes activations without a cut.
        sites: each call of a weighted layer, with its output in the graph.
        cuts: the units that ended.
        calls_of: the number of the call of a weighted layer that made a vertex.
        lasting: the vertex that represents a site after its output, a view, was changed in place.
    """

    def __init__(self, cutting: Cutting, plain: bool = False) -> None:
        self.cutting, self.plain, self.teacher = cutting, plain, Teacher()
        self.events: list[str] = []
        self.sites: list[tuple[str, Vertex | None]] = []
        self.cuts: list[Cut] = []
        self.calls_of: dict[Vertex, int] = {}
        self.lasting: dict[Vertex, Vertex] = {}
        self.near: str | None = None  # the last weighted layer called
        self.is_mapped = torch._C._are_functorch_transforms_active()  # the rule refuses these itself
        self.single = 0  # number of axes of its output, if that is of a single sample
        self.on_view: str | None = None  # a cut at a view that was changed in place and keeps its graph
        self.last: Tensor | None = None  # the output of the last cut
        self.version = (0, False)  # its version at that time, and whether it had a graph, which functions may give it
        self.at: Vertex | None = None  # and the vertex of its input
        self.counts: dict[str, int] = {}
        self.owners, self.learns = [""], torch.is_grad_enabled()
        self.rows: Rows | None = None

    def number(self, name: str) -> str:
        """Return the name of this call."""
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        return f"{name}#{count}" if count else name

    def before_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cut at the input of a weighted layer, if it is not the first."""
        near, self.near = self.near, name
        if near is None:
            self.events.append(name)
            return None
        if args:
            return (self.cut(self.number(name), args[0]), *args[1:]), kwargs
        if "input" in kwargs:
            return args, {**kwargs, "input": self.cut(self.number(name), kwargs["input"])}
        raise UnsupportedModelError(f"layer {name!r} was called without its input; pass it by position")

    def layer(self, name: str, output: Any, inputs: Any = None) -> None:
        """Record a call of a weighted layer, and whether it reads a unit's output unchanged."""
        if inputs is not None and self.is_cut(inputs):
            self.cuts[-1] = Cut(*self.cuts[-1][:-1], name)
        self.events.append(name)
        self.near = name
        axes = len(layer.kernel_size) + 1 if isinstance(layer := self.cutting.layers[name], _ConvNd) else 1
        self.single = axes if isinstance(output, Tensor) and output.dim() == axes else 0
        if not torch.compiler.is_compiling():
            if self.learns and not torch.is_grad_enabled():
                refuse_hidden(name)
            made = [output] if isinstance(output, Tensor) else [part for _, part in parts(name, output)]
            for part in made:
                at = self.at if self.is_cut(part) else vertex(part)
                if at is not None:
                    base = self.lasting[at] = at if self.is_cut(part) else cast(Vertex, lasting(part))
                    self.calls_of[at] = self.calls_of[base] = len(self.events)
                self.sites.append((name, at))

    def activation(self, name: str, output: Tensor, inputs: Any) -> Tensor | None:
        """Cut at an activation's output, unless it has no separate unit. `inputs` is what it is given."""
        if self.near is None or self.cutting.skips_activations:
            self.events.append(f"~{name}")
            return None
        name = self.number(name)
        if not (name in self.cutting.inside or name in self.cutting.tail or self.is_cut(output)):
            return self.cut(name, output, output is inputs)
        self.events.append(f"~{name}")
        return None

    def is_merged(self, site: Vertex, passed: Vertex | None) -> bool:
        """Return whether an error that passes one weighted site on its way to the other passes another call's weights."""
        return passed is not None and (passed not in self.calls_of or self.calls_of[passed] != self.calls_of.get(site))

    def point(self, name: str, output: Any, inputs: Any = None) -> Any:
        """Cut at a module's output. `inputs` is the module's input."""
        if not isinstance(output, Tensor):
            return self._several(name, output) if name in self.cutting.layers else None
        if self.is_cut(output):
            return None
        return self.cut(self.number(name), output, output is inputs)

    def _several(self, name: str, output: Any) -> Any:
        """Cut at tensors in a layer's output."""
        ends = {id(part): full for full, part in parts(name, output) if full in self.cutting.points and part.requires_grad}
        return tree_map(lambda leaf: self.cut(self.number(ends[id(leaf)]), leaf) if id(leaf) in ends else leaf, output)

    def left(self, name: str, output: Any) -> None:
        """Called after a module's forward pass."""

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
        """Cut at a function's result if it is an activation or a further point."""
        cutting = self.cutting
        if cutting.at_inputs or self.owners[-1] in cutting.activations or self.owners[-1] in cutting.packed:
            return result
        if function in FUNCTIONS and not cutting.skips_activations:
            hidden = self.activation(self.called(function), result, args[0] if args else None)
            return result if hidden is None else hidden
        self.applied(function, args)
        name = self.called(function)
        if name in cutting.bases and isinstance(result, Tensor):
            name = self.number(name)
            if name in cutting.points and not self.is_cut(result):
                return self.cut(name, result, bool(args) and result is args[0])
        return result

    def applied(self, function: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
        """Return the layer whose weight a function applies, `F.linear(x, layer.weight)`; it counts as called."""
        layer = None
        if getattr(function, "__name__", "") in PRODUCTS:
            given = [part if part._base is None else part._base for part in args if isinstance(part, Tensor)]
            layer = next((self.cutting.weights[id(t)] for t in given if id(t) in self.cutting.weights), None)
            self.near = layer or self.near
        return layer

    def called(self, function: Callable[..., Any]) -> str:
        """Return the name of a function's calls, by the module whose code runs."""
        owner = self.owners[-1]
        name = getattr(function, "__name__", "function")
        return f"{owner}.F.{name}" if owner else f"F.{name}"

    def cut(self, name: str, hidden: Tensor, in_place: bool = False) -> Tensor:
        """End a unit: return a tensor with the same values, but without a graph."""
        if self.single and hidden.dim() == self.single:
            raise UnsupportedModelError(
                f"layer {self.near!r} is called on a single sample (its unit has the shape {tuple(hidden.shape)}), so "
                "the errors that belong to it cannot be identified; call it on the whole batch (batch, ...)"
            )
        if hidden.is_nested:
            raise UnsupportedModelError(
                f"the unit at {name!r} outputs a nested tensor, which rules with cuts do not support; pad it"
            )
        if not (self.plain or self.is_mapped):
            refuse_mapped(name)
        root = hidden
        if in_place and hidden.requires_grad and hidden._base is not None:
            self.on_view, in_place = self.on_view or name, False
        ends = in_place and hidden.requires_grad  # for code that holds the tensor that was changed in place
        if not self.plain:
            root = cast(Any, TeachingSignal).apply(hidden, self.teacher, len(self.cuts))
        elif ends:
            root = hidden.clone()
        self.events.append(name)
        rows = None if self.rows is None else self.rows.of(hidden)
        axis = channels_axis(hidden.shape, self.cutting.layers.get(self.near or ""), self.cutting.at_inputs, rows)
        self.cuts.append(Cut(root, hidden.shape, hidden.dtype, name, axis, rows))
        if torch.compiler.is_compiling():
            return hidden.detach_() if ends else hidden.detach()
        self.at = vertex(hidden)
        self.last = hidden.detach_() if ends else sever(hidden)
        self.version = (self.last._version, self.last.requires_grad) if self.learns else (0, False)
        return self.last

    def is_cut(self, output: Any) -> bool:
        """Return whether this is the unchanged output of the last cut."""
        last = self.last
        return (
            output is last and last is not None and not (self.learns and self.version != (last._version, last.requires_grad))
        )


class Trace(Pass):
    """A forward pass without cuts in which every call is recorded.

    Attributes:
        calls: the calls in order.
        folds: row counts of tensors in which each sample has several consecutive rows.
        hears: whether an activation follows a layer's weight that a function has applied.
        fed: results computed from the batch, not from weights alone.
        shrinkage: what divides the squared length of an error on its way down: averages and layers with small weights.
    """

    def __init__(self, cutting: Cutting) -> None:
        super().__init__(cutting)
        self.calls: list[Call] = []
        self.shrinkage: dict[Vertex, float] = {}
        self.folds: set[int] = set()
        self.hears = False
        self.fed: set[Vertex | None] = set()

    def layer(self, name: str, output: Any, inputs: Any = None) -> None:
        """Record a layer's output."""
        super().layer(name, output)
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedModelError(
                f"the model calls layer {name!r} inside a transform of torch.func (vmap, grad), where no unit can be cut "
                "off; call it on the batch itself"
            )
        for _, part in parts(name, output):
            self._note_fed(part)
        at = self.sites[-1][1] if isinstance(output, Tensor) else None
        self.calls.append(Call("layer", self.number(name), name, at))
        if at is not None:
            self.shrinkage[at] = 1 / min(1.0, gain(self.cutting.layers[name]))

    def activation(self, name: str, output: Tensor, inputs: Any) -> Tensor | None:
        """Record an activation's output."""
        first = self.near is None
        if not first and all(layer != self.near for layer, _ in self.sites):
            self.hears = True  # only the function calls show that its weight was used
        self._watch(output)
        if self.cutting.skips_activations:
            return None  # recorded like every module's output
        number = name if first else self.number(name)
        self.calls.append(Call("activation", number, name, vertex(output), first, tuple(output.shape)))
        return None

    def point(self, name: str, output: Any, inputs: Any = None) -> Tensor | None:
        """Do nothing: the output is recorded like every module's."""
        return None

    def _note_fed(self, output: Tensor) -> None:
        if self.rows is None or not self.rows.made or output in self.rows.made:  # no batch was found: it may be anything
            self.fed.add(vertex(output))

    def _watch(self, output: Tensor) -> None:
        """Follow the samples from now on if this unit could have moved rows."""
        self._note_fed(output)
        if not self.cutting.moves_rows and self.rows is not None:
            self.cutting.moves_rows = self.rows.moves(output, self.folds)

    def left(self, name: str, output: Any) -> None:
        """Record a module's output."""
        several = name in self.cutting.layers and not isinstance(output, Tensor)
        for full, part in parts(name, output) if several else [(name, output)]:
            if isinstance(part, Tensor) and part.grad_fn is not None:
                self._watch(part)
                number = self.number(f"{full}:output").replace(":output", "", 1)
                self.calls.append(Call("module", number, full, vertex(part), shape=tuple(part.shape)))

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
        """Record a function's result."""
        refuse_derivatives(function, args, {self.lasting[at][0]: name for name, at in self.sites if at}, True)
        if self.owners[-1] in self.cutting.activations or self.owners[-1] in self.cutting.packed:
            return result
        name = self.called(function)
        layer = self.applied(function, args)
        if function in FUNCTIONS and not self.cutting.skips_activations:
            self.activation(name, result, None)
            return result
        number = self.number(name) if isinstance(result, Tensor) else name  # counted with or without a graph
        if isinstance(result, Tensor) and result.grad_fn is not None:
            at = cast(Vertex, vertex(result))
            self._note_fed(result)
            self.calls.append(Call("function", number, name, at, shape=tuple(result.shape)))
            kind = getattr(function, "__name__", "")
            if layer is not None:
                self.shrinkage[at] = 1 / min(1.0, gain(self.cutting.layers[layer]))
            elif kind in AVERAGES and args and isinstance(args[0], Tensor):
                self.shrinkage[at] = args[0].numel() / max(result.numel(), 1)
            elif kind in NORMALISATIONS and args and isinstance(args[0], Tensor) and args[0].grad_fn is not None:
                self.shrinkage.pop(cast(Vertex, vertex(args[0])), None)  # it cancels the layer's gain
        return result


def _before_layer(cutting: Cutting, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return cutting.now.before_layer(name, args, kwargs) if cutting.now is not None else None


def _after_layer(cutting: Cutting, name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if cutting.now is not None:
        cutting.now.layer(name, output, args[0] if args else None)


def _after(cutting: Cutting, kind: str, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if cutting.now is None:
        return None
    cut = getattr(cutting.now, kind)(name, output, args[0] if args else None)
    if cut is not None:
        refuse_backward_hooks(repr(name), module)
    return cut


def _enter(cutting: Cutting, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if cutting.now is not None:
        cutting.now.owners.append(name)


def _leave(cutting: Cutting, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if cutting.now is not None:
        cutting.now.owners.pop()
        cutting.now.left(name, output)


def _pass_by(cutting: Cutting, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if cutting.now is not None:
        cutting.now.owners.pop()


def _noted(cutting: Cutting, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if cutting.now is not None:
        cutting.now.left(name, output)
