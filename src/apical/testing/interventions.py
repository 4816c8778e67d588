"""Interventions: change one layer's feedback, or one unit's signal, and see what moves."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.credit import Credit, CreditRule
from apical.core.cut import CutRule
from apical.core.edge import EdgeRule
from apical.core.layers import is_local
from apical.core.outputs import output_errors, tensors
from apical.core.placement import OUTPUT_CREDIT
from apical.core.rest import undisturbed
from apical.core.wrapped import innermost
from apical.testing.effective_weight import effective_weight
from apical.testing.trial import Gradients, Trial, shadowed

AT_THE_OUTPUT = ("exact", OUTPUT_CREDIT)
"""Paths of layers behind the last cuts."""

MOST = 12
"""Layers that are intervened on one by one; more are sampled evenly, the first and the last among them."""


class NotApplicableError(Exception):
    """A check does not apply; the message says why."""


@contextmanager
def fed_back(rule: EdgeRule, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the error passes these layers through these weights, whatever the rule's own feedback is."""
    own_feedback, own_pathway = rule.feedback_of, rule.pathway

    def feedback_of(name: str) -> Any:
        compute, tensors = own_feedback(name)
        if name not in weights:
            return compute, tensors

        def replaced(shape: Any, weight: Tensor, *tensors: Tensor) -> Tensor:
            compute(shape, *tensors)  # draws the random numbers that the rule draws
            return weight

        return replaced, (weights[name], *tensors)

    def pathway(name: str, inputs: Tensor) -> Any:
        return None if name in weights else own_pathway(name, inputs)

    with shadowed(rule, feedback_of=feedback_of, pathway=pathway):
        yield


def sample(names: list[str]) -> list[str]:
    """At most :data:`MOST` of the names, evenly spread."""
    if len(names) <= MOST:
        return names
    return [names[round(i * (len(names) - 1) / (MOST - 1))] for i in range(MOST)]


def check_feedback_reach(trial: Trial) -> str:
    """Another feedback weight of one layer changes what lies below that layer, and nothing else."""
    rule = _edge_rule(trial)
    layers = sample(list(rule.layers))
    for name in layers:
        own = rule.feedback_weight(name)
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(own)
        changed = own + noise * max(float(own.std()) if own.numel() > 1 else 1.0, 1e-3)
        reached = set(trial.far(_with_feedback(trial, rule, {name: changed}), trial.usual))
        below = trial.below(rule.layers[name])
        if stray := sorted(reached - below):
            raise AssertionError(f"changing the feedback of layer {name!r} changes {stray[0]!r}, which is not below it")
        through = {parameter for parameter in trial.through(rule.layers[name]) if trial.shows(parameter)}
        if through and not reached & through:
            raise AssertionError(
                f"changing the feedback of layer {name!r} changes nothing below it: its error takes another path"
            )
    return _count(layers, len(rule.layers), "layer")


def check_feedback_zero(trial: Trial) -> str:
    """Without feedback at one layer no error reaches what has no other path to the loss."""
    rule = _edge_rule(trial)
    layers = sample(list(rule.layers))
    for name in layers:
        zero = {name: torch.zeros_like(rule.feedback_weight(name))}
        remainder = _with_feedback(trial, rule, zero)
        for parameter in sorted(trial.through(rule.layers[name])):
            if parameter in remainder and bool(remainder[parameter].any()):
                raise AssertionError(f"with zero feedback of layer {name!r} an error still reaches {parameter!r} below it")
    return _count(layers, len(rule.layers), "layer")


def check_feedback_exact(trial: Trial) -> str:
    """With feedback equal to the effective weights the update is backpropagation's."""
    rule = _edge_rule(trial)
    if trial.rule is not rule:
        raise NotApplicableError("a rule around this one changes its updates by definition")
    if not rule.through_time:
        raise NotApplicableError("no error goes to earlier moments, by choice")
    weights = effective_weights(trial, rule)
    with _still(trial) as still:
        require_backprop(still, _with_feedback(still, rule, weights), "with feedback equal to the weights")
    return _count(list(weights), len(rule.layers), "layer")


def check_feedback_differs(trial: Trial) -> str:
    """Where feedback is not the weight, the update below is not backpropagation's."""
    rule = _edge_rule(trial)
    weights = effective_weights(trial, rule)
    layers = []
    for name in sample(list(rule.layers)):
        own, weight = rule.feedback_weight(name), weights[name]
        if float((own - weight).norm()) <= 0.05 * float(weight.norm()):
            continue
        through = trial.through(rule.layers[name])
        layers += [name] if through else []
        _require_other(trial, through, f"layer {name!r} has feedback unlike its weight")
    if not layers:
        raise NotApplicableError("no layer has feedback unlike its weight and something to train below")
    return _count(layers, len(rule.layers), "layer")


def check_signals_zero(trial: Trial) -> str:
    """Without teaching signals at the cuts nothing learns but the last unit, exactly."""
    rule = _cut_rule(trial)
    remainder = _with_signals(trial, rule, [])
    learning = {name for name, grad in remainder.items() if bool(grad.any())}
    for name in sorted(learning):
        path = trial.path(name)
        shown = path.split(", ")[-1]
        if shown not in (*AT_THE_OUTPUT, "exact (local)", "own feedback") and not path.startswith("merged"):
            raise AssertionError(f"with all signals zero an error still reaches {name!r}, said to be {path!r}: it leaks")
    alone = learning - _tied(trial.model)  # a tied weight also learns where it lies deeper down
    alone = {name for name in alone if not trial.path(name).startswith("cut at")}  # so does one that is used there as well
    if rule.inside is not None:  # errors pass random matrices on their way to what else the last unit holds
        alone = {name for name in alone if trial.path(name) in AT_THE_OUTPUT}
    wrong = trial.far({n: remainder[n] for n in alone}, {n: trial.backprop[n] for n in alone if n in trial.backprop})
    if wrong and trial.rule is rule:  # a rule around this one changes that gradient by definition
        raise AssertionError(f"the last unit's gradient of {min(wrong)!r} is not exact although its error is the output's")
    if not learning and any(row.path in AT_THE_OUTPUT for row in trial.placement):
        raise AssertionError("with all signals zero no layer learns, not even the last")
    return f"{len(learning)} parameters of the last unit"


def check_signals_reach(trial: Trial) -> str:
    """Another signal at one cut changes that unit alone, and no parameter is changed by two different cuts."""
    rule = _cut_rule(trial)
    if rule.silent:
        raise NotApplicableError("the rule hands no signal to hidden units, as a control")
    number = _number_of_units(trial, rule)
    if not number:
        raise NotApplicableError("the model has no hidden unit")
    numbers = [int(i) for i in sample([str(i) for i in range(number)])]
    base = _with_signals(trial, rule, [])
    for i in numbers:
        reached = set(trial.far(_with_signals(trial, rule, [i]), base))
        for name in sorted(reached):
            path = trial.path(name)
            if path in (*AT_THE_OUTPUT, "frozen", "no credit"):
                raise AssertionError(f"a signal at a hidden unit changes {name!r}, said to be {path!r}")
    return _count(numbers, number, "unit")


def check_signals_differ(trial: Trial) -> str:
    """What is taught by a signal of the rule's does not learn by backpropagation."""
    _cut_rule(trial)
    names = {
        name
        for name, grad in trial.backprop.items()
        if trial.path(name).startswith("cut") and grad.numel() > 4 and bool(grad.any())
    }
    if not names:
        raise NotApplicableError("no layer is said to be cut")
    _require_other(trial, names, "layers are cut")
    return _count(sorted(names), len(names), "parameter")


def effective_weights(trial: Trial, rule: EdgeRule) -> dict[str, Tensor]:
    """Return the effective weight of each layer that has feedback.

    Raises:
        NotApplicableError: a layer applies no fixed matrix that could be measured.
    """
    probes: list[dict[str, Tensor]] = []
    for seed in range(2):
        with trial.sandbox():
            torch.manual_seed(seed)
            trial.model(trial.inputs)  # pruning and old weight norms make their weight in a hook
            probes.append({})
            for name, layer in rule.layers.items():
                with suppress(RuntimeError, TypeError, ValueError, IndexError):
                    weight = effective_weight(layer)
                    if weight is not None:
                        probes[-1][name] = weight
    for name, layer in rule.layers.items():
        first, second = (probe.get(name) for probe in probes)
        if first is None or second is None or not torch.equal(first, second):
            raise NotApplicableError(f"layer {name!r} ({type(layer).__name__}) applies no fixed matrix that can be measured")
    return probes[0]


@contextmanager
def _still(trial: Trial) -> Iterator[Trial]:
    """The trial or, where the model draws random numbers (between which rules may draw theirs), one in evaluation mode."""
    if not trial.is_stochastic:
        yield trial
        return
    with undisturbed(trial.model):
        trial.model.eval()
        yield Trial(trial.rule, trial.inputs, trial.targets)


def _with_feedback(trial: Trial, rule: EdgeRule, weights: Mapping[str, Tensor]) -> Gradients:
    with fed_back(rule, weights):
        return trial.step()


def _with_signals(trial: Trial, rule: CutRule, on: list[int]) -> Gradients:
    """Gradients with random signals at the hidden units in `on`, none at the others, and the loss's error at the output."""
    roots: list[Tensor] = []

    def backward(credit: Credit) -> None:
        generator = torch.Generator().manual_seed(1)
        hidden = [id(root) for root in roots]
        error = _output_error(trial, credit)
        pairs = [
            (root, error if error is not None and root.shape == error.shape and root.dim() else signal)
            for root, signal in zip(credit.roots, credit.signals, strict=True)
            if id(root) not in hidden and not isinstance(root, nn.Parameter)
        ]
        for index in on:
            if roots[index].requires_grad:
                signal = torch.randn(roots[index].shape, generator=generator).to(roots[index])
                pairs.append((roots[index], signal))
        torch.autograd.backward([r for r, _ in pairs], [s for _, s in pairs])

    return trial.step(backward, partial(_plainly, trial.rule, rule, roots))


def _output_error(trial: Trial, credit: Credit) -> Tensor | None:
    """Return the gradient of the loss at the output's one tensor, of its shape; None where it holds several."""
    if len(tensors(credit._output)) != 1:
        return None
    return output_errors(trial.rule.loss, credit._output, trial.targets)[1][0]


def _number_of_units(trial: Trial, rule: CutRule) -> int:
    roots: list[Tensor] = []
    with trial.sandbox():
        _plainly(trial.rule, rule, roots, trial.inputs, trial.targets)
    return len(roots)


def _plainly(outer: CreditRule, rule: CutRule, roots: list[Tensor], inputs: Any, targets: Any) -> Credit:
    """Return a credit of `outer`, which is the rule or around it, whose roots are the outputs of units."""
    with undisturbed(outer.model):
        outer(inputs, targets)  # so that this order of calls was seen
    torch.manual_seed(0)
    with _plain_roots(rule, roots):
        return outer(inputs, targets)


@contextmanager
def _plain_roots(rule: CutRule, roots: list[Tensor]) -> Iterator[None]:
    """Within, the rule's roots are the outputs of units; those of the hidden ones are put into `roots`."""
    run = rule.run

    def recorded(*args: Any) -> Any:
        result = run(*args)
        roots[:] = [cut.root for cut in result[1]]
        return result

    with shadowed(rule, plain_roots=True, run=recorded):
        yield


def require_backprop(trial: Trial, grads: Gradients, when: str) -> None:
    """Raise AssertionError, beginning with `when`, unless gradients are backpropagation's."""
    far = trial.far(grads, trial.backprop)
    if far:
        name = max(far, key=lambda name: far[name])
        raise AssertionError(
            f"{when} the gradient of {name!r} is not backpropagation's (it differs by {far[name]:.2g} of it)"
        )


def _require_other(trial: Trial, names: set[str], why: str) -> None:
    for name in sorted(names):
        exact = trial.backprop[name]
        own = trial.usual.get(name)
        if own is None or exact.numel() < 4:
            continue
        if float((own - exact).norm()) <= trial.tolerance * float(exact.norm()):
            raise AssertionError(f"{why}, yet {name!r} gets exactly backpropagation's gradient")


def _tied(model: nn.Module) -> set[str]:
    """Return the names of the parameters that several modules hold, or that a model may look up and multiply with."""
    modules = list(dict.fromkeys(model.modules()))
    uses = Counter(id(q) for module in modules for q in module._parameters.values() if q is not None)
    uses.update(id(q) for module in modules if is_local(module) for q in module.parameters() if q.dim() > 1)
    return {name for name, q in model.named_parameters() if uses[id(q)] > 1}


def _edge_rule(trial: Trial) -> EdgeRule:
    rule = innermost(trial.rule)
    if not isinstance(rule, EdgeRule):
        raise NotApplicableError("the rule sends its error through no feedback weight of a layer")
    return rule


def _cut_rule(trial: Trial) -> CutRule:
    rule = innermost(trial.rule)
    if not isinstance(rule, CutRule):
        raise NotApplicableError("the rule makes no cuts")
    if getattr(rule, "where", "activation") == "input":
        raise NotApplicableError("exact errors pass this rule's residual connections by its definition (leaky)")
    return rule


def _count(tried: list[Any], number: int, noun: str) -> str:
    plural = noun if number == 1 else f"{noun}s"
    return f"{number} {plural}" if len(tried) == number else f"{len(tried)} of {number} {plural}"
