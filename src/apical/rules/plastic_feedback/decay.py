"""The factor by which a step shrinks a weight, apart from its gradient term: `W' = k W - u(G_0 .. G_t)`.

Where an optimiser's step has this form (decoupled decay: AdamW, Muon, anything without decay), two weights that receive the
same u converge by the factor k alone, and one weight can copy another's change: `R' = k R + B^T (W' - k W)`.
"""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from apical.core.stepping import Group
from apical.rules.plastic_feedback.sources import Sources, draws_nothing

ELEMENTWISE = {optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad, optim.Adadelta}
"""Optimisers of torch whose step uses a weight only in its decay, which goes through the moments unless decoupled."""

MUON: Any = getattr(optim, "Muon", None)
ALLOWED = 1e-9
TRIED = 0.05
"""Learning rate of a trial step, since a warm-up may start at zero."""
NUMBERS = (bool, int, float)
PLAIN = (bool, int, float, str, type(None))
LARGEST = 64
"""Maximum number of rows and columns of a trial's tensors."""


Clock = tuple[tuple[str, float], ...]
Place = tuple[int, int, Clock]


class Decays:
    """The factor k of the groups of any optimiser, at each step."""

    def __init__(self) -> None:
        self._probes: WeakKeyDictionary[Optimizer, dict[Place, Probe]] = WeakKeyDictionary()
        self._tried: WeakKeyDictionary[Optimizer, dict[tuple[int, ...], bool]] = WeakKeyDictionary()
        self._now: dict[Place, float | None] = {}

    def begin(self) -> None:
        """A step is about to be taken."""
        self._now.clear()

    def factor(self, optimizer: Optimizer, group: Group, weight: Tensor) -> float | str:
        """k of the next step for a weight; or the reason why there is none."""
        name = type(optimizer).__name__
        if group.get("differentiable"):
            return f"{name} is differentiable"
        if is_known(optimizer):
            # AdamW of PyTorch 2.6 has no such key
            apart = type(optimizer) in (MUON, optim.AdamW) or group.get("decoupled_weight_decay")
            if apart or not group["weight_decay"]:
                return 1.0 - float(group["lr"]) * float(group["weight_decay"])
            remedy = "use AdamW" if name == "Adam" else "use AdamW, or no decay"
            if "decoupled_weight_decay" in group and name != "Adam":
                remedy = f"pass {name} decoupled_weight_decay=True"
            return f"the weight decay of {name} enters its moments, so it is not a single factor: {remedy}"
        k = self._probed(optimizer, group, weight)
        return not_known(optimizer) if k is None else k

    def _probed(self, optimizer: Optimizer, group: Group, weight: Tensor) -> float | None:
        tried, shape = self._tried.setdefault(optimizer, {}), tuple(min(size, LARGEST) for size in weight.shape)
        state = optimizer.state.get(weight, {})
        if (id(group), *shape) not in tried:
            tried[id(group), *shape] = not _reaches(_attributes(optimizer)) and _obeys(optimizer, group, shape, state)
        if not tried[id(group), *shape]:
            return None
        place = id(group), len(shape), clock(state)
        if place not in self._now:
            probes = self._probes.setdefault(optimizer, {})
            if len(probes) > 16:
                probes.clear()
            probe = probes.pop(place, None) or Probe(optimizer, group, len(shape), state)
            self._now[place] = probe.step(group)
            probes[id(group), len(shape), probe.clock()] = probe
        if self._now[place] is None:
            tried[id(group), *shape] = False
        return self._now[place]


def is_known(optimizer: Optimizer) -> bool:
    """Whether the optimiser's steps need no trial."""
    return type(optimizer) in ELEMENTWISE or type(optimizer) is MUON


def not_known(optimizer: Optimizer) -> str:
    """The reason why no factor applies."""
    name = type(optimizer).__name__
    return f"the step of {name} is not known to be a decay plus a function of each weight's own gradients: use AdamW"


class Rehearsal:
    """The first step of a third-party optimiser on weight and feedback, which must move both equally.

    A trial uses other tensors than the optimiser, whose steps may depend on their position, name or size.

    Args:
        weight: of the layer.
        plastic: its explicit feedback, of the same shape and with the same gradient.
        k: the factor by which the step should shrink their difference.
    """

    def __init__(self, weight: Tensor, plastic: Tensor, k: float) -> None:
        self._weight, self._plastic, self._k = weight, plastic, k
        self._before = (plastic - weight).detach()

    def holds(self) -> bool:
        """Whether the step did so."""
        weight, plastic = self._weight.detach(), self._plastic.detach()
        allowed = 1e2 * torch.finfo(weight.dtype).eps * (weight.abs() + plastic.abs() + self._before.abs()).max()
        return bool((plastic - weight - self._k * self._before).abs().max() <= allowed)


def _obeys(optimizer: Optimizer, group: Group, shape: tuple[int, ...], state: Mapping[str, Any]) -> bool:
    """Whether six steps obey one factor: at any shape, with and without other weights, with and without a state."""
    dim = len(shape)
    probe = partial(Probe, optimizer, group, dim, lr=TRIED if "lr" in group else None)
    try:
        first, crowded = probe(state), probe(state, beside=3)
        trials = [first, crowded, probe(state, shape=(6, *(4,) * (dim - 1))), probe(state, shape=shape), probe({})]
        for _ in range(6):
            factors = [trial.step(group) for trial in trials]
            known = [k for k in factors if k is not None]
            # it may store weights in its state, or depend on a weight's shape or on all gradients together
            if len(known) < len(factors) or max(known) - min(known) > ALLOWED:
                return False
            if not torch.equal(first.tensors[0], crowded.tensors[0]):
                return False
    except Exception:
        return False  # something in it cannot be copied
    return True


class Probe:
    """Four small tensors under a copy of an optimiser: two start at 0 and P / 2 with a gradient, two at P / 2 and P without.

    Gradients, and Adam's steps from them, are nearly orthogonal to P: some optimisers use a weight's direction there.

    Args:
        optimizer: not modified, nor anything in its groups.
        group: the weight's.
        dim: of the weight.
        state: of the weight, the initial state if there is one; all gradient traces are zero.
        lr: instead of the group's.
        beside: number of additional tensors, with their own gradients.
        shape: of the tensors; two by two and so on, if None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        group: Group,
        dim: int,
        state: Mapping[str, Any],
        *,
        lr: float | None = None,
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
        for tensor in self.tensors if state else ():
            twin.state[tensor] = {key: _still(value, shape) for key, value in state.items()}
        self.twin, self.steps = twin, 0
        self._optimizer, self._sources = ref(optimizer), cast("Sources | None", None)

    def clock(self) -> Clock:
        """The step counts in its state."""
        return clock(self.twin.state.get(self.tensors[0], {}))

    def step(self, group: Group) -> float | None:
        """k of the next step with the group's present options; None if the tensors contradict any k."""
        a, b, c, d, *others = self.tensors
        before = c.clone()
        self.twin.param_groups[0].update(_options(group) | self.options)
        self.twin.__dict__.update(
            {name: value for name, value in vars(self._optimizer()).items() if isinstance(value, PLAIN)}
        )
        gradient = torch.cos(2.4 * self.steps + self.phase) + 0.5
        for tensor, value in zip(self.tensors, (1.0, 1.0, 0.0, 0.0, *(7.0 for _ in others)), strict=True):
            tensor.grad = value * gradient
        try:
            self._sources = Sources(self.tensors, self.twin.state, self._sources)
            with torch.no_grad(), torch.random.fork_rng(devices=()), draws_nothing(), self._sources:
                self.twin.step()
        except Exception:
            return None  # it needs something that small tensors do not have
        self.steps += 1
        factors = d / self.pattern
        k = float(factors.flatten()[0])
        is_one = bool((factors - k).abs().max() <= ALLOWED)
        separate = bool((b - a - c).abs().max() <= ALLOWED * (1 + a.abs().max()))
        memoryless = bool((c - k * before).abs().max() <= ALLOWED)
        d.copy_(self.pattern)
        return k if is_one and separate and memoryless else None


def clock(state: Mapping[str, Any]) -> Clock:
    """The integers in a weight's state: weights that skip some steps have other counts."""
    numbers = {key: float(value) for key, value in state.items() if isinstance(value, NUMBERS) or _is_scalar(value)}
    return tuple(sorted((str(key), value) for key, value in numbers.items() if value.is_integer()))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _options(group: Group) -> dict[str, Any]:
    """A copy of a group without its parameters, safe to modify."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's attributes other than groups, state, hooks and a step wrapped by a schedule."""
    apart = ("param_groups", "state", "step")
    return {name: value for name, value in vars(optimizer).items() if name not in apart and name[:11] != "_optimizer_"}


def _reaches(value: Any) -> bool:
    """Whether a value refers to weights or to another optimiser."""
    if isinstance(value, Mapping):
        return any(map(_reaches, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return any(map(_reaches, value))
    return isinstance(value, (nn.Parameter, nn.Module, Optimizer)) or isinstance(getattr(value, "__self__", None), Optimizer)


def _still(value: Any, shape: tuple[int, ...]) -> Any:
    """A weight's state with the same step counts, but without gradient traces."""
    if not isinstance(value, Tensor):
        return copy.copy(value)
    if value.dim() == 0:
        return value.detach().clone().cpu()
    return torch.zeros(shape if value.dim() == len(shape) else (2,) * value.dim(), dtype=torch.float64)
