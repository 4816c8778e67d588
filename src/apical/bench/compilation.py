"""Compiled training steps: their requirements, and a rule prepared for them."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apical.core.credit import Credit, CreditRule
from apical.core.wrappers import COMPILES
from apical.diagnostics.alignment import unchanged
from apical.errors import ConfigError

COMPILE: dict[str, Any] = {"options": {"fallback_random": True}}
"""Options of the compiler: random numbers are the same as in an uncompiled step."""


def check_compiler(device: torch.device) -> None:
    """Refuse to compile if torch.compile would find no compiler.

    Raises:
        ConfigError: says what is missing.
    """
    if not COMPILES:
        raise ConfigError(
            f"--compile needs PyTorch 2.13 or newer, but this is {torch.__version__}: update it, or drop --compile"
        )
    wanted = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(wanted) is None:
        raise ConfigError(
            f"--compile needs a C++ compiler, but {wanted} was not found; install it, name another in the environment "
            "variable CXX, or drop --compile"
        )


class CompiledStep(nn.Module):
    """A rule with a compiled step.

    Each instance has separate code, because PyTorch limits how often it compiles one piece of code, for any rule.

    Args:
        rule: the rule, which is not modified.
        inputs, targets: a batch, on which the rule records what model and loss do before it is compiled.
    """

    def __init__(self, rule: CreditRule, inputs: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.rule = rule
        with unchanged(rule):
            rule(inputs, targets)

        def step(inputs: Tensor, targets: Tensor) -> Credit:
            credit: Credit = rule(inputs, targets)
            return credit

        warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # silences long warnings about uncompiled parts
        step.__code__ = step.__code__.replace()
        self.step: Callable[[Tensor, Tensor], Credit] = torch.compile(step, **COMPILE)

    def forward(self, inputs: Tensor, targets: Tensor) -> Credit:
        """Return the rule's credit for a batch."""
        return self.step(inputs, targets)
