"""Contrastive-signal-dependent plasticity (CSDP): spiking layers learn large traces for data, small ones for contrast.

    m = dL/dt = 2 t (p - y) / B',   p = sigmoid(sum_i t_i^2 - theta)         L: logistic loss of "is this data?", y in {1, 0}
    dW = - sum_steps (R_m m) s_pre^T,   a readout of all layers learns by its own error

Neurons and network are in sibling modules. Negatives are the same input with a wrong class ("labels"), or mixed
with another input of the batch ("mixtures"). No error travels between layers: a synapse needs the spikes it receives, the
trace of its neuron, and one number of its layer.

Sources: Ororbia, arXiv 2303.18187, Science Advances 10, eadn6076, and its code; memristors: arXiv 2409.10887.
Departures: the update is one optimiser step per stimulus (`learn="stimulus"`) unless `learn="step"` selects the
paper's own; the answer's input spikes come from one set of numbers that all samples share, so it is deterministic;
during learning, numbers are independent within a sample, but shifted equally at each step for all samples of a kind;
biases, where the model has them, are weights from a neuron that always fires; the input is not reconstructed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.batch import require_classes, require_one_type, require_precision
from apical.core.chain import Chain
from apical.core.credit import Batch, Credit, CreditRule, Loss, Measures, Panel, Root
from apical.core.losses import refuse_options, terms, value_at
from apical.core.processes import parted, summed, without_diagonal_
from apical.core.units import key
from apical.errors import ConfigError, UnsupportedModelError, require_choice, require_count
from apical.rules.contrastive_plasticity.memristor import Pairs
from apical.rules.contrastive_plasticity.network import (
    State,
    Synapses,
    advance_,
    goodness_of,
    modulate_,
    products,
    read_products,
    rest,
    twin,
)
from apical.rules.contrastive_plasticity.neurons import (
    Constants,
    draw_,
    draw_with_shift_,
    pairs_loss,
    pairs_slope,
    threshold_loss,
    threshold_slope,
)
from apical.rules.contrastive_plasticity.stimulus import Negatives, Stimulus, stimulus

Contrast = Literal["threshold", "pairs"]
Learn = Literal["stimulus", "step"]
Readout = Literal["context", "answer"]

THRESHOLD, JITTER = 0.055, 0.025
"""Half-width of the uniform distribution from which thresholds are drawn."""

FAINT = 0.5
"""Neurons hardly fire if the first weights are smaller than this."""

BOX = (nn.ReLU, nn.Hardtanh, nn.Identity)
"""Activations that a firing rate between 0 and 1 can represent."""


class Held(NamedTuple):
    """State of a stimulus that is being learned step by step."""

    stimulus: Stimulus
    state: State
    output: Tensor
    calls: int
    x: Tensor
    targets: Tensor


class ContrastiveSignalPlasticity(CreditRule):
    """Layers of spiking neurons that learn locally in time; the predicted class is that of the neuron that fires most.

    The answer comes from the rule (:meth:`answer`): spikes have no derivative, and the model alone is a rate network.

    Args:
        model: a chain of Linear layers, each followed by ReLU, `nn.Hardtanh(0, 1)` or nothing; at least one hidden layer,
            such as `apical.models.spiking` makes: hidden layers are W_1..W_L, the last one reads layer L. Inputs are spike
            probabilities: below 0 counts as 0, above 1 as 1.
        loss: of spike counts, for reports and for its own parameters; it does not train the layers.
        negatives: "labels" (a wrong class in the context) or "mixtures" (of two inputs, without context).
        steps: number of time steps per stimulus.
        learn: "stimulus" returns one credit for all steps; "step" returns one per step, over `steps` calls (see `repeats`).
        contrast: "threshold", or "pairs" of a positive and its negative.
        theta: the threshold.
        alpha: slope of the loss of pairs.
        readout: read-outs learn while the context is shown ("context", the paper's), or while the network answers without it
            ("answer"), as they are used later; better with few inputs, as in logic tasks.
        mix: share of the sample's own input in a mixture.
        decay: subtracted in `constrain_()` from a weight for each step and sample in which its neuron fires without it.
        levels: of the two memristors whose difference is a weight (:mod:`.memristor`); 0 for plain weights.
        constants: constants of neurons and traces.

    Raises:
        ConfigError: an option out of range, fewer than two classes, or a loss with options that labels do not have; or, in
            use, targets that are not class labels.
        UnsupportedModelError: the model is not such a chain; the message names the module.

    >>> model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> rule = ContrastiveSignalPlasticity(model, steps=10)
    >>> credit = rule(torch.rand(6, 9), torch.arange(6) % 3)
    >>> credit.backward()
    >>> rule.constrain_()
    >>> tuple(rule.answer(torch.rand(6, 9)).shape), sorted(name for name, _ in rule.named_parameters())
    ((6, 3), ['context.0', 'lateral.0', 'model.0.bias', 'model.0.weight', 'model.2.bias', 'model.2.weight'])
    """

    chance: Tensor
    output_alone = True
    feed_forward = False
    random_per_sample = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = F.cross_entropy,
        negatives: Negatives = "labels",
        steps: int = 40,
        learn: Learn = "stimulus",
        contrast: Contrast = "threshold",
        theta: float = 10.0,
        alpha: float = 1.0,
        readout: Readout = "context",
        mix: float = 0.5,
        decay: float = 0.0,
        levels: int = 0,
        constants: Constants = Constants(),  # noqa: B008
    ) -> None:
        super().__init__(model, loss)
        require_choice("negatives", negatives, ("labels", "mixtures"))
        require_choice("learn", learn, ("stimulus", "step"))
        require_choice("contrast", contrast, ("threshold", "pairs"))
        require_choice("readout", readout, ("context", "answer"))
        require_count("steps", steps, 2)  # spikes need one to reach a neuron
        if not (math.isfinite(theta) and 0 < alpha < math.inf and 0 <= mix < 1 and 0 <= decay < math.inf):
            raise ConfigError(
                "theta must be finite, alpha positive, mix in [0, 1), decay not negative; got "
                f"theta={theta}, alpha={alpha}, mix={mix}, decay={decay}"
            )
        if readout == "answer" and learn == "step":
            raise ConfigError(
                "readout='answer' learns from all steps together, which learn='step' does not allow; use learn='stimulus'"
            )
        if not (isinstance(levels, int) and (levels == 0 or levels >= 2)):
            raise ConfigError(f"levels must be 0 (continuous weights) or a whole number of at least 2; got {levels}")
        refuse_options(self, "contrastive-signal-dependent plasticity")
        self.chain = Chain(model, dense=True)
        stages = self.chain.stages
        if len(stages) < 2:
            raise UnsupportedModelError(f"layer {stages[0].name!r} is the only one; spiking layers need a hidden layer")
        for stage in stages:
            if not stage.is_dense:
                raise UnsupportedModelError(f"layer {stage.name!r} is not a Linear layer on vectors; use Linear layers")
            if not isinstance(stage.activation, BOX):
                raise UnsupportedModelError(
                    f"the activation after layer {stage.name!r} ({type(stage.activation).__name__}) is not the firing rate, "
                    "between 0 and 1, of a spiking neuron; use ReLU or Hardtanh(0, 1) there"
                )
        self.classes = stages[-1].size
        if self.classes < 2:
            raise ConfigError(f"contrastive plasticity needs at least two classes, but the model has {self.classes} output")
        self.negatives, self.steps, self.learn, self.contrast = negatives, steps, learn, contrast
        self.theta, self.alpha, self.mix, self.decay, self.constants = theta, alpha, mix, decay, constants
        self.readout = readout
        self.repeats = steps if learn == "step" else 1
        like = stages[0].layer.weight.detach()
        require_precision(type(self).__name__, like)
        sizes = [stage.size for stage in stages[:-1]]

        def uniform(low: float, shapes: Iterator[tuple[int, int]]) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(like.new_empty(shape).uniform_(low, 1.0)) for shape in shapes)

        self.lateral = uniform(0.0, ((n, n) for n in sizes))
        self.down = uniform(-1.0, pairwise(sizes))
        self.context = uniform(-1.0, ((n, self.classes) for n in sizes if negatives == "labels"))
        self.read = uniform(-1.0, ((self.classes, n) for n in sizes[:-1]))
        self.thresholds = nn.Module()
        for stage in stages:
            h = like.new_empty(stage.size).uniform_(THRESHOLD - JITTER, THRESHOLD + JITTER)
            self.thresholds.register_buffer(key(stage.name), h)
        self.register_buffer("chance", like.new_empty(steps, *stages[0].input_shape).uniform_())
        with torch.no_grad():
            for m in self.lateral:
                m.fill_diagonal_(0.0)
        self._faint = [stage.name for stage in stages[:-1] if float(stage.layer.weight.detach().abs().max()) < FAINT]
        self.pairs = Pairs(self._synapses(), levels) if levels else None
        self._silent: dict[tuple[str, int], Tensor] = {}  # of the batches since the last `constrain_`

    @property
    def remarks(self) -> list[str]:
        """Remarks on what the model's modules do not show."""
        behind = [s.name for s in self.chain.stages[:-1] if not isinstance(s.activation, nn.Hardtanh)]
        said = ["the answer counts spikes; the model alone is a rate network, which was not trained"]
        if behind:
            said.append(f"neurons of {' and '.join(behind)} spike, whatever activation follows these layers")
        if self._faint:
            said.append(
                f"the first weights of {' and '.join(self._faint)} are small, so spiking neurons hardly fire; start from "
                "weights in [-1, 1], as models.spiking does (--model spiking-256-64)"
            )
        if self.repeats > 1:
            said.append(f"each batch takes {self.repeats} optimiser steps; other rules take one")
        return [*said, "inputs are spike probabilities, clipped to [0, 1]; data sets named ...-raw have this range"]

    @property
    def names(self) -> list[str]:
        """Hidden layers."""
        return [stage.name for stage in self.chain.stages[:-1]]

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Credit for one batch: `inputs` (batch, ...), `targets` (batch,) class labels.

        Raises:
            ConfigError: targets are not class labels; or, with learn="step", a new batch came before all calls of this one.
        """
        self.require_attached()
        learns = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            x = self._enter(inputs)
            self._check(x, targets)
            held = self._resumed(x, targets) if learns and self.repeats > 1 else None
            sums = self._zeros() if learns else {}
            output = self._counts(x, targets, sums) if held is None else held.output
            roots: list[Root] = []
            logs: dict[str, Tensor] = {}
            if learns:
                held = held or self._begun(x, targets, output)
                steps = 1 if self.repeats > 1 else self.steps
                state, logs = self._taught(held.stimulus, held.state, steps, sums)
                roots = self._roots(sums)
                if self.repeats > 1:
                    calls = held.calls + 1
                    self._held = held._replace(state=state, calls=calls) if calls < self.repeats else None
        loss = value_at(self.loss, output, targets)
        finite = torch.stack([values.detach().sum() for values in (x, *self.parameters())]).isfinite().all()
        loss = loss.where(finite, torch.nan)  # spikes would hide NaN
        return Credit.of([*roots, *terms(loss)], output, loss, logs)

    def answer(self, inputs: Tensor) -> Tensor:
        """Spike counts of the classes (batch, K) after all steps, without context; they have no derivative."""
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            return self._counts(self._enter(inputs))

    @torch.no_grad()
    def constrain_(self) -> None:
        """Apply the decay; then clip weights to [-1, 1], lateral ones to [0, 1] without self-connections, and round
        all to the levels of their memristors."""
        for place, parameter in self._synapses().items():
            if parameter.requires_grad:
                if place in self._silent:
                    parameter.sub_(parted(summed(self._silent.pop(place)), parameter), alpha=self.decay)
                parameter.clamp_(-1.0, 1.0)
        for m in self.lateral:
            without_diagonal_(m.clamp_(min=0.0))
        if self.pairs is not None:
            self.pairs.program_({place: p for place, p in self._synapses().items() if p.requires_grad})

    @torch.no_grad()
    def goodness(self, inputs: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Goodness of positive and negative samples (batch,), mean over steps, by hidden layer."""
        stimulus = self._stimulus(self._enter(inputs), targets)
        rest = self._rest(stimulus.x, context=stimulus.context is not None)
        steps = [goodness_of(state) for _, state in self._steps(stimulus, (rest, twin(rest)), self.steps)]
        layers = zip(self.names, torch.stack(steps).mean(0), strict=True)
        return {name: (g[: len(inputs)], g[len(inputs) :]) for name, g in layers}

    def measures(self, probe: Batch, test: Sequence[Batch]) -> Measures:
        """Goodness of the probe's positive and negative samples, and the share of steps in which neurons fire."""
        layers: dict[str, dict[str, float]] = {}
        for name, (positive, negative) in self.goodness(*probe).items():
            values = {"goodness": float(positive.mean())}
            if len(negative):
                values["goodness_negative"] = float(negative.mean())
            layers[name] = values
        with torch.no_grad():
            for name, spikes in self.spikes(probe[0]).items():
                layers.setdefault(name, {})["firing_rate"] = float(spikes.mean())
        return Measures(layers=layers)

    @torch.no_grad()
    def panels(self, probe: Batch) -> list[Panel]:
        """Spikes of the first sample during the answer, firing rates, and goodness by class."""
        inputs, targets = probe
        spikes = self.spikes(inputs)
        first = {name: each[:, 0] for name, each in spikes.items()}
        rates = {name: each.mean((0, 1)) for name, each in spikes.items()}
        classes, heights = targets.unique().tolist(), dict[str, Tensor]()
        for name, (positive, negative) in self.goodness(inputs, targets).items():
            for sign, g in (("positive", positive), ("negative", negative)):
                if len(g):
                    heights[f"{name}, {sign}"] = torch.stack([g[targets == k].mean() for k in classes])
        return [
            Panel(f"Spikes of a sample of class {int(targets[0])}", "raster", "step", "neuron", first),
            Panel("Firing rates", "histogram", "share of steps in which a neuron fires", "share of neurons", rates),
            Panel("Goodness by class", "bars", "class", "goodness", heights, [str(k) for k in classes]),
        ]

    @torch.no_grad()
    def spikes(self, inputs: Tensor) -> dict[str, Tensor]:
        """Spikes (steps, batch, n) of every layer during the answer, 0 or 1."""
        spikes: dict[str, list[Tensor]] = {stage.name: [] for stage in self.chain.stages}
        for _, state in self._answering(self._enter(inputs)):
            for each, layer in zip(spikes.values(), (*state.layers, state.readout), strict=True):
                each.append(layer.s.clone())
        return {name: torch.stack(each) for name, each in spikes.items()}

    def _resumed(self, x: Tensor, targets: Tensor) -> Held | None:
        """State of the current batch; None for a new one."""
        if torch.compiler.is_compiling():
            raise ConfigError(
                "learn='step' keeps spikes between calls, which a compiled graph cannot; do not compile the rule, or use "
                "learn='stimulus'"
            )
        held: Held | None = self._held
        if held is None or (torch.equal(held.x, x) and torch.equal(held.targets, targets)):
            return held
        self._held = None
        raise ConfigError(
            f"learn='step' takes {self.repeats} calls per batch (rule.repeats), with an optimiser step after "
            f"each; a new batch came after {held.calls}. Make all calls, call rule.restart() to leave a batch "
            "early, or use learn='stimulus'"
        )

    def _begun(self, x: Tensor, targets: Tensor, output: Tensor) -> Held:
        stimulus = self._stimulus(x, targets)
        return Held(
            stimulus, self._rest(stimulus.x, context=stimulus.context is not None), output, 0, x.clone(), targets.clone()
        )

    def _zeros(self) -> dict[tuple[str, int], Tensor]:
        """Buffers that sum gradients, by kind and layer."""
        return {place: torch.zeros_like(p) for place, p in self._synapses().items() if p.requires_grad}

    def _additions(self, before: State, positives: int, sums: dict[tuple[str, int], Tensor]) -> list[Callable[[], object]]:
        """Functions that add a step's gradients from this state to the sums, once modulators and errors are written."""
        every: list[Callable[[], object]] = []

        def later(kind: str, k: int, to: Tensor, spikes: Tensor, factor: float) -> None:
            if (kind, k) in sums:
                every.append(partial(sums[kind, k].addmm_, to.T, spikes, alpha=factor))
            if (bias := sums.get((f"{kind} bias", k))) is not None:
                every.append(lambda: bias.add_(to.sum(0), alpha=factor))

        products(before, self._matrices(), self.constants, [layer.m for layer in before.layers], later)
        if self.readout == "context":
            read_products(before, self.constants, before.readout.m[:positives], later)
        return every

    @staticmethod
    def _into(sums: dict[tuple[str, int], Tensor]) -> Callable[[str, int, Tensor, Tensor, float], None]:
        """Return a function that adds products to their sums, if these exist."""

        def add(kind: str, k: int, to: Tensor, spikes: Tensor, factor: float) -> None:
            if (kind, k) in sums:
                sums[kind, k].addmm_(to.T, spikes, alpha=factor)
            if (f"{kind} bias", k) in sums:
                sums[f"{kind} bias", k].add_(to.sum(0), alpha=factor)

        return add

    def _taught(
        self, stimulus: Stimulus, state: State, steps: int, sums: dict[tuple[str, int], Tensor]
    ) -> tuple[State, dict[str, Tensor]]:
        """Run some steps and add their gradients to the sums; return the state and the mean losses."""
        goods = []
        turns = state, twin(state)
        additions = [self._additions(each, stimulus.samples, sums) for each in turns]  # once: memory stays
        for (before, state), every in zip(self._steps(stimulus, turns, steps), cycle(additions), strict=False):
            goods.append(goodness_of(state))
            modulate_(state, self._slope(goods[-1], stimulus.y, stimulus.samples), stimulus.target)
            for add in every:
                add()
            if self.decay:
                self._note_silence(before, state)
        losses = (self._loss_of(g, stimulus.y, stimulus.samples) for g in torch.stack(goods, 1))
        return state, {f"local {name}": loss for name, loss in zip(self.names, losses, strict=True)}

    def _roots(self, sums: dict[tuple[str, int], Tensor]) -> list[Root]:
        """Parameters with their gradients: those of read-outs times 1 - |C|, nothing from a neuron to itself."""
        named = self._synapses()
        for (kind, k), gradient in sums.items():
            if kind in ("read", "read bias"):
                gradient.mul_(1 - named[kind, k].detach().abs())
            elif kind == "lateral":
                gradient.fill_diagonal_(0.0)
        return [(named[place], gradient) for place, gradient in sums.items()]

    def _loss_of(self, g: Tensor, y: Tensor, samples: int) -> Tensor:
        if self.contrast == "threshold":
            return threshold_loss(g, y, self.theta)
        return pairs_loss(g, self.alpha) if len(y) > samples else g.new_zeros(())

    def _slope(self, g: Tensor, y: Tensor, samples: int) -> Tensor:
        """Derivative of the loss by goodness (L, rows)."""
        if self.contrast == "threshold":
            return threshold_slope(g, y, self.theta)
        return pairs_slope(g, self.alpha) if len(y) > samples else torch.zeros_like(g)

    def _note_silence(self, before: State, after: State) -> None:
        """Count, for every synapse, how often its neuron fired while the synapse was silent."""
        if torch.compiler.is_compiling():
            raise ConfigError(
                "decay counts spikes between calls, which a compiled graph cannot; do not compile the rule, or use decay=0"
            )
        learning = {place for place, parameter in self._synapses().items() if parameter.requires_grad}

        def note(kind: str, k: int, to: Tensor, spikes: Tensor, factor: float) -> None:
            if (kind, k) in learning:
                seen = to.sum(0).unsqueeze(1) - to.T @ spikes
                self._silent[kind, k] = self._silent[kind, k] + seen if (kind, k) in self._silent else seen

        products(before, self._matrices(), self.constants, [layer.s for layer in after.layers], note)

    def _synapses(self) -> dict[tuple[str, int], nn.Parameter]:
        """Every trainable matrix and bias, by kind and layer."""
        s = self._matrices()
        kinds = {"up": s.up, "up bias": s.bias, "down": s.down, "lateral": s.lateral, "context": s.context, "read": s.read}
        synapses = {(kind, k): each for kind, every in kinds.items() for k, each in enumerate(every) if each is not None}
        if s.read_bias is not None:
            synapses["read bias", len(s.read) - 1] = s.read_bias
        return synapses  # type: ignore[return-value]

    def _matrices(self) -> Synapses:
        *hidden, last = (stage.layer for stage in self.chain.stages)
        return Synapses(
            [layer.weight for layer in hidden],
            [layer.bias for layer in hidden],
            list(self.down),
            list(self.lateral),
            list(self.context),
            [*self.read, last.weight],
            last.bias,
        )

    def _rest(self, x: Tensor, *, context: bool) -> State:
        return rest(x, [self.thresholds.get_buffer(key(stage.name)) for stage in self.chain.stages], context)

    def _steps(self, stimulus: Stimulus, turns: tuple[State, State], steps: int) -> Iterator[tuple[State, State]]:
        """States before and after each step: two alternating twins that share all memory except the neurons' spikes."""
        synapses, (before, after), x, context = self._matrices(), turns, stimulus.x, stimulus.context
        for shift in x.new_empty(steps, len(x), 1, x.shape[-1]).uniform_():
            advance_(before, after, synapses, self.constants)
            yield before, after
            draw_with_shift_(after.inputs, x, stimulus.phase, shift)  # read by the next step
            if after.context is not None and context is not None:
                after.context.copy_(context)
                context = None  # unchanged, as the twins share it
            before, after = after, before

    def _answering(self, x: Tensor) -> Iterator[tuple[State, State]]:
        """The same without context; all samples use the same random numbers."""
        state, synapses = self._rest(x, context=False), self._matrices()
        after = twin(state)
        for u in self.chance:
            advance_(state, after, synapses, self.constants)
            yield state, after
            draw_(after.inputs, x, u)
            state, after = after, state

    def _counts(self, x: Tensor, targets: Tensor | None = None, sums: dict[tuple[str, int], Tensor] | None = None) -> Tensor:
        """Spikes of the read-out (batch, K); with readout="answer" its gradients are added to the sums."""
        counts = x.new_zeros(len(x), self.classes)
        right = None
        if sums and targets is not None and self.readout == "answer":
            right, add = F.one_hot(targets.long(), self.classes).to(x.dtype), self._into(sums)
        for before, state in self._answering(x):
            counts += state.readout.s
            if right is not None:
                read_products(before, self.constants, state.readout.t - right, add)
        return counts

    def _stimulus(self, x: Tensor, targets: Tensor) -> Stimulus:
        return stimulus(x, targets, self.classes, self.negatives, self.mix)

    def _enter(self, inputs: Tensor) -> Tensor:
        """Spike probabilities (batch, n_0)."""
        return self.chain.enter(inputs).clamp(0.0, 1.0)

    def _check(self, x: Tensor, targets: Tensor) -> None:
        like = self.chain.like
        require_precision(type(self).__name__, like)
        require_one_type(type(self).__name__, like, [*self.lateral, *self.thresholds.buffers()])
        if targets.is_floating_point() or targets.shape != x.shape[:1]:
            raise ConfigError(
                f"contrastive plasticity needs one class label per sample, not targets of shape {tuple(targets.shape)} and "
                f"{targets.dtype}"
            )
        require_classes(targets, self.classes)
