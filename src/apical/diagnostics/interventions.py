"""Interventions on a running rule: change one thing, hold the rest, and see whose update moves.

All are made on copies of nothing: the rule runs its own code on its own model, and its state is put back afterwards. Changes
are relative, `|a - b| / |b|` over an update's weights; a rule that draws random numbers draws the same ones each time.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from apical.core.credit import CreditRule
from apical.core.units import weighted_layers
from apical.diagnostics.dataflow import Dataflow, Trace, recorded
from apical.diagnostics.synapses import Responding

Updates = dict[str, Tensor]
"""The requested change of each layer's weight, up to its sign and the learning rate: its gradient."""

KINK = 1e-9
"""Distance from the kink of an activation; what is continuous changes by about this, what jumps by much more."""


def change(after: Tensor, before: Tensor) -> float:
    """`|after - before| / |before|`; 0 where both are zero.

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
        sample: the one of the batch with the largest loss, (1, ...) and its target.
        base: the updates without any intervention; layers that do not learn, or have a zero update, are missing.
        flow: data flow of one step.
        traces: where each update comes from.
    """

    def __init__(self, rule: CreditRule, inputs: Tensor, targets: Tensor, seed: int = 0) -> None:
        self.rule, self.inputs, self.targets, self.seed = rule, inputs, targets, seed
        rule(inputs, targets)  # whatever is made at the first batch exists from here on
        found = weighted_layers(rule.model, shared=True)
        order: dict[str, None] = {}
        weights = {name: layer.weight for name, layer in found.items()}

        def note(name: str, result: Tensor) -> Tensor:
            order[name] = None
            return result

        with torch.no_grad(), Responding(weights, {}, note):
            rule.model(inputs)
        self.layers = list(order)
        self.modules = {name: found[name] for name in self.layers}
        self.weights = {name: weights[name] for name in self.layers}
        self._own = {_memory(tensor) for tensor in (*rule.model.parameters(), *rule.model.buffers())}
        self._kept: list[Tensor] = []
        self._remember()
        self.flow, self.traces = self._flow()
        self._kept = [t for t in self.flow.operands if t.is_leaf and not self.flow.made(t) and _memory(t) not in self._own]
        self._remember()
        self.base = {name: update for name, update in self.updates().items() if float(update.norm())}
        self.sample = self._worst()

    @property
    def feedback(self) -> list[Tensor]:
        """Tensors beside the model, each once: in the rule's state, or kept elsewhere and seen at work. No numbers."""
        held = [*self.rule.parameters(), *self.rule.buffers(), *self._kept]
        found = {_memory(tensor): tensor.detach() for tensor in held if _can_change(tensor)}
        return [tensor for memory, tensor in found.items() if memory not in self._own]

    def _worst(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            output = self.rule.model(self.inputs)
            losses = [float(self.rule.loss(output[i : i + 1], self.targets[i : i + 1])) for i in range(len(output))]
        worst = losses.index(max(losses))
        return self.inputs[worst : worst + 1], self.targets[worst : worst + 1]

    def _remember(self) -> None:
        held = [*self.rule.parameters(), *self.rule.buffers(), *self._kept]
        self._state = [(tensor.untyped_storage(), tensor.untyped_storage().clone()) for tensor in held]

    def _restore(self) -> None:
        self.rule.zero_grad()
        for storage, value in self._state:
            storage.copy_(value)

    def _flow(self) -> tuple[Dataflow, dict[str, Trace]]:
        torch.manual_seed(self.seed)
        flow = recorded(self.rule, self.weights, self.inputs, self.targets)
        traces = {name: flow.trace(weight.grad) for name, weight in self.weights.items() if weight.grad is not None}
        self._restore()
        return flow, traces

    def updates(
        self,
        before: Callable[[], object] | None = None,
        mode: Responding | None = None,
        batch: tuple[Tensor, Tensor] | None = None,
    ) -> Updates:
        """What the rule asks for.

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
            torch.manual_seed(self.seed)
            with mode if mode is not None else nullcontext():
                self.rule.accumulate(*(batch or (self.inputs, self.targets)))
            found = {name: weight.grad for name, weight in self.weights.items()}
            return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
        finally:
            self._restore()

    def seen_otherwise(self, seen: Mapping[str, Tensor], also: Callable[[], object] | None = None) -> Updates:
        """The updates where weights seem to be `seen` to all but the layers' own responses, which stay as they are."""
        responses = {name: self.weights[name].detach().clone() for name in seen}

        def put() -> None:
            for name, weight in seen.items():
                self.weights[name].copy_(weight)
            if also is not None:
                also()

        return self.updates(put, Responding(self.weights, responses))


def reads(probe: Probe, changed: Callable[[Tensor, torch.Generator], Tensor]) -> dict[tuple[str, str], float]:
    """How much the update of one layer moves, {(layer, other): change}, when `other`'s weight is changed for it alone.

    Forward activities and output error are held: every layer responds with the weight it has.

    Args:
        changed: makes the changed weight.
    """
    found = {}
    for number, other in enumerate(probe.layers):
        generator = torch.Generator().manual_seed(number)
        after = probe.seen_otherwise({other: changed(probe.weights[other].detach(), generator)})
        for layer, before in probe.base.items():
            if layer != other:
                found[layer, other] = change(after[layer], before)
    return found


def other_signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the signs turned; magnitudes stay."""
    flips = torch.randint(0, 2, weight.shape, generator=generator).to(weight)
    return weight * (2 * flips - 1)


def other_magnitudes(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Magnitudes times random factors around 1 (log-normal, 0.5); signs stay."""
    return weight * torch.exp(0.5 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))


def peeks(probe: Probe) -> dict[tuple[str, str], float] | None:
    """How much the update of a layer moves, {(layer, later): change}, when a later hidden layer responds otherwise.

    The output is held at what it was, so that the output error stays. None where the output is made more than once in a
    step: there it cannot be held without breaking the loop.
    """
    last, made = probe.layers[-1], []

    def listen(name: str, result: Tensor) -> Tensor:
        if name == last:
            made.append(result.detach().clone())
        return result

    probe.updates(mode=Responding(probe.weights, {}, listen))
    if len(made) != 1:
        return None
    found = {}
    for number, later in enumerate(probe.layers[:-1]):
        generator = torch.Generator().manual_seed(number)

        def disturb(name: str, result: Tensor, later: str = later, generator: torch.Generator = generator) -> Tensor:
            if name == last:
                return made[0]
            if name != later:
                return result
            return result * torch.randn(result.shape[1:], generator=generator, dtype=result.dtype)

        after = probe.updates(mode=Responding(probe.weights, {}, disturb))
        earlier = probe.layers[:number]
        found.update({(layer, later): change(after[layer], probe.base[layer]) for layer in earlier if layer in probe.base})
    return found


def jumps(probe: Probe) -> dict[tuple[str, str], float]:
    """How much the update of a layer jumps, {(layer, bent): change}, when neurons of `bent` cross their kink.

    One sample is shown, that of the largest loss. Neurons silent for it are brought, by their biases, to either side of
    the kink, so close that every activity stays the same; only derivatives differ. Layers that are not dense, have no
    bias, or get no update from this sample are left out.
    """
    sample = probe.sample
    potentials: dict[str, Tensor] = {}
    found = {}

    def note(name: str, result: Tensor) -> Tensor:
        potentials[name] = result.clone()
        return result

    with torch.no_grad(), Responding(probe.weights, {}, note):
        probe.rule.model(sample[0])
    for number, bent in enumerate(probe.layers[:-1]):
        bias = probe.modules[bent].bias
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
                found[layer, bent] = change(smaller, larger)
    return found


def not_presynaptic(probe: Probe) -> dict[str, float]:
    """Share of a dense layer's update that is no multiple of its own input, for one sample, by layer."""
    sample = probe.sample
    given: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given[name] = args[0].detach()

    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in probe.modules.items()]
    with torch.no_grad():
        probe.rule.model(sample[0])
    for hook in hooks:
        hook.remove()
    found = {}
    for name, update in probe.updates(batch=sample).items():
        if update.dim() == 2 and given[name].numel() == update.shape[1] and float(update.norm()):
            direction = given[name].flatten() / given[name].norm()
            found[name] = float((update - torch.outer(update @ direction, direction)).norm() / update.norm())
    return found


def noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tenth of its standard deviation of noise on every entry."""
    return tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def sparse(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the entries gone."""
    return tensor * torch.randint(0, 2, tensor.shape, generator=generator).to(tensor)


def quantised(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """One bit per entry: its sign, times the mean magnitude."""
    return tensor.sign() * tensor.abs().mean()


def with_other_feedback(probe: Probe, changed: Callable[[Tensor, torch.Generator], Tensor]) -> Updates:
    """The updates where everything that carries feedback is changed: what the rule holds, and what it reads of weights."""
    generator = torch.Generator().manual_seed(0)
    seen = {name: changed(weight.detach(), generator) for name, weight in probe.weights.items()}

    def put() -> None:
        for tensor in probe.feedback:
            tensor.copy_(changed(tensor.detach(), generator))

    return probe.seen_otherwise(seen, put)


def _can_change(tensor: Tensor) -> bool:
    """Whether it is more than one number, each with a place of its own."""
    return tensor.is_floating_point() and tensor.numel() > 1 and 0 not in tensor.stride()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
