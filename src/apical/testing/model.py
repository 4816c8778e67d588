"""Is a rule what it says, on your own model? :func:`check_model` finds out by intervention."""

import math
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from apical.core.credit import Credit, CreditRule
from apical.core.placement import Placement
from apical.core.rest import undisturbed
from apical.core.wrapped import innermost
from apical.core.wrappers import COMPILES
from apical.errors import ConfigError, UnsupportedModelError
from apical.rules.backprop import Backprop
from apical.testing import interventions
from apical.testing.interventions import NotApplicableError
from apical.testing.trial import Gradients, Trial


@dataclass
class ModelReport:
    """What :func:`check_model` did.

    Attributes:
        placement: the rule's own statement of where each layer's error comes from.
        passed: what each check that ran has tried, by its name.
        skipped: why the others did not apply.
    """

    rule: str
    placement: Placement
    passed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.rule}: {len(self.passed)} checks passed, {len(self.skipped)} skipped"]
        lines += [f"  passed  {name}: {tried}" for name, tried in self.passed.items()]
        for why in dict.fromkeys(self.skipped.values()):
            names = ", ".join(name for name, reason in self.skipped.items() if reason == why)
            lines += textwrap.wrap(f"  skipped {names}: {why}", 80, subsequent_indent=" " * 10)
        return "\n".join([*lines, "", str(self.placement)])


def check_gradients_and_output(trial: Trial) -> str:
    """Gradients are finite, and the output is the model's own."""
    for name, grad in trial.usual.items():
        if not bool(grad.isfinite().all()):
            raise AssertionError(f"the gradient of {name!r} is not finite")
    if not trial.usual:
        raise AssertionError("no parameter of the model got a gradient")
    if trial.rule.feed_forward and not trial.is_stochastic:
        with trial.sandbox():
            output = tree_leaves(trial.rule(trial.inputs, trial.targets)._output)
            output = [x.detach().clone() for x in output if isinstance(x, Tensor)]
        with trial.sandbox(), torch.no_grad():
            plain = [x for x in tree_leaves(trial.model(trial.inputs)) if isinstance(x, Tensor)]
        if any(not _close(a, b, trial.tolerance) for a, b in zip(output, plain, strict=True)):
            raise AssertionError("credit.output is not what the model answers")
    return f"{len(trial.usual)} parameters"


def check_placement(trial: Trial) -> str:
    """What is said to be frozen or without credit gets no gradient, all else does, and backpropagation is exact."""
    for name, parameter in trial.model.named_parameters():
        path, has = trial.path(name), name in trial.usual
        if path in ("frozen", "no credit") and has and bool(trial.usual[name].any()):
            raise AssertionError(f"{name!r} is said to be {path!r}, but it got a gradient")
        learns = path not in ("frozen", "no credit") and parameter.requires_grad and name in trial.backprop
        if learns and not has and not trial.strays:
            raise AssertionError(f"{name!r} is said to be {path!r}, but it got no gradient")
    if isinstance(trial.rule, Backprop):
        interventions.require_backprop(trial, trial.usual, "under backpropagation")
    return f"{len(trial.placement)} modules"


def check_not_backprop(trial: Trial) -> str:
    """Verify that a rule that claims its own signals is not backpropagation."""
    layers = [row.layer for row in trial.placement if row.path == "signal of its own"]
    if not layers:
        raise NotApplicableError("no layer is said to have a signal of its own")
    others = trial.far(trial.usual, trial.backprop)
    if not any(trial.path(name) == "signal of its own" for name in others):
        if getattr(innermost(trial.rule), "differences", False):
            raise NotApplicableError("the rule takes finite differences, here of linear pieces: that is backpropagation")
        raise AssertionError(
            f"layer {layers[0]!r} is said to have a signal of its own, but all gradients are backpropagation's"
        )
    return f"{len(others)} parameters differ"


def check_determinism(trial: Trial) -> str:
    """One seed, one update."""
    far = trial.far(trial.step(), trial.usual)
    if far:
        raise AssertionError(f"two steps from one seed differ in the gradient of {min(far)!r}")
    return "one step twice"


def check_scaled_loss(trial: Trial) -> str:
    """`(3 * credit.loss).backward()` makes three times the update."""

    def scaled(credit: Credit) -> None:
        (3 * credit.loss).backward()

    far = trial.far(trial.step(scaled), {name: 3 * grad for name, grad in trial.usual.items()})
    if far:
        raise AssertionError(f"(3 * credit.loss).backward() does not make three times the gradient of {min(far)!r}")
    return "3 times the loss"


def check_compiled(trial: Trial) -> str:
    """Compiled, the rule makes the same update; if it does not, the model itself is compiled, to see whose fault that is."""
    if trial.is_stochastic:
        raise NotApplicableError("the model draws random numbers, which a compiler may draw in another order")
    if not COMPILES:
        raise NotApplicableError(f"PyTorch {torch.__version__} does not compile rules")
    torch._dynamo.reset()
    try:
        compiled: Callable[..., Credit] = torch.compile(trial.rule, backend="aot_eager")
        far = trial.far(trial.step(rule=compiled), trial.usual)
        if far:
            name = max(far, key=lambda name: far[name])
            raise AssertionError(f"compiled, the gradient of {name!r} is another one (it differs by {far[name]:.2g} of it)")
    except Exception:
        _require_compilable(trial)
        raise
    finally:
        torch._dynamo.reset()
    return "aot_eager"


def _require_compilable(trial: Trial) -> None:
    """The model alone, compiled, has the gradients that it has otherwise; `NotApplicableError` where it does not."""
    torch._dynamo.reset()
    try:
        with trial.sandbox():
            trial.loss(torch.compile(trial.model, backend="aot_eager")(trial.inputs)).backward()
            exact = trial.collected()
    except Exception as error:
        raise NotApplicableError(f"the model itself does not compile ({type(error).__name__})") from None
    if trial.far(exact, trial.backprop):
        raise NotApplicableError("the model itself computes something else when compiled")


def check_autocast(trial: Trial) -> str:
    """Under autocast the update points where it points without, as far as rounding lets it.

    A unit near a kink of its activation may change sides by rounding alone, so beyond a few degrees what counts is how far
    the same update turns when every parameter and input is off by up to half a unit in the last place of the lower dtype.
    """
    kind = next(trial.model.parameters()).device.type

    def lower(make: Callable[[], Gradients]) -> Callable[[], Gradients]:
        return torch.autocast(kind, dtype=torch.bfloat16)(make)  # type: ignore[no-any-return]

    try:
        turned, allowed = _turn(trial, trial.exact, lower(trial.exact))
    except Exception as error:
        raise NotApplicableError(f"the model itself does not run under autocast ({type(error).__name__})") from None
    if turned > allowed:
        raise NotApplicableError(f"the model's own gradient turns by {turned:.0f} degrees under autocast")
    turned, allowed = _turn(trial, trial.step, lower(trial.step))
    if turned > allowed:
        raise AssertionError(
            f"under autocast the update turns by {turned:.0f} degrees; rounding to bfloat16 explains {allowed:.0f}"
        )
    return f"within {turned:.1f} degrees, of {allowed:.0f} allowed"


def check_batch_sizes(trial: Trial) -> str:
    """A smaller batch in between is learned from as well, and changes nothing for the next."""
    size = _size(trial.inputs)
    if size < 4 or _size(trial.targets) != size:
        raise NotApplicableError("the batch has no first dimension of four samples or more that inputs and targets share")
    half = (trial.inputs[: size // 2], trial.targets[: size // 2])
    if not trial.takes(*half):
        raise NotApplicableError("the model takes batches of this size only")
    _other_batch(trial, half, f"a batch of {size // 2}")
    return f"{size} and {size // 2} samples"


def check_lengths(trial: Trial) -> str:
    """Sequences of another length are learned from as well, and change nothing for the next."""
    inputs, targets = trial.inputs, trial.targets
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or inputs.shape[1] < 3:
        raise NotApplicableError("inputs are no sequences")
    lengths = []
    for length in (inputs.shape[1] - 1, inputs.shape[1] // 2):
        shorter = [targets[:, :length]] if isinstance(targets, Tensor) and targets.dim() > 1 else []
        for goals in (targets, *shorter):
            batch = (inputs[:, :length], goals)
            if not trial.takes(*batch):
                continue
            try:
                _other_batch(trial, batch, f"sequences of length {length}")
            except (ConfigError, UnsupportedModelError) as refusal:
                raise NotApplicableError(f"the rule refuses sequences of length {length}: {refusal}") from None
            lengths.append(length)
            break
    if not lengths:
        raise NotApplicableError("the model takes inputs of this length only")
    return f"lengths {inputs.shape[1]}, {', '.join(map(str, lengths))}"


CHECKS: dict[str, Callable[[Trial], str]] = {
    "gradients": check_gradients_and_output,
    "placement": check_placement,
    "determinism": check_determinism,
    "scaled loss": check_scaled_loss,
    "feedback reaches below": interventions.check_feedback_reach,
    "zero feedback": interventions.check_feedback_zero,
    "feedback = weight": interventions.check_feedback_exact,
    "feedback differs": interventions.check_feedback_differs,
    "zero signals": interventions.check_signals_zero,
    "signals reach their unit": interventions.check_signals_reach,
    "signals differ": interventions.check_signals_differ,
    "not backprop": check_not_backprop,
    "batch sizes": check_batch_sizes,
    "lengths": check_lengths,
    "autocast": check_autocast,
    "compiled": check_compiled,
}
"""Checks of :func:`check_model`: each raises AssertionError, or NotApplicableError, or says what it tried."""

BESIDE = ("feedback reaches below", "zero feedback", "feedback = weight", "feedback differs", "not backprop")
"""Checks that compare with the model alone, which must take the same way as under the rule."""


def check_model(rule: CreditRule, inputs: Any, targets: Any, *, skip: Collection[str] = ()) -> ModelReport:
    """Test a rule on your own model and batch by intervention; both are left as they were found.

    Args:
        rule: made around the model, in the precision in which it will be trained.
        inputs: a batch (batch, ...), small: each layer takes several steps.
        targets: what the rule's loss takes.
        skip: names of checks from :data:`CHECKS` to leave out; "compiled" takes seconds.

    Returns:
        What was tried, what did not apply and why; print it.

    Raises:
        AssertionError: the first thing that is not as it should be, with the layer's name.
        ApicalError: the rule refuses the model.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    >>> report = check_model(Backprop(model), torch.randn(8, 4), torch.arange(8) % 3, skip=("compiled",))
    >>> report.passed["placement"]
    '2 modules'
    """
    if not isinstance(rule, CreditRule):
        kind = type(rule).__name__
        raise ConfigError(f"check_model tests a rule around your model, such as FeedbackAlignment(model); got a {kind}")
    skip = {skip} if isinstance(skip, str) else set(skip)
    if unknown := skip - CHECKS.keys():
        raise ValueError(f"skip names no checks: {sorted(unknown)}; known: {', '.join(CHECKS)}")
    trial = Trial(rule, inputs, targets)
    with undisturbed(rule, parameters=True):
        rule.restart()
        rule(inputs, targets)  # everything created in the first batch exists now
        if trial.usual and not any(bool(grad.any()) for grad in trial.backprop.values()):
            raise ConfigError(
                "all gradients of the loss are zero on this batch, so nothing can be compared; pass another batch"
            )
        report = ModelReport(type(rule).__name__, trial.placement)
        for name, check in CHECKS.items():
            if name in skip:
                report.skipped[name] = "skipped on request"
                continue
            if name in BESIDE and trial.strays:
                report.skipped[name] = "the rule draws random numbers before the model, so the model's own numbers differ"
                continue
            try:
                report.passed[name] = check(trial)
            except NotApplicableError as reason:
                report.skipped[name] = str(reason)
    return report


def _other_batch(trial: Trial, batch: tuple[Any, Any], what: str) -> None:
    """Learn from another batch, then from the usual one, in one sandbox."""
    with trial.sandbox():
        trial.rule(*batch).backward()
        for name, grad in trial.collected().items():
            if not bool(grad.isfinite().all()):
                raise AssertionError(f"on {what} the gradient of {name!r} is not finite")


def _turn(trial: Trial, make: Callable[[], Gradients], lower: Callable[[], Gradients]) -> tuple[float, float]:
    """Return degrees between two updates, and how many are allowed: 8, or twice the worst of four roundings, to 90."""
    usual = make()
    turned, allowed = _angle(lower(), usual), 8.0
    if turned > allowed:
        size = torch.finfo(torch.bfloat16).eps / 2
        draws = [_angle(trial.perturbed(make, size, seed), usual) for seed in range(4)]
        allowed = min(90.0, max(allowed, 2 * max(draws)))
    return turned, allowed


def _angle(a: Gradients, b: Gradients) -> float:
    """Return the angle between two updates, in degrees; 180 where one of them is zero or not finite."""
    dot, first, second = 0.0, 0.0, 0.0
    for name in a.keys() & b.keys():
        x, y = a[name].double().flatten(), b[name].double().flatten()
        dot, first, second = dot + float(x @ y), first + float(x @ x), second + float(y @ y)
    cosine = dot / (first * second) ** 0.5 if first and second else float(first == second)
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if math.isfinite(cosine) else 180.0


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Tensor) and value.dim() else 0
