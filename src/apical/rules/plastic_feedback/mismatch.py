"""The mismatch between two weights that receive the same gradient, without storing the second one.

If a feedback weight R is updated with `B^T` times the gradient of W, by the same SGD (any learning rate schedule, momentum,
Nesterov and weight decay), then `E = R - B^T W` obeys a recursion without gradients,

    v <- mu v + (1 - dampening) omega E,   E <- E - eta v      so      E_t = c_t E_0  with one scalar c

and a second basis element where v starts as a separate matrix: `E_t = c_0t E_0 + c_1t E_1`. Under an optimiser whose decay
is apart from what it makes of gradients (:mod:`.decay`), and R takes `B^T` times W's change, `c <- k c`.
In addition to E the feedback itself is stored, `F = W + E`: when W moves otherwise than by the optimiser, F stays, and E is
measured again.
"""

import math
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apical.core.stepping import Group, direction, fingerprint
from apical.errors import ConfigError

TINY = 1e-30  # below this a coefficient only makes denormal numbers, which are slow


class Mismatch(nn.Module):
    """`F - W = sum_k c_k E_k` of one layer, and the feedback F.

    Args:
        initial: E_0, with c = 1 and v = 0.
        velocity: E_1, with c = 0 and v = 1; None where nothing moves yet.
    """

    initial: Tensor
    velocity: Tensor | None
    feedback: Tensor

    def __init__(self, initial: Tensor, velocity: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("initial", initial)
        self.register_buffer("velocity", velocity)
        self.register_buffer("feedback", torch.empty_like(initial), persistent=False)
        self.c, self.v = [1.0, 0.0], [0.0, 1.0]

    def get_extra_state(self) -> Tensor:
        """(2, 2) float64: c and v; not a buffer, so that no `.half()` rounds them."""
        return torch.tensor([self.c, self.v], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Take c and v from a state dict."""
        self.c, self.v = state.tolist()

    def advance(self, group: Group, first: bool) -> None:
        """One step of SGD without a gradient, in Python's float64.

        Args:
            group: the options of the weight's group.
            first: SGD begins a new momentum, with the whole of the first gradient.
        """
        lr, decay, momentum = float(group["lr"]), group["weight_decay"], group["momentum"]
        for k in range(1 if self.velocity is None else 2):
            step = decay * self.c[k]
            if momentum:
                self.v[k] = step if first else momentum * self.v[k] + (1 - group["dampening"]) * step
                step = step + momentum * self.v[k] if group["nesterov"] else self.v[k]
            self.c[k] -= lr * step

    def shrink(self, factor: float) -> None:
        """One step of an optimiser with decoupled decay: `W' = k W - u`, and u is the same for the feedback."""
        self.c[:] = [factor * value for value in self.c]

    def follow(self, weight: Tensor) -> None:
        """`F = W + sum_k c_k E_k` in place, for a detached weight."""
        self.matched(weight, self.feedback)

    def matched(self, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """`W + sum_k c_k E_k`."""
        most = torch.finfo(weight.dtype).max
        c = [(value if abs(value) <= most else value * math.inf) if abs(value) > TINY else 0.0 for value in self.c]
        result = torch.add(weight, self.initial, alpha=c[0], out=out)
        return result if self.velocity is None else result.add_(self.velocity, alpha=c[1])

    def drift(self) -> Tensor:
        """V: by how much the momentum of the feedback exceeds that of the weight, in the space of the weight."""
        result = self.initial * self.v[0]
        return result if self.velocity is None else result.add_(self.velocity * self.v[1])

    def measure(self, weight: Tensor) -> None:
        """Restart from the present feedback and a (detached) weight that was moved from outside."""
        moving = self.v[0] != 0 or self.velocity is not None
        self.restart(weight, self.drift() if moving else None)

    def restart(self, weight: Tensor, drift: Tensor | None) -> None:
        """Restart from the present feedback, with V = `drift`."""
        self.velocity = drift
        self.initial = self.feedback - weight
        self.c, self.v = [1.0, 0.0], [0.0, 1.0]
        self.follow(weight)


class Watch:
    """Whether a weight is still what the last step left.

    Args:
        weight: the parameter.
        mismatch: its mismatch.

    Attributes:
        optimizer: that moved it last.
        momentum: the optimiser's momentum of the weight after the last step.
        age: the version of that tensor.

    Its product with a fixed vector is taken after each step and before the next, where the optimiser reads it anyway.
    """

    optimizer: ref[Optimizer] | None = None
    momentum: Tensor | None = None
    age = -1

    def __init__(self, weight: nn.Parameter, mismatch: Mismatch) -> None:
        self.parameter, self.mismatch = weight, mismatch
        self.steps = 0
        self._version = -1
        self._careful = weight.device.type == "cpu"  # elsewhere a comparison waits for the device
        self._missed = torch.zeros((), dtype=torch.bool, device=weight.device)
        self._bind()

    def note(self, optimizer: Optimizer, momentum: Tensor | None) -> None:
        """Record what moved the weight, and the momentum that it left."""
        self.optimizer, self.momentum = ref(optimizer), momentum
        self.age = -1 if momentum is None else momentum._version

    def is_kept(self, momentum: Tensor | None) -> bool:
        """Whether a momentum, if there is one, is what the last step left."""
        return momentum is None or (momentum is self.momentum and momentum._version == self.age)

    def is_elsewhere(self) -> bool:
        """Whether the parameter has its values at another address since it was looked at."""
        return self.parameter.data_ptr() != self._address

    def _bind(self) -> None:
        self.weight = self.parameter.detach()
        self._address = self.parameter.data_ptr()
        self._direction = direction(self.weight)
        plain = self.weight.is_contiguous() and self.weight.dtype is self._direction.dtype
        self._rows = self.weight.view(len(self.weight), -1) if plain else None
        self._print = self._fingerprint()

    def _fingerprint(self) -> Tensor:
        """One number a row, which tell a change of any value."""
        return fingerprint(self.weight, self._direction) if self._rows is None else torch.mv(self._rows, self._direction)

    def stepped(self) -> None:
        """The optimiser moved the weight: the feedback follows."""
        if self.is_elsewhere() or self.parameter.dtype != self.weight.dtype:
            self._bind()
        self._print = self._fingerprint()  # first, while the optimiser's step has left the weight in the cache
        self.mismatch.follow(self.weight)
        self._version = self.parameter._version
        self.steps += 1

    def moved(self) -> bool:
        """Whether anything else moved it since: by its version and its fingerprint; at first and periodically by all values.

        Raises:
            ConfigError: on an accelerator, where values are compared without waiting, it was seen too late.
        """
        due = self.steps < 3 or self.steps % 64 == 0
        noticed = self._version != self.parameter._version or self._address != self.parameter.data_ptr()
        if not (noticed or due or self._differs()):
            return False
        if due and not self._careful and bool(self._missed):
            raise ConfigError(
                f"a weight {tuple(self.weight.shape)} was changed through .data between steps, which is noticed too late on "
                'this device; change it under torch.no_grad(), or build the rule with form="explicit"'
            )
        self._bind()
        if torch.equal(self.mismatch.matched(self.weight), self.mismatch.feedback):
            self._version = self.parameter._version
            return False
        self._careful = True
        return True

    def _differs(self) -> bool:
        if self._careful:
            return not torch.equal(self._print, self._fingerprint())
        self._missed.logical_or_((self._print != self._fingerprint()).any())
        return False
