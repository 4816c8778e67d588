"""Do samples of a batch undo each other's changes? What a step does to pre-activations, against what was asked for."""

from torch import Tensor

from apical.core.credit import CreditRule
from apical.rules.local_solve import LocalSolve


def interference(rule: CreditRule, inputs: Tensor, targets: Tensor, damping: float = 1e-2) -> dict[str, tuple[float, float]]:
    """Cosines, by layer, of the change of the batch's pre-activations with the change that the errors asked for.

    The first is that of the rule's own step, the second that of :class:`apical.rules.local_solve.LocalSolve` around it. One
    means that every sample gets what it asked for; a layer with fewer weights than samples cannot reach it, and is asked for
    what it can do. Changes nothing.

    Args:
        rule: a rule that LocalSolve can wrap, or one that it wraps already.
        inputs: (batch, ...).
        targets: what the loss takes.
        damping: of the solver, where the rule is not wrapped yet.

    Raises:
        ConfigError, UnsupportedModelError: LocalSolve cannot wrap the rule.

    >>> import torch
    >>> from apical.rules.backprop import Backprop
    >>> model = torch.nn.Linear(20, 4)
    >>> ((without, with_),) = interference(Backprop(model), torch.rand(8, 20), torch.arange(8) % 4).values()
    >>> without < with_
    True
    """
    if isinstance(rule, LocalSolve):
        return rule.interference(inputs, targets)
    solver = LocalSolve(rule, damping)
    try:
        return solver.interference(inputs, targets)
    finally:
        CreditRule.detach(solver)  # the rule itself stays attached
