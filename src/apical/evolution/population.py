"""Train many learners at the same time: one rule, different weights, top-down networks and learning rates.

A lifetime is the training of one learner from its initial weights for a fixed number of steps. `torch.func.vmap` runs the
lifetimes of a whole population as one, so that each step costs a few large products instead of many small ones. It maps the
unmodified rule: :class:`Population` does not depend on top-down networks and also trains learners by backpropagation or
direct feedback alignment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.modules.batchnorm import _NormBase

from apical.core.credit import Credit, CreditRule
from apical.core.cut import CutRule
from apical.core.wrapped import WrappedRule
from apical.errors import ConfigError, DataError, UnsupportedModelError
from apical.evolution.tape import recorded


@dataclass(frozen=True)
class Lifetime:
    """How one learner is trained: full batches, or `batch_size` examples per step, the same for the whole population.

    Attributes:
        steps: number of updates.
        lr: step size of the optimiser.
        optimizer: "adam" (with its default betas) or "sgd" (with momentum 0.9).
        clip: maximum norm of the gradient of all weights together; 0 disables clipping.
        batch_size: examples per step, drawn at each step; None uses all.
    """

    steps: int = 50
    lr: float = 0.02
    optimizer: Literal["adam", "sgd"] = "adam"
    clip: float = 1.0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.clip < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise ConfigError(f"steps, lr and batch size of a lifetime must be positive, clip at least 0; got {self}")
        if self.optimizer not in ("adam", "sgd"):
            raise ConfigError(f'the optimizer of a lifetime must be "adam" or "sgd", not {self.optimizer!r}')

    def require_examples(self, number: int) -> None:
        """Raise `DataError` if a mini-batch is larger than the data."""
        if self.batch_size is not None and self.batch_size > number:
            raise DataError(f"cannot draw batches of {self.batch_size} from {number} examples; use a smaller batch size")


class Layout:
    """Conversion between a flat vector and the named tensors concatenated in it."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def flat(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return a vector (size,), or (P, size) if each tensor has a leading dimension P."""
        batch = next(iter(parameters.values())).dim() - len(next(iter(self.shapes.values())))
        return torch.cat([parameters[name].flatten(batch) for name in self.shapes], dim=-1)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views (..., *shape) of a vector (..., size)."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()], dim=-1)
        return {
            name: part.view(*part.shape[:-1], *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


class Population:
    """Learners that share one rule and differ in their weights.

    Args:
        rule: any rule whose operations `torch.func` can transform. Its model keeps its own weights.
        inputs, targets: an example batch, used to find the rule's units.
        individual: prefix of the rule's parameters, in addition to the model's, that are separate for each learner, such
            as "teacher.".
        record: record the operations of the first step for each shape of the data and replay them, which avoids the
            rule's Python overhead. For rules whose operations depend only on shapes, as in top-down credit assignment.

    Raises:
        ConfigError: the rule wraps another rule.
        UnsupportedModelError: the model keeps running statistics, which the learners of a population cannot share.
    """

    def __init__(
        self, rule: CreditRule, inputs: Tensor, targets: Tensor, individual: str | None = None, record: bool = False
    ) -> None:
        if isinstance(rule, WrappedRule):
            raise ConfigError(f"a population does not accept {type(rule).__name__}; pass its {type(rule.rule).__name__}")
        for name, module in rule.model.named_modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                raise UnsupportedModelError(
                    f"layer {name!r} ({type(module).__name__}) keeps running statistics, which the learners of a population "
                    "would share; replace it by GroupNorm, or build it with track_running_stats=False"
                )
        self.rule, self.record = rule, record
        self._records: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        if individual is not None:
            rule.loss = lambda output, targets: output.new_zeros(())  # unused: top-down networks do not use the loss
        if isinstance(rule, CutRule):
            rule.plain_roots = True
        rule(inputs[:2], targets[:2])  # finds the units and draws feedback weights
        named = dict(rule.named_parameters())
        self.learner = Layout({name: p for name, p in named.items() if name.startswith("model.") and p.requires_grad})
        apart = {name: p for name, p in named.items() if individual is not None and name.startswith(individual)}
        self.other = Layout(apart) if apart else None

    def start(self, model: nn.Module) -> Tensor:
        """Return flat weights (n,) of a model with the structure of the rule's model."""
        return self.learner.flat({f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad})

    @cached_property
    def _gradients(self) -> Callable[..., dict[str, Tensor]]:
        def gradient(weights: dict[str, Tensor], other: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
            def roots(weights: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
                credit: Credit = functional_call(self.rule, {**weights, **other}, (x, y))
                signals = (torch.ones_like(r) if s is None else s for r, s in zip(credit.roots, credit.signals, strict=True))
                return tuple(credit.roots), tuple(signals)

            _, pull_back, signals = cast(Any, vjp(roots, weights, has_aux=True))
            result: dict[str, Tensor] = pull_back(signals)[0]
            return result

        return gradient

    def gradients(self, weights: Tensor, other: Tensor | None, inputs: Tensor, targets: Tensor, own: bool = False) -> Tensor:
        """Return the rule's `.grad` for each learner, (P, n), from weights (P, n) and other individual parameters (P, m).

        Args:
            inputs, targets: one batch for all or, with `own`, one per learner: (P, batch, ...).
        """
        data = 0 if own else None
        mapped = vmap(self._gradients, in_dims=(0, 0, data, data))

        def step(weights: Tensor, other: Tensor | None, inputs: Tensor, targets: Tensor) -> Tensor:
            named = self.other.named(other) if self.other is not None and other is not None else {}
            return self.learner.flat(mapped(self.learner.named(weights), named, inputs, targets))

        if not self.record:
            return step(weights, other, inputs, targets)
        arguments = (weights, other, inputs, targets)
        kind = tuple((tuple(t.shape), t.dtype, t.device) if t is not None else None for t in arguments)
        if (kind, own) not in self._records:
            self._records[kind, own] = recorded(step, arguments)
        with torch.no_grad():
            return self._records[kind, own](*arguments)

    def outputs(self, weights: Tensor, inputs: Tensor, own: bool = False) -> Tensor:
        """Return model outputs (P, batch, ...) for weights (P, n)."""

        def forward(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            plain = {name.removeprefix("model."): weight for name, weight in weights.items()}
            result: Tensor = functional_call(self.rule.model, plain, (x,))
            return result

        with torch.no_grad():
            result: Tensor = vmap(forward, in_dims=(0, 0 if own else None))(self.learner.named(weights), inputs)
        return result

    def train(
        self,
        start: Tensor,
        other: Tensor | None,
        inputs: Tensor,
        targets: Tensor,
        lifetime: Lifetime,
        *,
        lr: Tensor | None = None,
        seed: int = 0,
        own: bool = False,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the weights (P, n) after a lifetime.

        Args:
            start: initial weights, (P, n), or (n,) if they are the same for all learners.
            other: other individual parameters (P, m), such as the top-down networks; None if there are none.
            lr: step size of each learner (P,), instead of the lifetime's.
            seed: seed of the mini-batches.
            own: inputs and targets have a leading dimension P.
            watch: called before each step and after the last one with the number of finished steps and the weights (P, n).

        Raises:
            DataError: a mini-batch is larger than the data.
        """
        number = other.shape[0] if other is not None else start.shape[0] if lr is None else lr.shape[0]
        weights = start.expand(number, -1).clone()
        generator = torch.Generator().manual_seed(seed)
        examples = inputs.shape[1 if own else 0]
        lifetime.require_examples(examples)
        rates = torch.as_tensor(lifetime.lr if lr is None else lr, dtype=weights.dtype, device=weights.device)
        step = inner_optimizer(lifetime, weights, rates.view(-1, 1))
        for done in range(lifetime.steps):
            if watch is not None:
                watch(done, weights)
            x, y = inputs, targets
            if lifetime.batch_size is not None:
                index = torch.randperm(examples, generator=generator)[: lifetime.batch_size].to(inputs.device)
                x, y = (x[:, index], y[:, index]) if own else (x[index], y[index])
            gradient = self.gradients(weights, other, x, y, own)
            if lifetime.clip:
                norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
                gradient.mul_((lifetime.clip / (norm + 1e-6)).clamp(max=1.0))
            step(gradient)
        if watch is not None:
            watch(lifetime.steps, weights)
        return weights


def inner_optimizer(lifetime: Lifetime, weights: Tensor, rates: Tensor) -> Callable[[Tensor], None]:
    """Return a function that updates `weights` (P, n) in place from gradients (P, n), as `torch.optim` would per learner."""
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    count = 0

    def adam(gradient: Tensor) -> None:
        nonlocal count
        count += 1
        first.lerp_(gradient, 1 - 0.9)
        second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        scale = (second.sqrt() / (1 - 0.999**count) ** 0.5).add_(1e-8)
        weights.sub_(first / scale * (rates / (1 - 0.9**count)))

    def sgd(gradient: Tensor) -> None:
        first.mul_(0.9).add_(gradient)
        weights.sub_(first * rates)

    return adam if lifetime.optimizer == "adam" else sgd


def losses(outputs: Tensor, targets: Tensor, own: bool = False) -> Tensor:
    """Return the mean negative log-likelihood of classes (batch,) or squared error: (P,), for outputs (P, batch, ...)."""
    if targets.is_floating_point():
        goals = targets if own else targets.expand_as(outputs)
        return (outputs - goals).square().flatten(1).mean(1)
    logs = torch.log_softmax(outputs, -1)
    index = (targets if own else targets.expand(outputs.shape[0], -1)).unsqueeze(-1)
    return -logs.gather(-1, index).squeeze(-1).mean(1)


def accuracies(outputs: Tensor, targets: Tensor, own: bool = False) -> Tensor:
    """Return the accuracy (P,) of outputs (P, batch, classes) for targets (batch,), or (P, batch) with `own`."""
    return (outputs.argmax(-1) == targets).to(outputs.dtype).mean(1)
