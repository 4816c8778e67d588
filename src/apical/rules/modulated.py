"""A gain on every hidden unit's error, on top of any rule; the modulator computes the gain.

    propagating    delta_l = M_l * (signal of the wrapped rule at layer l),   propagated below as delta_l: gains compound
    local          dW_l = (M_l * delta_l) h_{l-1}^T,   and delta_l itself is propagated

M_l (n_l,) is computed from the layer's weight at every batch; output layers have none. "propagating" needs a rule whose
error travels from layer to layer through the model's graph; "local" scales rows of the gradient and works for every rule.

Local: a gain depends on its unit's weights, and on what the modulator compares them with.
Source: the modes are those of arXiv 2104.11604, whose gain :mod:`apical.rules.node_importance` has.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from apical.core.blocks import blocks
from apical.core.checkpointing import aside, is_checkpointed, refuse_hidden
from apical.core.credit import Credit, CreditRule
from apical.core.cut import eagerly
from apical.core.effective import is_drawn, measured_weight, weight_now
from apical.core.graph import SHAPES, lasting
from apical.core.layers import computes_plainly
from apical.core.rest import evaluating, undisturbed
from apical.core.separation import PRODUCTS
from apical.core.transport import as_matrix, geometry
from apical.core.units import Found, weighted_layers
from apical.core.within import reads_own_weight
from apical.core.wrapped import LayerHook, WrappedRule, gain_on, innermost, row_gain
from apical.errors import ConfigError, UnsupportedModelError

Mode = Literal["propagating", "local"]


class Modulator(Protocol):
    """Computes the gain of every unit of a layer.

    It may have `remarks`, sentences for users, and `weights`, "outgoing" to receive those instead of the incoming ones.
    """

    @property
    def mode(self) -> Mode:
        """Whether gains propagate to lower layers."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Gains (n,) of a layer from its effective weight, (n, fan_in), or its units' outgoing weights, (n, fan_out)."""


UNKEPT = (*PRODUCTS, *SHAPES, "FeedbackEdgeBackward")
"""Nodes that compute a plain layer's output without saving it for the backward pass, so it may be changed in place."""


class Modulated(WrappedRule):
    """Wrap a rule, with a gain on the error of every hidden unit.

    Args:
        rule: for mode "local" any rule except those whose feedback gets the weight's own update; for "propagating"
            backpropagation, or a rule of the feedback-alignment family.
        modulator: computes a layer's gains from its weight; outgoing weights need a model that is a row of blocks.
        exact: names of modules of unknown kind that get no gain; None: those of the rule.

    Raises:
        ConfigError: rule and mode do not fit, or the modulator needs weights that do not exist.
        UnsupportedModelError: see :func:`apical.core.units.weighted_layers`; in use, units' outgoing weights are unknown.

    The log `gain` is the mean gain over hidden layers; `compounded` is the product of the layers' means, which in mode
    "propagating" is the factor on the first of a chain of layers.

    >>> from apical.rules.backprop import Backprop
    >>> class Doubled:
    ...     mode = "propagating"
    ...     def __call__(self, rows): return rows.new_full((len(rows),), 2.0)
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> rule = Modulated(Backprop(model), Doubled())
    >>> credit = rule(torch.randn(8, 4), torch.arange(8) % 3)
    >>> credit.backward(); credit.logs["compounded"].item()
    4.0
    """

    def __init__(self, rule: CreditRule, modulator: Modulator, exact: Collection[str] | None = None) -> None:
        super().__init__(rule)
        inner, mode = innermost(rule), modulator.mode
        if mode not in ("propagating", "local"):
            raise ConfigError(f"the modulator's mode must be 'propagating' or 'local', not {mode!r}")
        if mode == "propagating" and not self.chains_errors:
            raise ConfigError(
                f"{type(inner).__name__} sends no error from layer to layer, so a gain would not propagate; use mode='local'"
            )
        if mode == "local" and getattr(inner, "takes_weight_updates", False):
            raise ConfigError(
                f"the feedback of {type(inner).__name__} must get the weight's own update, which mode='local' changes; use "
                "mode='propagating', or wrap FeedbackAlignment or WeightMirror"
            )
        if (weights := getattr(modulator, "weights", "incoming")) not in ("incoming", "outgoing"):
            raise ConfigError(f"the modulator's weights must be 'incoming' or 'outgoing', not {weights!r}")
        self.modulator, self.mode, self.outgoing = modulator, mode, weights == "outgoing"
        self.exact = tuple((getattr(inner, "exact", ()) if exact is None else exact) or ())
        self.layers = weighted_layers(self.model, self.exact, shared=True)
        self._found = Found(self.model)
        self._hidden: list[str] | None = None  # known after the first batch
        self._readers: dict[str, nn.Module] = {}  # of outgoing weights: the layer that reads a hidden one
        self._seen: set[str] = set()
        self._own = set[nn.Module]()  # layers whose own weight is read; of others, that of their affine map
        self._gains: dict[str, Tensor] = {}  # during a call
        self._learns = False
        self._attach()

    def _attach(self) -> None:
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(LayerHook(self, name, _amplify)))

    @property
    def remarks(self) -> list[str]:
        """Remarks of the wrapped rule and of the modulator."""
        return [*self.rule.remarks, *getattr(self.modulator, "remarks", ())]

    def gains(self) -> dict[str, Tensor]:
        """Return M_l (n_l,) of each layer that has one, from the present weights.

        Raises:
            ConfigError: called before the first batch, which determines the output layers.
        """
        if self._hidden is None:
            raise ConfigError("which layers are hidden is not known before the first batch; call the rule on a batch first")
        with torch.no_grad():
            return {name: self.modulator(self._weights(name)) for name in self._hidden}

    def _weights(self, name: str) -> Tensor:
        """Incoming weights (n, fan_in) of a hidden layer's units, or their outgoing ones (n, fan_out)."""
        layer = self.layers[name]
        if not self.outgoing:
            return self._rows(layer)
        columns = self._rows(self._readers[name])  # W : (n_out, n positions)
        units = len(self._rows(layer))
        return columns.view(len(columns), units, -1).transpose(0, 1).flatten(1)

    def _rows(self, layer: nn.Module) -> Tensor:
        own = layer in self._own
        return as_matrix(geometry(layer), weight_now(layer) if own else measured_weight(layer))

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """The wrapped rule's credit, with the gains in it."""
        if not torch.is_grad_enabled():
            return super().forward(inputs, targets)
        if torch.compiler.is_compiling():
            return self._modulated(inputs, targets, compiled=True)
        return self._uncompiled(inputs, targets)

    @eagerly
    def _uncompiled(self, inputs: Tensor, targets: Tensor) -> Credit:
        return self._modulated(inputs, targets, compiled=False)

    def _modulated(self, inputs: Tensor, targets: Tensor, compiled: bool) -> Credit:
        if compiled and not torch.compiler.is_compiling():  # the model breaks the graph, and its parts would miss the gains
            return self._uncompiled(inputs, targets)
        self.require_attached()
        if self._hidden is None:
            hidden = self._find_hidden(inputs)
            if self.outgoing:
                self._readers = readers(self.model, inputs.shape[1:])
            read: list[nn.Module] = [self.layers[name] for name in hidden] if self.outgoing else []
            read += [self._readers.get(name, self.layers[name]) for name in hidden]
            names: dict[nn.Module, str] = {layer: name for name, layer in self.layers.items()}
            self._own = {layer for layer in read if reads_own_weight(names.get(layer, ""), layer)}
            self._require_repeated(read)
            self._hidden = hidden
        gains = self.gains()
        taps = self._taps(gains) if self.mode == "local" else {}
        self._learns = True
        passed_on = gains if self.mode == "propagating" else {}
        self._gains = {name: self._on_output(name, gain) for name, gain in passed_on.items()}
        try:
            credit = self.tapped(taps, inputs, targets)
        finally:
            self._learns, self._gains = False, {}
        if gains:
            means = torch.stack([gain.mean() for gain in gains.values()])
            credit.logs.update(gain=means.mean(), compounded=means.prod())
        return credit

    def _require_repeated(self, layers: Sequence[nn.Module]) -> None:
        """Refuse weights that are redrawn at every call, since gains cannot be computed before it."""
        for name, layer in self.model.named_modules():
            if layer in layers and layer not in self._own and not computes_plainly(layer) and is_drawn(layer):
                raise UnsupportedModelError(
                    f"layer {name!r} computes a new weight at every call, so its gains are not known beforehand; "
                    "remove the randomness from the weight"
                )

    def _on_output(self, name: str, gain: Tensor) -> Tensor:
        shape = geometry(self.layers[name])
        return gain if shape is None else gain.view(-1, *[1] * len(shape.stride))

    def _taps(self, gains: dict[str, Tensor]) -> dict[str, Tensor]:
        taps = {}
        for name, gain in gains.items():
            layer = self.layers[name]
            if any(parameter.requires_grad for parameter in layer.parameters()) and not computes_plainly(layer):
                remedy = "use mode='propagating', or " if self.chains_errors else ""
                raise UnsupportedModelError(
                    f"layer {name!r} computes with a function of its parameters, whose gradient has no row per unit; "
                    f"{remedy}remove the function"
                )
            shape, prefix = geometry(layer), f"{name}." if name else ""
            for own, parameter in layer.named_parameters(recurse=False):
                if parameter.requires_grad:
                    taps[prefix + own] = row_gain(parameter, gain, shape)
        return taps

    def _find_hidden(self, inputs: Tensor) -> list[str]:
        """Layers that feed another weighted layer, found in passes of the plain model in its mode and in evaluation mode.

        Raises:
            UnsupportedModelError: a layer's weight affects the output although the layer is not called.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(
                "which layers are hidden must be known before torch.compile: first call the uncompiled rule on a batch"
            )
        hidden = set[str]()
        named, spared = self.model.named_parameters(remove_duplicate=False), tuple(f"{name}." for name in self.exact)
        others = {id(parameter) for name, parameter in named if f"{name}.".startswith(spared)}
        for mode in (nullcontext, evaluating):
            calls: list[tuple[str, Node | None]] = []
            note = [
                layer.register_forward_hook(partial(_note_call, calls, name), prepend=True)
                for name, layer in self.layers.items()
            ]
            try:
                with undisturbed(self.model), mode(self.model), torch.enable_grad():
                    given = inputs
                    if isinstance(inputs, Tensor) and inputs.is_floating_point():
                        given = inputs.detach().clone().requires_grad_()
                    output = self.model(given)
                    reads = _reads(_tensors(output))
                    hidden |= _read_by_others(calls)
            finally:
                for hook in note:
                    hook.remove()
            self._seen |= {name for name, _ in calls}
            for name, layer in self.layers.items():
                if name not in self._seen and any(id(parameter) in reads for parameter in layer.parameters()):
                    raise UnsupportedModelError(
                        f"layer {name!r} was not called as a module in the forward pass, so its units get no gain; call it, "
                        "or remove it"
                    )
                weight = layer._parameters.get("weight") if computes_plainly(layer) else None
                called = sum(self.layers[other]._parameters.get("weight") is weight for other, _ in calls)
                if weight is not None and id(weight) not in others and reads[id(weight)] > called:
                    raise UnsupportedModelError(
                        f"the weight of layer {name!r} is used outside the layer's calls, where units get no gain; use "
                        "a layer with its own weight there"
                    )
        return [name for name in self.layers if name in hidden]


def readers(model: nn.Module, input_shape: Sequence[int]) -> dict[str, nn.Module]:
    """Map each hidden layer of a row of blocks, by name, to the layer that reads it; its columns are the units in order.

    Raises:
        UnsupportedModelError: the model is not such a row, or a column does not belong to one unit; names a layer.
    """
    _, row = blocks(model, input_shape)
    for block, following in pairwise(row):
        shape, reads = geometry(block.layer), geometry(following.layer)
        units = len(as_matrix(shape, weight_now(block.layer)))
        columns, seen = weight_now(following.layer).shape[1], math.prod(block.shape)
        is_odd = any(each is not None and (each.transposed or each.groups > 1) for each in (shape, reads))
        if is_odd or columns != (units if reads else seen) or (shape is None and seen != units):
            raise UnsupportedModelError(
                f"which weights of layer {following.name!r} are the outgoing ones of a unit of layer {block.name!r} is not "
                "known; use dense layers, convolutions without groups, and nn.Flatten between them, or weights='incoming'"
            )
    return {block.name: following.layer for block, following in pairwise(row)}


def _tensors(output: Any) -> list[Tensor]:
    return [part for part in torch.utils._pytree.tree_leaves(output) if isinstance(part, Tensor)]


def _reads(parts: list[Tensor]) -> Counter[int]:
    """How often the graph of these tensors reads each leaf."""
    reads, seen, waiting = Counter[int](), set[Node](), [part.grad_fn for part in parts]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            below = [other for other, _ in node.next_functions]
            reads.update(id(getattr(other, "variable")) for other in below if hasattr(other, "variable"))  # noqa: B009
            waiting.extend(below)
    return reads


def _note_call(calls: list[tuple[str, Node | None]], name: str, layer: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled():
        refuse_hidden(name)
    at = lasting(output) if isinstance(output, Tensor) else None
    calls.append((name, None if at is None else at[0]))


def _read_by_others(calls: list[tuple[str, Node | None]]) -> set[str]:
    """Names of the layers whose output reaches another call of a layer."""
    names = {node: name for name, node in calls if node is not None}
    hidden: set[str] = set()
    seen: set[Node] = set()
    waiting = [below for node in names for below, _ in node.next_functions]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in names:
            hidden.add(names[node])
        waiting.extend(below for below, _ in node.next_functions)
    return hidden


def _amplify(rule: Modulated, name: str, layer: nn.Module, args: Any, output: Any) -> Tensor | None:
    """Apply the gain at a layer's output during the rule's call.

    Raises:
        UnsupportedModelError: the layer was not called when the hidden layers were determined.
    """
    if not rule._learns:
        return None
    if name not in rule._seen:
        raise UnsupportedModelError(
            f"layer {name!r} was not called on the first batch, so whether its units are hidden is not known; begin with a "
            "batch, or a model in evaluation mode, that calls every layer"
        )
    if name not in rule._gains:
        return None
    if not torch.is_grad_enabled():
        refuse_hidden(name)
        return None
    if not output.requires_grad:
        return None
    compiling = torch.compiler.is_compiling()
    if not (computes_plainly(layer) and (compiling or output.grad_fn.name() in UNKEPT)):
        output = output.clone()  # which an activation in a forward method, or a hook, may have kept
    with aside() if is_checkpointed() else nullcontext():
        return gain_on(output, rule._gains[name])
