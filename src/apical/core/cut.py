"""Cuts give each unit its own teaching signal.

A unit is what lies between two cuts: a weighted layer with its normalisation, the residual sum and the activation at
whose output the unit ends. The next unit reads that output detached, so no error crosses a cut; one backward pass from all
unit outputs together, each with its own signal, then makes every unit's local gradient. :mod:`apical.core.separation` finds
the cuts, and makes sure that no error goes round them.
"""

import sys
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from apical.core.credit import CreditRule, Loss
from apical.core.cutting import Cutting, Pass
from apical.core.graph import leaves, reshapes, vertex
from apical.core.inside import InnerEdges
from apical.core.layers import is_packed
from apical.core.outputs import tensors
from apical.core.packed import caller, refuse_compiled
from apical.core.plain_chain import PlainChain
from apical.core.rest import undisturbed
from apical.core.separation import OUTPUT, Pattern, Separation, base, first_uses, separate, verify
from apical.core.separators import KINDS, ends
from apical.core.signals import Cut, Teacher
from apical.core.units import Found, weighted_layers
from apical.errors import ConfigError, UnsupportedModelError, require_choice

Method = TypeVar("Method", bound=Callable[..., Any])
Units = Literal["auto", "activation", "block", "sublayer", "micro"] | Sequence[str]

ATTEMPTS = 8
"""Maximum number of passes to try until one takes a path whose cuts are known to be right."""


UNSEEN = (
    "the rule must first see a batch of each kind in eager mode: call the rule on one before it is compiled with "
    "fullgraph=True, or leave out fullgraph=True"
)


def eagerly(method: Method) -> Method:
    """Keep a method out of compiled graphs: it acts once, at the first batch.

    The compiler is only looked up at the call: importing it takes as long as importing PyTorch.
    """

    @wraps(method)
    def outside(*arguments: Any) -> Any:
        return (torch.compiler.disable(method) if "torch._dynamo" in sys.modules else method)(*arguments)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]  # what the compiler looks for
    outside._torchdynamo_disable_msg = UNSEEN  # type: ignore[attr-defined]
    return cast(Method, outside)


class CutRule(CreditRule):
    """Base of the rules that send a teaching signal to every hidden unit.

    Args:
        model: any network; activations may be modules (`nn.ReLU()`) or functions (`F.relu`), used once or several times.
        loss: maps (output, targets) to a scalar batch mean.
        where: "activation" cuts after every hidden activation (after the residual sum), so that no error crosses;
            "input" cuts before every weighted layer but the first and leaves residual connections intact.
        exact: names of modules or parameters without known transport that keep their exact derivative within a unit.
        units: "auto" also cuts wherever an error would bypass those cuts, or pass one layer's weight on its way to
            another (residual streams, skips taken before an activation, activations that are formulas); "activation" cuts
            after activations only, and refuses a model in which an error would bypass them; names of modules are further
            cuts in addition to those of "auto". Within the other units an error passes several layers: "block" cuts after
            modules that contain layers and whose output all errors pass; "sublayer" wherever all errors pass one tensor, as
            after each sum of a residual stream; "micro" there and after activations.
        inside: what an error passes within a unit: "exact" uses the layers' own weights, "feedback" fixed random matrices
            instead, at every layer including the topmost.

    Raises:
        UnsupportedModelError: see :func:`apical.core.units.weighted_layers`; or, at the first batch, no place is found to
            cut the path that bypasses the cuts.

    Attributes:
        plain_roots: whether to make roots that function transforms (`torch.func`) can follow, as in compiled graphs.
        silent: send no signal to hidden units, as a control: only the last unit learns.
    """

    plain_roots = False
    silent = False

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        where: Literal["activation", "input"] = "activation",
        exact: Collection[str] = (),
        units: Units = "auto",
        inside: Literal["exact", "feedback"] = "exact",
    ) -> None:
        super().__init__(model, loss)
        require_choice("inside", inside, ("exact", "feedback"))
        cuts = where == "activation"
        self.layers = weighted_layers(model, exact, shared=True, packed="parts" if cuts else "refused", sites=None)
        self._whole = weighted_layers(model, exact, shared=True, packed="whole" if cuts else "refused")  # as they are called
        self._loops = tuple(name for name, layer in self._whole.items() if isinstance(layer, nn.RNNBase))
        self.exact = tuple(exact)
        self.where, self.units = where, units
        self._found = Found(model, activations=True)
        named = [] if isinstance(units, str) else list(units)
        _check_units(model, units, named)
        self._cutting = Cutting(model, self._whole, where == "input")
        self._cutting.exact = frozenset(exact)
        self._hooks = self._cutting.hooks
        # attributes of the rule, so that code that restores hooks restores these too
        self._points, self._bases = self._cutting.points, self._cutting.bases
        self._inside, self._listens = self._cutting.inside, self._cutting.heard
        weakref.finalize(self, _remove, self._hooks)
        self._cutting.add_points(named)
        self._cutting.skips_activations = where == "activation" and units in ("block", "sublayer")
        self.inside: nn.Module | None = None  # feedback within units, by layer
        self._inner: tuple[InnerEdges, ...] = ()  # not a submodule: it holds the same model
        if inside == "feedback":
            self._inner = (InnerEdges(model, loss, exact, int(torch.randint(2**62, (), device="cpu"))),)
            self.inside = self._inner[0].feedback
        self._separation: Separation | None = None  # of the last traced pass
        self._patterns: set[Pattern] = set()
        self._shares: dict[str, float] = {}
        self._firsts: dict[str, str] = {}
        self._live: set[str] = set()
        self._idle: set[str] = set()  # cuts that no output seen so far depends on: they have no credit
        self.readers: dict[str, str] = {}  # the layer that reads a unit's output unchanged
        self.heads: list[str] = []  # layers whose output is the model's
        self._right: set[tuple[object, ...]] = set()  # call sequences whose cuts are known to be right
        self._graded: list[bool] = []  # which outputs depend on a parameter or another leaf
        self._chain: PlainChain | None = None
        self._last: set[int] = set()  # ids of parameters that the output's own error may reach

    def detach(self) -> nn.Module:
        """Remove everything from the model and return it."""
        for inner in self._inner:
            inner.detach()
        return super().detach()

    @property
    def remarks(self) -> list[str]:
        """Name the weights that errors pass within units."""
        if self.inside is not None:
            return []
        merged = {} if self._separation is None else self._separation.paths
        passed = {through for calls in merged.values() for _, through in calls if through is not None}
        passed |= {name for name, layer in self._whole.items() if is_packed(layer)}  # from one of its weights to another
        if not passed and self.units not in KINDS:
            return []
        which = f" (those of {', '.join(sorted(passed))})" if passed else ""
        return [f"Within units errors pass the layers' own weights{which}; inside='feedback' puts random matrices there."]

    @property
    def takes_signals(self) -> bool:
        """Whether roots are plain unit outputs that will be given signals: if a graph is compiled or transformed."""
        return self.plain_roots or torch.compiler.is_compiling()

    def hidden_units(self, inputs: Tensor) -> list[str]:
        """Return the names of the cuts in order of execution: the module of each, with "#k" if it is used again.

        Runs `inputs` through the model; the state of the model and of the random generators is restored.
        """
        if self.where == "input":
            with undisturbed(self.model), torch.no_grad():
                return [cut.name for cut in self._cutting.cut_pass(inputs, True)[1].cuts]
        return self._trace(inputs).units

    def first_use(self, unit: str) -> str:
        """Return the unit itself, or the first of the steps at which a recurrent network uses it."""
        if unit not in self._firsts:  # one step more than before
            uses = {first for use, first in self._firsts.items() if base(use) == base(unit)}
            return uses.pop() if len(uses) == 1 else unit
        return self._firsts[unit]

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Return what each weighted layer's error passes through, in the terms of :class:`apical.core.placement.Row`."""
        if self.where == "input":
            return super().credit_paths(inputs)
        separation = self._trace(inputs)
        names: dict[nn.Module, str] = {layer: name for name, layer in self._whole.items()}
        calls = {name: separation.paths.get(names[caller(layer)], []) for name, layer in self.layers.items()}
        paths = {name: self._path(layer, calls[name]) for name, layer in self.layers.items()}
        if not self.silent:
            return paths
        taught = {p for name, layer in self.layers.items() if paths[name] != "no credit" for p in layer.parameters()}
        untaught = self._untaught(separation.patterns)
        # an embedding tied to the head learns with the head
        alone = [name for name in untaught if taught.isdisjoint(self.model.get_submodule(name).parameters())]
        return paths | dict.fromkeys(alone, "no credit")

    def _untaught(self, patterns: set[Pattern]) -> set[str]:
        """Return modules with parameters, but no layer's, that lie only in hidden units."""
        units: dict[str, set[str]] = {}
        for site, above, _ in patterns:
            if site not in self._whole:
                module = site.rpartition(".")[0].partition(".parametrizations")[0]
                units.setdefault(module, set()).update(above)
        return {module for module, above in units.items() if OUTPUT not in above}

    def _path(self, layer: nn.Module, calls: list[tuple[list[str], str | None]]) -> str:
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            return "frozen"
        merged = list(dict.fromkeys(through for _, through in calls if through is not None))
        units = list(dict.fromkeys(self.first_use(unit) for above, _ in calls for unit in above))
        if self.silent:
            units = [unit for unit in units if unit == OUTPUT]
        if not units:
            return "no credit"
        if merged and not self._inner:
            return f"merged with {merged[0]!r}"
        named = ["own feedback"] * bool(merged) + [f"cut at {unit!r}" for unit in units if unit != OUTPUT]
        return ", ".join(named + ["exact"] * (OUTPUT in units and not merged))

    @eagerly
    def _trace(self, inputs: Tensor) -> Separation:
        """Find the cuts for these inputs."""
        self.require_attached()
        with undisturbed(self.model):
            output, trace = self._cutting.trace(inputs)
            if not tensors(output):
                raise _no_tensor(type(self).__name__, output)
            self._graded = [part.requires_grad for part in tensors(output)]
        if self.units in KINDS:
            self._cutting.add_points(ends(self._cutting, trace, tensors(output), str(self.units)))
        merges, mends = self.units in ("activation", *KINDS), self.units not in ("activation", "block", "sublayer")
        separation = separate(self._cutting, trace, tensors(output), merges, mends)
        made = {reshaped for part in tensors(output) for reshaped in reshapes(vertex(part))}
        self.heads = [name for name, at in trace.sites if at in made]
        if self.units == "activation" and not separation.units and len(trace.sites) > 1:
            raise UnsupportedModelError(
                "no activation was called between the weighted layers, so there is no hidden unit to send a signal to; pass "
                "units='auto' to cut between layers, or use activations"
            )
        self._patterns |= separation.patterns
        self._shares = {**separation.shares, **self._shares}
        self._separation = separation
        self._live |= set(separation.units) - separation.idle
        self._idle = (self._idle | separation.idle) - self._live
        self._firsts = {**first_uses(separation), **self._firsts}
        return separation

    def run(self, inputs: Tensor) -> tuple[Any, list[Cut], Teacher]:
        """Run the forward pass with cuts; return the output (batch, ...), the cuts, and the teacher that takes the signals.

        There may be several outputs, in a dictionary, tuple or list.

        A root that requires no gradient belongs to a unit without trainable parameters, or to one that the model
        detaches.

        Raises:
            ConfigError: the batch is empty.
            UnsupportedModelError: the output contains no tensor; or errors would bypass the cuts.
        """
        self.require_attached()
        refuse_compiled(type(self).__name__, self._loops)
        if isinstance(inputs, Tensor) and inputs.dim() and not len(inputs):
            raise ConfigError(f"the batch is empty: inputs have the shape {tuple(inputs.shape)}; leave it out")
        if self.where == "activation" and self._separation is None:
            self._trace(inputs)
            if torch.compiler.is_compiling():
                self._verify_cuts(inputs)
        output, done = self._cut_pass(inputs, self.takes_signals)
        if not tensors(output):
            raise _no_tensor(type(self).__name__, output)
        if self.where == "activation" and not self._is_right(output, done):
            output, done = self._retried(inputs, output, done, self.takes_signals)
        self.readers.update((cut.name, cut.reader) for cut in done.cuts if cut.reader)
        if not self._idle:
            return output, done.cuts, done.teacher
        return output, [cut.bare() if cut.name in self._idle else cut for cut in done.cuts], done.teacher

    def plain_chain(self) -> PlainChain | None:
        """Return the model as a chain with a unit after each activation (:mod:`apical.core.plain_chain`), or None."""
        if self._chain is None and self._right and self._separation is not None:
            self._chain = PlainChain(self, hooks=[hook.id for hook in self._hooks])
            names = [stage.name for stage in self._chain.stages]
            units = [stage.activation_name for stage in self._chain.stages[:-1]]
            plain = self.where == "activation" and not self._inner
            if not plain or names != [*self._whole] or self._separation.units != units:
                self._chain.stages.clear()
        return self._chain if self._chain is not None and self._chain.stages else None

    def _cut_pass(self, inputs: Tensor, plain: bool) -> tuple[Any, Pass]:
        run = self._inner[0]._run if self._inner and torch.is_grad_enabled() else None
        return self._cutting.cut_pass(inputs, plain, run)

    def require_ends(self, output: Any, errors: Sequence[Tensor | None]) -> None:
        """Refuse a loss that reads a hidden unit's output, whose exact error would be lost at the cut.

        Raises:
            UnsupportedModelError: names the output of the model.
        """
        parts = tensors(output)
        if len(parts) > 1 and not self.takes_signals and torch.is_grad_enabled() and len(parts) == len(self._graded):
            for number, (part, error, graded) in enumerate(zip(parts, errors, self._graded, strict=True)):
                if error is not None and graded and not part.requires_grad and any(p.requires_grad for p in parts):
                    raise UnsupportedModelError(
                        f"the loss reads tensor {number} of the model's output, which is the output of a hidden unit, and "
                        f"{type(self).__name__} sends no exact error there; detach it, or leave it out of the loss"
                    )

    @eagerly
    def _verify_cuts(self, inputs: Tensor) -> None:
        """Cut once outside of a graph that is being compiled, where errors that bypass the cuts go unseen."""
        with undisturbed(self.model):
            self._retried(inputs, *self._cut_pass(inputs, False), False)

    def _is_right(self, output: Any, done: Pass) -> bool:
        """Return whether no error bypasses the cuts: the pass's calls, and what its output reaches, were seen before."""
        sequence = (self.model.training, *done.events)
        if self.takes_signals or not done.learns:
            names = None if self._separation is None else self._separation.units
            return not done.learns or sequence in self._right or names in (None, [cut.name for cut in done.cuts])
        return sequence in self._right and all(
            id(leaf) in self._last for part in tensors(output) for leaf in leaves(part.grad_fn)
        )

    @eagerly
    def _retried(self, inputs: Tensor, output: Any, done: Pass, takes_signals: bool) -> tuple[Any, Pass]:
        """Return the pass itself if its cuts prove right, or another one with further cuts.

        Raises:
            UnsupportedModelError: each pass takes a different path.
        """
        if takes_signals:  # because the caller is compiled, and this method is not
            known = [] if self._separation is None else self._separation.units
            missed = ", ".join(sorted({base(unit) for unit in known} - {base(cut.name) for cut in done.cuts}))
            remedy = f"where such a graph does not tell of {missed}, use modules or leave it uncompiled; else " * bool(
                missed
            )
            raise UnsupportedModelError(
                "the model called its layers in an order not seen before, inside a function transform or a compiled graph; "
                f"{remedy}call the rule on such a batch outside first"
            )
        for _ in range(ATTEMPTS):
            if verify(self._cutting, done, tensors(output), self._patterns, self._idle):
                self._right.add((self.model.training, *done.events))
                self._last |= {id(leaf) for part in tensors(output) for leaf in leaves(part.grad_fn)}
                return output, done
            self._trace(inputs)
            with undisturbed(self.model):  # as after the first of these passes
                output, done = self._cut_pass(inputs, False)
        if done.on_view is not None:
            raise UnsupportedModelError(
                f"the activation at {done.on_view!r} works in place on a view (view, chunk, a slice), whose history "
                "bypasses the cut; continue with what the activation returns, or use one that is not in place"
            )
        raise UnsupportedModelError(
            "the model takes another path at each call, and on none is the error known to stay within its units; make "
            "the path depend on the inputs or on PyTorch's random numbers, or name further cuts: units=('NAME', ...)"
        )


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _check_units(model: nn.Module, units: str | Sequence[str], named: list[str]) -> None:
    if isinstance(units, str) and units not in ("auto", "activation", *KINDS):
        kinds = ", ".join(map(repr, ("auto", "activation", *KINDS)))
        raise ConfigError(f"units must be {kinds} or a list of names of modules, not {units!r}")
    modules = dict(model.named_modules())
    unknown = [name for name in named if name not in modules]
    if unknown:
        raise ConfigError(f"units names {', '.join(map(repr, unknown))}, but the model has no such module")


def _no_tensor(rule: str, output: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model's output is a {type(output).__name__}, and {rule} needs a tensor whose error it sends to the units, or "
        "several in a dictionary, tuple or list; wrap the model in a module that returns them"
    )
