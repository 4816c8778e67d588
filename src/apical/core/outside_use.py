"""What a model does with its layers outside their calls, where no feedback can be attached: multiply, and differentiate."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from apical.errors import UnsupportedModelError

PRODUCTS = {
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner", "einsum", "tensordot"),
    *("addmm", "addmv", "addbmm", "baddbmm"),
    *(f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)),
}
"""Names of the functions by which an error passes from one population to another."""

DERIVATIVES = ("grad", "backward")
"""Names of the functions that differentiate (attributes of tensors are named "__get__")."""


class OutsideUse(TorchFunctionMode):
    """Stands in for a rule during one forward pass, and looks at what happens to weights outside the layers' own calls.

    Args:
        rule: takes the layers' calls.
        model: what is called.
        weights: each layer's weight in this pass.
    """

    def __init__(self, rule: Any, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rule, self.inside = rule, 0
        self.own = {id(parameter) for parameter in model.parameters()}
        self.strange: str | None = None  # a product with a parameter that is not among these
        self.found: dict[str, str] = {}  # layers, and the first function that used their weight outside
        self.made = {id(weight): (name, weight) for name, weight in weights.items()}  # weights and their functions
        self.calls: dict[Node, str] = {}  # of layers, by what made their output

    def call_layer(self, site: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layer under the rule; what it uses within is not outside."""
        from apical.core.graph import lasting  # at the first batch alone

        self.inside += 1
        try:
            output = self.rule.call_layer(site, *args, **kwargs)
            if not torch.compiler.is_dynamo_compiling():  # a part of the model that is compiled, as is seen elsewhere
                self.calls |= {at[0]: site.name for part in _tensors((output,)) if (at := lasting(part)) is not None}
            return output
        finally:
            self.inside -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and getattr(func, "__name__", "") in DERIVATIVES:
            refuse_derivatives(func, args, self.calls)
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            tensors = list(_tensors((*args, *(kwargs or {}).values())))
            strangers = [t for t in tensors if isinstance(t, nn.Parameter) and t.requires_grad and id(t) not in self.own]
            self.made |= {id(t): ("", t) for t in strangers if id(t) not in self.made}
            names = [self.made[id(tensor)][0] for tensor in tensors if id(tensor) in self.made]
            activities = any(tensor.requires_grad for tensor in tensors if id(tensor) not in self.made)
            if names and activities and getattr(func, "__name__", "") in PRODUCTS:
                if names[0]:
                    self.found.setdefault(names[0], func.__name__)
                else:
                    self.strange = self.strange or func.__name__
            if names and not activities:
                self.made |= {id(tensor): (names[0], tensor) for tensor in _tensors((result,))}
        return result

    def report(self) -> None:
        """Refuse a weight that was used outside; afterwards, since an operator would take the error for its own.

        Raises:
            UnsupportedModelError: names the layer and the function.
        """
        if self.strange:
            raise UnsupportedModelError(
                f"the model multiplies activities by a parameter that is not among model.parameters() ({self.strange}), "
                "where the error would pass through the weight itself; register its module (nn.ModuleList in place of a "
                "list), or give it requires_grad_(False) if it should stay fixed"
            )
        if not self.found:
            return
        exact, by = tuple(self.found), ", ".join(dict.fromkeys(self.found.values()))
        whose = f"weight of layer {exact[0]!r} is also used outside the layer"
        if len(exact) > 1:
            whose = f"weights of layers {', '.join(map(repr, exact))} are also used outside the layers"
        raise UnsupportedModelError(
            f"the {whose}, by {by}, where the error would pass through the weight itself; use a separate layer there, or "
            f"pass exact={exact!r}"
        )


class _Plainly:
    def call_layer(self, site: Any, *args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            refuse_transformed(site, args, kwargs)
        return site.forward(*args, **kwargs)


def fault_of(rule: Any, inputs: Tensor) -> str:
    """Return what :class:`OutsideUse` refuses of a model, or "", from a pass without the rule; for graphs being compiled.

    The compiler calls it when it makes a graph, and not when it runs one.
    """
    from apical.core.rest import undisturbed  # compiled rules alone need it

    watch, layers = (
        OutsideUse(_Plainly(), rule.model, rule._weights_in({})),
        [*rule._sites.values(), *rule._bundles.values()],
    )
    try:
        for wrapped, site in layers:
            wrapped.rule, wrapped.site = watch, site
        with undisturbed(rule.model), torch.enable_grad(), watch:
            rule.model(inputs)
        watch.report()
    except UnsupportedModelError as error:
        return str(error)
    except Exception:  # the graph will have it too
        return ""
    finally:
        for wrapped, _ in layers:
            wrapped.rule = wrapped.site = None
    return ""


fault_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch.compiler.assume_constant_result does


def refuse(fault: str) -> None:
    """Refuse what :func:`fault_of` says; not in a graph, where an error would only end it.

    Raises:
        UnsupportedModelError: there is a fault.
    """
    raise UnsupportedModelError(fault)


refuse._torchdynamo_disable = True  # type: ignore[attr-defined]  # what the compiler looks for


def refuse_derivatives(function: Any, args: tuple[Any, ...], calls: Mapping[Node, str], has_cuts: bool = False) -> None:
    """Refuse a model that differentiates through its own layers on its way forward: a rule sends down something else there.

    Args:
        function: what the model calls, with which positional arguments.
        calls: layers, by the node of autograd's graph that made their output.
        has_cuts: units' outputs have no past there, so that nothing is derived with respect to them.

    Raises:
        UnsupportedModelError: names the layer.
    """
    if getattr(function, "__name__", "") not in DERIVATIVES:
        return
    waiting = [tensor.grad_fn for tensor in _tensors(args[:1]) if tensor.grad_fn is not None]
    ends = _tensors(args[1:2]) if function.__name__ == "grad" and not has_cuts else ()  # what it derives with respect to
    seen = {tensor.grad_fn for tensor in ends}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if node in calls:
            raise UnsupportedModelError(
                f"the model takes a derivative through layer {calls[node]!r} in its own forward pass "
                f"({function.__name__}), but what a rule propagates there is not a derivative; use Backprop, or "
                f"{'FeedbackAlignment with' if has_cuts else 'pass'} exact=({calls[node]!r},)"
            )
        seen.add(node)
        waiting += [below for below, _ in node.next_functions if below is not None]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def refuse_mapped(unit: str) -> None:
    """Refuse a unit inside a transform of `torch.func` that the model calls: one call stands there for all samples."""
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedModelError(
            f"the unit at {unit!r} ends inside a transform of torch.func (vmap, grad), where signals cannot be assigned "
            "to samples; call the transform's function on the batch itself"
        )


def refuse_transformed(site: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a layer inside a transform of `torch.func` that the model calls: its input tells of no error there.

    A layer without feedback (the first) may stay where what the transform was given needs no error.

    Raises:
        UnsupportedModelError: names the layer.
    """
    if site.swap is not None or any(_needs_error(t) for t in _tensors((*args, *kwargs.values()))):
        raise UnsupportedModelError(
            f"the model calls layer {site.name!r} inside a transform of torch.func (vmap, grad), where no feedback can "
            f"be attached to it; call it on the batch itself, or pass exact=({site.name!r},)"
        )


def _needs_error(tensor: Tensor) -> bool:
    while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad
