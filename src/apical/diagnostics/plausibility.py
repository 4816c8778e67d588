"""What a rule needs that a brain may lack, measured on the running rule: nothing here is declared by the rule.

:func:`examine` intervenes on a rule (:mod:`apical.diagnostics.interventions`) and follows the data through one of its steps
(:mod:`apical.diagnostics.dataflow`); :func:`judge` turns what was found into a verdict per criterion, with its evidence.

A unit is a weighted layer here. Everything is asked about the updates of forward weights; "credit" is what arrives for them.
Robustness is that of one update: by how many degrees it turns when all that carries feedback is changed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apical.core.batch import require_rows
from apical.core.credit import CreditRule
from apical.diagnostics.alignment import angle, gradients, unchanged
from apical.diagnostics.dataflow import Trace
from apical.diagnostics.gauss_newton import require_apart, require_precision
from apical.diagnostics.interventions import (
    Probe,
    change,
    jumps,
    noisy,
    other_magnitudes,
    other_signs,
    peeks,
    quantised,
    reads,
    sparse,
    with_other_feedback,
)
from apical.diagnostics.memory import held_bytes
from apical.diagnostics.positions import across_positions, not_presynaptic
from apical.errors import ConfigError

MOVED = 1e-6
"""Relative change from which an update counts as moved; rounding stays below 1e-12."""

JUMPED = 1e-3
"""The same at the kink of an activation, where what is continuous changes by the distance to the kink over the nudge."""

ALIGNED = 30.0
"""Degrees between a weight and a feedback matrix below which they are called symmetric; shared signs alone give 30 to 41."""

CHANCE = 4.0
"""Standard deviations from 90 degrees within which an angle is one of chance."""

CLOSE = 45.0
"""Degrees to backpropagation's gradient within which a rule is called close to it."""


NAMED = 4
"""Layers named in a sentence, at most."""


@dataclass(frozen=True)
class Verdict:
    """An answer with its evidence.

    Attributes:
        verdict: to the criterion's question; "measured" where the criterion is a number.
        good: whether it speaks for the rule; None where it does not say.
        text: the evidence, in a sentence.
        numbers: the evidence.
    """

    verdict: Literal["yes", "no", "partly", "not applicable", "measured"]
    good: bool | None
    text: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Findings:
    """What was measured on one rule. Pairs are (layer whose update, other layer); layers in the order of execution.

    Attributes:
        layers: names of the weighted layers.
        learns: those whose weights get an update that is not zero.
        signs: change of an update when half of the signs of another layer's weight are turned for all but its response.
        magnitudes: the same for magnitudes.
        peeks: change when a later hidden layer responds otherwise while the output stays; None if that cannot be arranged.
        jumps: change when silent neurons of the same or a later hidden layer cross their kink.
        kinks: the same for backpropagation: empty or all small where activations are smooth.
        presynaptic: share of a dense layer's update, for one sample, that is no combination of the layer's inputs at any
            position; NaN where that cannot be told.
        crossing: share of what the error at one position adds to a dense layer's update that is no multiple of the layer's
            input there.
        no_positions: why nothing was asked about positions; empty if it was.
        traces: where each layer's update comes from.
        responses: forward passes in which each layer responds in a step.
        symmetry: smallest angle of a feedback matrix to a forward weight of its shape, and that weight's size; None if none
            has the shape of a weight.
        gradient: angle of each update to backpropagation's; empty where the network's answer has no derivative.
        depth: products one after another from the batch to the last update.
        multiply_adds: of a step.
        parameters: numbers that feedback needs in addition to the model.
        held: bytes held between the rule's call and its backward pass.
        settles: the rule's network answers by settling, all layers together.
        turned: degrees by which hidden updates turn, on average, with noisy, sparse and quantised feedback; NaN where
            nothing could be changed.
    """

    layers: list[str]
    learns: list[str]
    signs: dict[tuple[str, str], float]
    magnitudes: dict[tuple[str, str], float]
    peeks: dict[tuple[str, str], float] | None
    jumps: dict[tuple[str, str], float]
    kinks: dict[tuple[str, str], float]
    presynaptic: dict[str, float]
    crossing: dict[str, float]
    no_positions: str
    traces: dict[str, Trace]
    responses: dict[str, int]
    symmetry: tuple[float, int] | None
    gradient: dict[str, float]
    depth: int
    multiply_adds: int
    parameters: int
    held: int
    settles: bool
    turned: dict[str, float]

    @property
    def hidden(self) -> list[str]:
        """Hidden layers that learn."""
        return [layer for layer in self.layers[:-1] if layer in self.learns]

    def later(self, layer: str) -> list[str]:
        """Layers behind `layer`."""
        return self.layers[self.layers.index(layer) + 1 :]


def examine(rule: CreditRule, inputs: Tensor, targets: Tensor, exact: CreditRule) -> Findings:
    """Measure a rule, in float64 and in the state it has been trained to.

    Args:
        rule: the rule; it is left as it was found.
        inputs: (batch, ...); a small batch will do, memory grows with the simulated time of the rule.
        targets: (batch, ...).
        exact: backpropagation on a model of the same architecture.

    Raises:
        ConfigError: the rule does not repeat itself under one seed, so that changes cannot be told from chance; or inputs or
            outputs are not one tensor.
        UnsupportedModelError: batch normalisation without running statistics, under which one sample has no update.
    """
    require_rows("the audit", inputs)
    require_apart(rule.model)
    for parameter in rule.model.parameters():
        require_precision(parameter)
    with unchanged(rule), unchanged(exact):
        return _examined(rule, inputs, targets, exact)


def _examined(rule: CreditRule, inputs: Tensor, targets: Tensor, exact: CreditRule) -> Findings:
    probe = Probe(rule, inputs, targets)
    again = probe.updates()
    if any(change(again[layer], update) > MOVED for layer, update in probe.base.items()):
        raise ConfigError(f"{type(rule).__name__} gives another update each time from one state and one seed")
    own, backprop = gradients(rule, inputs, targets, probe.weights)
    hidden = probe.layers[:-1]
    turned = {}
    for changed in (noisy, sparse, quantised):
        after = with_other_feedback(probe, changed)
        angles = [angle(after[layer], probe.base[layer]) for layer in hidden if layer in probe.base]
        moved = any(change(after[layer], probe.base[layer]) > MOVED for layer in hidden if layer in probe.base)
        turned[changed.__name__] = sum(angles) / len(angles) if moved else float("nan")
    crossing, no_positions = across_positions(probe)
    return Findings(
        layers=probe.layers,
        learns=list(probe.base),
        signs=reads(probe, other_signs),
        magnitudes=reads(probe, other_magnitudes),
        peeks=peeks(probe),
        jumps=jumps(probe),
        kinks=jumps(Probe(exact, inputs, targets)),
        presynaptic=not_presynaptic(probe),
        crossing=crossing,
        no_positions=no_positions,
        traces=probe.traces,
        responses=probe.responses,
        symmetry=symmetry(probe.flow.operands, [*probe.weights.values(), *probe.blocks]),
        gradient={layer: angle(own[layer], backprop[layer]) for layer in own},
        depth=max(trace.depth for trace in probe.traces.values()),
        multiply_adds=probe.flow.multiply_adds,
        parameters=sum(t.untyped_storage().nbytes() // t.element_size() for t in probe.feedback),
        held=held_bytes(rule, inputs, targets),
        settles=not rule.feed_forward,
        turned=turned,
    )


def symmetry(feedback: Iterable[Tensor], weights: Iterable[Tensor]) -> tuple[float, int] | None:
    """The smallest angle in degrees between a feedback matrix and a weight of its shape, and how many entries those have.

    A matrix is compared as it is and transposed. None where no shapes match.
    """
    angles = []
    for matrix in feedback:
        for weight in weights:
            if matrix.shape == weight.shape:
                angles.append((angle(matrix, weight), weight.numel()))
            if matrix.dim() == weight.dim() == 2 and matrix.T.shape == weight.shape:
                angles.append((angle(matrix.T, weight), weight.numel()))
    return min((pair for pair in angles if pair[0] == pair[0]), default=None)  # a zero matrix has no angle


def _largest(changes: dict[tuple[str, str], float], keep: Callable[[str, str], bool]) -> float:
    return max((value for (layer, other), value in changes.items() if keep(layer, other)), default=0.0)


def _transport(changes: dict[tuple[str, str], float], found: Findings, what: str) -> Verdict:
    if not found.hidden:
        return _nothing_learns()
    moved = _largest(changes, lambda layer, other: layer in found.hidden and other in found.later(layer))
    good = moved <= MOVED
    text = f"changing {what} of later weights, with every response held, moves updates by {moved:.2g} of their norm"
    return Verdict("yes" if good else "no", good, text, {"change": moved})


def _nothing_learns() -> Verdict:
    return Verdict("not applicable", None, "no hidden update to ask about", {})


def no_sign_transport(found: Findings) -> Verdict:
    """Do hidden updates stay when signs of later weights change?"""
    return _transport(found.signs, found, "signs")


def no_magnitude_transport(found: Findings) -> Verdict:
    """Do hidden updates stay when magnitudes of later weights change?"""
    return _transport(found.magnitudes, found, "magnitudes")


def no_symmetry(found: Findings) -> Verdict:
    """Is every feedback matrix unlike the forward weights after training?"""
    if found.symmetry is None:
        return Verdict("yes", True, "no matrix on the feedback path has the shape of a weight", {})
    degrees, size = found.symmetry
    spread = float(torch.rad2deg(torch.tensor(size**-0.5)))
    limit = 90 - CHANCE * spread
    text = f"nearest feedback matrix to its weight: {degrees:.1f} degrees (chance 90 ± {spread:.1f})"
    numbers = {"degrees": degrees, "chance_spread": spread}
    if degrees < ALIGNED:
        return Verdict("no", False, text, numbers)
    return Verdict("yes", True, text, numbers) if degrees > limit else Verdict("partly", None, text, numbers)


def local(found: Findings) -> Verdict:
    """Does an update depend on nothing of other layers but what they send?"""
    if not found.hidden:
        return _nothing_learns()
    read = max(_largest(changes, lambda *_: True) for changes in (found.signs, found.magnitudes))
    bent = _largest(found.jumps, lambda layer, other: layer != other)
    peeked = _largest(found.peeks or {}, lambda layer, _: layer in found.hidden)
    foreign = max((share for share in found.presynaptic.values() if share == share), default=0.0)
    unasked = [layer for layer, share in found.presynaptic.items() if share != share]
    numbers = {"weights": read, "derivatives": bent, "activities": peeked, "not_presynaptic": foreign}
    parts = ["other layers' weights"] if read > MOVED else []
    parts += ["later layers' derivatives"] if bent > JUMPED else []
    parts += ["later layers' activities, with the output held"] if peeked > MOVED else []
    parts += ["more than their layer's inputs times signals"] if foreign > MOVED else []
    text = f"updates depend on {', '.join(parts)}" if parts else "updates depend on no other layer's weights or derivatives"
    if found.peeks is None:
        text += "; later activities were not asked about: the output responds in several passes, and cannot be held"
    if unasked:
        what = "every input" if len(unasked) == len(found.presynaptic) else f"the inputs of {', '.join(unasked)}"
        text += (
            f"; whether updates are made of the layer's own inputs was not asked of {what}: they change, or span everything"
        )
    if not parts:
        return Verdict("yes", True, text, numbers)
    bad = read > MOVED or foreign > MOVED
    return Verdict("no" if bad else "partly", False if bad else None, text, numbers)


def no_credit_across_positions(found: Findings) -> Verdict:
    """Does the error at a position (a token, a moment) teach a layer about its input at that position alone?"""
    if found.no_positions:
        return Verdict("not applicable", None, found.no_positions, {})
    shares = {layer: share for layer, share in found.crossing.items() if share == share}
    if not shares:
        return Verdict("not applicable", None, "at a position, every layer's inputs span everything it could be given", {})
    crossing = sorted((layer for layer, share in shares.items() if share > MOVED), key=lambda layer: -shares[layer])
    text = "what the error at a position adds to updates is a multiple of the layer's input there"
    if crossing:
        most = ", ".join(f"{layer} {shares[layer]:.2g}" for layer in crossing[:NAMED])
        text = f"in {len(crossing)} of {len(shares)} layers, the error at a position also adds to the update what is no "
        text += f"multiple of the layer's input there; share of its norm: {most}{', ...' if len(crossing) > NAMED else ''}"
    numbers = {"share": max(shares.values()), "layers": len(crossing), "asked": len(shares)}
    return Verdict("no" if crossing else "yes", not crossing, text, numbers)


def no_backward_locking(found: Findings) -> Verdict:
    """Does credit reach a layer without passing the layers behind it?"""
    # Asked twice: when credit first arrives, and how long each pass is where it takes several. One as long as the way there
    # and back through all layers passes them all, in whatever order its credit arrives.
    hidden = found.hidden
    if not hidden:
        return _nothing_learns()
    if len(hidden) < 2:
        return Verdict("not applicable", None, "only one hidden layer learns", {})
    traces = [found.traces[layer] for layer in hidden]
    if all(trace.earliest is None for trace in traces):
        return Verdict("yes", True, "no hidden update waits for the output error", {})
    first = [trace.earliest or 0 for trace in traces]
    last = [trace.latest or 0 for trace in traces]
    if found.settles:  # paths of many steps have one length for all layers, whichever way credit takes
        text = "layers settle together: credit has no order between them, and all updates wait until they have"
        return Verdict("not applicable", None, text, {})
    numbers: dict[str, float] = {"first": first[0], "last": last[0], "top_first": first[-1], "top_last": last[-1]}
    text = f"products from the output error to the updates, lowest to topmost hidden layer: {', '.join(map(str, first))}"
    text += f" at the earliest, {', '.join(map(str, last))} at the latest" if first != last else ""
    passes = found.responses[found.layers[-1]] - 1  # of the output, after its first error
    whole = 2 * (len(found.layers) - 1)
    if passes > 1:
        each = max(trace.latest or 0 for trace in found.traces.values()) / passes
        text += f"; the output responds {passes} times more, every {each:.1f} products"
        numbers |= {"passes": passes, "products_per_pass": each}
    if max(first) > first[-1] or numbers.get("products_per_pass", 0.0) >= whole:
        return Verdict("no", False, text, numbers)
    return Verdict("partly", None, text, numbers) if max(last) > last[-1] else Verdict("yes", True, text, numbers)


def no_update_locking(found: Findings) -> Verdict:
    """Can a layer learn before the layers behind it have responded?"""
    if not found.hidden:
        return _nothing_learns()
    waits = [layer for layer in found.hidden if found.traces[layer].layers & set(found.later(layer))]
    share = len(waits) / len(found.hidden)
    text = f"{len(waits)} of {len(found.hidden)} hidden updates depend on responses of later layers"
    return Verdict("no" if waits else "yes", not waits, text, {"share": share})


def one_phase(found: Findings) -> Verdict:
    """Does one response of each layer suffice for an update of everything?"""
    most = max(found.responses.values())
    text = f"a layer responds up to {most} times in a step" if most > 1 else "each layer responds once in a step"
    return Verdict("yes" if most == 1 else "no", most == 1, text, {"responses": most})


def no_derivative(found: Findings) -> Verdict:
    """Does a layer learn without the derivative of its activation?"""
    if not found.hidden:
        return _nothing_learns()
    own = {pair: jump for pair, jump in found.jumps.items() if pair[0] == pair[1]}
    if not own or max(found.kinks.get(pair, 0.0) for pair in own) <= JUMPED:
        return Verdict("not applicable", None, "no dense hidden layer with biases and a kink to ask at", {})
    jump = max(own.values())
    good = jump <= JUMPED
    text = f"at the kink of its activation an update jumps by {jump:.2g} of its norm"
    return Verdict("yes" if good else "no", good, text, {"jump": jump})


def close_to_backprop(found: Findings) -> Verdict:
    """Are hidden updates close to backpropagation's, after training?"""
    if not found.hidden:
        return _nothing_learns()
    if not found.gradient:
        return Verdict("not applicable", None, "the network's answer has no derivative, so there is no gradient", {})
    mean = sum(found.gradient[layer] for layer in found.hidden) / len(found.hidden)
    if mean != mean:
        return Verdict("not applicable", None, "a hidden layer's gradient is zero", {})
    text = f"hidden updates are {mean:.1f} degrees from the gradient on average"
    return Verdict("yes" if mean < CLOSE else "no", mean < CLOSE, text, {"degrees": mean})


def _robust(key: str, what: str) -> Callable[[Findings], Verdict]:
    def turned(found: Findings) -> Verdict:
        degrees = found.turned[key]
        if degrees != degrees:
            return Verdict("not applicable", None, "no feedback that could be changed moves a hidden update", {})
        return Verdict("measured", None, f"{what} turns hidden updates by {degrees:.1f} degrees", {"degrees": degrees})

    return turned


def _count(field: str, unit: str) -> Callable[[Findings], Verdict]:
    def counted(found: Findings) -> Verdict:
        value = getattr(found, field)
        return Verdict("measured", None, f"{value:,} {unit}", {field: value})

    return counted


class Criterion(NamedTuple):
    """A question to a rule, and how it is answered from the findings."""

    key: str
    title: str
    question: str
    judge: Callable[[Findings], Verdict]


def _criterion(judge: Callable[[Findings], Verdict], title: str) -> Criterion:
    return Criterion(judge.__name__, title, judge.__doc__ or "", judge)


CRITERIA: list[Criterion] = [
    _criterion(no_sign_transport, "No transport of signs"),
    _criterion(no_magnitude_transport, "No transport of magnitudes"),
    _criterion(no_symmetry, "No symmetry after training"),
    _criterion(local, "Local"),
    _criterion(no_credit_across_positions, "No credit across positions"),
    _criterion(no_backward_locking, "No backward locking"),
    _criterion(no_update_locking, "No update locking"),
    _criterion(one_phase, "One phase"),
    _criterion(no_derivative, "No derivative"),
    _criterion(close_to_backprop, "Close to backprop"),
    Criterion("noise", "Noise", "Turn of updates with 10 % noise on feedback", _robust("noisy", "10 % noise on feedback")),
    Criterion("sparse", "Sparse", "Turn of updates with half of the feedback gone", _robust("sparse", "half the feedback")),
    Criterion("quantised", "One bit", "Turn of updates with feedback of one bit", _robust("quantised", "one-bit feedback")),
    Criterion("depth", "Steps", "Products in sequence in a step", _count("depth", "products in sequence")),
    Criterion("multiply_adds", "Multiply-adds", "Multiply-adds of a step", _count("multiply_adds", "multiply-adds")),
    Criterion("parameters", "Parameters", "Numbers beside the model", _count("parameters", "numbers beside the model")),
    Criterion("held", "Held", "Bytes held for the update", _count("held", "bytes held for the update")),
]
"""All criteria, in the order in which they are shown."""


def judge(found: Findings) -> dict[str, Verdict]:
    """Return a verdict for every criterion, by its key."""
    return {criterion.key: criterion.judge(found) for criterion in CRITERIA}
