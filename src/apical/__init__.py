"""Train `nn.Module`s with credit-assignment rules other than backpropagation."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from apical.sklearn_estimator import CreditClassifier


def __getattr__(name: str) -> Any:
    """The scikit-learn classifier, imported when it is asked for: it brings scikit-learn along."""
    if name == "CreditClassifier":
        from apical.sklearn_estimator import CreditClassifier

        return CreditClassifier
    raise AttributeError(f"module 'apical' has no attribute {name!r}")
