"""The rules with plastic feedback, as their tests of training loops make them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import apical

RULES: dict[str, Callable[..., Any]] = {
    "kp": apical.KolenPollack,
    "pfa": partial(apical.ProductFeedbackAlignment, expansion=2),
    "pfa-o": partial(apical.ProductFeedbackAlignment, feedback="orthogonal"),
}
each_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


@pytest.fixture(autouse=True)
def double() -> object:
    """Numbers are float64."""
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)
