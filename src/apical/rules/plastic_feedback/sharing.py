"""An explicit R that takes `B^T` times W's change: `R' = k R + B^T (W' - k W)`, whatever an optimiser made of gradients.

At its first step a layer's R has its own gradient, which shows that W learns from nothing else. From then on R needs
none: W's gradients are checked periodically for others (:class:`apical.core.stepping.Arrival`), and R takes only the change.
"""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apical.core.processes import compressed, whole
from apical.core.stepping import Arrival, Group, distributed
from apical.rules.plastic_feedback.decay import ELEMENTWISE, Decays

if TYPE_CHECKING:
    from apical.rules.plastic_feedback.plastic_rule import PlasticRule

FUNCTION = "the layer computes with a function of its weight"
PARTED = "its gradient is not that of its weight (a penalty on the weight, a tied weight, compressed gradients)"
ROUNDED = 1e-3
"""What may lack from the cosine of gradients that processes hand each other in 16 bits."""
OPTIONS_DIFFER = "its weight and its feedback have different options in the optimiser"


class Sharing:
    """Decides which R take their weight's change in the next step.

    Args:
        arrivals: of the weights' gradients, by layer.
        decays: the optimiser's.
    """

    def __init__(self, arrivals: Mapping[str, Arrival], decays: Decays) -> None:
        self._arrivals, self._decays = arrivals, decays
        self._counts: dict[str, int] = {}
        self._now: dict[str, tuple[float, Tensor]] = {}
        self._warned = self._compressed = False

    def forget(self) -> None:
        """A state was loaded."""
        self._counts.clear()
        self._now.clear()

    def hear(self) -> None:
        """A forward pass begins."""
        self._compressed = compressed()

    def begin(self) -> None:
        """A step is about to be taken."""
        self._now.clear()

    def __bool__(self) -> bool:
        return bool(self._now)

    def spares(self, name: str) -> bool:
        """Whether R needs no separate gradient in this forward pass."""
        eager = not (torch.compiler.is_compiling() or distributed())  # DistributedDataParallel waits for each gradient
        return name in self._counts and eager

    def is_due(self, name: str) -> bool:
        """Whether the weight's gradient must be checked for other contributions before the next step."""
        count = self._counts.get(name, 0)
        return count < 3 or count % 16 == 15

    def before_step(
        self, rule: "PlasticRule", name: str, optimizer: Optimizer, group: Group | None, other: Group, is_alike: bool
    ) -> None:
        """Let R take W's change in this step, or record in `rule.alone` why it moves by the optimiser's state."""
        plastic, weight = rule.plastic_of(name), rule.layers[name]._parameters.get("weight")
        spared = plastic.grad is None and name in self._counts and self._is_moved_by(rule, name) and weight is not None
        if rule.ALIKE or name in rule.alone or not plastic.requires_grad or (plastic.grad is None and not spared):
            return
        if rule.update == "own":
            self._warn_of_own_state(rule, name, optimizer)
            return
        reason, k = None, self._decays.factor(optimizer, group or other, plastic if weight is None else weight)
        if weight is None:
            reason = FUNCTION
        elif isinstance(k, str):
            reason = k
        elif not weight.requires_grad:
            plastic.grad = None  # W rests, and so does R
            return
        elif group is None:
            reason = "its weight and its feedback have different optimisers"
        elif not is_alike:
            reason = OPTIONS_DIFFER
        elif weight.grad is None:
            if spared:
                return
            reason = "its weight has no separate gradient"
        elif plastic.grad is None or (name in self._arrivals and self._arrivals[name].watched):
            reason = PARTED if self._arrivals[name].foreign else None  # of all that has come since gradients were cleared
        elif self.is_due(name):
            expected, allowed = rule.from_weight(name, whole(weight.grad)), ROUNDED if self._compressed else None
            reason = None if parallel(whole(plastic.grad), expected, allowed) else PARTED
        if reason is not None or weight is None or isinstance(k, str):
            rule.alone[name] = reason or FUNCTION
            if spared and reason != PARTED and weight is not None and weight.grad is not None:
                plastic.grad = rule.from_weight(name, weight.grad)
            return
        if name in self._arrivals:
            self._counts[name] = self._counts.get(name, 0) + 1
        self._now[name] = k, weight.detach().clone()
        plastic.grad = None

    def _is_moved_by(self, rule: "PlasticRule", name: str) -> bool:
        """Whether this step moves W by the rule's gradient of a batch, possibly again: no other has arrived since."""
        arrival = self._arrivals.get(name)
        return name in rule._called or (arrival is not None and not arrival.arrived)

    def restore(self, rule: "PlasticRule", name: str) -> None:
        """Give R its omitted gradient: this is a step of SGD, which computes R's change from it."""
        weight = rule.layers[name]._parameters.get("weight")
        if self._counts.pop(name, 0) and name in rule._called and weight is not None and weight.grad is not None:
            plastic = rule.plastic_of(name)
            plastic.grad = rule.from_weight(name, weight.grad) if plastic.grad is None else plastic.grad

    def after_step(self, rule: "PlasticRule", optimizer: Optimizer) -> None:
        """W has moved: R follows."""
        for name, (k, before) in self._now.items():
            rule.moved_by = type(optimizer).__name__
            with torch.no_grad():
                rule.take_change(name, k, rule.layers[name].weight - k * before)
        self._now.clear()

    def _warn_of_own_state(self, rule: "PlasticRule", name: str, optimizer: Optimizer) -> None:
        """Adam's step of `B^T G` is not `B^T` times its step of G: longer, and turned."""
        if self._warned or type(optimizer) not in ELEMENTWISE:
            return
        self._warned = True
        rows = rule.plastic_of(name).numel() / cast(nn.Parameter, rule.layers[name].weight).numel()
        warnings.warn(
            f'update="own" moves R by {type(optimizer).__name__}\'s own state, which does not commute with B^T: R drifts '
            'away from B^T W and training suffers; use update="shared", or apical.optim.InputAdam, or give R the learning '
            f"rate lr / {math.sqrt(1 + 2 * rows / math.pi):.3g} = lr / sqrt(1 + 2 lambda / pi)",
            RuntimeWarning,
            stacklevel=2,
        )


def parallel(actual: Tensor, expected: Tensor, allowed: float | None = None) -> bool:
    """Equal up to a positive factor (as from clipping) and rounding: one minus the cosine is at most `allowed`."""
    a, b = actual.detach().double(), expected.double()
    if a.shape != b.shape:
        return False
    size = a.norm() * b.norm()
    allowed = 1e2 * torch.finfo(expected.dtype).eps if allowed is None else allowed
    return bool(size - (a * b).sum() <= allowed * size)
