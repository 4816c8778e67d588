"""Models as a row of blocks.

A block is what lies between two populations whose activities a rule reads: a weighted layer with the modules that shape its
input (flattening, upsampling) and those that follow it (normalisation, activation, pooling); or a whole module with skips.
Unlike the stages of :mod:`apical.core.chain`, a block need not be affine and then elementwise; autograd computes its
derivative.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.activations import is_activation
from apical.core.batch import require_shape
from apical.core.called import Call
from apical.core.chain import example_of, require_affine_type, traced
from apical.core.chain import through as through
from apical.core.layers import Layer, is_known_in_row, is_own, is_weighted, shapes_input
from apical.core.rest import evaluating, undisturbed
from apical.core.units import enumerated, leaves, weighted_layers
from apical.errors import UnsupportedModelError


@dataclass(frozen=True)
class Block:
    """One block of a row.

    Attributes:
        name: module name of the weighted layer, or of the module that holds skips.
        layer: the layer; with skips, the first one.
        modules: all modules of the block in order.
        input_shape: of one sample.
        shape: of one sample's output.
        image: shape of the output before flattening, if the block ends with that; otherwise `shape`.
        seen: shape of the first image that the block's leading modules make from a flat input; otherwise `input_shape`.
    """

    name: str
    layer: Layer
    modules: tuple[nn.Module, ...]
    input_shape: tuple[int, ...]
    shape: tuple[int, ...]
    image: tuple[int, ...]
    seen: tuple[int, ...]

    def __call__(self, activity: Tensor) -> Tensor:
        """(batch, *input_shape) -> (batch, *shape)."""
        return through(self.modules, activity)

    def require_shape(self, made: Tensor) -> None:
        """Refuse an output of another shape than the block was made for, for rules that depend on sizes.

        Args:
            made: the block's output (batch, ...).

        Raises:
            UnsupportedModelError: names the layer.
        """
        require_shape(self.name, made, self.shape)

    @property
    def like(self) -> Tensor:
        """Parameter of the layer, for its dtype and device: a computed weight has another dtype under autocast."""
        own = next((parameter for parameter in self.layer._parameters.values() if parameter is not None), None)
        return next(self.layer.parameters()) if own is None else own

    @property
    def tail(self) -> tuple[nn.Module, ...]:
        """The modules after the layer."""
        return self.modules[self.modules.index(self.layer) + 1 :]


def blocks(
    model: nn.Module, input_shape: Sequence[int] | None = None, *, skips: bool = False
) -> tuple[list[nn.Module], list[Block]]:
    """Return the modules before the first weighted layer, and the blocks, in the order in which the model calls them.

    Args:
        model: the network; it is not changed, only run on zeros.
        input_shape: shape of one sample; required for convolutions, whose sizes depend on it.
        skips: treat a module that is not a row inside (such as a residual block) as one block, with what follows it.

    Raises:
        UnsupportedModelError: the model is not such a row, or a module does not fit in one; the message names it.
    """
    layers = weighted_layers(model, exact=None)
    example = example_of(layers, input_shape)
    whole = branching(model, example) if skips else {}
    within = {part: name for name, module in whole.items() for part in module.modules()}
    for name, module in leaves(model):
        if module in within:
            continue
        if is_weighted(module):
            require_affine_type(name, module)
        if is_own(module) and not (is_weighted(module) or is_activation(module) or is_known_in_row(module)):
            raise UnsupportedModelError(
                f"module {name!r} ({type(module).__name__}) has no place in a row of blocks; replace it"
            )
    calls = traced(model, example, whole)
    places = [i for i, call in enumerate(calls) if is_weighted(call.module) or call.name in whole]
    names = [calls[i].name for i in places]
    required = list(dict.fromkeys(within.get(layer, name) for name, layer in layers.items()))
    if uncalled := [name for name in required if name not in names]:
        raise UnsupportedModelError(f"{enumerated('layer', uncalled, 'was', 'were')} not called; remove unused layers")
    kind = _precision(next(iter(layers.values())))
    if odd := next((name for name, layer in layers.items() if _precision(layer) != kind), None):
        raise UnsupportedModelError(
            f"layer {odd!r} has a different precision from the layers before it; use one precision for all"
        )
    starts = [_start(calls, place) for place in places]
    starts[0] = next(i for i, call in enumerate(calls) if list(call.module.parameters()))  # before, the input is prepared
    ends = [*starts[1:], len(calls)]
    head = [call.module for call in calls[: starts[0]]]
    own = {id(layer) for layer in layers.values()}
    return head, [_block(calls[start:end], own) for start, end in zip(starts, ends, strict=True)]


@torch.no_grad()
def branching(model: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """Return the outermost modules with weights, except the model itself, that do more than call their children in sequence.

    Args:
        model: the network; it is not changed.
        example: a batch of its inputs.
    """
    from apical.core.wrappers import uncompiled

    atoms = {part for _, leaf in leaves(model) for part in leaf.modules()}
    names = {module: name for name, module in model.named_modules()}
    waiting: list[list[Call]] = [[]]  # calls made so far by each module whose forward is running
    found: dict[str, nn.Module] = {}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        waiting.append([])

    def leave(module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
        inner, given = waiting.pop(), args[0] if len(args) == 1 else None
        waiting[-1].append(Call(names[module], module, given, made, 0, 0))  # type: ignore[arg-type]
        steps = [given, *(call.made for call in inner)]
        row = all(call.given is before for call, before in zip(inner, steps, strict=False)) and steps[-1] is made
        if module is not model and module not in atoms and not row and next(module.parameters(), None) is not None:
            found[names[module]] = module

    containers = [module for module in names if module not in atoms or any(module is leaf for _, leaf in leaves(model))]
    hooks = [module.register_forward_pre_hook(enter) for module in containers]
    hooks += [module.register_forward_hook(leave) for module in containers]
    try:
        with evaluating(model), undisturbed(model), uncompiled(model):
            model(example.clone())
    except Exception:
        return {}  # tracing will report the error
    finally:
        for hook in hooks:
            hook.remove()
    inside = {part for module in found.values() for part in module.modules() if part is not module}
    return {name: module for name, module in found.items() if module not in inside}


def _start(calls: Sequence[Call], place: int) -> int:
    """Return where the block of the layer at `place` starts: at the leading modules directly before it."""
    while place and shapes_input(calls[place - 1].module):
        place -= 1
    return place


def _precision(layer: nn.Module) -> torch.dtype:
    """Return the dtype in which a layer's weight is stored; a weight computed by a hook may still have an earlier one."""
    own = layer._parameters.get("weight")
    return (next(layer.parameters()) if own is None else own).dtype


def _block(calls: Sequence[Call], layers: set[int]) -> Block:
    place, layer = next((call, part) for call in calls for part in call.module.modules() if id(part) in layers)
    assert is_weighted(layer)
    if (own := _precision(layer)) != calls[-1].made.dtype:
        raise UnsupportedModelError(
            f"layer {place.name!r} ({type(place.module).__name__}) stores its weight as {own}, but its block outputs "
            f"{calls[-1].made.dtype}; store the weight in that type, or use another rule"
        )
    given, made = tuple(calls[0].given.shape[1:]), tuple(calls[-1].made.shape[1:])
    last = calls[-1]
    return Block(
        place.name,
        layer,
        tuple(call.module for call in calls),
        given,
        made,
        tuple(last.given.shape[1:]) if isinstance(last.module, nn.Flatten) else made,
        tuple(calls[0].made.shape[1:]) if isinstance(calls[0].module, nn.Unflatten) else given,
    )
