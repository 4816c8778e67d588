"""Feedback instead of the transposed weight: replaces the backward map of single layers, and nothing else.

A rule of this family is one pure function per layer, the feedback weight, evaluated when the backward pass needs it. There
are two ways to send the error through it; both leave the layer's weight gradient and every other module to autograd.

    swap   while the layer runs, autograd saves a note instead of the weight; when it asks for the weight to make the error
           at the input, it gets the feedback weight (:mod:`apical.core.swap`). Costs next to nothing.
    edge   the layer's input is detached, and an identity on its output carries the error to the old input by
           :func:`apical.core.transport.transport`. For cases that a swap cannot handle: layers that use a function of their
           weight, autocast, `torch.compile`, activation checkpoints, and pathways that are not one matrix.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from apical.core.checkpointing import are_tensors_hooked, aside, is_checkpointed, refuse_hidden, sever
from apical.core.credit import Credit, CreditRule, Loss
from apical.core.effective import measured_weight, of_rows, require_affine, require_layout, weight_now
from apical.core.layer_forward import Attachment
from apical.core.layers import computes_plainly, is_affine, is_local, through
from apical.core.outside_use import OutsideUse, fault_of, refuse, refuse_transformed
from apical.core.packed import Part, block_of, caller, refuse_compiled, row_blocks, xavier_
from apical.core.sites import Site, graph_leaves, of_input, only_tensor, options_of, trains_before
from apical.core.swap import Swap
from apical.core.transport import Feedback as Feedback
from apical.core.transport import FeedbackEdge, geometry, padded_input, sent
from apical.core.transport import Pathway as Pathway
from apical.core.transport import stored as stored
from apical.core.units import Found, key, weighted_layers
from apical.errors import ConfigError, UnsupportedModelError, refuse_transforms

if TYPE_CHECKING:
    from apical.core.plain_chain import PlainChain, Sender


class EdgeRule(CreditRule):
    """Base of the rules that send the error through their own feedback, layer by layer (FA, sign symmetry, KP, WM, PFA).

    Args:
        model: network of Linear and convolution layers of any kind; other modules keep their exact derivative.
        loss: maps (output, targets) to a scalar batch mean.
        exact: names of modules or parameters without known transport that keep their exact derivative.
        first_layer: hold feedback for the first registered layer in any case. Otherwise only if it has a second name, or if
            trainable parameters are registered before it (an embedding): these get their error through it.
        sites: names of parameters, matrices (n_out, n_in), by which a user's module itself multiplies its activities
            (`F.linear(x, self.weight)`); there too the error goes back through feedback. The module must not use them in
            any other way.
        through_time: whether recurrent weights of PyTorch's recurrent modules lead the error to earlier moments; if not,
            their feedback is zero, and all else is unchanged. An LSTM then learns by e-prop, and a leaky network by RFLO.

    Raises:
        UnsupportedModelError: see :func:`apical.core.units.weighted_layers`.
    """

    chains_errors = True
    renews: bool = False  # every call has its own feedback
    fault_of = fault_of

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        exact: Collection[str] = (),
        first_layer: bool = False,
        sites: Collection[str] = (),
        through_time: bool = True,
    ) -> None:
        super().__init__(model, loss)
        self._weighted = weighted_layers(model, exact, shared=True, packed="parts", sites=sites)
        self.exact, self.sites, self.through_time = tuple(exact), tuple(sites), through_time
        first, part = next(iter(self._weighted.items()))
        every = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
        first_layer = first_layer or every.count(id(caller(part))) > 1
        self._first = None if first_layer or trains_before(model, self._weighted) else first
        still = set() if through_time else self._recurrent()
        self.layers = {name: layer for name, layer in self._weighted.items() if name not in {self._first, *still}}
        self.geometries = {name: geometry(layer) for name, layer in self.layers.items()}
        self._one_matrix = type(self).pathway is EdgeRule.pathway  # no layer has another path for the error
        self._aliased = len(set(every)) < len(every)
        self._unseen = set(self._weighted)
        self._found, self._batches, self._passes = Found(model), 0, 0
        self._may_swap = self._watched = False
        self._chain: PlainChain | None = None
        self._senders: Sequence[Sender] = ()
        self._present: dict[str, Feedback] = {}
        self._attach()

    def _recurrent(self) -> set[str]:
        """Return the names of the recurrent weights.

        Raises:
            ConfigError: there are none.
        """
        names = {name for name, layer in self._weighted.items() if isinstance(layer, Part) and layer.recurrent}
        if not names:
            raise ConfigError(
                "through_time=False applies to nn.RNN, nn.GRU, nn.LSTM and their cells, but the model has none; leave "
                "it out, or write the recurrence with a cell"
            )
        return names

    def _attach(self) -> None:
        plain = {name: layer for name, layer in self._weighted.items() if not isinstance(layer, Part)}
        parts = {name: cast(Part, layer) for name, layer in self._weighted.items() if isinstance(layer, Part)}
        owners: dict[nn.Module, None] = dict.fromkeys(part.owner for part in parts.values())
        hold = Attachment(self, [*plain.values(), *owners])
        self._hooks.append(hold)
        self._sites = {
            name: (wrapped, Site(name, wrapped, Swap(layer, partial(self._kept, name)) if name in self.layers else None))
            for (name, layer), wrapped in zip(plain.items(), hold.wrapped, strict=False)
        }
        names = {module: name for name, module in self.model.named_modules()}
        self._bundles: dict[str, tuple[Any, Any]] = {}
        for owner, wrapped in zip(owners, hold.wrapped[len(plain) :], strict=True):
            own = {name: part for name, part in parts.items() if part.owner is owner}
            first = self._first if self._first in own else None
            from apical.core.bundle import Bundle  # few models need it

            bundle = Bundle(names[owner], wrapped, own, self._feedback_of_part, first, self._projected)
            bundle.refuse_substitutes()
            self._bundles[bundle.name] = (wrapped, bundle)
        self._loops = tuple(names[owner] for owner in owners if isinstance(owner, nn.RNNBase))

    def _feedback_of_part(self, name: str) -> Callable[[], Tensor]:
        """Return what makes the feedback of a packed module's weight: zero in the first layer, or through time."""
        return self._kept(name) if name in self.layers else partial(torch.zeros_like, self._weighted[name].weight)

    def _feedback_now(self, name: str) -> Feedback:
        """Return the feedback of one layer for this call of the rule, which later calls leave unchanged."""
        if not self.renews:
            return self.feedback_of(name)
        if name not in self._present:
            self._present[name] = self.feedback_of(name)
        return self._present[name]

    def _kept(self, name: str) -> Callable[[], Tensor]:
        """Return the function that computes the feedback weight of one layer in the backward pass of this call."""
        if not self.renews:
            return partial(self.feedback_weight, name)
        compute, tensors = self._feedback_now(name)
        return partial(compute, self.geometries[name], *tensors)

    def _projected(self, name: str, block: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute a dense layer whose weight is a block of a part's rows, with an edge."""
        if not (inputs.requires_grad and name in self.layers):
            return F.linear(inputs, weight, bias)
        compute, tensors = self._feedback_now(name)
        output = F.linear(inputs.detach(), weight, bias)
        rows = partial(block_of, compute, block, row_blocks(self.layers[name]))
        return cast(Tensor, cast(Any, FeedbackEdge).apply(output, inputs, rows, None, None, *tensors))

    def weight_name(self, name: str) -> str:
        """Return the model's name of the parameter that is a layer's weight."""
        layer = self._weighted[name]
        if not isinstance(layer, Part):
            return f"{name}.weight".lstrip(".")
        module = name.rpartition(".")[0] if name.endswith(f".{layer.parameter}") or layer.module is layer.owner else name
        return f"{module}.{layer.parameter}".lstrip(".")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": [], "_sites": {}, "_bundles": {}, "_senders": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._attached:
            self._attach()

    @abstractmethod
    def feedback_of(self, name: str) -> Feedback:
        """Return the feedback weight of one layer: a pure function of tensors, in the layout of the layer's weight."""

    def pathway(self, name: str, inputs: Tensor) -> Pathway | None:
        """Return another path for the error than one feedback weight, if the rule has one; None by default.

        Args:
            name: the layer.
            inputs: the layer's (padded) input in this forward pass.
        """
        return None

    def is_plain(self, name: str) -> bool:
        """Return whether the layer uses its own weight as is; if not, `delta h^T` is not the weight's gradient."""
        if name not in self._sites:  # a part of a packed module
            return bool(self._weighted[name]._parameters)
        site = self._sites[name][1]
        return site.plain and (bool(site.within) or computes_plainly(site.layer) or through(site.layer) is not None)

    def takes_pathway(self, name: str) -> bool:
        """Return whether another path than one feedback weight can replace the layer's backward map."""
        site = self._sites.get(name)  # parts of attention and recurrent modules have none
        return site is None or (site[1].through is None and site[1].within is None)

    def forward_weight(self, name: str) -> Tensor:
        """Return the weight that the layer computes with: its parameter, or what it computes from it in this pass.

        Raises:
            UnsupportedModelError: under `torch.compile`, the layer's weight differs at every call.
        """
        if self.is_plain(name):
            return self.layers[name].weight
        site = self._sites[name][1]
        if site.varies and torch.compiler.is_compiling():
            raise UnsupportedModelError(
                f"layer {name!r} recomputes its weight at every call, which {type(self).__name__} cannot follow under "
                "torch.compile; train without torch.compile"
            )
        call = site.call
        if call is None and site.dimensions > 2:
            call = of_rows(site.forward if site.layer._forward_hooks else site.layer, site.shape, site.dimensions)
        return measured_weight(site.layer, call)

    def random_feedback(self, generator: torch.Generator | None = None) -> nn.Module:
        """Return a buffer per layer, drawn from the Xavier uniform law of its weight; shared weights share a buffer."""
        feedback = nn.Module()
        drawn: dict[int | str, Tensor] = {}
        for name, layer in self.layers.items():
            weight = weight_now(layer)
            own = getattr(layer, "_parameters", {}).get("weight")
            if (use := name if own is None else id(own)) not in drawn:
                empty = torch.empty_like(weight, device=None if generator is None else generator.device)
                drawn[use] = xavier_(empty, layer, generator).to(weight.device)
            feedback.register_buffer(key(name), drawn[use])
        return feedback

    def copy_feedback(self, feedback: nn.Module, name: str, value: Tensor) -> None:
        """Copy a matrix into the buffer of one layer.

        Raises:
            ConfigError: unknown layer, or a wrong shape.
        """
        if name not in self.layers:
            raise ConfigError(f"no layer {name!r} holds feedback; there are {', '.join(map(repr, self.layers))}")
        buffer = feedback.get_buffer(key(name))
        if value.shape != buffer.shape:
            raise ConfigError(f"feedback of layer {name!r} has shape {tuple(buffer.shape)}, not {tuple(value.shape)}")
        with torch.no_grad():
            buffer.copy_(value)

    def credit_paths(self, inputs: Tensor) -> dict[str, str]:
        """Return what the error of each layer passes through on its way down."""
        from apical.core.placement import layer_paths

        paths = layer_paths(self.model, inputs, "exact")
        for name in self._sites:
            if paths.get(name) == "exact":
                paths[name] = "own feedback" if name in self.layers else "no layer below"
        for _, bundle in self._bundles.values():
            for path in {self.weight_name(name).rpartition(".")[0] for name in bundle.parts}:
                if paths.get(path) == "exact":
                    paths[path] = "own feedback"
        return paths

    def feedback_weight(self, name: str) -> Tensor:
        """Return the effective feedback weight of one layer, in the shape of the layer's weight."""
        compute, tensors = self.feedback_of(name)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():  # off in a backward pass, where time counts
            return compute(self.geometries[name], *tensors)

    def feedback_weights(self) -> dict[str, Tensor]:
        """Return the effective feedback weight of each layer."""
        return {name: self.feedback_weight(name) for name in self.layers}

    def substitutes(self) -> dict[str, Tensor]:
        """Return tensors that replace parameters in the forward pass (:class:`apical.core.tap.WeightTap`); default: none."""
        return {}

    def prepare(self, inputs: Any) -> None:
        """Prepare for a pass that learns; does nothing by default. `inputs` are the batch's."""

    def prepare_by_hand(self, inputs: Any) -> None:
        """Prepare for a pass by hand (:mod:`apical.core.plain_chain`) in the same way."""
        self.prepare(inputs)

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Return credit whose root is the loss: its graph contains the feedback edges."""
        self.require_attached()
        refuse_transforms(type(self).__name__)
        if torch.is_grad_enabled():
            self.prepare(inputs)
        output = self._run(inputs) if torch.is_grad_enabled() else self.model(inputs)
        loss = self.loss(output, targets)
        if self._unseen and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._batches += 1
            if self._batches & (self._batches - 1) == 0:  # each time is too slow; only at first might miss a rare branch
                self._require_calls(loss)
        elif self._watched and type(self).forward is EdgeRule.forward and not torch.compiler.is_compiling():
            chain = self._plain_chain()
            self._by_hand = chain if chain.note(self, targets) else None
        return Credit([loss], [None], output, loss)

    def _run(self, inputs: Tensor) -> Any:
        """Return the model's output, with this rule active."""
        refuse_compiled(type(self).__name__, self._loops)
        compiling = torch.compiler.is_compiling()
        if torch.compiler.is_dynamo_compiling() and isinstance(inputs, Tensor) and (fault := self.fault_of(inputs)):
            refuse(fault)
        substitutes = self.substitutes()
        watch = None
        if not compiling:
            self._passes += 1
            if not self._watched or self._passes & (self._passes - 1) == 0:  # as with _require_calls
                watch = OutsideUse(self, self.model, self._weights_in(substitutes))
            elif not (substitutes or self._unseen) and self.goes_by_weights():
                parameters = self._plain_chain().parameters(self, inputs)
                if parameters is not None:
                    return self._plain_chain().run(inputs, parameters, self._senders_now(), watched=True)
        device = inputs.device if isinstance(inputs, Tensor) else next(self.model.parameters()).device
        self._may_swap = not (compiling or torch.is_autocast_enabled(device.type))
        for wrapped, site in self._sites.values():
            site.weight = site.own.get("weight")
            if type(site.weight) is Tensor:  # torch.func.functional_call, over before the backward pass
                self._may_swap = False
            if substitutes:
                site.weight = substitutes.get(self.weight_name(site.name), site.weight)
            if not compiling and (site.placed.get("forward") is not wrapped or wrapped.own() is not site.forward):
                wrapped.require_in_place(site.name, site.forward)
            wrapped.rule, wrapped.site = watch or self, site
        for wrapped, bundle in self._bundles.values():
            wrapped.require_in_place(bundle.name, bundle.forward)
            wrapped.rule, wrapped.site = watch or self, bundle
        try:
            with watch or nullcontext():
                if substitutes:
                    # a module with two names would keep its substitute if it were inserted under both
                    output = torch.func.functional_call(self.model, substitutes, (inputs,), tie_weights=not self._aliased)
                else:
                    output = self.model(inputs)
            if watch is not None:
                watch.report()
            return output
        finally:
            self._present = {}
            self._watched = self._watched or (watch is not None and not watch.found)
            for wrapped, _ in [*self._sites.values(), *self._bundles.values()]:  # before anything that Ctrl-C may end
                wrapped.rule = wrapped.site = None
            for _, site in self._sites.values():
                site.follow(substitutes)
            for _, bundle in self._bundles.values():
                bundle.settle()

    def _plain_chain(self) -> "PlainChain":
        """Return the model as a chain to pass by hand (:mod:`apical.core.plain_chain`); empty if it is not a chain."""
        if self._chain is None:
            from apical.core.plain_chain import PlainChain  # it only speeds up what works without it

            plain = {wrapped.layer: wrapped for wrapped, _ in self._sites.values() if wrapped.before is None}
            self._chain = PlainChain(self, wrappers=plain)
            names = [stage.name for stage in self._chain.stages]
            if names != [*self._sites] or not self.layers.keys() >= {*names[1:]}:
                self._chain.stages.clear()
            self._senders = [partial(self.send, name) for name in names[1:]]
        return self._chain

    def goes_by_weights(self) -> bool:
        """Return whether one feedback weight sends down the error of every layer, including in the next batch."""
        return type(self).pathway is EdgeRule.pathway

    def send(self, name: str, delta: Tensor, error: Tensor) -> Tensor:
        """Return the error (batch, n_in) below a dense layer, by its feedback, from its output's `delta` (batch, n_out)."""
        return sent(self.feedback_of(name), delta, error)

    def senders_by_hand(self, inputs: Tensor) -> "Sequence[Sender] | None":
        """For :meth:`apical.core.plain_chain.PlainChain.credit`; the general path periodically checks everything again."""
        passes = self._passes + 1
        if passes & (passes - 1) == 0 or not self.goes_by_weights():
            return None
        self.__dict__["_passes"] = passes
        self.prepare_by_hand(inputs)
        return self._senders_now()

    def _senders_now(self) -> "Sequence[Sender]":
        if not self.renews:
            return self._senders
        return [partial(sent, self.feedback_of(stage.name)) for stage in self._plain_chain().stages[1:]]

    def _weights_in(self, substitutes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each layer's weight parameter, or what replaces it; and matrices of local modules, such as embeddings."""
        own = {name: layer._parameters.get("weight") for name, layer in self._weighted.items()}
        weights = {name: substitutes.get(self.weight_name(name), weight) for name, weight in own.items()}
        for name, module in self.model.named_modules():
            if is_local(module) and not any(f"{name}.".startswith(f"{exact}.") for exact in self.exact):
                weights[name] = next((matrix for matrix in module.parameters() if matrix.dim() > 1), None)
        return {name: weight for name, weight in weights.items() if weight is not None}

    def call_layer(self, site: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's forward pass with its feedback, while the rule is active."""
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active() and torch.is_grad_enabled():
            refuse_transformed(site, args, kwargs)
        if not isinstance(site, Site):
            if self._unseen and torch.is_grad_enabled():
                self._unseen -= site.parts.keys()
            site.attention = self.attention
            return site(*args, **kwargs)
        if not torch.is_grad_enabled():
            refuse_hidden(site.name)
            return site.forward(*args, **kwargs)
        inputs = args[0] if args and isinstance(args[0], Tensor) else only_tensor(site.name, args, kwargs)
        if self._unseen:
            self._unseen.discard(site.name)
        swap = site.swap
        if swap is None:
            if inputs.requires_grad:
                raise UnsupportedModelError(
                    f"layer {site.name!r} was treated as the first one, but its input needs an error; pass first_layer=True"
                )
            return site.forward(*args, **kwargs)
        if site.within is not None or not is_affine(site.layer):
            return self._through(site, inputs, len(args) + len(kwargs) == 1, lambda: site.forward(*args, **kwargs))
        if site.own.get("weight", site.weight) is not site.weight:
            raise UnsupportedModelError(
                f"the model calls layer {site.name!r} with another weight than its own (torch.func.functional_call), "
                f"which has no feedback; use a separate layer there, or pass exact=({site.name!r},)"
            )
        swaps = self._may_swap and site.swaps and inputs.requires_grad and "weight" in site.own and not are_tensors_hooked()
        if swaps and (self._one_matrix or self.pathway(site.name, padded_input(site.layer, inputs)) is None):
            swap.met = swap.twice = False
            with swap:
                output = site.forward(*args, **kwargs)
            if swap.met and not (swap.twice and swap.is_given(inputs)):
                return output
            site.swaps = swap.met
            site.affine = site.affine if swap.met else torch.is_autocast_enabled(inputs.device.type)  # another tensor there
        return self._with_edge(site, of_input(site.forward, inputs, args, kwargs), inputs)

    def _through(self, site: Site, inputs: Tensor, alone: bool, call: Callable[[], Any]) -> Any:
        """Run the forward pass of a layer that is not an affine map."""
        if not inputs.requires_grad:
            return call()
        run = through(site.layer) if alone else None
        if not (run or site.within) or (not self._one_matrix and self.pathway(site.name, inputs) is not None):
            raise UnsupportedModelError(
                f"layer {site.name!r} ({type(site.layer).__name__}) is not an affine map with its class's forward method "
                f"and its own weight; move the rest into a separate module, or pass exact=({site.name!r},)"
            )
        return site.within(call, inputs) if site.within else cast(Any, run)(site.layer, inputs, self._kept(site.name)())

    def _with_edge(self, site: Site, call: Callable[[Tensor], Any], inputs: Tensor) -> Any:
        name, layer, shape = site.name, site.layer, site.shape
        if site.plain and "weight" not in site.own:  # changed since the rule was made
            site.look_again()
        around = aside if is_checkpointed() else nullcontext
        with around():
            below = inputs if shape is None else padded_input(layer, inputs)
            pathway = self.pathway(name, below)
            if pathway is not None or inputs.requires_grad:
                self._require_affine(site, call, inputs)
                site.dimensions = inputs.dim()
                site.call = of_rows(call, shape, site.dimensions)
                feedback, tensors = (None, pathway[1]) if pathway is not None else self._feedback_now(name)
                site.call = None
        if pathway is None and not inputs.requires_grad:
            return call(inputs)
        output = call(sever(inputs))
        if not any(t.requires_grad for t in (output, below, *tensors)):  # a frozen layer's feedback may learn
            return output
        if not (site.plain or torch.compiler.is_compiling()) and isinstance(output.grad_fn, BackwardCFunction):
            output = output.clone()  # a user's function may have kept its result
        with around():
            return cast(Any, FeedbackEdge).apply(output, below, feedback, pathway and pathway[0], shape, *tensors)

    def _require_affine(self, site: Site, call: Callable[[Tensor], Any], inputs: Tensor) -> None:
        """Verify that an edge represents the layer's backward map: once, and when an option of the layer has changed."""
        compiling = torch.compiler.is_compiling()
        options = None if site.plain or compiling else options_of(site.layer)
        if (site.affine and options in (None, site.options)) or inputs.numel() == 0:
            return
        if not compiling:
            alike = [s.name for _, s in self._sites.values() if type(s.layer) is type(site.layer) and not s.probed]
            require_affine(site.name, site.layer, call, inputs, alike)
            require_layout(site.name, site.layer, self.feedback_weight, inputs)
            site.affine, site.options = True, options
        elif not site.probed:
            raise UnsupportedModelError(
                f"layer {site.name!r} ({type(site.layer).__name__}) must be seen running before torch.compile: call the "
                "rule once on a batch without compilation"
            )

    def _require_calls(self, loss: Tensor) -> None:
        """Refuse layers whose weight takes part in the loss although they were never called.

        A layer that takes no part (stochastic depth, an expert without samples, an auxiliary head) gets no credit.

        Raises:
            UnsupportedModelError: names the layer.
        """
        parts = graph_leaves(loss)
        for name in sorted(self._unseen):
            if any(id(parameter) in parts for key, parameter in self._weighted[name].named_parameters() if key != "bias"):
                raise UnsupportedModelError(
                    f"layer {name!r} was not called as a module in the forward pass, so no feedback can be attached to it; "
                    f"call it, or remove it, or pass exact=({name!r},)"
                )
