"""By how much a step shrinks a weight, apart from what it makes of gradients: `W' = k W - u(G_0 .. G_t)`.

Where an optimiser's step has this form (decoupled decay: AdamW, Muon, anything without decay), two weights that receive the
same u come together by the factor k alone, and one weight can take another's change: `R' = k R + B^T (W' - k W)`.
"""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from apical.core.stepping import Group

ELEMENTWISE = {optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad, optim.Adadelta}
"""Optimisers of torch whose step sees a weight in its decay alone, which goes through the moments unless decoupled."""

MUON: Any = getattr(optim, "Muon", None)
ALLOWED = 1e-9
TRIED = 0.05
"""Learning rate at which a step is tried, since a warm-up may begin at none."""


class Decays:
    """The factor k of the groups of any optimiser, at each step."""

    def __init__(self) -> None:
        self._probes: WeakKeyDictionary[Optimizer, dict[tuple[int, int], Probe | None]] = WeakKeyDictionary()
        self._now: dict[tuple[int, int], float | None] = {}

    def begin(self) -> None:
        """A step is about to be taken."""
        self._now.clear()

    def factor(self, optimizer: Optimizer, group: Group, dim: int) -> float | str:
        """k of the step to come for a weight of `dim` dimensions; or why there is none, in words."""
        name = type(optimizer).__name__
        if group.get("differentiable"):
            return f"{name} is differentiable"
        if type(optimizer) in ELEMENTWISE or type(optimizer) is MUON:
            # AdamW of PyTorch 2.6 has no such key
            apart = type(optimizer) in (MUON, optim.AdamW) or group.get("decoupled_weight_decay")
            if apart or not group["weight_decay"]:
                return 1.0 - float(group["lr"]) * float(group["weight_decay"])
            remedy = "use AdamW" if name == "Adam" else "use AdamW, or no decay"
            if "decoupled_weight_decay" in group and name != "Adam":
                remedy = f"pass {name} decoupled_weight_decay=True"
            return f"the weight decay of {name} goes through its moments, where no factor describes it: {remedy}"
        place = id(group), dim
        if place not in self._now:
            self._now[place] = self._probed(optimizer, group, dim)
        k = self._now[place]
        return f"the step of {name} is not a decay plus a function of gradients alone: use AdamW" if k is None else k

    def _probed(self, optimizer: Optimizer, group: Group, dim: int) -> float | None:
        probes = self._probes.setdefault(optimizer, {})
        place = id(group), dim
        if place not in probes:
            probes[place] = _probe(optimizer, group, dim)
        probe = probes[place]
        k = None if probe is None else probe.step(group)
        if k is None:
            probes[place] = None
        return k


def _probe(optimizer: Optimizer, group: Group, dim: int) -> "Probe | None":
    """What follows the optimiser from here on; None where no factor describes its steps."""
    if _reaches(_attributes(optimizer)):
        return None  # a copy of it would not be one
    lr, other = TRIED if "lr" in group else None, (6, *(4,) * (dim - 1))
    try:
        first, crowded = Probe(optimizer, group, dim, lr), Probe(optimizer, group, dim, lr, beside=3)
        trials = [first, crowded, Probe(optimizer, group, dim, lr, shape=other)]
        if first.has_state:
            trials.append(Probe(optimizer, group, dim, lr, is_fresh=True))
        for _ in range(6):
            factors = {trial.step(group) for trial in trials}
            # it may hold weights in its state, look at a weight's shape, or at all gradients together
            if len(factors) > 1 or None in factors or not torch.equal(first.tensors[0], crowded.tensors[0]):
                return None
        return Probe(optimizer, group, dim)
    except Exception:
        return None  # something in it cannot be copied


class Probe:
    """Four small tensors under a copy of an optimiser: two get a gradient, from 0 and P / 2; two none, from P / 2 and P.

    Gradients, and what Adam makes of them, are nearly at right angles to P: there some steps look at a weight's direction.

    Args:
        optimizer: it is left as it is, with all that its groups hold.
        group: the weight's.
        dim: of the weight.
        lr: instead of the group's.
        is_fresh: begin without state; else with one of the weight's, in which all traces of gradients are zero.
        beside: how many tensors there are besides, with gradients of their own.
        shape: of the tensors; two by two and so on, if None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        group: Group,
        dim: int,
        lr: float | None = None,
        *,
        is_fresh: bool = False,
        beside: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        shape = (2,) * dim if shape is None else shape
        self.pattern = torch.ones(shape, dtype=torch.float64, device="cpu")
        self.pattern[..., 1::2] = -1.0
        self.phase = 0.03 * self.pattern
        self.tensors = [value * self.pattern for value in (0.0, 0.5, 0.5, 1.0, *(2.0 for _ in range(beside)))]
        self.options: dict[str, Any] = {"capturable": False} if "capturable" in group else {}
        self.options |= {} if lr is None else {"lr": lr}
        twin = object.__new__(type(optimizer))
        twin.__dict__.update({name: copy.deepcopy(value) for name, value in _attributes(optimizer).items()})
        twin.__dict__.update({name: OrderedDict() for name in optimizer.__dict__ if name.startswith("_optimizer_")})
        twin.state = defaultdict(dict)
        twin.param_groups = [{**_options(group), **self.options, "params": self.tensors}]
        states = (optimizer.state[p] for p in group["params"] if p.dim() == dim and optimizer.state.get(p))
        like: dict[str, Any] = next(states, {})
        self.has_state = bool(like)
        for tensor in self.tensors if like and not is_fresh else ():
            twin.state[tensor] = {key: _still(value, shape) for key, value in like.items()}
        self.twin, self.steps = twin, 0

    def step(self, group: Group) -> float | None:
        """k of the next step by the group's options as they are now; None where the tensors contradict any k."""
        a, b, c, d, *others = self.tensors
        before = c.clone()
        self.twin.param_groups[0].update(_options(group) | self.options)
        gradient = torch.cos(2.4 * self.steps + self.phase) + 0.5
        for tensor, value in zip(self.tensors, (1.0, 1.0, 0.0, 0.0, *(7.0 for _ in others)), strict=True):
            tensor.grad = value * gradient
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=()):
                self.twin.step()
        except Exception:
            return None  # whatever it asks of a weight, small tensors do not have it
        self.steps += 1
        factors = d / self.pattern
        k = float(factors.flatten()[0])
        is_one = bool((factors - k).abs().max() <= ALLOWED)
        separate = bool((b - a - c).abs().max() <= ALLOWED * (1 + a.abs().max()))
        memoryless = bool((c - k * before).abs().max() <= ALLOWED)
        d.copy_(self.pattern)
        return k if is_one and separate and memoryless else None


def _options(group: Group) -> dict[str, Any]:
    """A group without its parameters; what it holds may be written to."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimiser holds beside groups, state, hooks and a step that a schedule has wrapped."""
    apart = ("param_groups", "state", "step")
    return {name: value for name, value in vars(optimizer).items() if name not in apart and name[:11] != "_optimizer_"}


def _reaches(value: Any) -> bool:
    """Whether weights, or another optimiser, hang on a value."""
    if isinstance(value, Mapping):
        return any(map(_reaches, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return any(map(_reaches, value))
    return isinstance(value, (nn.Parameter, nn.Module, Optimizer)) or isinstance(getattr(value, "__self__", None), Optimizer)


def _still(value: Any, shape: tuple[int, ...]) -> Any:
    """The same place in time of a weight's state, without its gradients' traces."""
    if not isinstance(value, Tensor):
        return copy.copy(value)
    if value.dim() == 0:
        return value.detach().clone().cpu()
    return torch.zeros(shape if value.dim() == len(shape) else (2,) * value.dim(), dtype=torch.float64)
