"""Tests for rules and models: :func:`check_rule` tests a rule of your own on networks that are kept here, and
:func:`check_model` any rule on your own model."""

from apical.testing.comparison import Factory, Setting
from apical.testing.conformance import (
    CHECKS,
    check_accumulation,
    check_batch_mean,
    check_compile,
    check_detach,
    check_determinism,
    check_gradients,
    check_oracle,
    check_rule,
    check_state_dict,
    check_unsupported,
    settings,
)
from apical.testing.distributed import check_distributed
from apical.testing.model import ModelReport, check_model
from apical.testing.networks import dense_network, residual_network
from apical.testing.odd_check import check_odd_modules

__all__ = [
    "CHECKS",
    "Factory",
    "ModelReport",
    "Setting",
    "check_accumulation",
    "check_batch_mean",
    "check_compile",
    "check_detach",
    "check_determinism",
    "check_distributed",
    "check_gradients",
    "check_model",
    "check_odd_modules",
    "check_oracle",
    "check_rule",
    "check_state_dict",
    "check_unsupported",
    "dense_network",
    "residual_network",
    "settings",
]
