"""Where to cut so that every weighted layer receives its own teaching signal, and no error bypasses a cut.

A model is cut at its activations. That does not part all layers: a residual stream passes activations by, a skip may be
taken before one, an activation may be a formula of the user's own. From one pass without cuts, autograd's graph tells which
layers an error reaches from two units, one above the other (round a cut), or through another layer's weight. For
each of them a unit ends at the last tensor that all paths from it pass before the next layer: a residual sum, a block's
output, the result of a formula, at worst the layer's own output. An activation within such a unit ends none.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apical.core.cutting import Call, Cutting, Pass, Trace, is_inside, is_part_of
from apical.core.graph import Graph, Reached, Vertex, reshapes, vertex
from apical.core.layers import computes_plainly, is_local
from apical.errors import UnsupportedModelError

Pattern = tuple[str, tuple[str, ...], bool]
"""A site's layer or parameter, the units whose errors reach it, and whether through another layer; without "#k"."""

PRODUCTS = tuple(
    f"{name}Backward0" for name in ("Addmm", "Mm", "Bmm", "Baddbmm", "Mv", "Addmv", "Dot", "Convolution", "Linear")
)
"""Nodes of products with weights."""

BY_INDEX = ("EmbeddingBackward0", "EmbeddingBagBackward0", "IndexBackward0", "IndexSelectBackward0")
LOOK_UPS = (*BY_INDEX, "SliceBackward0")
"""Nodes that make activities of a matrix by looking up some of its rows."""

OUTPUT = ""
"""Name of the unit of the model's output."""


class Separation(NamedTuple):
    """How a traced pass is to be cut.

    Attributes:
        units: names of the cuts, in the order of execution.
        patterns: how errors reach the sites then.
        paths: for each call of a weighted layer, the units whose errors reach it and a layer that they pass, or None.
        shares: for each cut, into how many parts averages above it divide an error.
        heard: for each cut, the weighted layers that receive it; if there are none, the parameters of other modules.
        sizes: of each cut's output, one sample; () where places may be many.
        idle: cuts on which the model's output does not depend: the model has detached what was made of them.
    """

    units: list[str]
    patterns: set[Pattern]
    paths: dict[str, list[tuple[list[str], str | None]]]
    shares: dict[str, float]
    heard: dict[str, frozenset[str]]
    sizes: dict[str, tuple[int, ...]]
    idle: set[str]


def base(name: str) -> str:
    """Return a call's name without its number.

    >>> base("cell.act#3")
    'cell.act'
    """
    return name.partition("#")[0]


def first_uses(separation: Separation) -> dict[str, str]:
    """Return units that are used again, as at each step of a recurrent network: for each, the first input of its size.

    An activation module that several layers share makes different units.
    """
    firsts: dict[Any, str] = {}
    heard, sizes = separation.heard, separation.sizes
    return {unit: firsts.setdefault((base(unit), heard.get(unit) or unit, sizes[unit]), unit) for unit in separation.units}


def separate(cutting: Cutting, trace: Trace, outputs: Iterable[Tensor], merges: bool, mends: bool) -> Separation:
    """Find the cuts of a traced pass; new ones are added to `cutting`.

    Args:
        merges: leave layers together that no activation parts.
        mends: cut where an error would go round the others; else refuse.

    Raises:
        UnsupportedModelError: names the layer, and the way round the cuts.
    """
    search = _Search(cutting, trace, [at for at in map(vertex, outputs) if at is not None])
    while True:
        reached = search.reached()
        layers = [
            at for at in search.weighted if reached.leaks(at) or (not merges and trace.is_merged(at, reached.merged[at]))
        ]
        astray = layers or [at for at in search.others if reached.leaks(at)]
        if not astray:
            return search.result(reached)
        if not mends or not search.mend(astray, reached):
            if all(map(search.is_spared, astray)):
                return search.result(reached)
            raise search.refusal(next(at for at in astray if not search.is_spared(at)), mends)


def verify(
    cutting: Cutting, done: Pass, outputs: Iterable[Tensor], patterns: set[Pattern], idle: Collection[str] = ()
) -> bool:
    """Return whether errors reach every site of a pass with cuts in a way known to be right; `idle` cuts have none."""
    if not cutting.beside.issuperset(_beside(cutting, [event.removeprefix("~") for event in done.events])):
        return False
    cuts = [cut for cut in done.cuts if cut.name not in idle]
    roots = {at: cut.name for cut in cuts if (at := vertex(cut.root)) is not None}
    output = [at for at in map(vertex, outputs) if at is not None]
    graph = Graph([*output, *roots])
    weighted, others = sites_of(cutting, graph, done)
    reached = graph.reach(output, roots, weighted)
    for at, name in (*weighted.items(), *others.items()):
        reach = reached.at(at)
        merged = at in weighted and done.is_merged(at, reach.merged)
        if merged and reach.merged is not None and is_inside(name, (weighted[reach.merged],)):
            merged = False  # a layer within another, which adds to it: the trace tells whether its weight is passed
        units = [OUTPUT if root is None else roots[root] for root in reach.roots]
        if not merged and name in cutting.packed and _are_own(units, name):
            continue  # one of several outputs, from which another is computed
        if (len(units) > 1 or merged) and _pattern(name, units, merged) not in patterns:
            return False
    return True


def _beside(cutting: Cutting, events: Iterable[str]) -> set[tuple[str, str]]:
    """Return activations without a unit, each with a layer that was called later: one of another output."""
    pairs, tail = set[tuple[str, str]](), list[str]()
    for event in events:
        if event in cutting.tail:
            tail.append(event)
        elif event in cutting.layers:
            pairs.update((activation, event) for activation in tail)
    return pairs


def _are_own(units: list[str], layer: str) -> bool:
    """Return whether all units end at outputs of one call of a layer with several."""
    return all(is_part_of(base(unit), layer) for unit in units) and len({unit.partition("#")[2] for unit in units}) == 1


def sites_of(cutting: Cutting, graph: Graph, done: Pass) -> tuple[dict[Vertex, str], dict[Vertex, str]]:
    """Return the sites in the graph: where weights multiply activities, and where other parameters enter, by name.

    Weights are multiplied in the calls of layers, or by functions: `F.linear(x, layer.weight)`, `x @ embedding.weight.T`.
    """
    done.sites = [(name, at if at is None or at in graph.children else done.lasting[at]) for name, at in done.sites]
    weighted = {at: name for name, at in done.sites if at is not None and at in graph.children}
    called = {name for name, _ in done.sites}
    own = {_product(graph, at) for at in weighted}  # of the layers' own calls
    plain = {name for name in called if computes_plainly(cutting.layers[name])}
    within = {id(p) for name in called - plain for p in cutting.layers[name].parameters()}
    if isinstance(done, Trace):
        hooked = {name for at, name in weighted.items() if name in plain and _product(graph, at) not in reshapes(at)}
        weighted = _inner_products(cutting, graph, done, weighted, (called - plain - cutting.packed) | hooked)
    names = {id(p): (name, owner) for name, p, owner in _parameters(cutting) if id(p) not in within}
    others: dict[Vertex, str] = {}
    made: dict[Vertex, str] = {}  # of weights alone: turned, masked, cast
    for at in reversed(graph.order):
        entering = [names[i] for i in graph.parameters[at] if i in names]
        owners = [owner for _, owner in entering if owner is not None]
        owners += [made[child] for child in graph.children[at] if child in made]
        if not owners or at in weighted or at in own:
            if entering and at not in weighted and at not in own:
                others[at] = entering[0][0]
        elif at[0].name() in PRODUCTS:
            weighted[at] = owners[0]
        elif len(owners) == len(graph.children[at]) + len(graph.parameters[at]) and (
            at[0].name() not in (BY_INDEX if owners[0] in cutting.layers else LOOK_UPS)
        ):
            made[at] = owners[0]
        elif owners[0] in cutting.layers and owners[0] not in plain:
            weighted[at] = owners[0]
        elif entering:
            others[at] = entering[0][0]
    return weighted, others


def _inner_products(
    cutting: Cutting, graph: Graph, done: Trace, weighted: dict[Vertex, str], layers: Collection[str]
) -> dict[Vertex, str]:
    """Return the sites; those of `layers` lie at the products in their own forward methods, behind which a unit may end.

    What a layer, or a hook on it, computes behind its product (a scale, an activation) is above the site, so that an error
    that a cut there sends to what lies below the layer is known to pass the weight.
    """
    matrices = {id(p): owner for _, p, owner in _parameters(cutting) if owner is not None and owner in layers}
    owners = matrices | {id(p): name for name in layers for p in cutting.layers[name]._parameters.values() if p is not None}
    made: dict[Vertex, str] = {}  # of weights alone
    products: dict[Vertex, str] = {}
    calls = {at for _, at in done.sites if at is not None}
    fed = calls | done.fed  # made of activities, perhaps of such as have no past
    for at in reversed(graph.order) if matrices else ():
        entering, children = graph.parameters[at], graph.children[at]
        own = [matrices[i] for i in entering if i in matrices] + [made[child] for child in children if child in made]
        if own:
            is_made = made.keys() >= set(children) and owners.keys() >= set(entering) and at not in fed
            (made if is_made else products)[at] = own[0]
    result = products | weighted
    for top, name in weighted.items():
        waiting, seen = [top] if name in layers else [], {top}
        while waiting:
            at = waiting.pop()
            if products.get(at) == name:
                done.calls_of[at] = done.calls_of[top]
                if at != top:
                    result.pop(top, None)
            below = [child for child in graph.children[at] if not (child in seen or child in calls or child in made)]
            seen.update(below)
            waiting += below
    return result


def _product(graph: Graph, at: Vertex) -> Vertex:
    """Return the product within a plain layer's call, whose output is at `at`."""
    while at[0].name() not in PRODUCTS and graph.children[at]:
        at = graph.children[at][0]
    return at


def _storages_of_index(at: Vertex) -> set[Any]:
    """Return the tensors by which rows were looked up there; they are the model's own where all are in its buffers."""
    try:
        saved = getattr(at[0], "_saved_indices", None)
        saved = getattr(at[0], "_saved_index", None) if saved is None else saved
    except RuntimeError:  # other hooks hold it
        saved = None
    found = [saved] if isinstance(saved, Tensor) else list(saved or ())
    return {None if index is None else index.untyped_storage()._cdata for index in found} or {None}


def _parameters(cutting: Cutting) -> Iterator[tuple[str, Tensor, str | None]]:
    """Return the name of each parameter, and of the layer, or other module with a matrix, that it may be a weight of."""
    owners = {id(p): name for name, layer in cutting.layers.items() for p in layer.parameters() if p.dim() > 1}
    for name, module in cutting.modules.items():
        if is_local(module) and name not in cutting.exact:
            owners |= {id(p): name for p in module.parameters() if p.dim() > 1 and id(p) not in owners}
    for name, parameter in cutting.model.named_parameters():
        yield name, parameter, owners.get(id(parameter))


def _pattern(site: str, units: Iterable[str], merged: bool) -> Pattern:
    return site, tuple(sorted(map(base, units))), merged


class _Search:
    """The marks on a traced graph."""

    def __init__(self, cutting: Cutting, trace: Trace, output: list[Vertex]) -> None:
        self.cutting, self.trace, self.output = cutting, trace, output
        self.graph = Graph(output)
        self.weighted, self.others = sites_of(cutting, self.graph, trace)
        self.sites = {**self.others, **self.weighted}
        self.still = self._still()
        activations = [call for call in trace.calls if call.kind == "activation" and not call.first]
        cutting.inside |= {call.name for call in activations if call.at in self.still}
        cutting.tail = self._tail()
        calls = (call.name if call.kind == "activation" else call.base for call in trace.calls if call.kind != "function")
        cutting.beside |= _beside(cutting, calls)
        self.names: dict[Vertex, str] = {}
        for kind in ("module", "function"):
            for call in trace.calls:
                if call.kind == kind and call.at is not None:
                    self.names.setdefault(call.at, _point(call))
        self.marks = {call.at: call for call in reversed(trace.calls) if call.at in self.graph.children and self._ends(call)}

    def _still(self) -> set[Vertex]:
        """Find what is computed from parameters alone and has no samples: a masked weight, a part of a table.

        A layer that gets something without a past may have got it from the batch by ways that are not seen.
        """
        graph, trace, still = self.graph, self.trace, set[Vertex]()
        all_ = {id(parameter) for parameter in self.cutting.model.parameters()}
        own = {at: {id(p) for p in self.cutting.layers[name].parameters()} for name, at in trace.sites}
        kept = {b.untyped_storage()._cdata for b in self.cutting.model.buffers() if b.layout is torch.strided}
        for at in reversed(graph.order):
            children, entering = graph.children[at], graph.parameters[at]
            looked_up = at[0].name() in BY_INDEX and not kept.issuperset(_storages_of_index(at))
            if at in trace.fed or looked_up or not (still.issuperset(children) and all_.issuperset(entering)):
                continue
            if children or not own.get(at, set()).issuperset(entering):
                still.add(at)
        return still

    def _tail(self) -> set[str]:
        """Activations above the topmost layers belong to the model's output."""
        graph, calls = self.graph, self.trace.calls
        below: set[Vertex] = set()
        for at in graph.order:
            applied = at[0].name() in PRODUCTS and not self.still.isdisjoint(graph.children[at])  # a weight that layers made
            if at in below or at in self.weighted or applied:
                below.update(graph.children[at])
        last = max((i for i, call in enumerate(calls) if call.kind == "layer"), default=-1)
        activations = [(i, call) for i, call in enumerate(calls) if call.kind == "activation"]
        return {c.name for i, c in activations if not (c.at in below if c.at in graph.children else i < last)}

    def _ends(self, call: Call) -> bool:
        """Return whether a unit ends there."""
        cutting = self.cutting
        if call.kind == "activation":
            return not call.first and call.name not in cutting.tail | cutting.inside
        return call.kind in ("module", "function") and _point(call) in cutting.points

    def reached(self) -> Reached:
        """Return how errors travel now."""
        return self.graph.reach(self.output, self.marks, self.weighted)

    def mend(self, sites: Iterable[Vertex], reached: Reached) -> bool:
        """End units above sites, or take activations out of them; false if nothing can be done."""
        tops = [at for at in self.weighted if reached.direct[at] == 1 and reached.merged[at] is None]
        numbers = {self.trace.calls_of.get(at) for at in tops}  # with all vertices that stand for their calls
        read_outs = {name for at, name in self.names.items() if at in tops or self.trace.calls_of.get(at, -1) in numbers}
        fresh: set[Vertex] = set()  # whether they are enough is seen in the next round
        done = False
        for site in sites:
            chain = self.graph.chain(site, [at for at in self.output if at != site] or self.output, self.weighted)
            end = next((i for i, at in enumerate(chain) if at in self.marks), len(chain))
            if end < len(chain) and (chain[end] in fresh or self._clear(chain[end], site)):
                done = True
                continue
            free = [at for at in chain[:end] if at in self.names and at not in self.output and at not in self.still]
            free = [at for at in free if self.names[at] not in read_outs]  # a layer whose error is the output's keeps that
            if free:
                fresh |= self._end(free[-1])
                self._clear(free[-1], site)
                done = True
        return done

    def is_spared(self, site: Vertex) -> bool:
        """Return whether a parameter needs its exact derivative: no unit can end there, so it receives all their signals."""
        name, exact = self.others.get(site, ""), self.cutting.exact
        return site in self.still and (name in exact or is_inside(name, exact))

    def _end(self, at: Vertex) -> set[Vertex]:
        """End a unit there, and wherever the same module is called."""
        name = self.names[at]
        self.cutting.add_points([name])
        same = [call for call in self.trace.calls if call.kind in ("module", "function") and _point(call) == name]
        ends = {call.at: call for call in same if call.at in self.graph.children and call.at not in self.marks}
        self.marks |= ends
        return set(ends)

    def _clear(self, top: Vertex, site: Vertex) -> bool:
        """Take activations between the two out of the cuts; whether there were any."""
        within = [at for at in self.graph.between(top, site) if at in self.marks and self.marks[at].kind == "activation"]
        for at in within:
            self.cutting.inside.add(self.marks.pop(at).name)
        return bool(within)

    def refusal(self, site: Vertex, mends: bool) -> UnsupportedModelError:
        """Return what is wrong, where, and what to do; `mends` if all was tried that units='auto' does."""
        if site in self.still:
            still = [at for at in self.sites if at in self.still and not self.is_spared(at) and at in self.weighted]
            names = tuple(dict.fromkeys(self.sites[at] for at in (site, *still)))
            return UnsupportedModelError(
                f"{self.sites[site]!r} works on parameters, not on the batch, so signals cannot be assigned to samples "
                f"there; pass exact={names!r}"
            )
        cuts = sorted({base(call.name) for call in self.marks.values()})
        round_ = f"the cuts at {', '.join(map(repr, cuts[:3]))}{' and others' if len(cuts) > 3 else ''}"
        remedy = "detach what goes that way" if mends else "pass units='auto'"
        return UnsupportedModelError(
            f"the error would reach {self.sites[site]!r} around {round_}, through a residual connection or a skip; "
            f"{remedy}, or name modules that all of its paths pass, such as its block: units=('NAME', ...)"
        )

    def result(self, reached: Reached) -> Separation:
        """Return what was found."""
        patterns: set[Pattern] = set()
        paths: dict[str, list[tuple[list[str], str | None]]] = {}
        listeners: dict[str, dict[bool, set[str]]] = {call.name: {True: set(), False: set()} for call in self.marks.values()}
        for at, name in self.sites.items():
            reach = reached.at(at)
            passed = reach.merged if at in self.weighted and self.trace.is_merged(at, reach.merged) else None
            merged = self.weighted[passed] if passed is not None else None
            units = sorted(OUTPUT if root is None else self.marks[root].name for root in reach.roots)
            patterns.add(_pattern(name, units, merged is not None))
            for unit in units:
                if unit != OUTPUT:
                    listeners[unit][at in self.weighted].add(name)
            if at in self.weighted:
                paths.setdefault(name, []).append((units, merged))
        ends = [call for call in self.trace.calls if self._ends(call)]
        ends = [call for call in ends if call.at not in self.marks or self.marks[call.at] is call]
        functional = (call.kind == "activation" and call.base not in self.cutting.activations for call in ends)
        if self.trace.hears or any(functional):
            self.cutting.hear_functions()
        shares = self.graph.shares(self.output, self.trace.shrinkage)
        parts = {call.name: shares.get(call.at, 1.0) for call in ends if call.at is not None}
        sizes = {call.name: tuple(call.shape[1:] if len(call.shape) == 2 else ()) for call in ends}
        heard = {unit: frozenset(by[True] or by[False]) for unit, by in listeners.items()}
        idle = {call.name for call in ends if call.at is not None and call.at not in self.graph.children}
        return Separation([call.name for call in ends], patterns, paths, parts, heard, sizes, idle)


def _point(call: Call) -> str:
    """Return the name of a further cut there: modules are cut at every call, functions at one."""
    return call.name if call.kind == "function" else call.base
