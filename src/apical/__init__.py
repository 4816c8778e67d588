"""Train `nn.Module`s with credit-assignment rules other than backpropagation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apical.core.activations import register_activation
    from apical.core.credit import Credit, CreditRule
    from apical.core.layers import register_layer
    from apical.rules.backprop import Backprop
    from apical.rules.corinfomax import CorInfoMax
    from apical.rules.counter_current_learning import CounterCurrentLearning
    from apical.rules.deep_feedback_control import DeepFeedbackControl
    from apical.rules.difference_target_propagation import DifferenceTargetPropagation
    from apical.rules.direct_feedback_alignment import DirectFeedbackAlignment
    from apical.rules.equilibrium_propagation import EquilibriumPropagation
    from apical.rules.feedback_alignment import FeedbackAlignment
    from apical.rules.kolen_pollack import KolenPollack
    from apical.rules.product_feedback_alignment import ProductFeedbackAlignment
    from apical.rules.sign_symmetry import SignSymmetry
    from apical.rules.strong_deep_feedback_control import StrongDeepFeedbackControl
    from apical.rules.top_down_credit_assignment import TopDownCreditAssignment
    from apical.rules.weight_mirror import WeightMirror
    from apical.sklearn_estimator import CreditClassifier

__all__ = [
    "Backprop",
    "CorInfoMax",
    "CounterCurrentLearning",
    "Credit",
    "CreditClassifier",
    "CreditRule",
    "DeepFeedbackControl",
    "DifferenceTargetPropagation",
    "DirectFeedbackAlignment",
    "EquilibriumPropagation",
    "FeedbackAlignment",
    "KolenPollack",
    "ProductFeedbackAlignment",
    "SignSymmetry",
    "StrongDeepFeedbackControl",
    "TopDownCreditAssignment",
    "WeightMirror",
    "register_activation",
    "register_layer",
]
__version__ = "0.1.0"
_HOMES = {
    "Credit": "apical.core.credit",
    "CreditRule": "apical.core.credit",
    "Backprop": "apical.rules.backprop",
    "CorInfoMax": "apical.rules.corinfomax",
    "CounterCurrentLearning": "apical.rules.counter_current_learning",
    "DeepFeedbackControl": "apical.rules.deep_feedback_control",
    "DifferenceTargetPropagation": "apical.rules.difference_target_propagation",
    "DirectFeedbackAlignment": "apical.rules.direct_feedback_alignment",
    "EquilibriumPropagation": "apical.rules.equilibrium_propagation",
    "FeedbackAlignment": "apical.rules.feedback_alignment",
    "KolenPollack": "apical.rules.kolen_pollack",
    "ProductFeedbackAlignment": "apical.rules.product_feedback_alignment",
    "SignSymmetry": "apical.rules.sign_symmetry",
    "StrongDeepFeedbackControl": "apical.rules.strong_deep_feedback_control",
    "TopDownCreditAssignment": "apical.rules.top_down_credit_assignment",
    "WeightMirror": "apical.rules.weight_mirror",
    "CreditClassifier": "apical.sklearn_estimator",
    "register_activation": "apical.core.activations",
    "register_layer": "apical.core.layers",
}


def __getattr__(name: str) -> Any:
    """A public name or part, imported when it is asked for: torch takes long, and the command line obeys Ctrl-C before."""
    if name in ("core", "dynamics", "errors", "rules"):
        return import_module(f"apical.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'apical' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
