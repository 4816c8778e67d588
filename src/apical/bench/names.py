"""Rules by their short names on the command line, with the defaults that each one needs. The library has no registry."""

import difflib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from apical import own_code
from apical.bench import own_rules
from apical.bench.recipe import ClipOver, Recipe, bare_rule, parse_options, rule_name
from apical.bench.schedule import alignment_decay
from apical.core.credit import CreditRule, Loss
from apical.core.losses import squared_error, token_cross_entropy
from apical.core.packed import caller
from apical.core.rest import undisturbed
from apical.core.units import weighted_layers
from apical.errors import ApicalError, ConfigError, require_choice
from apical.rules.backprop import Backprop
from apical.rules.contrastive_plasticity.contrastive_signal_plasticity import ContrastiveSignalPlasticity
from apical.rules.corinfomax import CorInfoMax
from apical.rules.counter_current.counter_current_learning import CounterCurrentLearning
from apical.rules.direct_feedback_alignment import DirectFeedbackAlignment
from apical.rules.dual_propagation import DualPropagation
from apical.rules.equilibrium.equilibrium_propagation import EquilibriumPropagation
from apical.rules.feedback_alignment import FeedbackAlignment
from apical.rules.feedback_control.deep_feedback_control import DeepFeedbackControl
from apical.rules.feedback_control.strong_deep_feedback_control import StrongDeepFeedbackControl
from apical.rules.forward_forward import ForwardForward
from apical.rules.local_classifiers import LocalClassifiers
from apical.rules.local_solve import LocalSolve
from apical.rules.modulated import Mode, Modulated
from apical.rules.plastic_feedback.kolen_pollack import KolenPollack
from apical.rules.plastic_feedback.product_feedback_alignment import ProductFeedbackAlignment
from apical.rules.predictive_coding.predictive_coding import PredictiveCoding
from apical.rules.semi_implicit import SemiImplicit
from apical.rules.sign_symmetry import SignSymmetry
from apical.rules.target_propagation.difference_target_propagation import DifferenceTargetPropagation
from apical.rules.top_down.top_down_credit_assignment import TopDownCreditAssignment
from apical.rules.weight_mirror import WeightMirror

DECAY = 1e-4
"""Weight decay of rules that do not learn their feedback by decay, and of the others after their alignment phase."""

Q_DECAY = 0.05
"""Decay at which the feedback weights of DFC, at its default noise, converge near the transposed Jacobian."""


@dataclass(frozen=True)
class Entry:
    """One short name: its class, the options that the name fixes, and a one-line description.

    Attributes:
        aligns: the rule's feedback aligns through weight decay, so training starts with an alignment phase.
        clip: largest gradient norm if the recipe sets none, for rules whose updates are not small.
        clip_over: clip each "tensor" separately, or the whole "network".
        feedback_decay: weight decay of the feedback weights if the recipe sets none: it bounds feedback that grows along
            a fixed direction.
        physical: options under which the rule works as its paper's network would, if its default is a closed form of that;
            audits use this form.
    """

    build: Callable[..., CreditRule]
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    aligns: bool = False
    clip: float = 0.0
    clip_over: ClipOver = "tensor"
    feedback_decay: float | None = None
    physical: dict[str, Any] = field(default_factory=dict)


MIRRORED = "kp-mirror, pfa-mirror and pfa-o-mirror"
MIRROR = {"initial": "mirror"}
"""Before the first step, noise copies the weights into the feedback."""

EXPLICIT = {"form": "explicit"}
"""Feedback weights are stored explicitly, not derived from forward weights that received the same updates."""

LITERAL = {"form": "literal"}
"""Errors pass through both feedback matrices, which are stored separately and not multiplied first."""

SIMULATED = {"solver": "simulate", "learn": "noise", "points": 60, "dt": 0.05}
"""The controlled dynamics and the noisy phase run in time, for 15 of the neurons' time constants."""

SIMULATED_FIXED = {key: value for key, value in SIMULATED.items() if key != "learn"}

# the names of one class, with their common settings
_SIGNS, _PFA = partial(Entry, SignSymmetry), partial(Entry, ProductFeedbackAlignment, physical=LITERAL)
_DFC = partial(Entry, DeepFeedbackControl, feedback_decay=Q_DECAY)
_FIXED = partial(Entry, DeepFeedbackControl)
_CCL, _PC = partial(Entry, CounterCurrentLearning, clip=1.0), partial(Entry, PredictiveCoding, clip=1.0)
_LOCAL, _FF = partial(Entry, LocalClassifiers), partial(Entry, ForwardForward)
_CSDP = partial(Entry, ContrastiveSignalPlasticity)
_TDCA = partial(Entry, TopDownCreditAssignment, clip=1.0, clip_over="network")
_DTP, _EP = partial(Entry, DifferenceTargetPropagation, clip=1.0), partial(Entry, EquilibriumPropagation)

RULES: dict[str, Entry] = {
    "bp": Entry(Backprop, "backpropagation"),
    "fa": Entry(FeedbackAlignment, "feedback alignment: fixed random feedback weights"),
    "dfa": Entry(DirectFeedbackAlignment, "direct feedback alignment: the output error sent directly to every layer"),
    "usf": _SIGNS("sign symmetry: the signs of the weights, one magnitude", {"variant": "uniform"}),
    "brsf": _SIGNS("sign symmetry: magnitudes drawn for every batch", {"variant": "batchwise"}),
    "frsf": _SIGNS("sign symmetry: magnitudes drawn once", {"variant": "fixed"}),
    "kp": Entry(KolenPollack, "Kolen-Pollack: feedback gets the same updates and decay", aligns=True, physical=EXPLICIT),
    "kp-mirror": Entry(
        KolenPollack, "Kolen-Pollack started by a weight mirror, for optimisers such as adamw", MIRROR, physical=EXPLICIT
    ),
    "wm": Entry(WeightMirror, "weight mirror: feedback learned from noise"),
    "pfa": _PFA("product feedback alignment, expansion 10", {"expansion": 10}, aligns=True),
    "pfa-o": _PFA("product feedback alignment, orthogonal", {"feedback": "orthogonal"}, aligns=True),
    "pfa-mirror": _PFA(
        "product feedback alignment started by a weight mirror, for optimisers such as adamw", {"expansion": 10, **MIRROR}
    ),
    "pfa-o-mirror": _PFA(
        "product feedback alignment, orthogonal, started by a weight mirror", {"feedback": "orthogonal", **MIRROR}
    ),
    "dfc": _DFC("deep feedback control, averaged over time", {"variant": "dfc"}, physical=SIMULATED),
    "dfc-ss": _DFC("deep feedback control at its steady state", {"variant": "ss"}, physical=SIMULATED),
    "dfc-ssa": _DFC("deep feedback control at its linearised steady state", {"variant": "ssa"}),
    "dfc-fixed": _FIXED("dfc with fixed feedback weights", {"variant": "dfc", "learn": "none"}, physical=SIMULATED_FIXED),
    "dfc-ss-fixed": _FIXED(
        "dfc-ss with fixed feedback weights", {"variant": "ss", "learn": "none"}, physical=SIMULATED_FIXED
    ),
    "dfc-ssa-fixed": _FIXED("dfc-ssa with fixed feedback weights", {"variant": "ssa", "learn": "none"}),
    "ccl": _CCL("counter-current learning: two anti-parallel networks, local losses"),
    "ccl-frozen": _CCL("ccl, a control: the feedback network stays random", {"feedback": "frozen"}),
    "ccl-free": _CCL("ccl, a control: free codes, that is a classifier per layer", {"feedback": "free"}),
    "ccl-readout": _CCL("ccl, a control: only the last layer learns", {"feedback": "none"}),
    "pc": _PC("predictive coding: blocks learn to predict relaxed states", {"inference": "state"}),
    "pc-error": _PC("predictive coding, solved in the errors", {"inference": "error"}),
    "pc-one-step": _PC("pc-error, a control: one step of inference", {"inference": "error", "steps": 1}),
    "pc-incremental": _PC(
        "predictive coding that updates weights after every step of the states", {"inference": "incremental"}
    ),
    "mupc": Entry(
        PredictiveCoding,
        "predictive coding of deep residual networks in the mu parametrisation (models mlp-mu-...)",
        {"parametrisation": "mu"},
    ),
    "local-pred": _LOCAL("local classifiers: every block has a linear read-out with the model's loss"),
    "local-sim": _LOCAL("local classifiers: every block makes samples as similar as their classes", {"local": "similarity"}),
    "local-both": _LOCAL("local classifiers: both losses at every block", {"local": "both"}),
    "mono-forward": _LOCAL("Mono-Forward: local classifiers without biases, drawn at random", {"local": "projection"}),
    "ff": _FF("forward-forward: active for images with their label, quiet for those with another"),
    "ff-readout": _FF("ff, a control: hidden layers stay random, the read-out learns", {"train_hidden": False}),
    "scff": _FF("self-contrastive forward-forward: active for an image twice, quiet for two", {"negatives": "images"}),
    "csdp": _CSDP("contrastive-signal-dependent plasticity: spiking layers, large traces for images with their label"),
    "csdp-unsupervised": _CSDP(
        "csdp whose negatives are mixtures of images; labels train only the read-outs", {"negatives": "mixtures"}
    ),
    "csdp-memristor": _CSDP("csdp whose weights are pairs of memristors with 64 levels", {"levels": 64}),
    "dualprop": Entry(DualPropagation, "dual propagation: the error is the difference of two compartments in every neuron"),
    "sibp": Entry(SemiImplicit, "semi-implicit backpropagation: proximal steps through new weights", {"eta": 1.0}),
    "tdca": _TDCA("top-down credit assignment: an evolved network assigns credit", {"teacher": "digits"}),
    "tdca-silent": _TDCA("tdca, a control: no credit to hidden units", {"teacher": "digits", "silent": True}),
    "tdca-unevolved": _TDCA("tdca, a control: the top-down network stays random"),
    "strong-dfc": Entry(
        StrongDeepFeedbackControl,
        "strong deep feedback control: the output held at the label",
        clip=1.0,
        physical={"solver": "simulate", "learn": "noise", "points": 100},
    ),
    "dtp": _DTP("difference target propagation: inverses learned layer by layer", {"variant": "dtp"}),
    "dtp-drl": _DTP("dtp whose feedback learns by the difference reconstruction loss", {"variant": "drl"}),
    "ddtp-linear": _DTP("direct difference target propagation: linear maps from the output, learned", {"variant": "linear"}),
    "ddtp-rhl": _DTP("direct difference target propagation behind a fixed random layer", {"variant": "hidden"}),
    "ddtp-control": _DTP("ddtp-linear, a control: reconstruction without the difference", {"variant": "control"}),
    "ep": _EP("equilibrium propagation, symmetric nudges"),
    "ep-one-sided": _EP("equilibrium propagation, one nudge of random sign", {"estimator": "random-sign"}),
    "ep-directed": _EP("equilibrium propagation with separate weights for each direction", {"weights": "directed"}),
    "hep": _EP("holomorphic equilibrium propagation, complex nudges", {"estimator": "holomorphic"}),
    "corinfomax": Entry(CorInfoMax, "correlative information maximisation: layers that predict both ways"),
}


def _grapes(
    rule: CreditRule, mode: Mode | None = None, clip: bool = True, weights: Literal["incoming", "outgoing"] = "incoming"
) -> CreditRule:
    return Modulated(rule, _importance(rule, mode, clip, weights))


def _matched(
    rule: CreditRule, mode: Mode | None = None, clip: bool = True, weights: Literal["incoming", "outgoing"] = "incoming"
) -> CreditRule:
    from apical.rules.node_importance import Matched

    return Modulated(rule, Matched(_importance(rule, mode, clip, weights)))


def _importance(rule: CreditRule, mode: Mode | None, clip: bool, weights: Literal["incoming", "outgoing"]) -> Any:
    """Pass gains on where the rule passes errors on. The module is loaded only on request: it is patented."""
    from apical.rules.node_importance import NodeImportance

    return NodeImportance(mode or ("propagating" if rule.chains_errors else "local"), clip, weights)


def _solved(rule: CreditRule, damping: float = 1e-2) -> CreditRule:
    return LocalSolve(rule, damping)


AROUND: dict[str, tuple[Callable[..., CreditRule], str]] = {
    "grapes": (_grapes, "GRAPES: errors of units with large incoming weights count up to double (US patent 12,020,162)"),
    "matched": (_matched, "grapes, a control: every unit of a layer gets the layer's mean gain"),
    "cwu": (_solved, "consequentialism weight updates: layers solve for the change that their errors request"),
}
"""Rules that wrap another rule, such as "grapes:fa": a function of a rule and options, and a one-line description."""


def _composed(outer: str, inner: Entry) -> Entry:
    """Return the entry of a rule that wraps another one; it takes the options of both."""
    wrap, title = AROUND[outer]
    own = list(inspect.signature(wrap).parameters.values())[1:]
    names = {parameter.name for parameter in own}

    def build(model: nn.Module, **options: Any) -> CreditRule:
        mine = {key: options.pop(key) for key in names & options.keys()}
        return wrap(inner.build(model, **options), **mine)

    every = [*inspect.signature(inner.build).parameters.values(), *own]
    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in every if p.name != "model" and p.kind != p.VAR_KEYWORD]
    setattr(build, "__signature__", inspect.Signature([every[0], *{p.name: p for p in keywords}.values()]))  # noqa: B010
    return replace(inner, build=build, title=f"{title.partition(':')[0]} around {inner.title.partition(':')[0]}")


def find_rule(name: str) -> Entry:
    """Return the entry of a short name, of a rule that wraps another ("grapes:fa"), or of a rule that is not part of apical:
    "path/to/file.py:Class", "module:Class".

    Raises:
        ConfigError: the rule does not exist; the message gives the nearest name, or what is wrong with the file.
    """
    outer, colon, inner = name.partition(":")
    if colon and outer in AROUND:
        return _composed(outer, find_rule(inner))
    if ":" in name or name.endswith(".py"):
        kind = own_rules.load_class(name)
        return Entry(kind, own_rules.title(kind))
    if name not in RULES:
        if "," in name:
            raise ConfigError(f"unknown rule {name!r}: separate names of rules by spaces, as in --rules bp fa")
        for short, entry in RULES.items():
            if getattr(entry.build, "__name__", "").lower() == name.lower():
                raise ConfigError(f"unknown rule {name!r}: its name on the command line is {short!r}; see apical list rules")
    require_choice("rule", name, RULES)
    return RULES[name]


def constructor_options(entry: Entry) -> list[str]:
    """Return the names of the constructor's options, except those determined by the recipe and the data."""
    return [name for name in inspect.signature(entry.build).parameters if name not in ("model", *_GIVEN)]


def options_for(rule: str, options: Sequence[str]) -> tuple[str, ...]:
    """Return the comparison's options "[RULE:]key=value" that apply to `rule`, as its recipe takes them.

    Without "RULE:" an option applies to every rule whose constructor has it. A rule from a file is named by its class.

    >>> options_for("pfa", ("pfa:expansion=4", "kp:form=explicit", "first_layer=True", "nudge=0.1"))
    ('expansion=4', 'first_layer=True')
    """
    arguments, chosen = constructor_options(find_rule(rule)), []
    for option in options:
        owner, rest = _owner(option)
        if owner == rule_name(rule) or (not owner and _key(rest) in arguments):
            chosen.append(rest)
    return tuple(chosen)


def check_options(rules: Sequence[str], options: Sequence[str]) -> None:
    """Refuse options of a comparison that none of its rules has.

    Raises:
        ConfigError: names the option.
    """
    names = [rule_name(rule) for rule in rules]
    for option in options:
        owner, rest = _owner(option)
        if owner:
            require_choice("rule in --rule-options", owner, names)
        if not owner and "=" in rest and not any(_key(rest) in constructor_options(find_rule(rule)) for rule in rules):
            raise ConfigError(f"--rule-options {option}: none of the rules {' '.join(names)} has an option {_key(rest)!r}")
        parse_options((rest,))


def merged(options: Sequence[str], over: Sequence[str]) -> tuple[str, ...]:
    """Return the options, with those of `over` replacing options of the same name."""
    replaced = {_key(option) for option in over}
    return (*(option for option in options if _key(option) not in replaced), *over)


def _owner(option: str) -> tuple[str, str]:
    """Split "RULE:key=value" into the rule's name, empty if there is none, and the rest."""
    name = option.partition("=")[0]
    owner, colon, _ = name.partition(":")
    return (owner, option[len(owner) + 1 :]) if colon else ("", option)


def _key(option: str) -> str:
    return option.partition("=")[0].strip().replace("-", "_")


def other_teacher(recipe: Recipe, classes: int | None) -> str:
    """Return a note if data with this many classes need another teacher than the rule's name implies; otherwise empty."""
    if classes in (None, 10) or find_rule(recipe.rule).options.get("teacher") != "digits":
        return ""
    if "teacher" in parse_options(recipe.rule_options):
        return ""
    return f"{recipe.rule_name} uses the teacher 'classes': there are {classes} classes, and 'digits' is for ten"


def resolve(recipe: Recipe, examples: int, classes: int | None = None) -> tuple[Recipe, list[str]]:
    """Return the recipe with the rule's defaults filled in, and notes on the choices made.

    Args:
        examples: number of training images.
        classes: number of classes; None if targets are numbers.

    Raises:
        ConfigError: unknown rule or option, or a batch larger than the data.
    """
    entry, notes = find_rule(recipe.rule), list[str]()
    if (bare := bare_rule(recipe.rule)) not in RULES:
        notes.append(own_rules.origin(bare))
    given, arguments = parse_options(recipe.rule_options), constructor_options(entry)
    for key in given:
        if key not in arguments:
            near = difflib.get_close_matches(key, arguments, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            known_text = ", ".join(arguments) or "none"
            raise ConfigError(f"rule {recipe.rule_name!r} has no option {key!r}{hint} Its options: {known_text}")
    added = []
    if entry.aligns and recipe.optimizer == "adam" and "form" not in given:
        added.append("form='explicit'")
        notes.append(f"{recipe.rule_name} stores its feedback explicitly: adam applies weight decay through its moments")
    if entry.aligns and recipe.optimizer != "sgd" and "initial" not in given | entry.options:
        notes.append(
            f"the decay of {recipe.optimizer} is too small to align the feedback of {recipe.rule_name}; {MIRRORED} start "
            "near the weights"
        )
    if recipe.probe and "first_layer" in arguments and "first_layer" not in given:
        added.append("first_layer=True")
        notes.append("feedback is also kept for the first layer, to measure its alignment (--probe 0 turns this off)")
    if note := other_teacher(recipe, classes):
        added.append("teacher='classes'")
        notes.append(note)
    steps = recipe.steps_per_epoch(examples)
    decay, decay_epochs = recipe.weight_decay, recipe.weight_decay_epochs
    if not decay:
        decay = (DECAY,)
        if entry.aligns and recipe.optimizer == "sgd":
            high, epochs = alignment_decay(recipe.lr[0], steps, recipe.momentum)
            decay, decay_epochs = (high, DECAY), (epochs,)
            notes.append(f"weight decay {high:g} in the first {epochs} epochs aligns the feedback of {recipe.rule_name}")
    clip, over, feedback_decay = recipe.clip, recipe.clip_over, recipe.feedback_weight_decay
    if entry.clip and not clip:
        clip, over = entry.clip, entry.clip_over
        per = "per tensor" if over == "tensor" else "over the network"
        notes.append(f"gradients of {recipe.rule_name} are clipped at norm {clip:g} {per}: its updates are not small")
    if entry.feedback_decay is not None and feedback_decay is None and given.get("learn") != "none":
        feedback_decay = entry.feedback_decay
        decays = f"feedback weights of {recipe.rule_name} decay with {feedback_decay:g}"
        notes.append(f"{decays}, which keeps them near the Jacobian")
    options = (*recipe.rule_options, *added)
    recipe = replace(recipe, rule_options=options, clip=clip, clip_over=over, feedback_weight_decay=feedback_decay)
    return replace(recipe, weight_decay=decay, weight_decay_epochs=decay_epochs), notes


LOSSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "squared": squared_error,
    "mse": F.mse_loss,
    "token_cross_entropy": token_cross_entropy,
}
"""Losses by their names in recipes."""

_GIVEN = ("loss", "input_shape")


def _are_names(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.annotation in (Collection[str], "Collection[str]")


def _names(value: Any) -> Any:
    """Split names of modules or parameters, which are separated by commas on the command line."""
    return tuple(value.split(",")) if isinstance(value, str) else value


def make_rule(recipe: Recipe, model: nn.Module, input_shape: tuple[int, ...] | None = None) -> CreditRule:
    """Return the recipe's rule for `model`.

    Args:
        input_shape: shape of one sample; needed by rules that simulate a whole network with convolutions, and to determine
            whether the layer registered first needs feedback.

    Raises:
        ConfigError: an option's value is not usable.
        UnsupportedModelError: the rule cannot train a module of the model.
    """
    entry = find_rule(recipe.rule)
    options = {**entry.options, **parse_options(recipe.rule_options)}
    given = dict(zip(_GIVEN, (LOSSES[recipe.loss], input_shape), strict=True))
    takes = inspect.signature(entry.build).parameters
    options = {key: _names(value) if _are_names(takes.get(key)) else value for key, value in options.items()}
    if "first_layer" in takes and "first_layer" not in options and input_shape is not None:
        options |= {"first_layer": True} if needs_feedback(model, input_shape, options.get("exact", ())) else {}
    try:
        with own_code.settings_kept(f"rule {recipe.rule_name!r}"):
            return entry.build(model, **{key: value for key, value in given.items() if key in takes}, **options)
    except ApicalError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rule {recipe.rule_name!r} with options {options}: {error}") from error


def needs_feedback(model: nn.Module, input_shape: tuple[int, ...], exact: Collection[str] = ()) -> bool:
    """Return whether errors must pass through the layer registered first, because trained layers run before it.

    Args:
        model: called once, on two samples of zeros, float or integer; it is not changed.
        exact: see :class:`apical.core.edge.EdgeRule`.
    """
    flags: list[bool] = []

    def look(layer: nn.Module, args: tuple[object, ...]) -> None:
        flags.extend(value.requires_grad for value in args if isinstance(value, torch.Tensor))

    try:
        layer = next(iter(weighted_layers(model, exact, shared=True, packed="parts").values()))
    except ApicalError:  # the rule's own error explains it better
        return False
    for kind in (layer.weight.dtype, torch.long):  # integers for a model that embeds them
        try:
            with torch.enable_grad(), undisturbed(model):
                model.eval()
                caller(layer).register_forward_pre_hook(look)
                model(torch.zeros(2, *input_shape, dtype=kind, device=layer.weight.device))
                break
        except (ApicalError, RuntimeError, TypeError, ValueError, IndexError):
            continue
    return any(flags)
