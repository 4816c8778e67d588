"""Which modules of a model a rule treats as layers, found and validated before anything is changed."""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal, cast

import torch
from torch import nn

from apical.core.activations import is_activation
from apical.core.layers import Layer as Layer
from apical.core.layers import is_local, is_packed, is_registered, is_weighted
from apical.errors import UnsupportedModelError

TAKEN = frozenset({*dir(nn.ParameterDict), *dir(nn.ModuleDict)})
"""Names that cannot be keys: attributes of the containers that hold tensors by name."""


def key(name: str) -> str:
    """Return the module name as a key of a buffer or submodule: dots are not allowed there, and the root has no name.

    >>> key("layer1.0.conv1"), key(""), key("values")
    ('layer1/0/conv1', 'model', 'values/')
    """
    made = name.replace(".", "/") or "model"
    return f"{made}/" if made in TAKEN else made


def weighted_layers(
    model: nn.Module,
    exact: Collection[str] | None = (),
    shared: bool = False,
    packed: Literal["refused", "parts", "whole"] = "refused",
    sites: Collection[str] | None = (),
) -> dict[str, Layer]:
    """Return all weighted layers of the model by name, in registration order.

    Parameters of a parametrisation, and of other modules inside a weighted layer, belong to that layer.

    Args:
        model: the network; it is only read.
        exact: names of modules or parameters that shall keep their exact derivative although no rule knows them; None for
            rules without this option.
        shared: whether a module may be registered under several names (it counts once, under the first), and layers may
            share a parameter.
        packed: modules that apply several weights within one call (attention, recurrent networks) are no layers a rule
            knows; or their weights count as layers, one by one (:class:`apical.core.packed.Part`); or they count as one.
        sites: full names of parameters of a user's modules that count as layers (parts) too; None for rules without this
            option.

    Raises:
        ConfigError: see :func:`apical.core.packed.own_parts`.
        UnsupportedModelError: a module used under two names, a parameter shared by two modules, an orphan parameter,
            an unknown layer with parameters, complex parameters, an unknown name in `exact`, or no weighted
            layer at all. Every offender is named.
    """
    _check_names(model, exact or ())
    layers: dict[str, Layer] = {}
    names: dict[nn.Module, str] = {}
    inside: set[nn.Module] = set()
    owner: dict[int, str] = {}
    own_sites = _own_sites(model, sites)
    faults = Faults()
    exempt = {m for name, m in model.named_modules(remove_duplicate=False) if _is_exact(name, exact)} if shared else set()
    for name, module in model.named_modules(remove_duplicate=shared):
        weighted = next(module.parameters(), None) is not None
        if weighted and names.setdefault(module, name) != name:
            faults.doubles[name] = names[module]
            continue
        if _is_exact(name, exact) or module in exempt:
            continue
        own = {
            _joined(name, p): q for p, q in module.named_parameters(recurse=False) if _joined(name, p) not in (exact or ())
        }
        if any(parameter.is_complex() for parameter in own.values()):
            faults.complex.append(name)
            continue
        for full, parameter in own.items():
            if owner.setdefault(id(parameter), full) != full and not shared:
                faults.tied[full] = owner[id(parameter)]
        for full in [name for name in own if name in own_sites]:
            layers[full] = own_sites[full]
            del own[full]
        if is_weighted(module) and module not in inside:
            layers[name] = module
            inside |= _belonging(module)
        elif packed != "refused" and is_packed(module) and module not in inside:
            from apical.core.packed import full_name, parameter_names, parts_of

            inside |= set(module.modules())
            parts = {full_name(name, part): its for part, its in parts_of(module).items()}
            strange = [full for full in own if full.removeprefix(f"{name}.") not in parameter_names(module)]
            if strange:
                faults.orphans |= dict.fromkeys(strange, type(module).__name__)
            layers |= cast(dict[str, Layer], parts if packed == "parts" else {name: module})
        elif None in (exact, sites) and isinstance(module, torch.jit.ScriptModule):  # on which these rules put hooks
            faults.scripted[name] = module
        elif is_local(module) or is_activation(module):
            inside |= _belonging(module)
        elif own and module not in inside:
            faults.add(name, module, own)
            if packed == "parts" and sites is not None:
                faults.matrices += [full for full, q in own.items() if q.dim() == 2 and full in faults.orphans]
    faults.report(advises_exact=exact is not None)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no Linear or convolution layer to assign credit to")
    return layers


def _own_sites(model: nn.Module, sites: Collection[str] | None) -> dict[str, Layer]:
    """Return what a rule knows of parameters of a user's modules."""
    if not sites:
        return {}
    from apical.core.packed import own_parts

    return cast(dict[str, Layer], own_parts(model, sites))


def _joined(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter


def _is_exact(name: str, exact: Collection[str] | None) -> bool:
    return any(name == e or name.startswith(f"{e}.") for e in exact or ())


def _belonging(layer: nn.Module) -> set[nn.Module]:
    """Return the modules inside a layer that are a part of it: parametrisations, and others but for layers of known kind.

    Everything inside a layer of a registered type belongs to it.
    """
    parametrisations = getattr(layer, "parametrizations", None)
    within = set(parametrisations.modules()) if isinstance(parametrisations, nn.Module) else set()
    whole = is_registered(layer)
    return within | {module for module in layer.modules() if module is not layer and (whole or not is_weighted(module))}


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return modules that compute, by name: layers and activations with all that is in them, and others without children."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if is_weighted(module) or is_local(module) or is_activation(module):
            inside.update(module.modules())
        elif next(module.children(), None) is not None:
            continue
        yield name, module


class Found:
    """The layers that a rule found in a model: of one that is put there later it knows nothing.

    Args:
        model: the network; it is only read.
        activations: the rule has hooks on these too.
    """

    def __init__(self, model: nn.Module, activations: bool = False) -> None:
        self.model, self.activations = model, activations
        self._layers = self._now()
        self._children = self._containers()
        self._weights = [
            (name, layer._parameters, own, weight.shape)
            for name, layer in self._layers.items()
            for own, weight in layer._parameters.items()
            if weight is not None and weight.dim() > 1
        ]
        owners: dict[int, int] = {}
        self._owners = [owners.setdefault(id(held[own]), place) for place, (_, held, own, _) in enumerate(self._weights)]

    def require_intact(self, rule: str) -> None:
        """Refuse layers that were put into the model, or taken out of it, since, and weights of another shape.

        Raises:
            UnsupportedModelError: names them.
        """
        if torch.compiler.is_compiling():
            intact = all(_are(held, children) for held, children, can_compile in self._children if can_compile)
        else:
            self.require_weights(rule)
            intact = all([*held.values()] == children for held, children, _ in self._children)
        if intact:
            return
        now = self._now()
        changed = [name for name in {**self._layers, **now} if self._layers.get(name) is not now.get(name)]
        if changed:
            raise UnsupportedModelError(
                f"{enumerated('module', changed, 'was', 'were')} added to the model, or removed from it, after {rule} "
                "was made; detach the rule, and make a new one"
            )
        self._children = self._containers()

    def require_weights(self, rule: str) -> None:
        """Refuse weights that have another shape than when the rule was made, or are shared since.

        Raises:
            UnsupportedModelError: names their layers.
        """
        others, places = [], dict[int, int]()
        for (name, held, own, shape), owner in zip(self._weights, self._owners, strict=True):
            weight = held.get(own)
            if weight is None:
                continue
            if weight.shape != shape:
                others.append(name)
            elif (first := places.setdefault(id(weight), owner)) != owner:
                raise UnsupportedModelError(
                    f"layers {self._weights[first][0]!r} and {name!r} share a weight that they did not share when {rule} "
                    "was made; detach the rule, and make a new one"
                )
        if others:
            raise UnsupportedModelError(
                f"{enumerated('layer', dict.fromkeys(others), 'has a weight', 'have weights')} of another shape than "
                f"when {rule} was made; detach the rule, and make a new one"
            )

    def _now(self) -> dict[str, nn.Module]:
        """Return the modules that compute with parameters the rule handles, or are activations that it looks at."""
        return {
            name: module
            for name, module in leaves(self.model)
            if (self.activations if is_activation(module) else next(module.parameters(), None) is not None)
            and not is_local(module)
        }

    def _containers(self) -> list[tuple[dict[str, nn.Module | None], list[nn.Module | None], bool]]:
        """Return the children of all other modules, as held and as they are, and whether a compiler may look at them.

        A layer may get parts (parametrisations). PyTorch compiles no recurrent modules.
        """
        inside = {part for _, leaf in leaves(self.model) for part in leaf.modules()}
        held = [module._modules for module in self.model.modules() if module not in inside]
        return [(own, [*own.values()], not any(isinstance(child, nn.RNNBase) for child in own.values())) for own in held]


def _are(held: Mapping[str, nn.Module | None], children: list[nn.Module | None]) -> bool:
    """Return whether a module holds these children; in words that a compiler follows and guards."""
    return len(held) == len(children) and all(a is b for a, b in zip(held.values(), children, strict=True))


def _check_names(model: nn.Module, exact: Collection[str]) -> None:
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    names |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unknown = [name for name in exact if name not in names]
    if unknown:
        raise UnsupportedModelError(f"exact names {_listed(unknown)}, but the model has no such module or parameter")


class Faults:
    """What keeps a model from being trained, all reported together.

    Attributes:
        doubles: names under which a module is registered again, and its first name; the outermost modules only.
        tied: names of parameters that are the same tensor as another, and that one's name.
        complex: names of modules with complex parameters.
        unknown: modules of PyTorch with parameters whose backward map is not known.
        several: modules that apply several weights within one call, where a rule takes none of these.
        scripted: modules that TorchScript has compiled.
        orphans: names of parameters outside layers, and the type that holds each.
        matrices: those of them that a rule with the option `sites` could lead the error through.
        dense: types that hold some of them and could be registered as layers, by their full names.
    """

    def __init__(self) -> None:
        self.doubles: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self.complex: list[str] = []
        self.unknown: dict[str, nn.Module] = {}
        self.several: dict[str, nn.Module] = {}
        self.scripted: dict[str, nn.Module] = {}
        self.orphans: dict[str, str] = {}
        self.matrices: list[str] = []
        self.dense: list[str] = []

    def add(self, name: str, module: nn.Module, own: Collection[str]) -> None:
        """Note a module with parameters that is no layer of known kind."""
        if is_packed(module):
            self.several[name] = module
        elif isinstance(module, torch.jit.ScriptModule):
            self.scripted[name] = module
        elif type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.ParameterList | nn.ParameterDict):
            self.unknown[name] = module
        else:
            kind = type(module)
            self.orphans |= dict.fromkeys(own, kind.__name__)
            from apical.core.own_dense import is_dense  # few models have such modules

            if f"{kind.__module__}.{kind.__qualname__}" not in self.dense and is_dense(module):
                self.dense.append(f"{kind.__module__}.{kind.__qualname__}")

    def report(self, *, advises_exact: bool) -> None:
        """Raise if there is any fault.

        Raises:
            UnsupportedModelError: names every offender, and the remedies.
        """
        parts = []
        doubles = {n: first for n, first in self.doubles.items() if n.rpartition(".")[0] not in self.doubles}
        if doubles:
            same = ", ".join(f"module {n!r} is the same object as module {first!r}" for n, first in doubles.items())
            parts.append(f"{same}; give each place its own module")
        if self.tied:
            same = ", ".join(f"parameter {n!r} is shared with {first!r}" for n, first in self.tied.items())
            parts.append(f"{same}; untie them: copy one to its own tensor")
        if self.complex:
            parts.append(
                f"{enumerated('module', self.complex, 'has', 'have')} complex parameters, but the rules' equations are "
                "for real ones; keep real and imaginary parts in separate layers, or train it by backpropagation"
            )
        if self.several:
            one = len(self.several) == 1
            what = f"{'module' if one else 'modules'} {_typed(self.several)} {'applies' if one else 'apply'} several weights"
            parts.append(
                f"{what} in one call, and this rule takes layers of one weight; use another rule, or replace "
                f"{'it' if one else 'them'}"
            )
        if self.unknown:
            kinds = _typed(self.unknown)
            one = len(self.unknown) == 1
            parts.append(
                f"{'layer' if one else 'layers'} {kinds} {'is' if one else 'are'} not supported: no feedback transport is "
                f"known for {'it; replace it' if one else 'them; replace them'}"
            )
        if self.scripted:
            parts.append(
                f"{enumerated('module', self.scripted, 'is', 'are')} compiled by TorchScript, which this rule cannot see "
                "into; give the rule the model that was scripted or traced, and compile it after training"
            )
        if self.orphans:
            kinds, one = ", ".join(dict.fromkeys(self.orphans.values())), len(self.orphans) == 1
            parts.append(
                f"{enumerated('parameter', self.orphans, 'is an orphan: it belongs', 'are orphans: they belong')} directly "
                f"to {kinds} and to no layer; move {'it' if one else 'them'} into a layer"
            )
        if not parts:
            return
        strange = (*self.several, *self.unknown, *self.orphans)
        if strange and advises_exact:
            one = len(strange) == 1
            parts[-1] += f", or pass exact={strange!r} to give {'it its' if one else 'them their'} exact derivative"
        if self.matrices:
            parts[-1] += (
                f", or pass sites={tuple(self.matrices)!r} where its module multiplies activities by it (n_out, n_in)"
            )
        parts += [
            f"{kind} is a dense layer, so its class can be registered: apical.register_layer({kind})" for kind in self.dense
        ]
        raise UnsupportedModelError("; ".join(parts))


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, names))


def _typed(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(f"{name!r} ({type(module).__name__})" for name, module in modules.items())


def enumerated(noun: str, names: Collection[str], singular: str, plural: str) -> str:
    """Names as a subject, with its verb: "layers 'a' and 'b' were"."""
    return f"{noun} {_listed(names)} {singular}" if len(names) == 1 else f"{noun}s {_listed(names)} {plural}"
