"""The recipe's optimiser: one group for the forward weights and, if a rule learns its feedback, one for the feedback."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from apical.bench.passes import Pass
from apical.bench.recipe import ClipOver, Recipe
from apical.bench.schedule import cosine, piecewise
from apical.core.credit import CreditRule
from apical.errors import ConfigError
from apical.optim import InputAdam

NEVER = "never_decays"
"""Marks a group of forward weights that does not decay."""
FEEDBACK = "feedback"
"""Name of the groups of feedback weights."""


def make_optimizer(recipe: Recipe, rule: CreditRule) -> Optimizer:
    """Return the optimiser over every trainable parameter of the rule, with the first epoch's values.

    The first group has all parameters except `rule.feedback_parameters()`, which are the last group; without any there is
    one group. If only matrices decay (`decay_on`), forward weights that do not decay are a separate second group. With muon,
    dense and recurrent weights and parameters that learn with them are Muon's; tables, kernels and vectors are AdamW's.

    Raises:
        ConfigError: this PyTorch has no Muon.
    """
    feedback = [parameter for parameter in rule.feedback_parameters() if parameter.requires_grad]
    apart = set(map(id, feedback))
    forward = [parameter for parameter in rule.parameters() if parameter.requires_grad and id(parameter) not in apart]
    groups = _forward_groups(recipe, rule, forward)
    groups += [{"params": feedback, **_feedback_options(recipe)}] if feedback else []
    options = {"lr": recipe.lr[0], "weight_decay": recipe.weight_decay[0], **_options(recipe)}
    if recipe.optimizer == "muon":
        named = [{"name": FEEDBACK if group["params"] is feedback else "forward", **group} for group in groups]
        return MuonAndAdamW(named, partial(_is_matrix, _tables(rule) - _multiplied(rule)), **options)
    return KINDS[recipe.optimizer](groups, **options)


KINDS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": partial(torch.optim.NAdam, decoupled_weight_decay=True),
    "radam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
    "input-adam": InputAdam,
}
"""Optimisers by their names in recipes, except muon, which consists of two."""


def _forward_groups(recipe: Recipe, rule: CreditRule, forward: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Return one group; or, if only matrices decay, one group of these and a marked group of the rest."""
    if recipe.decay_on == "all":
        return [{"params": forward}]
    tables = _tables(rule)
    decays = [parameter.dim() > 1 and id(parameter) not in tables for parameter in forward]
    matrices, rest = ([p for p, it in zip(forward, decays, strict=True) if it == wanted] for wanted in (True, False))
    return [{"params": matrices}, {"params": rest, NEVER: True, "weight_decay": 0.0}]


def _tables(rule: CreditRule) -> set[int]:
    """Return the look-up tables, by identity."""
    return {id(module.weight) for module in rule.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}


def _multiplied(rule: CreditRule) -> set[int]:
    """Return the weights of dense layers, one of which may also be a table."""
    return {id(module.weight) for module in rule.modules() if isinstance(module, nn.Linear)}


def _is_matrix(tables: set[int], parameter: Tensor) -> bool:
    return parameter.dim() == 2 and id(parameter) not in tables


def parts(optimizer: Optimizer) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of the forward weights, and those of the feedback weights."""
    groups = optimizer.param_groups
    if isinstance(optimizer, MuonAndAdamW):
        return [g for g in groups if g["name"] != FEEDBACK], [g for g in groups if g["name"] == FEEDBACK]
    forward = 1 + any(group.get(NEVER) for group in groups)
    return groups[:forward], groups[forward:]


def _options(recipe: Recipe) -> dict[str, Any]:
    """Return the options of the optimiser that no schedule changes."""
    if recipe.optimizer == "sgd":
        return {"momentum": recipe.momentum}
    return {"betas": (recipe.momentum, recipe.beta2), "eps": recipe.eps}


def _feedback_options(recipe: Recipe) -> dict[str, Any]:
    """Return the same for the feedback weights."""

    def either(value: float | None, otherwise: float) -> float:
        return otherwise if value is None else value

    beta1 = either(recipe.feedback_beta1, recipe.momentum)
    if recipe.optimizer == "sgd":
        return {"momentum": beta1}
    return {
        "betas": (beta1, either(recipe.feedback_beta2, recipe.beta2)),
        "eps": either(recipe.feedback_eps, recipe.eps),
    }


def scheduled(recipe: Recipe, finished: int) -> tuple[float, float]:
    """Return learning rate and weight decay of the forward weights after `finished` epochs."""
    lr = piecewise(recipe.lr, recipe.lr_epochs, finished)
    if recipe.lr_cosine:
        lr = cosine(lr, recipe.lr_min or recipe.lr_final * lr, recipe.lr_cosine, finished)
    return lr, piecewise(recipe.weight_decay, recipe.weight_decay_epochs, finished)


def begin_pass(optimizer: Optimizer, recipe: Recipe, current: Pass) -> None:
    """Set the rates of a pass; called again when a run is resumed within it."""
    lr, decay = scheduled(recipe, current.epoch - 1)
    forward, feedback = parts(optimizer)
    for group in forward:
        group["lr"], group["weight_decay"] = lr, 0.0 if group.get(NEVER) else decay
    for group in feedback:
        group["lr"] = lr if recipe.feedback_lr is None else recipe.feedback_lr
        if current.kind == "pretrain" and recipe.pretrain_lr is not None:
            group["lr"] = recipe.pretrain_lr
        group["weight_decay"] = decay if recipe.feedback_weight_decay is None else recipe.feedback_weight_decay


def set_rate(optimizer: Optimizer, recipe: Recipe, step: int, steps_per_epoch: int) -> None:
    """Set the learning rate of one step, if the recipe's warm-up makes it change with steps.

    It rises linearly to --lr, multiplied by half a cosine over the steps of --lr-cosine epochs. Feedback weights without a
    separate rate follow.

    Args:
        step: forward steps before this one, over all epochs.
        steps_per_epoch: of the forward weights.
    """
    if not recipe.lr_warmup:
        return
    lr = piecewise(recipe.lr, recipe.lr_epochs, step // steps_per_epoch)
    if recipe.lr_cosine:
        lr = cosine(lr, recipe.lr_min or recipe.lr_final * lr, recipe.lr_cosine * steps_per_epoch, step)
    lr *= min(1.0, (step + 1) / recipe.lr_warmup)
    forward, feedback = parts(optimizer)
    for group in [*forward, *(feedback if recipe.feedback_lr is None else [])]:
        group["lr"] = lr


def end_pass(optimizer: Optimizer, recipe: Recipe, current: Pass) -> None:
    """Clear the feedback weights' moments at the end of pre-training, for which the authors use a separate optimiser."""
    if current.kind == "pretrain" and current.number == recipe.pretrain_epochs - 1:
        for group in parts(optimizer)[1]:
            for parameter in group["params"]:
                for member in getattr(optimizer, "members", [optimizer]):
                    member.state.pop(parameter, None)


@torch.no_grad()
def shape_gradients(optimizer: Optimizer, recipe: Recipe, step: int | None) -> None:
    """Transform gradients before the optimiser's step: warm-up, centralisation, clipping, in this order.

    Args:
        step: forward steps before this one, over all epochs; None in a pass of the feedback weights, which has no warm-up.
    """
    factor = 1.0 if step is None or step >= recipe.warmup_steps else (step + 1) / recipe.warmup_steps
    if factor < 1 or recipe.centralise:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if factor < 1:
                    gradient.mul_(factor)
                if recipe.centralise and gradient.dim() > 1:
                    gradient.sub_(gradient.mean(dim=tuple(range(1, gradient.dim())), keepdim=True))
    clip(optimizer, recipe.clip, recipe.clip_over)


def clip(optimizer: Optimizer, largest: float, over: ClipOver = "tensor") -> None:
    """Clip gradients to norm `largest`; 0 is off.

    Args:
        over: each forward tensor separately, or the forward network as one; feedback weights are always clipped together.
    """
    if not largest:
        return
    weights, others = parts(optimizer)
    forward, feedback = [p for group in weights for p in group["params"]], [p for group in others for p in group["params"]]
    apart = [forward] if over == "network" else [[parameter] for parameter in forward]
    for parameters in [*apart, feedback]:
        nn.utils.clip_grad_norm_(parameters, largest)


class MuonAndAdamW(Optimizer):
    """Muon and AdamW, two optimisers of PyTorch with separate groups, used as one.

    Muon's step is scaled to the root mean square of AdamW's, so that one learning rate and decay suit both.

    Args:
        groups: as for any optimiser of PyTorch.
        is_matrix: whether a parameter is updated by Muon.
        betas: betas of AdamW; the first is also Muon's momentum.

    Raises:
        ConfigError: this PyTorch has no Muon.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        is_matrix: Callable[[Tensor], bool],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        muon: Any = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise ConfigError(
                f"optimizer muon needs torch.optim.Muon, which PyTorch {torch.__version__} does not have: update PyTorch, "
                "or use adamw"
            )
        matrices, others = [], []
        for group in groups:
            of_muon = {key: value for key, value in group.items() if key not in ("betas", "eps")}
            of_muon["momentum"] = group.get("betas", betas)[0]
            matrices.append({**of_muon, "params": [p for p in group["params"] if is_matrix(p)]})
            others.append({**group, "params": [p for p in group["params"] if not is_matrix(p)]})
        matrices, others = ([group for group in part if group["params"]] for part in (matrices, others))
        self.members: list[Optimizer] = []
        if matrices:
            self.members.append(muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.members.append(AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of both."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """State of both, read-only."""
        return {parameter: its for member in self.members for parameter, its in member.state.items()}

    def step(self, closure: Any = None) -> Any:
        """Take a step with both; `closure` computes the gradients first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for member in self.members:
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both."""
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of both."""
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
