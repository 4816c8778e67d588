"""The public names, one per line; `apical` imports this file when one is first used."""

from apical.core.activations import register_activation as register_activation
from apical.core.credit import Credit as Credit
from apical.core.credit import CreditRule as CreditRule
from apical.core.layers import register_layer as register_layer
from apical.core.layers import register_local as register_local
from apical.core.pipeline import pipeline as pipeline
from apical.rules.backprop import Backprop as Backprop
from apical.rules.contrastive_plasticity.contrastive_signal_plasticity import (
    ContrastiveSignalPlasticity as ContrastiveSignalPlasticity,
)
from apical.rules.corinfomax import CorInfoMax as CorInfoMax
from apical.rules.counter_current.counter_current_learning import CounterCurrentLearning as CounterCurrentLearning
from apical.rules.direct_feedback_alignment import DirectFeedbackAlignment as DirectFeedbackAlignment
from apical.rules.dual_propagation import DualPropagation as DualPropagation
from apical.rules.equilibrium.equilibrium_propagation import EquilibriumPropagation as EquilibriumPropagation
from apical.rules.feedback_alignment import FeedbackAlignment as FeedbackAlignment
from apical.rules.feedback_control.deep_feedback_control import DeepFeedbackControl as DeepFeedbackControl
from apical.rules.feedback_control.strong_deep_feedback_control import StrongDeepFeedbackControl as StrongDeepFeedbackControl
from apical.rules.forward_forward import ForwardForward as ForwardForward
from apical.rules.local_classifiers import LocalClassifiers as LocalClassifiers
from apical.rules.local_solve import LocalSolve as LocalSolve
from apical.rules.modulated import Modulated as Modulated
from apical.rules.plastic_feedback.kolen_pollack import KolenPollack as KolenPollack
from apical.rules.plastic_feedback.product_feedback_alignment import ProductFeedbackAlignment as ProductFeedbackAlignment
from apical.rules.predictive_coding.predictive_coding import PredictiveCoding as PredictiveCoding
from apical.rules.semi_implicit import SemiImplicit as SemiImplicit
from apical.rules.sign_symmetry import SignSymmetry as SignSymmetry
from apical.rules.target_propagation.difference_target_propagation import (
    DifferenceTargetPropagation as DifferenceTargetPropagation,
)
from apical.rules.top_down.top_down_credit_assignment import TopDownCreditAssignment as TopDownCreditAssignment
from apical.rules.weight_mirror import WeightMirror as WeightMirror
