"""What one update depends on, and after how many products: the flow of data through a step, operation by operation.

Every tensor carries a :class:`Trace`. An operation joins the traces of what it reads; a product (matrix product,
convolution) is one step in depth; everything else is free. Depth is therefore time on hardware that computes each layer at
once. Memory is the identity of a tensor: a view has the trace of its base, and what is written in place joins it.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apical.diagnostics.cost import of_operation
from apical.diagnostics.synapses import Weights, factors


class Trace(NamedTuple):
    """Where a tensor comes from.

    Attributes:
        depth: products on the longest way to it from anything given.
        inputs: depends on the inputs.
        targets: depends on the targets.
        layers: layers whose forward response it depends on.
        earliest: products on the shortest way from the output error (the first values that depend on both the model's output
            and the targets); None if it does not depend on that.
        latest: the same on the longest way.
    """

    depth: int = 0
    inputs: bool = False
    targets: bool = False
    layers: frozenset[str] = frozenset()
    earliest: int | None = None
    latest: int | None = None


NOTHING = Trace()


def joined(traces: Iterable[Trace], steps: int, output: str) -> Trace:
    """Return the trace of what an operation of `steps` products makes from tensors with these traces.

    >>> error = joined([Trace(3, inputs=True, layers=frozenset({"last"})), Trace(targets=True)], 0, "last")
    >>> joined([error, Trace()], 1, "last").latest
    1
    """
    traces = list(traces)
    depth = max((trace.depth for trace in traces), default=0) + steps
    layers = frozenset().union(*(trace.layers for trace in traces))
    inputs, targets = any(trace.inputs for trace in traces), any(trace.targets for trace in traces)
    earliest = [trace.earliest for trace in traces if trace.earliest is not None]
    latest = [trace.latest for trace in traces if trace.latest is not None]
    if earliest:
        return Trace(depth, inputs, targets, layers, min(earliest) + steps, max(latest) + steps)
    if targets and output in layers:
        return Trace(depth, inputs, targets, layers, 0, 0)
    return Trace(depth, inputs, targets, layers)


class Dataflow(TorchDispatchMode):
    """Records one step of a rule while it is active; keep the step small, every tensor stays alive.

    Args:
        weights: of the layers, by name, in the order of execution.
        inputs: of the batch.
        targets: of the batch.
        flipped: names of weights that are held as (n_in, n_out).

    Attributes:
        responses: number of forward responses of each layer.
        operands: tensors that were multiplied with something that depends on the targets, and are no forward response: what
            carries feedback. They are fixed (not made from inputs or targets), or weights with changes to their entries.
        multiply_adds: of all products.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, flipped: Collection[str] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights, self.last = Weights(weights, flipped), list(weights)[-1]
        self.traces: dict[int, Trace] = {}
        self.alive: list[Tensor] = []
        self.responses = dict.fromkeys(weights, 0)
        self.operands: list[Tensor] = []
        self._weight_like = {weight.untyped_storage()._cdata for weight in weights.values()}
        self.multiply_adds = 0
        self._write(inputs, Trace(inputs=True))
        self._write(targets, Trace(targets=True))

    def trace(self, tensor: Tensor) -> Trace:
        """Return where the tensor comes from."""
        return self.traces.get(tensor.untyped_storage()._cdata, NOTHING)

    def made(self, tensor: Tensor) -> bool:
        """Return whether the step made the tensor, or wrote to it."""
        return tensor.untyped_storage()._cdata in self.traces

    def _write(self, tensor: Tensor, trace: Trace) -> None:
        self.traces[tensor.untyped_storage()._cdata] = trace
        self.alive.append(tensor)  # or its memory, the key, would be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and trace it."""
        kwargs = kwargs or {}
        if func.__name__.startswith("_foreach_"):
            return self._each(func, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        places = factors(func, args)
        trace = joined([self.trace(tensor) for tensor in given], int(bool(places)), self.last)
        uses = self.weights.uses(func, args)
        for use in uses:
            if use.forward:
                self.responses[use.name] += 1
                trace = trace._replace(layers=trace.layers | {use.name})
        if places:
            self._note(args, places, {use.place for use in uses if use.forward})
            self.multiply_adds += of_operation(func, args, kwargs, result)
        else:
            shapes = {tensor.shape for tensor in given if tensor.untyped_storage()._cdata in self._weight_like}
            self._weight_like |= {tensor.untyped_storage()._cdata for tensor in results if tensor.shape in shapes}
        before = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in results:
            if tensor.untyped_storage()._cdata not in before:
                self._write(tensor, trace)
        for tensor in _written(func, args, kwargs):
            self._write(tensor, trace)
        return result

    def _each(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on lists, counted separately for every place in them."""
        result = func(*args, **kwargs)
        lists = [value for value in args if isinstance(value, (list, tuple))]
        alone = [self.trace(value) for value in args if isinstance(value, Tensor)]
        for place, tensor in enumerate(lists[0] if result is None else result):  # None: in place
            parts = [items[place] for items in lists if len(items) > place]
            traces = [self.trace(part) for part in parts if isinstance(part, Tensor)]
            self._write(tensor, joined([*traces, *alone], 0, self.last))
        return result

    def _note(self, args: tuple[Any, ...], places: tuple[int, ...], forward: set[int]) -> None:
        for place, other in zip(places, reversed(places), strict=True):
            factor = args[place]
            if place in forward or not isinstance(factor, Tensor) or not isinstance(args[other], Tensor):
                continue
            fixed = not (self.trace(factor).inputs or self.trace(factor).targets)
            carries = fixed or factor.untyped_storage()._cdata in self._weight_like
            if carries and self.trace(args[other]).targets and min(factor.shape[-2:]) > 1:
                self.operands.append(factor.detach())


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that the operation writes to."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return written


def recorded(
    rule: Any, weights: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, flipped: Collection[str] = ()
) -> Dataflow:
    """Return the flow of one step of a rule, forward and backward; `.grad` is cleared before and holds the gradients."""
    rule.zero_grad()
    flow = Dataflow(weights, inputs, targets, flipped)
    with flow:
        rule.accumulate(inputs, targets)
    return flow
