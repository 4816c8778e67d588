"""What a network can learn from given inputs: the spectrum of its Jacobian in the weights, and of a rule's own kernel.

    J_W = d outputs / d theta, stacked over samples: (samples x outputs, parameters);   K = J_W G^T

Near an equilibrium the singular values of J_W set the rates of learning by gradient descent, and the rank says how many
output directions can be learned at all. Under a rule, G holds its update for each unit of output error in place of J_W: the
eigenvalues of K say which output modes the rule learns, and how fast; one with a negative real part is unlearned. The
spectrum of learning dynamics is what Trautner, Li & Ravela (arXiv 2106.11409, 1912.05081) size networks by; their norm could
not be read, and the bound here is by counting.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from apical.core.batch import require_rows
from apical.core.credit import CreditRule
from apical.core.rest import kept_attributes, undisturbed
from apical.core.wrapped import innermost
from apical.diagnostics.curvature import ENTRIES_AT_ONCE, Parameters, jacobian_rows
from apical.diagnostics.gauss_newton import require_apart
from apical.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class Learnability:
    """The spectrum of what can be learned.

    Attributes:
        singular_values: of J_W, from large to small.
        rank: how many of them are not zero.
        log10_condition: of the largest over the smallest that is not zero.
        kernel: eigenvalues of `J_W G^T`, complex, by falling real part; those of `J_W J_W^T` without a rule.
    """

    singular_values: Tensor
    rank: int
    log10_condition: float
    kernel: Tensor

    @property
    def unlearned(self) -> float:
        """Share of the output modes that the rule makes worse, or leaves alone."""
        largest = self.kernel.abs().max()
        return float((self.kernel.real <= 1e-7 * largest).double().mean())


def weight_jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """J_W of the trainable parameters: (samples, outputs, parameters), in float64 and in evaluation mode.

    Args:
        model: its samples must not mix; it is only read.
        inputs: (samples, ...).
    """
    twin = copy.deepcopy(model).double().eval()
    parameters = {name: p.detach() for name, p in twin.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigError("the model has no parameter that learns")
    exact = inputs.double() if inputs.is_floating_point() else inputs
    size = sum(p.numel() for p in parameters.values())

    def one(sample: Tensor) -> Tensor:
        def output(p: Parameters) -> Tensor:
            made = functional_call(twin, p, (sample[None],))
            require_rows("learnability", inputs, made)
            return cast(Tensor, made).flatten()

        result = vjp(output, parameters)
        (rows,) = vmap(result[1])(torch.eye(len(result[0]), dtype=result[0].dtype, device=result[0].device))
        return torch.cat([rows[name].flatten(1) for name in parameters], 1)

    try:
        with kept_attributes(twin), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "There is a performance drop", UserWarning
            )  # of batches, against a fast kernel
            jacobian: Tensor = vmap(one, chunk_size=max(1, ENTRIES_AT_ONCE // (64 * size)))(exact)
    except RuntimeError:  # something in the model has no rule for batches, such as an autograd.Function
        learned = [p for p in twin.parameters() if p.requires_grad]
        jacobian = torch.stack([jacobian_rows(twin, learned, sample) for sample in exact])
    return jacobian


def rule_updates(rule: CreditRule, inputs: Tensor, outputs: int) -> Tensor:
    """G: what the rule adds to `.grad` for a unit of error at one output of one sample: (samples, outputs, parameters).

    The rule is called with the loss `<error, output>`, so it needs to take any loss; it is left as it was.

    Raises:
        ConfigError: the rule does not take this loss, or learns from labels instead of the loss's derivative.
    """
    name = type(rule).__name__
    if "weight" in innermost(rule)._loss_options:
        raise ConfigError(
            f"{name} has no kernel, because a kernel is computed from updates for arbitrary errors: it learns from labels"
        )
    names = [name for name, p in rule.model.named_parameters() if p.requires_grad]
    rows = []
    with undisturbed(rule), torch.enable_grad():
        rule.eval()
        rule.loss = lambda output, error: (output * error).sum()
        learned = dict(rule.model.named_parameters())

        def update(sample: Tensor, error: Tensor) -> Tensor:
            for parameter in rule.parameters():
                parameter.grad = None
            try:
                rule.accumulate(sample[None], error[None])
            except (ConfigError, UnsupportedModelError) as problem:
                raise ConfigError(
                    f"{name} has no kernel, because a kernel is computed from updates for arbitrary errors: {problem}"
                ) from problem
            grads = [learned[n].grad for n in names]
            parts = [learned[n].new_zeros(learned[n].shape) if g is None else g for n, g in zip(names, grads, strict=True)]
            return torch.cat([part.detach().flatten() for part in parts])

        errors = torch.eye(outputs, dtype=next(iter(learned.values())).dtype, device=inputs.device)
        for sample in inputs:
            rows += [update(sample, error) for error in errors]
    return torch.stack(rows).view(len(inputs), outputs, -1).double()


def learnability(model: nn.Module, inputs: Tensor, rule: CreditRule | None = None) -> Learnability:
    """Return the spectrum of a model on a batch of inputs, and of a rule's kernel on it.

    Memory is `samples x outputs x parameters`; a few samples show the head of the spectrum.

    Args:
        model: any network whose samples do not mix.
        inputs: (samples, ...).
        rule: around the same model; None for gradient descent.

    Raises:
        ConfigError: no parameter learns, or the rule has no kernel; see :func:`rule_updates`.

    >>> learnability(nn.Linear(3, 2), torch.randn(9, 3)).rank
    8
    """
    if rule is not None and rule.model is not model:
        raise ConfigError("the rule has another model than the one being measured: pass rule.model")
    require_rows("learnability", inputs)
    require_apart(model)
    with kept_attributes(model):
        jacobian = weight_jacobian(model, inputs)
    flat = jacobian.flatten(0, 1)
    triangle = torch.linalg.qr(flat.mT, mode="r")[1] if flat.shape[1] > flat.shape[0] else flat
    values: Tensor = torch.linalg.svdvals(triangle)
    rank = numerical_rank(values, max(flat.shape))
    if rule is None:
        kernel = torch.complex(values.square(), torch.zeros_like(values))
    else:
        updates = rule_updates(rule, inputs, jacobian.shape[1]).flatten(0, 1).to(flat.device)
        kernel = torch.linalg.eigvals(flat @ updates.mT)
        kernel = kernel[kernel.real.argsort(descending=True)]
    condition = float((values[0] / values[rank - 1]).log10()) if rank else math.inf
    return Learnability(values, rank, condition, kernel)


def numerical_rank(values: Tensor, longest: int) -> int:
    """Return the number of singular values above rounding, which is `longest` times the precision times the largest."""
    return int((values > values.max() * longest * torch.finfo(values.dtype).eps).sum())


def rank_by_width(build: Callable[[int], nn.Module], widths: Sequence[int], inputs: Tensor) -> dict[int, int]:
    """Return the rank of J_W for networks of several widths on the same inputs; it stops growing where these are exhausted.

    >>> rank_by_width(lambda h: nn.Sequential(nn.Linear(2, h), nn.Tanh(), nn.Linear(h, 1)), (1, 2), torch.randn(50, 2))
    {1: 5, 2: 9}
    """
    return {width: learnability(build(width), inputs).rank for width in widths}


def smallest_width(rank: int, dimension: int) -> int:
    """Return the least width h of a network d-h-d whose parameters can have this rank: `ceil((rank - d) / (2 d + 1))`.

    A bound by counting; networks may need more.

    >>> smallest_width(30, 3)
    4
    """
    return max(0, math.ceil((rank - dimension) / (2 * dimension + 1)))
