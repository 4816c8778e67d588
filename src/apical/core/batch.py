"""What rules that compute with targets themselves require of a batch (shapes, classes, precision) and of memory."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apical.core.credit import Loss
from apical.core.losses import squared_error
from apical.errors import ConfigError, UnsupportedModelError

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may use: version 2 ("max" is no limit) and version 1."""

ELEMENTWISE = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, squared_error),
    *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits),
)
"""Losses that compare outputs and targets elementwise, and silently broadcast the smaller to the larger."""

MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)
"""The same losses as modules."""


def require_samples(inputs: Tensor) -> None:
    """Refuse an empty batch.

    Raises:
        ConfigError: the batch has no samples.
    """
    if len(inputs) == 0:
        raise ConfigError("the batch is empty: credit is a mean over samples")


def require_shape(name: str, made: Tensor, shape: Sequence[int]) -> None:
    """Refuse samples for which a layer or block gives another output shape than the rule was made for.

    Args:
        name: name of the layer.
        made: the output (batch, ...).
        shape: expected output shape of one sample.

    Raises:
        UnsupportedModelError: names the layer.
    """
    if made.shape[1:] != shape:
        raise UnsupportedModelError(
            f"layer {name!r} gave {tuple(made.shape[1:])} per sample, but the rule was made for {shape}; pass the "
            "input_shape of these samples"
        )


def fitted(loss: Loss, output: Tensor, targets: Tensor) -> Tensor:
    """Return targets in the output's shape if the loss is elementwise, e.g. (N,) for (N, 1); else unchanged.

    Raises:
        ConfigError: the number of samples differs, or numeric targets have another shape.
    """
    if targets.dim() == 0 or len(targets) != len(output):
        raise ConfigError(
            f"{len(output)} inputs came with targets of shape {tuple(targets.shape)}: give one for each sample"
        )
    function = getattr(loss, "func", loss)
    if targets.shape == output.shape or not (function in ELEMENTWISE or isinstance(function, MODULES)):
        return targets
    if not targets.is_floating_point():
        if function is squared_error:
            return targets
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(f"{name} compares numbers, not class labels: pass one-hot targets, or squared_error as the loss")
    if _without_ones(targets) != _without_ones(output):
        raise ConfigError(f"targets of shape {tuple(targets.shape)} do not fit outputs of shape {tuple(output.shape)}")
    return targets.view_as(output)


def _without_ones(values: Tensor) -> tuple[int, ...]:
    return tuple(size for size in values.shape[1:] if size != 1)


def require_rows(what: str, inputs: object, output: object = None) -> None:
    """Refuse inputs, and an output if given, that are not one tensor of finite numbers with a row per sample.

    Args:
        what: name of what needs them, for the message.

    Raises:
        ConfigError: says what they are instead.
    """
    for kind, value in (("inputs", inputs), ("outputs", output)):
        if not isinstance(value, Tensor) and value is not None:
            raise ConfigError(
                f"{what} needs {kind} that are one tensor with a row for each sample, not {type(value).__name__}: measure a "
                "module around the model that takes and returns one"
            )
    assert isinstance(inputs, Tensor)
    if inputs.dim() == 0 or len(inputs) == 0:
        raise ConfigError(f"{what} needs at least one sample, but the batch is empty")
    if not bool(inputs.isfinite().all()):
        raise ConfigError(f"{what} needs finite inputs, but these hold NaN or infinite values")


def require_classes(targets: Tensor, classes: int) -> None:
    """Refuse class labels outside 0..classes - 1; compiled graphs are not checked.

    Raises:
        ConfigError: names the label.
    """
    if targets.is_floating_point() or torch.compiler.is_compiling() or not targets.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0:
        raise ConfigError(
            f"the targets have the label {low}, but every sample needs a class here: remove samples that should be "
            "ignored (ignore_index) from the batch"
        )
    if high >= classes:
        raise ConfigError(
            f"the targets have the label {high}, but the model has {classes} outputs; classes are numbered from 0"
        )


def counted(targets: Tensor, error: Tensor) -> Tensor | None:
    """Return the indices of the samples that count (n,), or None if all do: the loss ignores samples of a negative class.

    Args:
        targets: class labels (batch,); with any other targets every sample counts.
        error: the loss's gradient (batch, ...), which is zero for ignored samples.

    Raises:
        ConfigError: no sample counts.
    """
    if targets.is_floating_point() or targets.dim() != 1 or torch.compiler.is_compiling() or bool((targets >= 0).all()):
        return None
    rows = ((targets >= 0) | error.flatten(1).any(1)).nonzero().squeeze(1)
    if len(rows) == 0:
        raise ConfigError("the loss ignores every sample of the batch: there is no credit to assign")
    return rows if len(rows) < len(targets) else None


def widened(inputs: Tensor, model: nn.Module) -> Tensor:
    """Return inputs in the model's dtype, for rules that turn autocast off inside: it would use a shorter one."""
    weight = next(model.parameters(), inputs)
    takes = torch.is_autocast_enabled(inputs.device.type) and weight.dtype is torch.float32
    return inputs.to(weight.dtype) if takes else inputs


def require_precision(rule: str, weight: Tensor) -> None:
    """Refuse half precision, which loses the small differences between activities from which a rule learns.

    Raises:
        UnsupportedModelError: the weight is neither float32 nor float64.
    """
    if weight.dtype not in (torch.float32, torch.float64):
        kind = str(weight.dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{rule} learns from small differences between activities, which {kind} rounds away: keep the model in "
            "float32 (model.float())"
        )


def require_one_type(rule: str, weight: Tensor, feedback: Iterable[Tensor]) -> None:
    """Refuse a model that was moved without its rule.

    Args:
        rule: name of the rule.
        weight: a weight of the model.
        feedback: tensors that the rule itself holds; the first one is checked.

    Raises:
        ConfigError: dtype or device differ.
    """
    own = next(iter(feedback), None)
    if own is None or (own.dtype is weight.dtype and own.device == weight.device):
        return
    raise ConfigError(
        f"the model is {weight.dtype} on {weight.device}, but the feedback of {rule} is {own.dtype} on {own.device}: move "
        "the rule, which moves both (rule.to(...)), not the model alone"
    )


def device_memory(device: torch.device) -> int | None:
    """Return the bytes that a device has and this process may use, free or not; None if that is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *container_limits()])
    return None


def container_limits(files: Iterable[str] = CGROUPS) -> list[int]:
    """Return how many bytes the container of this process may use: empty if there is no container or no limit."""
    texts = [path.read_text().strip() for path in map(Path, files) if path.is_file()]
    return [int(text) for text in texts if text.isdecimal()]


def require_memory(what: str, n_bytes: int, like: Tensor, remedy: str) -> None:
    """Raise UnsupportedModelError if a device cannot hold a rule's matrices.

    Args:
        what: the matrices and their layer, for the message.
        n_bytes: their size, with what computing them takes.
        like: a tensor on the device.
        remedy: what the caller can do instead.
    """
    limit = device_memory(like.device)
    if limit is not None and n_bytes > limit:
        raise UnsupportedModelError(
            f"{what} need {n_bytes / 1e9:,.0f} GB, and {like.device.type} has {limit / 1e9:,.0f} GB: {remedy}"
        )
