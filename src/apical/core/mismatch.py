"""The mismatch between two weights that receive the same gradient, without storing the second one.

If a feedback weight R is updated with `B^T` times the gradient of W, by the same linear optimiser (SGD with any learning
rate schedule, momentum, Nesterov and weight decay), then `E = R - B^T W` obeys a recursion without gradients,

    v <- mu v + omega E,   E <- E - eta v      so      E_t = c_t E_0  with one scalar c.

c is therefore an ordinary parameter with zero gradient: the user's own optimiser advances it, whatever its schedule.
Two probes beside it, with gradients g and 2g, verify that the optimiser is linear.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apical.core.credit import Credit
from apical.errors import ConfigError

PROBE = 1e-4  # small against any gradient norm, yet large enough that no adaptive optimiser's epsilon hides it


class Mismatch(nn.Module):
    """`c_t E_0` of one layer; `scale` holds (c, probe, probe) and must be in the optimiser with the layer's weight.

    Args:
        initial: E_0, of any shape.
    """

    initial: Tensor
    probe: Tensor

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.register_buffer("initial", initial)
        # two dimensions, so that "decay matrices only" parameter groups treat it as they treat the weight
        self.scale = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0]], dtype=initial.dtype, device=initial.device))
        self.register_buffer("probe", probe_gradient(self.scale.detach()), persistent=False)
        self._versions = (0, 0)
        self._left_behind = 0

    def check_optimizer(self, rule: str, weight: Tensor) -> None:
        """Verify that the optimiser moves `scale` with the layer's weight, and the probes in proportion to their gradients.

        Not every optimiser that is not linear shows in this: one that scales a whole matrix jointly (Muon) does not.

        Raises:
            ConfigError: `scale` is not in the optimiser; or the optimiser is not linear (Adam, RMSProp, clipping by
                value), and the closed form is not valid.
        """
        versions = (weight._version, self.scale._version)
        moved = [new != old for new, old in zip(versions, self._versions, strict=True)]
        self._versions = versions
        self._left_behind = self._left_behind + 1 if moved == [True, False] else 0
        if self._left_behind >= 3:  # once or twice could be somebody's own change of the weight
            raise ConfigError(
                f"the optimiser moves the weights but not {rule}'s own parameters: give it rule.parameters(), "
                "not model.parameters()"
            )
        _, one, two = self.scale.detach()[0].tolist()
        if abs(two - 2 * one) > 1e-5 * abs(one):
            raise ConfigError(
                f"{rule} in closed form needs an optimiser that is linear in the gradient (torch.optim.SGD with any "
                'momentum, decay and schedule), but this one is not; build the rule with form="explicit"'
            )


def probe_gradient(scale: Tensor) -> Tensor:
    """Gradient of `scale`: zero for c, in proportion 1:2 for the probes."""
    return torch.tensor([[0.0, PROBE, 2 * PROBE]], dtype=scale.dtype, device=scale.device)


def matched(weight: Tensor, initial: Tensor, scale: Tensor) -> Tensor:
    """`W + c E_0`, in the layout of `initial`."""
    return torch.addcmul(weight, initial, scale[0, 0])


def with_scales(credit: Credit, mismatches: Sequence[Mismatch]) -> Credit:
    """The credit with every mismatch's `scale` among its roots: its gradient is known beforehand."""
    credit.roots = [*credit.roots, *(mismatch.scale for mismatch in mismatches)]
    credit.signals = [*credit.signals, *(mismatch.probe for mismatch in mismatches)]
    return credit
