"""Interventions on a running rule: change one thing, hold the rest, and see whose update moves.

All are made on copies of nothing: the rule runs its own code on its own model, and its state is put back afterwards. Changes
are relative, `|a - b| / |b|` over an update's weights; a rule that draws random numbers draws the same ones each time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from apical.core.batch import require_rows
from apical.core.credit import CreditRule
from apical.core.layers import is_local, is_weighted
from apical.core.rest import kept_attributes
from apical.diagnostics.dataflow import Dataflow, Trace, recorded
from apical.diagnostics.synapses import Inputs, Responding
from apical.errors import ConfigError

Updates = dict[str, Tensor]
"""The requested change of each layer's weight, up to its sign and the learning rate: its gradient."""

KINK = 1e-9
"""Distance from the kink of an activation; what is continuous changes by about this, what jumps by much more."""


def change(after: Tensor, before: Tensor) -> float:
    """Return `|after - before| / |before|`; 0 where both are zero.

    >>> change(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
    0.5
    """
    difference, norm = float((after - before).norm()), float(before.norm())
    return difference / norm if norm else float(difference > 0)


class Probe:
    """One rule, one batch, and the weights that it shall be asked about.

    Args:
        rule: as trained; it is left as it was found, but for gradients.
        inputs: (batch, ...).
        targets: (batch, ...).
        seed: of whatever the rule draws.

    Attributes:
        layers: names of the weighted layers, in the order in which they respond.
        weights: their weights.
        biases: their biases; None where they have none, or none is known.
        uses: how many times each responds in a forward pass of the model.
        blocks: parts of weights that respond on their own.
        flipped: names of those held as (n_in, n_out).
        sample: the one of the batch with the largest loss, (1, ...) and its target.
        base: the updates without any intervention; layers that do not learn, or have a zero update, are missing.
        flow: data flow of one step.
        traces: where each update comes from.
    """

    def __init__(self, rule: CreditRule, inputs: Tensor, targets: Tensor, seed: int = 0) -> None:
        self.rule, self.inputs, self.targets, self.seed = rule, inputs, targets, seed
        rule(inputs, targets)  # everything created in the first batch exists now
        weights, biases = synapses(rule.model)
        self._own = {_memory(tensor) for tensor in (*rule.model.parameters(), *rule.model.buffers())}
        self._kept: list[Tensor] = []
        self._remember()

        heard = Inputs(weights)
        called = self._passes(heard, inputs)
        self.flipped = heard.backwards.keys() - heard.calls.keys()  # in a forward pass, all products are forward responses
        if self.flipped:
            heard = Inputs(weights, self.flipped)
            self._passes(heard, inputs)
        self.uses = {name: len(calls) for name, calls in heard.calls.items()}
        unseen = [name for name in called if name in weights and name not in self.uses]
        if unseen or not self.uses:
            raise ConfigError(
                f"the audit cannot follow {', '.join(map(repr, unseen)) or 'the model'}: it computes with a function of its "
                "weight, so no product with the weight is seen; examine a model whose layers use their weights as they are"
            )
        self.blocks = [part for (name, *_), part in heard.blocks.items() if part.numel() < weights[name].numel()]
        self.layers = list(self.uses)
        self.biases = {name: biases[name] for name in self.layers}
        self.weights = {name: weights[name] for name in self.layers}
        self.flow, self.traces = self._flow()
        self._kept = [t for t in self.flow.operands if t.is_leaf and not self.flow.made(t) and _memory(t) not in self._own]
        self._remember()
        self.base = {name: update for name, update in self.updates().items() if float(update.norm())}
        self.sample = self._worst()

    def _passes(self, mode: TorchDispatchMode, inputs: Tensor) -> list[str]:
        """Shows the inputs to the model while `mode` is active; returns the names of the modules that were called."""
        called: list[str] = []
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
            for name, module in self.rule.model.named_modules()
        ]
        try:
            with torch.enable_grad(), mode:  # without gradients, attention has another path
                self.answer(inputs)
        finally:
            for hook in hooks:
                hook.remove()
            self._restore()
        return called

    def answer(self, inputs: Tensor) -> Tensor:
        """Return the model's output, with what is drawn in every pass."""
        with self._repeating(len(inputs)):
            output: Tensor = self.rule.model(inputs)
        require_rows("the audit", inputs, output)
        return output

    @contextmanager
    def _repeating(self, samples: int) -> Iterator[None]:
        """Within, the same is drawn each time; of one sample batch normalisation has no statistics but its running ones."""
        modules = self.rule.modules() if samples == 1 else ()
        normal = [m for m in modules if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
        with kept_attributes(self.rule.model, loss=self.rule.loss):
            torch.manual_seed(self.seed)
            try:
                for module in normal:
                    module.training = False
                yield
            finally:
                for module in normal:
                    module.training = True

    def responding(
        self, responses: Mapping[str, Tensor], after: Callable[[str, Tensor], Tensor] | None = None
    ) -> Responding:
        """Return a mode in which layers respond with other weights, or otherwise, than everything else sees."""
        return Responding(self.weights, responses, after, self.flipped)

    def given(self) -> dict[str, list[Tensor]]:
        """Return what each dense layer receives of the sample, rows (positions, n_in), one entry a response."""
        heard = self.listening()
        self._passes(heard, self.sample[0])
        return heard.calls

    def listening(self) -> Inputs:
        """Return a mode that keeps what dense layers are given."""
        return Inputs({name: weight for name, weight in self.weights.items() if weight.dim() == 2}, self.flipped)

    def rows(self, updates: Updates) -> Updates:
        """Return the updates of matrices as (n_out, n_in), however the model holds them."""
        return {name: update.T if name in self.flipped else update for name, update in updates.items() if update.dim() == 2}

    @property
    def responses(self) -> dict[str, int]:
        """How many times each layer responds in a step, in forward passes: at several positions, or uses, it is once."""
        return {name: -(-count // self.uses[name]) for name, count in self.flow.responses.items()}

    @property
    def feedback(self) -> list[Tensor]:
        """Return the tensors outside the model (no scalars), each once: in the rule's state, or kept elsewhere and used."""
        tensors = [*self.rule.parameters(), *self.rule.buffers(), *self._kept]
        matrices = {_memory(tensor): tensor.detach() for tensor in tensors if _can_change(tensor)}
        return [tensor for memory, tensor in matrices.items() if memory not in self._own]

    def _worst(self) -> tuple[Tensor, Tensor]:
        answers = max(len(self.targets) // len(self.inputs), 1)  # of a sample, where the model joins samples and positions
        with torch.no_grad():
            output = self.answer(self.inputs)
            rows = max(len(output) // len(self.inputs), 1)
            parts = zip(output.split(rows), self.targets.split(answers), strict=True)
            losses = [float(self.rule.loss(part, targets)) for part, targets in parts]
        worst = max(range(len(losses)), key=lambda i: losses[i] if losses[i] == losses[i] else -math.inf)
        return self.inputs[worst : worst + 1], self.targets[worst * answers : (worst + 1) * answers]

    def _remember(self) -> None:
        held = [*self.rule.parameters(), *self.rule.buffers(), *self._kept]
        self._state = [(tensor.untyped_storage(), tensor.untyped_storage().clone()) for tensor in held]

    def _restore(self) -> None:
        self.rule.zero_grad()
        for storage, value in self._state:
            storage.copy_(value)

    def _flow(self) -> tuple[Dataflow, dict[str, Trace]]:
        with self._repeating(len(self.inputs)):
            flow = recorded(self.rule, self.weights, self.inputs, self.targets, self.flipped)
        traces = {name: flow.trace(weight.grad) for name, weight in self.weights.items() if weight.grad is not None}
        self._restore()
        return flow, traces

    def updates(
        self,
        before: Callable[[], object] | None = None,
        mode: TorchDispatchMode | None = None,
        batch: tuple[Tensor, Tensor] | None = None,
    ) -> Updates:
        """Return what the rule asks for.

        Args:
            before: changes the rule or its model in place, without gradient; undone afterwards.
            mode: active while the rule runs.
            batch: in place of the probe's.
        """
        try:
            if before is not None:
                with torch.no_grad():
                    before()
            self.rule.zero_grad()
            inputs, targets = batch or (self.inputs, self.targets)
            with self._repeating(len(inputs)), mode if mode is not None else nullcontext():
                self.rule.accumulate(inputs, targets)
            gradients = {name: weight.grad for name, weight in self.weights.items()}
            return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
        finally:
            self._restore()

    def seen_otherwise(self, seen: Mapping[str, Tensor], also: Callable[[], object] | None = None) -> Updates:
        """Return the updates if weights seem to be `seen` to all but the layers' own responses, which stay as they are."""
        responses = {name: self.weights[name].detach().clone() for name in seen}

        def put() -> None:
            for name, weight in seen.items():
                self.weights[name].copy_(weight)
            if also is not None:
                also()

        return self.updates(put, self.responding(responses))


def reads(probe: Probe, changed: Callable[[Tensor, torch.Generator], Tensor]) -> dict[tuple[str, str], float]:
    """How much the update of one layer moves, {(layer, other): change}, when `other`'s weight is changed for it alone.

    Forward activities and output error are held: every layer responds with the weight it has.

    Args:
        changed: makes the changed weight.
    """
    changes = {}
    for number, other in enumerate(probe.layers):
        generator = torch.Generator().manual_seed(number)
        after = probe.seen_otherwise({other: changed(probe.weights[other].detach(), generator)})
        for layer, before in probe.base.items():
            if layer != other:
                changes[layer, other] = change(after[layer], before)
    return changes


def other_signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return the weight with half of its signs turned; magnitudes stay."""
    flips = torch.randint(0, 2, weight.shape, generator=generator).to(weight)
    return weight * (2 * flips - 1)


def other_magnitudes(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return magnitudes times random factors around 1 (log-normal, 0.5); signs stay."""
    return weight * torch.exp(0.5 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))


def peeks(probe: Probe) -> dict[tuple[str, str], float] | None:
    """How much the update of a layer moves, {(layer, later): change}, when a later hidden layer responds otherwise.

    The output is held at what it was, so that the output error stays. None where the output is made in more than one pass
    of a step: there it cannot be held without breaking the loop.
    """
    last, made = probe.layers[-1], []

    def listen(name: str, result: Tensor) -> Tensor:
        if name == last:
            made.append(result.detach().clone())
        return result

    probe.updates(mode=probe.responding({}, listen))
    if len(made) != probe.uses[last]:
        return None
    changes = {}
    for number, later in enumerate(probe.layers[:-1]):
        generator = torch.Generator().manual_seed(number)

        held = iter(made)
        factor: list[Tensor] = []

        def disturb(
            name: str,
            result: Tensor,
            later: str = later,
            generator: torch.Generator = generator,
            held: Iterator[Tensor] = held,
            factor: list[Tensor] = factor,
        ) -> Tensor:
            if name == last:
                return next(held)
            if name != later:
                return result
            if not factor or factor[0].shape != result.shape[1:]:
                factor[:] = [torch.randn(result.shape[1:], generator=generator, dtype=result.dtype)]
            return result * factor[0]

        after = probe.updates(mode=probe.responding({}, disturb))
        earlier = probe.layers[:number]
        changes.update({(layer, later): change(after[layer], probe.base[layer]) for layer in earlier if layer in probe.base})
    return changes


def jumps(probe: Probe) -> dict[tuple[str, str], float]:
    """How much the update of a layer jumps, {(layer, bent): change}, when neurons of `bent` cross their kink.

    One sample is shown, that of the largest loss. Neurons silent for it are brought, by their biases, to either side of
    the kink, so close that every activity stays the same; only derivatives differ. Layers that are not dense, have no
    bias, or get no update from this sample are left out.
    """
    sample = probe.sample
    potentials: dict[str, Tensor] = {}
    changes = {}

    def note(name: str, result: Tensor) -> Tensor:
        potentials[name] = result.clone()
        return result

    with torch.no_grad(), probe.responding({}, note):
        probe.answer(sample[0])
    for number, bent in enumerate(probe.layers[:-1]):
        bias = probe.biases[bent]
        potential = potentials[bent][0]
        if bias is None or potential.shape != bias.shape:
            continue
        sides = []
        for side in (KINK, -KINK):
            moved = torch.where(potential < 0, bias - potential + side, bias)
            sides.append(probe.updates(lambda bias=bias, moved=moved: bias.copy_(moved), batch=sample))  # type: ignore[misc]
        for layer in probe.layers[: number + 1]:
            if layer in probe.base and any(float(side[layer].norm()) for side in sides):
                larger, smaller = sorted((side[layer] for side in sides), key=lambda update: -float(update.norm()))
                changes[layer, bent] = change(smaller, larger)
    return changes


def noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return the weight with noise of a tenth of its standard deviation on every entry."""
    return tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def sparse(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return the weight with half of its entries set to zero."""
    return tensor * torch.randint(0, 2, tensor.shape, generator=generator).to(tensor)


def quantised(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return one bit per entry: its sign, times the mean magnitude."""
    return tensor.sign() * tensor.abs().mean()


def with_other_feedback(probe: Probe, changed: Callable[[Tensor, torch.Generator], Tensor]) -> Updates:
    """Return the updates with all that carries feedback changed: what the rule holds, and what it reads of weights."""
    generator = torch.Generator().manual_seed(0)
    seen = {name: changed(weight.detach(), generator) for name, weight in probe.weights.items()}

    def put() -> None:
        for tensor in probe.feedback:
            tensor.copy_(changed(tensor.detach(), generator))

    return probe.seen_otherwise(seen, put)


def synapses(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return weights between populations, and biases, by name: of layers, and matrices of other modules that learn.

    A layer's has the name of the layer, another module's its own, as `attention.in_proj_weight` or `lstm.weight_hh_l0`.
    """
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor | None] = {}
    for name, module in model.named_modules():
        if is_weighted(module):
            matrices = {name: module.weight}
        else:
            own = {} if is_local(module) else dict(module.named_parameters(name, recurse=False))
            matrices = {full: parameter for full, parameter in own.items() if parameter.dim() > 1}
        for full, weight in matrices.items():
            if all(weight is not known for known in weights.values()):  # a tied one has its first name
                weights[full], biases[full] = weight, module.bias if is_weighted(module) else None
    return weights, biases


def _can_change(tensor: Tensor) -> bool:
    """Return whether a tensor holds more than one number, each with its own place."""
    return tensor.is_floating_point() and tensor.numel() > 1 and 0 not in tensor.stride()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
