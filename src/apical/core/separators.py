"""Units of several layers: where all errors on their way to some layers pass one tensor.

A separator is a tensor that every path from the model's output to every use of a parameter below it passes, so that no error
goes round a cut there: what comes behind a residual sum, the output of a block, an activation in a row of layers. Of
separators with the same layers below them the one nearest to the output ends the unit, as long as it has their shape: the
normalisation and the activation behind a layer belong to the unit that made what they act on, pooling does not.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor

from apical.core.cutting import Call, Cutting, Trace
from apical.core.graph import Graph, Vertex, vertex
from apical.core.separation import sites_of
from apical.errors import UnsupportedModelError

Kind = Literal["block", "sublayer", "micro"]
KINDS: tuple[str, ...] = get_args(Kind)


def ends(cutting: Cutting, trace: Trace, outputs: Iterable[Tensor], kind: str) -> list[str]:
    """Return the names of the modules and function calls at whose outputs units end.

    Args:
        cutting: of the model.
        trace: a pass without cuts.
        outputs: the model's, with their graph.
        kind: "block" takes separators at the output of a module that holds layers; the others take all.

    Raises:
        UnsupportedModelError: no separator exists, although the model has several weighted layers.
    """
    graph = Graph([at for at in map(vertex, outputs) if at is not None])
    weighted, others = sites_of(cutting, graph, trace)
    below = graph.separators([*weighted, *others], weighted)
    named = _names(trace, graph)
    groups: dict[int, list[Vertex]] = {}
    for at, layers in below.items():
        if at in named and layers.bit_count() < len(weighted):
            groups.setdefault(layers, []).append(at)
    if kind == "block":
        holds = {name for name in cutting.modules if any(_is_in(layer, name) for layer in cutting.layers)} | cutting.packed
        made = {call.at for call in trace.calls if call.kind == "module" and call.base.partition(":")[0] in holds}
        groups = {layers: group for layers, group in groups.items() if not made.isdisjoint(group)}
    if not groups and len(weighted) > 1:
        what = "after no module that holds layers" if kind == "block" else "nowhere between its layers"
        other = "sublayer" if kind == "block" else "auto"
        raise UnsupportedModelError(f"all errors of the model pass one tensor {what}; pass units={other!r}")
    found = []
    for group in groups.values():
        shape = named[group[-1]].shape
        found.append(next(at for at in group if named[at].shape == shape))
    calls = [named[at] for at in found if named[at].kind != "activation"]  # a cut already
    return [call.name if call.kind == "function" else call.base for call in calls]


def _is_in(layer: str, module: str) -> bool:
    return layer != module and (not module or layer.startswith(f"{module}."))


def _names(trace: Trace, graph: Graph) -> dict[Vertex, Call]:
    """Return a call for each tensor at which a unit could end; of a module that is called once, if there is one."""
    calls = [call for call in trace.calls if call.at in graph.children and call.kind != "layer"]
    uses: dict[str, int] = {}
    for call in calls:
        uses[call.base] = uses.get(call.base, 0) + (call.kind == "module")
    named: dict[Vertex, Call] = {}
    for call in sorted(calls, key=lambda call: _rank(call, uses[call.base])):
        if call.at is not None:
            named.setdefault(call.at, call)
    return named


def _rank(call: Call, uses: int) -> int:
    return (
        0 if call.kind == "activation" else 1 if call.kind == "module" and uses < 2 else 2 if call.kind == "function" else 3
    )
