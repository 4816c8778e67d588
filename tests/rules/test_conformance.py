"""Every rule passes the public conformance suite, and reaches backpropagation in its oracle limit.

The limit of feedback control is Gauss-Newton's update instead: see test_dfc_theory.py.
"""

from functools import partial
from typing import Any

import pytest
import torch

import apical
from apical.core.credit import CreditRule, Loss
from apical.core.transport import as_matrix, from_matrix
from apical.core.units import key
from apical.rules.contrastive_plasticity.neurons import Constants
from apical.rules.top_down.equivariant import EquivariantNetwork
from apical.testing import CHECKS, check_oracle

PFA = apical.ProductFeedbackAlignment
DFC = apical.DeepFeedbackControl
CCL = apical.CounterCurrentLearning
TDCA = apical.TopDownCreditAssignment
STRONG = apical.StrongDeepFeedbackControl
TP = apical.DifferenceTargetPropagation
EP = apical.EquilibriumPropagation
CIM = apical.CorInfoMax
DP = apical.DualPropagation
PC = apical.PredictiveCoding
LOCAL = apical.LocalClassifiers
FF = apical.ForwardForward
CSDP = apical.ContrastiveSignalPlasticity
QUICK = Constants(dt=50.0, trace=200.0)


def residual_predictive_coding(model: torch.nn.Module, loss: Loss = torch.nn.functional.cross_entropy) -> CreditRule:
    """The residual network of the suite too, whose blocks with skips are blocks of the rule."""
    images = any(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    return PC(model, loss, steps=3, input_shape=(2, 8, 8) if images else None)


def any_classes(model: torch.nn.Module, loss: Loss = torch.nn.functional.cross_entropy) -> CreditRule:
    """With a top-down network that looks at one class at a time."""
    return TDCA(model, loss, EquivariantNetwork(layers=2, hidden=5))


RULES = {
    "bp": apical.Backprop,
    "fa": apical.FeedbackAlignment,
    "fa-first": partial(apical.FeedbackAlignment, first_layer=True),
    "dfa": apical.DirectFeedbackAlignment,
    "dfa-broadcast": partial(apical.DirectFeedbackAlignment, feedback="broadcast"),
    "dfa-feedback-inside": partial(apical.DirectFeedbackAlignment, units="sublayer", inside="feedback"),
    "dfa-micro-factored": partial(apical.DirectFeedbackAlignment, units="micro", source="factored"),
    "dfa-head": partial(apical.DirectFeedbackAlignment, source="head"),
    "dfa-leaky": partial(apical.DirectFeedbackAlignment, feedback="broadcast", leaky=True),
    "usf": apical.SignSymmetry,
    "brsf": partial(apical.SignSymmetry, variant="batchwise"),
    "frsf": partial(apical.SignSymmetry, variant="fixed"),
    "kp": apical.KolenPollack,
    "kp-explicit": partial(apical.KolenPollack, form="explicit"),
    "kp-mirror": partial(apical.KolenPollack, initial="mirror"),
    "wm": partial(apical.WeightMirror, warmup=10),
    "pfa": PFA,
    "pfa-first": partial(PFA, first_layer=True),
    "pfa-o": partial(PFA, feedback="orthogonal"),
    "pfa-explicit": partial(PFA, form="explicit"),
    "pfa-literal": partial(PFA, form="literal"),
    "pfa-fused": partial(PFA, form="fused"),
    "pfa-sparse": partial(PFA, density=0.5),
    "pfa-mirror": partial(PFA, initial="mirror"),
    "pfa-own": partial(PFA, update="own"),
    "dfc": DFC,
    "dfc-ss": partial(DFC, variant="ss"),
    "dfc-ssa": partial(DFC, variant="ssa"),
    "dfc-noise": partial(DFC, variant="ssa", learn="noise"),
    "dfc-simulate": partial(DFC, solver="simulate", points=12),
    "ccl": CCL,
    "ccl-cosine": partial(CCL, pair="cosine"),
    "ccl-spread": partial(CCL, pair="cosine", spread=0.5),
    "ccl-input": partial(CCL, input_pair=True),
    "pc": partial(PC, inference="state", steps=6),
    "pc-error": PC,
    "pc-staged": partial(PC, inference="staged"),
    "local-pred": LOCAL,
    "local-sim": partial(LOCAL, local="similarity"),
    "local-both": partial(LOCAL, local="both"),
    "mono-forward": partial(LOCAL, local="projection"),
    "ff": FF,
    "ff-all": partial(FF, negatives="all"),
    "ff-symba": partial(FF, negatives="all", objective="difference", answers="goodness"),
    "scff": partial(FF, negatives="images"),
    "csdp": partial(CSDP, steps=5, constants=QUICK),
    "csdp-unsupervised": partial(CSDP, negatives="mixtures", steps=5, constants=QUICK),
    "csdp-pairs": partial(CSDP, contrast="pairs", steps=5, constants=QUICK),
    "csdp-answer": partial(CSDP, readout="answer", steps=5, constants=QUICK),
    "csdp-step": partial(CSDP, learn="step", steps=4, constants=QUICK),
    "csdp-decay": partial(CSDP, decay=1e-3, steps=5, constants=QUICK),
    "csdp-memristor": partial(CSDP, levels=64, steps=5, constants=QUICK),
    "pc-incremental": partial(PC, inference="incremental", steps=3),
    "pc-residual": residual_predictive_coding,
    "dualprop": DP,
    "dualprop-original": partial(DP, variant="original", alpha=1.0, sweeps=3),
    "sibp": apical.SemiImplicit,
    "tdca": TDCA,
    "tdca-sublayer": partial(TDCA, units="sublayer", inside="feedback"),
    "tdca-sites": partial(TDCA, sites=3, hidden=5),
    "tdca-classes": any_classes,
    "strong-dfc": STRONG,
    "strong-dfc-simulate": partial(STRONG, solver="simulate", points=12, sigma=0.0, learn="none"),
    "strong-dfc-noise": partial(STRONG, solver="simulate", points=12, learn="noise"),
    "dtp": partial(TP, variant="dtp"),
    "dtp-drl": TP,
    "ddtp-linear": partial(TP, variant="linear"),
    "ddtp-rhl": partial(TP, variant="hidden", neurons=16),
    "ddtp-recurrent": partial(TP, variant="hidden", neurons=16, recurrent=True),
    "ddtp-control": partial(TP, variant="control"),
    "dtp-lee": partial(TP, variant="lee"),
    "ddtp-fixed": partial(TP, variant="linear", learn=False),
    "ep": EP,
    "ep-one-sided": partial(EP, estimator="one-sided", free_steps=8, nudged_steps=4),
    "ep-five-point": partial(EP, estimator="five-point", free_steps=8, nudged_steps=4),
    "ep-random-sign": partial(EP, estimator="random-sign", free_steps=8, nudged_steps=4),
    "ep-directed": partial(EP, weights="directed", free_steps=8, nudged_steps=4),
    "ep-different": partial(EP, weights="directed", update="different", free_steps=8, nudged_steps=4),
    "ep-homeostasis": partial(EP, weights="directed", homeostasis=0.1, free_steps=8, nudged_steps=4),
    "hep": partial(EP, estimator="holomorphic", free_steps=8, nudged_steps=4),
    "hep-cycles": partial(EP, estimator="holomorphic", points=3, cycles=1, free_steps=4, nudged_steps=2),
    "corinfomax": partial(CIM, nudge="one-sided", free_steps=8, nudged_steps=4),
    "corinfomax-random-sign": partial(CIM, free_steps=8, nudged_steps=4),
    "corinfomax-symmetric": partial(CIM, nudge="symmetric", forgetting=1.0, free_steps=8, nudged_steps=4),
    "corinfomax-sparse": partial(CIM, nudge="one-sided", sparse=(0.1, 0.1, 0.1), free_steps=8, nudged_steps=4),
}
SKIPPED = {
    ("dfa-head", "odd_modules"): "the unit that the head reads hears the true error at the head's input",
    ("csdp-step", "compile"): "spikes are kept from call to call, which no graph does; it is refused by name",
    ("csdp-decay", "compile"): "spikes are counted from call to call, which no graph does; it is refused by name",
    ("pc-incremental", "compile"): "states are kept from call to call, which no graph does; it is refused by name",
    ("ccl-spread", "batch_mean"): "samples repel each other, and their copies by the constant added to lengths",
    ("ccl-spread", "distributed"): "samples repel those of their own rank's half of the batch only",
    ("dfc-noise", "compile"): "a simulation looks at its values to stop when it diverges, which no graph can",
    ("dfc-simulate", "compile"): "a simulation looks at its values to stop when it diverges, which no graph can",
    ("strong-dfc", "compile"): "the steady state is iterated until every sample has met its goal, which no graph can",
    ("strong-dfc-simulate", "compile"): "a simulation looks at its values to stop when it diverges, which no graph can",
    ("strong-dfc-noise", "compile"): "a simulation looks at its values to stop when it diverges, which no graph can",
    ("ep-random-sign", "batch_mean"): "the sign of the nudge is drawn once for a batch",
    ("ep-random-sign", "distributed"): "every rank draws its own sign",
    **{
        (name, "distributed"): "every rank follows the correlations of its own half of the batch; DDP shares those of rank 0"
        for name in ("corinfomax", "corinfomax-sparse")
    },
    ("corinfomax-random-sign", "batch_mean"): "the sign of the nudge is drawn once for a batch",
    ("corinfomax-random-sign", "distributed"): "every rank draws its own sign",
    ("ep-homeostasis", "distributed"): "every rank draws its own noise",
}


SAME_PATH = {
    **dict.fromkeys(("fa-first", "pfa-first"), "one more layer gets feedback"),
    **dict.fromkeys(("kp-mirror", "pfa-mirror", "pfa-o"), "the feedback weights begin at other numbers"),
    "local-both": "the sum of the losses of local-pred and local-sim",
    "csdp-memristor": "the weights are rounded once the optimiser has moved them",
    "ddtp-fixed": "ddtp-linear without a loss of the feedback weights",
    **dict.fromkeys(("ep-five-point", "ep-random-sign"), "other nudges in the phases of ep and ep-one-sided"),
    "hep-cycles": "other numbers of nudges and steps in the phases of hep",
    **dict.fromkeys(("corinfomax-random-sign", "corinfomax-symmetric"), "other nudges in the phases of corinfomax"),
}
"""Rules whose options change numbers only: their code is that of another rule of the same class, which stands for them."""
PATHS = [name for name in RULES if name not in SAME_PATH]


def class_of(name: str) -> type | object:
    """What makes a rule, its options left out."""
    return getattr(RULES[name], "func", RULES[name])


OF_CLASSES = list({class_of(name): name for name in reversed(RULES)}.values())[::-1]
"""The first rule of each class, for what all rules have from one place, as the form of `credit.loss`."""
TAPS = ("kp-explicit", "pfa-explicit", "pfa-literal", "pfa-own", "dfc-ssa", "dtp-lee", "ep-directed", "csdp-pairs")
"""Rules whose feedback weights get their gradients in another way than those of the first rule of their class."""
EVERY = {"compile": PATHS, "distributed": OF_CLASSES}
"""Which rules a check runs on, if not on all: test_distributed_options.py trains the others on two ranks."""


BRIEF = {
    apical.EquilibriumPropagation: {"free_steps": 2, "nudged_steps": 2},
    apical.CorInfoMax: {"free_steps": 2, "nudged_steps": 2},
    apical.PredictiveCoding: {"steps": 2},
    # spikes reach the last layer
    apical.ContrastiveSignalPlasticity: {"steps": 3, "constants": Constants(dt=100.0, trace=200.0)},
}
"""Steps in a compiled graph, by class: the graph holds every step anew, and a third is traced as the second is."""


QUICKER: dict[str, dict[str, Any]] = {
    "odd_modules": {"examples": 2},  # other networks for every rule
    "compile": {"backend": "eager"},  # the same graph; only its backward pass is not traced
}
"""Shorter checks of rules that are not the first of their class; those in `TAPS` are compiled with their backward pass."""


def test_every_class_and_every_path_has_a_rule() -> None:
    assert {class_of(name) for name in OF_CLASSES} == {class_of(name) for name in RULES}
    assert {class_of(name) for name in SAME_PATH} <= {class_of(name) for name in PATHS}


@pytest.mark.parametrize(
    ("rule", "check"), [(rule, check) for rule in RULES for check in CHECKS if rule in EVERY.get(check, RULES)]
)
def test_conformance(rule: str, check: str) -> None:
    if (rule, check) in SKIPPED:
        pytest.skip(SKIPPED[rule, check])
    brief = BRIEF.get(class_of(rule), {}) if check == "compile" else {}
    whole = rule in OF_CLASSES or (rule in TAPS and check == "compile")
    CHECKS[check](partial(RULES[rule], **brief), **({} if whole else QUICKER.get(check, {})))


def copy_weights(rule: CreditRule) -> None:
    """B := W."""
    for name, layer in rule.layers.items():
        rule.feedback.get_buffer(key(name)).copy_(layer.weight.detach())


def no_mirroring(rule: CreditRule) -> None:
    """B := W, and no more noise."""
    copy_weights(rule)
    rule.rate = 0.0


def copy_parameters(rule: CreditRule) -> None:
    """Explicit Kolen-Pollack with B := W."""
    for name, layer in rule.layers.items():
        rule.feedback[key(name)].data.copy_(layer.weight.detach())


def feedback_equals_weight(rule: CreditRule) -> None:
    """Kolen-Pollack in any form: B := W."""
    for name, layer in rule.layers.items():
        rule.set_feedback(name, B=layer.weight.detach())


def expansion_is_identity(rule: CreditRule) -> None:
    """PFA in any form: B := I and R := W, padded with zeros where m is larger."""
    for name, layer in rule.layers.items():
        shape, weight = rule.geometries[name], layer.weight.detach()
        rows = as_matrix(shape, weight)
        m = len(rows) * 10 if rule.form != "closed" and rule.feedback == "random" else len(rows)
        r = torch.cat([rows, rows.new_zeros(m - len(rows), rows.shape[1])])
        rule.set_feedback(name, B=torch.eye(len(rows), m).to(weight), R=from_matrix(shape, r, weight))


def absolute_weights(rule: CreditRule) -> None:
    """Fixed magnitudes := |W|, so that |U| sign(W) = W."""
    for name, layer in rule.layers.items():
        rule.magnitude.get_buffer(key(name)).copy_(layer.weight.detach().abs())


def equal_magnitudes(rule: CreditRule) -> None:
    """W := s sign(W), which is what uniform sign symmetry feeds back."""
    for name, layer in rule.layers.items():
        layer.weight.data = layer.weight.data.sign() * rule.magnitude.get_buffer(key(name))


def product_equals_weight(rule: CreditRule) -> None:
    """B = I (lambda = 1) and R := W."""
    for name, layer in rule.layers.items():
        rule.plastic[key(name)].data.copy_(layer.weight.detach())


def small_nudge(rule: CreditRule) -> None:
    """beta -> 0, where no unit crosses its kink."""
    rule.beta = 1e-7


def as_it_is(rule: CreditRule) -> None:
    """Backpropagation without further ado."""


ORACLES = {
    "pc-staged": (partial(PC, inference="staged"), as_it_is),
    "pc-fixed": (partial(PC, inference="fixed-prediction"), as_it_is),
    "dualprop": (DP, small_nudge),
    "dualprop-original": (partial(DP, variant="original", sweeps=2), small_nudge),
    "fa": (apical.FeedbackAlignment, copy_weights),
    "wm": (partial(apical.WeightMirror, warmup=0), no_mirroring),
    "kp": (apical.KolenPollack, feedback_equals_weight),
    "kp-closed": (partial(apical.KolenPollack, form="closed"), feedback_equals_weight),
    "kp-explicit": (partial(apical.KolenPollack, form="explicit"), copy_parameters),
    "usf": (apical.SignSymmetry, equal_magnitudes),
    "frsf": (partial(apical.SignSymmetry, variant="fixed"), absolute_weights),
    "pfa": (PFA, expansion_is_identity),
    "pfa-closed": (partial(PFA, form="closed"), expansion_is_identity),
    "pfa-o": (partial(PFA, feedback="orthogonal"), expansion_is_identity),
    "pfa-o-closed": (partial(PFA, feedback="orthogonal", form="closed"), expansion_is_identity),
    "pfa-literal": (partial(PFA, feedback="identity", form="literal"), product_equals_weight),
    "pfa-fused": (partial(PFA, feedback="identity", form="fused"), product_equals_weight),
}


@pytest.mark.parametrize("name", ORACLES)
def test_oracle_limit_is_backprop(name: str) -> None:
    factory, oracle = ORACLES[name]
    check_oracle(factory, oracle)


@pytest.mark.parametrize("check", ["gradients", "detach", "state_dict", "compile", "distributed"])
@pytest.mark.parametrize("rule", [apical.KolenPollack, PFA], ids=["kp", "pfa"])
def test_conformance_of_closed_forms(rule: type[CreditRule], check: str) -> None:
    CHECKS[check](partial(rule, form="closed"))
