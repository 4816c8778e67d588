"""Feed-forward chains: models that are a sequence of weighted layers, each followed by an elementwise activation.

    v_i = W_i r_{i-1} + b_i,   r_i = phi_i(v_i),   i = 1..L,   r_0 = input

Rules whose equations describe the whole chain (feedback control, targets, equilibria) need it as a list of stages. The list
is obtained by running the model once and recording the input of each module, so it works for any `nn.Module` whose modules
pass their outputs from one to the next.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.activations import is_activation, is_elementwise, itself, plain
from apical.core.affine import affine, looked_at, original, require_affine, require_unhooked
from apical.core.batch import require_samples, require_shape
from apical.core.called import Call, Functions, not_run, on_path
from apical.core.containers import Containers, is_written
from apical.core.layers import (
    Layer,
    computes_plainly,
    is_affine,
    is_hooked,
    is_linear,
    is_maximum,
    is_own,
    is_pool,
    is_random,
    is_weighted,
    refuse_backward_hooks,
    runs_own_forward,
)
from apical.core.rest import kept_states, undisturbed
from apical.core.transport import geometry, pads_itself, transport
from apical.core.units import enumerated, leaves, weighted_layers
from apical.errors import ApicalError, UnsupportedModelError

FEW_OUTPUTS = 64
"""Maximum number of outputs of a small chain."""


def through(modules: Iterable[Callable[[Tensor], Tensor]], activity: Tensor) -> Tensor:
    """Apply modules, or blocks, one after another to an activity (batch, ...)."""
    for module in modules:
        activity = module(activity)
    return activity


@dataclass(frozen=True)
class Stage:
    """One layer of a chain: `v = after(layer(before(r_previous)))`, `r = activation(v)`.

    Attributes:
        name: module name of the weighted layer.
        layer: the layer, or a plain one of its effective weight (:mod:`apical.core.affine`).
        before: linear modules without parameters between the last activation and the layer.
        activation: elementwise and not in place; `nn.Identity()` if the model has none.
        shape: shape of v for one sample.
        input_shape: shape of the stage's input for one sample.
        after: pooling between layer and activation; empty unless the chain allows it.
    """

    name: str
    layer: Layer
    before: tuple[nn.Module, ...]
    activation: nn.Module
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    after: tuple[nn.Module, ...] = ()

    @property
    def size(self) -> int:
        """Number n_i of neurons."""
        return math.prod(self.shape)

    @property
    def is_dense(self) -> bool:
        """Whether the stage is one matrix: a Linear layer on vectors."""
        return len(self.before) + len(self.after) == 0 and isinstance(self.layer, nn.Linear) and len(self.input_shape) == 1

    @property
    def bends(self) -> bool:
        """Whether pooling next to the layer is non-linear: its derivative differs for every input."""
        return not all(map(is_linear, (*self.before, *self.after)))

    def seen(self, rates: Tensor) -> Tensor:
        """Return the input of the layer itself (batch, ...), for the stage's input `rates` (batch, *input_shape)."""
        return through(self.before, rates)

    def pooled(self, a: Tensor) -> Tensor:
        """Return v (batch, *shape) for the layer's output."""
        return through(self.after, a)

    def potential(self, rates: Tensor) -> Tensor:
        """Return v (batch, *shape) for the stage's input (batch, *input_shape)."""
        return self.pooled(self.layer(self.seen(rates)))

    def linear(self, rates: Tensor, added: Tensor | None = None) -> Tensor:
        """Return `W rates`, without the bias, plus `added`: (batch, *input_shape) -> (batch, *shape)."""
        weight = self.layer.weight
        if self.is_dense:
            return rates @ weight.T if added is None else torch.addmm(added, rates, weight.T)
        rates = self.seen(rates)
        if isinstance(self.layer, nn.Linear):
            result = F.linear(rates, weight)
        else:
            result = self.layer._conv_forward(rates, weight, None)
        return result if added is None else result + added

    def transposed(self, rows: Tensor) -> Tensor:
        """Return `rows W`: (rows, n_i) -> (rows, n_{i-1}), both flat; not with pooling in `after`, nor if :attr:`bends`."""
        assert not self.after
        assert not self.bends  # the derivative would depend on the input
        weight = self.layer.weight
        if self.is_dense:
            return rows @ weight
        delta = rows.reshape(len(rows), *self.shape)
        if len(self.before) == 0 and not pads_itself(self.layer):
            template = delta.new_empty(len(rows), *self.input_shape)
            return transport(geometry(self.layer), delta, weight, template).flatten(1)
        pull = torch.func.vjp(self.linear, delta.new_zeros(len(rows), *self.input_shape))[1]
        pulled: Tensor = pull(delta)[0]
        return pulled.flatten(1)


class States(NamedTuple):
    """One pass through a chain: `v[i]` and `r[i + 1]` belong to stage i, `r[0]` is the input; each (batch, *shape)."""

    v: list[Tensor]
    r: list[Tensor]

    def rows(self, samples: Tensor | slice) -> "States":
        """Return the states of some samples."""
        return States([each[samples] for each in self.v], [each[samples] for each in self.r])


class Chain:
    """A model seen as a feed-forward chain of stages.

    Args:
        model: the network; it is not changed.
        input_shape: shape of one sample; required for convolutions, whose sizes depend on it.
        pools: whether to allow max-pooling anywhere, and any pooling between a layer and its activation. Only for rules
            that assume neither that `before` is linear nor that `after` is empty.
        dense: whether to refuse convolutions before anything else is checked.

    Raises:
        UnsupportedModelError: a module is not part of a chain, or the equations do not apply to it; the message names it.
    """

    def __init__(
        self, model: nn.Module, input_shape: Sequence[int] | None = None, *, pools: bool = False, dense: bool = False
    ) -> None:
        self.model, self.layers = model, weighted_layers(model, exact=None)
        odd = next((name for name, layer in self.layers.items() if dense and geometry(layer) is not None), None)
        if odd is not None:
            raise UnsupportedModelError(
                f"layer {odd!r} is a convolution, and this rule takes dense layers on vectors only; use another rule"
            )
        for name, module in leaves(model):
            _check_kind(name, module, pools=pools)
        example = example_of(self.layers, input_shape)
        calls = traced(model, example)
        for call in calls:
            if call.is_function:
                _check_kind(call.name, call.module, pools=pools)
        self.head, self.stages = _stages(calls, example, pools=pools)
        self._containers = Containers(model, [layer for layer in self.layers.values() if not computes_plainly(layer)])
        self._affine = [(stage.name, stage.layer, original(stage.layer)) for stage in self.stages]
        self._modules = [m for stage in self.stages for m in (*stage.before, stage.layer, *stage.after, stage.activation)]
        layers = {stage.layer for stage in self.stages}
        self._others = [(own, type(own).forward) for own in (original(m) for m in self._modules if m not in layers)]
        self._twins = [module for module in self._modules if module not in layers and "stands_for" in module.__dict__]
        unseen = [name for name in self.layers if name not in {stage.name for stage in self.stages}]
        if unseen:
            what = enumerated("layer", unseen, "was", "were")
            raise UnsupportedModelError(
                f"{what} not called in the forward pass; call modules that should learn, and remove the others"
            )

    @property
    def weights(self) -> list[Tensor]:
        """W_1..W_L."""
        return [stage.layer.weight for stage in self.stages]

    @property
    def like(self) -> Tensor:
        """A parameter of the first layer, for its dtype and device: a computed weight may have another dtype."""
        return next(original(self.stages[0].layer).parameters())

    @property
    def is_small(self) -> bool:
        """Whether each sample's Jacobian is cheap: dense layers and few outputs."""
        return all(stage.is_dense for stage in self.stages) and self.stages[-1].size <= FEW_OUTPUTS

    def enter(self, inputs: Tensor) -> Tensor:
        """Return the input of the first stage (batch, *input_shape).

        Raises:
            ConfigError: the batch is empty.
            UnsupportedModelError: a module no longer computes what it did when the chain was made.
        """
        require_samples(inputs)
        self._containers.require_intact(inputs, lambda x: through((*self.head, *self._modules), x))
        inputs = through(self.head, inputs)
        self._check(inputs)
        return inputs

    def _check(self, inputs: Tensor) -> None:
        """Refuse changes made after the chain was created: weights, forward methods, and hooks that change outputs."""
        hooked = False
        for name, layer, own in self._affine:
            require_affine(name, layer)
            hooked = hooked or is_hooked(own)
        for twin in self._twins:
            own = twin.__dict__["stands_for"]
            twin.__dict__.update((key, value) for key, value in own.__dict__.items() if key != "inplace")
        for module, run in self._others:
            if type(module).forward is not run or ("forward" in module.__dict__ and not runs_own_forward(module, run)):
                raise UnsupportedModelError(
                    f"module {self._name(module)} was given another forward or class after the rule was made; make it a "
                    "module class, and make the rule afterwards"
                )
            hooked = hooked or is_hooked(module)
        if not hooked or torch.compiler.is_compiling():
            return
        with kept_states(self._modules), torch.no_grad():
            for module in self._modules:
                require_unhooked(self._name(module), module, inputs)
                inputs = module(inputs)

    def _name(self, module: nn.Module) -> str:
        """Return the module's name and type for messages; activations may be copies that are not in place."""
        module = original(module)
        names = {id(own): name for name, own in self.model.named_modules()}
        return f"{names.get(id(module), '?')!r} ({type(module).__name__})"

    def run(self, inputs: Tensor) -> States:
        """Run the feed-forward pass, without gradient.

        Raises:
            ConfigError: the batch is empty.
            UnsupportedModelError: the samples do not have the shape that the chain was made for.
        """
        with torch.no_grad():
            v, r = [], [self.enter(inputs)]
            for stage in self.stages:
                v.append(stage.potential(r[-1]))
                require_shape(stage.name, v[-1], stage.shape)
                r.append(stage.activation(v[-1]))
        return States(v, r)


def example_of(layers: Mapping[str, Layer], input_shape: Sequence[int] | None) -> Tensor:
    """Return zeros for two samples (2, *input_shape), of the first layer's dtype: a single sample has no statistics.

    Raises:
        UnsupportedModelError: the shape is not given and cannot be inferred from the layers.
    """
    first = next(iter(layers.values()))
    if input_shape is None:
        if images := [name for name, layer in layers.items() if geometry(layer) is not None]:
            raise UnsupportedModelError(
                f"layer {images[0]!r} is a convolution: pass input_shape=(channels, ...) of one sample, on which the sizes "
                "of the layers depend"
            )
        input_shape = (looked_at(first).shape[1],)
    like = next(iter(first.parameters()))  # a weight computed by hooks may have an older dtype until the next call
    return torch.zeros(2, *input_shape, dtype=like.dtype, device=like.device)


def require_affine_type(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose type is known not to be an affine map.

    Raises:
        UnsupportedModelError: names the layer.
    """
    if not is_affine(layer):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(layer).__name__}) is not an affine map of its input, as this rule's equations "
            "require; backpropagation and the rules with feedback weights (fa, usf, kp, wm, pfa) train it"
        )


def _check_kind(name: str, module: nn.Module, *, pools: bool) -> None:
    """Refuse modules to which the equations do not apply, wherever they are in the model."""
    what = f"module {name!r} ({type(module).__name__})"
    if is_weighted(module):
        if (shape := geometry(module)) is not None and shape.transposed:
            raise UnsupportedModelError(f"{what}: transposed convolutions are not supported in a chain")
        require_affine_type(name, module)
        return
    if is_elementwise(module) or is_linear(module) or (pools and is_pool(module)):
        return
    if is_random(module):
        raise UnsupportedModelError(f"{what} makes the feed-forward pass random; remove it")
    if is_maximum(module) and not isinstance(module, nn.modules.pooling._AdaptiveMaxPoolNd):
        raise UnsupportedModelError(f"{what} is not linear; use average pooling or strides")
    if next(module.parameters(), None) is None and next(module.buffers(), None) is None and not is_own(module):
        return  # a container that calls functions: tracing shows whether it breaks the chain
    raise UnsupportedModelError(
        f"{what} is not supported in a chain of weighted layers and element-wise activations; remove it or use another rule"
    )


def traced(model: nn.Module, example: Tensor, whole: Mapping[str, nn.Module] | None = None) -> list[Call]:
    """Return the computing modules in the order in which the model calls them, each fed with the output of the one before.

    Layers run in evaluation mode; modules that contain others run once in each mode, to find differences in training.

    Args:
        model: the network; it is not changed.
        example: an example batch.
        whole: modules that count as one call each, by name, whatever they contain.

    Raises:
        UnsupportedModelError: the calls do not form a chain, depend on the mode, or draw random numbers.
    """
    for name, module in model.named_modules():
        refuse_backward_hooks(f"{name!r} ({type(module).__name__})", module)
    known: dict[str, nn.Module] = {}  # the modules that represent functions
    training, calls = (_traced(model, example.clone(), whole or {}, known, training=training) for training in (True, False))
    if [call.module for call in training] != [call.module for call in calls]:
        raise UnsupportedModelError(
            f"{type(model).__name__} calls different modules in training mode ({_names(training)}) and in evaluation "
            f"mode ({_names(calls)}); call the same ones in both"
        )
    names = [call.name for call in calls if is_weighted(call.module) or call.name in (whole or {})]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UnsupportedModelError(f"layer {twice!r} is called twice; use a separate layer for each call")
    return calls


def _names(calls: Sequence[Call]) -> str:
    return ", ".join(f"{call.name!r} ({call.module})" if call.is_function else repr(call.name) for call in calls)


@torch.no_grad()
def _traced(
    model: nn.Module, example: Tensor, whole: Mapping[str, nn.Module], known: dict[str, nn.Module], *, training: bool
) -> list[Call]:
    calls: list[Call] = []
    from apical.core.checkpointing import is_untrained
    from apical.core.wrappers import uncompiled

    functions = Functions(calls.append, known)
    written = [f"{name!r} ({type(module).__name__})" for name, module in model.named_modules() if is_written(module)]
    functions.where = f"the forward of {' or '.join(written)}" if written else functions.where
    hidden = {id(part) for module in whole.values() for part in module.modules()}
    names = {id(module): name for name, module in leaves(model) if id(module) not in hidden}
    names |= {id(module): name for name, module in whole.items()}
    given: tuple[Any, ...] = ()
    entered = 0

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal given, entered
        given, entered = args, args[0]._version if args and isinstance(args[0], Tensor) else 0
        functions.deep += 1
        if is_untrained(module.parameters()):
            raise UnsupportedModelError(
                f"the model runs module {names[id(module)]!r} without gradients (torch.no_grad), where this rule would "
                "train it; freeze its parameters instead: requires_grad_(False)"
            )

    def note(module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
        if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(made, Tensor):
            raise UnsupportedModelError(f"module {names[id(module)]!r} does not map one tensor to one tensor")
        functions.deep -= 1
        calls.append(Call(names[id(module)], module, given[0], made, entered, made._version))

    modes = [(module, module.training) for module in model.modules()]
    computing = [module for module in model.modules() if id(module) in names]
    inside = {id(part) for _, leaf in leaves(model) for part in leaf.modules()}
    hooks = [module.register_forward_pre_hook(enter, prepend=True) for module in computing]
    hooks += [module.register_forward_hook(note) for module in computing]
    try:
        with undisturbed(model):
            for module, _ in modes:
                module.training = training and id(module) not in inside
            before, chance = torch.get_rng_state(), random.getstate()
            with functions, torch.enable_grad(), uncompiled(model):
                output = model(example)
            is_drawn = not torch.equal(before, torch.get_rng_state()) or chance != random.getstate()
            random.setstate(chance)
    except ApicalError:
        raise
    except Exception as error:  # a user's forward may raise anything for a tensor that it was not written for
        raise not_run(example, error) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"the model's output is a {type(output).__name__}, and this rule needs one tensor; wrap the model in a module "
            "that returns it"
        )
    calls = on_path(calls, output)
    last, version, source = example, 0, "the model's input"
    for call in calls:
        if call.given is not last or call.entered != version:
            raise UnsupportedModelError(
                f"the input of {call.label} is not {source}{_instead(functions, call.given)}: a function, a sum or a "
                "branch lies between them, so the model is not a chain; build it as a sequence of modules, activations, "
                "flattening and pooling, or use another rule"
            )
        last, version, source = call.made, call.left, f"the output of {call.label}"
    if output is not last or output._version != version:
        raise UnsupportedModelError(
            f"the model's output is not {source}{_instead(functions, output)}: a function, a sum or a branch follows it, "
            "so the model is not a chain; turn functions into modules or move them into the loss, or use another rule"
        )
    if is_drawn:
        where = f"a module in {', '.join(map(repr, whole))}" if whole else type(model).__name__
        raise UnsupportedModelError(f"{where} draws random numbers in its forward pass; remove that")
    return calls


def _instead(functions: Functions, tensor: Tensor) -> str:
    """Say which function made a tensor, if one did."""
    maker = functions.maker(tensor)
    return "" if maker is None else f" but the result of {maker!r}"


def _acts(module: nn.Module) -> bool:
    """Return whether the module is an elementwise activation other than the identity."""
    return is_activation(module) and is_elementwise(module)


def _stages(calls: list[Call], example: Tensor, *, pools: bool) -> tuple[list[nn.Module], list[Stage]]:
    """Return the modules before the first layer, and the stages."""
    head: list[nn.Module] = []
    stages: list[Stage] = []
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    layer: Call | None = None
    start, made = example, example

    def finish(activation: nn.Module) -> None:
        nonlocal layer
        assert layer is not None
        shapes = tuple(made.shape[1:]), tuple(start.shape[1:])
        stages.append(Stage(layer.name, affine(layer.name, layer.module), tuple(before), activation, *shapes, tuple(after)))
        before.clear()
        after.clear()
        layer = None

    for call in calls:
        if is_weighted(call.module):
            if layer is not None:
                finish(nn.Identity())
                start = made
            layer, made = call, call.made
        elif layer is not None and pools and is_pool(call.module):
            after.append(call.module)
            made = call.made
        elif layer is not None and _acts(call.module):
            finish(itself(plain(call.module)))
            start = call.made
        elif isinstance(call.module, nn.Identity) and is_linear(call.module):
            continue
        elif not stages and layer is None:
            head.append(plain(call.module))
            start = call.made
        elif is_linear(call.module) or (pools and is_pool(call.module)):
            if layer is not None:
                finish(nn.Identity())
                start = made
            before.append(call.module)
        else:
            what = f"module {call.name!r} ({type(call.module).__name__})"
            if _acts(call.module):
                raise UnsupportedModelError(f"{what} does not follow a weighted layer directly; move it after one")
            raise UnsupportedModelError(
                f"{what} is not known to be linear or element-wise; replace it by modules of torch.nn, register it by "
                f"apical.register_activation({type(call.module).__name__}), or use another rule"
            )
    if layer is not None:
        finish(nn.Identity())
    if before:
        name = next(call.name for call in calls if call.module is before[0])
        raise UnsupportedModelError(
            f"module {name!r} ({type(before[0]).__name__}) follows the last weighted layer; end the model with a layer"
        )
    return head, stages
